"""A page that shows which demonstrations taught a model its answer."""

import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax.pretrained import _decoding, _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.attribution import _html, _influence, _logits
from iclcl_jax.pretrained.attribution._spans import check_tokenizer, mark
from iclcl_jax.pretrained.tokenizer import Tokenizer

# Characters that no page can hold, and the pictures that stand for them.
_PICTURES = {i: 0x2400 + i for i in range(32) if i not in b'\t\n\r'}
# What is drawn as one with the character before it: joiners, flags, colours.
_JOINED = {0x200D, *range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400)}


class Page(NamedTuple):
  """What taught a model its answer; prints as a table, and shows as a page.

  Positive numbers speak for the first label.

  Attributes:
    pieces: the prompt, cut where tokens begin, but never within a character.
    starts: first token of each piece.
    segment_ids: demonstration of each token, -1 for none. Shape `[N]`.
    names: of the demonstrations, the begin and the last word of their text.
    labels: the two that are compared.
    log_probabilities: of the labels behind the prompt. Shape `[2]`.
    influence, effects: what their difference loses without a demonstration,
      predicted to first order and measured by deletion. Shape `[S]`.
    attribution: what the last position read, a segment for each token.
    dtype: of the model, in which all was computed.
  """

  pieces: Sequence[str]
  starts: Sequence[int]
  segment_ids: np.ndarray
  names: Sequence[str]
  labels: Sequence[str]
  log_probabilities: np.ndarray
  influence: np.ndarray
  effects: np.ndarray
  attribution: _logits.LogitAttribution
  dtype: str

  def to_html(self, *, more: str = '') -> str:
    """Returns the page, one file that needs no other, as a string.

    `more` is HTML that is put behind it as it is: escape what it quotes.
    """
    return _html.fill('page.html', page=self, more=more, is_document=True)

  def write(self, path: str | os.PathLike[str]) -> None:
    """Writes the page to a file."""
    pathlib.Path(path).write_text(self.to_html(), encoding='utf-8')

  def __repr__(self) -> str:
    rows = zip(self.names, self.influence, self.effects, strict=True)
    lines = [f'{name:<46}  {x:>+9.2f}  {y:>+7.2f}' for name, x, y in rows]
    if (first := self.segment_ids[0]) >= 0:
      lines[first] += ' †'
      lines.append('† holds the first token: its influence predicts nothing.')
    return '\n'.join([f'{"demonstration":<46}  influence  deleted', *lines])

  def _repr_html_(self) -> str | None:
    return _html.show('page.html', page=self, more='', is_document=False)


def page(
  model: LanguageModel,
  tokenizer: Tokenizer,
  text: str,
  spans: Sequence[str | tuple[int, int]],
  labels: Sequence[str | int | Sequence[int]],
  *,
  add_special_tokens: bool = True,
) -> Page:
  """Shows which demonstrations of a prompt taught a model its answer.

  First what the answer would lose without each, predicted by `influence` and
  measured by `effects_of_removal`; then what the last position read, token by
  token and head by head: a decomposition, by `attribute`, that predicts no
  deletion. Notebooks show the page; `page(...).write('page.html')` writes it.

  Args:
    text: the prompt, which ends where the model answers.
    spans: the demonstrations, as in `mark_spans`, or none. Idle heads rest at
      the first token: begin the text with a line of its own.
    labels: two answers to compare, as they stand behind the prompt, often with
      a space before them, as ' Positive'; or their token ids.
    add_special_tokens: False for what `Tokenizer.chat` returns, as in `encode`.

  Raises `ValueError` as these functions, or if there are not two labels. To
  show the page needs `jinja2`, of the extra `iclcl_jax[lm]`.
  """
  if isinstance(labels, str) or len(labels) != 2:
    raise ValueError(
      f"labels is {labels!r}; expected two, such as (' Positive', ' Negative')."
    )
  _model.check_model(model)
  check_tokenizer(tokenizer)
  encoding, count = tokenizer.encoding(text, add_special_tokens), len(spans)
  tokens = jnp.asarray(encoding.ids, 'int32')
  answers = [_ids(tokenizer, label) for label in labels]
  segments, losses = np.full(len(tokens), -1, np.int32), np.zeros((2, 0))
  if count:
    segments = mark(text, encoding.offsets, spans)
    question: Any = model, tokens, jnp.asarray(segments), *answers
    predicted = _influence.influence(*question, num_segments=count)
    measured = _influence.effects_of_removal(*question, num_segments=count)
    losses = np.asarray([predicted.sum((0, 1)), measured])
  question = model, tokens, jnp.arange(len(tokens)), *answers
  read = _logits.attribute(*question, num_segments=len(tokens))
  texts = [jnp.atleast_1d(x) for x in answers]
  scores = np.asarray(_decoding.score_labels(model, tokens, texts))
  if not np.all(np.isfinite(scores)):
    raise ValueError(
      f'model gives the labels the log-probabilities {scores}; expected finite '
      'ones. Look for NaN among its weights.'
    )
  pieces, starts = _cut(tokenizer, text, encoding)
  owned = list(zip(segments[np.array(starts)], pieces, strict=True))
  return Page(
    pieces=pieces,
    starts=starts,
    segment_ids=segments,
    names=[_name(''.join(x for i, x in owned if i == s)) for s in range(count)],
    labels=[_word(tokenizer, label) for label in labels],
    log_probabilities=scores,
    influence=losses[0],
    effects=losses[1],
    attribution=jax.device_get(read),
    dtype=model.embedding.dtype.name,
  )


def _ids(tokenizer: Tokenizer, label: Any) -> jax.Array:
  if isinstance(label, str):
    label = tokenizer.encode(label, add_special_tokens=False)
  ids = jnp.asarray(label)
  return ids[0] if ids.shape == (1,) else ids


def _word(tokenizer: Tokenizer, label: Any) -> str:
  """Returns a label without blanks, its ids where that shows nothing."""
  is_text = isinstance(label, str)
  text = label if is_text else tokenizer.decode(np.atleast_1d(label))
  word = text.strip()
  return word if word and '\ufffd' not in word else f'token {label!r}'


def _name(text: str) -> str:
  words = text.split()
  line = ' '.join(words)
  begin = line[:29].rsplit(' ', 1)[0]
  return line if len(line) <= 46 else f'{begin} … {words[-1][-15:]}'


def _cut(
  tokenizer: Tokenizer, text: str, encoding: Any
) -> tuple[list[str], list[int]]:
  """Cuts a text where tokens begin; returns the pieces, and their first tokens.

  Tokens that were added around the text stand there by name.
  """
  pieces: list[str] = []
  starts, end = [], 0
  for index, (begin, stop) in enumerate(encoding.offsets):
    is_added = begin == stop
    new = tokenizer.token(encoding.ids[index]) if is_added else text[end:stop]
    if is_added or not pieces or not _continues(pieces[-1], new):
      pieces.append('')
      starts.append(index)
    pieces[-1] += new.translate(_PICTURES)
    end = max(end, stop)
  pieces[-1] += text[end:]
  return pieces, starts


def _continues(before: str, text: str) -> bool:
  """Whether a text is drawn as one with the character before it."""
  if not text or before.endswith('\u200d'):
    return True
  is_mark = unicodedata.category(text[0]).startswith('M')
  return is_mark or ord(text[0]) in _JOINED
