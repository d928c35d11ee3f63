"""Reader of GGUF files, the format of llama.cpp.

A file holds everything: metadata, the tokenizer's vocabulary, and tensors,
mostly quantised. Tensors come out dequantised, under the names and in the
layout of Hugging Face, so that one architecture serves every reader.
"""

import os
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax.pretrained._reading import Checkpoint, import_reader

_MAGIC = b'GGUF'
# Names of the llama family; `N` stands for the number of a block.
_LLAMA_NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'blk.N.attn_norm': 'model.layers.N.input_layernorm',
  'blk.N.attn_q': 'model.layers.N.self_attn.q_proj',
  'blk.N.attn_k': 'model.layers.N.self_attn.k_proj',
  'blk.N.attn_v': 'model.layers.N.self_attn.v_proj',
  'blk.N.attn_output': 'model.layers.N.self_attn.o_proj',
  'blk.N.ffn_norm': 'model.layers.N.post_attention_layernorm',
  'blk.N.ffn_gate': 'model.layers.N.mlp.gate_proj',
  'blk.N.ffn_up': 'model.layers.N.mlp.up_proj',
  'blk.N.ffn_down': 'model.layers.N.mlp.down_proj',
}


class GGUFFile(NamedTuple):
  """An open GGUF file; the tensors are views of the file itself.

  Attributes:
    path: where it lies, for messages.
    metadata: what it says about the model, by key.
    tensors: of the package `gguf`: name, data and quantisation of each.
  """

  path: pathlib.Path
  metadata: Mapping[str, Any]
  tensors: Sequence[Any]


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
  """Reads a model of the llama family from a GGUF file.

  Quantised tensors are dequantised to float32. Such a file stores the rows of
  the query and key projections for rotations of neighbouring pairs; they come
  out in the order of Hugging Face, which rotates halves.

  Args:
    path: the file.

  Returns:
    Config and float32 tensors, as of a Hugging Face checkpoint. Without
    `output.weight` in the file the embeddings are tied.

  Raises:
    ValueError: if there is no such file, it is no GGUF file, is truncated or
      one part of a split one, holds another architecture, lacks metadata, has
      a tensor of unknown name or quantisation, or `gguf` is not installed.

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
    reader = reader_type(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  except (
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
  ) as error:
    raise ValueError(
      f'{path} is a truncated or corrupt GGUF file ({type(error).__name__}: '
      f'{error}). Its size is {path.stat().st_size} bytes; compare it with the '
      'source, and copy or install the file again.'
    ) from error
  return GGUFFile(path, metadata, reader.tensors)


def checkpoint_of(file: GGUFFile) -> Checkpoint:
  """Copies an open GGUF file into config and float32 tensors of Hugging Face.

  Args:
    file: of :func:`open_gguf`.

  Raises:
    ValueError: as :func:`read_gguf`.
  """
  parts = _entry(file, 'split.count', int, 1)
  if parts > 1:
    raise ValueError(
      f'{file.path} is one of {parts} parts of a split model; expected a whole '
      'one. Merge them first: llama-gguf-split --merge FIRST_PART WHOLE.'
    )
  architecture = _entry(file, 'general.architecture', str)
  if architecture != 'llama':
    raise ValueError(
      f'{file.path} holds a model of architecture {architecture!r}; expected '
      "'llama'. Read other models from a Hugging Face directory with "
      'pretrained.load.'
    )
  config = _llama_config(file)
  heads = {
    'attn_q': config['num_attention_heads'],
    'attn_k': config['num_key_value_heads'],
  }
  tensors = {}
  for tensor in file.tensors:
    array = _dequantized(file, tensor)
    name, kind = _llama_name(file, tensor.name), tensor.name.split('.')[-2]
    if kind in heads:
      array = _rows_for_halves(file, tensor.name, array, heads[kind])
    tensors[name] = array
  embedding = tensors.get('model.embed_tokens.weight')
  if embedding is None:
    raise ValueError(
      f"{file.path} lacks the tensor 'token_embd.weight', the embeddings of "
      'its tokens; expected a whole language model. Convert it again.'
    )
  config['vocab_size'] = embedding.shape[0]
  config['tie_word_embeddings'] = 'lm_head.weight' not in tensors
  return Checkpoint(config, tensors)


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
  """

  class PlainReader(gguf.GGUFReader):
    @property
    def data(self) -> np.ndarray:
      return self._plain

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
      self._plain = np.asarray(mapped)

  return PlainReader


def _entry(
  file: GGUFFile, name: str, kind: type[Any], default: Any = None
) -> Any:
  """Reads one entry of the metadata; `default` if it may be absent."""
  value = file.metadata.get(name, default)
  if value is None:
    raise ValueError(
      f'{file.path} lacks the metadata {name!r}; expected it in every file of '
      'its architecture. Convert the model again with a current converter.'
    )
  if not isinstance(value, kind) or (kind is not str and not value > 0):
    raise ValueError(
      f'{file.path}: the metadata {name!r} is {value!r}; expected a positive '
      f'{kind.__name__}, the same for all blocks. Convert the model again, or '
      'choose one whose blocks are alike.'
    )
  return value


def _llama_config(file: GGUFFile) -> dict[str, Any]:
  """Reads the config of a Hugging Face llama, without what the tensors say."""
  num_heads = _entry(file, 'llama.attention.head_count', int)
  width = _entry(file, 'llama.embedding_length', int)
  head_dim = _entry(
    file, 'llama.attention.key_length', int, max(width // num_heads, 1)
  )
  rotated = _entry(file, 'llama.rope.dimension_count', int, head_dim)
  if rotated != head_dim:
    raise ValueError(
      f'{file.path} rotates {rotated} of the {head_dim} coordinates of a head; '
      'expected all of them. Choose a model with full rotary embeddings.'
    )
  theta = _entry(file, 'llama.rope.freq_base', float, 10000.0)
  epsilon = _entry(file, 'llama.attention.layer_norm_rms_epsilon', float)
  scaling = file.metadata.get('llama.rope.scaling.type', 'none')
  if scaling != 'none':
    raise ValueError(
      f"{file.path}: the metadata 'llama.rope.scaling.type' is {scaling!r}; "
      "expected 'none'. Choose a model without rescaled rotary frequencies."
    )
  return {
    'model_type': 'llama',
    'hidden_size': width,
    'intermediate_size': _entry(file, 'llama.feed_forward_length', int),
    'num_hidden_layers': _entry(file, 'llama.block_count', int),
    'num_attention_heads': num_heads,
    'num_key_value_heads': _entry(
      file, 'llama.attention.head_count_kv', int, num_heads
    ),
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': _entry(file, 'llama.context_length', int),
    'rms_norm_eps': _shortest(epsilon),
    'rope_theta': _shortest(theta),
    'rope_parameters': {'rope_type': 'default', 'rope_theta': _shortest(theta)},
    'attention_bias': any(t.name.endswith('attn_q.bias') for t in file.tensors),
    'mlp_bias': any(t.name.endswith('ffn_up.bias') for t in file.tensors),
  }


def _shortest(value: float) -> float:
  """Returns the shortest decimal of a float32, such as `1e-05`."""
  return float(str(np.float32(value)))


def _llama_name(file: GGUFFile, name: str) -> str:
  """Returns the Hugging Face name of a tensor of a llama."""
  stem, _, kind = name.rpartition('.')
  number = re.match(r'blk\.(\d+)\.', stem)
  pattern = re.sub(r'^blk\.\d+\.', 'blk.N.', stem)
  if pattern not in _LLAMA_NAMES or kind not in ('weight', 'bias'):
    raise ValueError(
      f'{file.path} has a tensor {name!r}; expected only those of a plain '
      'llama: no experts, no adapters, no rescaled rotary frequencies. Choose '
      'a model without them.'
    )
  block = number.group(1) if number else ''
  return f'{_LLAMA_NAMES[pattern].replace(".N.", f".{block}.")}.{kind}'


def _dequantized(file: GGUFFile, tensor: Any) -> np.ndarray:
  """Copies a tensor as float32, in NumPy's order of axes."""
  gguf = import_reader('gguf')
  try:
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise ValueError(
      f'{file.path}: the tensor {tensor.name!r} is stored as '
      f'{tensor.tensor_type.name}, which the package gguf does not read. '
      'Choose another quantisation, such as Q8_0, or upgrade gguf.'
    ) from error
  shared = np.may_share_memory(array, tensor.data)
  return np.array(array, np.float32, copy=True if shared else None)


def _rows_for_halves(
  file: GGUFFile, name: str, array: np.ndarray, num_heads: int
) -> np.ndarray:
  """Orders rows for rotations of halves `(j, j + d_k / 2)`.

  The file has them for rotations of neighbouring pairs `(2j, 2j + 1)`.
  """
  rows = array.shape[0]
  if rows % (2 * num_heads):
    raise ValueError(
      f'{file.path}: the tensor {name!r} has {rows} rows; expected a multiple '
      f'of {2 * num_heads}, pairs of rows for {num_heads} heads. Convert the '
      'model again.'
    )
  half = rows // num_heads // 2
  pairs = array.reshape(num_heads, half, 2, *array.shape[1:])
  return pairs.swapaxes(1, 2).reshape(array.shape)
