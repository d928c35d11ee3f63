"""Random tasks, drawn cheaply enough for training.

Evaluation draws from `jax.random`. Training needs a thousand million numbers,
and there `jax.random` would take longer than the training itself, so every
number has a lane: a xorshift generator of 32 bits with a multiplicative output
(Marsaglia, J. Stat. Softw. 8(14), 2003; Vigna, arXiv:1402.6246), seeded by
`jax.random.bits`, of which only the upper bits are used.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax.types import Array, Float


class Tasks(NamedTuple):
  """Prompts of in-context regression.

  Attributes:
    tokens: rows `(x_i, y_i)`, then `(x_q, 0)`. Shape `[B, N + 1, d_x + 1]`.
    targets: the labels of the queries. Shape `[B, 1]`.
  """

  tokens: Float[Array, 'B M D']
  targets: Float[Array, 'B 1']


class Source(NamedTuple):
  """Where the tasks of a training come from.

  Attributes:
    num_lanes: uniform numbers that a task takes, by shape.
    make: `(U(-1, 1) numbers [B, *num_lanes]) -> Tasks`.
  """

  num_lanes: tuple[int, ...]
  make: Callable[[Array], Tasks]


def linear_source(config) -> Source:
  """Linear tasks: inputs uniform, weights normal."""

  def make(uniform):
    edge = jnp.float32(1 - 2**-23)
    normal = jax.lax.erf_inv(jnp.clip(uniform[:, -1], min=-edge, max=edge))
    inputs = config.half_range * uniform[:, :-1]
    return label(inputs, jnp.float32(2**0.5) * normal)

  return Source((config.num_demonstrations + 2, config.d_x), make)


def sine_source(num_demonstrations: int, phase_lane: int) -> Source:
  """Sine waves `A sin(x + phase)`: A of U(.1, .5), phase of U(0, pi).

  Args:
    num_demonstrations: of each task.
    phase_lane: number that the phase is made of: -1 for one of its own, -2 for
      that of the amplitude, so that one fixes the other, as in the released
      code.

  Returns:
    The source, inputs from U(-5, 5).
  """

  def make(uniform):
    inputs = 5 * uniform[:, :-2]
    amplitude = 0.3 + 0.2 * uniform[:, -2:-1]
    phase = math.pi / 2 * (1 + uniform[:, phase_lane][:, None])
    labels = amplitude * jnp.sin(inputs + phase)
    visible = labels.at[:, -1].set(0)
    return Tasks(jnp.stack([inputs, visible], axis=2), labels[:, -1:])

  return Source((num_demonstrations + 3,), make)


def label(inputs: Float[Array, 'B M d_x'], weights) -> Tasks:
  """Labels inputs, and hides the label of the last."""
  labels = jnp.sum(inputs * weights[:, None], axis=2)
  visible = labels.at[:, -1].set(0)
  tokens = jnp.concatenate([inputs, visible[..., None]], axis=2)
  return Tasks(tokens, labels[:, -1:])


def draw(key, count: int, config) -> Tasks:
  """Draws tasks for evaluation: inputs uniform, weights normal."""
  key_inputs, key_weights = jax.random.split(key)
  shape = count, config.num_demonstrations + 1, config.d_x
  half = config.half_range
  inputs = jax.random.uniform(
    key_inputs, shape, jnp.float32, minval=-half, maxval=half
  )
  weights = jax.random.normal(key_weights, (count, config.d_x), jnp.float32)
  return label(inputs, weights)


def init_lanes(key, batch_size: int, source: Source) -> Array:
  """Seeds a lane for every number of a batch. Shape `[B, *num_lanes]`."""
  bits = jax.random.bits(key, (batch_size, *source.num_lanes), jnp.uint32)
  lanes = jnp.maximum(bits, jnp.uint32(1))  # 0 would stay 0.
  for _ in range(8):
    lanes = _advance(lanes)
  return lanes


def draw_lanes(lanes: Array, source: Source) -> tuple[Array, Tasks]:
  """Draws a batch for training, and moves the lanes on."""
  lanes = _advance(lanes)
  upper = (lanes * jnp.uint32(0x9E3779B1)) >> jnp.uint32(8)
  # The middle of each of the 2^24 cells: symmetric. Rounding may reach 1.
  uniform = (upper.astype(jnp.float32) + 0.5) * jnp.float32(2**-23) - 1
  return lanes, source.make(uniform)


def draw_from(key, count: int, source: Source) -> Tasks:
  """Draws tasks of a source for evaluation."""
  shape = count, *source.num_lanes
  uniform = jax.random.uniform(key, shape, jnp.float32, minval=-1)
  return source.make(uniform)


def _advance(lanes: Array) -> Array:
  lanes = lanes ^ (lanes << jnp.uint32(13))
  lanes = lanes ^ (lanes >> jnp.uint32(17))
  return lanes ^ (lanes << jnp.uint32(5))
