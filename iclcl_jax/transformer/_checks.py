"""Checks of blocks and of the sequence that they read."""

from typing import Any

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.transformer._types import Architecture, Block, Linear

_WEIGHTS = {
  'query': 'd_model H d_k',
  'key': 'd_model G d_k',
  'value': 'd_model G d_k',
  'output': 'H d_k d_model',
  'gate': 'd_model d_ff',
  'up': 'd_model d_ff',
  'down': 'd_ff d_model',
}
_BIASES = {
  'query': 'H d_k',
  'key': 'G d_k',
  'value': 'G d_k',
  'output': 'd_model',
  'gate': 'd_ff',
  'up': 'd_ff',
  'down': 'd_model',
}


def check_block(
  architecture: Architecture,
  block: Block,
  x: Any,
  positions: Any,
  mask: Any,
) -> None:
  """Checks one block and the sequence `[N, d_model]` that it reads."""
  check_sequence(architecture, x, positions, mask)
  sizes = {'d_model': x.shape[1]}
  for path, array, axes in _arrays(block):
    _check_parameter(path, array, axes, sizes)
  _check_dtypes(x, block)
  heads, groups = sizes['H'], sizes['G']
  if groups == 0 or heads % groups:
    raise ValueError(
      f'block.query has {heads} heads and block.key has {groups}; expected a '
      'multiple, so that each key-value head serves as many query heads.'
    )


def check_blocks(
  architecture: Architecture,
  blocks: Block,
  x: Any,
  positions: Any,
  mask: Any,
) -> None:
  """Checks a stack of blocks, whose arrays have a leading axis `L`."""
  check_sequence(architecture, x, positions, mask)
  counts = {}
  for path, array, axes in _arrays(blocks):
    if array.ndim != len(axes.split()) + 1 or array.shape[0] == 0:
      expected = ', '.join(('L', *axes.split()))
      raise ValueError(
        f'{path} has shape {list(array.shape)}; expected [{expected}] with at '
        'least one layer. Stack blocks with jax.tree.map(lambda *x: '
        'jnp.stack(x), *blocks).'
      )
    counts[path] = array.shape[0]
  if len(set(counts.values())) > 1:
    (path, count), *others = counts.items()
    other = next(item for item in others if item[1] != count)
    _validate.check_same('L', path, count, *other)
  check_block(architecture, shapes_of_one(blocks), x, positions, mask)


def check_sequence(
  architecture: Architecture, x: Any, positions: Any, mask: Any
) -> None:
  """Checks the tokens, their positions and which are valid."""
  if not isinstance(architecture, Architecture):
    raise ValueError(
      f'architecture is a {type(architecture).__name__}; expected a '
      'transformer.Architecture.'
    )
  _validate.check_array('x', x, 'N d_model')
  if x.shape[0] == 0:
    raise ValueError('x is empty (N = 0); expected at least one token.')
  if positions is not None:
    check_positions('positions', positions, x.shape[0])
  if mask is not None:
    _validate.check_mask(mask, x.shape[0])


def check_positions(name: str, positions: Any, size: int) -> None:
  """Checks positions: integers of shape `[N]`."""
  dtype = getattr(positions, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    found = type(positions).__name__ if dtype is None else f'of dtype {dtype}'
    raise ValueError(
      f'{name} is {found}; expected integers, such as jnp.arange(N).'
    )
  if positions.shape != (size,):
    raise ValueError(
      f'{name} has shape {list(positions.shape)}; expected [{size}], one for '
      'each token.'
    )


def shapes_of_one(blocks: Block) -> Any:
  """The shapes of one block of a stack."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks
  )


def _arrays(block: Block):
  """Yields path, array and axes of every parameter."""
  if not isinstance(block, Block):
    raise ValueError(
      f'block is a {type(block).__name__}; expected a transformer.Block.'
    )
  for name in ('attention_norm', 'ffn_norm'):
    norm = getattr(block, name)
    yield f'block.{name}.scale', norm.scale, 'd_model'
    if norm.bias is not None:
      yield f'block.{name}.bias', norm.bias, 'd_model'
  for name, axes in _WEIGHTS.items():
    linear = getattr(block, name)
    if linear is None and name == 'gate':
      continue
    if not isinstance(linear, Linear):
      raise ValueError(
        f'block.{name} is a {type(linear).__name__}; expected a '
        'transformer.Linear.'
      )
    yield f'block.{name}.weight', linear.weight, axes
    if linear.bias is not None:
      yield f'block.{name}.bias', linear.bias, _BIASES[name]


def _check_parameter(path, array, axes, sizes) -> None:
  _validate.check_array(path, array, axes)
  for axis, size in zip(axes.split(), array.shape, strict=True):
    expected = sizes.setdefault(axis, size)
    if size != expected:
      raise ValueError(
        f'{path} has shape {list(array.shape)}; expected {axis} = {expected} '
        f'in [{", ".join(axes.split())}], as in x and the parameters before '
        'it.'
      )


def _check_dtypes(x, block) -> None:
  for path, array, _ in _arrays(block):
    if array.dtype != x.dtype:
      raise ValueError(
        f'{path} has dtype {array.dtype} and x {x.dtype}; expected one dtype. '
        f'Cast the other, for example with jax.tree.map(lambda p: p.astype('
        'x.dtype), block).'
      )
