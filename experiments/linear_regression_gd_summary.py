"""Summary, captions and conclusion of `experiments.linear_regression_gd`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import (
  harness,
  linear_regression_gd_claims,
)
from experiments import linear_regression_gd_step_claims as step_claims
from experiments import linear_regression_gd_variant_claims as variant_claims
from experiments.linear_regression_gd_claims import ALIGNED
from experiments.linear_regression_gd_measure import FRACTIONS
from experiments.linear_regression_gd_steps import linear_tasks
from iclcl_jax.accounts import linear_regression_gd as account


def summarise(config, result: Mapping[str, Any]) -> dict[str, Any]:
  """The summary, but for the time of the whole run."""
  numbers = _numbers(config, result)
  steps = [
    step_claims.with_yardstick(config, row) for row in result.get('steps', ())
  ]
  claims = [
    *linear_regression_gd_claims.of_layer(result, numbers),
    *variant_claims.of_identities(result['residuals']),
    *linear_regression_gd_claims.of_softmax(numbers),
    *step_claims.of_steps(steps),
    *step_claims.of_stacks(result.get('stacks', ())),
    *variant_claims.of_parts(result),
  ]
  return {
    'construction_residual_float64': result['residuals']['layers'],
    **{
      name: row['mean'] if isinstance(row, dict) else row
      for name, row in numbers.items()
    },
    'intervals_95_percent': {
      name: row for name, row in numbers.items() if isinstance(row, dict)
    },
    'loss_trained_by_seed': result['curves']['linear']['loss'][:, -1],
    'model_cos_by_seed': result['curves']['linear']['model_cos'][:, -1],
    'training_seconds_all_seeds': result['curves']['linear']['seconds'],
    'num_seeds': config.num_seeds,
    'learnt_products_by_seed': {
      name: value
      for name, value in result['products'].items()
      if name != 'matrix'
    },
    'steps_of_gd': steps,
    'seconds_wall_and_cpu_by_part': result['seconds_wall_and_cpu'],
    'stacks': step_claims.stacks_summary(result.get('stacks', ())),
    **variant_claims.summary(result),
    'claims': claims,
    'figures': _figures(config),
    'conclusion': _conclusion(numbers, steps, result),
  }


def _numbers(config, result) -> dict[str, Any]:
  """Numbers, or means with intervals over seeds."""
  descent, curves = result['descent'], result['curves']
  tasks = linear_tasks(config)
  best = account.optimal_learning_rate(tasks)
  linear = curves['linear']
  loss_gd = float(descent['loss'])
  between = result['interpolation']
  middle = between[:, len(FRACTIONS) // 2]
  ends = np.maximum(between[:, 0], between[:, -1])
  scales = result['scales']
  ratio = scales['trained'] / scales['gd'][None] - 1
  numbers: dict[str, Any] = {
    'loss_trained': linear['loss'][:, -1],
    'loss_trained_minus_gd': linear['loss'][:, -1] - loss_gd,
    'preds_diff': linear['preds_diff'][:, -1],
    'model_diff': linear['model_diff'][:, -1],
    'model_cos': linear['model_cos'][:, -1],
    'learning_rate_learnt': result['products']['learning_rate'],
    'loss_halfway_minus_larger_end': middle - ends,
    'scale_deviation': np.max(np.abs(ratio), axis=1),
  }
  if 'softmax_2' in curves:
    one, two = curves['softmax_1'], curves['softmax_2']
    numbers |= {
      'loss_softmax_1': one['loss'][:, -1],
      'loss_softmax_2': two['loss'][:, -1],
      'softmax_2_minus_gd': two['loss'][:, -1] - loss_gd,
      'softmax_1_minus_2': one['loss'][:, -1] - two['loss'][:, -1],
      'model_cos_softmax_1': one['model_cos'][:, -1],
      'model_cos_softmax_2': two['model_cos'][:, -1],
    }
  numbers = {k: harness.mean_interval(v) for k, v in numbers.items()}
  numbers |= {
    'loss_gd': loss_gd,
    'loss_gd_centred_inputs': float(descent['loss_centred']),
    'loss_closed_form': float(account.expected_loss(tasks, best)),
    'loss_zero_predictor': float(account.expected_loss(tasks, 0.0)),
    'learning_rate_gd': float(descent['rate']),
    'learning_rate_closed_form': float(best),
    'mean_absolute_prediction_gd': float(descent['mean_prediction']),
    'mean_norm_of_slope_gd': float(descent['mean_slope']),
    'training_seconds': linear['seconds'] / config.num_seeds,
  }
  return numbers


def _figures(config) -> list[dict[str, str]]:
  """Captions of the figures of the parts that were run."""
  optional = ('steps', 'stacks', 'sine', 'alternating')
  return [
    row
    for row in _captions(config)
    if (name := row['file'][len('figures/') : -len('.png')]) in config.parts
    or name not in optional
  ]


def _captions(config) -> list[dict[str, str]]:
  seeds = f'{config.num_seeds} seeds'
  tasks = f'{config.num_test_tasks:,} fixed tasks'
  softmax = (
    f', those of softmax for {config.softmax_steps:,}'
    if 'softmax' in config.parts
    else ''
  )
  return [
    {
      'file': 'figures/training.png',
      'caption': f'Training from a small random start: loss on {tasks} (left) '
      'and Model cos with one step of gradient descent (right), one thin line '
      f'for each of {seeds}, a marked line for the median. Dashed: one step '
      'with the best step size; dotted: the same on centred inputs; '
      'dash-dotted: predicting 0. The linear layer was trained for '
      f'{config.num_steps:,} steps{softmax}.',
    },
    {
      'file': 'figures/generalisation.png',
      'caption': 'Left: loss when context and query are scaled by a factor '
      'that training never saw (1 is training): the trained linear layer '
      f'(mean and 95 % interval over {seeds}), one step of gradient descent '
      'with the step size fitted at 1, and its closed form. Right: loss of the '
      'layers between trained weights (0) and constructed ones (1), thin lines '
      'for seeds, both rescaled to unit query-key products.',
    },
    {
      'file': 'figures/products.png',
      'caption': 'The query-key product of the trained linear layer, times its '
      'value-output entry for labels, for the first seed (left) and as '
      'constructed with the best step size (right). Both are multiples of the '
      'identity, up to what training left.',
    },
    {
      'file': 'figures/steps.png',
      'caption': 'Loss of tuned gradient descent and GD++ against the number '
      'of steps, tasks and queries integrated out over '
      f'{config.num_yardstick_tasks:,} draws of the inputs, with 95 % '
      'intervals (smaller than the marks), and the losses of an independent '
      'computation on 20,000 tasks (crosses). With one step all are the same; '
      'untied means a step size and a contraction for each step.',
    },
    {
      'file': 'figures/stacks.png',
      'caption': 'Linear self-attention of several layers, looped (all layers '
      f'share their weights) or untied: loss on {tasks} against training '
      f'steps, mean and 95 % interval over {seeds}. Every layer starts as the '
      'trained single layer. Lines: tuned gradient descent and GD++ of as many '
      'steps on the same tasks.',
    },
    {
      'file': 'figures/sine.png',
      'caption': 'Sine waves. Left: loss of a network with one layer of linear '
      'self-attention on top, and of one gradient step on the last layer of a '
      'network whose start and step size are trained, mean and 95 % interval '
      f'over {seeds}. Right: predictions of all seeds of both along one task.',
    },
    {
      'file': 'figures/alternating.png',
      'caption': 'Inputs and labels as separate tokens, '
      f'{config.alternating_size} demonstrations in '
      f'{config.alternating_size} dimensions. Left: loss of a softmax layer '
      'followed by a linear one, mean and 95 % interval over '
      f'{seeds}. Right: mean attention of the first layer of the best seed; '
      'squares mark the other token of a pair.',
    },
  ]


def _conclusion(numbers, steps, result) -> str:
  row = numbers['loss_trained_minus_gd']
  cos = result['curves']['linear']['model_cos'][:, -1]
  good = int(np.sum(cos >= ALIGNED))
  more = []
  if 'softmax_2_minus_gd' in numbers:
    more.append(
      'Softmax with two heads ends '
      f'{numbers["softmax_2_minus_gd"]["mean"]:.4f} above gradient descent '
      'with a Model cos of '
      f'{numbers["model_cos_softmax_2"]["mean"]:.3f}, with one head '
      f'{numbers["softmax_1_minus_2"]["mean"]:.4f} above two.'
    )
  if steps:
    parts = ', '.join(
      f'{r["method"]} {r["loss"]:.4f} after {r["num_steps"]}' for r in steps
    )
    more.append(f'Tuned step sizes reach, in expectation: {parts} steps.')
  more.append(step_claims.text_of_stacks(result.get('stacks', ())))
  more.append(variant_claims.text(result))
  return (
    'Constructed linear self-attention does gradient descent up to '
    f'{result["residuals"]["layers"]:.1e} (float64). Trained, one layer ends '
    f'at a loss of {numbers["loss_trained"]["mean"]:.4f}, '
    f'{row["mean"]:+.4f} [{row["low"]:+.4f}, {row["high"]:+.4f}] from one step '
    f'with the best step size, and {good} of {len(cos)} seeds learn its model '
    f'to a Model cos of {ALIGNED} or more (smallest {np.min(cos):.4f}); theory '
    f'expects a loss of {numbers["loss_closed_form"]:.4f}.'
    f'{"".join(f" {sentence}" for sentence in more if sentence)}'
  )
