"""Machine-checked certificates that attention is one gradient step.

Three independent paths compute one number: attention adds up scored values,
the closed-form dual model applies its weights, and the autodiff dual model
gets its weights from `jax.grad` of the loss. `verify` compares them, for the
contrastive loss of plain attention or for any other; `verify_model` compares
them for every head of a stack of Transformer blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from iclcl_jax import (
  _validate,
  attention,
  coefficients,
  dual,
  kernels,
  losses,
  modified,
  moments,
  precision,
)
from iclcl_jax._model_certificate import (
  ModelCertificate,
  ModelResiduals,
  certificate_of,
  model_residuals,
  verify_model,
)
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask

if TYPE_CHECKING:
  import optax

__all__ = [
  'AttentionFn',
  'Certificate',
  'ModelCertificate',
  'ModelResiduals',
  'Residuals',
  'certificate_of',
  'model_residuals',
  'residuals',
  'verify',
  'verify_model',
]

AttentionFn: TypeAlias = Callable[..., Array]


class Residuals(NamedTuple):
  """Both sides of the identity and their distance.

  Attributes:
    attention: the attention output. Shape `[d_v]`.
    closed_form: prediction of the closed-form dual model. Shape `[d_v]`.
    autodiff: prediction of the autodiff dual model. Shape `[d_v]`.
    residual: largest difference of the three, relative to the sum of absolute
      values of everything that was added (backward stable). Shape `[]`.
    relative_error: the same difference relative to the output alone, which
      cancellation can make large. Shape `[]`.
    normaliser: the normaliser `D`, scaled. Shape `[]`.
    condition: `sum |terms of D| / |D|`, 1 for positive maps. Shape `[]`.
  """

  attention: Float[Array, ' d_v']
  closed_form: Float[Array, ' d_v']
  autodiff: Float[Array, ' d_v']
  residual: Float[Array, '']
  relative_error: Float[Array, '']
  normaliser: Float[Array, '']
  condition: Float[Array, '']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
  """The result of `verify`.

  Attributes:
    phi: name of the feature map or kernel.
    num_demonstrations: demonstrations `N`.
    num_query_tokens: query-side tokens.
    attention: the attention output. Shape `[d_v]`.
    closed_form: prediction of the closed-form dual model. Shape `[d_v]`.
    autodiff: prediction of the autodiff dual model. Shape `[d_v]`.
    residual: backward-stable residual, see `Residuals`.
    relative_error: the plain relative error.
    condition: condition number of the normaliser.
    tolerance: the residual that rounding explains in this dtype.
    dtype: dtype of the inputs.
    precision: arithmetic under which the check ran.
    verdict: 'holds', or what prevents it.
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
  tolerance: float
  dtype: str
  precision: str
  verdict: str

  @property
  def holds(self) -> bool:
    """Whether the identity holds to rounding, in full precision."""
    return self.verdict == 'holds'

  def to_dict(self) -> dict[str, Any]:
    """Returns plain Python numbers, strings and lists."""
    result = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    for name in ('attention', 'closed_form', 'autodiff'):
      result[name] = [float(x) for x in result[name]]
    return result | {'holds': self.holds}

  def __str__(self) -> str:
    tokens = f'{self.num_demonstrations} + {self.num_query_tokens}'
    rows = {
      'demonstrations + query tokens': tokens,
      'arithmetic': f'{self.dtype}, {self.precision}',
      'residual': f'{self.residual:.1e} (tolerance {self.tolerance:.0e})',
      'relative error': f'{self.relative_error:.1e}',
      'condition of normaliser': f'{self.condition:.3g}',
      'verdict': self.verdict,
    }
    title = f'attention = one gradient step: {self.phi}'
    return '\n'.join(
      [title] + [f'  {name:<30} {value}' for name, value in rows.items()]
    )


def residuals(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_query_tokens: int = 0,
  mask: Mask | None = None,
  loss: losses.Loss = losses.contrastive,
  penalty: dual.Penalty | None = None,
  optimizer: 'optax.GradientTransformation | None' = None,
  learning_rate: float | Array = 1.0,
  attention_fn: AttentionFn | None = None,
) -> Residuals:
  r"""Computes attention and both dual models; can be jitted.

  The residual of two results :math:`a, b` is :math:`\max|a-b| / S` with
  :math:`S = \max_j \sum_i c_i (|v_{ij}| + |h_j|)` and
  :math:`c_i = |\phi(k_i)|^\top|\phi(q)| / |D|`: what rounding of the sums may
  cause, however much they cancel. For another loss than the contrastive one
  the labels of its `modified.LossAttention` count beside the values.

  Args:
    phi: feature map or kernel.
    query: the test input. Shape `[d_k]`.
    keys: keys of demonstrations, then of query-side tokens. Shape `[N, d_k]`.
    values: their values. Shape `[N, d_v]`.
    num_query_tokens: how many of the last rows belong to the query side and
      give `W_0`.
    mask: valid tokens. Shape `[N]`; None for all.
    loss: what the dual model descends.
    penalty: of its weights, `penalty(weights) -> []`.
    optimizer: a linear optax transformation; None for `optax.sgd(1.0)`.
    learning_rate: factor of the update.
    attention_fn: the attention to be certified, `(phi, query, keys, values) ->
      [d_v]`, with a keyword `mask` if one is given; None for the attention
      that the loss implies.

  Returns:
    The `Residuals`. With another loss, `closed_form` is the attention that
    `modified.attention_from_loss` builds.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, no demonstration is left,
      or as `modified.attention_from_loss`.

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1.
  """
  _validate.check_tokens(keys, values, mask, query=query)
  _validate.check_num_query_tokens(num_query_tokens, keys.shape[0])
  size = keys.shape[0] - num_query_tokens
  seen = (None, None) if mask is None else (mask[:size], mask[size:])
  start = dual.zero_shot(phi, keys[size:], values[size:], mask=seen[1])
  demonstrations = keys[:size], values[:size]
  attend = modified.attention_from_loss(
    loss, penalty=penalty, optimizer=optimizer, learning_rate=learning_rate
  )
  implied: AttentionFn = functools.partial(
    attend, num_query_tokens=num_query_tokens
  )
  is_linear = loss is losses.contrastive and penalty is None
  if is_linear and optimizer is None:
    step = dual.one_step(
      phi, start, *demonstrations, learning_rate=learning_rate, mask=seen[0]
    )
    closed_form = dual.predict(phi, step, query)
    is_plain = _validate.is_concrete(learning_rate) and learning_rate == 1
    implied = _plain_attention if is_plain else implied
  else:
    closed_form = implied(phi, query, keys, values, mask=mask)
  if attention_fn is None:
    output = implied(phi, query, keys, values, mask=mask)
  else:
    output = _attend(attention_fn, phi, query, keys, values, mask)
  auto = dual.one_step_autodiff(
    phi,
    start,
    *demonstrations,
    loss=_bind_normaliser(loss, phi, query, keys, mask),
    penalty=penalty,
    optimizer=optimizer,
    learning_rate=learning_rate,
    mask=seen[0],
  )
  outputs = jnp.stack([output, closed_form, dual.predict(phi, auto, query)])
  terms = _score_terms(phi, query, keys, mask)
  normaliser = jnp.sum(terms)
  shares = jnp.sum(jnp.abs(terms), axis=1) / jnp.abs(normaliser)
  if mask is not None:
    values = jnp.where(mask[:, None], values, 0)
  amounts = jnp.abs(values) + jnp.abs(output)[None]
  if not is_linear:
    labels = attend.labels(
      phi, query, keys, values, num_query_tokens=num_query_tokens, mask=mask
    )
    amounts = amounts + jnp.abs(labels)
  scale = jnp.max(shares @ amounts)
  spread = jnp.max(jnp.max(outputs, axis=0) - jnp.min(outputs, axis=0))
  return Residuals(
    attention=outputs[0],
    closed_form=outputs[1],
    autodiff=outputs[2],
    residual=_ratio(spread, scale),
    relative_error=_ratio(spread, jnp.max(jnp.abs(output))),
    normaliser=normaliser,
    condition=jnp.sum(shares),
  )


def verify(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_query_tokens: int = 0,
  mask: Mask | None = None,
  loss: losses.Loss = losses.contrastive,
  penalty: dual.Penalty | None = None,
  optimizer: 'optax.GradientTransformation | None' = None,
  learning_rate: float | Array = 1.0,
  attention_fn: AttentionFn | None = None,
  arithmetic: precision.Arithmetic = precision.HIGHEST,
) -> Certificate:
  """Checks that attention is one gradient step, and says why if it is not.

  Runs eagerly, and under the highest matrix-product precision unless told
  otherwise. In reduced precision a small residual is 'precision-limited'. A
  value that is not finite, a zero or an ill-conditioned normaliser are
  verdicts of their own.

  Args:
    phi: feature map or kernel.
    query: the test input. Shape `[d_k]`.
    keys: keys of demonstrations, then of query-side tokens. Shape `[N, d_k]`.
    values: their values. Shape `[N, d_v]`.
    num_query_tokens: how many of the last rows belong to the query side and
      give `W_0`.
    mask: valid tokens. Shape `[N]`; None for all.
    loss: what the dual model descends.
    penalty: of its weights, `penalty(weights) -> []`.
    optimizer: a linear optax transformation; None for `optax.sgd(1.0)`.
    learning_rate: factor of the update.
    attention_fn: the attention to be certified, such as
      `modified.regularised(strength=0.5)`; None
      for the attention that the loss implies.
    arithmetic: `precision.HIGHEST`, `precision.BFLOAT16_OPERANDS` (what a TPU
      does by default, on any machine) or `precision.PLATFORM_DEFAULT`.

  Returns:
    The `Certificate`; `certificate.holds` is the verdict as a boolean.

  Raises:
    ValueError: as `residuals`; if called inside `jit`.

  Example:
    >>> from iclcl_jax import kernels
    >>> x = jnp.eye(3)
    >>> verify(kernels.ExponentialKernel(), x[0], x, x).verdict
    'holds'

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1.
  """
  if not isinstance(arithmetic, precision.Arithmetic):
    raise ValueError(
      f'arithmetic is a {type(arithmetic).__name__}; expected a '
      'precision.Arithmetic, such as precision.HIGHEST.'
    )

  def compute(query, keys, values):
    return residuals(
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

  result = arithmetic.transform(compute)(query, keys, values)
  if not _validate.is_concrete(result, mask):
    raise ValueError(
      'verify was called inside a transformation; expected concrete arrays. '
      'Use equivalence.residuals inside jit or vmap.'
    )

  query, keys, values = map(jnp.asarray, (query, keys, values))
  tolerance = precision.tolerance(keys.dtype)
  inputs = {'query': query, 'keys': keys, 'values': values}
  if mask is not None:
    inputs |= {'keys': keys[mask], 'values': values[mask]}
  verdict = _verdict(inputs, result, tolerance, arithmetic)
  if mask is not None and not mask.any():
    verdict = 'no visible token'
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
    tolerance=tolerance,
    dtype=jnp.dtype(keys.dtype).name,
    precision=arithmetic.name,
    verdict=verdict,
  )


def _verdict(inputs, result, tolerance, arithmetic) -> str:
  for name, array in inputs.items():
    if not jnp.all(jnp.isfinite(array)):
      return f'not finite: {name}'
  if not jnp.isfinite(result.normaliser):
    return 'not finite: normaliser'
  if result.normaliser == 0:
    return 'zero normaliser'
  limit = float(jnp.finfo(result.normaliser.dtype).eps) ** -0.5
  if not result.condition <= limit:
    return 'ill-conditioned normaliser'
  for name in ('attention', 'closed_form', 'autodiff', 'residual'):
    if not jnp.all(jnp.isfinite(getattr(result, name))):
      return f'not finite: {name}'
  if arithmetic.reduced_tolerance is None:
    return 'holds' if result.residual <= tolerance else 'fails'
  reduced = max(tolerance, arithmetic.reduced_tolerance)
  return 'precision-limited' if result.residual <= reduced else 'fails'


def _bind_normaliser(loss, phi, query, keys, mask) -> losses.Loss:
  """Gives a loss that asks for it the normaliser of the query."""
  if not losses.declares_normaliser(loss):
    return loss
  normaliser = dual.normaliser(phi, keys, query, mask=mask)
  bound = functools.partial(loss, normaliser=normaliser)
  if losses.is_sum_over_demonstrations(loss):
    return losses.sum_over_demonstrations(bound)
  return bound


def _attend(attention_fn, phi, query, keys, values, mask):
  """The caller's attention, with the mask as a keyword if there is one."""
  _validate.check_function(
    'attention_fn',
    attention_fn,
    4,
    '(phi, query, keys, values) -> output, with a keyword mask if one is given',
  )
  keywords = {} if mask is None else {'mask': mask}
  output = attention_fn(phi, query, keys, values, **keywords)
  _validate.check_result('attention_fn', output, values.shape[1:])
  return output


def _plain_attention(phi, query, keys, values, *, mask) -> Float[Array, ' d_v']:
  """Attention; for the softmax kernel by a path that shares no code."""
  if isinstance(phi, kernels.ExponentialKernel):
    return attention.softmax_attention(query, keys, values, mask=mask)
  return attention.kernel_attention(phi, query, keys, values, mask=mask)


def _score_terms(phi, query, keys, mask) -> Float[Array, 'N _']:
  if _validate.is_feature_map(phi):
    return moments.score_terms(phi, query, keys, mask)[0]
  return coefficients.scores(phi, query, keys, mask)[0][:, None]


def _ratio(difference, scale):
  """A quotient that is 0 where nothing differs, even relative to zero."""
  return difference / jnp.where(scale > 0, scale, 1)
