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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate, kernels
from iclcl_jax.types import Array, Bool, Float, Kernel


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


class Norms(NamedTuple):
  """Normalisations around a sublayer `f`: `sum(x + output(f(input(x))))`.

  Attributes:
    input: of what `f` reads (pre-norm), or None.
    output: of what `f` returns, or None.
    sum: of the residual stream with it (post-norm), or None.
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
    window: a query sees what is fewer positions away, or None for all. Shape
      `[]`.
  """

  frequencies: Any = None
  scale: Any = None
  switch: Any = None
  window: Any = None


class Block(NamedTuple):
  """Parameters of one Transformer block.

  A stack of blocks is a `Block` whose arrays have a leading axis `L`.

  Attributes:
    attention_norms: normalisations around the attention.
    query: weight `[d_model, H, d_k]`, bias `[H, d_k]`.
    key: weight `[d_model, G, d_k]`, bias `[G, d_k]`.
    value: weight `[d_model, G, d_k]`, bias `[G, d_k]`.
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
  """Checks a number of an architecture, which is compared and hashed."""
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

  References:
    Su et al., arXiv:2104.09864, eq. 34, with halves in place of neighbours.
  """

  frequencies: tuple[float, ...]
  scale: float = 1.0
  beyond: 'tuple[int, Rotary] | None' = None

  def __post_init__(self):
    _validate.check_type('frequencies', self.frequencies, tuple, 'of numbers')
    for frequency in self.frequencies:
      _check_number('frequencies', frequency)
    _check_number('scale', self.scale, minimum=0)
    if self.beyond is not None:
      self._check_beyond(self.beyond)

  def _check_beyond(self, beyond: Any) -> None:
    match beyond:
      case (position, Rotary(beyond=None) as far) if (
        far.scale == self.scale
        and len(far.frequencies) == len(self.frequencies)
      ):
        _validate.at_least(1, **{'the position in beyond': position})
      case _:
        raise ValueError(
          f'beyond is {beyond!r}; expected a position and a transformer.Rotary '
          f'with {len(self.frequencies)} frequencies, scale={self.scale} and '
          'none beyond it.'
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


def with_constants(architecture: Architecture, blocks: Block) -> Block:
  """Adds to a stack of blocks the numbers in which its layers differ.

  A scan over the result is one compiled block, whatever the layers have.

  Args:
    architecture: with one layer for all, or as many as the stack has.

  Returns:
    The blocks with `constants`; without any if one layer serves all.

  Raises:
    ValueError: if there are several layers, but not `L`.
  """
  _check_architecture(architecture)
  num_layers = _check_stack(blocks)
  layers = architecture.layers
  if len(layers) == 1:
    return blocks._replace(constants=None)
  if len(layers) != num_layers:
    raise ValueError(
      f'architecture has {len(layers)} layers and blocks have {num_layers}; '
      'expected as many, or one for all.'
    )
  rows = [_constants(layer, layers, blocks.query.weight) for layer in layers]
  return blocks._replace(
    constants=jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
  )


def scan_blocks(
  architecture: Architecture,
  blocks: Block,
  step: Callable[..., Any],
  carry: Any,
  *rows: Any,
  reverse: bool = False,
) -> tuple[Any, Any]:
  """Scans over a stack of blocks: one compiled block, whatever they have.

  Args:
    step: `(carry, block, *row) -> (carry, result)`.
    carry: what the first step takes.
    *rows: arrays with a leading axis `L`, or trees of them.
    reverse: whether the last block comes first.

  Returns:
    The last carry, and the results with a leading axis `L`.
  """

  def body(carry, inputs):
    block, *row = inputs
    return step(carry, block, *row)

  inputs = (with_constants(architecture, blocks), *rows)
  return jax.lax.scan(body, carry, inputs, reverse=reverse)


def constants_of(architecture: Architecture, block: Block) -> Constants:
  """Returns the numbers of a block: its own, or those of the only layer."""
  several = len(architecture.layers) > 1
  if block.constants is not None:
    if several:
      return block.constants
    raise ValueError(
      'block has the constants of another architecture, and architecture has '
      'one layer; expected block.constants = None. Take block._replace('
      'constants=None), or the architecture that they were made for.'
    )
  if several:
    raise ValueError(
      f'architecture has {len(architecture.layers)} layers, and block is one '
      'of them without its constants. Take it from '
      'transformer.with_constants(architecture, blocks).'
    )
  layer = architecture.layers[0]
  return _constants(layer, architecture.layers, block.query.weight)


def _constants(layer: Layer, layers: Sequence[Layer], weight: Any) -> Constants:
  """The numbers of a layer; unrotated layers of a rotated stack turn by 0."""
  dtype = np.float64 if weight.dtype == jnp.float64 else np.float32
  width = weight.shape[-1]
  rotations = [x.rotation for x in layers if x.rotation is not None]
  windows = [x.window for x in layers if x.window is not None]
  largest = np.iinfo(np.int32).max
  window = np.int32(min(layer.window or largest, largest)) if windows else None
  if not rotations:
    return Constants(window=window)
  num_pairs = len(rotations[0].frequencies)
  for found in (len(rotation.frequencies) for rotation in rotations):
    if found != num_pairs or not 0 < 2 * found <= width:
      raise ValueError(
        f'a rotation has {found} frequencies for heads of width {width}; '
        'expected the same number in all layers, at most one for each pair of '
        'coordinates.'
      )
  rotation = layer.rotation or Rotary(frequencies=(0.0,) * num_pairs)
  scale = dtype(rotation.scale)
  if all(x.beyond is None for x in rotations):
    return Constants(np.array(rotation.frequencies, dtype), scale, None, window)
  switch, far = rotation.beyond or (largest, rotation)
  pair = np.array([rotation.frequencies, far.frequencies], dtype)
  return Constants(pair, scale, np.int32(min(switch, largest)), window)


# Axes that a linear map reads and writes; a bias has the latter.
_AXES = {
  'query': ('d_model', 'H d_k'),
  'key': ('d_model', 'G d_k'),
  'value': ('d_model', 'G d_k'),
  'output': ('H d_k', 'd_model'),
  'gate': ('d_model', 'd_ff'),
  'up': ('d_model', 'd_ff'),
  'down': ('d_ff', 'd_model'),
  'router': ('d_model', 'E'),
}
# Parameters that a block may lack.
_OPTIONAL = ('gate', 'router')


def check_block(
  architecture: Architecture, block: Block, x: Float[Array, 'N d_model']
) -> None:
  """Checks one block and that it fits the sequence that it reads."""
  _check_architecture(architecture)
  sizes = {'d_model': x.shape[1]}
  for path, array, axes in _arrays(block):
    _validate.check_array(path, array, axes)
    for axis, size in zip(axes.split(), array.shape, strict=True):
      expected = sizes.setdefault(axis, size)
      if size != expected:
        raise ValueError(
          f'{path} has shape {list(array.shape)}; expected {axis} = {expected} '
          f'in [{", ".join(axes.split())}], as in x and the parameters before '
          'it.'
        )
    if array.dtype != x.dtype:
      raise ValueError(
        f'{path} has dtype {array.dtype} and x {x.dtype}; expected one dtype. '
        'Cast the other, for example with jax.tree.map(lambda p: p.astype('
        'x.dtype), block).'
      )
  check_groups('block.query', sizes['H'], 'block.key', sizes['G'])
  _check_experts(architecture, block, sizes)


def _check_experts(
  architecture: Architecture, block: Block, sizes: Mapping[str, int]
) -> None:
  """Checks that experts share the network, and that a token asks some."""
  chosen, num_experts = architecture.experts_per_token, sizes.get('E', 0)
  least = 0 if block.router is None else 1
  if not least <= chosen <= num_experts:
    raise ValueError(
      f'experts_per_token is {chosen} and block.router has {num_experts} '
      'experts; expected at least one and no more than there are, or 0 and no '
      'router.'
    )
  if chosen and sizes['d_ff'] % num_experts:
    raise ValueError(
      f'block.router has {num_experts} experts and d_ff is {sizes["d_ff"]}; '
      'expected a multiple, because the experts stand side by side in it.'
    )


def check_blocks(
  architecture: Architecture, blocks: Block, x: Float[Array, 'N d_model']
) -> None:
  """Checks a stack of blocks and that it fits the sequence that it reads."""
  _check_stack(blocks)
  one = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), blocks
  )
  check_block(architecture, one, x)


def _check_architecture(architecture: Any) -> None:
  _validate.check_type(
    'architecture', architecture, Architecture, 'a transformer.Architecture'
  )


def _check_stack(blocks: Block) -> int:
  """Checks that all parameters have a leading axis `L`, and returns `L`."""
  _validate.check_type('blocks', blocks, Block, 'a stacked transformer.Block')
  first: dict[str, int] = {}
  for path, array, axes in _arrays(blocks):
    if array.ndim != len(axes.split()) + 1 or len(array) == 0:
      expected = ', '.join(('L', *axes.split()))
      raise ValueError(
        f'{path} has shape {list(array.shape)}; expected [{expected}] with at '
        'least one layer. Stack blocks with jax.tree.map(lambda *x: '
        'jnp.stack(x), *blocks).'
      )
    first = first or {path: len(array)}
    _validate.check_same('L', *next(iter(first.items())), path, len(array))
  return len(blocks.query.weight)


def check_groups(name: str, heads: int, key_name: str, groups: int) -> None:
  """Checks that key-value heads serve equal numbers of query heads."""
  if groups == 0 or heads % groups:
    raise ValueError(
      f'{name} has {heads} heads and {key_name} has {groups}; expected a '
      'multiple, so that each key-value head serves as many query heads.'
    )


def _arrays(block: Block) -> Iterator[tuple[str, Any, str]]:
  """Yields path, array and axes of every parameter."""
  for sublayer in ('attention_norms', 'ffn_norms'):
    norms = getattr(block, sublayer)
    _validate.check_type(f'block.{sublayer}', norms, Norms, 'transformer.Norms')
    for place, norm in norms._asdict().items():
      yield from _of_norm(f'block.{sublayer}.{place}', norm, 'd_model')
  for name, (reads, writes) in _AXES.items():
    linear = getattr(block, name)
    if linear is None and name in _OPTIONAL:
      continue
    expected = 'a transformer.Linear'
    _validate.check_type(f'block.{name}', linear, Linear, expected)
    yield f'block.{name}.weight', linear.weight, f'{reads} {writes}'
    if linear.bias is not None:
      each = name == 'down' and block.router is not None
      axes = f'E {writes}' if each else writes
      yield f'block.{name}.bias', linear.bias, axes
  for name, heads in (('query_norm', 'H'), ('key_norm', 'G')):
    norm = getattr(block, name)
    projection = getattr(block, name.removesuffix('_norm')).weight
    together = np.ndim(getattr(norm, 'scale', 0)) == projection.ndim - 1
    axes = f'{heads} d_k' if together else 'd_k'
    yield from _of_norm(f'block.{name}', norm, axes)
  if block.sinks is not None:
    yield 'block.sinks', block.sinks, 'H'


def _of_norm(path: str, norm: Norm | None, axes: str):
  if norm is not None:
    _validate.check_type(path, norm, Norm, 'a transformer.Norm')
    for field, array in norm._asdict().items():
      if array is not None:
        yield f'{path}.{field}', array, axes
