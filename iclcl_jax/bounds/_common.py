"""Positive numbers as logarithms, and balls of weights."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.precision import accumulation_dtype
from iclcl_jax.types import Array, Float

CHUNK_SIZE = 512


class LogValue(NamedTuple):
  """A number above 0 stored as its logarithm, so that it cannot overflow.

  Results may be 0, whose logarithm is `-inf`; arguments may not.

  Attributes:
    log_value: the logarithm. Shape `[]`, or `[P]` for several numbers.

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
    growth: largest ratio of the dual norm to the Frobenius norm, a function of
      the rank.
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
  top = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1))
  empty = top == 0
  top = jnp.where(empty, 1, top)
  squares = jnp.sum((rows / top[:, None]) ** 2, axis=1)
  logs = jnp.log(top) + jnp.log(jnp.where(empty, 1, squares)) / 2
  return jnp.where(empty, -jnp.inf, logs)


def count(rows: Float[Array, 'N d']) -> Float[Array, '']:
  """Counts the rows, in their dtype or float32."""
  return jnp.asarray(rows.shape[0], accumulation_dtype(rows.dtype))
