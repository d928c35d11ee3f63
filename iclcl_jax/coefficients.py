r"""The exact-kernel twin of :mod:`iclcl_jax.moments`.

In the reproducing kernel Hilbert space of a kernel the weights are
:math:`W = \sum_i c_i \otimes \phi(k_i)`, and only the coefficients are kept:
no feature map is needed, the softmax kernel included. Positive kernels are
evaluated in log space. Arguments are those of `types.Form`.
"""

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.moments import largest, map_chunks, visible, zero_log_scale
from iclcl_jax.precision import accumulation_dtype, product, widen
from iclcl_jax.types import Array, Float, KernelDualState, Reading

# Evaluations of the trained function that are held at a time.
_CHUNK_SIZE = 256


def empty(kernel, keys, values, capacity=None) -> KernelDualState:
  """Returns the state that has seen nothing; only shapes and dtype are read."""
  del kernel
  dtype, size = accumulation_dtype(values.dtype), capacity or 0
  keys_dtype = jax.dtypes.canonicalize_dtype(keys.dtype)
  return KernelDualState(
    keys=jnp.zeros((size, keys.shape[1]), keys_dtype),
    coefficients=jnp.zeros((size, values.shape[1]), dtype),
    mass=jnp.zeros(size, dtype),
    used=None if capacity is None else jnp.zeros((), jnp.int32),
  )


def merge(a, b) -> KernelDualState:
  """Joins the rows of two states that saw different tokens."""
  if a.used is not None:
    return _write(a, b)
  pairs = zip(a[:3], b[:3], strict=True)
  keys, coefficients, mass = map(jnp.concatenate, pairs)
  return KernelDualState(keys, widen(coefficients), widen(mass))


def _write(state, new: KernelDualState) -> KernelDualState:
  """Writes rows into the free ones; traced rows beyond the last give NaN."""
  capacity, size = state.mass.shape[0], new.mass.shape[0]
  more = size if new.used is None else new.used
  remedy = 'Make it with dual.empty(..., capacity=...).'
  _validate.check_room('state', capacity, remedy, state.used, more)
  used = state.used + more
  rows = state.used + jnp.arange(size, dtype=used.dtype)
  # Rows beyond the last fall on it, and what is written there is NaN.
  rows = jnp.where(rows < used, jnp.minimum(rows, capacity - 1), capacity)
  written = jnp.where(used > capacity, jnp.nan, new.coefficients)
  keys, coefficients, mass = (
    old.at[rows].set(x.astype(old.dtype), mode='drop')
    for old, x in zip(state[:3], (new.keys, written, new.mass), strict=True)
  )
  return KernelDualState(keys, coefficients, mass, used)


def absorb(
  kernel, state, keys, values, mask=None, chunk_size=None
) -> KernelDualState:
  """Adds a row for each token; masked rows get coefficient and mass 0."""
  del kernel, chunk_size  # There are no features to hold.
  keys, values = jnp.asarray(keys), widen(jnp.asarray(values))
  mass = jnp.ones(keys.shape[0], bool) if mask is None else mask
  keys, values = visible(keys, mask), visible(values, mask)
  return merge(state, KernelDualState(keys, values, mass.astype(values.dtype)))


def get_weights(state) -> Float[Array, 'n d_v']:
  """Returns what an optimizer moves."""
  return state.coefficients


def with_weights(state, weights) -> KernelDualState:
  """Returns the state with other coefficients."""
  return state._replace(coefficients=weights)


def gradient(
  kernel, state, keys, values, rows, mask, loss
) -> Float[Array, 'n d_v']:
  r"""Returns the functional gradient of the loss of some rows.

  The loss sees the function through its evaluations :math:`f(k_j)` alone, so
  its gradient in the function space is
  :math:`\sum_j \partial L/\partial f(k_j) \otimes \phi(k_j)`, and
  `jax.grad` gives the coefficients. The rows are the last of the state.
  """
  keys_read = jnp.asarray(keys)[rows]
  values_read = visible(widen(jnp.asarray(values)[rows]), mask)

  def evaluate(key):
    reading = read(kernel, state, key)
    # Zero coefficients stay zero where their scale overflows.
    largest_scale = jnp.finfo(reading.log_scale.dtype).max
    scale = jnp.minimum(jnp.exp(reading.log_scale), largest_scale)
    return reading.numerator * scale

  predictions = visible(map_chunks(evaluate, keys_read, _CHUNK_SIZE), mask)
  slopes = visible(jax.grad(loss)(predictions, values_read), mask)
  used = state.keys.shape[0] if state.used is None else state.used
  rows = jnp.asarray(used - keys.shape[0], rows.dtype) + rows
  return jnp.zeros_like(state.coefficients).at[rows].add(slopes)


def penalty_gradient(kernel, state, penalty) -> Float[Array, 'n d_v']:
  """Returns the gradient of a penalty of the weights, as coefficients.

  The weights are written in an orthonormal basis of the span of the keys, from
  the eigenvectors of their kernel matrix. A penalty that does not change when
  the basis is rotated, as every norm, means the same as for a feature map.
  """
  if hasattr(penalty, 'ridge'):  # Exact, and in no basis.
    return penalty.ridge * state.coefficients
  if state.keys.shape[0] == 0:
    return jnp.zeros_like(state.coefficients)
  column = jax.vmap(lambda x, y: evaluate(kernel, x, y), in_axes=(None, 0))
  matrix = jax.vmap(column, in_axes=(0, None))(state.keys, state.keys)
  eigenvalues, vectors = jnp.linalg.eigh(matrix)
  smallest = eigenvalues[-1] * matrix.shape[0] * jnp.finfo(matrix.dtype).eps
  spans = eigenvalues > smallest
  root = jnp.sqrt(jnp.where(spans, eigenvalues, 1))
  basis = jnp.where(spans, root, 0)[None] * vectors
  weights = state.coefficients.T @ basis
  _validate.check_real_scalar('penalty', penalty, weights)
  slope = jax.grad(penalty)(weights)
  return (jnp.where(spans, 1 / root, 0)[None] * vectors) @ slope.T


def remove(
  kernel, state, key, label
) -> tuple[KernelDualState, Float[Array, '']]:
  """Clears the first row that holds the token; growth 1, infinite if none."""
  del kernel
  matches = (
    jnp.all(state.keys == key[None], axis=1)
    & jnp.all(state.coefficients == widen(label)[None], axis=1)
    & (state.mass > 0)
  )
  found = jnp.any(matches) & (jnp.sum(state.mass) > 1)
  # A row more, so that an empty state has a largest entry too.
  first = jnp.argmax(jnp.concatenate([matches, jnp.ones(1, bool)]))
  keep = jnp.arange(matches.shape[0]) != first
  rest = state._replace(
    coefficients=jnp.where(keep[:, None], state.coefficients, 0),
    mass=jnp.where(keep, state.mass, 0),
  )
  one = jnp.ones((), state.mass.dtype)
  amplification = jnp.where(found, one, jnp.inf)
  known = (jnp.where(found, x, jnp.nan) for x in rest[:3])
  rest = rest._replace(**dict(zip(rest._fields, known, strict=False)))
  return rest, amplification


def read(kernel, state, query) -> Reading:
  """Returns `sum_i c_i k(k_i, q)` and `sum_i m_i k(k_i, q)`."""
  weights, log_scale = _weigh(kernel, query, state.keys, state.mass > 0)
  coefficients, mass = widen((state.coefficients, state.mass))
  return Reading(coefficients.T @ weights, mass @ weights, log_scale)


def scores(
  kernel, query, keys, mask=None
) -> tuple[Float[Array, ' N'], Float[Array, '']]:
  """Returns `k(k_i, q)` for every key and their common log-scale."""
  if mask is None:
    return _weigh(kernel, query, keys, mask)
  # A masked NaN would return in the gradient. Keys are cleared whoever is
  # masked: queries with masks of their own share them.
  is_finite = jnp.all(jnp.isfinite(keys), axis=1)
  keys = visible(keys, is_finite)
  weights, log_scale = _weigh(kernel, query, keys, mask)
  return jnp.where(is_finite | ~mask, weights, jnp.nan), log_scale


def _weigh(kernel, query, keys, mask):
  """Returns the `scores` of keys that are finite where they are masked."""
  has_log = hasattr(kernel, 'log_kernel')
  fn = kernel.log_kernel if has_log else kernel
  weights = jax.vmap(lambda key: evaluate(fn, key, query))(keys)
  log_scale = jnp.zeros((), weights.dtype)
  if has_log:
    neutral = zero_log_scale(weights.dtype)
    exponent = weights if mask is None else jnp.where(mask, weights, neutral)
    weights, log_scale = jnp.exp(relative(exponent)), largest(exponent)
  return weights if mask is None else jnp.where(mask, weights, 0), log_scale


def score_terms(
  kernel, query, keys, mask=None
) -> tuple[Float[Array, 'N 1'], Float[Array, '']]:
  """Returns the `scores` as a column: each has one summand."""
  weights, log_scale = scores(kernel, query, keys, mask)
  return weights[:, None], log_scale


def causal_sums(
  kernel, queries, keys, values, chunk_size, mask=None, start=None
) -> Float[Array, 'N _']:
  """Returns what each position reads, score by score in blocks of rows."""
  start = empty(kernel, keys, values) if start is None else start
  past = KernelDualState(*start[:3])  # Free rows have mass 0.
  state = absorb(kernel, past, keys, values, mask)
  rows = jnp.concatenate([state.coefficients, state.mass[:, None]], axis=1)
  positions = jnp.arange(rows.shape[0])

  def sums(row):
    query, position = row
    visible = (positions <= position) & (state.mass > 0)
    weights, _ = scores(kernel, query, state.keys, visible)
    return jnp.concatenate([product(weights, rows), weights[position][None]])

  own = positions[start.mass.shape[0] :]
  return map_chunks(sums, (queries, own), chunk_size)


def relative(exponent: Float[Array, ' N']) -> Float[Array, ' N']:
  """Returns `exponent` less its largest, which becomes exactly 0.

  A compiler may fuse the subtraction with a product before it, which then is
  not rounded, and `exp` does not survive that at exponents of 1e9 in float32:
  what is left of the largest is taken from all.
  """
  below = exponent - largest(exponent)
  return below - largest(below)


def evaluate(kernel, x, y) -> Float[Array, '']:
  """Returns `kernel(x, y)`, checked: a user's own may return anything.

  Vectors of 16 bits are read in float32, as by `moments.scaled`.
  """
  x, y = widen((x, y))
  result = widen(kernel(x, y))
  dtype = jax.dtypes.canonicalize_dtype(x.dtype)
  if getattr(result, 'shape', None) != () or result.dtype != dtype:
    name = getattr(kernel, '__name__', type(kernel).__name__)
    raise ValueError(
      f'the kernel {name} returned {_validate.describe(result)} for vectors '
      f'{_validate.describe(x)}; expected a scalar [] of dtype {dtype}. See '
      'iclcl_jax.types.Kernel.'
    )
  return result
