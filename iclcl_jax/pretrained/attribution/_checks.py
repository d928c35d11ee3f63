"""Checks of what attribution is asked for."""

import functools
from typing import Any

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


def check_query(segment_ids: Any, mask: Any) -> None:
  """Checks that the last valid token belongs to no demonstration."""
  _validate.look(_check_query, mask, segment_ids)


def _check_query(mask: Any, segment_ids: Any) -> None:
  last = np.flatnonzero(np.ones(len(segment_ids)) if mask is None else mask)[-1]
  if np.asarray(segment_ids)[last] >= 0:
    raise ValueError(
      f'segment_ids puts token {last}, the last one, into a demonstration; '
      'expected -1: the answer is read there. End the prompt with the query.'
    )


def check_labels(
  model: _model.LanguageModel,
  label: Any,
  other_label: Any,
  ranks: tuple[int, ...] = (0, 1),
) -> bool:
  """Checks two labels; returns whether one of them has several tokens."""
  _model.check_head(model)
  _model.check_text(model, 'label', label, ranks=ranks)
  if other_label is not None:
    _model.check_text(model, 'other_label', other_label, ranks=ranks)
    _validate.look(_check_differ, label, other_label)
  return any(np.ndim(ids) for ids in (label, other_label))


def _check_differ(label: Any, other_label: Any) -> None:
  if np.array_equal(np.atleast_1d(label), np.atleast_1d(other_label)):
    raise ValueError(
      f'label and other_label are both {label}, so their logits do not '
      'differ; expected two labels.'
    )
