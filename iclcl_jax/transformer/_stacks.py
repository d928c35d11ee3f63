"""Stacks of blocks: their numbers by layer, their scan, and their checks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
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
from iclcl_jax.types import Array, Float


def with_constants(architecture: Architecture, blocks: Block) -> Block:
  """Adds to a stack of blocks the numbers in which its layers differ.

  As `constants`; there are none if the architecture has one layer for all. It
  is a `ValueError` if it has several, but not `L`.
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

  By `step(carry, block, *row) -> (carry, result)`, the last block first if
  `reverse`, with rows of arrays that have a leading axis `L`, or of trees of
  them. Returns the last carry, and the results with a leading axis `L`.
  """
  inputs = (with_constants(architecture, blocks), *rows)
  return jax.lax.scan(
    lambda carry, row: step(carry, *row), carry, inputs, reverse=reverse
  )


def chain(
  apply: Callable[..., Array],
  architecture: Architecture,
  blocks: Block,
  x: Float[Array, 'N d_model'],
  **options: Any,
) -> Float[Array, 'N d_model']:
  check_blocks(architecture, blocks, x)

  def step(stream, block):
    return apply(architecture, block, stream, **options), None

  return scan_blocks(architecture, blocks, step, x)[0]


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
  # Experts share the network, and a token asks some.
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
  spec = jax.ShapeDtypeStruct
  one = jax.tree.map(lambda p: spec(p.shape[1:], p.dtype), blocks)
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
  if groups == 0 or heads % groups:
    raise ValueError(
      f'{name} has {heads} heads and {key_name} has {groups}; expected a '
      'multiple, so that each key-value head serves as many query heads.'
    )


def _arrays(block: Block) -> Iterator[tuple[str, Any, str]]:
  for sublayer in ('attention_norms', 'ffn_norms'):
    norms = getattr(block, sublayer)
    _validate.check_type(f'block.{sublayer}', norms, Norms, 'transformer.Norms')
    for place, norm in norms._asdict().items():
      yield from _of(f'block.{sublayer}.{place}', norm, Norm, 'd_model')
  for name, (reads, writes) in _AXES.items():
    linear = getattr(block, name)
    if linear is not None or name not in _OPTIONAL:
      each = 'E ' if name == 'down' and block.router is not None else ''
      yield from _of(
        f'block.{name}', linear, Linear, f'{reads} {writes}', each + writes
      )
  for name, heads in (('query_norm', 'H'), ('key_norm', 'G')):
    norm = getattr(block, name)
    projection = getattr(block, name.removesuffix('_norm')).weight
    together = np.ndim(getattr(norm, 'scale', 0)) == projection.ndim - 1
    axes = f'{heads} d_k' if together else 'd_k'
    yield from _of(f'block.{name}', norm, Norm, axes)
  if block.sinks is not None:
    yield 'block.sinks', block.sinks, 'H'


def _of(path: str, part: Any, kind: Any, axes: str, bias_axes: str = ''):
  if part is not None or kind is Linear:
    _validate.check_type(path, part, kind, f'a transformer.{kind.__name__}')
    yield f'{path}.{kind._fields[0]}', part[0], axes
    if part.bias is not None:
      yield f'{path}.bias', part.bias, bias_axes or axes
