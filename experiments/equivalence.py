r"""Attention is one gradient step: a trained layer against its dual model.

Trains the papers' layer on in-context linear regression, several seeds at
once. Then, for held-out prompts, trains the dual model by gradient descent on
the contrastive loss - one full-batch step, and E epochs of batch 1 - and
compares its prediction with the layer's. Ends in a table of certificates for
every feature map and the exact softmax::

  python -m experiments.equivalence --workdir=out/demo

It takes 55 s of CPU time, most of it compilation, spread over two cores, and
0.65 GiB of memory; `seconds` in `summary.json` says where time went.
Numbers to expect (10 seeds, losses relative to that of predicting 0, with 95 %
intervals)::

  residual, one step             1e-15 in float64, 5e-07 in float32
  residual, exact softmax        5e-16 in float64, 2e-07 in float32
  residual, 100 epochs           3e-15 in float64, 3e-06 in float32
  distance curve, closed form    5e-15 in float64
  held-out loss                  .12 [.10, .14] (N = 15), .09 [.07, .11] (31)
  the same for another B         1.6 [1.1, 2.2] (N = 15), 1.7 [1.4, 2.0] (31)

Single-task training (the default, as in the paper) measures how well the layer
memorises the one matrix B, not in-context learning: on prompts of another B it
is worse than predicting 0, and `summary.json` says so beside every loss.

`--multi_task=true` draws a fresh B for every prompt instead: nothing is learnt,
the held-out loss is 1.01 [.99, 1.03] (N = 15) and .99 [.98, 1.00] (31).
`--input_distribution=normal` draws inputs from N(0, 1): .14 [.12, .17] and
.10 [.08, .12]. The identity holds in all of them, to the same residuals: it
does not ask what was learnt.

References:
  Ren & Liu, arXiv:2310.13220v1, Fig. 3 left and Fig. 8; v2, Fig. 3a.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import equivalence_checks as checks
from experiments import equivalence_claims as judging
from experiments import equivalence_report as report
from experiments import equivalence_training as training
from experiments import harness, pretraining
from iclcl_jax import _validate, features, tasks

# Standard deviation of the entries of queries, keys and values.
CONTROLLED_NORM = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the experiment; the defaults are the paper's, where known.

  Raises:
    ValueError: if a value is out of range; the message names the flag.
  """

  seed: int = harness.option(0, 'root of all random numbers')
  num_seeds: int = harness.option(10, 'independent runs, at least 5')
  num_demonstrations: tuple[int, ...] = harness.option(
    (15, 31), 'demonstrations N of a prompt; one experiment for each'
  )
  input_distribution: str = harness.option(
    'uniform', f'inputs s: {" or ".join(training.INPUTS)}'
  )
  multi_task: bool = harness.option(False, 'a fresh B for every prompt')
  num_epochs: int = harness.option(100, 'epochs of pretraining')
  tokens_per_epoch: int = harness.option(
    1024, 'an epoch has this many tokens, whatever N'
  )
  learning_rate: float = harness.option(
    0.0, 'of pretraining; 0 for that of the input distribution'
  )
  num_features: int = harness.option(1200, 'positive random features R')
  num_test_prompts: int = harness.option(64, 'held-out prompts of a seed')
  num_dual_prompts: int = harness.option(
    4, 'those for which the dual model is trained for many epochs'
  )
  dual_epochs: int = harness.option(100, 'epochs E of the dual model')
  block_epochs: int = harness.option(25, 'epochs between checkpoints')

  def __post_init__(self):
    _validate.check_count('num_seeds', self.num_seeds, minimum=5)
    for name in ('num_epochs', 'num_features', 'dual_epochs', 'block_epochs'):
      _validate.check_count(name, getattr(self, name))
    _validate.check_count('seed', self.seed, minimum=0)
    _validate.check_scalar('learning_rate', self.learning_rate, minimum=0)
    self._check_prompts()
    if self.input_distribution not in training.INPUTS:
      raise ValueError(
        f'input_distribution is {self.input_distribution!r}; expected '
        f'{" or ".join(map(repr, training.INPUTS))}.'
      )
    if self.learning_rate == 0:
      rate = training.INPUTS[self.input_distribution][1]
      object.__setattr__(self, 'learning_rate', rate)

  def _check_prompts(self):
    if not self.num_demonstrations:
      raise ValueError(
        'num_demonstrations is empty; expected one or more counts, such as '
        '15,31.'
      )
    if len(set(self.num_demonstrations)) < len(self.num_demonstrations):
      raise ValueError(
        f'num_demonstrations is {self.num_demonstrations}; expected distinct '
        'counts.'
      )
    for size in self.num_demonstrations:
      _validate.check_count('num_demonstrations', size)
    longest = max(self.num_demonstrations) + 1
    _validate.check_count(
      'tokens_per_epoch', self.tokens_per_epoch, minimum=longest
    )
    _validate.check_count('num_test_prompts', self.num_test_prompts)
    _validate.check_count('num_dual_prompts', self.num_dual_prompts)
    if self.num_dual_prompts > self.num_test_prompts:
      raise ValueError(
        f'num_dual_prompts is {self.num_dual_prompts}; expected at most '
        f'num_test_prompts, {self.num_test_prompts}.'
      )


def evaluate(
  config: Config,
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  prompts: tasks.RegressionPrompt,
) -> dict[str, Any]:
  """Compares trained layers with their dual models on held-out prompts.

  Args:
    config: settings.
    params: trained layers of all seeds, NumPy arrays.
    phi: their feature maps.
    prompts: held-out prompts, with leading axes `[S, P]`.

  Returns:
    What `checks.one_step` and `checks.descend` return, by name and dtype, and
    the true labels: arrays with leading axes `[S, P]`.
  """
  result: dict[str, Any] = {'target': np.asarray(prompts.target, np.float64)}
  for dtype in (np.float64, np.float32):
    arrays = jax.tree.map(
      lambda x, dtype=dtype: np.asarray(x, dtype),
      (params, phi, prompts.tokens),
    )
    with (
      harness.float64_on_host(),
      jax.default_matmul_precision('highest'),
    ):
      result |= _evaluate(config, np.dtype(dtype).name, *arrays)
  return result


def _evaluate(config, dtype, params, phi, tokens) -> dict[str, Any]:
  """`evaluate` in the dtype of its arguments."""
  chosen = tokens[:, : config.num_dual_prompts]
  one_step = harness.compile_quickly(checks.for_all(checks.one_step))

  def descend(num_epochs):
    fn = functools.partial(checks.descend, num_epochs=num_epochs)
    return harness.compile_quickly(checks.for_all(fn))(params, phi, chosen)

  result = {
    f'one_step_{dtype}': one_step(params, phi, tokens),
    f'descent_{dtype}': descend(config.dual_epochs),
  }
  if dtype == 'float64':
    # Another seed's prompts: a matrix B that the layer has never seen.
    result['unseen'] = one_step(params, phi, np.roll(tokens, -1, axis=0))
    result['descent_1_epoch'] = descend(1)
  return jax.device_get(result)


def certify(
  config: Config,
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  tokens: np.ndarray,
) -> list[dict[str, Any]]:
  """Certificates of every map: at a trained layer, and at small norms.

  Args:
    config: settings.
    params: the trained layer of one seed.
    phi: its feature map.
    tokens: one held-out prompt.

  Returns:
    Certificates as plain dicts, with `name`, `data` and `passed`: it holds, or
    the map is signed and its normaliser too ill-conditioned to say.
  """
  key = jax.random.fold_in(jax.random.key(config.seed), config.num_seeds)
  draw = harness.compile_quickly(
    functools.partial(checks.draw_projections, num_features=config.num_features)
  )
  drawn = {'gaussian': np.asarray(phi.projection)} | jax.device_get(draw(key))
  trained = tuple(
    map(np.asarray, pretraining.project(params, jnp.asarray(tokens)))
  )
  # The same rows, shrunk to a norm at which random features imitate softmax.
  small = tuple(x / np.std(x) * CONTROLLED_NORM for x in trained)
  rows = []
  for dtype in (np.float64, np.float32):
    with harness.float64_on_host():
      maps = checks.certified_maps(
        {name: jnp.asarray(x, dtype) for name, x in drawn.items()}
      )
      for name, kernel in maps.items():
        for data, arrays in (('trained', trained), ('small norms', small)):
          certificate = checks.certify(
            kernel, *(jnp.asarray(x, dtype) for x in arrays)
          )
          excused = name in checks.SIGNED_MAPS and 'normaliser' in (
            certificate.verdict
          )
          rows.append(
            {'name': name, 'data': data, 'passed': certificate.holds or excused}
            | certificate.to_dict()
          )
  return rows


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment; resumes if `workdir` holds a part of it.

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
  seconds: dict[str, float] = {}
  curves, results, certificates = _measure(config, folder, seconds)
  summary = report.summarise(config, curves, results, certificates)
  summary['claims'] = judging.claims(summary)
  summary['figures'] = judging.captions(config, summary)
  summary['conclusion'] = judging.conclusion(summary)
  harness.write_metrics(folder, report.metrics(curves))
  with _stopwatch(seconds, 'figures'):
    report.draw_figures(config, curves, results, summary, folder)
  seconds['total'] = time.perf_counter() - start
  summary['seconds'] = seconds
  summary['seconds_note'] = 'Stages overlap, so they sum to more than total.'
  summary = dict(harness.write_summary(folder, summary))
  print(report.text(summary))
  return summary


def _measure(config, folder, seconds):
  """Trains, compares and certifies; comparisons run while others train."""
  with _stopwatch(seconds, 'initialisation'):
    seeds = training.init_seeds(config)
  curves, comparisons, certificates = {}, {}, None
  with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
    for size in config.num_demonstrations:
      with _stopwatch(seconds, f'pretraining_{size}'):
        params, curves[size] = training.pretrain(config, seeds, size, folder)
      prompts = training.draw_held_out(config, seeds, size)
      layers = jax.device_get((params, seeds.runs.phi))
      compare = _timed(seconds, f'comparison_{size}', evaluate)
      comparisons[size] = pool.submit(compare, config, *layers, prompts)
      if certificates is None:
        layer = jax.tree.map(lambda x: x[0], layers)
        prove = _timed(seconds, 'certificates', certify)
        token_rows = prompts.tokens[0, 0]
        certificates = pool.submit(prove, config, *layer, token_rows)
    results = {size: future.result() for size, future in comparisons.items()}
    return curves, results, certificates.result()


def _timed(seconds: dict[str, float], stage: str, fn) -> Callable[..., Any]:
  """The same function, which notes how long it takes."""

  def timed(*args):
    with _stopwatch(seconds, stage):
      return fn(*args)

  return timed


@contextlib.contextmanager
def _stopwatch(seconds: dict[str, float], stage: str) -> Iterator[None]:
  start = time.perf_counter()
  yield
  seconds[stage] = time.perf_counter() - start


if __name__ == '__main__':
  harness.run_binary(Config, run)
