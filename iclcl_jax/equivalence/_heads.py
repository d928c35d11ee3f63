"""Certificates of attention that somebody else's model has computed."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _pytree, _validate, attention, kernels, losses, precision
from iclcl_jax._program import compiled
from iclcl_jax.attention import _layout
from iclcl_jax.equivalence import _verdict
from iclcl_jax.equivalence._diagnosis import diagnose, map_rows
from iclcl_jax.equivalence._residuals import residuals
from iclcl_jax.types import Array, Bool, FeatureMap, Float, Kernel, Loss

_SOFTMAX = kernels.ExponentialKernel()
_UNTESTED = 'holds, untested: values of a query are equal, any weights do'


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class HeadsCertificate(_verdict.Judged):
  """The result of `verify_heads`.

  Attributes:
    phi, tolerance, dtype, precision: as in `Certificate`.
    sizes: sequences, heads, queries checked in each, keys.
    residual: the largest of each head, see `Residuals`. Shape `[N]`.
    verdict: 'holds', or what prevents it; 'fails: ' and what the output is
      instead, as far as that can be told; 'holds, untested: ' if any would do.
  """

  phi: str
  sizes: tuple[int, int, int, int]
  residual: np.ndarray

  def _rows(self) -> dict[str, str]:
    worst = int(np.argmax(self.residual))
    residual = f'{self.residual[worst]:.1e} in head {worst}'
    return {
      'title': f'every head = one gradient step: {self.phi}',
      'sequences, heads, queries, keys': ', '.join(map(str, self.sizes)),
      'arithmetic': f'{self.dtype}, {self.precision}',
      'largest residual': f'{residual} (tolerance {self.tolerance:.0e})',
      'verdict': self.verdict,
    }


def verify_heads(
  query: Float[Array, '... T N d_k'],
  key: Float[Array, '... S K d_k'],
  value: Float[Array, '... S K d_v'],
  output: Float[Array, '... T N d_v'],
  *,
  phi: FeatureMap | Kernel = _SOFTMAX,
  loss: Loss = losses.contrastive,
  learning_rate: float | Array = 1.0,
  bias: Float[Array, '... N T S'] | None = None,
  mask: Bool[Array, '... N T S'] | None = None,
  is_causal: bool = False,
  scale: float | None = None,
  num_queries: int | None = None,
  arithmetic: precision.Arithmetic = precision.HIGHEST,
) -> HeadsCertificate:
  r"""Checks that attention computed elsewhere is one gradient step, by head.

  Takes what a model hands to its attention and what it gets back (`capture`
  finds them), in the layout of `attention.dot_product_attention` and with its
  `bias` (ALiBi, say), `mask`, `is_causal` and `scale`. Each output is compared
  with the dual model of the keys that its query sees, in closed form and with
  weights from `jax.grad` of the loss; queries that see none are left out. Scale
  and bias belong to the kernel, :math:`\exp(s\,q^\top k + b)`.

  Args:
    output: what the model's attention returned. Shape `[..., T, N, d_v]`.
    phi: the feature map or kernel that the model is said to use; a `ValueError`
      if it has no place for scale or bias.
    loss, learning_rate: as in `modified.attention_from_loss`.
    num_queries: how many of each head are checked, evenly spaced; None for all.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8), 'f4')
    >>> h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    >>> verify_heads(q, k, v, h, is_causal=True).verdict
    'holds'
    >>> verify_heads(q, k, v, h).verdict
    'fails: the output is that of is_causal=True'
  """
  _verdict.check_arithmetic(arithmetic)
  arrays = query, key, value, output, bias, mask, phi
  remedy = 'Let equivalence.capture collect them.'
  _validate.check_concrete('an argument', *arrays, remedy=remedy)
  tokens = _check_tokens(query, key, value, output)
  *batch, size, num_heads, width = query.shape
  shape = (*batch, num_heads, size, key.shape[-3])
  bias, mask = (
    _layout.broadcastable(name, x, shape)
    for name, x in (('bias', bias), ('mask', mask))
  )
  _check_claim(phi, scale, bias, mask)
  stretch = 1.0 if scale is None else scale * width**0.5
  rows = np.arange(size)
  if num_queries is not None:
    _validate.at_least(1, num_queries=num_queries)
    rows = np.unique(np.linspace(0, size - 1, num_queries).astype(int))
  heads = _by_head(tokens, bias, mask, rows, stretch, is_causal)
  measured = arithmetic.transform(_measure)(phi, heads, loss, learning_rate)
  residual, amount, condition, sees, spread = (
    np.asarray(x).reshape(-1, num_heads, len(rows)) for x in measured
  )
  dtype = min((x.dtype for x in tokens), key=lambda x: jnp.finfo(x).bits)
  # A score is off by its own rounding, and a residual by that of the scores.
  rounding = amount * float(jnp.finfo(dtype).eps)
  limit = np.maximum(rounding, precision.tolerance(dtype))
  if not np.all(np.isfinite(residual)):
    finite = (np.all(np.isfinite(np.asarray(x, float))) for x in tokens)
    names = 'query', 'key', 'value', 'output', _verdict.NORMALISER
    verdict = f'not finite: {names[[*finite, False].index(False)]}'
  elif not np.any(sees):
    verdict = 'no visible token'
  elif not np.max(condition) <= np.finfo(condition.dtype).eps ** -0.5:
    verdict = 'ill-conditioned normaliser'
  else:
    unexplained = np.max(np.where(residual <= rounding, 0, residual))
    verdict = _verdict.judge(np.max(residual), dtype, arithmetic, unexplained)
  if verdict == 'holds' and np.max(spread) <= precision.tolerance(dtype):
    verdict = _UNTESTED
  if verdict == 'fails':
    verdict += ': ' + diagnose(phi, heads, stretch, residual, limit)
  return HeadsCertificate(
    phi=getattr(phi, '__name__', type(phi).__name__),
    sizes=(len(residual), num_heads, len(rows), shape[-1]),
    residual=np.max(residual, axis=(0, 2)),
    tolerance=precision.tolerance(dtype),
    dtype=dtype.name,
    precision=arithmetic.name,
    verdict=verdict,
  )


class _Row(NamedTuple):
  """A query, times the stretch of the scale, its output, and what it sees."""

  query: Array
  output: Array
  head: Array
  position: Array
  mask: Array | None
  bias: Array | None


@functools.partial(jax.jit, static_argnums=5)
def _by_head(tokens, bias, mask, rows, stretch, is_causal):
  """Sorts by key-value head `C` of any sequence: keys, values, who asks."""
  is_double = any(x.dtype == np.float64 for x in tokens)
  query, key, value, output = (  # [B, heads, tokens, width]
    jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2).astype(
      jnp.float64 if is_double else jnp.float32
    )
    for x in tokens
  )
  batch, num_heads, size, _ = query.shape
  num_keys = key.shape[2]
  mask = _layout.visible(mask, size, num_keys, is_causal, None)
  if bias is not None:  # The lowest numbers of a dtype hide a key.
    seen = bias > jnp.finfo(bias.dtype).min / 2
    mask = seen if mask is None else mask & seen
    bias = jnp.where(seen, bias, 0).astype(query.dtype)

  def per_row(x, width):  # [B | 1, N | 1, T | 1, S | 1] to [C, rows, width]
    x = jnp.broadcast_to(x, (batch, num_heads, size, width))[:, :, rows]
    return x.reshape(batch * key.shape[1], -1, width)

  position, head = jnp.arange(size), jnp.arange(num_heads)
  row = _Row(
    query=per_row(query * stretch, query.shape[-1]),
    output=per_row(output, output.shape[-1]),
    head=per_row(head[None, :, None, None], 1)[..., 0],
    position=per_row(position[None, None, :, None], 1)[..., 0],
    mask=None if mask is None else per_row(mask, num_keys),
    bias=None if bias is None else per_row(bias, num_keys),
  )
  return *(x.reshape(-1, *x.shape[2:]) for x in (key, value)), row


@compiled
def _measure(phi, heads, loss, learning_rate):
  measure = functools.partial(_measure_row, phi, loss, learning_rate)
  return map_rows(measure, heads)


def _measure_row(phi, loss, learning_rate, keys, values, row: _Row):
  """Returns residual, size of scores, condition, if a key is seen, spread.

  The last is how far the visible values are apart, relative to their size.
  """
  query, mask = row.query, row.mask
  amount = jnp.abs(keys) @ jnp.abs(query) / query.shape[0] ** 0.5
  if row.bias is not None:
    phi, amount = _Biased(phi), amount + jnp.abs(row.bias)
    keys = jnp.concatenate([keys, row.bias[:, None]], axis=1)
    query = jnp.concatenate([query, jnp.ones(1, query.dtype)])
  result = residuals(
    phi,
    query,
    keys,
    values,
    mask=mask,
    loss=loss,
    learning_rate=learning_rate,
    attention_fn=lambda *_, **__: row.output,
  )
  weights = jnp.zeros_like(amount)
  if hasattr(phi, 'log_kernel'):
    weights = attention.weights(phi, query, keys, mask=mask)
  amount = jnp.sum(jnp.where(weights > 0, weights * amount, 0))
  seen = jnp.ones(len(keys), bool) if mask is None else mask
  sees, shown = jnp.any(seen), jnp.where(seen[:, None], values, 0)
  apart = jnp.where(seen[:, None], shown - shown[jnp.argmax(seen)][None], 0)
  spread = precision.ratio(*(jnp.max(jnp.abs(x)) for x in (apart, shown)))
  residual = jnp.where(sees, result.residual, 0)
  condition = jnp.where(sees, result.condition, 1)
  return residual, amount, condition, sees, spread


@_pytree.dataclass
class _Biased:
  """The kernel `k(x, y) exp(b)`; `b` is the last coordinate of the key."""

  kernel: Any  # A positive one.

  def log_kernel(self, x, y):
    return self.kernel.log_kernel(x[:-1], y[:-1]) + x[-1] * y[-1]

  def __call__(self, x, y):
    return jnp.exp(self.log_kernel(x, y))


def _check_tokens(query, key, value, output) -> list[Array]:
  query, key, value, output = map(jnp.asarray, (query, key, value, output))
  _layout.check_layout(query, key, value)
  expected = (*query.shape[:-1], value.shape[-1])
  if output.shape != expected or not jnp.issubdtype(output.dtype, jnp.floating):
    raise ValueError(
      f'output is {_validate.describe(output)}; expected floating-point '
      f'[..., T, N, d_v] = {list(expected)}. Pass what the attention returned, '
      'before its projection.'
    )
  return [query, key, value, output]


def _check_claim(phi, scale, bias, mask) -> None:
  if mask is not None:
    _validate.check_kind('mask', mask, 'BNTS', _validate.BOOLEAN)
  if bias is not None:
    _validate.check_kind('bias', bias, 'BNTS', _validate.FLOATING)
  is_softmax = isinstance(phi, kernels.ExponentialKernel)
  for name, is_wrong in (
    ('scale', scale is not None and not is_softmax),
    ('bias', bias is not None and not hasattr(phi, 'log_kernel')),
  ):
    if is_wrong:
      raise ValueError(
        f'{name} is given with {_validate.kind_of(phi)}; expected None: write '
        'it into phi. ExponentialKernel takes a scale, log_kernel a bias.'
      )
