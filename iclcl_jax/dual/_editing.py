"""States are merged, and demonstrations removed."""

from typing import NamedTuple

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door, eager_door
from iclcl_jax._program import compiled
from iclcl_jax.forms import form_of, form_of_state
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, State


@door
def merge(a: State, b: State) -> State:
  """Adds two states that saw different tokens through the same `phi`.

  A state does not know its `phi`: two projections of equal shape cannot be told
  apart here, and their sum means nothing. States that differ in kind or sizes
  are an error.

  Example:
    >>> from iclcl_jax import dual, features
    >>> phi = features.EluPlusOneFeatures()
    >>> state = dual.zero_shot(phi, jnp.ones((1, 4)), jnp.ones((1, 2)))
    >>> dual.merge(state, state).mass.tolist()
    [2.0, 2.0, 2.0, 2.0]
  """
  if type(a) is not type(b):
    raise ValueError(
      f'a is a {type(a).__name__}, b a {type(b).__name__}; expected states of '
      'the same phi.'
    )
  return form_of_state(a).merge(a, b)


class Removal(NamedTuple):
  """A state without one demonstration.

  Attributes:
    state: the remaining state.
    amplification: factor by which rounding errors of the state have grown,
      at least 1; infinite if the mass is lost. Shape `[]`.
  """

  state: State
  amplification: Float[Array, '']


@eager_door
def remove(
  phi: FeatureMap | Kernel,
  state: State,
  key: Float[Array, ' d_k'],
  value: Float[Array, ' d_v'],
  *,
  learning_rate: float | Array = 1.0,
) -> Removal:
  """Removes one demonstration from a state.

  Exact for a kernel: the row of the demonstration is cleared. For a feature
  map its contribution is subtracted, which loses digits where it was most of a
  feature's mass: `amplification` is the largest such loss over the features.

  The `learning_rate` is that with which it was absorbed. Inside `jit` a lost
  mass is not an error: `amplification` is then infinite and the state is NaN.

  Raises:
    ValueError: if no digit is left (the mass is lost), or a kernel's state has
      no such row. The state of a feature map keeps no rows: a token that it
      never saw is subtracted all the same.

  Example:
    >>> from iclcl_jax import dual, kernels
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> removal = dual.remove(kernel, dual.zero_shot(kernel, x, v), x[0], v[0])
    >>> dual.predict(kernel, removal.state, x[0]).tolist()
    [0.0, 1.0]
  """
  _validate.non_negative(learning_rate=learning_rate)
  result = _remove(phi, state, key, value, learning_rate)
  if _validate.is_concrete(result) and jnp.isinf(result.amplification):
    raise ValueError(
      'the mass is lost: without this demonstration no digit of the state '
      'is left (or the state never saw it). Rebuild the state from the '
      'remaining demonstrations with dual.one_step.'
    )
  return result


@compiled
def _remove(phi, state, key, value, learning_rate) -> Removal:
  key, value = jnp.asarray(key), jnp.asarray(value)
  label = jnp.asarray(learning_rate, value.dtype) * value
  return Removal(*form_of(phi, state).remove(phi, state, key, label))
