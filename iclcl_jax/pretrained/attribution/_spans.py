"""Demonstrations as spans of a prompt, in characters and in tokens."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from iclcl_jax import _validate
from iclcl_jax.pretrained.tokenizer import Tokenizer

Spans = Sequence[tuple[int, int]]


def mark_spans(spans: Spans, num_tokens: int) -> np.ndarray:
  """Returns the demonstration of each token, int32 `[N]`, or -1 for none.

  Args:
    spans: begin and end (exclusive) of each demonstration, in tokens.
    num_tokens: length of the prompt.

  Raises:
    ValueError: if there is no span, or one is empty, reaches outside of the
      prompt, or overlaps with another.

  Example:
    >>> mark_spans([(1, 3), (3, 4)], 6).tolist()
    [-1, 0, 0, 1, -1, -1]
  """
  _validate.at_least(1, num_tokens=num_tokens)
  if not isinstance(spans, Sequence) or not spans:
    raise ValueError(
      f'spans is {spans!r}; expected a list of at least one pair, begin and '
      'end (exclusive) of each demonstration.'
    )
  result = np.full(num_tokens, -1, np.int32)
  for number, span in enumerate(spans):
    begin, end = _read_span(f'spans[{number}]', span, num_tokens, 'tokens')
    taken = result[begin:end]
    if np.any(taken >= 0):
      raise ValueError(
        f'spans[{number}] is {(begin, end)} and overlaps with '
        f'spans[{np.max(taken)}]; expected disjoint spans. Give each token to '
        'one demonstration.'
      )
    result[begin:end] = number
  return result


def token_spans(
  tokenizer: Tokenizer, text: str, character_spans: Spans
) -> list[tuple[int, int]]:
  """Turns spans of characters into spans of tokens of `tokenizer.encode(text)`.

  A token belongs to the span in which it begins.

  Args:
    tokenizer: of the model.
    text: the prompt.
    character_spans: begin and end (exclusive) in characters of each span.

  Raises:
    ValueError: if a span reaches outside of the text, or no token begins in
      it.
  """
  offsets = tokenizer.spans(text)
  result = []
  for number, span in enumerate(character_spans):
    name = f'character_spans[{number}]'
    begin, end = _read_span(name, span, len(text), 'characters')
    inside = np.flatnonzero(
      (begin <= offsets[:, 0])
      & (offsets[:, 0] < end)
      & (offsets[:, 0] < offsets[:, 1])  # Added tokens cover nothing.
    )
    if inside.size == 0:
      raise ValueError(
        f'{name} is {(begin, end)}, and no token begins there; expected a '
        'longer span.'
      )
    result.append((int(inside[0]), int(inside[-1]) + 1))
  return result


def _read_span(name: str, span: Any, size: int, unit: str) -> tuple[int, int]:
  """Returns begin and end of a span within `size` as plain integers."""
  try:
    begin, end = map(operator.index, span)
    fits = 0 <= begin < end <= size
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise ValueError(
      f'{name} is {span!r}; expected two integers, 0 <= begin < end <= {size}, '
      f'the number of {unit}. The end is exclusive.'
    )
  return begin, end
