r"""Random projections: `[R, d]` arrays whose rows are random directions.

All have the signature `(key, num_features, dim, *, dtype) -> [R, d]`, and
consume the key. Rows are marginally :math:`N(0, I_d)`, so that all random
feature maps built on them are unbiased. They differ in how the rows of a block
of `d` rows depend on each other, and so in the variance. Blocks are
independent; the last one is cut. A count that is no positive integer (for a
simplex, `dim < 2`) or a `dtype` that is not floating-point is a `ValueError`.

References:
  Choromanski et al., arXiv:2009.14794, section 2.3 (`gaussian`); Yu et al.,
  arXiv:1610.09072, with the Haar measure of Mezzadri, math-ph/0609050
  (`orthogonal`); Reid et al., arXiv:2301.13856, eq. 7 (`simplex`) and section
  3.2 (`simplex_plus`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.types import Array, Float, PRNGKeyArray


@door
def gaussian(
  key: PRNGKeyArray, num_features: int, dim: int, *, dtype=jnp.float32
) -> Float[Array, 'R d']:
  """Draws independent rows from a standard normal distribution.

  Example:
    >>> gaussian(jax.random.key(0), 4, 3).shape
    (4, 3)
  """
  _check(num_features, dim, dtype)
  return jax.random.normal(key, (num_features, dim), dtype)


@door
def orthogonal(
  key: PRNGKeyArray, num_features: int, dim: int, *, dtype=jnp.float32
) -> Float[Array, 'R d']:
  r"""Draws blocks of orthogonal rows, each marginally standard normal.

  A block is :math:`\mathrm{diag}(\chi)\, Q` with `Q` Haar-distributed and
  independent chi-distributed norms with `d` degrees of freedom.

  Example:
    >>> w = orthogonal(jax.random.key(0), 3, 3)
    >>> bool(jnp.allclose(w @ w.T, jnp.diag(jnp.sum(w * w, 1)), atol=1e-4))
    True
  """
  _check(num_features, dim, dtype)
  return _stack_blocks(
    lambda _, rotation: rotation, key, num_features, dim, dtype
  )


@door
def simplex(
  key: PRNGKeyArray, num_features: int, dim: int, *, dtype=jnp.float32
) -> Float[Array, 'R d']:
  r"""Draws blocks of rows that point to the corners of a regular simplex.

  A block is :math:`\mathrm{diag}(\chi)\, S\, Q`: the unit rows of `S` have the
  mutual inner product :math:`-1/(d-1)`, the smallest possible for `d` rows.

  Example:
    >>> simplex(jax.random.key(0), 5, 2).shape
    (5, 2)
  """
  _check(num_features, dim, dtype, min_dim=2)

  def directions(norms, rotation):
    return _dot(_simplex_corners(dim, norms.dtype), rotation)

  return _stack_blocks(directions, key, num_features, dim, dtype)


@door
def simplex_plus(
  key: PRNGKeyArray, num_features: int, dim: int, *, dtype=jnp.float32
) -> Float[Array, 'R d']:
  r"""Draws simplex rows whose directions are adapted to their norms.

  Starting from the simplex, five sweeps set each direction to
  :math:`s_i \leftarrow -t / |t|`, :math:`t = \sum_{j\ne i}\chi_j s_j`, which
  lowers the norm of the sum of the rows; then one Haar rotation of the block.
  Made for positive features; there is no closed form of the variance.

  Example:
    >>> simplex_plus(jax.random.key(0), 5, 3).shape
    (5, 3)
  """
  _check(num_features, dim, dtype, min_dim=2)

  def directions(norms, rotation):
    def update(step, directions):
      i = step % dim
      rest = _dot(norms.at[i].set(0), directions)
      return directions.at[i].set(-rest / jnp.linalg.norm(rest))

    corners = _simplex_corners(dim, norms.dtype)
    rows = jax.lax.fori_loop(0, 5 * dim, update, corners)
    return _dot(rows, rotation)

  return _stack_blocks(directions, key, num_features, dim, dtype)


def _dot(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision='highest')


def _simplex_corners(dim: int, dtype) -> Float[Array, 'd d']:
  ones = jnp.ones(dim, dtype).at[-1].set(0)
  shift = (dim**0.5 + 1) / (dim - 1) ** 1.5 * ones
  corners = (dim / (dim - 1)) ** 0.5 * jnp.eye(dim, dtype=dtype) - shift[None]
  return corners.at[-1].set(ones / (dim - 1) ** 0.5)


def _stack_blocks(
  directions: Callable[[Array, Array], Array],
  key: PRNGKeyArray,
  num_features: int,
  dim: int,
  dtype,
) -> Float[Array, 'R d']:
  """Stacks blocks: norms `[d]` times `directions(norms, Haar rotation)`."""
  # QR has no half-precision implementation: draw in float32 at least.
  wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
  num_blocks = -(-num_features // dim)

  def block(key):
    key_norms, key_rotation = jax.random.split(key)
    # Norms of independent standard normal vectors.
    normal = jax.random.normal(key_norms, (dim, dim), wide)
    norms = jnp.linalg.norm(normal, axis=1)
    with jax.default_matmul_precision('highest'):
      rotation = jax.random.orthogonal(key_rotation, dim, dtype=wide)
    return norms[:, None] * directions(norms, rotation)

  blocks = jax.vmap(block)(jax.random.split(key, num_blocks))
  return blocks.reshape(num_blocks * dim, dim)[:num_features].astype(dtype)


def _check(num_features: int, dim: int, dtype, *, min_dim: int = 1) -> None:
  _validate.at_least(1, num_features=num_features)
  _validate.at_least(min_dim, dim=dim)
  _validate.check_float_dtype('dtype', dtype)
