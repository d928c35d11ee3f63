"""What happens where the mean of the kernel is infinite?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.generalization import bound, distribution
from experiments.lab import Config, figures as drawing
from iclcl_jax import bounds, kernels
from iclcl_jax.types import Array, Float

LIGHT_SCALE = 0.5


class Regime(NamedTuple):
  """Keys of one distribution, one run or all `[S, ...]`."""

  log_trace: Float[Array, ' _']  # Log of `Tr K / N`, by N.
  gap: Float[Array, ' _']  # Largest gap of independent signs, by N.


Results = Mapping[str, Regime]


def scales(config: Config) -> dict[str, float]:
  """Standard deviations of keys by regime; 0 for uniform in the cube."""
  return {'bounded': 0.0, 'light': LIGHT_SCALE, 'heavy': config.heavy_scale}


def sizes(config: Config) -> np.ndarray:
  """Numbers of keys of the running trace: powers of two."""
  top = int(np.log2(config.trace_demonstrations))
  return np.append(2 ** np.arange(4, top), config.trace_demonstrations)


@lab.float64_on_host()
def measure(config: Config) -> Results:
  """Traces and gaps of keys uniform in a cube and normal with some scales.

  Values are signs, so that the gap is the norm of the mean embedding.
  """
  root = jax.random.fold_in(jax.random.key(config.seed), config.num_seeds)
  counts, gap_sizes = sizes(config), config.num_demonstrations
  shape, largest = (int(max(counts)), distribution.KEY_DIM), max(gap_sizes)
  kernel = kernels.ExponentialKernel()

  def run(seed):
    key = jax.random.fold_in(root, seed)
    key_uniform, key_normal, key_signs = jax.random.split(key, 3)
    uniform = jax.random.uniform(key_uniform, shape, jnp.float64, -1.0, 1.0)
    normal = jax.random.normal(key_normal, shape, jnp.float64)
    signs = jax.random.rademacher(key_signs, (largest, 1), jnp.float64)

    def regime(scale):
      keys = jnp.where(scale > 0, scale * normal, uniform)

      def gap(size):
        # The mean over the first ones as one over all, of a fixed shape.
        shown = jnp.arange(largest)[:, None] < size
        share = largest / size.astype(signs.dtype)
        values = jnp.where(shown, signs * share, 0)
        return bound.kernel_norm(kernel, keys[:largest], values)

      gaps = jax.lax.map(gap, jnp.asarray(gap_sizes))
      return Regime(running_log_trace(keys, counts), gaps)

    return jax.lax.map(regime, jnp.asarray(list(scales(config).values())))

  seeds = np.arange(config.num_traces)
  found = lab.compute_each(run, seeds)
  return {
    name: jax.tree.map(lambda x, i=i: x[:, i], found)
    for i, name in enumerate(scales(config))
  }


def running_log_trace(keys: Float[Array, 'N d_k'], sizes: Any) -> Array:
  """Log of the mean of `k(k, k)` over the first keys, for several counts."""
  logs = bounds.log_diagonal(kernels.ExponentialKernel(), keys)
  top = jnp.max(logs)
  sums = jnp.cumsum(jnp.exp(logs - top))[np.asarray(sizes) - 1]
  return top + jnp.log(sums / np.asarray(sizes, float))


def claims(config: Config, results: Results) -> list[lab.Claim]:
  slopes = {
    name: bound.slope(sizes(config), np.exp(results[name].log_trace))
    for name in ('bounded', 'heavy')
  }
  rate = bound.slope(config.num_demonstrations, results['heavy'].gap)
  heavy = f"""normal keys of standard deviation {config.heavy_scale:g},
      unbounded and so outside the assumptions"""
  return bound.statements(
    f"""
    trace_bounded [THEOREM] the trace grows like N: bounded keys | slope of
      log(Tr K / N) against log N
    trace_heavy [THEOREM] the trace grows like N: {heavy} | slope of
      log(Tr K / N) against log N
    rate_heavy [THEOREM] the largest gap falls like N^-1/2: {heavy} | slope of
      log supremum against log N
    """,
    {
      'trace_bounded': lab.within(-0.02, 0.02, slopes['bounded']),
      'trace_heavy': lab.within(-0.02, 0.02, slopes['heavy']),
      'rate_heavy': lab.within(*bound.RATE, rate),
    },
  )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 2, figsize=(11, 5))
  looks = {
    'bounded': ('uniform in a cube', drawing.BLUE, '-', 's'),
    'light': (f'normal, s = {LIGHT_SCALE:g}', drawing.GREEN, '--', 'D'),
    'heavy': (f'normal, s = {config.heavy_scale:g}', drawing.ORANGE, ':', 'o'),
  }
  for name, (label, colour, line, marker) in looks.items():
    found = results[name]
    for axis, x, rows in (
      (axes[0], sizes(config), found.log_trace / np.log(10)),
      (axes[1], config.num_demonstrations, found.gap),
    ):
      axis.plot(x, rows.T, line, color=colour, lw=0.8, alpha=0.5)
      median = np.median(rows, axis=0)
      axis.plot(x, median, marker, ls=line, color=colour, label=label)
      axis.set_xlabel('number of demonstrations N')
  axes[0].set_xscale('log', base=2)
  axes[0].set_ylabel('log10 of Tr K / N')
  axes[0].set_title('mean of k(k, k) over the demonstrations')
  drawing.log_axes(axes[1], config.num_demonstrations)
  axes[1].set_ylabel('largest gap, Frobenius ball of radius 1')
  axes[1].set_title('largest gap')
  drawing.legend(axes[0], 3)
  _, trace, rate = (x.estimate.value for x in claims(config, results))
  caption = f"""Exact softmax kernel, {config.num_traces} runs (thin) and their
    median (markers). For bounded keys, and for normal keys of small standard
    deviation s, k(k, k) has a finite mean. For normal keys with 2 s^2 >=
    sqrt(d_k) its mean is infinite and the bound says nothing: Tr K / N scales
    with N to the power {trace:.2f}, and the largest gap (right; values are
    independent signs) {rate:.2f}, in jumps made by single keys."""
  return [lab.Figure('trace', figure, caption)]
