"""Log-scales, scaled features of rows, and rows in chunks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.precision import widen
from iclcl_jax.types import Array, FeatureMap, Float, Mask


def zero_log_scale(dtype) -> float:
  """Returns the log-scale of nothing: below any other, yet finite."""
  return float(jnp.finfo(dtype).min)


def largest(exponent: Array, axis: int | None = None) -> Array:
  """Returns the maximum, finite even of no row and stopped from gradients."""
  neutral = zero_log_scale(exponent.dtype)
  return jax.lax.stop_gradient(jnp.max(exponent, axis=axis, initial=neutral))


def scaled(
  phi: FeatureMap, x: Float[Array, ' d_k']
) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
  """Returns `phi.scaled(x)`, checked: a user's own map may return anything.

  A 16-bit vector is read in float32: the error of a log-feature is multiplied
  by the exponential.
  """
  x = widen(x)
  result = widen(phi.scaled(x))
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
  """Appends 1 to every value: labels of the weights and the mass together."""
  values = jnp.asarray(values)
  ones = jnp.ones((values.shape[0], 1), values.dtype)
  augmented = jnp.concatenate([values, ones], axis=1)
  return augmented if mask is None else jnp.where(mask[:, None], augmented, 0)


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
    lambda a, b: jnp.concatenate([join_chunks(a), b]), whole, fn_of_rows(rest)
  )


def join_chunks(chunks: Array) -> Array:
  """Makes rows of chunks again, `[n chunk_size, ...]`."""
  count, chunk_size, *axes = chunks.shape
  return chunks.reshape(count * chunk_size, *axes)
