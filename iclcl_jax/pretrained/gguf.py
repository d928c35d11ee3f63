"""Reader of GGUF files, the format of llama.cpp.

A file holds everything: metadata, the tokenizer's vocabulary, and tensors,
mostly quantised. Tensors come out dequantised, under the names and in the
layout of Hugging Face, so that one architecture serves every reader.
"""

import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from iclcl_jax.pretrained._gguf_entries import Config, Entries
from iclcl_jax.pretrained._gguf_layouts import LAYOUTS
from iclcl_jax.pretrained._reading import (
  Checkpoint,
  StoredTensors,
  import_reader,
)

_MAGIC = b'GGUF'


class GGUFFile(NamedTuple):
  """An open GGUF file; the tensors are views of the file itself.

  Attributes:
    path: where it lies, for messages.
    metadata: what it says about the model, by key.
    tensors: of the package `gguf`: name, data and quantisation of each.
    swapped: whether its bytes are in the other order than this machine's.
  """

  path: pathlib.Path
  metadata: Mapping[str, Any]
  tensors: Sequence[Any]
  swapped: bool = False


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
  """Reads a model from a GGUF file.

  Quantised tensors are dequantised to float32, each when it is taken from the
  mapping. Where converters change a tensor (the order of the rows of queries
  and keys, one added to Gemma's scales), the change is undone.

  Args:
    path: the file.

  Returns:
    Config and float32 tensors, as of a Hugging Face checkpoint. Without
    `output.weight` in the file the embeddings are tied.

  Raises:
    ValueError: if there is no such file, it is no GGUF file, is truncated or
      one part of a split one, holds another architecture, lacks metadata, has
      an entry that is not understood and may change the arithmetic, a tensor
      of unknown name or quantisation, or `gguf` is not installed.

  References:
    Su et al., arXiv:2104.09864, eq. 34 (rotation of neighbouring pairs).
  """
  return checkpoint_of(open_gguf(path))


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
  """Opens a GGUF file and reads its metadata, but no tensor yet.

  Takes what :func:`read_gguf` takes, and raises `ValueError` as it does.
  """
  path = pathlib.Path(path)
  _check_magic(path)
  reader_type = _reader_type(import_reader('gguf'))
  try:
    with np.errstate(all='raise'):  # Of offsets that overflow.
      reader = reader_type(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  except (
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
  ) as error:
    raise ValueError(
      f'{path} is a truncated or corrupt GGUF file ({type(error).__name__}: '
      f'{error}). Its size is {path.stat().st_size} bytes; compare it with the '
      'source, and copy or install the file again.'
    ) from error
  _check_apart(path, reader.tensors)
  return GGUFFile(path, metadata, reader.tensors, reader.byte_order == 'S')


def _check_apart(path: pathlib.Path, tensors: Iterable[Any]) -> None:
  """Checks that no byte belongs to two tensors."""
  end, before = 0, ''
  for tensor in sorted(tensors, key=lambda t: (t.data_offset, t.n_bytes)):
    if tensor.data_offset < end:
      raise ValueError(
        f'{path} is corrupt: its tensors {before!r} and {tensor.name!r} '
        'overlap. Copy the file again.'
      )
    end, before = tensor.data_offset + tensor.n_bytes, tensor.name


def checkpoint_of(file: GGUFFile) -> Checkpoint:
  """Describes an open GGUF file as a checkpoint of Hugging Face.

  Args:
    file: of :func:`open_gguf`. It stays open as long as the tensors live.

  Raises:
    ValueError: as :func:`read_gguf`.
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
    return _dequantised(file, tensors[name])

  entries = Entries(file.path, architecture, file.metadata, shapes, stored)
  base = _base(file, entries)
  config = layout.settings(entries, base)
  entries.check_all_taken(config, base)

  def read(name: str) -> np.ndarray:
    arrays = [layout.undone(n, stored(n), config) for n in parts_of[name]]
    if len(arrays) == 1:
      return arrays[0]
    return np.stack(arrays, axis=-1).reshape(specs[name].shape)

  specs = {}
  for name, parts in parts_of.items():
    shape = shapes[parts[0]]
    if len(parts) > 1:  # They are interleaved.
      shape = (*shape[:-1], math.prod(shape[-1:]) * len(parts))
    specs[name] = jax.ShapeDtypeStruct(shape, np.float32)
  return Checkpoint(config, StoredTensors(specs, read))


def _check_magic(path: pathlib.Path) -> None:
  """Checks that `path` is a file that begins like a GGUF file."""
  try:
    with open(path, 'rb') as file:
      start = file.read(len(_MAGIC))
  except OSError as error:  # A directory, too.
    raise ValueError(
      f'path is {str(path)!r}: {error.strerror}; expected a GGUF file. Check '
      'the spelling and the permissions; a Hugging Face directory is for '
      'pretrained.load.'
    ) from error
  if start != _MAGIC:
    raise ValueError(
      f'{path} is no GGUF file: it begins with {start!r}, expected {_MAGIC!r}. '
      'Name a .gguf file that was downloaded whole (a pointer of Git LFS is '
      'not), or a Hugging Face directory with pretrained.load.'
    )


def _reader_type(gguf: Any) -> type:
  """Makes the reader of the package read from a plain array.

  It makes a view of its bytes for every token and merge of the tokenizer;
  views of a plain array take a third of the time of views of a `np.memmap`.
  What would lie behind the end of the file is an error, not an empty array.
  """

  class PlainReader(gguf.GGUFReader):
    @property
    def data(self) -> np.ndarray:
      return self._plain

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
      self._plain = np.asarray(mapped)

    def _get(self, offset, dtype, count=1, override_order=None):
      dtype, count = np.dtype(dtype), int(count)
      part = self._plain[offset : offset + dtype.itemsize * count]
      if len(part) != dtype.itemsize * count:
        raise ValueError(f'no {count} numbers at byte {offset}')
      order = override_order or self.byte_order
      return part.view(dtype if order == 'I' else dtype.newbyteorder(order))

    def _get_field_parts(self, orig_offs, raw_type):
      if raw_type == gguf.GGUFValueType.ARRAY:
        kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        dtype = self.gguf_scalar_to_np.get(kind)
        if dtype is not None:  # All numbers at once.
          size = self._get(orig_offs + 4, np.uint64)[0]
          numbers = self._get(orig_offs + 12, dtype, size)
          kinds = [gguf.GGUFValueType.ARRAY, kind]
          return 12 + int(numbers.nbytes), [numbers], [0], kinds
      return super()._get_field_parts(orig_offs, raw_type)

  return PlainReader


def _base(file: GGUFFile, entries: Entries) -> Config:
  """Reads what every architecture has, under the names of a llama."""
  if len(entries.shapes.get('token_embd.weight', ())) != 2:
    raise ValueError(
      f"{file.path} lacks the tensor 'token_embd.weight', the embeddings of "
      'its tokens; expected a whole language model. Convert it again.'
    )
  layers = entries.count('block_count')
  if layers > len(entries.shapes):
    raise ValueError(
      f'{file.path} is of {layers} blocks, but has {len(entries.shapes)} '
      'tensors; expected several for each. Convert the model again.'
    )
  return {
    'vocab_size': entries.shapes['token_embd.weight'][0],
    'hidden_size': entries.count('embedding_length'),
    'intermediate_size': entries.count('feed_forward_length'),
    'num_hidden_layers': layers,
    'num_attention_heads': entries.count('attention.head_count'),
    'max_position_embeddings': entries.count('context_length'),
    'tie_word_embeddings': 'output.weight' not in entries.shapes,
  }


def _dequantised(file: GGUFFile, tensor: Any) -> np.ndarray:
  """Copies a tensor as float32, in NumPy's order of axes."""
  gguf = import_reader('gguf')
  if np.issubdtype(tensor.data.dtype, np.floating):
    return np.array(tensor.data, np.float32)
  try:
    if file.swapped:
      raise NotImplementedError
    return gguf.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    order = ' in the byte order of other machines' if file.swapped else ''
    raise ValueError(
      f'{file.path}: the tensor {tensor.name!r} is stored as '
      f'{tensor.tensor_type.name}{order}, which the package gguf does not '
      'read. Choose another quantisation, such as Q8_0, upgrade gguf, or '
      'convert the order with gguf-convert-endian.'
    ) from error
