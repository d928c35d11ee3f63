"""Certificates of attention that somebody else's model has computed."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import (
  _pytree,
  _validate,
  attention,
  kernels,
  losses,
  moments,
  precision,
)
from iclcl_jax._door import host_door
from iclcl_jax.equivalence._diagnosis import diagnose
from iclcl_jax.equivalence._residuals import residuals
from iclcl_jax.equivalence._verdict import judge
from iclcl_jax.types import (
  Array,
  Bool,
  FeatureMap,
  Float,
  Kernel,
  LogKernel,
  Loss,
  Penalty,
)

if TYPE_CHECKING:
  import optax

_SOFTMAX = kernels.ExponentialKernel()
# Queries of one key-value head that are checked at a time.
_CHUNK_SIZE = 8


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class HeadsCertificate:
  """The result of `verify_heads`.

  Attributes:
    phi: name of the feature map or kernel.
    sizes: sequences, heads, queries checked in each, keys.
    residual: the largest of each head, see `Residuals`. Shape `[H]`.
    unexplained: the same without what rounding of large scores explains.
    tolerance: the residual that rounding of the sums explains in this dtype.
    dtype: the narrowest dtype of the inputs.
    precision: arithmetic under which the dual models were computed.
    verdict: 'holds', or what prevents it; 'fails: ' and what the outputs are
      instead, as far as that can be told.
  """

  phi: str
  sizes: tuple[int, int, int, int]
  residual: np.ndarray
  unexplained: np.ndarray
  tolerance: float
  dtype: str
  precision: str
  verdict: str

  @property
  def holds(self) -> bool:
    """Whether the identity holds to rounding in every head."""
    return self.verdict == 'holds'

  def to_dict(self) -> dict[str, Any]:
    """Returns plain Python numbers, strings and lists."""
    pairs = dataclasses.asdict(self).items()
    plain = {name: getattr(x, 'tolist', lambda x=x: x)() for name, x in pairs}
    return plain | {'holds': self.holds}

  def __str__(self) -> str:
    worst = int(np.argmax(self.residual))
    residual = f'{self.residual[worst]:.1e} in head {worst}'
    rows = {
      'sequences, heads, queries, keys': ', '.join(map(str, self.sizes)),
      'arithmetic': f'{self.dtype}, {self.precision}',
      'largest residual': f'{residual} (tolerance {self.tolerance:.0e})',
      'verdict': self.verdict,
    }
    return '\n'.join(
      [f'every head = one gradient step: {self.phi}']
      + [f'  {name:<31} {value}' for name, value in rows.items()]
    )

  __repr__ = __str__


def verify_heads(
  queries: Float[Array, '... M H d_k'],
  keys: Float[Array, '... N G d_k'],
  values: Float[Array, '... N G d_v'],
  outputs: Float[Array, '... M H d_v'],
  *,
  phi: FeatureMap | Kernel = _SOFTMAX,
  mask: Bool[Array, '... H M N'] | None = None,
  bias: Float[Array, '... H M N'] | None = None,
  is_causal: bool = False,
  scale: float | None = None,
  num_queries: int | None = None,
  num_query_tokens: int = 0,
  loss: Loss = losses.contrastive,
  penalty: Penalty | None = None,
  optimizer: 'optax.GradientTransformation | None' = None,
  arithmetic: precision.Arithmetic = precision.HIGHEST,
) -> HeadsCertificate:
  r"""Checks that attention computed elsewhere is one gradient step, by head.

  Takes what a model hands to its attention and what it gets back (`capture`
  finds them), in the layout of `jax.nn.dot_product_attention`. Each output is
  compared with the dual model of the keys that its query sees, in closed form
  and with weights from `jax.grad` of the loss; queries that see none are left
  out. Scale and bias belong to the kernel, :math:`\exp(s\,q^\top k + b)`.

  Args:
    queries: shape `[..., M, H, d_k]`.
    keys: each head is shared by `H / G` query heads. Shape `[..., N, G, d_k]`.
    values: their values. Shape `[..., N, G, d_v]`.
    outputs: what the model's attention returned. Shape `[..., M, H, d_v]`.
    phi: the feature map or kernel that the model is said to use.
    mask: True where a query sees a key; broadcasts to `[..., H, M, N]`.
    bias: what is added to the scores, ALiBi say; broadcasts like `mask`.
    is_causal: whether query `t` sees the keys `0..t` alone.
    scale: factor of `q . k`; None for `1 / sqrt(d_k)`.
    num_queries: how many of each head are checked, evenly spaced; None for all.
    num_query_tokens: how many tokens give `W_0`, a query's own and those before
      it; needs `M = N`.
    loss: what the dual model descends.
    penalty: of its weights.
    optimizer: a linear optax transformation; None for `optax.sgd(1.0)`.
    arithmetic: as in `verify`.

  Returns:
    The `HeadsCertificate`.

  Raises:
    ValueError: if shapes disagree, an array is not of its kind, `phi` has no
      place for scale or bias, or inside `jit`; as `residuals`.

  Example:
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8), 'f4')
    >>> h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    >>> verify_heads(q, k, v, h, is_causal=True).verdict
    'holds'
    >>> verify_heads(q, k, v, h).verdict
    'fails: the outputs are those of is_causal=True'

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1, head by head.
  """
  precision.check_arithmetic(arithmetic)
  names = 'queries', 'keys', 'values', 'outputs', 'mask', 'bias'
  arguments = queries, keys, values, outputs, mask, bias
  arrays: dict[str, Any] = dict(zip(names, arguments, strict=True))
  _check(arrays, phi, scale, num_query_tokens)
  *_, size, num_heads, width = queries.shape
  tokens = [arrays[name] for name in names[:4]]
  dtype = min((x.dtype for x in tokens), key=lambda x: jnp.finfo(x).bits)
  stretch = 1.0 if scale is None else scale * width**0.5
  rows = _spread(num_queries, size)
  heads = _by_head(arrays, rows, stretch, is_causal=is_causal)
  is_static = jax.tree_util.all_leaves([phi])
  measure = functools.partial(
    _measure,
    phi if is_static else None,
    (num_query_tokens, loss, penalty, optimizer),
  )
  measured = arithmetic.transform(measure)(None if is_static else phi, heads)
  residual, amount, condition, sees = (
    np.asarray(x).reshape(-1, num_heads, len(rows)) for x in measured
  )
  # A score is off by its own rounding, and a residual by that of the scores.
  rounding = amount * float(jnp.finfo(dtype).eps)
  unexplained = np.where(residual <= rounding, 0, residual)
  tolerance = precision.tolerance(dtype)
  if not np.all(np.isfinite(residual)):
    finite = {n: np.isfinite(np.asarray(arrays[n], float)) for n in names[:4]}
    bad = [n for n in finite if not np.all(finite[n])]
    verdict = f'not finite: {(*bad, "normaliser")[0]}'
  elif not np.any(sees):
    verdict = 'no visible token'
  elif not np.max(condition) <= np.finfo(condition.dtype).eps ** -0.5:
    verdict = 'ill-conditioned normaliser'
  else:
    verdict = judge(np.max(residual), dtype, arithmetic, np.max(unexplained))
  if verdict == 'fails':
    limit = np.maximum(rounding, tolerance)
    verdict += ': ' + diagnose(heads, stretch, residual, limit)
  return HeadsCertificate(
    phi=getattr(phi, '__name__', type(phi).__name__),
    sizes=(len(residual), num_heads, len(rows), keys.shape[-3]),
    residual=np.max(residual, axis=(0, 2)),
    unexplained=np.max(unexplained, axis=(0, 2)),
    tolerance=tolerance,
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


@functools.partial(jax.jit, static_argnames='is_causal')
def _by_head(arrays, rows, stretch, *, is_causal):
  """Sorts by key-value head `C` of any sequence: keys, values, who asks."""
  names = 'queries', 'keys', 'values', 'outputs'
  is_double = any(arrays[name].dtype == np.float64 for name in names)
  dtype = jnp.float64 if is_double else jnp.float32
  queries, keys, values, outputs = (arrays[n].astype(dtype) for n in names)
  *lead, size, num_heads, _ = queries.shape
  num_keys, num_groups = keys.shape[-3:-1]

  def per_key(x):  # [..., N, G, d] to [C, N, d]
    return jnp.swapaxes(x, -3, -2).reshape(-1, num_keys, x.shape[-1])

  def per_row(x):  # [..., H, M, d] to [C, rows, d]
    x = jnp.broadcast_to(x, (*lead, num_heads, size, x.shape[-1]))
    x = x[..., rows, :]
    return x.reshape(math.prod(lead) * num_groups, -1, x.shape[-1])

  def full_rank(x):
    x = x.reshape((1,) * (len(lead) + 3 - x.ndim) + x.shape)
    return jnp.broadcast_to(x, (*x.shape[:-1], num_keys))

  position = jnp.arange(size)
  mask, bias = jax.tree.map(full_rank, (arrays['mask'], arrays['bias']))
  if is_causal:
    past = full_rank(position[:, None] >= jnp.arange(num_keys)[None])
    mask = past if mask is None else mask & past
  if bias is not None:  # The lowest numbers of a dtype hide a key.
    seen = bias > jnp.finfo(bias.dtype).min / 2
    mask = seen if mask is None else mask & seen
    bias = jnp.where(seen, bias, 0).astype(dtype)
  row = _Row(
    query=per_row(jnp.swapaxes(queries * stretch, -3, -2)),
    output=per_row(jnp.swapaxes(outputs, -3, -2)),
    head=per_row(jnp.arange(num_heads)[:, None, None])[..., 0],
    position=per_row(position[:, None])[..., 0],
    mask=None if mask is None else per_row(mask),
    bias=None if bias is None else per_row(bias),
  )
  return per_key(keys), per_key(values), row


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(static_phi, objective, phi, heads):
  """Measures every query, one key-value head after the other."""
  phi = static_phi if phi is None else phi

  def measure(head):
    keys, values, rows = head
    row = functools.partial(_measure_row, phi, objective, keys, values)
    return moments.map_chunks(row, rows, _CHUNK_SIZE)

  return jax.lax.map(measure, heads)


def _measure_row(phi, objective, keys, values, row: _Row):
  """Returns residual, size of the scores, condition, and if a key is seen."""
  num_query_tokens, loss, penalty, optimizer = objective
  query, mask = row.query, row.mask
  amount = jnp.abs(keys) @ jnp.abs(query) / query.shape[0] ** 0.5
  if row.bias is not None:
    phi, amount = _Biased(phi), amount + jnp.abs(row.bias)
    keys = jnp.concatenate([keys, row.bias[:, None]], axis=1)
    query = jnp.concatenate([query, jnp.ones(1, query.dtype)])
  if num_query_tokens:  # They are the last ones, the query's own at the end.
    keys, values, amount, mask = jax.tree.map(
      lambda x: jnp.roll(x, -1 - row.position, axis=0),
      (keys, values, amount, mask),
    )
  result = residuals(
    phi,
    query,
    keys,
    values,
    num_query_tokens=num_query_tokens,
    mask=mask,
    loss=loss,
    penalty=penalty,
    optimizer=optimizer,
    attention_fn=lambda *_, **__: row.output,
  )
  weights = jnp.zeros_like(amount)
  if hasattr(phi, 'log_kernel'):
    weights = attention.weights(phi, query, keys, mask=mask)
  amount = jnp.sum(jnp.where(weights > 0, weights * amount, 0))
  sees = jnp.ones((), bool) if mask is None else jnp.any(mask)
  residual = jnp.where(sees, result.residual, 0)
  return residual, amount, jnp.where(sees, result.condition, 1), sees


@_pytree.register
@dataclasses.dataclass(frozen=True, eq=False)
class _Biased:
  """The kernel `k(x, y) exp(b)`; `b` is the last coordinate of the key."""

  kernel: LogKernel

  def log_kernel(self, x, y):
    return self.kernel.log_kernel(x[:-1], y[:-1]) + x[-1] * y[-1]

  def __call__(self, x, y):
    return jnp.exp(self.log_kernel(x, y))


def _spread(count: int | None, size: int) -> np.ndarray:
  """Returns so many positions, evenly spaced; all if None."""
  if count is None:
    return np.arange(size)
  _validate.at_least(1, num_queries=count)
  return np.unique(np.linspace(0, size - 1, count).astype(int))


def _check(arrays: dict[str, Any], phi, scale, num_query_tokens) -> None:
  """Checks the arguments of `verify_heads`; makes the arrays those of JAX."""
  if not _validate.is_concrete(arrays, phi):
    raise ValueError(
      'verify_heads was called inside a transformation; expected concrete '
      'arrays. Let equivalence.capture collect them.'
    )
  given = {name: x for name, x in arrays.items() if x is not None}
  arrays |= {name: jnp.asarray(x) for name, x in given.items()}
  queries, keys, values, outputs, mask, bias = arrays.values()
  _check_tokens(*map(_outline, (queries, keys, values, outputs)))
  *lead, size, num_heads, _ = queries.shape
  num_keys, num_groups = keys.shape[-3:-1]
  if num_heads % num_groups:
    raise ValueError(
      f'queries have {num_heads} heads and keys {num_groups}; expected a '
      'multiple. Heads are the last axis but one.'
    )
  _validate.at_least(0, num_query_tokens=num_query_tokens)
  if num_query_tokens:
    _validate.check_same('M = N', 'queries', size, 'keys', num_keys)
  shape = (*lead, num_heads, size, num_keys)
  for name, x, kind in ('mask', mask, jnp.bool_), ('bias', bias, jnp.floating):
    if x is None:
      continue
    ends = zip(x.shape[::-1], shape[::-1], strict=False)
    fits = x.ndim <= len(shape) and all(a in (1, b) for a, b in ends)
    if not fits or not jnp.issubdtype(x.dtype, kind):
      raise ValueError(
        f'{name} is {_validate.describe(x)}; expected booleans (mask) or '
        f'floats (bias) that broadcast to [..., H, M, N] = {list(shape)}. A '
        'mask of 0 and 1 is mask != 0, an additive one is a bias.'
      )
  is_softmax = isinstance(phi, kernels.ExponentialKernel)
  for name, is_wrong in (
    ('scale', scale is not None and not is_softmax),
    ('bias', bias is not None and not hasattr(phi, 'log_kernel')),
  ):
    if is_wrong:
      raise ValueError(
        f'{name} is given with a {type(phi).__name__}; expected None: write it '
        'into phi. ExponentialKernel takes a scale, log_kernel a bias.'
      )


def _outline(x: Array) -> jax.ShapeDtypeStruct:
  """Shape and dtype, with the leading axes in one."""
  lead, last = x.shape[:-3], x.shape[-3:]
  shape = (math.prod(lead), *last) if x.ndim >= 3 else x.shape
  return jax.ShapeDtypeStruct(shape, x.dtype)


@host_door
def _check_tokens(
  queries: Float[Array, 'B M H d_k'],
  keys: Float[Array, 'B N G d_k'],
  values: Float[Array, 'B N G d_v'],
  outputs: Float[Array, 'B M H d_v'],
) -> None:
  """Checks nothing that its annotations do not say."""
