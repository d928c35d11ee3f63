"""The one place that chooses between a feature map and a kernel."""

import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, moments
from iclcl_jax.types import (
  DualState,
  FeatureMap,
  Form,
  Kernel,
  KernelDualState,
  Reading,
  State,
)


def form_of(
  phi: FeatureMap | Kernel, state: State | None = None, *, name: str = 'state'
) -> Form:
  """Returns the arithmetic of `phi`: sums of features, or rows of a kernel.

  It is a `ValueError` if `phi` is neither, or the state of the other form.

  Example:
    >>> form_of(kernels.ExponentialKernel()).__name__
    'iclcl_jax.coefficients'
  """
  is_feature_map = _validate.is_feature_map(phi)
  expected = DualState if is_feature_map else KernelDualState
  if state is not None and not isinstance(state, expected):
    raise ValueError(
      f'{name} is {_validate.kind_of(state)}; expected a {expected.__name__}, '
      f'since phi is {_validate.kind_of(phi)}. Make it with this phi.'
    )
  return moments if is_feature_map else coefficients


def see(phi, state: State, keys, values, mask=None) -> State:
  """Adds tokens to the mass alone: they are visible, and not yet learnt."""
  return form_of(phi).absorb(phi, state, keys, jnp.zeros_like(values), mask)


def add_readings(*readings: Reading) -> Reading:
  """Adds what one query finds in several states, of any forms."""
  scales = jnp.stack([reading.log_scale for reading in readings])
  log_scale = moments.largest(scales)
  shrink = jnp.exp(scales - log_scale)
  numerators, denominators, _ = zip(*readings, strict=True)
  return Reading(
    sum(x * s for x, s in zip(numerators, shrink, strict=True)),
    sum(x * s for x, s in zip(denominators, shrink, strict=True)),
    log_scale,
  )
