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


def check_excluded(position: Any, mask: Any, excluded: Any) -> Any:
  """Checks the excluded tokens and returns the mask of those that are left."""
  if excluded is None:
    return mask
  check = functools.partial(_check_not_read, 'excluded')
  _validate.look(check, position, mask, excluded)
  visible = ~jnp.asarray(excluded)
  return visible if mask is None else visible & mask


def check_query(segment_ids: Any, mask: Any) -> None:
  """Checks that the last valid token belongs to no demonstration."""
  _validate.look(functools.partial(_check_query, None), mask, segment_ids)


def _check_query(position: Any, mask: Any, segment_ids: Any) -> None:
  demonstrations = np.asarray(segment_ids) >= 0
  _check_not_read('segment_ids', position, mask, demonstrations)


def _check_not_read(name: str, position: Any, mask: Any, held: Any) -> None:
  if position is None:
    valid = np.ones(len(held), bool) if mask is None else np.asarray(mask)
    position = np.flatnonzero(valid)[-1]
  if np.asarray(held)[int(position)]:
    raise ValueError(
      f'{name} holds position {int(position)}, the token that is read; '
      'expected it among the others.'
    )


def check_labels(
  model: _model.LanguageModel, label: Any, other_label: Any
) -> None:
  """Checks two token ids."""
  _model.check_head(model)
  _check_id(model, 'label', label)
  if other_label is not None:
    _check_id(model, 'other_label', other_label)
    _validate.look(_check_differ, label, other_label)


def check_strings(
  model: _model.LanguageModel, label: Any, other_label: Any, position: Any
) -> None:
  """Checks two labels of which one has several tokens."""
  _model.check_head(model)
  if position is not None:
    raise ValueError(
      'position is given for a label of several tokens; expected None: each '
      'token is read behind the ones before it.'
    )
  for name, ids in (('label', label), ('other_label', other_label)):
    check = _model.check_text if np.ndim(ids) else _check_id
    check(model, name, ids)
  _validate.look(_check_differ, label, other_label)


def _check_differ(label: Any, other_label: Any) -> None:
  if np.array_equal(np.atleast_1d(label), np.atleast_1d(other_label)):
    raise ValueError(
      f'label and other_label are both {label}, so their logits do not '
      'differ; expected two labels.'
    )


def _check_id(model: _model.LanguageModel, name: str, value: Any) -> None:
  expected = "an id of this model, as tokenizer.single_id(' Positive') returns"
  _check_index(name, value, model.vocabulary_size, expected)


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
