"""Summary, tables and conclusion of `experiments.accounts`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import accounts_claims as judging
from experiments import harness
from experiments.accounts_memories import MEMORIES
from iclcl_jax.accounts import linear_regression_gd as account

TUNED, TRAINED = judging.TUNED, judging.TRAINED


def summarise(config: Any, tables, result) -> dict[str, Any]:
  """The summary, without times."""
  at = config.lengths.index(config.num_demonstrations)
  claims = judging.claims(config, tables, result)
  learners = [_learner(config, name, result[name], at) for name in result]
  summary = {
    'learners': learners,
    'statements': _statements(tables, learners),
    'closed_form_loss': _closed_form(config),
    'lengths': config.lengths,
    'scales': config.scales,
    'loss_by_length': _means(result, 'loss'),
    'loss_by_scale': _means(result, 'scaled'),
    'loss_unit': 'mean squared error over that of predicting 0',
    'claims': claims,
    'figures': [{'file': 'figures/accounts.png', 'caption': caption(config)}],
  }
  return summary | {'conclusion': _conclusion(config, summary)}


def _learner(config, name, row, at) -> dict[str, Any]:
  """One line of the table of learners."""
  tuned = harness.mean_interval(row['loss'][TUNED, :, at])
  gates = zip(
    MEMORIES[name].gates, row['gates'][TUNED].mean(axis=0), strict=True
  )
  line: dict[str, Any] = {
    'learner': name,
    'account': MEMORIES[name].account,
    'tuned': {gate.name: float(value) for gate, value in gates},
    'loss_tuned': tuned,
    'loss_tuned_longest': float(row['loss'][TUNED, :, -1].mean()),
  }
  if name not in judging.LAYERS:
    return line
  return line | {
    'loss_trained': harness.mean_interval(row['loss'][TRAINED, :, at]),
    'trained_over_tuned': judging.ratio(row['ratio'], 1.0),
    'ratios': row['ratio'],
    'ratio_median': float(np.median(row['ratio'])),
    'num_apart': config.num_seeds
    - judging.within(row['ratio'], **judging.CLOSE),
    'model_cos': harness.mean_interval(row['cosine']),
    'preds_diff_relative': harness.mean_interval(row['difference']),
    'num_mirrored': int(row['mirrored'].sum()),
  }


def _means(result, key) -> dict[str, Any]:
  names = 'tuned', 'trained'
  return {
    name: {
      names[kind]: np.mean(row[key][kind], axis=0)
      for kind in range(len(row[key]))
    }
    for name, row in result.items()
  }


def _closed_form(config) -> list[float]:
  """Expected loss of one step, tuned at the training length, by length."""

  def tasks(size):
    return account.LinearTasks(
      d_x=config.d_x,
      num_demonstrations=size,
      moments=account.uniform_moments(1.0),
      noise_variance=config.noise**2,
    )

  rate = account.optimal_learning_rate(tasks(config.num_demonstrations))
  return [
    float(account.expected_loss(tasks(n), rate) / (config.d_x / 6))
    for n in config.lengths
  ]


def _statements(tables, learners) -> list[dict[str, Any]]:
  """Every statement with its kind and the number behind it."""
  rows = [
    row | {'kind': kind, 'unit': unit}
    for key, kind, unit in (
      ('identities', 'identity', 'largest relative difference, float64'),
      ('approximations', 'approximation', 'relative root mean square'),
    )
    for row in tables[key]
  ]
  return rows + [
    {
      'account': line['account'],
      'statement': f'trained layer = tuned {line["learner"]}',
      'difference': line['preds_diff_relative']['mean'],
      'kind': 'empirical',
      'unit': 'Preds diff over the mean prediction',
    }
    for line in learners
    if 'loss_trained' in line
  ]


def caption(config: Any) -> str:
  """What the figure shows."""
  return (
    'In-context linear regression by every account, on the same prompts '
    f'(d = {config.d_x}, inputs from U(-1, 1), label noise {config.noise:g}); '
    'losses over that of predicting 0. (a) The inner learners that the '
    'accounts predict, their one or two numbers tuned at '
    f'{config.num_demonstrations} demonstrations (dotted line), at other '
    'numbers of them; curves that coincide cover each other. (b) Layers whose '
    'projections are trained: excess of their loss over that of the tuned '
    'inner learner, a dot for each seed and the geometric mean; the axis is '
    'linear within 1 % (grey) and logarithmic beyond. Right, how many seeds '
    'lie outside 5 % (dashed lines), and the mean over seeds of the cosine of '
    'the derivatives of both answers in the query. '
    'A softmax layer may find the mirror image of the predicted one - queries '
    'and values with the other sign - which is as good for symmetric inputs; '
    'then the cosine is to the mirror image. (c) Inputs scaled at test time, '
    'and (d) more demonstrations than in training: lines are tuned, markers '
    f'trained. {config.num_seeds} seeds, each with {config.num_test_prompts} '
    'test prompts of its own; shades and bars are 95 % intervals of the mean. '
    'Means of losses are geometric; losses outside the frames are left out.'
  )


def _conclusion(config, summary) -> str:
  identities = [r for r in summary['statements'] if r['kind'] == 'identity']
  worst = max(row['difference'] for row in identities)
  lines = {line['learner']: line for line in summary['learners']}
  order = sorted(lines, key=lambda name: -lines[name]['loss_tuned']['mean'])
  losses = ', '.join(
    f'{name} {lines[name]["loss_tuned"]["mean"]:.2g}' for name in order
  )
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}

  def named(prefix, verdict):
    names = [
      name
      for name in judging.layers(lines)
      if verdicts[judging.identifier(f'{prefix}-{name}')] == verdict
    ]
    return ', '.join(names) or 'none'

  return (
    f'All {len(identities)} identities hold to {worst:.0e} in float64, on the '
    'same demonstrations. As learners of '
    f'{config.num_demonstrations} demonstrations of width {config.d_x} the '
    f'accounts differ; loss over that of predicting 0, tuned: {losses}. '
    'Trained layers learn as well as the inner step they are predicted to be, '
    'within 5 % in the geometric mean over seeds, for: '
    f'{named("trained", "reproduced")}; differently for: '
    f'{named("trained", "not reproduced")}; undecided for: '
    f'{named("trained", "undecided")}. {_apart(config, lines)} Their '
    'dependence on the query is that of the inner step (mean cosine at least '
    f'{judging.ALIGNED}) for: '
    f'{named("aligned", "reproduced")}.'
  )


def _apart(config, lines) -> str:
  """Seeds whose layer is not as good as its inner step, or better."""
  counts = [
    f'{name} {line["num_apart"]} (worst ratio {max(line["ratios"]):.2g})'
    for name, line in lines.items()
    if line.get('num_apart')
  ]
  return (
    f'Seeds of {config.num_seeds} that lie outside these 5 %: '
    f'{", ".join(counts) or "none"}.'
  )


def text(summary: Mapping[str, Any]) -> str:
  """What is printed: statements, learners, claims, conclusion."""
  statements = [
    {
      'kind': row['kind'],
      'account': row['account'].split(', arXiv')[0],
      'statement': row['statement'],
      'difference': f'{row["difference"]:.1e}',
    }
    for row in summary['statements']
  ]
  learners = [_line(line) for line in summary['learners']]
  claims = [
    {
      'claim': row['id'].removeprefix('accounts-'),
      'value': 'nan' if row['value'] is None else f'{row["value"]:.3g}',
      '95 %': _interval(row['interval']),
      'verdict': row['verdict'],
    }
    for row in summary['claims']
  ]
  tables = [harness.table(rows) for rows in (statements, learners, claims)]
  return '\n\n'.join([*tables, summary['conclusion']])


def _line(line) -> dict[str, str]:
  tuned = ', '.join(f'{k} {v:.3g}' for k, v in line['tuned'].items())
  row = {
    'learner': line['learner'],
    'tuned': tuned,
    'loss': _number(line['loss_tuned']['mean']),
    'longest': _number(line['loss_tuned_longest']),
    'trained': '-',
    'ratio': '-',
    'median': '-',
    'range': '-',
    'apart': '-',
    'Model cos': '-',
    'mirrored': '-',
  }
  if 'loss_trained' in line:
    row['trained'] = _number(line['loss_trained']['mean'])
    row['ratio'] = _number(line['trained_over_tuned']['mean'])
    row['median'] = _number(line['ratio_median'])
    row['range'] = f'{min(line["ratios"]):.3g} to {max(line["ratios"]):.3g}'
    row['apart'] = str(line['num_apart'])
    row['Model cos'] = _number(line['model_cos']['mean'])
    row['mirrored'] = str(line['num_mirrored'])
  return row


def _number(value) -> str:
  return 'nan' if value is None else f'{value:.3g}'


def _interval(interval) -> str:
  if interval is None:
    return '-'
  return '[' + ', '.join(map(_number, interval)) + ']'
