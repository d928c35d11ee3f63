"""Segments of a prompt, and checks of what attribution is asked for."""

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate, transformer
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained.tokenizer import Tokenizer

Spans = Sequence[tuple[int, int]]


def mark_spans(spans: Spans, num_tokens: int) -> np.ndarray:
  """Says of each token to which demonstration it belongs.

  Args:
    spans: begin and end (exclusive) of each demonstration, in tokens.
    num_tokens: length of the prompt.

  Returns:
    The number of the demonstration, -1 for tokens of none, int32. Shape `[N]`.

  Raises:
    ValueError: if there is no span, or one is empty, reaches outside of the
      prompt, or overlaps with another.

  Example:
    >>> mark_spans([(1, 3), (3, 4)], 6).tolist()
    [-1, 0, 0, 1, -1, -1]
  """
  if len(spans) == 0:
    raise ValueError('spans is empty; expected at least one demonstration.')
  result = np.full(num_tokens, -1, np.int32)
  for number, span in enumerate(spans):
    begin, end = _pair(f'spans[{number}]', span)
    if not 0 <= begin < end <= num_tokens:
      raise ValueError(
        f'spans[{number}] is {(begin, end)}; expected 0 <= begin < end <= '
        f'{num_tokens}, the number of tokens. The end is exclusive.'
      )
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
  """Turns spans of characters into spans of tokens.

  A token belongs to the span in which it begins.

  Args:
    tokenizer: of the model.
    text: the prompt.
    character_spans: begin and end (exclusive) in characters of each span.

  Returns:
    Begin and end (exclusive) in tokens of `tokenizer.encode(text)`.

  Raises:
    ValueError: if a span reaches outside of the text, or no token begins in
      it.
  """
  offsets = tokenizer.spans(text)
  result = []
  for number, span in enumerate(character_spans):
    begin, end = _pair(f'character_spans[{number}]', span)
    if not 0 <= begin < end <= len(text):
      raise ValueError(
        f'character_spans[{number}] is {(begin, end)}; expected 0 <= begin < '
        f'end <= {len(text)}, the number of characters.'
      )
    inside = np.flatnonzero(
      (begin <= offsets[:, 0])
      & (offsets[:, 0] < end)
      & (offsets[:, 0] < offsets[:, 1])  # Added tokens cover nothing.
    )
    if inside.size == 0:
      raise ValueError(
        f'character_spans[{number}] is {(begin, end)}, and no token begins '
        'there; expected a longer span.'
      )
    result.append((int(inside[0]), int(inside[-1]) + 1))
  return result


def check_prompt(model: _model.LanguageModel, tokens: Any, mask: Any) -> None:
  """Checks the model and its prompt."""
  if not isinstance(model, _model.LanguageModel):
    raise ValueError(
      f'model is a {type(model).__name__}; expected a '
      'pretrained.LanguageModel, as pretrained.load returns.'
    )
  _model.check_head(model)
  if model.architecture.visible is transformer.bidirectional:
    raise ValueError(
      'model is bidirectional: no token is the next one; expected a causal '
      'language model.'
    )
  _model.check_prompt(model, tokens, mask)


def check_segments(
  model: _model.LanguageModel,
  tokens: Any,
  segment_ids: Any,
  num_segments: int,
  mask: Any,
) -> None:
  """Checks the prompt and which demonstration each of its tokens belongs to."""
  check_prompt(model, tokens, mask)
  _validate.check_count('num_segments', num_segments)
  dtype = getattr(segment_ids, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.signedinteger):
    raise ValueError(
      f'segment_ids is a {type(segment_ids).__name__} of dtype {dtype}; '
      'expected an array of signed integers [N], as mark_spans returns.'
    )
  if segment_ids.shape != tokens.shape:
    raise ValueError(
      f'segment_ids has shape {list(segment_ids.shape)}; expected '
      f'{list(tokens.shape)}, one for each token.'
    )
  if _validate.is_concrete(segment_ids):
    outside = (segment_ids < -1) | (segment_ids >= num_segments)
    if np.any(outside):
      raise ValueError(
        f'segment_ids holds {np.asarray(segment_ids)[outside][0]}; expected '
        f'-1 for tokens of no demonstration, or 0 to {num_segments - 1} '
        '(num_segments less one).'
      )


def check_position(tokens: Any, position: Any, mask: Any) -> Any:
  """Checks the position that is read; the last valid token by default."""
  if position is None:
    return _model.last_valid(tokens, mask)
  dtype = getattr(position, 'dtype', jnp.result_type(position))
  if not jnp.issubdtype(dtype, jnp.integer) or np.shape(position) != ():
    raise ValueError(
      f'position is {position!r}; expected one integer, the index of a token.'
    )
  if _validate.is_concrete(position):
    size = tokens.shape[0]
    if not 0 <= int(position) < size:
      raise ValueError(
        f'position is {int(position)}; expected 0 to {size - 1}, the index of '
        'a token of the prompt.'
      )
    known = mask is not None and _validate.is_concrete(mask)
    if known and not np.asarray(mask)[int(position)]:
      raise ValueError(
        f'position is {int(position)}, a token that mask excludes; expected '
        'a valid token.'
      )
  return jnp.asarray(position)


def check_hidden(tokens: Any, position: Any, mask: Any, hidden: Any) -> Any:
  """Checks what is hidden; returns what may be seen, or None for all."""
  if hidden is None:
    return mask
  _validate.check_mask(hidden, tokens.shape[0], name='hidden')
  if _validate.is_concrete(hidden, position) and bool(hidden[int(position)]):
    raise ValueError(
      f'hidden holds position {int(position)}, the token that is read; '
      'expected it among the visible ones.'
    )
  visible = ~jnp.asarray(hidden)
  return visible if mask is None else visible & mask


def check_labels(
  model: _model.LanguageModel, label: Any, other_label: Any
) -> None:
  """Checks two token ids."""
  _model.check_head(model)
  for name, value in (('label', label), ('other_label', other_label)):
    dtype = getattr(value, 'dtype', None)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if dtype is not None:
      is_integer = jnp.issubdtype(dtype, jnp.integer) and value.shape == ()
    if not is_integer:
      raise ValueError(
        f'{name} is {value!r}; expected the id of one token, as '
        "tokenizer.single_id(' Positive') returns."
      )
    size = model.vocabulary_size
    if _validate.is_concrete(value) and not 0 <= int(value) < size:
      raise ValueError(
        f'{name} is {int(value)}; expected an id from 0 to {size - 1}. Use the '
        'tokenizer of this model.'
      )
  known = _validate.is_concrete(label, other_label)
  if known and int(label) == int(other_label):
    raise ValueError(
      f'label and other_label are both {int(label)}, so their logits do not '
      'differ; expected two labels.'
    )


def _pair(name: str, span: Any) -> tuple[int, int]:
  """Begin and end of a span as plain integers."""
  try:
    begin, end = (operator.index(edge) for edge in span)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{name} is {span!r}; expected two integers, begin and end (exclusive).'
    ) from error
  return begin, end
