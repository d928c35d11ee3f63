"""Claims, captions and conclusion of `experiments.linear_regression_gd`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments.claims import judge
from experiments.linear_regression_gd_measure import FRACTIONS
from experiments.linear_regression_gd_steps import linear_tasks
from iclcl_jax.accounts import linear_regression_gd as account

COMMAND = 'python -m experiments.linear_regression_gd --workdir=DIR'
SOURCE = 'von Oswald et al., arXiv:2212.07677'
EXACT = 1e-12
CLOSE = 0.002  # Excess of the loss.
ALIGNED = 0.999
# Losses of an independent computation, 20,000 tasks, for d_x = N = 10 and
# half-range 0.5: method and number of steps.
YARDSTICK_TASKS = 20_000
YARDSTICKS = {
  ('GD', 1): 0.2048,
  ('GD', 2): 0.1550,
  ('GD', 5): 0.1078,
  ('GD++', 2): 0.1095,
  ('GD++', 5): 0.0520,
}


def summarise(config, result: Mapping[str, Any]) -> dict[str, Any]:
  """The summary, but for the time of the whole run."""
  numbers = _numbers(config, result)
  steps = [_with_yardstick(config, row) for row in result['steps_of_gd']]
  claims = [
    *_claims_of_layer(result, numbers),
    *_claims_of_softmax(numbers),
    *_claims_of_steps(steps),
  ]
  return {
    'construction_residual_float64': result['residual'],
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
    'loss_softmax_1': curves['softmax_1']['loss'][:, -1],
    'loss_softmax_2': curves['softmax_2']['loss'][:, -1],
    'softmax_2_minus_gd': curves['softmax_2']['loss'][:, -1] - loss_gd,
    'softmax_1_minus_2': curves['softmax_1']['loss'][:, -1]
    - curves['softmax_2']['loss'][:, -1],
    'model_cos_softmax_1': curves['softmax_1']['model_cos'][:, -1],
    'model_cos_softmax_2': curves['softmax_2']['model_cos'][:, -1],
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


def _claim(name: str, claim: str, statistic: str, row, **limits) -> Any:
  """A claim on a number, or on a mean with its interval."""
  source = limits.pop('source', SOURCE)
  spread = isinstance(row, Mapping)
  low, high = (row['low'], row['high']) if spread else (row, row)
  return {
    'id': f'linear-regression-gd-{name}',
    'source': source,
    'claim': claim,
    'statistic': statistic,
    'value': row['mean'] if spread else row,
    'interval': [low, high] if spread else None,
    'verdict': judge(low, high, **limits),
    'command': COMMAND,
  }


def _claims_of_layer(result, numbers) -> list[Any]:
  best = numbers['learning_rate_gd']
  return [
    _claim(
      'construction',
      'constructed layers do gradient descent, and GD++, from any W_0',
      'largest relative error over 1 and 4 layers and random problems, '
      f'float64; at most {EXACT:g}',
      result['residual'],
      at_most=EXACT,
      source=f'{SOURCE}, proposition 1',
    ),
    _claim(
      'loss',
      'a trained layer of linear self-attention reaches the loss of one step',
      'loss minus that of one step with the best step size on the same tasks, '
      f'mean over seeds; at most {CLOSE}',
      numbers['loss_trained_minus_gd'],
      at_most=CLOSE,
      source=f'{SOURCE}, figure 2',
    ),
    _claim(
      'model-cos',
      'it learns the model that one step learns',
      'Model cos, mean over seeds; at least .999',
      numbers['model_cos'],
      at_least=ALIGNED,
      source=f'{SOURCE}, figure 2',
    ),
    _claim(
      'step-size',
      'its step size is the best one',
      'learnt step size, mean over seeds; within 5 % of the best on the test '
      f'tasks, {best:.3f}',
      numbers['learning_rate_learnt'],
      at_least=0.95 * best,
      at_most=1.05 * best,
    ),
    _claim(
      'interpolation',
      'the average of trained and constructed weights does as well as both',
      'loss halfway minus the larger loss of the two ends, mean over seeds; at '
      f'most {CLOSE}',
      numbers['loss_halfway_minus_larger_end'],
      at_most=CLOSE,
      source=f'{SOURCE}, figure 2',
    ),
    _claim(
      'input-scale',
      'it generalises over the scale of inputs as gradient descent does',
      'largest relative deviation of its loss from that of one step, inputs '
      'scaled by .5 to 2, mean over seeds; at most .1',
      numbers['scale_deviation'],
      at_most=0.1,
      source=f'{SOURCE}, figure 3',
    ),
  ]


def _claims_of_softmax(numbers) -> list[Any]:
  source = f'{SOURCE}, appendix A.9'
  return [
    _claim(
      'softmax-heads',
      'softmax needs two heads',
      'loss with one head minus loss with two, mean over seeds; above .05',
      numbers['softmax_1_minus_2'],
      at_least=0.05,
      source=source,
    ),
    _claim(
      'softmax-near',
      'softmax with two heads comes near gradient descent',
      'loss minus that of one step, mean over seeds; at most .03',
      numbers['softmax_2_minus_gd'],
      at_most=0.03,
      source=source,
    ),
    _claim(
      'softmax-equal',
      'softmax with two heads is one step of gradient descent',
      'Model cos, mean over seeds; at least .999 as for the linear layer',
      numbers['model_cos_softmax_2'],
      at_least=ALIGNED,
      source='control',
    ),
  ]


def _claims_of_steps(steps) -> list[Any]:
  claims = []
  for row in steps:
    name = f'{row["method"].replace("+", "p").lower()}-{row["num_steps"]}'
    if row['method'] == 'GD++':
      half = 1.96 * row['minus_gd_standard_error']
      gain = {
        'mean': row['minus_gd'],
        'low': row['minus_gd'] - half,
        'high': row['minus_gd'] + half,
      }
      claims.append(
        _claim(
          f'{name}-better',
          f'{row["num_steps"]} steps of GD++ beat as many of gradient descent',
          'loss minus that of gradient descent, both tuned, paired over tasks;'
          ' below 0',
          gain,
          at_most=0.0,
          source=f'{SOURCE}, figure 4',
        )
      )
    if row['yardstick'] is not None:
      claims.append(
        _claim(
          f'{name}-yardstick',
          f'{row["num_steps"]} tuned steps of {row["method"]} reach the loss '
          f'{row["yardstick"]} of an independent computation',
          'deviation in units of 2 % or 3 standard errors of the difference, '
          f'whichever is larger (the other was on {YARDSTICK_TASKS:,} tasks); '
          'at most 1',
          row['deviation'],
          at_most=1.0,
          source='control',
        )
      )
  return claims


def _with_yardstick(config, row: Mapping[str, Any]) -> dict[str, Any]:
  """The row, with the expected loss if these are its settings."""
  is_published = (config.d_x, config.num_demonstrations) == (10, 10)
  is_published &= config.half_range == 0.5
  expected = YARDSTICKS.get((row['method'], row['num_steps']))
  if not is_published or expected is None:
    return {**row, 'yardstick': None, 'deviation': None}
  # The expected loss is an estimate itself, on fewer tasks.
  ratio = config.num_yardstick_tasks / YARDSTICK_TASKS
  error = row['standard_error'] * (1 + ratio) ** 0.5
  allowed = max(0.02 * expected, 3 * error)
  deviation = abs(row['loss'] - expected) / allowed
  return {
    **row,
    'yardstick': expected,
    'deviation': deviation,
    'relative_difference': row['loss'] / expected - 1,
  }


def _figures(config) -> list[dict[str, str]]:
  seeds = f'{config.num_seeds} seeds'
  tasks = f'{config.num_test_tasks:,} fixed tasks'
  return [
    {
      'file': 'figures/training.png',
      'caption': f'Training from a small random start: loss on {tasks} (left) '
      'and Model cos with one step of gradient descent (right), one thin line '
      f'for each of {seeds}, a marked line for the median. Dashed: one step '
      'with the best step size; dotted: the same on centred inputs; '
      'dash-dotted: predicting 0. Softmax layers were trained for '
      f'{config.softmax_steps:,} steps, the linear one for '
      f'{config.num_steps:,}.',
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
      f'of steps, {config.num_yardstick_tasks:,} tasks, with 95 % intervals '
      '(smaller than the marks), and the losses of an independent computation '
      '(crosses). With one step the two are the same.',
    },
  ]


def _conclusion(numbers, steps, result) -> str:
  row = numbers['loss_trained_minus_gd']
  cos = result['curves']['linear']['model_cos'][:, -1]
  good = int(np.sum(cos >= ALIGNED))
  parts = ', '.join(
    f'{r["method"]} {r["loss"]:.4f} after {r["num_steps"]}' for r in steps
  )
  return (
    'Constructed linear self-attention does gradient descent up to '
    f'{result["residual"]:.1e} (float64). Trained, one layer ends at a loss of '
    f'{numbers["loss_trained"]["mean"]:.4f}, '
    f'{row["mean"]:+.4f} [{row["low"]:+.4f}, {row["high"]:+.4f}] from one step '
    f'with the best step size, and {good} of {len(cos)} seeds learn its model '
    f'to a Model cos of {ALIGNED} or more (smallest {np.min(cos):.4f}); theory '
    f'expects a loss of {numbers["loss_closed_form"]:.4f}. Softmax with two '
    f'heads ends {numbers["softmax_2_minus_gd"]["mean"]:.4f} above gradient '
    f'descent with a Model cos of {numbers["model_cos_softmax_2"]["mean"]:.3f},'
    f' with one head {numbers["softmax_1_minus_2"]["mean"]:.4f} above two. '
    f'Tuned step sizes reach: {parts} steps.'
  )
