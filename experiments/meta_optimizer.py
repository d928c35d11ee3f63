r"""Implicit finetuning: its identities, and its metrics on known answers.

The dual form of attention, the update by finetuned keys and values, the convex
mix of the softmax, and momentum attention are checked to rounding. Then the
metrics that compare learning in context with finetuning are applied to
synthetic activations whose relation is known: unrelated noise, a common loss of
the zero-shot output, an update that all queries share, an update of each
query's own::

  python -m experiments.meta_optimizer --workdir=out/meta_optimizer

It takes about 15 s of CPU time. Expect (10 repetitions) SimAOU .00 on noise and
.74 on a common loss, SimAOU normalised .03 on noise, SimAM .92 and Kendall .74
on unrelated updates, Rec2FTP 82 % for answers that have nothing to do with each
other, and residuals below 1e-15.

No model is trained: this says what the metrics can show, not what a language
model does.

References:
  Dai et al., arXiv:2212.10559; Deutch et al., arXiv:2311.07772.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import equivalence_figures, harness
from experiments import meta_optimizer_measure as measure
from experiments import meta_optimizer_report as report
from iclcl_jax import _validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  seed: int = harness.option(0, 'root of all random numbers')
  num_seeds: int = harness.option(10, 'repetitions, at least 5')
  num_queries: int = harness.option(32, 'queries of a repetition')
  width: int = harness.option(256, 'of an attention output')
  num_draws: int = harness.option(8, 'draws of a null')
  noise: float = harness.option(0.3, 'size of unrelated noise, over baseline')

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    _validate.check_count('num_seeds', self.num_seeds, minimum=5)
    _validate.check_count('num_queries', self.num_queries, minimum=8)
    _validate.check_count('width', self.width, minimum=8)
    _validate.check_count('num_draws', self.num_draws)
    _validate.check_scalar('noise', self.noise, minimum=0.01)
    if self.width % measure.NUM_HEADS:
      raise ValueError(
        f'width is {self.width}; expected a multiple of {measure.NUM_HEADS}, '
        'the number of heads.'
      )


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Measures, judges, draws.

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
    exact = harness.compile_quickly(lambda: measure.residuals(config.seed))()
    scores = harness.compile_quickly(
      lambda seeds: measure.scores(config, seeds)
    )(jnp.arange(config.num_seeds))
    exact, scores = jax.device_get((exact, scores))
  summary = report.summarise(config, exact, scores)
  summary['seconds'] = time.perf_counter() - start
  harness.write_metrics(path, report.metrics(scores))
  with equivalence_figures.style():
    harness.save_figure(path, 'metrics', report.figure(scores))
  summary = dict(harness.write_summary(path, summary))
  print(report.text(summary))
  return summary


if __name__ == '__main__':
  harness.run_binary(Config, run)
