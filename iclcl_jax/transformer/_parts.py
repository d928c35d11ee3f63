"""The functions that an `Architecture` is made of, and an example of one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.precision import widen
from iclcl_jax.transformer._types import (
  Architecture,
  Block,
  Linear,
  Norm,
  Placement,
)
from iclcl_jax.types import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class _Normalisation:
  """What both normalisations share: a linear part, scaled and shifted."""

  epsilon: float

  def __post_init__(self):
    _validate.non_negative(epsilon=self.epsilon)

  def __call__(
    self, parameters: Norm, x: Float[Array, ' d_model']
  ) -> Float[Array, ' d_model']:
    """Returns the normalised token."""
    row = self.linear_part(parameters, x, x)
    return row if parameters.bias is None else row + parameters.bias

  def linear_part(
    self,
    parameters: Norm,
    x: Float[Array, ' d_model'],
    y: Float[Array, ' d_model'],
  ) -> Float[Array, ' d_model']:
    """Returns `y P(x)`, where `self(parameters, x) = x P(x) + bias`."""
    _validate.check_array('x', x, 'd_model')
    x, wide = widen(x), widen(y)
    scale = _common_scale(x)
    inverse = _inverse_root(self._spread(x * scale), self.epsilon, scale)
    result = self._spread(wide * scale) * inverse
    return result.astype(y.dtype) * parameters.scale

  def _spread(self, x: Array) -> Array:
    """Returns what is divided by the root of its mean square."""
    raise NotImplementedError


class RMSNorm(_Normalisation):
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

  def _spread(self, x: Array) -> Array:
    return x


class LayerNorm(_Normalisation):
  r"""Centres and divides by the deviation, then scales and shifts.

  At one token it is the matrix
  :math:`P = (I - 11^\top/d)\,\mathrm{diag}(\gamma) / \sigma(x)` and a bias.

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

  def _spread(self, x: Array) -> Array:
    return x - jnp.mean(x)


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
    first, second = jnp.split(widen(x), 2)
    steps = jnp.arange(first.shape[0], dtype=first.dtype) / first.shape[0]
    angles = position.astype(first.dtype) * self.base**-steps
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    halves = first * cosine - second * sine, second * cosine + first * sine
    return jnp.concatenate(halves).astype(x.dtype)


def unrotated(x: Float[Array, ' d_k'], position: Array) -> Float[Array, ' d_k']:
  """Returns a query or key `[d_k]` as it is, whatever its position `[]`."""
  del position
  return x


def causal(query_position: Array, key_position: Array) -> Bool[Array, '']:
  """Whether a token sees another: itself and those before it. Shapes `[]`."""
  return key_position <= query_position


def bidirectional(
  query_position: Array, key_position: Array
) -> Bool[Array, '']:
  """Whether a token sees another: always. Shapes `[]`."""
  del query_position, key_position
  return jnp.ones((), bool)


def normalised(normalise: Callable[[Array], Array], x: Array) -> Array:
  """Returns `normalise(x)` of a token `[d_model]`."""
  return normalise(x)


def as_it_is(normalise: Callable[[Array], Array], x: Array) -> Array:
  """Returns a token `[d_model]` whose normalisation stands elsewhere."""
  del normalise
  return x


pre_norm = Placement(before=normalised, after=as_it_is)
post_norm = Placement(before=as_it_is, after=normalised)


def example() -> tuple[Architecture, Block]:
  """Makes a small block of the Llama family, all weights 1, for examples.

  Returns:
    The architecture, and a block with `d_model = 4`, two query heads of width
    2 that share one key-value head, and `d_ff = 3`.

  Example:
    >>> architecture, block = example()
    >>> block.query.weight.shape, block.key.weight.shape
    ((4, 2, 2), (4, 1, 2))
  """
  architecture = Architecture(
    placement=pre_norm,
    normalization=RMSNorm(1e-5),
    activation=jax.nn.silu,
    rotation=Rotary(),
    visible=causal,
  )
  block = Block(
    attention_norm=Norm(jnp.ones(4)),
    query=Linear(jnp.ones((4, 2, 2))),
    key=Linear(jnp.ones((4, 1, 2))),
    value=Linear(jnp.ones((4, 1, 2))),
    output=Linear(jnp.ones((2, 2, 4))),
    ffn_norm=Norm(jnp.ones(4)),
    gate=Linear(jnp.ones((4, 3))),
    up=Linear(jnp.ones((4, 3))),
    down=Linear(jnp.ones((3, 4))),
  )
  return architecture, block


def _common_scale(x: Array) -> Array:
  """Returns a power of two (no rounding) that keeps squares in range."""
  smallest = jnp.finfo(x.dtype).minexp
  _, exponent = jnp.frexp(jnp.max(jnp.abs(x)))
  exponent = jnp.clip(exponent, smallest // 2, -smallest)
  return jax.lax.stop_gradient(jnp.ldexp(jnp.ones((), x.dtype), -exponent))


def _inverse_root(x: Array, epsilon: float, scale: Array) -> Array:
  """Returns 1 / sqrt(mean square + epsilon) of `x`, which is scaled."""
  square = jnp.mean(x * x) + epsilon * scale * scale
  is_zero = square == 0  # A scaled epsilon may underflow.
  return jnp.where(is_zero, 0, jax.lax.rsqrt(jnp.where(is_zero, 1, square)))
