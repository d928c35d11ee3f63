"""Checks of what attribution is asked for."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.pretrained import _model
from iclcl_jax.types import Array


def check_segments(segment_ids: Array, num_segments: int) -> None:
  """Checks which demonstration each token belongs to."""
  _validate.at_least(1, num_segments=num_segments)
  if not _validate.is_concrete(segment_ids):
    return
  outside = (segment_ids < -1) | (segment_ids >= num_segments)
  if np.any(outside):
    raise ValueError(
      f'segment_ids holds {np.asarray(segment_ids)[outside][0]}; expected -1 '
      f'for tokens of no demonstration, or 0 to {num_segments - 1} '
      '(num_segments less one).'
    )


def check_position(tokens: Any, position: Any, mask: Any) -> Any:
  """Checks the position that is read; the last valid token by default."""
  if position is None:
    return _model.last_valid(tokens, mask)
  _check_index(
    'position', position, len(tokens), 'the index of a token of the prompt'
  )
  known = mask is not None and _validate.is_concrete(mask, position)
  if known and not np.asarray(mask)[int(position)]:
    raise ValueError(
      f'position is {int(position)}, a token that mask excludes; expected a '
      'valid token.'
    )
  return jnp.asarray(position)


def check_excluded(position: Any, mask: Any, excluded: Any) -> Any:
  """Checks the excluded tokens and returns the mask of those that are left."""
  if excluded is None:
    return mask
  known = _validate.is_concrete(excluded, position)
  if known and bool(excluded[int(position)]):
    raise ValueError(
      f'excluded holds position {int(position)}, the token that is read; '
      'expected it among the others.'
    )
  visible = ~jnp.asarray(excluded)
  return visible if mask is None else visible & mask


def check_labels(
  model: _model.LanguageModel, label: Any, other_label: Any
) -> None:
  """Checks two token ids."""
  _model.check_head(model)
  expected = "an id of this model, as tokenizer.single_id(' Positive') returns"
  for name, value in (('label', label), ('other_label', other_label)):
    _check_index(name, value, model.vocabulary_size, expected)
  known = _validate.is_concrete(label, other_label)
  if known and int(label) == int(other_label):
    raise ValueError(
      f'label and other_label are both {int(label)}, so their logits do not '
      'differ; expected two labels.'
    )


def _check_index(name: str, value: Any, size: int, expected: str) -> None:
  kind = getattr(value, 'dtype', type(value))
  is_integer = np.shape(value) == () and jnp.issubdtype(kind, jnp.integer)
  known = is_integer and _validate.is_concrete(value)
  if not is_integer or (known and not 0 <= int(value) < size):
    raise ValueError(
      f'{name} is {value!r}; expected one integer from 0 to {size - 1}, '
      f'{expected}.'
    )
