"""Reader of directories in the layout of Hugging Face.

`config.json` and either `model.safetensors`, or several such files under
`model.safetensors.index.json`, which says what lies where.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax.pretrained._reading import (
  Checkpoint,
  StoredTensors,
  import_reader,
)

_ADAPTER, _CONFIG = 'adapter_config.json', 'config.json'
_WHOLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
# What the format calls the dtypes that NumPy and ml_dtypes have.
_DTYPES = {
  'BOOL': np.bool_,
  **{f'I{bits}': f'int{bits}' for bits in (8, 16, 32, 64)},
  **{f'U{bits}': f'uint{bits}' for bits in (8, 16, 32, 64)},
  **{f'F{bits}': f'float{bits}' for bits in (16, 32, 64)},
  'BF16': jnp.bfloat16,
}
_T = TypeVar('_T')


def read_safetensors(directory: str | os.PathLike[str]) -> Checkpoint:
  """Reads a model from a directory in the layout of Hugging Face.

  Args:
    directory: what `save_pretrained` writes: `config.json`, and
      `model.safetensors` or its shards with their index. Tensors come as they
      are stored, each read when it is taken from the mapping, and not kept.

  Raises `ValueError` if a file or a shard is missing, truncated or corrupt,
  index and shards disagree, the model is quantised, or `safetensors` is not
  installed.
  """
  directory = pathlib.Path(directory)
  if (directory / _ADAPTER).is_file():
    raise ValueError(
      f'{directory / _ADAPTER} describes an adapter; expected a whole model. '
      'Write one with peft: model.merge_and_unload().save_pretrained(...).'
    )
  config = read_json(directory / _CONFIG)
  if config.get('quantization_config') is not None:
    raise ValueError(
      f'{directory / _CONFIG} describes quantised weights '
      '(quantization_config); expected float32, float16 or bfloat16. Use the '
      'original model, or a GGUF file of it.'
    )
  path = directory / _WHOLE
  if path.is_file():
    tensors = StoredTensors(_specs(path), lambda name: _read(path, name))
    return Checkpoint(config, tensors)
  if (directory / _INDEX).is_file():
    return Checkpoint(config, _sharded(directory))
  found = sorted(path.name for path in directory.iterdir())
  raise ValueError(
    f'{directory} has neither {_WHOLE} nor {_INDEX} (it has '
    f'{", ".join(found)}); expected one of them. Write the model with '
    'save_pretrained(..., safe_serialization=True).'
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file that holds one object."""
  try:
    content = json.loads(path.read_bytes())
  except (OSError, RecursionError, ValueError) as error:
    raise ValueError(
      f'{path} is missing, or truncated or corrupt JSON '
      f'({type(error).__name__}: {error}). Copy it again.'
    ) from error
  if not isinstance(content, dict):
    raise ValueError(
      f'{path} holds a {type(content).__name__}; expected a JSON object. Copy '
      'it again.'
    )
  return content


def _sharded(directory: pathlib.Path) -> StoredTensors:
  index = directory / _INDEX
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not all(
    isinstance(name, str) and pathlib.PurePath(name).name == name
    for name in weight_map.values()
  ):
    raise ValueError(
      f"{index} has no 'weight_map' from tensors to names of files in its "
      'directory; expected what save_pretrained writes. Copy it again.'
    )
  shards = sorted(set(weight_map.values()))
  missing = [name for name in shards if not (directory / name).is_file()]
  if missing:
    raise ValueError(
      f'{directory} lacks {len(missing)} of {len(shards)} shards: '
      f'{", ".join(missing)}; {index.name} lists them. Copy them beside it.'
    )
  specs = {shard: _specs(directory / shard) for shard in shards}
  held = {(name, shard) for shard in shards for name in specs[shard]}
  for name, shard in sorted(held ^ set(weight_map.items())):
    raise ValueError(
      f'{index.name} and {directory / shard} disagree: one of them alone says '
      f'that the tensor {name!r} is there. Copy all shards and the index again.'
    )
  return StoredTensors(
    {name: specs[shard][name] for name, shard in weight_map.items()},
    lambda name: _read(directory / weight_map[name], name),
  )


def _specs(path: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
  def spec(part: Any) -> jax.ShapeDtypeStruct:
    dtype = _DTYPES[part.get_dtype()]
    return jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)

  return _within(
    path, lambda file: {n: spec(file.get_slice(n)) for n in sorted(file.keys())}
  )


def _read(path: pathlib.Path, name: str) -> np.ndarray:
  return _within(path, lambda file: file.get_tensor(name))


def _within(path: pathlib.Path, use: Callable[[Any], _T]) -> _T:
  safetensors = import_reader('safetensors')
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return use(file)
  except Exception as error:  # Whatever the package makes of the bytes.
    raise ValueError(
      f'{path} is truncated, corrupt, or of an unknown dtype '
      f'({type(error).__name__}: {error}). Its size is '
      f'{path.stat().st_size} bytes; compare it with the source, and copy it '
      'again.'
    ) from error
