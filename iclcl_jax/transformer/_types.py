"""Parameters and architecture of Transformer blocks.

Counts are in the shapes of the parameters (so many heads, so many groups), and
what the shapes cannot say is an `Architecture` of functions: it is static and
hashable, the parameters are a pytree. Axes beside those of `iclcl_jax.types`:

===========  ============================================================
``L``        layers (blocks); the leading axis of stacked parameters
``H``        query heads
``G``        key-value heads; each serves `H / G` consecutive query heads
``d_model``  width of the residual stream
``d_k``      width of one head
``d_ff``     width of the feed-forward network
===========  ============================================================
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.types import Array, Bool, Float


class Linear(NamedTuple):
  """An affine map, applied as `x @ weight + bias`.

  Attributes:
    weight: its matrix. Shape `[in, out]`; those of the attention keep their
      heads apart, see `Block`.
    bias: its shift, or None. Shape `[out]`.
  """

  weight: Array
  bias: Array | None = None


class Norm(NamedTuple):
  """Parameters of a normalisation.

  Attributes:
    scale: factor of each coordinate. Shape `[d_model]`.
    bias: shift of each coordinate, or None. Shape `[d_model]`.
  """

  scale: Float[Array, ' d_model']
  bias: Float[Array, ' d_model'] | None = None


class Block(NamedTuple):
  """Parameters of one Transformer block.

  A stack of blocks is a `Block` whose arrays have a leading axis `L`.

  Attributes:
    attention_norm: normalisation that belongs to the attention.
    query: weight `[d_model, H, d_k]`, bias `[H, d_k]`.
    key: weight `[d_model, G, d_k]`, bias `[G, d_k]`.
    value: weight `[d_model, G, d_k]`, bias `[G, d_k]`.
    output: weight `[H, d_k, d_model]`, bias `[d_model]`.
    ffn_norm: normalisation that belongs to the feed-forward network.
    gate: the branch under the activation of a gated network (SwiGLU), or None.
      Weight `[d_model, d_ff]`.
    up: first layer of the network; under the activation if there is no gate,
      multiplied by the activated gate otherwise. Weight `[d_model, d_ff]`.
    down: second layer. Weight `[d_ff, d_model]`.
  """

  attention_norm: Norm
  query: Linear
  key: Linear
  value: Linear
  output: Linear
  ffn_norm: Norm
  gate: Linear | None
  up: Linear
  down: Linear


class Normalization(Protocol):
  """A normalisation of one token, and its matrix at that token."""

  def __call__(
    self, parameters: Norm, x: Float[Array, ' d_model']
  ) -> Float[Array, ' d_model']:
    """Returns the normalised token."""
    ...

  def linear_part(
    self,
    parameters: Norm,
    x: Float[Array, ' d_model'],
    y: Float[Array, ' d_model'],
  ) -> Float[Array, ' d_model']:
    """Returns `y P(x)`, where `self(parameters, x) = x P(x) + bias`."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
  """Where the normalisation of a sublayer `f` stands.

  The sublayer maps `x` to `after(normalise, x + f(before(normalise, x)))`.
  Both fields are functions `(normalise, x) -> x`: `normalised` or `as_it_is`.

  Attributes:
    before: what `f` reads.
    after: what becomes of the sum.
  """

  before: Callable[[Callable[[Array], Array], Array], Array]
  after: Callable[[Callable[[Array], Array], Array], Array]

  def __post_init__(self):
    for name in ('before', 'after'):
      _validate.check_function(
        name, getattr(self, name), 2, 'such as transformer.normalised'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """What the shapes of a block's parameters do not say.

  Attributes:
    placement: `pre_norm` (of a sublayer's input) or `post_norm` (of the sum of
      its input and output), or another `Placement`.
    normalization: `RMSNorm(epsilon)` or `LayerNorm(epsilon)`.
    activation: of the feed-forward network, such as `jax.nn.silu`.
    rotation: of queries and keys by position, `Rotary(base)` or `unrotated`:
      `(x [d_k], position []) -> [d_k]`.
    visible: which token sees which, `causal` or `bidirectional`:
      `(query_position [], key_position []) -> bool []`.
  """

  placement: Placement
  normalization: Normalization
  activation: Callable[[Array], Array]
  rotation: Callable[[Array, Array], Array]
  visible: Callable[[Array, Array], Bool[Array, '']]

  def __post_init__(self):
    expected = 'a transformer.Placement, such as transformer.pre_norm'
    _validate.check_type('placement', self.placement, Placement, expected)
    for name, num_arguments, example in (
      ('normalization', 2, 'such as transformer.RMSNorm(1e-5)'),
      ('activation', 1, 'of an array, such as jax.nn.silu'),
      ('rotation', 2, 'of a vector and its position, such as Rotary(1e4)'),
      ('visible', 2, 'of two positions, such as transformer.causal'),
    ):
      function = getattr(self, name)
      _validate.check_function(name, function, num_arguments, example)
    if not callable(getattr(self.normalization, 'linear_part', None)):
      raise ValueError(
        'normalization has no method linear_part(parameters, x, y); expected '
        'one, such as that of transformer.RMSNorm(1e-5).'
      )
    try:
      jax.eval_shape(self.activation, jax.ShapeDtypeStruct((), jnp.float32))
    except Exception as error:  # Whatever a caller's function raises.
      raise ValueError(
        f'activation cannot be applied to a single number ({error}); expected '
        'a function of each coordinate alone, such as jax.nn.silu.'
      ) from error
