r"""Softmax regression: does a trained attention layer take a gradient step?

Four parts. The closed forms and identities of softmax regression against
autodiff; the published bound on the shift of the target next to what is
observed and to the true constant; one gradient step with the best common rate,
against the number of words `n` and their width `d`; self-attention layers,
trained on the same tasks, against that step::

  python -m experiments.softmax_regression --workdir=out/softmax_regression

It takes about 100 s of CPU time, half of it compilation. Expect (10
repetitions, two softmax heads, n = 25, d = 20, after 320 steps) 1.08 times the
loss of the step in place and .94 times held out, Model cos .90 in both; at
n = 200, d = 20 a cosine of .30 between the two shifts, and loss ratios of one
step of .90 in place and .73 held out.

Two frames. `in place`: the target is drawn uniformly from the simplex, has
nothing to do with its document, and is predicted for the same words. `held
out`: a hidden vector makes the targets of two documents; one is given, the
other is asked for. Only the second rewards learning.

References:
  Li, Song, Xia, Yu & Zhou, arXiv:2304.13276.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import equivalence_figures, harness
from experiments import softmax_regression_figures as figures
from experiments import softmax_regression_measure as measure
from experiments import softmax_regression_report as report
from experiments import softmax_regression_training as training
from iclcl_jax import _validate

RADII = 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0
BOUND_SIZE = 20, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  seed: int = harness.option(0, 'root of all random numbers')
  num_seeds: int = harness.option(10, 'repetitions, at least 5')
  num_words: tuple[int, ...] = harness.option(
    (25, 100, 200), 'words n, at the middle width; ascending'
  )
  widths: tuple[int, ...] = harness.option(
    (5, 20, 50), 'widths d, at the largest number of words; ascending'
  )
  num_tasks: int = harness.option(
    100, 'tasks of a repetition, to choose the rate and again to judge it'
  )
  num_steps: int = harness.option(320, 'training steps')
  num_records: int = harness.option(16, 'records during training')
  learning_rate: float = harness.option(0.03, 'of Adam, decays to 0')
  words_per_batch: int = harness.option(800, 'tasks of a batch, times n')
  num_test: int = harness.option(16, 'test tasks of a trained layer')

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    _validate.check_count('num_seeds', self.num_seeds, minimum=5)
    for name in (
      'num_tasks',
      'num_steps',
      'num_records',
      'words_per_batch',
      'num_test',
    ):
      _validate.check_count(name, getattr(self, name))
    for name in ('num_words', 'widths'):
      sizes = getattr(self, name)
      for size in sizes:
        _validate.check_count(name, size, minimum=2)
      if list(sizes) != sorted(set(sizes)) or len(sizes) < 2:
        raise ValueError(
          f'{name} is {sizes}; expected at least two sizes, ascending.'
        )
    _validate.check_scalar('learning_rate', self.learning_rate, minimum=0)
    if self.num_steps % self.num_records:
      raise ValueError(
        f'num_steps is {self.num_steps}; expected a multiple of num_records, '
        f'{self.num_records}.'
      )


def sizes(config: Config) -> list[tuple[int, int]]:
  """Words and widths at which one gradient step is measured."""
  middle, most = config.widths[len(config.widths) // 2], config.num_words[-1]
  few = config.num_words[0]
  found = [(n, middle) for n in config.num_words]
  found += [(most, d) for d in config.widths] + [(few, config.widths[0])]
  return sorted(set(found))


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Measures, trains, judges, draws.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary.

  Raises:
    ValueError: if the workdir cannot be used.
  """
  start = time.perf_counter()
  path = harness.open_workdir(config, workdir)
  with harness.float64_on_host(), jax.default_matmul_precision('highest'):
    exact = jax.device_get(
      harness.compile_quickly(lambda: measure.residuals(config.seed))()
    )
    constants = jax.device_get(
      harness.compile_quickly(
        lambda radii: measure.constants(config.seed, *BOUND_SIZE, radii)
      )(jnp.asarray(RADII))
    )
  steps = {size: _one_step(config, size) for size in sizes(config)}
  runs = _train_all(config, steps)
  results = report.Results(exact, constants, RADII, steps, runs)
  summary = report.summarise(config, results)
  summary['seconds'] = time.perf_counter() - start
  harness.write_metrics(path, report.metrics(config, results))
  with equivalence_figures.style():
    for name, draw in figures.FIGURES.items():
      harness.save_figure(path, name, draw(config, results))
  summary = dict(harness.write_summary(path, summary))
  print(report.text(summary))
  return summary


def _one_step(config: Config, size: tuple[int, int]) -> Any:
  measured = harness.compile_quickly(lambda: measure.one_step(config, size))
  return jax.device_get(measured())


def _train_all(config: Config, steps: Mapping[Any, Any]) -> dict[Any, Any]:
  """Every layer at one size, and the published one at all trained sizes."""
  import tqdm

  few, middle = config.num_words[0], config.widths[len(config.widths) // 2]
  jobs = [(name, (few, middle)) for name in training.LAYERS]
  others = [(few, config.widths[0])]
  # The cost of a layer is quadratic in n: not at the largest.
  others += [(n, middle) for n in config.num_words[1:-1]]
  jobs += [(report.PUBLISHED, size) for size in others]
  runs = {}
  for name, size in tqdm.tqdm(jobs, desc='layers', unit='layer'):
    factor = steps[size]['rate_weights'].mean(axis=1)
    rates = jnp.asarray(factor * training.unit_rate(*size), float)
    fit = harness.compile_quickly(
      lambda rates, name=name, size=size: training.train(
        config, name, size, rates
      )
    )
    runs[name, size] = jax.device_get(fit(rates))
  return runs


if __name__ == '__main__':
  harness.run_binary(Config, run)
