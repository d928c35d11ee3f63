"""Norms and cosines of vectors of any size and dtype."""

import jax
import jax.numpy as jnp

from iclcl_jax.precision import widen
from iclcl_jax.types import Array, Float


def scaled(x: Float[Array, '*d']) -> tuple[Float[Array, ''], Array]:
  """Returns the largest entry (1 if all are 0), and `x` divided by it, widened.

  No gradient runs through the scale: what is scaled back does not depend on it.
  """
  x = widen(x)
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
  scale = jnp.where(largest == 0, 1, largest)
  return scale, x / scale


def norm(x: Float[Array, '*d']) -> Float[Array, '']:
  """Returns the widened 2-norm; no square over- or underflows."""
  scale, rest = scaled(x)
  return scale * jnp.sqrt(jnp.sum(rest**2))


def unit(x: Float[Array, ' d']) -> Float[Array, ' d']:
  """Returns the widened unit vector along `x`; NaN, with gradient 0, for 0."""
  rest = scaled(x)[1]
  square = jnp.sum(rest**2)
  length = jnp.sqrt(jnp.where(square == 0, 1, square))
  return jnp.where(square == 0, jnp.nan, rest / length)


def cosine(a: Float[Array, ' d'], b: Float[Array, ' d']) -> Float[Array, '']:
  """Returns a cosine in the dtype of `a`; NaN, with gradient 0, if one is 0."""
  return jnp.sum(unit(a) * unit(b)).astype(a.dtype)
