"""Positive numbers as logarithms, balls of weights, and norms of sums."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, moments
from iclcl_jax._door import door
from iclcl_jax.precision import accumulation_dtype
from iclcl_jax.types import Array, DualState, FeatureMap, Float, Kernel

CHUNK_SIZE = 512
# Rows of the matrix of a kernel that are held at a time.
_NUM_ROWS = 64


class LogValue(NamedTuple):
  """A number above 0 stored as its logarithm, so that it cannot overflow.

  Results may be 0, whose logarithm is `-inf`; arguments may not. Its shape is
  `[]`, or `[P]` for several numbers.

  Example:
    >>> LogValue(jnp.array(0.0)).value.tolist()
    1.0
  """

  log_value: Float[Array, '*shape']

  @property
  def value(self) -> Float[Array, '*shape']:
    """Returns the number itself, which may overflow."""
    return jnp.exp(self.log_value)


Positive: TypeAlias = float | Array | LogValue


class Ball(NamedTuple):
  """A ball of dual weights, described by the dual of the norm that bounds it.

  Attributes:
    dual_norm: `sup <W, M>` over the unit ball, a function of `M [d_v, R]`.
    gram_dual_norm: the same as a function of `M M^T [d_v, d_v]`.
    growth: largest ratio of it to the Frobenius norm, a function of the rank.
  """

  dual_norm: Callable[[Array], Array]
  gram_dual_norm: Callable[[Array], Array]
  growth: Callable[[Array], Array]


def _sum_of_roots(gram: Float[Array, 'd d']) -> Float[Array, '']:
  """Returns the nuclear norm of `M` from `M M^T`; rounding counts as 0."""
  eigenvalues = jnp.linalg.eigvalsh(gram)
  noise = eigenvalues[-1] * gram.shape[0] * jnp.finfo(gram.dtype).eps
  kept = eigenvalues > noise
  return jnp.sum(jnp.where(kept, jnp.sqrt(jnp.where(kept, eigenvalues, 1)), 0))


FROBENIUS = Ball(
  dual_norm=lambda matrix: jnp.sqrt(jnp.sum(matrix**2)),
  gram_dual_norm=lambda gram: jnp.sqrt(jnp.maximum(jnp.trace(gram), 0)),
  growth=jnp.ones_like,
)
SPECTRAL = Ball(
  dual_norm=lambda matrix: jnp.sum(jnp.linalg.svd(matrix, compute_uv=False)),
  gram_dual_norm=_sum_of_roots,
  growth=jnp.sqrt,
)


def log_positive(name: str, number: Positive, dtype) -> Float[Array, '']:
  """Returns the logarithm of a positive argument, in `dtype`."""
  if isinstance(number, LogValue):
    _validate.check_scalar(f'{name}.log_value', number.log_value)
    return jnp.asarray(number.log_value, dtype)
  limits = {'above': 0.0} | ({'below': 1.0} if name == 'delta' else {})
  _validate.check_scalar(name, number, **limits)
  # In the wider of both dtypes.
  number = jnp.asarray(number)
  if not jnp.issubdtype(number.dtype, jnp.floating) or (
    jnp.finfo(number.dtype).bits < jnp.finfo(dtype).bits
  ):
    number = number.astype(dtype)
  return jnp.log(number).astype(dtype)


def log_norm(rows: Float[Array, 'N d']) -> Float[Array, ' N']:
  """Returns the log of each row's norm; no square under- or overflows."""
  log_top, rows = jax.vmap(_split_scale)(rows)
  squares = jnp.sum(rows**2, axis=1)
  is_empty = squares == 0
  logs = log_top + jnp.log(jnp.where(is_empty, 1, squares)) / 2
  return jnp.where(is_empty, -jnp.inf, logs)


def count(rows: Float[Array, 'N d']) -> Float[Array, '']:
  return jnp.asarray(rows.shape[0], accumulation_dtype(rows.dtype))


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
    if hasattr(phi, 'log_kernel'):
      return coefficients.evaluate(phi.log_kernel, key, key).astype(dtype)
    if not is_map:
      return jnp.log(coefficients.evaluate(phi, key, key)).astype(dtype)
    row_scale, features = moments.scaled(phi, key)
    top = moments.largest(row_scale)
    return 2 * (top + log_norm((jnp.exp(row_scale - top) * features)[None])[0])

  return moments.map_chunks(one, keys, CHUNK_SIZE)


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
  log_top, labels = _split_scale(labels)
  labels = labels.reshape(len(labels), -1)
  state = moments.empty(phi, keys, labels)
  state = moments.absorb(phi, state, keys, labels, None, CHUNK_SIZE)
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

  def log_norm(gram):
    log_top, gram = _split_scale(gram)
    return log_top / 2 + jnp.log(ball.gram_dual_norm(gram))

  return top + jax.lax.map(log_norm, gram)


def _cosine(kernel, row, other) -> Float[Array, '']:
  (x, length, is_seen), (y, other_length, is_also_seen) = row, other
  seen = is_seen & is_also_seen
  exponent = jnp.where(seen, length + other_length, 0)
  if hasattr(kernel, 'log_kernel'):
    log = coefficients.evaluate(kernel.log_kernel, x, y).astype(exponent.dtype)
    return jnp.where(seen, jnp.exp(jnp.where(seen, log - exponent, 0)), 0)
  value = coefficients.evaluate(kernel, x, y).astype(exponent.dtype)
  return jnp.where(seen, value * jnp.exp(-exponent), 0)
