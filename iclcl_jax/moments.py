r"""The moments `sum_i v_i phi(k_i)^T` and `sum_i phi(k_i)`, in scaled form.

A state keeps, for each feature, a running maximum of the log-features and
everything relative to it, as flash attention does for each row: the largest
contribution to a feature is of order one, the query's own scale drops out, and
streams and merges are exact up to rounding. Every maximum is stopped from
gradients in both parts in which it occurs: it cancels in derivatives too.

Attention is a ratio of two linear models that share their features (append 1
to every label); the code carries both as the rows of one matrix. Arguments are
those of `types.Form`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._mesh import vary_as
from iclcl_jax.precision import accumulation_dtype, product, widen
from iclcl_jax.types import Array, DualState, FeatureMap, Float, Mask, Reading


def zero_log_scale(dtype) -> float:
  """Returns the log-scale of nothing: below any other, yet finite."""
  return float(jnp.finfo(dtype).min)


def largest(exponent: Array, axis: int | None = None) -> Array:
  """Returns the maximum, finite even of no row and stopped from gradients."""
  neutral = zero_log_scale(exponent.dtype)
  return jax.lax.stop_gradient(jnp.max(exponent, axis=axis, initial=neutral))


def visible(rows: Any, mask: Mask | None) -> Array:
  """Returns the rows, zeros where the mask is False: no NaN gets out."""
  return rows if mask is None else jnp.where(mask[:, None], rows, 0)


def scaled(
  phi: FeatureMap, x: Float[Array, ' d_k'], tower: str = 'scaled'
) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
  """Returns `phi.scaled(x)`, checked: a user's own map may return anything.

  A 16-bit vector is read in float32: the error of a log-feature is multiplied
  by the exponential.
  """
  x = widen(x)
  result = widen(getattr(phi, tower)(x))
  dtype = jax.dtypes.canonicalize_dtype(x.dtype)
  fits = (
    isinstance(result, tuple)
    and len(result) == 2
    and all(getattr(array, 'dtype', None) == dtype for array in result)
    and len(result[1].shape) == 1
    and result[0].shape in ((1,), result[1].shape)
  )
  if not fits:
    raise ValueError(
      f'phi.{tower} of {type(phi).__name__} returned '
      f'{_validate.describe(result)} for a vector {_validate.describe(x)}; '
      'expected (log_scale, features) of shapes [R] or [1], and [R], both '
      f'{dtype}. See iclcl_jax.types.FeatureMap.'
    )
  return result


def scaled_query(
  phi: FeatureMap, query: Float[Array, ' d_k']
) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
  """Returns `scaled`, of the tower for queries where a map has two."""
  has_two = hasattr(phi, 'scaled_query')
  return scaled(phi, query, 'scaled_query' if has_two else 'scaled')


def scaled_rows(
  phi: FeatureMap, keys: Float[Array, 'N d_k'], mask: Mask | None = None
) -> tuple[Float[Array, 'N _'], Float[Array, 'N R']]:
  """Returns log-scales and features of all rows; masked rows are neutral."""
  rows = jax.vmap(lambda key: scaled(phi, key))
  if mask is None:
    return rows(keys)
  log_scale, features = rows(jnp.where(mask[:, None], keys, 0))
  neutral = zero_log_scale(log_scale.dtype)
  return jnp.where(mask[:, None], log_scale, neutral), features


def labels(
  values: Float[Array, 'N d_v'], mask: Mask | None = None
) -> Float[Array, 'N _']:
  """Appends 1 to every value: labels of the weights and the mass together."""
  return visible(jnp.pad(values, ((0, 0), (0, 1)), constant_values=1), mask)


def split_chunks(arrays: Any, chunk_size: int) -> tuple[Any, Any]:
  """Splits leading axes into whole chunks `[n, chunk_size, ...]` and a rest."""

  def whole(array):
    count = array.shape[0] // chunk_size  # No -1: the size may be symbolic.
    rows = array[: count * chunk_size]
    return rows.reshape(count, chunk_size, *array.shape[1:])

  def rest(array):
    return array[array.shape[0] // chunk_size * chunk_size :]

  return jax.tree.map(whole, arrays), jax.tree.map(rest, arrays)


def map_chunks(fn: Callable[[Any], Any], rows: Any, chunk_size: int) -> Any:
  """Returns `jax.vmap(fn)(rows)` of a tree of rows, chunk after chunk."""
  fn_of_rows = jax.vmap(fn)
  size = jax.tree.leaves(rows)[0].shape[0]
  if isinstance(size, int) and size <= chunk_size:  # No loop to compile.
    return fn_of_rows(rows)
  chunks, rest = split_chunks(rows, chunk_size)
  whole = jax.lax.map(jax.checkpoint(fn_of_rows), chunks)
  return jax.tree.map(
    lambda a, b: jnp.concatenate([jax.lax.collapse(a, 0, 2), b]),
    whole,
    fn_of_rows(rest),
  )


def empty(phi, keys, values, capacity=None) -> DualState:
  """Returns the state that has seen nothing; only shapes and dtype are read."""
  del capacity  # Features are summed: there is room for any number.
  dtype = accumulation_dtype(values.dtype)
  row = jax.ShapeDtypeStruct(keys.shape[1:], dtype)
  num_features = jax.eval_shape(lambda x: scaled(phi, x), row)[1].shape[0]
  return DualState(
    weights=jnp.zeros((values.shape[1], num_features), dtype),
    mass=jnp.zeros(num_features, dtype),
    log_scale=jnp.full(num_features, zero_log_scale(dtype), dtype),
  )


def rescale(state: DualState, log_scale: Float[Array, ' R']) -> DualState:
  """Expresses a state relative to another, larger log-scale."""
  shrink = jnp.exp(state.log_scale - log_scale)
  return DualState(state.weights * shrink[None], state.mass * shrink, log_scale)


def merge(a, b) -> DualState:
  """Adds two states that saw different tokens through the same features."""
  a, b = widen((a, b))
  log_scale = jnp.maximum(a.log_scale, b.log_scale)
  a, b = rescale(a, log_scale), rescale(b, log_scale)
  return DualState(a.weights + b.weights, a.mass + b.mass, log_scale)


def absorb(phi, state, keys, values, mask=None, chunk_size=None) -> DualState:
  """Adds `v_i phi(k_i)^T` to the weights and `phi(k_i)` to the mass."""
  phi, state = widen((phi, state))  # Their slopes add up over the chunks.
  arrays = (keys, values) if mask is None else (keys, values, mask)
  if chunk_size is None:
    return _absorb(phi, state, *arrays)

  @jax.checkpoint
  def step(state, chunk):
    return _absorb(phi, state, *chunk), None

  size = keys.shape[0]
  if isinstance(size, int) and size < chunk_size:  # No loop to compile.
    return step(state, arrays)[0]
  chunks, rest = split_chunks(arrays, chunk_size)
  state, _ = jax.lax.scan(step, vary_as(state, phi, arrays), chunks)
  return step(state, rest)[0]


def _absorb(phi, state, keys, values, mask=None) -> DualState:
  row_scale, features = scaled_rows(phi, keys, mask)
  _check_size(state, features)
  log_scale = jnp.maximum(state.log_scale, largest(row_scale, axis=0))
  features = jnp.exp(row_scale - log_scale[None]) * features
  sums = product(labels(visible(values, mask), mask).T, features)
  old = rescale(state, log_scale)
  return DualState(old.weights + sums[:-1], old.mass + sums[-1], log_scale)


def get_weights(state) -> Float[Array, 'd_v R']:
  """Returns what an optimizer moves."""
  return state.weights


def with_weights(state, weights) -> DualState:
  """Returns the state with other weights."""
  return state._replace(weights=weights)


def gradient(
  phi, state, keys, values, rows, mask, loss
) -> Float[Array, 'd_v R']:
  r"""Returns the gradient of the loss of some rows, by `jax.grad`, scaled.

  With `phi = exp(s) psi` and `W = exp(s) w`, feature by feature, the gradient
  with respect to `W` is `exp(s)` times the one with respect to `U = W exp(s)`,
  the weights of `psi`. So a step of `W` against its gradient is a step of `w`
  against the gradient of `U`, and neither under- nor overflows.
  """
  keys, values = jnp.asarray(keys)[rows], widen(jnp.asarray(values)[rows])
  state = widen(state)
  row_scale, features = scaled_rows(phi, keys, mask)
  features = jnp.exp(row_scale - state.log_scale[None]) * features
  values = visible(values, mask)

  def objective(scaled_weights):
    # A masked slope may be infinite: times 0 it is NaN.
    return loss(visible(features @ scaled_weights.T, mask), values)

  # Zero weights stay zero where their scale overflows.
  largest_scale = jnp.finfo(state.log_scale.dtype).max
  scale = jnp.minimum(jnp.exp(2 * state.log_scale), largest_scale)
  return jax.grad(objective)(state.weights * scale[None])


def penalty_gradient(phi, state, penalty) -> Float[Array, 'd_v R']:
  """Returns the gradient of a penalty of the weights, in scaled form."""
  del phi
  state = widen(state)
  scale = jnp.exp(state.log_scale)[None]
  # A feature that no token has reached has weight 0 and scale 0. Elsewhere an
  # underflowing scale gives NaN rather than a penalty that is left out.
  divisor = jnp.where((scale > 0) | (state.weights != 0), scale, 1)
  _validate.check_real_scalar('penalty', penalty, state.weights)
  return jax.grad(penalty)(state.weights * scale) / divisor


def remove(phi, state, key, label) -> tuple[DualState, Float[Array, '']]:
  """Subtracts one token; returns the state and the growth of rounding."""
  state, label = widen((state, label))
  row_scale, features = scaled(phi, key)
  _check_size(state, features)
  features = jnp.exp(row_scale - state.log_scale) * features
  mass = state.mass - features
  before = jnp.abs(state.mass) + jnp.abs(features)
  growth = jnp.where(before > 0, before / jnp.abs(mass), 1)
  amplification = jnp.maximum(1, jnp.max(growth))
  lost = ~(amplification * jnp.finfo(mass.dtype).eps < 1)
  amplification = jnp.where(lost, jnp.inf, amplification)
  weights = state.weights - label[:, None] * features[None]
  rest = DualState(weights, mass, state.log_scale)
  rest = jax.tree.map(lambda x: jnp.where(lost, jnp.nan, x), rest)
  return rest, amplification


def read(phi, state, query) -> Reading:
  """Returns `W phi(q)` and `z . phi(q)` with their common scale."""
  state = widen(state)
  row_scale, features = scaled_query(phi, query)
  _check_size(state, features)
  exponent = row_scale + state.log_scale
  log_scale = largest(exponent)
  features = jnp.exp(exponent - log_scale) * features
  both = features @ jnp.concatenate([state.weights, state.mass[None]]).T
  return Reading(both[:-1], both[-1], log_scale)


def score_terms(
  phi, query, keys, mask=None
) -> tuple[Float[Array, 'N R'], Float[Array, '']]:
  """Returns `phi(k_i) . phi(q)`, feature by feature, and their log-scale."""
  key_scale, key_features = scaled_rows(phi, keys, mask)
  query_scale, query_features = scaled_query(phi, query)
  feature_scale = largest(key_scale, axis=0)
  exponent = query_scale + feature_scale
  log_scale = largest(exponent)
  query_features = jnp.exp(exponent - log_scale) * query_features
  key_features = jnp.exp(key_scale - feature_scale[None]) * key_features
  return visible(key_features, mask) * query_features[None], log_scale


def causal_sums(
  phi, queries, keys, values, chunk_size, mask=None, start=None
) -> Float[Array, 'N _']:
  """Returns what each position reads of the tokens up to itself.

  Across chunks the moments of the past are carried along. Inside a chunk the
  scores are written out, relative to the largest log-features of the past
  alone: nothing of the future enters a past output, not even its rounding.
  What `start` has seen is the past of the first.
  Shape `[N, d_v + 2]`, see `types.Form`.
  """
  size = keys.shape[0]
  arrays = (queries, keys, values) + (() if mask is None else (mask,))
  padding = -size % chunk_size
  arrays = jax.tree.map(
    lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), 'edge'),
    arrays,
  )
  chunks, _ = split_chunks(arrays, chunk_size)
  phi = widen(phi)  # Its slopes add up over the chunks.
  step = jax.checkpoint(lambda state, chunk: _causal_chunk(phi, state, *chunk))
  state = empty(phi, keys, values) if start is None else start
  state = vary_as(widen(state), phi, arrays)
  _, sums = jax.lax.scan(step, state, chunks)
  return jax.lax.collapse(sums, 0, 2)[:size]


def _causal_chunk(phi, state, queries, keys, values, mask=None):
  """Returns the state after a chunk, and `causal_sums` of its rows.

  Log-features of the chunk are taken relative to those of the past. Where a
  key exceeds the past too far for that, it is left to `_add_steep`.
  """
  key_scale, key_features = scaled_rows(phi, keys, mask)
  query_scale, query_features = jax.vmap(
    lambda query: scaled_query(phi, query)
  )(queries)
  rows = labels(values, mask)
  # Every row sees the past and the first key: their maximum is no secret.
  past = jnp.maximum(state.log_scale, jax.lax.stop_gradient(key_scale[0]))
  state = rescale(state, past)
  past = past[None]
  shift = largest(query_scale + past, axis=1)
  relative = key_scale - past
  steep = relative > math.log(jnp.finfo(relative.dtype).max) / 2
  neutral = zero_log_scale(relative.dtype)

  read = jnp.exp(query_scale + past - shift[:, None]) * query_features
  own = jnp.exp(jnp.where(steep, neutral, relative)) * key_features
  weights = jnp.concatenate([state.weights, state.mass[None]])
  scores = jnp.tril(product(read, own.T, values.dtype))
  sums = read @ weights.T + product(scores, rows)
  sums = jnp.concatenate([sums, jnp.diagonal(scores)[:, None]], axis=1)
  sums = jax.lax.cond(
    _any(steep),
    _add_steep,
    lambda sums, *_: sums,
    sums,
    shift,
    (query_scale, query_features),
    (jnp.where(steep, key_scale, neutral), key_features),
    rows,
  )
  return absorb(phi, state, keys, values, mask), sums


def _add_steep(sums, shift, queries, keys, rows):
  """Adds the remaining log-features `[C, R]`, score by score, row by row."""
  positions = jnp.arange(rows.shape[0])

  @jax.checkpoint
  def add(row):
    position, sums, shift, (query_scale, query_features) = row
    exponent = query_scale[None] + keys[0]
    visible = (positions <= position)[:, None]
    exponent = jnp.where(visible, exponent, zero_log_scale(shift.dtype))
    own_scale = largest(exponent)
    terms = jnp.exp(exponent - own_scale) * keys[1] * query_features[None]
    weights = jnp.sum(jnp.where(visible, terms, 0), axis=1)
    top = jnp.maximum(shift, own_scale)
    added = jnp.concatenate([product(weights, rows), weights[position][None]])
    return sums * jnp.exp(shift - top) + added * jnp.exp(own_scale - top)

  return jax.lax.map(add, (positions, sums, shift, queries))


@jax.custom_batching.custom_vmap
def _any(array):
  """`jnp.any` over batch axes too: a `cond` on it stays one under `vmap`."""
  return jnp.any(array)


@_any.def_vmap
def _any_of_batch(axis_size, in_batched, array):
  del axis_size, in_batched
  return _any(array), False


def _check_size(state: DualState, features: Array) -> None:
  size = state.weights.shape[1]
  _validate.check_same('R', 'state', size, 'phi', features.shape[-1])
