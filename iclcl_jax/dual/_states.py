"""States are read, merged, and demonstrations removed from them."""

from typing import NamedTuple

import jax.numpy as jnp

from iclcl_jax import _validate, attention, moments
from iclcl_jax._door import door, eager_door
from iclcl_jax._program import compiled
from iclcl_jax.forms import form_of, form_of_state
from iclcl_jax.precision import cast_like
from iclcl_jax.types import (
  Array,
  FeatureMap,
  Float,
  Kernel,
  Mask,
  Reading,
  State,
)


@door
def normaliser(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  query: Float[Array, ' d_k'],
  *,
  mask: Mask | None = None,
) -> Float[Array, '']:
  r"""Returns the papers' normaliser of one query.

  .. math:: D = \sum_i \phi(k_i)^\top\phi(q)

  over the keys of demonstrations AND query side. It is a plain number, in
  float32 at least, and may overflow where a state does not.

  Example:
    >>> float(dual.normaliser(
    ...     kernels.ExponentialKernel(), jnp.zeros((3, 4)), jnp.ones(4)))
    3.0
  """
  scores, log_scale = attention.scores(phi, query, keys, mask)
  return jnp.sum(scores) * jnp.exp(log_scale)


@door
def predict(
  phi: FeatureMap | Kernel,
  state: State,
  query: Float[Array, ' d_k'],
  *,
  normaliser: Float[Array, ''] | None = None,
) -> Float[Array, ' d_v']:
  r"""Returns the prediction of the dual model for one query.

  .. math:: f(q) = W\phi(q) / D, \qquad D = z^\top\phi(q)

  or a fixed `D`, see :func:`normaliser`. It is NaN if the state has seen no
  token.

  Example:
    >>> kernel = kernels.ExponentialKernel()
    >>> keys, values = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> state = dual.zero_shot(kernel, keys, values)
    >>> dual.predict(kernel, state, jnp.ones(4)).tolist()
    [2.0]
  """
  reading = form_of(phi, state).read(phi, state, query)
  if normaliser is None:
    return cast_like(reading.numerator / reading.denominator, query)
  _validate.finite(normaliser=normaliser)
  normaliser = jnp.asarray(normaliser, reading.log_scale.dtype)
  scale = jnp.exp(reading.log_scale - jnp.log(jnp.abs(normaliser)))
  return cast_like(reading.numerator * scale * jnp.sign(normaliser), query)


@door
def read(
  phi: FeatureMap | Kernel, state: State, query: Float[Array, ' d_k']
) -> Reading:
  """Returns numerator and normaliser of a prediction, on a common scale.

  Readings of one query merge where states do not: exact demonstrations with
  features, or those of other devices (`dual.all_merge`).

  Example:
    >>> kernel, x = kernels.ExponentialKernel(), jnp.zeros((2, 4))
    >>> state = dual.zero_shot(kernel, x, jnp.ones((2, 1)))
    >>> dual.read(kernel, state, jnp.ones(4)).denominator.tolist()
    2.0
  """
  return form_of(phi, state).read(phi, state, query)


@door
def stream_predict(
  phi: FeatureMap | Kernel,
  state: State,
  queries: Float[Array, 'M d_k'],
  *,
  chunk_size: int = 1024,
) -> Float[Array, 'M d_v']:
  """Predicts for many queries, one chunk of them at a time: `[M, d_v]`.

  Example:
    >>> kernel = kernels.ExponentialKernel()
    >>> keys, values = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> state = dual.zero_shot(kernel, keys, values)
    >>> dual.stream_predict(kernel, state, jnp.ones((2, 4))).tolist()
    [[2.0], [2.0]]
  """
  _validate.at_least(1, chunk_size=chunk_size)
  return moments.map_chunks(
    lambda query: predict(phi, state, query), queries, chunk_size
  )


@door
def merge(a: State, b: State) -> State:
  """Adds two states that saw different tokens through the same `phi`.

  A state does not know its `phi`: two projections of equal shape cannot be told
  apart here, and their sum means nothing. States that differ in kind or sizes
  are an error.

  Example:
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
