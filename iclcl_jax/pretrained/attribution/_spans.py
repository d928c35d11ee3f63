"""Demonstrations as spans of a prompt."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from iclcl_jax import _validate
from iclcl_jax.pretrained.tokenizer import Tokenizer


def mark_spans(
  tokenizer: Tokenizer,
  text: str,
  spans: Sequence[str | tuple[int, int]],
  *,
  add_special_tokens: bool = True,
) -> np.ndarray:
  """Returns the demonstration of each token that `tokenizer.encode` returns.

  Numbers from 0, -1 for none, int32, `[N]`. A token belongs to the span in
  which it begins.

  Args:
    spans: each demonstration, at least one: its text, which is looked for
      behind the one before, or begin and end (exclusive) in characters. One
      that is empty, is not in the text, has no token that begins in it, or
      overlaps with another is a `ValueError`.
  """
  check_tokenizer(tokenizer)
  edges = tokenizer.spans(text, add_special_tokens=add_special_tokens)
  return mark(text, edges, spans)


def check_tokenizer(tokenizer: Any) -> None:
  kind = object if hasattr(tokenizer, 'spans') else Tokenizer
  expected = 'a Tokenizer, as load returns it behind the model'
  _validate.check_type('tokenizer', tokenizer, kind, expected)


def mark(text: str, edges: Any, spans: Sequence[Any]) -> np.ndarray:
  """Does so for tokens whose begin and end in the text are `edges`."""
  if not isinstance(spans, Sequence) or isinstance(spans, str) or not spans:
    raise ValueError(
      f'spans is {spans!r}; expected a list of at least one demonstration, its '
      'text or a pair, begin and end (exclusive) in characters.'
    )
  begins, ends = np.reshape(edges, (-1, 2)).T
  result, end = np.full(len(begins), -1, np.int32), 0
  for number, span in enumerate(spans):
    if isinstance(span, str):
      begin, found = text.find(span, end), text.count(span, end)
      if not 0 < found <= spans[number:].count(span):
        raise ValueError(
          f'spans[{number}] is {span!r:.200}, which the text holds {found} '
          f'times behind character {end}; expected demonstrations in their '
          'order, once each. For another one pass a pair: begin and end.'
        )
      span = begin, begin + len(span)
    try:
      begin, end = map(operator.index, span)
      fits = 0 <= begin < end <= len(text)
    except (TypeError, ValueError):
      fits = False
    if not fits:
      raise ValueError(
        f'spans[{number}] is {span!r}; expected two integers, 0 <= begin < end '
        f'<= {len(text)}, the number of characters. The end is exclusive.'
      )
    # Tokens that were added around the text cover nothing.
    inside = (begin <= begins) & (begins < end) & (begins < ends)
    if not np.any(inside):
      raise ValueError(
        f'spans[{number}] is {(begin, end)}, and no token begins there; '
        'expected a longer span.'
      )
    if np.any(result[inside] >= 0):
      raise ValueError(
        f'spans[{number}] is {(begin, end)} and overlaps with '
        f'spans[{np.max(result[inside])}]; expected disjoint spans. Give each '
        'token to one demonstration.'
      )
    result[inside] = number
  return result
