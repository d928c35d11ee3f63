"""Checks of what attribution is asked for."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.pretrained import _model
from iclcl_jax.types import Array


def check_segments(segment_ids: Array, num_segments: int) -> None:
  """Checks which demonstration each token belongs to."""
  _validate.at_least(1, num_segments=num_segments)
  _validate.look(functools.partial(_check_ids, num_segments), segment_ids)


def _check_ids(num_segments: int, segment_ids: Any) -> None:
  ids = np.asarray(segment_ids)
  outside = ids[(ids < -1) | (ids >= num_segments)]
  if outside.size:
    raise ValueError(
      f'segment_ids holds {outside[0]}; expected -1 for tokens of no '
      f'demonstration, or 0 to {num_segments - 1} (num_segments less one).'
    )


def check_position(tokens: Any, position: Any, mask: Any) -> Any:
  """Checks the position that is read; the last valid token by default."""
  if position is None:
    return _model.last_valid(tokens, mask)
  _check_index(
    'position', position, len(tokens), 'the index of a token of the prompt'
  )
  if mask is not None:
    _validate.look(_check_valid, position, mask)
  return jnp.asarray(position)


def _check_valid(position: Any, mask: Any) -> None:
  if not np.asarray(mask)[int(position)]:
    raise ValueError(
      f'position is {int(position)}, a token that mask excludes; expected a '
      'valid token.'
    )


def check_query(segment_ids: Any, mask: Any) -> None:
  """Checks that the last valid token belongs to no demonstration."""
  _validate.look(_check_query, mask, segment_ids)


def _check_query(mask: Any, segment_ids: Any) -> None:
  valid = np.ones(len(segment_ids), bool) if mask is None else np.asarray(mask)
  last = np.flatnonzero(valid)[-1]
  if np.asarray(segment_ids)[last] >= 0:
    raise ValueError(
      f'segment_ids puts token {last}, the last one, into a demonstration; '
      'expected -1: the answer is read there. End the prompt with the query.'
    )


def check_labels(
  model: _model.LanguageModel, label: Any, other_label: Any, *positions: Any
) -> bool:
  """Checks two labels; returns whether one of them has several tokens.

  That is an error if what follows is not None: one position is read.
  """
  _model.check_head(model)
  size = model.vocabulary_size
  expected = "an id of this model, as tokenizer.single_id(' Positive') returns"
  labels = {'label': label, 'other_label': other_label}
  for name, ids in labels.items():
    if np.ndim(ids):
      _model.check_text(model, name, ids)
    elif ids is not None or name == 'label':
      _check_index(name, ids, size, expected)
  if other_label is not None:
    _validate.look(_check_differ, label, other_label)
  has_several = any(np.ndim(ids) for ids in labels.values())
  if has_several and any(position is not None for position in positions):
    raise ValueError(
      'one position is given for a label of several tokens, of which each is '
      'read behind the ones before it; expected none. Call attribute '
      'without position.'
    )
  return has_several


def _check_differ(label: Any, other_label: Any) -> None:
  if np.array_equal(np.atleast_1d(label), np.atleast_1d(other_label)):
    raise ValueError(
      f'label and other_label are both {label}, so their logits do not '
      'differ; expected two labels.'
    )


def _check_index(name: str, value: Any, size: int, expected: str) -> None:
  kind = getattr(value, 'dtype', type(value))
  is_integer = np.shape(value) == () and jnp.issubdtype(kind, jnp.integer)

  def check(value):
    if not is_integer or not 0 <= int(value) < size:
      raise ValueError(
        f'{name} is {value!r}; expected one integer from 0 to {size - 1}, '
        f'{expected}.'
      )

  _validate.look(check, value) if is_integer else check(value)
