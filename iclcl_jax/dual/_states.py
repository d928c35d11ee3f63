"""States are read, merged, over devices too, and demonstrations removed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, attention, coefficients, moments
from iclcl_jax._door import door, eager_door
from iclcl_jax._mesh import gather, vary_as
from iclcl_jax._program import compiled
from iclcl_jax.forms import form_of
from iclcl_jax.precision import cast_like, widen
from iclcl_jax.types import (
  Array,
  DualState,
  FeatureMap,
  Float,
  Kernel,
  KernelDualState,
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
  token. For many queries, `jax.vmap`, or `jax.lax.map` with a `batch_size`.

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

  Readings of one query merge where states of two forms do not.

  Example:
    >>> kernel, x = kernels.ExponentialKernel(), jnp.zeros((2, 4))
    >>> state = dual.zero_shot(kernel, x, jnp.ones((2, 1)))
    >>> dual.read(kernel, state, jnp.ones(4)).denominator.tolist()
    2.0
  """
  return form_of(phi, state).read(phi, state, query)


@door
def merge(a: State, b: State) -> State:
  """Adds two states that saw different tokens through the same `phi`.

  A state does not know its `phi`: two projections of equal shape cannot be told
  apart here, and their sum means nothing.

  Example:
    >>> phi = features.EluPlusOneFeatures()
    >>> state = dual.zero_shot(phi, jnp.ones((1, 4)), jnp.ones((1, 2)))
    >>> dual.merge(state, state).mass.tolist()
    [2.0, 2.0, 2.0, 2.0]
  """
  if type(a) is not type(b):
    raise ValueError(
      f'a is {_validate.kind_of(a)}, b {_validate.kind_of(b)}; expected states '
      'of the same phi.'
    )
  form = moments if isinstance(a, DualState) else coefficients
  return form.merge(a, b)


class Removal(NamedTuple):
  """A state without one demonstration, and how rounding errors have grown."""

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
  Outside it is a `ValueError` if no digit is left (the mass is lost), or a
  kernel's state has no such row. A feature map's state keeps none to find.

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


@door
def all_merge(
  state: State | Reading, axis_name: str | tuple[str, ...]
) -> State | Reading:
  r"""Merges what the devices along an axis of the mesh have seen.

  One gradient step on sharded demonstrations is the all-reduce of the gradient:
  :math:`(d_v + 2) R` numbers, however many demonstrations there are. A kernel's
  state is gathered whole; but queries that all devices know can read the states
  first (`dual.read`), and merged readings cost :math:`d_v + 2` numbers a query.
  The result is the same on every device.

  Example:
    >>> phi, x = features.EluPlusOneFeatures(), jnp.ones((4, 2))
    >>> def learn(keys):
    ...   return dual.all_merge(dual.zero_shot(phi, keys, keys), 'devices')
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh, split = jax.make_mesh((1,), ('devices',), auto), jax.P('devices')
    >>> specs = {'in_specs': split, 'out_specs': jax.P()}
    >>> jax.shard_map(learn, mesh=mesh, **specs)(x).mass.tolist()
    [4.0, 4.0]
  """
  state = vary_as(state, jax.lax.axis_index(axis_name))
  if isinstance(state, KernelDualState):
    return KernelDualState(*(gather(rows, axis_name) for rows in state[:3]))
  part: Any = widen(state)
  top = jax.lax.pmax(jax.lax.stop_gradient(part.log_scale), axis_name)
  if isinstance(state, Reading):
    shrink = jnp.exp(part.log_scale - top)
    sums = part.numerator * shrink, part.denominator * shrink
  else:
    sums = moments.rescale(part, top)[:2]
  first, second = jax.lax.psum(sums, axis_name)
  return type(state)(first, second, top)


@door
def prefix_merge(state: State, axis_name: str | tuple[str, ...]) -> State:
  r"""Merges what the devices before this one have seen.

  The devices along an axis hold the parts of a sequence in order. From its
  result, nothing on the first, `attention.causal_kernel_attention(...,
  start=...)` goes on. In
  :math:`1 + \lceil\log_2 P\rceil` steps a device sends its state,
  :math:`(d_v + 2) R` numbers, on to another. A kernel's state is gathered.

  References:
    Hillis & Steele, Data parallel algorithms, 1986 (the prefix sum).
  """
  size = jax.lax.axis_size(axis_name)
  index = jax.lax.axis_index(axis_name)
  state = vary_as(state, index)
  if isinstance(state, KernelDualState):
    keys, coefficients, mass = (gather(rows, axis_name) for rows in state[:3])
    devices = jnp.arange(size, dtype=index.dtype)
    is_past = jnp.repeat(devices < index, state.mass.shape[0])
    coefficients = jnp.where(is_past[:, None], coefficients, 0)
    return KernelDualState(keys, coefficients, jnp.where(is_past, mass, 0))
  merged: Any = widen(state)
  neutral = moments.zero_log_scale(merged.log_scale.dtype)

  def from_before(state, distance):
    pairs = [(i, i + distance) for i in range(size - distance)]
    received = jax.lax.ppermute(state, axis_name, pairs)
    nothing = DualState(0.0, 0.0, neutral)
    return jax.tree.map(
      lambda x, zero: jnp.where(index >= distance, x, zero), received, nothing
    )

  merged, distance = from_before(merged, 1), 1
  while distance < size:
    merged = moments.merge(merged, from_before(merged, distance))
    distance *= 2
  return merged
