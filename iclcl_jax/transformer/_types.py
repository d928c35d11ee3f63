"""Parameters and architecture of Transformer blocks.

Counts are in the shapes of the parameters (so many heads, so many groups), and
what the shapes cannot say is an `Architecture` of functions and numbers: it is
static and hashable, the parameters are a pytree. Which normalisations there are
is said by which parameters are there. Axes beside those of `iclcl_jax.types`:

===========  ============================================================
``L``        layers (blocks); the leading axis of stacked parameters
``H``        query heads
``G``        key-value heads; each serves `H / G` consecutive query heads
``d_model``  width of the residual stream
``d_k``      width of one head
``d_ff``     width of the feed-forward network, of all experts together
``E``        experts of the network
===========  ============================================================
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, kernels
from iclcl_jax.types import Array, Bool, Float, Kernel


class Linear(NamedTuple):
  """An affine map, applied as `x @ weight + bias`.

  The weight is `[in, out]`, and those of the attention keep their heads apart,
  see `Block`; the bias is `[out]`, or None.
  """

  weight: Array
  bias: Array | None = None


class Norm(NamedTuple):
  """Factor and shift, or None, of each coordinate of a normalised row."""

  scale: Float[Array, ' d_model']
  bias: Float[Array, ' d_model'] | None = None


class Norms(NamedTuple):
  """Normalisations around a sublayer `f`: `sum(x + output(f(input(x))))`.

  Of what `f` reads (pre-norm), of what it returns, and of the residual stream
  with it (post-norm); each may be None.
  """

  input: Norm | None = None
  output: Norm | None = None
  sum: Norm | None = None


class Constants(NamedTuple):
  """The numbers of one layer as arrays, see `with_constants`.

  Attributes:
    frequencies: angle of each rotated pair at position 1, or None. A second row
      holds from the position `switch` on. Shape `[F]` or `[2, F]`.
    scale: factor of the rotated coordinates, or None. Shape `[]`.
    switch: the first position that needs the second row, or None. Shape `[]`.
    window: `[]`: a query sees what is fewer positions away; None for all.
  """

  frequencies: Any = None
  scale: Any = None
  switch: Any = None
  window: Any = None


@_pytree.with_short_repr
class Block(NamedTuple):
  """Parameters of one Transformer block.

  A stack of blocks is a `Block` whose arrays have a leading axis `L`.

  Attributes:
    attention_norms: normalisations around the attention.
    query: weight `[d_model, H, d_k]`, bias `[H, d_k]`.
    key, value: weights `[d_model, G, d_k]`, biases `[G, d_k]`.
    output: weight `[H, d_k, d_model]`, bias `[d_model]`.
    ffn_norms: normalisations around the feed-forward network.
    gate: the branch under the activation of a gated network (SwiGLU), or None.
      Weight `[d_model, d_ff]`.
    up: first layer of the network; under the activation if there is no gate,
      multiplied by the activated gate otherwise. Weight `[d_model, d_ff]`.
    down: second layer. Weight `[d_ff, d_model]`, bias `[d_model]`, or
      `[E, d_model]` if there is a router.
    router: scores of the experts of a mixture, or None. The experts stand side
      by side in `d_ff`. Weight `[d_model, E]`.
    query_norm: normalisation of the queries before the rotation, or None. Scale
      `[d_k]` for each head alone, `[H, d_k]` for all heads together.
    key_norm: the same of the keys, `[d_k]` or `[G, d_k]`.
    sinks: score of a key without value that every query of the head sees, or
      None. Shape `[H]`.
    constants: None, or what `with_constants` adds to a stack.
  """

  attention_norms: Norms
  query: Linear
  key: Linear
  value: Linear
  output: Linear
  ffn_norms: Norms
  gate: Linear | None
  up: Linear
  down: Linear
  router: Linear | None = None
  query_norm: Norm | None = None
  key_norm: Norm | None = None
  sinks: Array | None = None
  constants: Constants | None = None


def _check_number(name: str, value: Any, minimum: float = -math.inf) -> None:
  _validate.check_type(name, value, numbers.Real, 'a Python number')
  _validate.check_scalar(name, value, minimum=minimum)


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
class Rotary:
  r"""Rotates pairs of coordinates by angles that grow with the position.

  The pair `(i, i + F)` of the first `2 F` coordinates turns by
  :math:`p\, f_i` at position `p`; the others stay. Keys and queries are rotated
  before a kernel or feature map sees them.

  Attributes:
    frequencies: the angles :math:`f_i`, such as `rotary_frequencies` gives.
    scale: factor of the rotated coordinates.
    beyond: `(position, rotation)`: the first position for which the whole
      sequence takes another rotation, of as many pairs and the same scale; None
      if one serves all lengths.
  """

  frequencies: tuple[float, ...]
  scale: float = 1.0
  beyond: 'tuple[int, Rotary] | None' = None

  def __post_init__(self):
    _validate.check_type('frequencies', self.frequencies, tuple, 'of numbers')
    for frequency in self.frequencies:
      _check_number('frequencies', frequency)
    _check_number('scale', self.scale, minimum=0)
    match self.beyond:
      case None:
        pass
      case (position, Rotary(beyond=None) as far) if (
        far.scale == self.scale
        and len(far.frequencies) == len(self.frequencies)
      ):
        _validate.at_least(1, **{'the position in beyond': position})
      case _:
        raise ValueError(
          f'beyond is {self.beyond!r}; expected a position and a Rotary with '
          f'{len(self.frequencies)} frequencies, scale={self.scale} and none '
          'beyond it.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """What one layer has and another may not.

  Attributes:
    rotation: of queries and keys by position, or None.
    window: a query sees the tokens that are fewer positions away, itself and
      `window - 1` on each side where `visible` shows both (a ModernBERT's
      `local_attention // 2 + 1`); None for all.
  """

  rotation: Rotary | None = None
  window: int | None = None

  def __post_init__(self):
    if self.rotation is not None:
      expected = 'a transformer.Rotary, or None'
      _validate.check_type('rotation', self.rotation, Rotary, expected)
    if self.window is not None:
      _validate.at_least(1, window=self.window)


def gated(
  activation: Callable[[Array], Array], gate: Array, up: Array
) -> Array:
  """Returns the hidden layer `activation(gate) * up` of a gated network."""
  return activation(gate) * up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """What the shapes of a block's parameters do not say.

  Attributes:
    normalization: `RMSNorm(epsilon)` or `LayerNorm(epsilon)`.
    activation: of the feed-forward network, such as `jax.nn.silu`.
    visible: which token sees which, `causal` or `bidirectional`:
      `(query_position [], key_position []) -> bool []`.
    layers: what differs from layer to layer; one entry serves all.
    parallel: whether the network reads the block's input, beside the heads.
    gating: hidden layer of a gated network, `(activation, gate, up) -> hidden`.
    query_scale: factor of the queries, so that the kernel keeps its own scale
      of one over the square root of `d_k` and every feature map applies.
    score_cap: the number `c` if scores `t` are capped, `c tanh(t / c)`.
    experts_per_token: how many experts of a mixture answer a token; 0 without
      a router.
  """

  normalization: Normalization
  activation: Callable[[Array], Array]
  visible: Callable[[Array, Array], Bool[Array, '']]
  layers: tuple[Layer, ...] = (Layer(),)
  parallel: bool = False
  gating: Callable[..., Array] = gated
  query_scale: float = 1.0
  score_cap: float | None = None
  experts_per_token: int = 0

  def __post_init__(self):
    for name, num_arguments, example in (
      ('normalization', 2, 'such as transformer.RMSNorm(1e-5)'),
      ('activation', 1, 'of an array, such as jax.nn.silu'),
      ('visible', 2, 'of two positions, such as transformer.causal'),
      ('gating', 3, 'such as transformer.gated'),
    ):
      function = getattr(self, name)
      _validate.check_function(name, function, num_arguments, example)
    if not callable(getattr(self.normalization, 'linear_part', None)):
      raise ValueError(
        'normalization has no method linear_part(parameters, x, y); expected '
        'one, such as that of transformer.RMSNorm(1e-5).'
      )
    is_tuple = isinstance(self.layers, tuple) and len(self.layers) > 0
    if not is_tuple or not all(isinstance(x, Layer) for x in self.layers):
      raise ValueError(
        f'layers is {self.layers!r}; expected a tuple of transformer.Layer, '
        'one for each layer, or one for all.'
      )
    _check_number('query_scale', self.query_scale, minimum=0)
    if self.score_cap is not None:
      _check_number('score_cap', self.score_cap)
      _validate.positive(score_cap=self.score_cap)
    _validate.at_least(0, experts_per_token=self.experts_per_token)
    try:
      jax.eval_shape(self.activation, jax.ShapeDtypeStruct((), jnp.float32))
    except Exception as error:  # Whatever a caller's function raises.
      raise ValueError(
        f'activation cannot be applied to a single number ({error}); expected '
        'a function of each coordinate alone, such as jax.nn.silu.'
      ) from error

  @property
  def kernel(self) -> Kernel:
    """The kernel of its attention."""
    if self.score_cap is None:
      return kernels.ExponentialKernel()
    return kernels.CappedExponentialKernel(self.score_cap)
