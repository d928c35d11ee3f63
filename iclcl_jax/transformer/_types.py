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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

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


# Axes that a linear map reads and writes; a bias has the latter.
_AXES = {
  'query': ('d_model', 'H d_k'),
  'key': ('d_model', 'G d_k'),
  'value': ('d_model', 'G d_k'),
  'output': ('H d_k', 'd_model'),
  'gate': ('d_model', 'd_ff'),
  'up': ('d_model', 'd_ff'),
  'down': ('d_ff', 'd_model'),
}


def check_block(
  architecture: Architecture, block: Block, x: Float[Array, 'N d_model']
) -> None:
  """Checks one block and that it fits the sequence that it reads."""
  _validate.check_type(
    'architecture', architecture, Architecture, 'a transformer.Architecture'
  )
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


def check_blocks(
  architecture: Architecture, blocks: Block, x: Float[Array, 'N d_model']
) -> None:
  """Checks a stack of blocks and that it fits the sequence that it reads.

  Raises:
    ValueError: if shapes or dtypes disagree, or there is no layer.
  """
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
  one = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), blocks
  )
  check_block(architecture, one, x)


def check_groups(name: str, heads: int, key_name: str, groups: int) -> None:
  """Checks that key-value heads serve equal numbers of query heads."""
  if groups == 0 or heads % groups:
    raise ValueError(
      f'{name} has {heads} heads and {key_name} has {groups}; expected a '
      'multiple, so that each key-value head serves as many query heads.'
    )


def _arrays(block: Block) -> Iterator[tuple[str, Any, str]]:
  """Yields path, array and axes of every parameter."""
  for name in ('attention_norm', 'ffn_norm'):
    for field, array in getattr(block, name)._asdict().items():
      if array is not None:
        yield f'block.{name}.{field}', array, 'd_model'
  for name, (reads, writes) in _AXES.items():
    linear = getattr(block, name)
    if linear is None and name == 'gate':
      continue
    expected = 'a transformer.Linear'
    _validate.check_type(f'block.{name}', linear, Linear, expected)
    yield f'block.{name}.weight', linear.weight, f'{reads} {writes}'
    if linear.bias is not None:
      yield f'block.{name}.bias', linear.bias, writes
