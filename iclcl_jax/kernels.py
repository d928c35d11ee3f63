"""Exact kernels `k(x, y)` of two vectors.

Each is a callable pytree. The scale belongs to the kernel: the exponential one
is the kernel of softmax attention, `exp(x . y / sqrt(d_k))`. A number that is
out of its range is a `ValueError` everywhere.

References:
  Ren & Liu, arXiv:2310.13220, section 3.1 (exponential and Gaussian);
  Katharopoulos et al., arXiv:2006.16236 (linear).
"""

import jax.numpy as jnp

from iclcl_jax import _pytree, _validate
from iclcl_jax._door import eager_door
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, Float, Vector


class FromLog:
  """Gives a positive kernel its `__call__`."""

  @widened
  def __call__(self, x: Vector, y: Vector) -> Float[Array, '']:
    return jnp.exp(self.log_kernel(x, y))  # type: ignore[attr-defined]


@_pytree.dataclass
class ExponentialKernel(FromLog):
  r"""The softmax kernel :math:`\exp(x^\top y / \sqrt{d_k})`.

  Example:
    >>> float(ExponentialKernel()(jnp.zeros(4), jnp.ones(4)))
    1.0
  """

  @eager_door
  @widened
  def log_kernel(self, x: Vector, y: Vector) -> Float[Array, '']:
    """Returns the scaled score `x . y / sqrt(d_k)`."""
    return x @ (y / x.shape[0] ** 0.5)


@_pytree.dataclass
class CappedExponentialKernel(FromLog):
  r"""The softmax kernel of capped scores, :math:`\exp(c \tanh(t / c))`.

  The limit `c > 0` caps the score `t = x . y / sqrt(d_k)`. It is positive, but
  not positive definite: no feature map has it for an inner product, and it
  spans no function space. Coefficients need neither.

  Example:
    >>> kernel = CappedExponentialKernel(2.0)
    >>> float(kernel.log_kernel(jnp.ones(4), 1e3 * jnp.ones(4)))
    2.0

  References:
    Gemma Team, arXiv:2408.00118, section 2 (logit soft-capping).
  """

  limit: float = _pytree.static()

  def __post_init__(self):
    _validate.positive(limit=self.limit)

  @eager_door
  @widened
  def log_kernel(self, x: Vector, y: Vector) -> Float[Array, '']:
    """Returns the capped score."""
    return cap(x @ (y / x.shape[0] ** 0.5), self.limit)


def cap(scores: Array, limit: float) -> Array:
  """Returns `limit tanh(scores / limit)`, number by number."""
  return limit * jnp.tanh(scores / limit)


@_pytree.dataclass
class GaussianKernel(FromLog):
  r"""The Gaussian kernel :math:`\exp(-|x-y|^2 / (2\sqrt{d_k}))`.

  The factor of the softmax kernel that depends on the distance alone: for keys
  of equal norm both give the same attention.

  Example:
    >>> float(GaussianKernel()(jnp.ones(4), jnp.ones(4)))
    1.0
  """

  @eager_door
  @widened
  def log_kernel(self, x: Vector, y: Vector) -> Float[Array, '']:
    """Returns the logarithm of the kernel."""
    return -jnp.sum(((x - y) / (4 * x.shape[0]) ** 0.25) ** 2)


@_pytree.dataclass
class LinearKernel:
  """The inner product `x . y`, without scale: the kernel of linear attention.

  Example:
    >>> float(LinearKernel()(jnp.ones(4), jnp.ones(4)))
    4.0
  """

  @eager_door
  @widened
  def __call__(self, x: Vector, y: Vector) -> Float[Array, '']:
    return x @ y
