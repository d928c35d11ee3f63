"""The certificate of one head and one query."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate, losses, moments, precision
from iclcl_jax._door import eager_door
from iclcl_jax.equivalence import _verdict
from iclcl_jax.equivalence._residuals import residuals
from iclcl_jax.types import (
  Array,
  AttentionFn,
  FeatureMap,
  Float,
  Kernel,
  Loss,
  Mask,
  Optimizer,
  Penalty,
)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Certificate(_verdict.Judged):
  """The result of `verify`.

  Attributes:
    phi: name of the feature map or kernel.
    num_demonstrations, num_query_tokens: of each side.
    attention, closed_form, autodiff, residual, relative_error, condition: as in
      `Residuals`.
    tolerance: the residual that rounding explains in this dtype.
    dtype: of the inputs, the narrowest if there are several.
    precision: arithmetic under which the check ran.
    verdict: 'holds', or what prevents it; 'precision-limited' is the best that
      16-bit inputs or reduced arithmetic can get.
  """

  phi: str
  num_demonstrations: int
  num_query_tokens: int
  attention: Array
  closed_form: Array
  autodiff: Array
  residual: float
  relative_error: float
  condition: float

  def _rows(self) -> dict[str, str]:
    tokens = f'{self.num_demonstrations} + {self.num_query_tokens}'
    return {
      'title': f'attention = one gradient step: {self.phi}',
      'demonstrations + query tokens': tokens,
      'arithmetic': f'{self.dtype}, {self.precision}',
      'residual': f'{self.residual:.1e} (tolerance {self.tolerance:.0e})',
      'relative error': f'{self.relative_error:.1e}',
      'condition of normaliser': f'{self.condition:.3g}',
      'verdict': self.verdict,
    }


@eager_door
def verify(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_query_tokens: int = 0,
  mask: Mask | None = None,
  loss: Loss = losses.contrastive,
  penalty: Penalty | None = None,
  optimizer: Optimizer | None = None,
  learning_rate: float | Array = 1.0,
  attention_fn: AttentionFn | None = None,
  arithmetic: precision.Arithmetic = precision.HIGHEST,
) -> Certificate:
  """Checks that attention is one gradient step, and says why if it is not.

  Runs eagerly, and under the highest matrix-product precision unless told
  otherwise. In reduced precision, or in a 16-bit dtype, a small residual is
  'precision-limited'. A value that is not finite, a zero or an ill-conditioned
  normaliser are verdicts of their own.

  Args:
    phi, query, keys, values, mask: as in `attention.kernel_attention`.
    num_query_tokens: how many of the last rows belong to the query side and
      give `W_0`.
    loss, penalty, optimizer, learning_rate: as in
      `modified.attention_from_loss`.
    attention_fn: the attention to be certified, such as
      `modified.regularised(strength=0.5)`, whose query side is one token; None
      for the attention that the loss implies.
    arithmetic: `precision.HIGHEST` or `precision.PLATFORM_DEFAULT`.

  Example:
    >>> x = jnp.eye(3)
    >>> verify(kernels.ExponentialKernel(), x[0], x, x).verdict
    'holds'
  """
  _verdict.check_arithmetic(arithmetic)
  result = arithmetic.transform(residuals)(
    phi,
    query,
    keys,
    values,
    num_query_tokens=num_query_tokens,
    mask=mask,
    loss=loss,
    penalty=penalty,
    optimizer=optimizer,
    learning_rate=learning_rate,
    attention_fn=attention_fn,
  )
  remedy = 'Use equivalence.residuals inside jit or vmap.'
  _validate.check_concrete('an argument', result, mask, remedy=remedy)
  query, keys, values = map(jnp.asarray, (query, keys, values))
  seen = {
    'query': query,
    'keys': moments.visible(keys, mask),
    'values': moments.visible(values, mask),
  }
  verdict = 'no visible token'
  if mask is None or np.any(mask):
    inputs, found = jax.device_get((seen, result))
    verdict = _judge(inputs, found, keys.dtype, arithmetic)
  own = getattr(attention_fn, '_default_query_tokens', num_query_tokens)
  if verdict == 'fails' and own > num_query_tokens:
    verdict += (
      f': attention_fn has {own} row on the query side, the dual model '
      f'{num_query_tokens}; state num_query_tokens={own}'
    )
  return Certificate(
    phi=getattr(phi, '__name__', type(phi).__name__),
    num_demonstrations=keys.shape[0] - num_query_tokens,
    num_query_tokens=num_query_tokens,
    attention=result.attention,
    closed_form=result.closed_form,
    autodiff=result.autodiff,
    residual=float(result.residual),
    relative_error=float(result.relative_error),
    condition=float(result.condition),
    tolerance=precision.tolerance(keys.dtype),
    dtype=jnp.dtype(keys.dtype).name,
    precision=arithmetic.name,
    verdict=verdict,
  )


def _judge(inputs, result, dtype, arithmetic) -> str:
  for name, array in inputs.items():
    if not np.all(np.isfinite(array)):
      return f'not finite: {name}'
  if not np.isfinite(result.normaliser):
    return f'not finite: {_verdict.NORMALISER}'
  if result.normaliser == 0:
    return 'zero normaliser'
  limit = float(jnp.finfo(result.normaliser.dtype).eps) ** -0.5
  if not result.condition <= limit:
    return 'ill-conditioned normaliser'
  for name in ('attention', 'closed_form', 'autodiff', 'residual'):
    if not np.all(np.isfinite(getattr(result, name))):
      return f'not finite: {name}'
  return _verdict.judge(float(result.residual), dtype, arithmetic)
