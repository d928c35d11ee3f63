"""The functions that an `Architecture` is made of."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.transformer._types import Norm, Placement
from iclcl_jax.types import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class RMSNorm:
  r"""Divides by the root mean square: :math:`x\,\gamma / \mathrm{rms}(x)`.

  Args:
    epsilon: added to the mean square.

  Raises:
    ValueError: if `epsilon` is negative or not finite.

  Example:
    >>> RMSNorm(0.0)(Norm(jnp.ones(2)), jnp.array([3.0, 3.0])).tolist()
    [1.0, 1.0]

  References:
    Zhang & Sennrich, arXiv:1910.07467, eq. 4.
  """

  epsilon: float

  def __post_init__(self):
    _validate.check_scalar('epsilon', self.epsilon, minimum=0)

  def __call__(
    self, parameters: Norm, x: Float[Array, ' d_model']
  ) -> Float[Array, ' d_model']:
    """Returns the normalised token."""
    return _shift(parameters, self.linear_part(parameters, x, x))

  def linear_part(
    self,
    parameters: Norm,
    x: Float[Array, ' d_model'],
    y: Float[Array, ' d_model'],
  ) -> Float[Array, ' d_model']:
    r"""Returns `y P(x)` with :math:`P = \mathrm{diag}(\gamma)/\mathrm{rms}`."""
    _validate.check_array('x', x, 'd_model')
    wide = _widen(x)
    scale = _common_scale(wide)
    inverse = _inverse_root(wide * scale, self.epsilon, scale)
    result = _widen(y) * scale * inverse
    return result.astype(y.dtype) * parameters.scale


@dataclasses.dataclass(frozen=True)
class LayerNorm:
  r"""Centres and divides by the deviation, then scales and shifts.

  Args:
    epsilon: added to the variance.

  Raises:
    ValueError: if `epsilon` is negative or not finite.

  Example:
    >>> LayerNorm(0.0)(Norm(jnp.ones(2)), jnp.array([1.0, 3.0])).tolist()
    [-1.0, 1.0]

  References:
    Ba et al., arXiv:1607.06450, eq. 3.
  """

  epsilon: float

  def __post_init__(self):
    _validate.check_scalar('epsilon', self.epsilon, minimum=0)

  def __call__(
    self, parameters: Norm, x: Float[Array, ' d_model']
  ) -> Float[Array, ' d_model']:
    """Returns the normalised token."""
    return _shift(parameters, self.linear_part(parameters, x, x))

  def linear_part(
    self,
    parameters: Norm,
    x: Float[Array, ' d_model'],
    y: Float[Array, ' d_model'],
  ) -> Float[Array, ' d_model']:
    r"""Returns `y P(x)`.

    .. math:: P = (I - 11^\top/d)\,\mathrm{diag}(\gamma) / \sigma(x)
    """
    _validate.check_array('x', x, 'd_model')
    wide = _widen(x)
    scale = _common_scale(wide)
    inverse = _inverse_root(_centre(wide * scale), self.epsilon, scale)
    result = _centre(_widen(y) * scale) * inverse
    return result.astype(y.dtype) * parameters.scale


@dataclasses.dataclass(frozen=True)
class Rotary:
  r"""Rotates pairs of coordinates by angles that grow with the position.

  The pair `(i, i + d_k/2)` turns by :math:`p\, b^{-2i/d_k}`. Norms are kept;
  keys and queries are rotated before a kernel or feature map sees them.

  Args:
    base: the number `b`.

  Raises:
    ValueError: if `base` is not at least 1; if the width is odd.

  Example:
    >>> x = jnp.array([1.0, 0.0])
    >>> [round(float(t), 4) for t in Rotary(10000.0)(x, jnp.array(1))]
    [0.5403, 0.8415]

  References:
    Su et al., arXiv:2104.09864, eq. 34, with halves in place of neighbours.
  """

  base: float = 10000.0

  def __post_init__(self):
    _validate.check_scalar('base', self.base, minimum=1)

  def __call__(
    self, x: Float[Array, ' d_k'], position: Array
  ) -> Float[Array, ' d_k']:
    """Returns the rotated vector."""
    if x.shape[0] % 2:
      raise ValueError(
        f'x has shape {list(x.shape)}; expected an even width d_k, whose '
        'halves are rotated against each other.'
      )
    first, second = jnp.split(_widen(x), 2)
    steps = jnp.arange(first.shape[0], dtype=first.dtype) / first.shape[0]
    angles = position.astype(first.dtype) * self.base**-steps
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    halves = first * cosine - second * sine, second * cosine + first * sine
    return jnp.concatenate(halves).astype(x.dtype)


def unrotated(x: Float[Array, ' d_k'], position: Array) -> Float[Array, ' d_k']:
  """Leaves queries and keys as they are.

  Args:
    x: a query or key. Shape `[d_k]`.
    position: its position. Shape `[]`.

  Returns:
    `x`.

  Example:
    >>> unrotated(jnp.ones(2), jnp.array(3)).tolist()
    [1.0, 1.0]
  """
  del position
  return x


def causal(query_position: Array, key_position: Array) -> Bool[Array, '']:
  """Whether a token sees another: itself and those before it.

  Args:
    query_position: position of the one that looks. Shape `[]`.
    key_position: position of the one that is looked at. Shape `[]`.

  Returns:
    A boolean. Shape `[]`.

  Example:
    >>> bool(causal(jnp.array(1), jnp.array(2)))
    False
  """
  return key_position <= query_position


def bidirectional(
  query_position: Array, key_position: Array
) -> Bool[Array, '']:
  """Whether a token sees another: always.

  Args:
    query_position: position of the one that looks. Shape `[]`.
    key_position: position of the one that is looked at. Shape `[]`.

  Returns:
    A boolean. Shape `[]`.

  Example:
    >>> bool(bidirectional(jnp.array(1), jnp.array(2)))
    True
  """
  del query_position, key_position
  return jnp.ones((), bool)


def normalised(normalise: Callable[[Array], Array], x: Array) -> Array:
  """Returns `normalise(x)`.

  Args:
    normalise: a normalisation.
    x: a token. Shape `[d_model]`.

  Returns:
    The normalised token.

  Example:
    >>> normalised(lambda x: x / 2, 4.0)
    2.0
  """
  return normalise(x)


def as_it_is(normalise: Callable[[Array], Array], x: Array) -> Array:
  """Returns `x`.

  Args:
    normalise: a normalisation that stands elsewhere.
    x: a token. Shape `[d_model]`.

  Returns:
    The same token.

  Example:
    >>> as_it_is(lambda x: x / 2, 4.0)
    4.0
  """
  del normalise
  return x


pre_norm = Placement(before=normalised, after=as_it_is)
post_norm = Placement(before=as_it_is, after=normalised)


def _widen(x: Array) -> Array:
  """Sums of squares and angles need more than half precision."""
  is_half = jnp.finfo(x.dtype).bits < 32
  return x.astype(jnp.float32) if is_half else x


def _common_scale(x: Array) -> Array:
  """A power of two, so without rounding, that makes squares representable."""
  smallest = jnp.finfo(x.dtype).minexp
  _, exponent = jnp.frexp(jnp.max(jnp.abs(x)))
  exponent = jnp.clip(exponent, smallest // 2, -smallest)
  return jax.lax.stop_gradient(jnp.ldexp(jnp.ones((), x.dtype), -exponent))


def _inverse_root(x: Array, epsilon: float, scale: Array) -> Array:
  """One over the root of the mean square of `x`, which is scaled, + epsilon."""
  square = jnp.mean(x * x) + epsilon * scale * scale
  is_zero = square == 0  # A scaled epsilon may underflow.
  return jnp.where(is_zero, 0, jax.lax.rsqrt(jnp.where(is_zero, 1, square)))


def _centre(x: Array) -> Array:
  return x - jnp.mean(x)


def _shift(parameters: Norm, x: Array) -> Array:
  return x if parameters.bias is None else x + parameters.bias
