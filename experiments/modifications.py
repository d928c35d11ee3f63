"""Modified attentions against the plain layer, with honest statistics."""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from experiments import equivalence_training as base
from experiments import harness
from experiments import modifications_checks as checks
from experiments import modifications_evaluation as evaluation
from experiments import modifications_figures as figures
from experiments import modifications_panels as panels
from experiments import modifications_report as report
from experiments import modifications_statistics as statistics
from experiments import modifications_training as training
from iclcl_jax import _validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the experiment; the defaults are the paper's, where known.

  Raises:
    ValueError: if a value is out of range; the message names the flag.
  """

  seed: int = harness.option(0, 'root of all random numbers')
  num_seeds: int = harness.option(
    10, 'independent runs, at least 3; fewer than 10 decide no claim'
  )
  num_demonstrations: int = harness.option(15, 'demonstrations N of a prompt')
  longer_num_demonstrations: int = harness.option(
    31, 'N of the test with other prompts than in training'
  )
  input_scale: float = harness.option(
    1.5, 'factor of the inputs in the test with larger inputs'
  )
  input_distribution: str = harness.option(
    'uniform', f'inputs s: {" or ".join(base.INPUTS)}'
  )
  multi_task: bool = harness.option(False, 'a fresh B for every prompt')
  num_epochs: int = harness.option(100, 'epochs of training')
  early_epochs: int = harness.option(
    20, 'the first ones, for the speed; the last ones choose learning rates'
  )
  tokens_per_epoch: int = harness.option(
    1024, 'an epoch has this many tokens, whatever N'
  )
  learning_rate: float = harness.option(
    0.0, 'the fixed rate; 0 for that of the input distribution'
  )
  rate_factors: tuple[float, ...] = harness.option(
    (1.0, 10.0, 30.0), 'rates to choose from, as multiples of the fixed one'
  )
  num_features: int = harness.option(1200, 'positive random features R')
  num_test_prompts: int = harness.option(128, 'prompts of a test and seed')
  strengths: tuple[float, ...] = harness.option(
    (0.5, 0.1), 'absolute values of alpha of the regularised layers'
  )
  negative_counts: tuple[int, ...] = harness.option((1, 3), 'negatives k')
  negative_strengths: tuple[float, ...] = harness.option(
    (0.1, 0.5), 'strengths beta of the negatives'
  )
  own_token_may_be_negative: bool = harness.option(
    False, "the query's own token may be a negative"
  )
  block_epochs: int = harness.option(20, 'epochs between checkpoints')

  def __post_init__(self):
    _validate.check_count('num_seeds', self.num_seeds, minimum=3)
    _validate.check_count('seed', self.seed, minimum=0)
    for name in (
      'num_demonstrations',
      'longer_num_demonstrations',
      'num_epochs',
      'early_epochs',
      'num_features',
      'num_test_prompts',
      'block_epochs',
    ):
      _validate.check_count(name, getattr(self, name))
    _validate.check_scalar('input_scale', self.input_scale, minimum=1e-3)
    _validate.check_scalar('learning_rate', self.learning_rate, minimum=0)
    _validate.check_count(
      'tokens_per_epoch',
      self.tokens_per_epoch,
      minimum=self.num_demonstrations + 1,
    )
    if self.early_epochs > self.num_epochs:
      raise ValueError(
        f'early_epochs is {self.early_epochs}; expected at most num_epochs, '
        f'{self.num_epochs}.'
      )
    self._check_layers()
    if self.input_distribution not in base.INPUTS:
      raise ValueError(
        f'input_distribution is {self.input_distribution!r}; expected '
        f'{" or ".join(map(repr, base.INPUTS))}.'
      )
    if self.learning_rate == 0:
      rate = base.INPUTS[self.input_distribution][1]
      object.__setattr__(self, 'learning_rate', rate)

  def _check_layers(self):
    for name in (
      'rate_factors',
      'strengths',
      'negative_strengths',
      'negative_counts',
    ):
      values = getattr(self, name)
      if not values or len(set(values)) < len(values):
        raise ValueError(
          f'{name} is {values}; expected one or more distinct numbers.'
        )
      for value in values:
        if name != 'negative_counts':
          _validate.check_scalar(name, value, minimum=1e-6)
        elif not 1 <= value <= self.num_demonstrations - 1:
          raise ValueError(
            f'{name} is {values}; expected counts from 1 to '
            f'num_demonstrations - 1, {self.num_demonstrations - 1}.'
          )
    if 1.0 not in self.rate_factors:
      raise ValueError(
        f'rate_factors is {self.rate_factors}; expected 1 among them, the '
        'fixed rate.'
      )


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment; resumes if `workdir` holds a part of it.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary, as written to `summary.json`.

  Raises:
    ValueError: if `workdir` cannot be used, or the plain layer diverges.
  """
  start_time = time.perf_counter()
  folder = harness.open_workdir(config, workdir)
  all_panels = panels.panels(config)
  start = training.init(config)
  tests = evaluation.draw_tests(config, start)

  def measure(panel):
    return evaluation.measure(config, start, panel, tests, folder)

  # Two panels at a time: one alone leaves a core idle. The longest first.
  order = sorted(all_panels, key=lambda panel: -len(panel.names))
  with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
    futures = {panel.name: pool.submit(measure, panel) for panel in order}
    results = {p.name: futures[p.name].result() for p in all_panels}
  data = {
    name: statistics.measured(config, result)
    for name, result in results.items()
  }
  identity = checks.residual_identity(config, start, all_panels, results, tests)
  summary = report.summarise(config, all_panels, data, identity)
  figures.save(config, all_panels, data, summary, folder)
  harness.write_metrics(folder, report.metrics(config, all_panels, data))
  summary['seconds'] = time.perf_counter() - start_time
  summary = dict(harness.write_summary(folder, summary))
  print(report.text(summary))
  return summary


if __name__ == '__main__':
  harness.run_binary(Config, run)
