"""Diagonal of the kernel matrix, and norms of sums over demonstrations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, moments
from iclcl_jax._door import door
from iclcl_jax.bounds._common import CHUNK_SIZE, Ball, log_norm
from iclcl_jax.precision import accumulation_dtype
from iclcl_jax.types import Array, DualState, FeatureMap, Float, Kernel, Mask


@door
def log_diagonal(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  *,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> Float[Array, ' N']:
  r"""Returns :math:`\log k(k_i, k_i)` for every key, `-inf` for masked ones.

  Example:
    >>> log_diagonal(kernels.ExponentialKernel(), jnp.ones((2, 4))).tolist()
    [2.0, 2.0]
  """
  _validate.at_least(1, chunk_size=chunk_size)
  keys = jnp.asarray(keys)
  logs = wide_log_diagonal(phi, keys, mask, chunk_size)
  return logs.astype(keys.dtype)


def wide_log_diagonal(
  phi: Any, keys: Float[Array, 'N d_k'], mask: Mask | None, chunk_size: int
) -> Float[Array, ' N']:
  """Computes `log_diagonal` in float32 at least."""
  dtype = accumulation_dtype(keys.dtype)
  is_map = _validate.is_feature_map(phi)

  def one(key):
    if not is_map:
      return _log_kernel(phi, key, key).astype(dtype)
    row_scale, features = _UnitFeatures(phi).scaled(key)
    top = moments.largest(row_scale)
    return (
      top * 2 + 2 * log_norm((jnp.exp(row_scale - top) * features)[None])[0]
    )

  logs = moments.map_chunks(one, moments.visible(keys, mask), chunk_size)
  return logs if mask is None else jnp.where(mask, logs, -jnp.inf)


def _log_kernel(kernel, x, y) -> Float[Array, '']:
  """Returns `log k(x, y)` of a kernel that is positive there."""
  if hasattr(kernel, 'log_kernel'):
    return coefficients.evaluate(kernel.log_kernel, x, y)
  return jnp.log(coefficients.evaluate(kernel, x, y))


class _UnitFeatures:
  """A feature map whose largest scaled feature is 1 in size."""

  def __init__(self, phi: Any):
    self._phi = phi

  def __call__(self, x):
    log_scale, features = self.scaled(x)
    return jnp.exp(log_scale) * features

  def scaled(self, x):
    log_scale, features = moments.scaled(self._phi, x)
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(features)))
    top = jnp.where(top == 0, 1, top)
    return log_scale + jnp.log(top), features / top


@door
def log_trace(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  *,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> Float[Array, '']:
  """Returns the logarithm of the trace of the kernel matrix of the keys.

  Example:
    >>> round(float(log_trace(kernels.LinearKernel(), jnp.eye(3))), 5)
    1.09861
  """
  _validate.at_least(1, chunk_size=chunk_size)
  keys = jnp.asarray(keys)
  logs = wide_log_diagonal(phi, keys, mask, chunk_size)
  return jax.nn.logsumexp(logs).astype(keys.dtype)


def log_norms(
  phi: Any,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  labels_fn: Callable[[Array, Array], Array],
  num_sums: int,
  ball: Ball,
  mask: Mask | None,
  chunk_size: int,
) -> Float[Array, ' P']:
  r"""Returns log norms of `P` sums :math:`\sum_i u_{pi}\,\phi(k_i)^\top`.

  They are in float32 at least. `labels_fn` makes `u [c, P, d_v]` of the row
  numbers `[c]` and values `[c, d_v]` of one chunk, and is linear in the values.
  """
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  dtype = accumulation_dtype(values.dtype)
  width = num_sums * values.shape[1]
  if not _validate.is_feature_map(phi):
    chunks = _chunks(keys, values.astype(dtype), mask, chunk_size)
    return _kernel_norms(phi, chunks, labels_fn, num_sums, ball)
  log_top, values = _split_scale(moments.visible(values, mask).astype(dtype))
  chunks = _chunks(keys, values, mask, chunk_size)
  unit_phi = _UnitFeatures(phi)

  @jax.checkpoint
  def step(state, chunk):
    rows, chunk_keys, chunk_values, chunk_mask = chunk
    labels = labels_fn(rows, chunk_values).reshape(rows.shape[0], -1)
    return moments.absorb(unit_phi, state, chunk_keys, labels, chunk_mask), None

  empty = moments.empty(unit_phi, chunks[1][0], jnp.zeros((0, width), dtype))
  state, _ = jax.lax.scan(step, empty, chunks)
  return log_top + state_norms(state, num_sums, ball)


def _split_scale(array: Array) -> tuple[Float[Array, ''], Array]:
  """Returns the log of the largest entry, and the array divided by it."""
  top = jax.lax.stop_gradient(jnp.max(jnp.abs(array)))
  top = jnp.where(top == 0, 1, top)
  return jnp.log(top), array / top


def state_norms(
  state: DualState, num_sums: int, ball: Ball
) -> Float[Array, ' P']:
  """Returns log norms of the weights, split by rows into `P` matrices."""
  dtype = accumulation_dtype(state.weights.dtype)
  log_scale = state.log_scale.astype(dtype)
  top = moments.largest(log_scale)
  matrix = state.weights.astype(dtype) * jnp.exp(log_scale - top)[None]

  def log_dual_norm(matrix):
    log_top, matrix = _split_scale(matrix)
    return log_top + jnp.log(ball.dual_norm(matrix))

  matrices = matrix.reshape(num_sums, -1, matrix.shape[1])
  return top + jax.lax.map(log_dual_norm, matrices)


def _kernel_norms(kernel, chunks, labels_fn, num_sums, ball):
  """Computes `log_norms` from Gram matrices `sum_ij u_i k(k_i, k_j) u_j^T`.

  Kernel values are divided by the roots of both diagonal entries, and values
  are multiplied by them: every number is then at most of order one.
  """
  dtype = chunks[2].dtype
  norms, sizes = jax.lax.map(lambda c: _row_scales(kernel, c), chunks)
  top = moments.largest(norms + jnp.log(sizes))
  # Every term vanishes, or no demonstration is visible.
  top = jnp.where(top > moments.zero_log_scale(dtype), top, 0)

  def labels(chunk, norm, size):
    rows, _, values, _ = chunk
    scale = jnp.exp(norm + jnp.log(size) - top)
    scaled = values / size[:, None] * scale[:, None]
    return labels_fn(rows, scaled).reshape(rows.shape[0], num_sums, -1)

  @jax.checkpoint
  def step(gram, one):
    chunk, norm, _ = one

    @jax.checkpoint
    def inner(total, other):
      block = _cosines(kernel, chunk, norm, *other[:2])
      return total + jnp.einsum('ij,jpd->ipd', block, labels(*other)), None

    own = labels(*one)
    total, _ = jax.lax.scan(inner, jnp.zeros_like(own), everything)
    return gram + jnp.einsum('cpi,cpj->pij', own, total), None

  everything = chunks, norms, sizes
  width = chunks[2].shape[-1]
  gram, _ = jax.lax.scan(
    step, jnp.zeros((num_sums, width, width), dtype), everything
  )
  return top + jax.lax.map(lambda g: _log_gram_norm(ball, g), gram)


def _log_gram_norm(ball: Ball, gram: Float[Array, 'd d']) -> Float[Array, '']:
  log_top, gram = _split_scale(gram)
  return log_top / 2 + jnp.log(ball.gram_dual_norm(gram))


def _row_scales(kernel, chunk):
  """Returns log lengths of the keys' features, and sizes of the values."""
  _, keys, values, mask = chunk
  norms = wide_log_diagonal(kernel, keys, mask, keys.shape[0]) / 2
  sizes = jnp.max(jnp.abs(values), axis=1)
  return jax.lax.stop_gradient((norms, jnp.where(sizes == 0, 1, sizes)))


def _cosines(kernel, chunk, norm, other, other_norm):
  """Returns cosines of features `[c, c]`; 0 where a feature vanishes."""
  _, keys, values, mask = chunk
  _, other_keys, _, other_mask = other

  def cosine(row, other_row):
    (key, length, seen), (other_key, other_length, also) = row, other_row
    seen = seen & also
    exponent = jnp.where(seen, length + other_length, 0)
    if hasattr(kernel, 'log_kernel'):
      log = coefficients.evaluate(kernel.log_kernel, key, other_key)
      log = jnp.where(seen, log.astype(values.dtype), 0)
      return jnp.where(seen, jnp.exp(log - exponent), 0)
    value = coefficients.evaluate(kernel, key, other_key)
    value = value.astype(values.dtype) * jnp.exp(-exponent)
    return jnp.where(seen, value, 0)

  lowest = moments.zero_log_scale(norm.dtype)
  rows = keys, norm, mask & (norm > lowest)
  other_rows = other_keys, other_norm, other_mask & (other_norm > lowest)
  return jax.vmap(jax.vmap(cosine, (None, 0)), (0, None))(rows, other_rows)


def _chunks(keys, values, mask, chunk_size: int):
  """Splits row numbers, keys, values and mask into chunks `[n, c, ...]`."""
  keys, values = moments.visible(keys, mask), moments.visible(values, mask)
  size = keys.shape[0]
  chunk_size = min(chunk_size, size)
  padding = -size % chunk_size
  rows = jnp.arange(size + padding)
  mask = jnp.ones(size, bool) if mask is None else mask

  def pad(array):
    widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths).reshape(-1, chunk_size, *array.shape[1:])

  return rows.reshape(-1, chunk_size), pad(keys), pad(values), pad(mask)
