"""Text to token ids and back, for the models of this package."""

import functools
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from iclcl_jax import _validate
from iclcl_jax.pretrained import gguf as gguf_files
from iclcl_jax.pretrained._reading import import_reader

_FILE = 'tokenizer.json'
# Kinds of tokens in a GGUF file.
_CONTROL, _USER_DEFINED = 3, 4
_USE_DIRECTORY = (
  'Use the Hugging Face directory of the model, with its tokenizer.json.'
)


class Tokenizer:
  """Splits text into the tokens of a model.

  A thin wrapper of a `tokenizers.Tokenizer`, which the attribute `backend`
  holds. Build it with :func:`read_tokenizer` or :func:`tokenizer_of`.

  Attributes:
    backend: the wrapped tokenizer.
    special_tokens: ids of the tokens that stand for no text, by name.
    vocab_size: one more than the largest id.
  """

  def __init__(self, backend: Any):
    """Wraps a `tokenizers.Tokenizer`."""
    self.backend = backend
    self.special_tokens: Mapping[str, int] = {
      token.content: index
      for index, token in backend.get_added_tokens_decoder().items()
      if token.special
    }
    vocabulary = backend.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(vocabulary.values(), default=-1)

  def encode(self, text: str) -> np.ndarray:
    """Returns token ids of `text`, with what the model expects around it.

    Args:
      text: any text. Names of special tokens in it become these tokens.

    Returns:
      The ids, int32. Shape `[N]`; empty for an empty text if the model wants
      no special tokens around it.
    """
    return np.asarray(self._encoding(text).ids, np.int32)

  def spans(self, text: str) -> np.ndarray:
    """Returns which characters of `text` each of its tokens covers.

    Returns:
      Begin and end (exclusive) in characters for the tokens of
      `encode(text)`, int32. Shape `[N, 2]`; tokens that were added around the
      text cover nothing, bytes of one character all cover that character.
    """
    offsets = self._encoding(text).offsets
    return np.asarray(offsets, np.int32).reshape(-1, 2)

  def single_id(self, text: str) -> int:
    """Returns the id of a text that is one token, such as a label.

    Args:
      text: the text; a label within a line usually begins with a space.

    Raises:
      ValueError: if the text is more than one token, or empty.
    """
    encoding = self._encoding(text, add_special_tokens=False)
    if len(encoding.ids) != 1:
      raise ValueError(
        f'{text!r} is {len(encoding.ids)} tokens '
        f'({[self.token(index) for index in encoding.ids]}); expected one. '
        'Choose a word that is one token, often with a space before it, as '
        "' Positive'."
      )
    return int(encoding.ids[0])

  def token(self, index: int) -> str:
    """Returns the text of one token, `�` for a part of a character."""
    return self.decode([index])

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of token ids, special tokens included.

    Raises:
      ValueError: if an id is outside of the vocabulary.
    """
    numbers = [int(index) for index in np.asarray(list(ids), np.int64)]
    outside = [i for i in numbers if not 0 <= i < self.vocab_size]
    if outside:
      raise ValueError(
        f'ids hold {outside[0]}; expected ids from 0 to {self.vocab_size - 1}. '
        'Use the tokenizer that belongs to the model.'
      )
    return self.backend.decode(numbers, skip_special_tokens=False)

  def _encoding(self, text: str, *, add_special_tokens: bool = True) -> Any:
    expected = 'a string. Encode several texts one by one'
    _validate.check_type('text', text, str, expected)
    return self.backend.encode(text, add_special_tokens=add_special_tokens)


def read_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
  """Reads the tokenizer of a directory in the layout of Hugging Face.

  Padding and truncation that the file may ask for are switched off: a token
  must not vanish unseen.

  Args:
    directory: it holds `tokenizer.json`.

  Raises:
    ValueError: if the file is missing or corrupt, or `tokenizers` is not
      installed.
  """
  path = pathlib.Path(directory) / _FILE
  if not path.is_file():
    raise ValueError(
      f'{path} is missing; expected the tokenizer there. Older formats are '
      'converted by transformers: AutoTokenizer.from_pretrained(...)'
      '.save_pretrained(DIRECTORY). A model without tokenizer: '
      'pretrained.from_checkpoint(pretrained.read_safetensors(DIRECTORY)).'
    )
  tokenizers = import_reader('tokenizers')
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The package raises plain exceptions.
    raise ValueError(
      f'{path} is no readable tokenizer: it is truncated, corrupt, or of a '
      f'newer format ({error}). Copy it again, or upgrade tokenizers.'
    ) from error
  backend.no_padding()
  backend.no_truncation()
  return Tokenizer(backend)


def tokenizer_of(file: gguf_files.GGUFFile) -> Tokenizer:
  """Builds the byte-level BPE tokenizer that a GGUF file carries.

  Args:
    file: of `gguf.open_gguf`.

  Raises:
    ValueError: if the file carries another kind of tokenizer or none, or
      `tokenizers` is not installed.

  References:
    Sennrich et al., arXiv:1508.07909 (byte-pair encoding).
  """
  tokenizers = import_reader('tokenizers')
  tokens = _entries(file, 'tokenizer.ggml.tokens')
  merges = [
    tuple(m.split(' ')) for m in _entries(file, 'tokenizer.ggml.merges')
  ]
  vocabulary = {token: index for index, token in enumerate(tokens)}
  splitter = _pre_tokenizer(file, tokenizers)
  try:
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges)
  except Exception as error:  # The package raises plain exceptions.
    raise ValueError(
      f'{file.path}: vocabulary and merges of the tokenizer disagree '
      f'({error}). Convert the model again.'
    ) from error
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = splitter
  backend.decoder = tokenizers.decoders.ByteLevel()
  _add_special(file, backend, tokenizers, tokens)
  _add_ends(file, backend, tokenizers, tokens)
  result = Tokenizer(backend)
  if len(vocabulary) != len(tokens) or result.vocab_size != len(tokens):
    raise ValueError(
      f'{file.path}: the vocabulary lists {len(tokens)} tokens of which '
      f'{len(vocabulary)} differ; expected each once. Convert the model again.'
    )
  return result


def _entries(file: gguf_files.GGUFFile, name: str) -> list[str]:
  """Reads a list of strings of the metadata."""
  entries = file.metadata.get(name)
  if not isinstance(entries, list) or not all(
    isinstance(entry, str) for entry in entries
  ):
    raise ValueError(
      f'{file.path} lacks the metadata {name!r}; expected the vocabulary and '
      f'the merges of a byte-level BPE tokenizer. {_USE_DIRECTORY}'
    )
  return entries


def _pre_tokenizer(file: gguf_files.GGUFFile, tokenizers: Any) -> Any:
  """Returns what cuts the text before byte pairs are merged."""
  kind = file.metadata.get('tokenizer.ggml.model')
  if kind != 'gpt2':
    raise ValueError(
      f"{file.path} has a tokenizer of kind {kind!r}; expected 'gpt2', a "
      f'byte-level BPE. {_USE_DIRECTORY}'
    )
  cut = tokenizers.pre_tokenizers
  # Words with the space before them; digits one by one.
  words = cut.ByteLevel(add_prefix_space=False, use_regex=True)
  digits = cut.Digits(individual_digits=True)
  known = {'gpt-2': words, 'smollm': cut.Sequence([digits, words])}
  name = file.metadata.get('tokenizer.ggml.pre')
  if name not in known:
    raise ValueError(
      f'{file.path} cuts text by the rules {name!r}; known are '
      f'{", ".join(known)}. {_USE_DIRECTORY}'
    )
  return known[name]


def _add_special(
  file: gguf_files.GGUFFile, backend: Any, tokenizers: Any, tokens: list[str]
) -> None:
  """Declares the tokens that byte pairs must not be merged into."""
  kinds = file.metadata.get('tokenizer.ggml.token_type')
  if not isinstance(kinds, list) or len(kinds) != len(tokens):
    found = len(kinds) if isinstance(kinds, list) else 0
    raise ValueError(
      f"{file.path} has 'tokenizer.ggml.token_type', the kinds of {found} of "
      f'{len(tokens)} tokens; expected all. Convert the model again.'
    )
  make = functools.partial(tokenizers.AddedToken, normalized=False)
  pairs = list(zip(tokens, kinds, strict=True))
  backend.add_special_tokens(
    [make(token, special=True) for token, kind in pairs if kind == _CONTROL]
  )
  backend.add_tokens([make(token) for token, k in pairs if k == _USER_DEFINED])


def _add_ends(
  file: gguf_files.GGUFFile, backend: Any, tokenizers: Any, tokens: list[str]
) -> None:
  """Puts the tokens around a text that the model was trained with."""
  template, special = ['$A'], []
  for name, place in (('bos', 0), ('eos', 2)):
    if not file.metadata.get(f'tokenizer.ggml.add_{name}_token', False):
      continue
    index = file.metadata.get(f'tokenizer.ggml.{name}_token_id')
    if not isinstance(index, int) or not 0 <= index < len(tokens):
      raise ValueError(
        f'{file.path} puts a token {name!r} around texts, but its id is '
        f'{index} of {len(tokens)}. Convert the model again.'
      )
    template.insert(place, tokens[index])
    special.append((tokens[index], index))
  if special:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=special
    )
