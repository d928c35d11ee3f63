"""Checks of blocks, whose shapes depend on the part that an array plays."""

from collections.abc import Iterator
from typing import Any

import jax

from iclcl_jax import _validate
from iclcl_jax.transformer._types import Architecture, Block, Linear
from iclcl_jax.types import Array, Float

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

  Args:
    architecture: what the shapes of the parameters do not say.
    blocks: the parameters, each with a leading axis `L`.
    x: the residual stream. Shape `[N, d_model]`.

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
