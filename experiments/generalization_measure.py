r"""What `experiments.generalization` measures, as pure functions of one seed.

The gap between the representation loss and its mean over N demonstrations is
linear in the weights, so its supremum over a ball is a norm (`bounds`), with
the expectation known exactly (`generalization_data`). The radius is 1: every
term is proportional to it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import generalization_data as data
from experiments import harness
from iclcl_jax import bounds, kernels
from iclcl_jax.types import Array, DualState, Float

RADIUS = 1.0
FROBENIUS_ONLY = {'supremum': bounds.FROBENIUS}
BALLS = FROBENIUS_ONLY | {'spectral': bounds.SPECTRAL}


class Samples(NamedTuple):
  """Demonstrations of several samples of one seed.

  Attributes:
    inputs: the keys. Shape `[D, N, d_k]`.
    signs: the noise of the values. Shape `[D, N, d_v]`.
  """

  inputs: Float[Array, 'D N d_k']
  signs: Float[Array, 'D N d_v']


def feature_gap(
  setting: data.Setting,
  population: DualState,
  inputs: Float[Array, 'N d_k'],
  signs: Float[Array, 'N d_v'],
) -> dict[str, Array]:
  """Supremum and bounds for one sample, random features."""
  phi = data.feature_map(setting.projection)
  values = data.values(setting.mixing, inputs, signs)
  sample = bounds.mean_embedding(phi, inputs, values)
  return _suprema(phi, population, sample, FROBENIUS_ONLY) | _terms(
    phi, inputs, values
  )


def both_gaps(
  setting: data.Setting,
  population: DualState,
  inputs: Float[Array, 'N d_k'],
  signs: Float[Array, 'N d_v'],
) -> dict[str, Array]:
  """The same, and the supremum over the ball of the spectral norm."""
  phi = data.feature_map(setting.projection)
  values = data.values(setting.mixing, inputs, signs)
  sample = bounds.mean_embedding(phi, inputs, values)
  return _suprema(phi, population, sample, BALLS) | _terms(phi, inputs, values)


def _suprema(phi, population, sample, balls) -> dict[str, Array]:
  return {
    name: bounds.gap_supremum(
      phi, population, sample, radius=RADIUS, ball=ball
    ).value
    for name, ball in balls.items()
  }


def kernel_gap(
  setting: data.Setting,
  population: DualState,
  inputs: Float[Array, 'N d_k'],
  signs: Float[Array, 'N d_v'],
) -> dict[str, Array]:
  """Supremum and bounds for one sample, exact softmax kernel.

  The square of the norm of the difference of the means, in three parts.
  """
  del population
  kernel = kernels.ExponentialKernel()
  values = data.values(setting.mixing, inputs, signs)
  means = jax.vmap(data.kernel_mean, (None, 0))(setting.mixing, inputs)
  cross = jnp.mean(jnp.sum(values * means, axis=1))
  square = data.kernel_mean_square() - 2 * cross
  square = square + _kernel_norm(kernel, inputs, values) ** 2
  return {'supremum': RADIUS * jnp.sqrt(square)} | _terms(
    kernel, inputs, values
  )


def _kernel_norm(kernel, inputs, values, mask=None):
  """The norm of the mean embedding of one sample."""
  sample = bounds.mean_embedding(kernel, inputs, values, mask=mask)
  nothing = bounds.mean_embedding(kernel, inputs[:1], 0 * values[:1])
  return bounds.gap_supremum(kernel, nothing, sample, radius=1.0).value


def _terms(phi, inputs, values) -> dict[str, Array]:
  """Complexity term of the bound, and the one of the published form, d = 1."""
  bound = bounds.rademacher_bound(phi, inputs, values, radius=RADIUS)
  published = bounds.published_bound(
    phi, inputs, radius=RADIUS, value_bound=1.0, dimension_factor=1.0, delta=0.1
  )
  return {'bound': bound.value, 'trace_term': published.complexity.value}


def monte_carlo(
  key: Array,
  phi: Any,
  mixing: Float[Array, 'd_v d_k'],
  inputs: Float[Array, 'N d_k'],
  signs: Float[Array, 'N d_v'],
  num_signs: int,
) -> Float[Array, '']:
  """Monte-Carlo estimate of the empirical Rademacher complexity."""
  values = data.values(mixing, inputs, signs)
  draws = bounds.rademacher_draws(
    key, phi, inputs, values, radius=RADIUS, num_draws=num_signs
  )
  return jnp.mean(draws.value)


def search(
  key: Array,
  setting: data.Setting,
  population: DualState,
  inputs: Float[Array, 'N d_k'],
  signs: Float[Array, 'N d_v'],
  num_weights: int,
) -> dict[str, Array]:
  """Searches the ball for weights whose gap is large.

  Gaussian directions, directions `u phi(x)^T` of rank one, the weights that
  one gradient step on the demonstrations finds, and the worst ones in closed
  form; the last two through both losses, which share no code with the
  supremum.
  """
  phi = data.feature_map(setting.projection)
  values = data.values(setting.mixing, inputs, signs)
  sample = bounds.mean_embedding(phi, inputs, values)
  mean = _weights(sample)
  difference = mean - population.weights
  key_normal, key_values, key_inputs = jax.random.split(key, 3)
  count = num_weights // 2
  gaussian = jax.random.normal(key_normal, (count, *mean.shape), mean.dtype)
  left = jax.random.normal(key_values, (count, mean.shape[0]), mean.dtype)
  right = jax.random.uniform(
    key_inputs, (count, inputs.shape[1]), mean.dtype, -1.0, 1.0
  )
  rank_one = left[:, :, None] * jax.vmap(phi)(right)[:, None, :]

  def gaps(directions):
    norms = jnp.sqrt(jnp.sum(directions**2, axis=(1, 2)))
    products = jnp.sum(directions * difference[None], axis=(1, 2))
    return RADIUS * jnp.max(products / norms)

  def through_losses(direction):
    weights = RADIUS * direction / jnp.linalg.norm(direction)
    zeros = jnp.zeros(weights.shape[1], weights.dtype)
    state = DualState(weights, zeros, zeros)
    return bounds.expected_loss(
      phi, state, population
    ) - bounds.representation_loss(phi, state, inputs, values)

  return {
    'gaussian': gaps(gaussian),
    'rank_one': gaps(rank_one),
    'one_step': through_losses(mean),
    'worst': through_losses(difference),
  }


def _weights(state: Any) -> Float[Array, 'd_v R']:
  """The weights of a state, without their scale."""
  return state.weights * jnp.exp(state.log_scale)[None]


def over_seeds(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles `fn(setting, population, inputs, signs)` for all samples `[S, D]`.

  One sample at a time: `lax.map` over samples and seeds.
  """

  def seed(arguments):
    setting, population, samples = arguments
    return jax.lax.map(lambda x: fn(setting, population, *x), samples)

  def mapped(settings, populations, samples):
    return jax.lax.map(seed, (settings, populations, samples))

  return harness.compile_quickly(mapped)


def running_log_trace(
  keys: Float[Array, 'N d_k'], sizes: Any
) -> Float[Array, ' _']:
  """Log of the mean of `k(k, k)` over the first keys, for several counts."""
  logs = bounds.log_diagonal(kernels.ExponentialKernel(), keys)
  top = jnp.max(logs)
  sums = jnp.cumsum(jnp.exp(logs - top))[np.asarray(sizes) - 1]
  return top + jnp.log(sums / np.asarray(sizes, float))


def unsettled(
  key: Array,
  *,
  scales: Mapping[str, float],
  sizes: Any,
  gap_sizes: Any,
) -> dict[str, dict[str, Array]]:
  """Traces and gaps of keys uniform in a cube and normal with some scales.

  Values are independent signs, whose mean embedding vanishes, so that the gap
  is the norm of that of the sample.

  Args:
    key: consumed.
    scales: standard deviation of normal keys by name, 0 for uniform ones.
    sizes: numbers of keys of the traces, increasing.
    gap_sizes: numbers of keys of the gaps.

  Returns:
    `{name: {'log_trace': [...], 'gap': [...]}}`.
  """
  shape = int(max(sizes)), data.KEY_DIM
  largest = int(max(gap_sizes))
  kernel = kernels.ExponentialKernel()
  key_uniform, key_normal, key_signs = jax.random.split(key, 3)
  uniform = jax.random.uniform(key_uniform, shape, jnp.float64, -1.0, 1.0)
  normal = jax.random.normal(key_normal, shape, jnp.float64)
  signs = jax.random.rademacher(key_signs, (largest, 1), jnp.float64)

  def regime(scale):
    keys = jnp.where(scale > 0, scale * normal, uniform)

    def gap(size):
      shown = jnp.arange(largest) < size
      return _kernel_norm(kernel, keys[:largest], signs, shown)

    return {
      'log_trace': running_log_trace(keys, sizes),
      'gap': jax.lax.map(gap, jnp.asarray(gap_sizes)),
    }

  found = jax.lax.map(regime, jnp.asarray(list(scales.values())))
  return {
    name: jax.tree.map(lambda x, i=i: x[i], found)
    for i, name in enumerate(scales)
  }
