"""Text to token ids and back, for the models of this package."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from iclcl_jax import _validate
from iclcl_jax.pretrained import _chat
from iclcl_jax.pretrained._reading import import_reader
from iclcl_jax.pretrained.safetensors import read_json

_FILE, _SETTINGS = 'tokenizer.json', 'tokenizer_config.json'
_TEMPLATE = 'chat_template.jinja'


class Tokenizer:
  """Splits text into the tokens of a model.

  A thin wrapper of a `tokenizers.Tokenizer`, which the attribute `backend`
  holds. Build it with :func:`read_tokenizer`, or `load` a model with it.

  Attributes:
    special_tokens: ids of the tokens that stand for no text, by name.
    vocab_size: one more than the largest id.
    chat_template: how the model reads conversations, or None.
  """

  def __init__(
    self, backend: Any, chat_template: _chat.ChatTemplate | None = None
  ):
    self.backend, self.chat_template = backend, chat_template
    self.special_tokens: Mapping[str, int] = {
      token.content: index
      for index, token in backend.get_added_tokens_decoder().items()
      if token.special
    }
    vocabulary = backend.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(vocabulary.values(), default=-1)

  def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
    """Returns int32 ids `[N]` of `text`, with what the model expects around it.

    Names of special tokens in the text become these tokens. Without
    `add_special_tokens` none are put around it, as for what `chat` returns,
    where they stand already.
    """
    encoding = self.encoding(text, add_special_tokens)
    return np.asarray(encoding.ids, np.int32)

  def spans(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
    """Returns which characters of `text` each of its tokens covers.

    Begin and end (exclusive) for the tokens of `encode`, int32, `[N, 2]`;
    tokens that were added around the text cover nothing, bytes of one character
    all cover that character.
    """
    offsets = self.encoding(text, add_special_tokens).offsets
    return np.asarray(offsets, np.int32).reshape(-1, 2)

  def encoding(self, text: str, add_special_tokens: bool = True) -> Any:
    """Returns ids and offsets together, as `tokenizers` has them."""
    expected = 'a string. Encode several texts one by one'
    _validate.check_type('text', text, str, expected)
    return self.backend.encode(text, add_special_tokens=add_special_tokens)

  def single_id(self, text: str) -> int:
    """Returns the id of a text that is one token, such as a label.

    A label within a line usually begins with a space. Raises `ValueError` if
    the text is more than one token, or empty.
    """
    ids = self.encode(text, add_special_tokens=False)
    if len(ids) != 1:
      raise ValueError(
        f'{text!r} is {len(ids)} tokens ({[self.token(i) for i in ids]}); '
        'expected one. Choose a word that is one token, often with a space '
        "before it, as ' Positive'."
      )
    return int(ids[0])

  def token(self, index: int) -> str:
    """Returns the text of one token, `�` for a part of a character."""
    return self.decode([index])

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of token ids, special tokens included.

    Raises `ValueError` if an id is outside of the vocabulary.
    """
    numbers = [int(index) for index in np.asarray(list(ids), np.int64)]
    remedy = 'Use the tokenizer that belongs to the model.'
    _validate.check_ids('ids', numbers, 0, self.vocab_size, remedy)
    return self.backend.decode(numbers, skip_special_tokens=False)

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns a conversation as the prompt that an instruct model expects.

    Messages have a `role`, such as `user`, and a `content`; with
    `add_generation_prompt` the prompt ends where the model answers. Templates
    write the tokens around a text themselves, so encode the prompt with
    `add_special_tokens=False`. It is a `ValueError` if the files of the model
    have no chat template, it doesn't take these messages, or `jinja2` is not
    installed.
    """
    if self.chat_template is None:
      raise ValueError(
        f'the tokenizer has no chat template, neither in {_TEMPLATE} nor in '
        f'{_SETTINGS} nor in the metadata of a GGUF file; expected that of an '
        'instruct model. Encode plain text for a base model.'
      )
    if isinstance(messages, str) or not all(
      isinstance(message, Mapping) and 'role' in message for message in messages
    ):
      raise ValueError(
        f'messages is {messages!r:.200}; expected a list of dicts, each with a '
        "role and a content: [{'role': 'user', 'content': '2+2?'}]."
      )
    return _chat.render(self.chat_template, messages, add_generation_prompt)


def read_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
  """Reads the tokenizer of a directory in the layout of Hugging Face.

  Its `tokenizer.json`: a file that is missing or corrupt is a `ValueError`, as
  is a missing package `tokenizers`. Padding and truncation that the file may
  ask for are switched off: a token must not vanish unseen.
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
  settings, own = path.with_name(_SETTINGS), path.with_name(_TEMPLATE)
  found = read_json(settings) if settings.is_file() else {}
  source = found.get('chat_template')
  if own.is_file():
    source = own.read_text('utf-8')
  return Tokenizer(backend, _chat.from_settings(source, found))
