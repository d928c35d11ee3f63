"""What all doors of the dual model share: the two forms, and checks."""

from collections.abc import Callable
from typing import TypeAlias, cast

import jax

from iclcl_jax import _validate, coefficients, losses, moments
from iclcl_jax.types import (
  Array,
  DualState,
  FeatureMap,
  Kernel,
  KernelDualState,
)

State: TypeAlias = DualState | KernelDualState
Penalty: TypeAlias = Callable[[Array], Array]


def form_of(phi: FeatureMap | Kernel):
  """The arithmetic of `phi`: sums of features, or rows of coefficients."""
  return moments if _validate.is_feature_map(phi) else coefficients


def check_state(phi: FeatureMap | Kernel, state: State, d_k: int) -> None:
  expected = DualState if _validate.is_feature_map(phi) else KernelDualState
  if not isinstance(state, expected):
    raise ValueError(
      f'state is a {type(state).__name__}; expected a {expected.__name__}, '
      f'since phi is a {type(phi).__name__}. Make it with dual.zero_shot.'
    )
  if isinstance(state, KernelDualState):
    _validate.check_same('d_k', 'state.keys', state.keys.shape[1], 'keys', d_k)
    return
  row = jax.ShapeDtypeStruct((d_k,), state.log_scale.dtype)
  feature_map = cast(FeatureMap, phi)
  shapes = jax.eval_shape(lambda x: moments.scaled(feature_map, x), row)
  _validate.check_same(
    'R', 'state', state.weights.shape[1], 'phi', shapes[1].shape[0]
  )


def check_step(phi, state, keys, values, mask, learning_rate) -> None:
  _validate.check_tokens(keys, values, mask)
  _validate.check_scalar('learning_rate', learning_rate, minimum=0)
  check_state(phi, state, keys.shape[1])
  stored = state.weights if isinstance(state, DualState) else state.coefficients
  width = stored.shape[0 if isinstance(state, DualState) else 1]
  _validate.check_same('d_v', 'state', width, 'values', values.shape[1])
  _validate.check_dtypes(state=stored, values=values)


def check_objective(loss, penalty, values, *, masked: bool) -> None:
  losses.check_loss(loss)
  if losses.declares_normaliser(loss):
    raise ValueError(
      'loss declares the keyword normaliser, which belongs to one query; a '
      'state serves all. Bind it: functools.partial(loss, normaliser=D), with '
      'D from dual.normaliser.'
    )
  losses.check_value(loss, values)
  losses.check_penalty(penalty)
  if masked and not losses.is_sum_over_demonstrations(loss):
    raise ValueError(
      'loss is not declared a sum over demonstrations, so rows cannot be '
      'left out (a mask, or an incomplete batch). Declare it with '
      'losses.sum_over_demonstrations, or pass whole batches without mask.'
    )
  if masked:
    losses.check_sum(loss)
