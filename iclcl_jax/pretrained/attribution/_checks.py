"""Checks of what attribution is asked for."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.pretrained import _model


def check_prompt(model: _model.LanguageModel, tokens: Any, mask: Any) -> None:
  """Checks the model and its prompt."""
  _model.check_causal(model)
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
  array = position if hasattr(position, 'dtype') else np.asarray(position)
  if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != ():
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


def check_excluded(tokens: Any, position: Any, mask: Any, excluded: Any) -> Any:
  """Checks the excluded tokens and returns the mask of those that are left."""
  if excluded is None:
    return mask
  _validate.check_mask(excluded, tokens.shape[0], name='excluded')
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
