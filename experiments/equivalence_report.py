"""Numbers, text and figures that `experiments.equivalence` leaves behind."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import equivalence_checks as checks
from experiments import equivalence_figures as figures
from experiments import harness
from iclcl_jax import precision

MEANING = {
  False: (
    'Single-task training: test and training prompts share one matrix B for '
    'each seed, so the loss measures how well the layer memorises B, not '
    'in-context learning. test_mse_unseen_task is the loss on prompts of '
    'another B.'
  ),
  True: (
    'Multi-task training: a fresh matrix B for every prompt, in training and '
    'in test, so only learning in context can beat predicting 0.'
  ),
}


def summarise(
  config: Any,
  curves: Mapping[int, np.ndarray],
  results: Mapping[int, Mapping[str, Any]],
  certificates: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  """Reduces all arrays to the numbers that decide the claim.

  Args:
    config: settings of the experiment.
    curves: by N, `[num_epochs, 2, S]` losses of training and of predicting 0.
    results: by N, what `equivalence.evaluate` returns.
    certificates: as plain dicts.

  Returns:
    The summary: residuals are the largest over all N, seeds and prompts;
    losses those of the first N.
  """
  parts = {
    str(size): _summarise_one(config, size, curves[size], results[size])
    for size in config.num_demonstrations
  }
  residuals = {
    name: _largest([part[name] for part in parts.values()])
    for name in next(iter(parts.values()))
    if name.startswith(('residual', 'c14'))
  }
  first = parts[str(config.num_demonstrations[0])]
  losses = {
    name: value for name, value in first.items() if name.startswith('test_mse')
  }
  tolerances = _tolerances(config)
  holds = all(row['passed'] for row in certificates) and all(
    residuals[name] <= bound for name, bound in tolerances.items()
  )
  return {
    'holds': holds,
    **residuals,
    'tolerances': tolerances,
    **losses,
    'test_mse_num_demonstrations': config.num_demonstrations[0],
    'test_mse_meaning': MEANING[config.multi_task],
    'num_seeds': config.num_seeds,
    'input_distribution': config.input_distribution,
    'multi_task': config.multi_task,
    'dual_epochs': config.dual_epochs,
    'by_num_demonstrations': parts,
    'certificates': certificates,
  }


def _tolerances(config: Any) -> dict[str, float]:
  """The residuals that rounding explains."""
  # Rounding adds up over the visits of a long float32 run.
  visits = config.dual_epochs * max(config.num_demonstrations)
  exact, single = (
    precision.TOLERANCES['float64'],
    precision.TOLERANCES['float32'],
  )
  return {
    'residual_float64': exact,
    'residual_float32': single,
    'residual_exact_softmax_float64': exact,
    'residual_exact_softmax_float32': single,
    'residual_multi_epoch_float64': exact,
    'residual_multi_epoch_float32': max(single, 5e-9 * visits),
    'c14_curve_residual_float64': checks.CURVE_TOLERANCE,
  }


def _summarise_one(
  config: Any, size: int, curve: np.ndarray, result: Mapping[str, Any]
) -> dict[str, Any]:
  """The part of one N."""
  target = result['target']
  exact = result['one_step_float64']
  single = result['one_step_float32']
  descent = result['descent_float64']
  curve_residuals = descent, result['descent_1_epoch']

  def by_seed(prediction, label):
    return np.mean((prediction - label) ** 2, axis=(1, 2))

  mse = {
    'attention': by_seed(exact.attention, target),
    'dual': by_seed(exact.dual, target),
    'zero_predictor': by_seed(0, target),
    'unseen_task': by_seed(
      result['unseen'].attention, np.roll(target, -1, axis=0)
    ),
  }
  zero_unseen = np.roll(mse['zero_predictor'], -1)
  ratios = {
    'attention': mse['attention'] / mse['zero_predictor'],
    'unseen_task': mse['unseen_task'] / zero_unseen,
  }
  return {
    'residual_float64': _largest(exact.residual),
    'residual_float32': _largest(single.residual),
    'residual_exact_softmax_float64': _largest(exact.softmax_residual),
    'residual_exact_softmax_float32': _largest(single.softmax_residual),
    'residual_multi_epoch_float64': _largest(descent.residual),
    'residual_multi_epoch_float32': _largest(
      result['descent_float32'].residual
    ),
    'c14_curve_residual_float64': _largest(
      [_largest(x.curve_residual) for x in curve_residuals]
    ),
    **{f'test_mse_{name}': np.mean(x) for name, x in mse.items()},
    'test_mse_95_percent_interval': {
      name: harness.mean_interval(x) for name, x in mse.items()
    },
    'loss_over_zero_predictor': {
      name: harness.mean_interval(x) for name, x in ratios.items()
    },
    'training_loss_over_zero_predictor_last_epoch': harness.mean_interval(
      curve[-1, 0] / curve[-1, 1]
    ),
    'num_test_prompts': int(target.shape[1]),
    'num_demonstrations': size,
  }


def _largest(residuals: Any) -> float:
  """The largest residual; NaN if one is not a number."""
  return float(np.max(residuals))


def _number(value: float | None) -> float:
  """A number of a summary, where NaN is written as null."""
  return np.nan if value is None else value


def metrics(curves: Mapping[int, np.ndarray]) -> list[dict[str, Any]]:
  """One row for each N and epoch, losses by seed."""
  return [
    {
      'num_demonstrations': size,
      'epoch': epoch + 1,
      'loss': losses[0],
      'loss_zero_predictor': losses[1],
    }
    for size, curve in curves.items()
    for epoch, losses in enumerate(curve)
  ]


def draw_figures(
  config: Any,
  curves: Mapping[int, np.ndarray],
  results: Mapping[int, Mapping[str, Any]],
  summary: Mapping[str, Any],
  workdir: harness.Workdir,
) -> None:
  """Writes all figures; see `equivalence_figures`."""
  with figures.style():
    drawn = {
      'predictions': figures.predictions(config, results, summary),
      'pretraining': figures.pretraining(config, curves),
    }
    for size, result in results.items():
      drawn[f'descent_{size}'] = figures.descent(config, size, result)
    for name, figure in drawn.items():
      harness.save_figure(workdir, name, figure)


def text(summary: Mapping[str, Any]) -> str:
  """The tables that the command prints; the last line is the verdict."""
  rows = [
    {
      'data': row['data'],
      'map': row['name'],
      'arithmetic': row['dtype'],
      'residual': f'{_number(row["residual"]):.1e}',
      'tolerance': f'{row["tolerance"]:.0e}',
      'condition of D': f'{_number(row["condition"]):.3g}',
      'verdict': row['verdict'],
    }
    for row in summary['certificates']
  ]
  verdict = 'HOLDS' if summary['holds'] else 'FAILS'
  return '\n\n'.join(
    [
      'Certificates: attention = one gradient step of the dual model, at the '
      'trained layer and at small norms',
      harness.table(rows),
      _losses(summary),
      _residuals(summary),
      f'equivalence: {verdict}  residual '
      f'{_number(summary["residual_float64"]):.1e} (float64), '
      f'{_number(summary["residual_float32"]):.1e} (float32)',
    ]
  )


def _losses(summary: Mapping[str, Any]) -> str:
  def interval(estimate):
    return '{mean:.3g} [{low:.3g}, {high:.3g}]'.format(**estimate)

  rows = [
    {
      'N': size,
      'attention': part['test_mse_attention'],
      'dual, 1 step': part['test_mse_dual'],
      'predicting 0': part['test_mse_zero_predictor'],
      'attention / 0': interval(part['loss_over_zero_predictor']['attention']),
      'other B / 0': interval(part['loss_over_zero_predictor']['unseen_task']),
    }
    for size, part in summary['by_num_demonstrations'].items()
  ]
  title = (
    f'Squared error of the label on held-out prompts, {summary["num_seeds"]} '
    f'seeds [95 % interval]. {summary["test_mse_meaning"]}'
  )
  return f'{title}\n\n{harness.table(rows)}'


def _residuals(summary: Mapping[str, Any]) -> str:
  rows = [
    {
      'largest over all seeds and prompts': name,
      'value': f'{_number(summary[name]):.1e}',
      'tolerance': f'{bound:.1e}',
    }
    for name, bound in summary['tolerances'].items()
  ]
  return harness.table(rows)
