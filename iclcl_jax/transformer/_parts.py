"""The functions that an `Architecture` is made of, and an example of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.precision import widen
from iclcl_jax.transformer._types import (
  Architecture,
  Block,
  Constants,
  Layer,
  Linear,
  Norm,
  Norms,
  Rotary,
)
from iclcl_jax.types import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class RMSNorm:
  r"""Divides by the root mean square: :math:`x\,\gamma / \mathrm{rms}(x)`.

  The `epsilon` is added to the mean square, the `offset` to the gain: 1 if the
  parameters are `gain - 1`. A negative number is a `ValueError`.

  Example:
    >>> RMSNorm(0.0)(Norm(jnp.ones(2)), jnp.array([3.0, 3.0])).tolist()
    [1.0, 1.0]
  """

  epsilon: float
  offset: float = 0.0

  def __post_init__(self):
    _validate.non_negative(epsilon=self.epsilon, offset=self.offset)

  def __call__(self, parameters: Norm, x: Array) -> Array:
    row = self.linear_part(parameters, x, x)
    return row if parameters.bias is None else row + parameters.bias

  def linear_part(self, parameters: Norm, x: Array, y: Array) -> Array:
    _validate.check_array('x', x, 'd_model')
    x, wide = widen(x), widen(y)
    scale = _common_scale(x)
    inverse = _inverse_root(self._spread(x * scale), self.epsilon, scale)
    result = self._spread(wide * scale) * inverse
    if self.offset:  # Its sum with a small weight would be rounded.
      gain = self.offset + parameters.scale.astype(result.dtype)
      return (result * gain).astype(y.dtype)
    return result.astype(y.dtype) * parameters.scale

  def _spread(self, x: Array) -> Array:
    return x


class LayerNorm(RMSNorm):
  r"""An `RMSNorm` of the centred token, that is, of its deviation.

  At one token it is the matrix
  :math:`P = (I - 11^\top/d)\,\mathrm{diag}(\gamma) / \sigma(x)` and a bias.

  The `epsilon` is added to the variance; the `offset` is that of `RMSNorm`.

  Example:
    >>> LayerNorm(0.0)(Norm(jnp.ones(2)), jnp.array([1.0, 3.0])).tolist()
    [-1.0, 1.0]
  """

  def _spread(self, x: Array) -> Array:
    return x - jnp.mean(x)


def rotary_frequencies(width: int, base: float = 1e4) -> tuple[float, ...]:
  r"""Returns the angles :math:`b^{-2i/d}` of the pairs of `d` coordinates.

  The `width` `d`, an even one, is that of the part of a head which is rotated;
  the `base` `b` is at least 1. Others are a `ValueError`.

  Example:
    >>> rotary_frequencies(4, 100.0)
    (1.0, 0.1)
  """
  _validate.check_scalar('base', base, minimum=1)
  _validate.at_least(2, width=width)
  if width % 2:
    raise ValueError(
      f'width is {width}; expected an even one, because pairs are rotated.'
    )
  return tuple((float(base) ** -(np.arange(0, width, 2) / width)).tolist())


def rotate(
  constants: Constants, x: Float[Array, ' d_k'], position: Array
) -> Float[Array, ' d_k']:
  """Returns a query or key `[d_k]` rotated by its position, see `Rotary`."""
  if constants.frequencies is None:
    return x
  size = constants.frequencies.shape[0]
  turned, rest = jnp.split(x, [2 * size])
  first, second = jnp.split(widen(turned), 2)
  angles = position.astype(first.dtype) * constants.frequencies
  cosine, sine = (f(angles) * constants.scale for f in (jnp.cos, jnp.sin))
  halves = first * cosine - second * sine, second * cosine + first * sine
  return jnp.concatenate([*(half.astype(x.dtype) for half in halves), rest])


def at_length(constants: Constants, positions: Array) -> Constants:
  """Chooses the frequencies that a sequence of such positions takes."""
  if constants.switch is None or constants.frequencies is None:
    return constants
  largest = jnp.max(positions).astype(int)
  is_far = largest >= jnp.asarray(constants.switch, largest.dtype)
  near, far = constants.frequencies
  return constants._replace(frequencies=jnp.where(is_far, far, near))


def causal(query_position: Array, key_position: Array) -> Bool[Array, '']:
  """Whether a token sees another: itself and those before it. Shapes `[]`."""
  return key_position <= query_position


def bidirectional(
  query_position: Array, key_position: Array
) -> Bool[Array, '']:
  """Whether a token sees another: always. Shapes `[]`."""
  del query_position, key_position
  return jnp.ones((), bool)


@dataclasses.dataclass(frozen=True)
class ClampedGating:
  """Hidden layer `activation(min(gate, c)) (clip(up, -c, c) + 1)`, as gpt-oss.

  The `limit` is the number `c`.
  """

  limit: float

  def __post_init__(self):
    _validate.positive(limit=self.limit)

  def __call__(self, activation, gate: Array, up: Array) -> Array:
    gate = jnp.minimum(gate, self.limit)
    return activation(gate) * (jnp.clip(up, -self.limit, self.limit) + 1)


def example() -> tuple[Architecture, Block]:
  """Makes a small block of the Llama family, all weights 1, for examples.

  It has `d_model = 4`, `d_ff = 3`, and two query heads of width 2 that share
  one key-value head.

  Example:
    >>> architecture, block = example()
    >>> block.query.weight.shape, block.key.weight.shape
    ((4, 2, 2), (4, 1, 2))
  """
  architecture = Architecture(
    normalization=RMSNorm(1e-5),
    activation=jax.nn.silu,
    visible=causal,
    layers=(Layer(rotation=Rotary(frequencies=rotary_frequencies(2))),),
  )
  block = Block(
    attention_norms=Norms(input=Norm(jnp.ones(4))),
    query=Linear(jnp.ones((4, 2, 2))),
    key=Linear(jnp.ones((4, 1, 2))),
    value=Linear(jnp.ones((4, 1, 2))),
    output=Linear(jnp.ones((2, 2, 4))),
    ffn_norms=Norms(input=Norm(jnp.ones(4))),
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
