r"""Attention's learning process beside those that it is compared with.

On the same demonstrations, through the same features: the dual model's step on
the contrastive loss; the same model descending on the squared, InfoNCE and
cosine losses for many steps; SimSiam and BYOL, with and without their
safeguards; contrastive kernel learning. Where do they agree, and when do they
part? ::

  python -m experiments.learning_processes --workdir=out/learning_processes

It takes 32 s of CPU time, most of it compilation, over two cores. Numbers to
expect (16 seeds; random demonstrations, then those of a trained layer)::

  first steps that are attention   relative error 8e-15 or less
  answer after 10 steps, degrees from that after one
    squared                        28 [25, 32]     26 [19, 34]
    InfoNCE                        14 [11, 17]     29 [20, 38]
    cosine                         21 [16, 27]     15 [6, 24]
  the same after 200 steps
    squared                        50 [46, 55]     44 [33, 55]
    InfoNCE                        47 [41, 54]     56 [46, 67]
    cosine                         44 [35, 52]     31 [21, 42]
  spread of outputs, end / start
    SimSiam                        1.01            1.02
    without predictor              .58 [.55, .61]  .53 [.46, .60]
    without stop-gradient          .56 [.50, .62]  .54 [.42, .65]

So attention predicts the duals of other losses for one step, not for ten. Only
the contrastive loss repeats its step for ever. SimSiam without its safeguards
loses spread but does not collapse: with 15 tokens and a linear encoder both
views of all tokens can be aligned without becoming one point.

The demonstrations are random (N(0, 1) entries) and those of the papers' layer
after a short training. A seed is a layer, a feature map and a few prompts; all
intervals are 95 % t-intervals over seeds.

References:
  Ren & Liu, arXiv:2310.13220v2, section 3 and Fig. 2 (the comparison in words).
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness, pretraining
from experiments import learning_processes_figures as figures
from experiments import learning_processes_measure as measure
from experiments import learning_processes_report as report
from iclcl_jax import _validate

LEARNING_RATE = 0.003  # Of the papers' layer.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the experiment.

  Raises:
    ValueError: if a value is out of range; the message names the flag.
  """

  seed: int = harness.option(0, 'root of all random numbers')
  num_seeds: int = harness.option(16, 'independent runs, at least 10')
  num_prompts: int = harness.option(2, 'prompts of a seed')
  num_demonstrations: int = harness.option(15, 'demonstrations N of a prompt')
  num_features: int = harness.option(256, 'positive random features R')
  num_training_prompts: int = harness.option(
    1280, 'prompts on which the layer is trained'
  )
  num_dual_steps: int = harness.option(200, 'steps of the dual models')
  num_process_steps: int = harness.option(
    1000, 'steps of the self-supervised processes'
  )
  learning_rate: float = harness.option(1.0, 'of SimSiam and BYOL')
  momentum: float = harness.option(0.99, "of BYOL's moving average")

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    _validate.check_count('num_seeds', self.num_seeds, minimum=10)
    _validate.check_count(
      'num_demonstrations', self.num_demonstrations, minimum=2
    )
    for name in (
      'num_prompts',
      'num_features',
      'num_training_prompts',
      'num_dual_steps',
      'num_process_steps',
    ):
      _validate.check_count(name, getattr(self, name))
    _validate.check_scalar('learning_rate', self.learning_rate, minimum=0)
    if self.learning_rate == 0:
      raise ValueError('learning_rate is 0; expected a positive number.')
    _validate.check_scalar('momentum', self.momentum, minimum=0, maximum=1)


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary, as written to `summary.json`.

  Raises:
    ValueError: if `workdir` cannot be used, or training diverges.
  """
  start = time.perf_counter()
  folder = harness.open_workdir(config, workdir)
  data, losses = draw_data(config)
  # Float64 on the host does not start from arrays of other devices.
  data = jax.tree.map(lambda x: np.asarray(x, np.float64), data)
  together = jax.tree.map(lambda *x: np.concatenate(x), *data.values())
  with harness.float64_on_host(), jax.default_matmul_precision('highest'):
    measured = measure.measure(config, together)
  results = {
    name: jax.tree.map(lambda x, i=i: np.split(x, len(data))[i], measured)
    for i, name in enumerate(data)
  }
  claims = report.claims(config, results)
  summary: dict[str, Any] = {
    'claims': claims,
    'conclusion': report.conclusion(config, results, claims),
    'pretraining': losses,
    'step_sizes': report.step_sizes(results),
    'figures': figures.draw(config, results, folder),
  }
  summary['seconds'] = time.perf_counter() - start
  harness.write_metrics(folder, report.metrics(results))
  summary = dict(harness.write_summary(folder, summary))
  print(report.text(summary))
  return summary


def draw_data(
  config: Config,
) -> tuple[dict[str, measure.Prompts], dict[str, Any]]:
  """Draws random prompts, and those of a briefly trained layer.

  Args:
    config: settings.

  Returns:
    Prompts by name, with leading axes `[S, P]`, and the layer's held-out loss.
  """

  def draw(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    key_run, key_prompts, key_rows, key_start = jax.random.split(key, 4)
    run = pretraining.init_run(key_run, num_features=config.num_features)
    total = config.num_training_prompts + config.num_prompts
    prompts = pretraining.draw_prompts(
      key_prompts,
      jnp.arange(total),
      lambda _: run.task_matrix,
      config.num_demonstrations,
    )
    size, width = config.num_demonstrations + 1, pretraining.TOKEN_DIM
    shape = config.num_prompts, 2 * size + 1, width
    rows = jax.random.normal(key_rows, shape, jnp.float32)
    return run, prompts, rows, jax.random.split(key_start, config.num_prompts)

  def train(run, prompts):
    first = jax.tree.map(lambda x: x[: config.num_training_prompts], prompts)
    rest = jax.tree.map(lambda x: x[config.num_training_prompts :], prompts)
    params, losses = pretraining.train(
      run.params, run.phi, first, LEARNING_RATE
    )
    rows = jax.vmap(lambda x: pretraining.project(params, x))(rest.tokens)
    zero = jnp.mean(first.target**2)
    return rows, jnp.mean(losses[-64:]) / zero

  seeds = jnp.arange(config.num_seeds)
  quickly = harness.compile_quickly
  run, prompts, rows, start_keys = quickly(lambda x: jax.lax.map(draw, x))(
    seeds
  )
  trained, losses = quickly(jax.vmap(train))(run, prompts)
  size = config.num_demonstrations + 1
  random = rows[:, :, -1], rows[:, :, :size], rows[:, :, size:-1]
  # Every process of a prompt starts from the same draw.
  starts = jax.vmap(jax.vmap(lambda key: measure.draw_start(config, key)))(
    start_keys
  )
  arrays: dict[str, Any] = {'random': random, 'trained layer': trained}
  data = {
    name: measure.Prompts(run.phi, query, keys, values, starts)
    for name, (query, keys, values) in arrays.items()
  }
  estimate = harness.mean_interval(jax.device_get(losses))
  note = (
    'Squared error of the last 64 training prompts (each new), relative to '
    'predicting 0; one task matrix a seed, so this measures memorisation.'
  )
  return data, estimate | {'note': note}


if __name__ == '__main__':
  harness.run_binary(Config, run)
