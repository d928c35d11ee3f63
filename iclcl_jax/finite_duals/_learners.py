"""The sum of two learners: some tokens exactly, the others by features."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, coefficients, kernels, moments
from iclcl_jax._door import door
from iclcl_jax.forms import add_readings
from iclcl_jax.precision import cast_like, product, widen
from iclcl_jax.types import (
  Array,
  DualState,
  FeatureMap,
  Float,
  Int,
  Kernel,
  Reading,
)


@_pytree.with_short_repr
class WindowState(NamedTuple):
  """What is kept of a sequence, whatever its length.

  The dual model of the tokens that left the window, the first `S` tokens, the
  last `w`, the oldest first, and how many were read.
  """

  features: DualState
  sink_keys: Float[Array, 'S d_k']
  sink_values: Float[Array, 'S d_v']
  keys: Float[Array, 'w d_k']
  values: Float[Array, 'w d_v']
  used: Int[Array, '']


@_pytree.dataclass(kw_only=True)
class WindowedLearner:
  r"""Causal attention that is exact near and far, and finite between.

  The first `num_sinks` tokens and the last `window` (the own one among them)
  have exact coefficients :math:`k(k_i, q)`; all others are in a dual model
  `W` of features. The two readings add, so it is one learner.

  Attributes:
    num_sinks, window: how many first and last tokens are kept, or 0.
    kernel: of the tokens that are kept.

  Example:
    >>> learner = finite_duals.WindowedLearner(num_sinks=1, window=2)
    >>> phi, x = features.EluPlusOneFeatures(), jnp.zeros((4, 2))
    >>> values = jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> learner.causal(phi, x, x, values)[:2].tolist()
    [[1.0], [2.0]]
  """

  num_sinks: int = _pytree.static(default=1)
  window: int = _pytree.static(default=16)
  kernel: Kernel = dataclasses.field(default_factory=kernels.ExponentialKernel)

  def __post_init__(self):
    _validate.at_least(0, num_sinks=self.num_sinks, window=self.window)

  @door
  def causal(
    self,
    phi: FeatureMap,
    queries: Float[Array, 'N d_k'],
    keys: Float[Array, 'N d_k'],
    values: Float[Array, 'N d_v'],
    *,
    chunk_size: int = 64,
  ) -> Float[Array, 'N d_v']:
    """Lets position `t` read the tokens `0..t`: `[N, d_v]`, in linear time."""
    start = self.start(phi, keys, values)
    tokens = queries, keys, values
    return self.extend(phi, start, *tokens, chunk_size=chunk_size)[1]

  def is_far(self, place: Array, places: Array) -> Array:
    """Whether a query reads keys by features: neither sinks nor in the window.

    The positions of queries, `place`, and of keys, `places`, broadcast.
    """
    return (places >= self.num_sinks) & (place - places >= self.window)

  def start(self, phi: FeatureMap, keys: Array, values: Array) -> WindowState:
    """Returns the state before the first token; shapes and dtypes are read."""

    def rows(count, like):
      return jnp.zeros((count, like.shape[1]), like.dtype)

    return WindowState(
      moments.empty(phi, keys, values),
      rows(self.num_sinks, keys),
      rows(self.num_sinks, values),
      rows(self.window, keys),
      rows(self.window, values),
      jnp.asarray(0),
    )

  @door
  def extend(
    self,
    phi: FeatureMap,
    state: WindowState,
    queries: Float[Array, 'N d_k'],
    keys: Float[Array, 'N d_k'],
    values: Float[Array, 'N d_v'],
    *,
    chunk_size: int = 64,
  ) -> tuple[WindowState, Float[Array, 'N d_v']]:
    """Reads `N` more tokens; returns the state past them, and `[N, d_v]`."""
    _validate.at_least(1, chunk_size=chunk_size)
    step = jax.checkpoint(lambda state, chunk: self._extend(phi, state, *chunk))
    chunks, rest = moments.split_chunks((queries, keys, values), chunk_size)
    found = []
    if len(chunks[0]):
      state, outputs = jax.lax.scan(step, state, chunks)
      found = [outputs.reshape(-1, outputs.shape[-1])]
    if len(rest[0]):
      state, outputs = step(state, rest)
      found.append(outputs)
    return state, jnp.concatenate(found)

  def _extend(self, phi, state, queries, keys, values):
    size = keys.shape[0]
    near = jnp.concatenate([state.keys, keys])
    labels = jnp.concatenate([state.values, values])
    places = state.used - self.window + jnp.arange(len(near))
    later = places >= self.num_sinks
    sinks, sink_keys, sink_values = self._sinks(state, keys, values)
    exact_keys = jnp.concatenate([sink_keys, near])
    exact_labels = jnp.concatenate([sink_values, labels])
    rows = moments.scaled_rows(phi, near, later)

    def answer(query, place):
      far = self.is_far(place, places)
      seen = jnp.concatenate([sinks <= place, later & ~far & (places <= place)])
      readings = (
        self._read_exactly(query, exact_keys, exact_labels, seen),
        _read_rows(phi, query, rows, labels, far),
        moments.read(phi, state.features, query),
      )
      numerator, denominator, _ = add_readings(*readings)
      return cast_like(numerator / denominator, values)

    outputs = jax.vmap(answer)(queries, state.used + jnp.arange(size))
    leaving = moments.absorb(
      phi, state.features, near[:size], labels[:size], later[:size]
    )
    state = WindowState(
      leaving,
      sink_keys,
      sink_values,
      near[size:],
      labels[size:],
      state.used + size,
    )
    return state, outputs

  def _sinks(self, state, keys, values):
    """Returns places of the sinks, and their rows with those that came now."""
    sinks = jnp.arange(self.num_sinks)
    rows = sinks - state.used
    new = ((rows >= 0) & (rows < keys.shape[0]))[:, None]
    rows = jnp.clip(rows, 0, keys.shape[0] - 1)
    return (
      sinks,
      jnp.where(new, keys[rows], state.sink_keys),
      jnp.where(new, values[rows], state.sink_values),
    )

  def _read_exactly(self, query, keys, values, seen) -> Reading:
    weights, log_scale = coefficients.scores(self.kernel, query, keys, seen)
    rows = widen(moments.visible(values, seen))
    return Reading(product(weights, rows), jnp.sum(weights), log_scale)


def _read_rows(phi, query, rows, labels, seen) -> Reading:
  query_scale, query_features = moments.scaled_query(phi, query)
  log_scale, found = rows
  neutral = moments.zero_log_scale(log_scale.dtype)
  exponent = jnp.where(seen[:, None], log_scale + query_scale[None], neutral)
  top = moments.largest(exponent)
  terms = jnp.exp(exponent - top) * found * query_features[None]
  weights = jnp.where(seen, jnp.sum(terms, axis=1), 0)
  return Reading(
    product(weights, widen(moments.visible(labels, seen))),
    jnp.sum(weights),
    top,
  )
