"""Reader of GGUF files, the format of llama.cpp.

A file holds everything: metadata, the tokenizer's vocabulary, and tensors,
mostly quantised. Tensors come out dequantised, under the names and in the
layout of Hugging Face, so that one architecture serves every reader.
"""

import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from iclcl_jax.pretrained._gguf_entries import Entries
from iclcl_jax.pretrained._gguf_layouts import LAYOUTS
from iclcl_jax.pretrained._reading import (
  Checkpoint,
  StoredTensors,
  import_reader,
)


class GGUFFile(NamedTuple):
  """An open GGUF file."""

  path: pathlib.Path
  metadata: Mapping[str, Any]
  tensors: Sequence[Any]  # Of the package `gguf`: views of the file itself.


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
  """Reads a model from a GGUF file.

  Quantised tensors are dequantised to float32, each when it is taken from the
  mapping. Where converters change a tensor (the order of the rows of queries
  and keys, one added to Gemma's scales), the change is undone. Without
  `output.weight` in the file the embeddings are tied.

  Raises `ValueError` if the file is missing, truncated, of another byte order
  or one part of a split one, lacks metadata, or holds what is not understood
  and may change the arithmetic; or if `gguf` is not installed.

  References:
    Su et al., arXiv:2104.09864, eq. 34 (rotation of neighbouring pairs).
  """
  return checkpoint_of(open_gguf(path))


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
  """Opens a GGUF file and reads its metadata, but no tensor yet.

  Takes what :func:`read_gguf` takes, and raises `ValueError` as it does.
  """
  path = pathlib.Path(path)
  reader_type = _reader_type(import_reader('gguf'))
  try:
    with np.errstate(all='raise'):  # Of offsets that overflow.
      reader = reader_type(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  except OSError as error:  # A directory, too.
    raise ValueError(
      f'path is {str(path)!r}: {error.strerror}; expected a GGUF file. Check '
      'the spelling and the permissions; a Hugging Face directory is for '
      'pretrained.load.'
    ) from error
  except Exception as error:  # Whatever the package makes of the bytes.
    raise ValueError(
      f'{path} is no GGUF file, or a truncated or corrupt one '
      f'({type(error).__name__}: {error}). Its size is {path.stat().st_size} '
      'bytes; compare it with the source (a pointer of Git LFS is not the file '
      'itself), and copy or install the file again. A model in the layout of '
      'Hugging Face is loaded by its directory.'
    ) from error
  if reader.byte_order == 'S':
    raise ValueError(
      f'{path} is in the byte order of other machines; expected that of this '
      'one. Convert it with gguf-convert-endian.'
    )
  places = sorted((t.data_offset, t.n_bytes, t.name) for t in reader.tensors)
  for (start, size, name), (end, _, other) in itertools.pairwise(places):
    if start + size > end:
      raise ValueError(
        f'{path} is corrupt: its tensors {name!r} and {other!r} overlap. Copy '
        'the file again.'
      )
  return GGUFFile(path, metadata, reader.tensors)


def _reader_type(gguf: Any) -> type:
  class Reader(gguf.GGUFReader):
    def _get(self, offset, dtype, count=1, override_order=None):
      self.data = np.asarray(self.data)  # Of a memmap, views are slow to make.
      found = super()._get(offset, dtype, count, override_order)
      if len(found) != count:
        raise ValueError(f'no {count} numbers at byte {offset}')
      return found

  return Reader


def checkpoint_of(file: GGUFFile) -> Checkpoint:
  """Describes an open GGUF file as a checkpoint of Hugging Face.

  The `file`, of :func:`open_gguf`, stays open as long as the tensors live.
  Raises `ValueError` as :func:`read_gguf` does.
  """
  count = file.metadata.get('split.count', 1)
  if count not in (0, 1):
    raise ValueError(
      f"{file.path}: the metadata 'split.count' is {count!r}, so this is one "
      'of several parts of a split model; expected a whole one. Merge them '
      'first: llama-gguf-split --merge FIRST_PART WHOLE.'
    )
  architecture = str(file.metadata.get('general.architecture'))
  kind = file.metadata.get('general.type', 'model')
  if architecture not in LAYOUTS or kind != 'model':
    raise ValueError(
      f'{file.path} holds a {kind} of architecture {architecture!r}; expected '
      f'a model, one of {", ".join(LAYOUTS)}. Read other models from a '
      'Hugging Face directory with pretrained.load.'
    )
  layout = LAYOUTS[architecture]
  tensors = {tensor.name: tensor for tensor in file.tensors}
  shapes = {
    name: layout.shape(name, tuple(int(n) for n in tensor.shape[::-1]))
    for name, tensor in tensors.items()
  }
  parts_of: dict[str, list[str]] = {}
  for theirs in sorted(tensors):
    ours = layout.name_of(theirs)
    if ours is not None:
      parts_of.setdefault(ours, []).append(theirs)
    elif not theirs.startswith(('rope_factors_', 'rope_freqs.')):  # Settings.
      raise ValueError(
        f'{file.path} has a tensor {theirs!r}; expected only those of a plain '
        'model of its architecture: no adapters, no other experts. Choose a '
        'model without them.'
      )

  def stored(name: str) -> np.ndarray:
    return _dequantised(file.path, tensors[name])

  entries = Entries(file.path, architecture, file.metadata, shapes, stored)
  config = layout.settings(entries)
  entries.check_understood(config)

  def spec(parts: list[str]) -> jax.ShapeDtypeStruct:
    shape = shapes[parts[0]]
    last = (size * len(parts) for size in shape[-1:])  # They are interleaved.
    return jax.ShapeDtypeStruct((*shape[:-1], *last), np.float32)

  def read(name: str) -> np.ndarray:
    parts = [layout.undone(n, stored(n), config) for n in parts_of[name]]
    if len(parts) == 1:
      return parts[0]
    return np.stack(parts, axis=-1).reshape(specs[name].shape)

  specs = {name: spec(parts) for name, parts in parts_of.items()}
  return Checkpoint(config, StoredTensors(specs, read))


def _dequantised(path: pathlib.Path, tensor: Any) -> np.ndarray:
  if np.issubdtype(tensor.data.dtype, np.floating):
    return np.array(tensor.data, np.float32)
  try:
    return import_reader('gguf').dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise ValueError(
      f'{path}: the tensor {tensor.name!r} is stored as '
      f'{tensor.tensor_type.name}, which the package gguf does not read. '
      'Choose another quantisation, such as Q8_0, or upgrade gguf.'
    ) from error
