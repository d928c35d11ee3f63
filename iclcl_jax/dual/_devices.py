"""States and readings of several devices, inside `jax.shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp

from iclcl_jax import moments
from iclcl_jax._door import door
from iclcl_jax._mesh import gather, vary_as
from iclcl_jax.precision import widen
from iclcl_jax.types import (
  DualState,
  FixedKernelDualState,
  KernelDualState,
  Reading,
  State,
)


@door
def all_merge(
  state: State | Reading,
  axis_name: str | tuple[str, ...],
) -> State | Reading:
  r"""Merges what the devices along an axis of the mesh have seen.

  One gradient step on sharded demonstrations is the all-reduce of the gradient:
  :math:`(d_v + 2) R` numbers, however many demonstrations there are. A kernel's
  state holds the demonstrations, so merging gathers them all. Queries that all
  devices know can read the states first (`dual.read`): merged readings cost
  :math:`d_v + 2` numbers a query, and are attention to all keys, that of the
  exact softmax too. The result is the same on every device.

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
  if isinstance(state, KernelDualState | FixedKernelDualState):
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

  Example:
    >>> phi, x = features.EluPlusOneFeatures(), jnp.ones((4, 2))
    >>> def past(keys):
    ...   return dual.prefix_merge(dual.zero_shot(phi, keys, keys), 'devices')
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh, split = jax.make_mesh((1,), ('devices',), auto), jax.P('devices')
    >>> specs = {'in_specs': split, 'out_specs': split}
    >>> jax.shard_map(past, mesh=mesh, **specs)(x).mass.tolist()
    [0.0, 0.0]

  References:
    Hillis & Steele, Data parallel algorithms, 1986 (the prefix sum).
  """
  size = jax.lax.axis_size(axis_name)
  index = jax.lax.axis_index(axis_name)
  state = vary_as(state, index)
  if isinstance(state, KernelDualState | FixedKernelDualState):
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
