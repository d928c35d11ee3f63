r"""The generalisation bound of the dual model: how large is the gap really?

Theorem 3.2 bounds, for all weights of a ball at once, the gap between the
representation loss `L(W) = E[-v . W phi(k)]` and its mean over N
demonstrations. The gap is linear in `W`, so its supremum over the ball is
known in closed form; it is measured here with exact expectations, for random
features and for the exact softmax kernel, and set beside the bound with
explicit constants, the Rademacher complexity by Monte Carlo, and the published
order of magnitude with its factor of the output dimension::

  python -m experiments.generalization --workdir=out/generalization

It takes 50 s of CPU time, much of it compilation, spread over two cores.
Numbers to expect (10 seeds, 20 samples of each, 95 % intervals)::

  slope of the gap in N, random features          -.51 [-.51, -.50]
  slope of the gap in N, exact softmax kernel     -.51 [-.52, -.50]
  gap over w sqrt(E[|v|^2 k(k,k)] / N)            .98 [.96, .99]
  Monte-Carlo complexity over its closed form     .98 [.98, .99]
  largest gap found / bound, 309600 weights       .018 (complexity term: 1.0)
  slope of the gap in d_v, Frobenius ball         .02 [.01, .03]
  slope of the gap in d_v, spectral ball          .30 [.29, .31]
  slope of Tr K / N in N, bounded keys            -.002 [-.006, .002]
  the same where the mean of k(k, k) is infinite  .71 [.56, .87]
  slope of the gap in N there                     -.15 [-.29, -.01]

References:
  Ren & Liu, arXiv:2310.13220v2, Theorem 3.2.
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import generalization_claims as claims_of
from experiments import generalization_data as data
from experiments import generalization_figures as figures
from experiments import generalization_measure as measure
from experiments import generalization_summary as summary_of
from experiments import harness
from iclcl_jax import _validate

MAX_SIZE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the experiment.

  Raises:
    ValueError: if a value is out of range; the message names the flag.
  """

  seed: int = harness.option(0, 'root of all random numbers')
  num_seeds: int = harness.option(10, 'distributions and maps, at least 5')
  num_samples: int = harness.option(20, 'samples of demonstrations a seed')
  num_demonstrations: tuple[int, ...] = harness.option(
    (16, 32, 64, 128, 256, 512), 'sizes N, at least 3, increasing'
  )
  width: int = harness.option(4, 'width d_v of values where N varies')
  widths: tuple[int, ...] = harness.option(
    (1, 4, 16, 64), 'widths d_v at one N, at least 3, increasing'
  )
  width_demonstrations: int = harness.option(256, 'that N')
  num_features: int = harness.option(200, 'positive random features R')
  num_signs: int = harness.option(32, 'sign vectors of a Monte-Carlo estimate')
  num_sign_samples: int = harness.option(
    4, 'samples of a seed that get one, at most'
  )
  num_weights: int = harness.option(256, 'random weights tried on each sample')
  delta: float = harness.option(0.05, 'probability of failure of the bound')
  heavy_scale: float = harness.option(
    1.2, 'standard deviation of keys of infinite mean kernel, at least 1'
  )
  num_traces: int = harness.option(20, 'runs of the trace, at least 5')
  trace_demonstrations: int = harness.option(65536, 'largest N of the trace')

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    for name in ('num_seeds', 'num_traces'):
      _validate.check_count(name, getattr(self, name), minimum=5)
    for name, minimum in (
      ('num_samples', 2),
      ('width', 1),
      ('width_demonstrations', 1),
      ('num_features', 1),
      ('num_signs', 1),
      ('num_sign_samples', 1),
      ('num_weights', 2),
    ):
      _validate.check_count(name, getattr(self, name), minimum=minimum)
    for name in ('num_demonstrations', 'widths'):
      _check_increasing(name, getattr(self, name))
    self._check_ranges()

  def _check_ranges(self):
    if not 0 < self.delta < 1:
      raise ValueError(
        f'delta is {self.delta:g}; expected a probability in (0, 1).'
      )
    # 2 s^2 >= sqrt(d_k): the mean of k(k, k) is infinite.
    smallest = (data.KEY_DIM**0.5 / 2) ** 0.5
    _validate.check_scalar('heavy_scale', self.heavy_scale, minimum=smallest)
    _validate.check_count(
      'trace_demonstrations',
      self.trace_demonstrations,
      minimum=max(64, *self.num_demonstrations),
    )


def _check_increasing(name: str, sizes: tuple[int, ...]) -> None:
  for size in sizes:
    _validate.check_count(name, size)
  if len(sizes) < 3 or list(sizes) != sorted(set(sizes)):
    raise ValueError(
      f'{name} is {",".join(map(str, sizes))}; expected at least three '
      'increasing counts, such as 16,64,256.'
    )
  if sizes[-1] > MAX_SIZE:
    raise ValueError(f'{name} reaches {sizes[-1]}; expected <= {MAX_SIZE}.')


def draw(
  config: Config,
) -> tuple[data.Setting, dict[int, measure.Samples], measure.Samples]:
  """Draws settings `[S, ...]`, samples by N, and those of the largest width."""
  root = jax.random.key(config.seed)

  def settings(seed):
    key = jax.random.fold_in(jax.random.fold_in(root, seed), 0)
    width = max(config.width, *config.widths)
    return data.draw_setting(key, width, config.num_features)

  def samples(number, *, size, width):
    seed, fold = number[0], number[1]
    key = jax.random.fold_in(jax.random.fold_in(root, seed), fold)
    return data.draw_demonstrations(key, config.num_samples, size, width)

  def draw_all(folds, size, width):
    numbers = np.stack(np.meshgrid(seeds, folds), axis=-1)
    fn = functools.partial(samples, size=size, width=width)
    mapped = harness.compile_quickly(lambda x: jax.lax.map(fn, x))
    drawn = jax.device_get(mapped(numbers.reshape(-1, 2)))
    return [
      measure.Samples(
        *(x.reshape(*numbers.shape[:2], *x.shape[1:])[i] for x in drawn)
      )
      for i in range(len(folds))
    ]

  seeds = np.arange(config.num_seeds)
  drawn = harness.compile_quickly(lambda x: jax.lax.map(settings, x))(seeds)
  sizes = config.num_demonstrations
  by_size = {
    size: jax.tree.map(lambda x, size=size: x[:, :, :size], samples)
    for size, samples in zip(
      sizes, draw_all(sizes, max(sizes), config.width), strict=True
    )
  }
  (wide,) = draw_all(
    (MAX_SIZE + 1,), config.width_demonstrations, max(config.widths)
  )
  return jax.device_get(drawn), by_size, wide


def measure_size(
  config: Config, settings: data.Setting, samples: measure.Samples
) -> dict[str, Any]:
  """Everything at one N: arrays `[S, D]` by map or kernel and by quantity."""
  settings = data.narrower(settings, config.width)
  population = data.population(settings)
  few = jax.tree.map(lambda x: x[:, : config.num_sign_samples], samples)
  key = jax.random.key(config.seed)
  functions = {
    'features': measure.feature_gap,
    'softmax': measure.kernel_gap,
  }
  result: dict[str, Any] = {
    name: measure.over_seeds(fn)(settings, population, samples)
    for name, fn in functions.items()
  }

  def complexity(setting, population, inputs, signs):
    del population
    phi = data.feature_map(setting.projection)
    return measure.monte_carlo(
      key, phi, setting.mixing, inputs, signs, config.num_signs
    )

  def tried(setting, population, inputs, signs):
    # Fresh weights for each sample, from its own bits.
    own = jax.random.fold_in(
      key, jax.lax.bitcast_convert_type(inputs[0, 0], np.uint32)[0]
    )
    return measure.search(
      own, setting, population, inputs, signs, config.num_weights
    )

  result['complexity'] = measure.over_seeds(complexity)(
    settings, population, few
  )
  result['search'] = measure.over_seeds(tried)(settings, population, samples)
  return jax.device_get(result)


def measure_width(
  config: Config, settings: data.Setting, samples: measure.Samples, width: int
) -> dict[str, Any]:
  """The gap at one width: the first rows of the same B and the same signs."""
  settings = data.narrower(settings, width)
  samples = samples._replace(signs=samples.signs[..., :width])
  population = data.population(settings)
  gap = measure.over_seeds(measure.both_gaps)
  return jax.device_get(gap(settings, population, samples))


def measure_traces(config: Config) -> dict[str, Any]:
  """Traces and gaps of bounded, light and heavy keys `[S, ...]`."""
  run = functools.partial(
    measure.unsettled,
    scales=summary_of.scales(config),
    sizes=summary_of.trace_sizes(config),
    gap_sizes=config.num_demonstrations,
  )
  root = jax.random.fold_in(jax.random.key(config.seed), config.num_seeds)

  def one(seed):
    return run(jax.random.fold_in(root, seed))

  seeds = np.arange(config.num_traces)
  mapped = harness.compile_quickly(lambda x: jax.lax.map(one, x))
  return jax.device_get(mapped(seeds))


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary, as written to `summary.json`.

  Raises:
    ValueError: if `workdir` cannot be used.
  """
  start = time.perf_counter()
  folder = harness.open_workdir(config, workdir)
  with (
    harness.float64_on_host(),
    concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool,
  ):
    settings, samples, wide = draw(config)

    def submit(fn, *arguments):
      return pool.submit(_in_float64, fn, config, *arguments)

    traces = submit(measure_traces)
    by_size = {
      size: submit(measure_size, settings, samples[size])
      for size in reversed(config.num_demonstrations)
    }
    by_width = {
      width: submit(measure_width, settings, wide, width)
      for width in config.widths
    }
    results = summary_of.Results(
      settings=settings,
      by_size={size: by_size[size].result() for size in sorted(by_size)},
      by_width={width: x.result() for width, x in by_width.items()},
      traces=traces.result(),
    )
  summary = summary_of.summarise(
    config, results, claims_of.judge(config, results)
  )
  harness.write_metrics(folder, summary_of.metrics(config, results))
  summary['figures'] = figures.draw(config, results, summary, folder)
  summary['seconds'] = {'total': time.perf_counter() - start}
  summary = dict(harness.write_summary(folder, summary))
  print(summary_of.text(summary))
  return summary


def _in_float64(fn, *arguments):
  """Settings of JAX belong to a thread."""
  with harness.float64_on_host():
    return fn(*arguments)


if __name__ == '__main__':
  harness.run_binary(Config, run)
