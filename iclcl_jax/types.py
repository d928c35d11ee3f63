"""Vocabulary: axes, array aliases, protocols and the state of a dual model.

Axes, used in every signature of the library (rows are tokens):

=========  ==============================================================
``N``      demonstrations (or, in causal code, positions)
``M``      queries
``R``      features
``d_k``    width of queries and keys
``d_v``    width of values
=========  ==============================================================

Core functions take ONE sequence and ONE head; :func:`jax.vmap` makes batches
and heads.
"""

from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Mask: TypeAlias = Bool[Array, ' N']

__all__ = [
  'Array',
  'Bool',
  'DualState',
  'FeatureMap',
  'Float',
  'Int',
  'Kernel',
  'KernelDualState',
  'LogKernel',
  'Mask',
  'PRNGKeyArray',
]


@runtime_checkable
class FeatureMap(Protocol):
  r"""A map :math:`\phi` whose inner products are a kernel.

  Implementations are pytrees, so that `jit`, `vmap` and `grad` reach the
  arrays inside (a random projection, say).
  """

  def __call__(self, x: Float[Array, ' d_k']) -> Float[Array, ' R']:
    """Returns the features `phi(x)`. They may under- or overflow."""
    ...

  def scaled(
    self, x: Float[Array, ' d_k']
  ) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
    """Returns `(log_scale, features)`, `phi(x) = exp(log_scale) * features`.

    `log_scale` has shape `[R]` or `[1]`.
    """
    ...


@runtime_checkable
class Kernel(Protocol):
  """A symmetric function `k(x, y)`; positive ones also have `log_kernel`."""

  def __call__(
    self, x: Float[Array, ' d_k'], y: Float[Array, ' d_k']
  ) -> Float[Array, '']:
    """Returns `k(x, y)`."""
    ...


@runtime_checkable
class LogKernel(Kernel, Protocol):
  """A positive kernel, evaluated in log space."""

  def log_kernel(
    self, x: Float[Array, ' d_k'], y: Float[Array, ' d_k']
  ) -> Float[Array, '']:
    """Returns `log k(x, y)`."""
    ...


class DualState(NamedTuple):
  r"""A trained dual model, for every query at once.

  The model is :math:`f(x) = W\phi(x) / (z^\top\phi(x))` with
  `W = weights * exp(log_scale)` and `z = mass * exp(log_scale)`: column `r`
  is stored relative to the largest contribution that feature `r` has
  received, so nothing under- or overflows.

  Attributes:
    weights: trained weights, scaled. Shape `[d_v, R]`.
    mass: sum of the features of all visible tokens, scaled. Shape `[R]`.
    log_scale: running maximum of the log-features. Shape `[R]`.

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1 (weights); Rabe & Staats,
    arXiv:2112.05682 (running maximum).
  """

  weights: Float[Array, 'd_v R']
  mass: Float[Array, ' R']
  log_scale: Float[Array, ' R']


class KernelDualState(NamedTuple):
  r"""The exact-kernel twin of `DualState`: coefficients over the keys.

  The model is :math:`f(x) = \sum_i c_i k(k_i, x) / \sum_i m_i k(k_i, x)`. It
  grows by a row for every token, so it cannot be the carry of a `lax.scan`.

  Attributes:
    keys: training inputs seen so far. Shape `[n, d_k]`.
    coefficients: weights of the kernel expansion. Shape `[n, d_v]`.
    mass: 1 for a visible token, 0 for a masked or removed one. Shape `[n]`.
  """

  keys: Float[Array, 'n d_k']
  coefficients: Float[Array, 'n d_v']
  mass: Float[Array, ' n']
