"""Diagonal of the kernel matrix, and norms of sums over demonstrations."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, moments
from iclcl_jax.bounds._common import CHUNK_SIZE, Ball, visible
from iclcl_jax.types import Array, DualState, FeatureMap, Float, Kernel, Mask


def log_diagonal(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  *,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> Float[Array, ' N']:
  r"""Returns :math:`\log k(k_i, k_i)` for every key.

  Args:
    phi: feature map or kernel.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    mask: valid demonstrations. Shape `[N]`; None for all. Others get `-inf`.
    chunk_size: keys whose features are held at a time.

  Returns:
    The logarithms. Shape `[N]`.

  Raises:
    ValueError: if ranks or sizes disagree, there is no key, or
      `chunk_size < 1`.

  Example:
    >>> from iclcl_jax import kernels
    >>> log_diagonal(kernels.ExponentialKernel(), jnp.ones((2, 4))).tolist()
    [2.0, 2.0]
  """
  _validate.check_tokens(keys, keys, mask)
  _validate.check_count('chunk_size', chunk_size)
  is_map = _validate.is_feature_map(phi)

  def one(key):
    if not is_map:
      if hasattr(phi, 'log_kernel'):
        return coefficients.evaluate(phi.log_kernel, key, key)
      return jnp.log(coefficients.evaluate(phi, key, key))
    row_scale, features = moments.scaled(cast(FeatureMap, phi), key)
    top = moments.largest(row_scale)
    return 2 * top + jnp.log(
      jnp.sum((jnp.exp(row_scale - top) * features) ** 2)
    )

  visible = jnp.asarray(keys)
  if mask is not None:
    visible = jnp.where(mask[:, None], visible, 0)
  logs = moments.map_chunks(one, visible, chunk_size)
  return logs if mask is None else jnp.where(mask, logs, -jnp.inf)


def log_trace(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  *,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> Float[Array, '']:
  """Returns the logarithm of the trace of the kernel matrix of the keys.

  Args:
    phi: feature map or kernel.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    mask: valid demonstrations. Shape `[N]`; None for all.
    chunk_size: keys whose features are held at a time.

  Returns:
    The logarithm. Shape `[]`.

  Raises:
    ValueError: as `log_diagonal`.

  Example:
    >>> from iclcl_jax import kernels
    >>> round(float(log_trace(kernels.LinearKernel(), jnp.eye(3))), 5)
    1.09861
  """
  return jax.nn.logsumexp(
    log_diagonal(phi, keys, mask=mask, chunk_size=chunk_size)
  )


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
  r"""Log of the norms of :math:`\sum_i u_{pi}\,\phi(k_i)^\top`, P sums at once.

  Args:
    phi: feature map or kernel.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    labels_fn: `(row numbers [c], values [c, d_v]) -> u [c, P, d_v]`, linear in
      the values, for one chunk.
    num_sums: the number of sums `P`.
    ball: its dual norm is taken.
    mask: valid demonstrations. Shape `[N]`; None for all.
    chunk_size: demonstrations that are read at a time.

  Returns:
    The logarithms. Shape `[P]`.
  """
  chunks = _chunks(keys, values, mask, chunk_size)

  def labels(rows, rows_values):
    return labels_fn(rows, rows_values).reshape(rows.shape[0], -1)

  width = num_sums * values.shape[1]
  if not _validate.is_feature_map(phi):
    return _kernel_norms(phi, chunks, labels, width, num_sums, ball)

  @jax.checkpoint
  def step(state, chunk):
    rows, chunk_keys, chunk_values, chunk_mask = chunk
    chunk_labels = labels(rows, chunk_values)
    return moments.absorb(
      phi, state, chunk_keys, chunk_labels, chunk_mask
    ), None

  empty = moments.empty(phi, keys, jnp.zeros((0, width), chunks[2].dtype))
  state, _ = jax.lax.scan(step, empty, chunks)
  return state_norms(state, num_sums, ball)


def state_norms(
  state: DualState, num_sums: int, ball: Ball
) -> Float[Array, ' P']:
  """Log of the norms of the weights, split by rows into `P` matrices."""
  top = moments.largest(state.log_scale)
  matrix = state.weights * jnp.exp(state.log_scale - top)[None]
  matrices = matrix.reshape(num_sums, -1, matrix.shape[1])
  return top + jnp.log(jax.lax.map(ball.dual_norm, matrices))


def _kernel_norms(kernel, chunks, labels, width, num_sums, ball):
  """`log_norms` from the Gram matrices `sum_ij u_i k(k_i, k_j) u_j^T`."""
  top = moments.largest(
    jax.lax.map(
      lambda c: moments.largest(log_diagonal(kernel, c[1], mask=c[3])), chunks
    )
  )
  # Every kernel value vanishes, or no demonstration is visible.
  top = jnp.where(top > moments.zero_log_scale(top.dtype), top, 0)

  def scores(key, chunk_keys, chunk_mask):
    weights, scale = coefficients.scores(kernel, key, chunk_keys, chunk_mask)
    return weights * jnp.exp(scale - top)

  def split(array):
    return array.reshape(array.shape[0], num_sums, -1)

  @jax.checkpoint
  def step(gram, chunk):
    rows, chunk_keys, chunk_values, _ = chunk

    @jax.checkpoint
    def inner(total, other):
      other_rows, other_keys, other_values, other_mask = other
      block = jax.vmap(scores, (0, None, None))(
        chunk_keys, other_keys, other_mask
      )
      return total + block @ labels(other_rows, other_values), None

    start = jnp.zeros((rows.shape[0], width), gram.dtype)
    total, _ = jax.lax.scan(inner, start, chunks)
    own = labels(rows, chunk_values)
    return gram + jnp.einsum('cpi,cpj->pij', split(own), split(total)), None

  size = width // num_sums
  gram, _ = jax.lax.scan(
    step, jnp.zeros((num_sums, size, size), chunks[2].dtype), chunks
  )
  return top / 2 + jnp.log(jax.lax.map(ball.gram_dual_norm, gram))


def _chunks(keys, values, mask, chunk_size: int):
  """Row numbers, keys, values and mask in whole chunks `[n, c, ...]`."""
  keys, values = visible(keys, mask), visible(values, mask)
  size = keys.shape[0]
  chunk_size = min(chunk_size, size)
  padding = -size % chunk_size
  rows = jnp.arange(size + padding)
  mask = jnp.ones(size, bool) if mask is None else mask

  def pad(array):
    widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths).reshape(-1, chunk_size, *array.shape[1:])

  return rows.reshape(-1, chunk_size), pad(keys), pad(values), pad(mask)
