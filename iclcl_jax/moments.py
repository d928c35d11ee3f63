r"""The moments `sum_i v_i phi(k_i)^T` and `sum_i phi(k_i)`, in scaled form.

The one piece of arithmetic that attention and the dual model share. A state
keeps, for each feature, a running maximum of the log-features and everything
relative to it, as flash attention does for each row: the largest contribution
to a feature is of order one, the query's own scale drops out, and streams and
merges are exact up to rounding. Every maximum is stopped from gradients in
both parts in which it occurs, so that it cancels in derivatives too.

Attention is a ratio of two linear models that share their features (append 1
to every label); the code carries both as the rows of one matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.types import Array, DualState, FeatureMap, Float, Mask

_stop = jax.lax.stop_gradient


class Reading(NamedTuple):
  """What a query finds: `numerator * exp(log_scale)`, and so on.

  Attributes:
    numerator: `W phi(q)`, scaled. Shape `[d_v]`.
    denominator: `z . phi(q)`, scaled. Shape `[]`.
    log_scale: common scale of both. Shape `[]`.
  """

  numerator: Float[Array, ' d_v']
  denominator: Float[Array, '']
  log_scale: Float[Array, '']


def zero_log_scale(dtype) -> float:
  """The neutral log-scale: smaller than any, yet finite, so that it merges."""
  return float(jnp.finfo(dtype).min)


def largest(exponent: Array, axis: int | None = None) -> Array:
  """The maximum, finite even for no row at all, and stopped from gradients."""
  neutral = zero_log_scale(exponent.dtype)
  return _stop(jnp.max(exponent, axis=axis, initial=neutral))


def scaled(
  phi: FeatureMap, x: Float[Array, ' d_k']
) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
  """`phi.scaled(x)`; a map of the user's own may return anything."""
  result = phi.scaled(x)
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
      f'phi.scaled of {type(phi).__name__} returned '
      f'{_validate.describe(result)} for a vector {_validate.describe(x)}; '
      'expected (log_scale, features) of shapes [R] or [1], and [R], both '
      f'{dtype}. See iclcl_jax.types.FeatureMap.'
    )
  return result


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
  """Appends 1 to every value: the labels of weights and mass together."""
  values = jnp.asarray(values)
  ones = jnp.ones((values.shape[0], 1), values.dtype)
  augmented = jnp.concatenate([values, ones], axis=1)
  return augmented if mask is None else jnp.where(mask[:, None], augmented, 0)


def empty(
  phi: FeatureMap, keys: Float[Array, 'N d_k'], values: Float[Array, 'N d_v']
) -> DualState:
  """Returns the state that has seen nothing; only shapes and dtype are read."""
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  row = jax.ShapeDtypeStruct(keys.shape[1:], keys.dtype)
  num_features = jax.eval_shape(lambda x: scaled(phi, x), row)[1].shape[0]
  return DualState(
    weights=jnp.zeros((values.shape[1], num_features), values.dtype),
    mass=jnp.zeros(num_features, values.dtype),
    log_scale=jnp.full(
      num_features, zero_log_scale(keys.dtype), dtype=keys.dtype
    ),
  )


def rescale(state: DualState, log_scale: Float[Array, ' R']) -> DualState:
  """Expresses a state relative to another, larger log-scale."""
  shrink = jnp.exp(state.log_scale - log_scale)
  return DualState(state.weights * shrink[None], state.mass * shrink, log_scale)


def merge(a: DualState, b: DualState) -> DualState:
  """Adds two states that saw different tokens through the same features."""
  log_scale = jnp.maximum(a.log_scale, b.log_scale)
  a, b = rescale(a, log_scale), rescale(b, log_scale)
  return DualState(a.weights + b.weights, a.mass + b.mass, log_scale)


def absorb(
  phi: FeatureMap,
  state: DualState,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  mask: Mask | None = None,
) -> DualState:
  """Adds `v_i phi(k_i)^T` to the weights and `phi(k_i)` to the mass."""
  row_scale, features = scaled_rows(phi, keys, mask)
  log_scale = jnp.maximum(state.log_scale, largest(row_scale, axis=0))
  features = jnp.exp(row_scale - log_scale[None]) * features
  if mask is not None:
    values = jnp.where(mask[:, None], values, 0)
  sums = labels(values, mask).T @ features
  old = rescale(state, log_scale)
  return DualState(old.weights + sums[:-1], old.mass + sums[-1], log_scale)


def see(
  phi: FeatureMap,
  state: DualState,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  mask: Mask | None = None,
) -> DualState:
  """Adds tokens to the mass alone: they are visible, and not yet learnt."""
  return absorb(phi, state, keys, jnp.zeros_like(values), mask)


def get_weights(state: DualState) -> Float[Array, 'd_v R']:
  """What an optimizer moves."""
  return state.weights


def with_weights(state: DualState, weights: Float[Array, 'd_v R']) -> DualState:
  """The state with other weights."""
  return state._replace(weights=weights)


def gradient(
  phi: FeatureMap,
  state: DualState,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  rows: Array,
  mask: Mask | None,
  loss: Callable[..., Array],
) -> Float[Array, 'd_v R']:
  r"""The gradient of the loss of some rows, by `jax.grad`, in scaled form.

  With `phi = exp(s) psi` and `W = exp(s) w`, feature by feature, the gradient
  with respect to `W` is `exp(s)` times the one with respect to `U = W exp(s)`,
  the weights of `psi`. So a step of `W` against its gradient is a step of `w`
  against the gradient of `U`, and neither under- nor overflows.
  """
  keys, values = jnp.asarray(keys)[rows], jnp.asarray(values)[rows]
  row_scale, features = scaled_rows(phi, keys, mask)
  features = jnp.exp(row_scale - state.log_scale[None]) * features
  if mask is not None:
    features = jnp.where(mask[:, None], features, 0)
    values = jnp.where(mask[:, None], values, 0)

  def objective(scaled_weights):
    return loss(features @ scaled_weights.T, values)

  # Zero weights stay zero where their scale overflows.
  largest_scale = jnp.finfo(state.log_scale.dtype).max
  scale = jnp.minimum(jnp.exp(2 * state.log_scale), largest_scale)
  return jax.grad(objective)(state.weights * scale[None])


def penalty_gradient(
  phi: FeatureMap, state: DualState, penalty: Callable[[Array], Array]
) -> Float[Array, 'd_v R']:
  """The gradient of a penalty of the weights, in scaled form."""
  del phi
  scale = jnp.exp(state.log_scale)[None]
  # A feature that no token has reached has weight 0 and scale 0. Elsewhere an
  # underflowing scale gives NaN rather than a penalty that is left out.
  divisor = jnp.where((scale > 0) | (state.weights != 0), scale, 1)
  _validate.check_real_scalar('penalty', penalty, state.weights)
  return jax.grad(penalty)(state.weights * scale) / divisor


def remove(
  phi: FeatureMap,
  state: DualState,
  key: Float[Array, ' d_k'],
  label: Float[Array, ' d_v'],
) -> tuple[DualState, Float[Array, '']]:
  """Subtracts one token; returns the state and the growth of rounding."""
  row_scale, features = scaled(phi, key)
  features = jnp.exp(row_scale - state.log_scale) * features
  mass = state.mass - features
  before = jnp.abs(state.mass) + jnp.abs(features)
  growth = jnp.where(before > 0, before / jnp.abs(mass), 1)
  amplification = jnp.maximum(1, jnp.max(growth))
  lost = ~(amplification * jnp.finfo(mass.dtype).eps < 1)
  amplification = jnp.where(lost, jnp.inf, amplification)
  weights = state.weights - label[:, None] * features[None]
  rest = DualState(weights, mass, state.log_scale)
  return jax.tree.map(
    lambda x: jnp.where(lost, jnp.nan, x), rest
  ), amplification


def absorb_stream(
  phi: FeatureMap,
  state: DualState,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  chunk_size: int,
  mask: Mask | None = None,
) -> DualState:
  """`absorb`, holding the features of one chunk at a time."""

  @jax.checkpoint
  def step(state, chunk):
    return absorb(phi, state, *chunk), None

  arrays = (keys, values) if mask is None else (keys, values, mask)
  chunks, rest = split_chunks(arrays, chunk_size)
  state, _ = jax.lax.scan(step, state, chunks)
  return step(state, rest)[0]


def read(
  phi: FeatureMap, state: DualState, query: Float[Array, ' d_k']
) -> Reading:
  """Returns `W phi(q)` and `z . phi(q)` with their common scale."""
  row_scale, features = scaled(phi, query)
  exponent = row_scale + state.log_scale
  log_scale = largest(exponent)
  features = jnp.exp(exponent - log_scale) * features
  both = features @ jnp.concatenate([state.weights, state.mass[None]]).T
  return Reading(both[:-1], both[-1], log_scale)


def scores(
  phi: FeatureMap,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  mask: Mask | None = None,
) -> tuple[Float[Array, ' N'], Float[Array, '']]:
  """Returns `phi(k_i) . phi(q)` for every key and their common log-scale."""
  terms, log_scale = score_terms(phi, query, keys, mask)
  return jnp.sum(terms, axis=1), log_scale


def score_terms(
  phi: FeatureMap,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  mask: Mask | None = None,
) -> tuple[Float[Array, 'N R'], Float[Array, '']]:
  """The summands of `scores`, one for each feature."""
  key_scale, key_features = scaled_rows(phi, keys, mask)
  query_scale, query_features = scaled(phi, query)
  feature_scale = largest(key_scale, axis=0)
  exponent = query_scale + feature_scale
  log_scale = largest(exponent)
  query_features = jnp.exp(exponent - log_scale) * query_features
  key_features = jnp.exp(key_scale - feature_scale[None]) * key_features
  if mask is not None:
    key_features = jnp.where(mask[:, None], key_features, 0)
  return key_features * query_features[None], log_scale


def split_chunks(arrays, chunk_size: int):
  """Splits leading axes into whole chunks `[n, chunk_size, ...]` and a rest."""

  def whole(array):
    end = array.shape[0] // chunk_size * chunk_size
    return array[:end].reshape(-1, chunk_size, *array.shape[1:])

  def rest(array):
    return array[array.shape[0] // chunk_size * chunk_size :]

  return jax.tree.map(whole, arrays), jax.tree.map(rest, arrays)


def map_chunks(fn, rows_of, chunk_size: int):
  """`jax.vmap(fn)(rows_of)`, a tree of rows, one chunk at a time."""
  rows = jax.vmap(fn)
  if jax.tree.leaves(rows_of)[0].shape[0] <= chunk_size:  # No loop to compile.
    return rows(rows_of)
  chunks, rest = split_chunks(rows_of, chunk_size)
  whole = jax.lax.map(jax.checkpoint(rows), chunks)
  whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), whole)
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), whole, rows(rest))
