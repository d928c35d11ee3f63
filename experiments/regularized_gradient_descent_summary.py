"""Statistics, claims and text of `experiments.regularized_gradient_descent`.

A seed (a pretrained layer with its features and task) is the unit: intervals
are 95 % t-intervals over seeds. A relative deviation of a seed is the root of
its mean square over the held-out prompts, over that of the layer's output.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import approximation_statistics as statistics
from experiments import harness
from experiments import regularized_gradient_descent_measure as measure
from experiments.approximation_statistics import Estimate
from iclcl_jax import modified

COMMAND = (
  'python -m experiments.regularized_gradient_descent --workdir=out/ridge'
)
FIGURE = 'arXiv:2310.13220v1, Fig. 10'
EXACT = 1e-10
SLIGHT = 0.1
PER_VISIT, PER_EPOCH = 'alpha', 'alpha/N'
SLUGS = {PER_VISIT: 'per_visit', PER_EPOCH: 'per_epoch'}


class Results(NamedTuple):
  """All measurements, NumPy arrays with leading axes `[S, P]`.

  Attributes:
    layers: the prompts as the layers see them.
    full_batch: one full-batch step, `[S, P, K, d_y]`.
    epochs: by E and reading of alpha, `[S, P, K, E + 1, d_y]`.
    target: true labels.
    losses: losses of pretraining and of predicting 0, `[epochs, 2, S]`.
  """

  layers: measure.Layer
  full_batch: measure.FullBatch
  epochs: Mapping[int, Mapping[str, measure.Epochs]]
  target: np.ndarray
  losses: np.ndarray


def divisors(config: Any) -> dict[str, float]:
  """What alpha is divided by in one visit, by reading."""
  return {PER_VISIT: 1.0, PER_EPOCH: float(config.num_demonstrations)}


def relative(difference: Any, reference: Any) -> np.ndarray:
  """Relative deviation by seed; prompts and labels are axes 1 and last."""

  def size(array):
    return np.sqrt(np.mean(array**2, axis=(1, array.ndim - 1)))

  return size(difference) / size(reference)


def deviation(results: Results, count: int, reading: str) -> np.ndarray:
  """Of the dual model from the strict layer by epoch, `[S, K, E + 1]`."""
  measured = results.epochs[count][reading].measured
  layer = results.full_batch.strict[:, :, :, None]
  return relative(measured - layer, np.broadcast_to(layer, measured.shape))


def residuals(results: Results) -> dict[str, np.ndarray]:
  """Largest distances over the scale of rounding, `[S, P, K]`."""
  scale = results.layers.scale[:, :, None]
  step = results.full_batch
  pairs = {
    'strict_ridge': (step.strict, step.ridge),
    'printed_ridge': (step.printed, step.ridge),
    'printed_pair': (step.printed, step.pair),
  }
  return {
    name: np.max(np.abs(a - b), axis=3) / scale
    for name, (a, b) in pairs.items()
  }


def curve_residual(results: Results) -> float:
  """Largest distance of descent and closed form, over all curves."""
  largest = 0.0
  for by_reading in results.epochs.values():
    for curve in by_reading.values():
      # Growing weights round relative to their own size.
      size = np.max(np.abs(curve.measured), axis=(3, 4))
      scale = np.maximum(results.layers.scale[:, :, None], size)
      error = np.max(np.abs(curve.measured - curve.predicted), axis=(3, 4))
      largest = max(largest, float(np.max(error / scale)))
  return largest


def interval(samples: np.ndarray) -> Estimate:
  """Mean over seeds with its t-interval."""
  return Estimate(*harness.mean_interval(samples).values())


def factors(config: Any) -> list[dict[str, Any]]:
  """What training leaves of `W_0` and of the demonstrations, on average."""
  rows = []
  for alpha in config.alphas:
    for reading, divisor in divisors(config).items():
      for count in config.dual_epochs:
        left = modified.regularised_training_weights(
          config.num_demonstrations,
          count,
          learning_rate=1 / count,
          strength=alpha / divisor,
        )
        rows.append(
          {
            'alpha': alpha,
            'reading': reading,
            'num_epochs': count,
            'initial_factor': float(left.initial),
            'demonstration_factor': float(np.mean(left.demonstrations)),
          }
        )
  return rows


def summarise(config: Any, results: Results) -> dict[str, Any]:
  """All numbers that decide, and the claims."""
  exact = residuals(results)
  final = [
    {
      'alpha': alpha,
      'reading': reading,
      'num_epochs': count,
      'relative_deviation': interval(
        deviation(results, count, reading)[:, k, -1]
      )._asdict(),
    }
    for count in config.dual_epochs
    for reading in divisors(config)
    for k, alpha in enumerate(config.alphas)
  ]
  claims = [
    *_exact_claims(config, results, exact),
    *_epoch_claims(config, results),
  ]
  for claim in claims:
    claim['command'] = COMMAND
  summary: dict[str, Any] = {
    'num_seeds': config.num_seeds,
    'claims': claims,
    'residuals': {name: float(x.max()) for name, x in exact.items()},
    'curve_residual': curve_residual(results),
    'deviations': final,
    'factors': factors(config),
    'pretraining_loss_over_zero_predictor': float(
      np.mean(results.losses[-1, 0] / results.losses[-1, 1])
    ),
    'pretraining_meaning': (
      'Single-task pretraining: the loss measures memorisation of one task '
      'matrix. No claim here depends on it.'
    ),
  }
  if config.multi_task:
    summary['pretraining_meaning'] = 'A fresh task matrix for every prompt.'
  summary['conclusion'] = _conclusion(config, summary)
  return summary


def _fact(name, text, statistic, value, holds) -> dict[str, Any]:
  return {
    'id': f'regularized_gradient_descent/{name}',
    'source': FIGURE,
    'claim': text,
    'statistic': statistic,
    'value': value,
    'interval': None,
    'verdict': 'reproduced' if holds else 'not reproduced',
  }


def _exact_claims(config, results, exact) -> list[dict[str, Any]]:
  statistic = (
    'largest residual over prompts, seeds and alpha, float64; at most '
    f'{EXACT:g}'
  )
  texts = {
    'strict_ridge': 'one full batch with both learning rates 1 equals the '
    'regularised layer: strict form (A - alpha diag A) V',
    'printed_ridge': 'one full batch with both learning rates 1 equals the '
    'regularised layer: printed form (A - alpha I) V',
    'printed_pair': 'the printed form is exact for another loss: one more pair '
    "un-learns the query's own label at the test input",
  }
  claims = []
  for name, text in texts.items():
    value = float(exact[name].max())
    claims.append(_fact(name, text, statistic, value, value <= EXACT))
  value = curve_residual(results)
  claims.append(
    _fact(
      'closed_form',
      'E epochs of batch 1 with a ridge end where their closed form says, '
      'epoch by epoch',
      'largest residual over epochs, E, prompts, seeds, alpha and readings, '
      f'float64; at most {EXACT:g}',
      value,
      value <= EXACT,
    )
  )
  return claims


def _epoch_claims(config, results) -> list[dict[str, Any]]:
  claims = []
  count = config.dual_epochs[-1]
  step = results.full_batch
  layers = {'strict': step.strict, 'printed': step.printed}
  for reading in divisors(config):
    last = results.epochs[count][reading].measured[:, :, :, -1]
    for k, alpha in enumerate(config.alphas):
      if alpha == 0:
        continue
      for form, outputs in layers.items():
        apart = relative(last - outputs, outputs)[:, k]
        claims.append(
          _judge(
            f'slight_{form}_{SLUGS[reading]}_{alpha:g}',
            f'{count} epochs of batch 1 deviate only slightly from the {form} '
            f'layer: alpha = {alpha:g}, {reading} in a visit',
            f'relative deviation; at most {SLIGHT:g}',
            interval(apart),
            SLIGHT,
          )
        )
  return claims


def _judge(name, text, statistic, estimate, at_most) -> dict[str, Any]:
  claim = statistics.claim(text, statistic, estimate, at_most=at_most)
  return {
    'id': f'regularized_gradient_descent/{name}',
    'source': FIGURE,
  } | claim


def metrics(config: Any, results: Results) -> list[dict[str, Any]]:
  """One row for each E, reading, alpha and epoch: deviation of every seed."""
  return [
    {
      'num_epochs': count,
      'reading': reading,
      'alpha': alpha,
      'epoch': epoch,
      'relative_deviation': curve[:, k, epoch],
    }
    for count, by_reading in results.epochs.items()
    for reading in by_reading
    for curve in [deviation(results, count, reading)]
    for k, alpha in enumerate(config.alphas)
    for epoch in range(curve.shape[2])
  ]


def _conclusion(config: Any, summary: Mapping[str, Any]) -> str:
  found = summary['residuals']
  count = config.dual_epochs[-1]

  def ends(reading):
    parts = []
    for row in summary['deviations']:
      if (row['reading'], row['num_epochs']) == (reading, count):
        value = row['relative_deviation']['value']
        parts.append(f'{100 * value:.3g} % at alpha = {row["alpha"]:g}')
    return ', '.join(parts)

  return (
    'One full-batch step on the contrastive loss with a ridge gives the '
    f'strict regularised layer to {found["strict_ridge"]:.1g} of its scale, '
    f'and misses the printed one by up to {found["printed_ridge"]:.2g}; the '
    'printed layer is one step on a loss with one more pair, to '
    f'{found["printed_pair"]:.1g}. Many epochs of batch 1 end elsewhere, and '
    f'the closed form says where, to {summary["curve_residual"]:.1g}: after '
    f'{count} epochs the relative deviation from the strict layer is '
    f'{ends(PER_EPOCH)} if a visit decays by alpha / N, and {ends(PER_VISIT)} '
    'if it decays by alpha.'
  )


def text(summary: Mapping[str, Any]) -> str:
  """The claims and factors as tables, and the conclusion."""
  rows = [
    {
      'claim': x['claim'],
      'value': float(x['value']),
      '95 % interval': ''
      if x['interval'] is None
      else '[{:.3g}, {:.3g}]'.format(*x['interval']),
      'verdict': x['verdict'],
    }
    for x in summary['claims']
  ]
  parts = [harness.table(rows), harness.table(summary['factors'])]
  return '\n\n'.join([*parts, summary['conclusion']])
