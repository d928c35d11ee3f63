r"""The regularised layer against gradient descent on the regularised loss.

A ridge of strength alpha on the dual weights changes the attention layer that
one gradient step implies. Pretrained layers are read in both forms - derived
strictly, `(A - alpha diag A) V`, and as printed, `(A - alpha I) V` - and
compared with dual models trained on their own prompts: one full batch, and E
epochs of batch 1, for alpha of either sign, with alpha or alpha / N in each
visit::

  python -m experiments.regularized_gradient_descent --workdir=out/ridge

The layers are pretrained without the ridge (single-task, so they memorise one
task matrix); the identities do not depend on how they were trained.

It takes 17 s of CPU time. Numbers to expect (10 seeds, 4 held-out prompts of
each, 95 % intervals over seeds)::

  residual, strict form, one full batch              2e-15
  residual, printed form, one full batch             .28
  the same, loss with one more pair                  2e-15
  residual of the closed form over all epochs        4e-13
  deviation after 100 epochs, alpha / N in a visit
    alpha = -.5 / -.1                                .29 [.29, .30] / .051
    alpha = .1 / .5                                  .048 / .21 [.21, .22]
  the same, alpha in a visit
    alpha = -.5 / -.1                                270 [230, 310] / 1.35
    alpha = .1 / .5                                  .48 / .87 [.87, .87]

So "a slight deviation" (here: at most 10 % of the output) needs alpha / N in a
visit and a small alpha; an alpha of .5 deviates by a fifth or more.

References:
  Ren & Liu, arXiv:2310.13220v1, Fig. 10.
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import equivalence_checks as checks
from experiments import equivalence_training as training
from experiments import harness, pretraining
from experiments import regularized_gradient_descent_figures as figures
from experiments import regularized_gradient_descent_measure as measure
from experiments import regularized_gradient_descent_summary as summary_of
from iclcl_jax import _validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the experiment; the defaults are the paper's, where known.

  Raises:
    ValueError: if a value is out of range; the message names the flag.
  """

  seed: int = harness.option(0, 'root of all random numbers')
  num_seeds: int = harness.option(10, 'independent runs, at least 5')
  num_demonstrations: int = harness.option(15, 'demonstrations N of a prompt')
  alphas: tuple[float, ...] = harness.option(
    (-0.5, -0.1, 0.0, 0.1, 0.5), 'strengths alpha, 0 among them, increasing'
  )
  dual_epochs: tuple[int, ...] = harness.option(
    (1, 10, 100), 'epochs E of the dual model, increasing'
  )
  input_distribution: str = harness.option(
    'uniform', f'inputs s: {" or ".join(training.INPUTS)}'
  )
  multi_task: bool = harness.option(False, 'a fresh B for every prompt')
  num_epochs: int = harness.option(20, 'epochs of pretraining')
  tokens_per_epoch: int = harness.option(1024, 'tokens of an epoch')
  learning_rate: float = harness.option(0.003, 'of pretraining')
  num_features: int = harness.option(1200, 'positive random features R')
  num_test_prompts: int = harness.option(4, 'held-out prompts of a seed')
  block_epochs: int = harness.option(20, 'epochs between checkpoints')

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    _validate.check_count('num_seeds', self.num_seeds, minimum=5)
    for name in (
      'num_demonstrations',
      'num_epochs',
      'num_features',
      'num_test_prompts',
      'block_epochs',
    ):
      _validate.check_count(name, getattr(self, name))
    _validate.check_count(
      'tokens_per_epoch',
      self.tokens_per_epoch,
      minimum=self.num_demonstrations + 1,
    )
    _validate.check_scalar('learning_rate', self.learning_rate, minimum=0)
    if self.input_distribution not in training.INPUTS:
      raise ValueError(
        f'input_distribution is {self.input_distribution!r}; expected '
        f'{" or ".join(map(repr, training.INPUTS))}.'
      )
    self._check_sweep()

  def _check_sweep(self):
    for alpha in self.alphas:
      _validate.check_scalar('alphas', alpha, minimum=-1, maximum=1)
    if list(self.alphas) != sorted({*self.alphas, 0.0}) or not (
      self.alphas[0] < 0 < self.alphas[-1]
    ):
      raise ValueError(
        f'alphas is {",".join(map(str, self.alphas))}; expected increasing '
        'strengths of both signs and 0, such as -0.5,0,0.5.'
      )
    for epochs in self.dual_epochs:
      _validate.check_count('dual_epochs', epochs)
    if list(self.dual_epochs) != sorted(set(self.dual_epochs)) or not (
      self.dual_epochs
    ):
      raise ValueError(
        f'dual_epochs is {",".join(map(str, self.dual_epochs))}; expected '
        'increasing counts, such as 1,10,100.'
      )


def descend(
  config: Config,
  params: pretraining.LayerParams,
  phi: Any,
  tokens: np.ndarray,
  *,
  num_epochs: int,
) -> dict[str, measure.Epochs]:
  """Trains the dual models of all prompts for E epochs, by reading of alpha.

  Args:
    config: settings.
    params: layers of all seeds, float64.
    phi: their feature maps.
    tokens: prompts `[S, P, n, d_model]`.
    num_epochs: the number of epochs E.

  Returns:
    Curves with leading axes `[S, P, K]`, K strengths.
  """
  alphas = np.array(config.alphas)
  strengths = np.stack(
    [alphas / x for x in summary_of.divisors(config).values()]
  )

  def one(params, phi, tokens):
    prompt = measure.layer(params, phi, tokens)
    train = functools.partial(measure.train, num_epochs=num_epochs)
    over = jax.vmap(train, (None, None, 0))
    found = over(phi, prompt, jnp.asarray(strengths.ravel()))
    return jax.tree.map(
      lambda x: x.reshape(*strengths.shape, *x.shape[1:]), found
    )

  compiled = harness.compile_quickly(checks.for_all(one))
  found = jax.device_get(compiled(params, phi, tokens))
  return {
    reading: jax.tree.map(lambda x, i=i: x[:, :, i], found)
    for i, reading in enumerate(summary_of.divisors(config))
  }


def step(
  config: Config,
  params: pretraining.LayerParams,
  phi: Any,
  tokens: np.ndarray,
) -> tuple[measure.Layer, measure.FullBatch]:
  """Takes one full-batch step on all prompts. Axes `[S, P]`, `[S, P, K]`."""

  def one(params, phi, tokens):
    prompt = measure.layer(params, phi, tokens)
    over = jax.vmap(measure.full_batch, (None, None, 0))
    return prompt, over(phi, prompt, jnp.array(config.alphas))

  compiled = harness.compile_quickly(checks.for_all(one))
  return jax.device_get(compiled(params, phi, tokens))


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment; pretraining resumes if `workdir` holds a part of it.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary, as written to `summary.json`.

  Raises:
    ValueError: if `workdir` cannot be used, or pretraining diverges.
  """
  start = time.perf_counter()
  folder = harness.open_workdir(config, workdir)
  seeds = training.init_seeds(config)
  size = config.num_demonstrations
  params, losses = training.pretrain(config, seeds, size, folder)
  prompts = training.draw_held_out(config, seeds, size)
  arrays = jax.tree.map(
    lambda x: np.asarray(x, np.float64),
    (params, seeds.runs.phi, prompts.tokens),
  )
  with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
    epochs = {
      count: pool.submit(_in_float64, descend, config, *arrays, count)
      for count in reversed(config.dual_epochs)
    }
    one = pool.submit(_in_float64, step, config, *arrays)
    layers, full_batch = one.result()
    results = summary_of.Results(
      layers=layers,
      full_batch=full_batch,
      epochs={count: epochs[count].result() for count in config.dual_epochs},
      target=np.asarray(prompts.target, np.float64),
      losses=losses,
    )
  summary = summary_of.summarise(config, results)
  harness.write_metrics(folder, summary_of.metrics(config, results))
  summary['figures'] = figures.draw(config, results, summary, folder)
  summary['seconds'] = {'total': time.perf_counter() - start}
  summary = dict(harness.write_summary(folder, summary))
  print(summary_of.text(summary))
  return summary


def _in_float64(fn, config, params, phi, tokens, *num_epochs):
  """Settings of JAX belong to a thread."""
  options = {'num_epochs': num_epochs[0]} if num_epochs else {}
  with harness.float64_on_host(), jax.default_matmul_precision('highest'):
    return fn(config, params, phi, tokens, **options)


if __name__ == '__main__':
  harness.run_binary(Config, run)
