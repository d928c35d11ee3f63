"""Diagonal of the kernel matrix, and norms of sums over demonstrations."""

from typing import Any

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, moments
from iclcl_jax._door import door
from iclcl_jax.bounds._common import CHUNK_SIZE, Ball, log_norm
from iclcl_jax.precision import accumulation_dtype
from iclcl_jax.types import Array, DualState, FeatureMap, Float, Kernel

# Rows of the matrix of a kernel that are held at a time.
_NUM_ROWS = 64


@door
def log_diagonal(
  phi: FeatureMap | Kernel, keys: Float[Array, 'N d_k']
) -> Float[Array, ' N']:
  r"""Returns :math:`\log k(k_i, k_i)` for every key, in float32 at least.

  Example:
    >>> log_diagonal(kernels.ExponentialKernel(), jnp.ones((2, 4))).tolist()
    [2.0, 2.0]
  """
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

  return moments.map_chunks(one, keys, CHUNK_SIZE)


def _log_kernel(kernel, x, y) -> Float[Array, '']:
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
    log_top, features = _split_scale(features)
    return log_scale + log_top, features


def log_norms(
  phi: Any,
  keys: Float[Array, 'N d_k'],
  labels: Float[Array, 'N P d_v'],
  ball: Ball,
) -> Float[Array, ' P']:
  r"""Returns log norms of `P` sums :math:`\sum_i u_{pi}\,\phi(k_i)^\top`.

  They are in float32 at least. The `labels` are `u`.
  """
  num_sums = labels.shape[1]
  labels = labels.astype(accumulation_dtype(labels.dtype))
  if not _validate.is_feature_map(phi):
    return _kernel_norms(phi, keys, labels, ball)
  unit_phi = _UnitFeatures(phi)
  log_top, labels = _split_scale(labels)
  labels = labels.reshape(len(labels), -1)
  state = moments.empty(unit_phi, keys, labels)
  state = moments.absorb_stream(unit_phi, state, keys, labels, CHUNK_SIZE)
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


def _kernel_norms(kernel, keys, labels, ball):
  """Computes `log_norms` from Gram matrices `sum_ij u_i k(k_i, k_j) u_j^T`.

  Kernel values are divided by the roots of both diagonal entries, and labels
  are multiplied by them: every number is then at most of order one.
  """
  lengths = log_diagonal(kernel, keys) / 2
  sizes = jnp.max(jnp.abs(labels), axis=(1, 2))
  lengths, sizes = jax.lax.stop_gradient(
    (lengths, jnp.where(sizes == 0, 1, sizes))
  )
  lowest = moments.zero_log_scale(labels.dtype)
  top = moments.largest(lengths + jnp.log(sizes))
  # Every term vanishes.
  top = jnp.where(top > lowest, top, 0)
  factors = jnp.exp(lengths + jnp.log(sizes) - top)
  labels = labels / sizes[:, None, None] * factors[:, None, None]
  rows = keys, lengths, lengths > lowest

  def read(row):
    cosines = jax.vmap(lambda other: _cosine(kernel, row, other))(rows)
    return jnp.einsum('j,jpd->pd', cosines, labels)

  sums = moments.map_chunks(read, rows, _NUM_ROWS)
  gram = jnp.einsum('npi,npj->pij', labels, sums)
  return top + jax.lax.map(lambda g: _log_gram_norm(ball, g), gram)


def _cosine(kernel, row, other) -> Float[Array, '']:
  """Returns the cosine of two features; 0 where one vanishes."""
  (x, length, is_seen), (y, other_length, is_also_seen) = row, other
  seen = is_seen & is_also_seen
  exponent = jnp.where(seen, length + other_length, 0)
  if hasattr(kernel, 'log_kernel'):
    log = coefficients.evaluate(kernel.log_kernel, x, y).astype(exponent.dtype)
    return jnp.where(seen, jnp.exp(jnp.where(seen, log - exponent, 0)), 0)
  value = coefficients.evaluate(kernel, x, y).astype(exponent.dtype)
  return jnp.where(seen, value * jnp.exp(-exponent), 0)


def _log_gram_norm(ball: Ball, gram: Float[Array, 'd d']) -> Float[Array, '']:
  log_top, gram = _split_scale(gram)
  return log_top / 2 + jnp.log(ball.gram_dual_norm(gram))
