"""Summary, table and conclusion of `experiments.modifications`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import harness
from experiments import modifications_claims as judging
from experiments import modifications_panels as panels
from experiments import modifications_statistics as statistics
from experiments.modifications_statistics import MEASURES, Measured, Ratio
from experiments.modifications_training import Panel

RATES = ('fixed', 'tuned')


def summarise(
  config: Any,
  all_panels: Sequence[Panel],
  data: Mapping[str, Measured],
  residual_identity: float,
) -> dict[str, Any]:
  """All numbers that decide the claims.

  Args:
    config: settings of the experiment.
    all_panels: the panels.
    data: by panel, what was measured.
    residual_identity: what `modifications_checks` returns.

  Returns:
    The summary, without the seconds.
  """
  indices = {
    panel.name: {name: i for i, name in enumerate(panel.names)}
    for panel in all_panels
  }
  plain = {
    rate: {
      measure: _entry(statistics.geometric_mean(losses[:, 0]))
      for measure, losses in getattr(data['regularised'], rate).items()
    }
    for rate in RATES
  }
  claims = judging.claims(config, indices, data)
  summary = {
    'num_seeds': config.num_seeds,
    'learning_rate': config.learning_rate,
    'learning_rates': [config.learning_rate * x for x in config.rate_factors],
    'units': 'Losses are relative to that of predicting 0 on the same prompts; '
    'ratios are to the plain layer, geometric means of paired runs.',
    'interval': '95 % t-interval of the mean log over runs',
    'measures': {x: judging.measure_words(config, x) for x in MEASURES},
    'plain': plain,
    'layers': [
      _layer(config, panel, data[panel.name], i)
      for panel in all_panels
      for i in range(len(panel.names))
    ],
    'controls': _controls(config, indices, data),
    'residual_identity_relative_error_float64': residual_identity,
    'single_task': not config.multi_task,
    'claims': claims,
  }
  summary['memorisation'] = memorisation(config, plain, summary['layers'])
  summary['conclusion'] = _conclusion(config, summary)
  return summary


def _entry(value: Ratio) -> dict[str, Any]:
  finite = np.isfinite(value.low)
  return {
    'value': value.value,
    'interval': [value.low, value.high] if finite else None,
  }


def _layer(config, panel: Panel, data: Measured, i: int) -> dict[str, Any]:
  """One layer: ratios to the plain one, losses, chosen rates."""
  rates = [config.learning_rate * x for x in config.rate_factors]
  row: dict[str, Any] = {
    'panel': panel.name,
    'layer': panel.names[i],
    'num_trained_parameters': panel.num_params[i],
    'tuned_learning_rates': {
      f'{rates[j]:g}': count
      for j, count in sorted(Counter(data.chosen[:, i].tolist()).items())
    },
  }
  for rate in RATES:
    values = getattr(data, rate)
    row[rate] = {}
    for measure in MEASURES:
      losses = values[measure]
      value = statistics.ratio(losses[:, i], losses[:, 0])
      row[rate][measure] = _entry(value) | {
        'verdict': statistics.verdict(value, config.num_seeds),
        'relative_loss': _entry(statistics.geometric_mean(losses[:, i])),
      }
  return row


def _controls(config, indices, data) -> list[dict[str, Any]]:
  """Each modification over its control."""
  rows = []
  for panel, name, control in panels.controls(config):
    row: dict[str, Any] = {'layer': name, 'control': control}
    for rate in RATES:
      row[rate] = {}
      for measure in ('early', 'held_out'):
        losses = getattr(data[panel], rate)[measure]
        value = statistics.ratio(
          losses[:, indices[panel][name]], losses[:, indices[panel][control]]
        )
        row[rate][measure] = _entry(value) | {
          'verdict': statistics.verdict(value, config.num_seeds)
        }
    rows.append(row)
  return rows


def ratio_text(entry: Mapping[str, Any]) -> str:
  """A value with its interval."""
  if entry['interval'] is None:
    return 'diverged'
  low, high = entry['interval']
  return f'{entry["value"]:.3g} [{low:.3g}, {high:.3g}]'


def memorisation(
  config: Any, plain: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]
) -> str:
  """What the curves measure: stands beside every figure."""
  other, held = plain['fixed']['other_task'], plain['fixed']['held_out']
  if config.multi_task:
    return (
      'Every prompt has a matrix B of its own. The held-out loss of the plain '
      f'layer is {ratio_text(held)} times that of predicting 0 at the fixed '
      f'learning rate and {ratio_text(plain["tuned"]["held_out"])} times at '
      'the tuned one; that of the best of all layers is '
      f'{ratio_text(_best(layers, "fixed"))} and '
      f'{ratio_text(_best(layers, "tuned"))} times.'
    )
  return (
    'Training and test prompts of a run share one matrix B, so this measures '
    'how well a layer memorises B, not in-context learning: on prompts of '
    f'other matrices the loss of the plain layer is {ratio_text(other)} times '
    'that of predicting 0 at the fixed learning rate and '
    f'{ratio_text(plain["tuned"]["other_task"])} times at the tuned one, on '
    f'held-out prompts of its own matrix {ratio_text(held)} and '
    f'{ratio_text(plain["tuned"]["held_out"])} times.'
  )


def _best(layers, rate: str) -> Mapping[str, Any]:
  """The lowest relative held-out loss of all layers."""
  losses = [row[rate]['held_out']['relative_loss'] for row in layers]
  return min(losses, key=lambda entry: entry['value'])


def _conclusion(config: Any, summary: Mapping[str, Any]) -> str:
  """One paragraph, from the numbers."""
  sentences = []
  for rate, words in zip(
    RATES, ('At the fixed learning rate', 'With tuned rates'), strict=True
  ):
    counts = Counter(
      claim['verdict']
      for claim in summary['claims']
      if claim['id'].endswith(rate)
    )
    sentences.append(
      f'{words}, {counts["reproduced"]} of {counts.total()} statements '
      f'reproduced, {counts["not reproduced"]} did not, and '
      f'{counts["undecided"]} stay undecided.'
    )
  names = {row['layer']: row for row in summary['layers']}
  named = [n for x in panels.published(config).values() for n in x]
  for rate, words in zip(RATES, ('fixed', 'tuned'), strict=True):
    best = [
      name
      for name in named
      if 'better' in names[name][rate]['held_out']['verdict']
    ]
    sentences.append(
      f'At the {words} rate the published layers with a lower final loss than '
      f'the plain one are: {", ".join(best) or "none"}.'
    )
  for rate, words in zip(RATES, ('the fixed rate', 'tuned rates'), strict=True):
    beaten = [
      f'{row["layer"]} over {row["control"]}'
      for row in summary['controls']
      if 'better' in row[rate]['held_out']['verdict']
    ]
    sentences.append(
      f'Layers with a lower final loss than their control at {words}: '
      f'{", ".join(beaten) or "none"}.'
    )
  sentences.append(_largest_rate(summary))
  identity = summary['residual_identity_relative_error_float64']
  sentences.append(
    'The printed regularised form with alpha < 0 is a residual connection on '
    "the token's value (largest relative difference at the trained layers in "
    f'float64: {identity:.1g}).'
  )
  return ' '.join([*sentences, summary['memorisation']])


def _largest_rate(summary: Mapping[str, Any]) -> str:
  """How often the grid of learning rates ended too early."""
  chosen: Counter[str] = Counter()
  for row in summary['layers']:
    chosen.update(row['tuned_learning_rates'])
  largest = f'{max(summary["learning_rates"]):g}'
  return (
    f'The largest rate of the grid, {largest}, was chosen in '
    f'{chosen[largest]} of {chosen.total()} runs of all layers; there a larger '
    'one may be better still.'
  )


def metrics(
  config: Any, all_panels: Sequence[Panel], data: Mapping[str, Measured]
) -> list[dict[str, Any]]:
  """Training curves: one row for each layer, rate and epoch."""
  rates = [config.learning_rate * x for x in config.rate_factors]
  return [
    {
      'panel': panel.name,
      'layer': name,
      'learning_rate': rate,
      'epoch': epoch + 1,
      'training_loss_over_zero_loss_by_seed': [
        float(f'{x:.5g}') for x in data[panel.name].curves[epoch, :, i, j]
      ],
    }
    for panel in all_panels
    for i, name in enumerate(panel.names)
    for j, rate in enumerate(rates)
    for epoch in range(config.num_epochs)
  ]


def text(summary: Mapping[str, Any]) -> str:
  """The tables that the command prints."""
  parts = [harness.table(list(_rows(summary['layers'])))]
  parts.append('modification over control')
  parts.append(
    harness.table(
      [
        {'layer': row['layer'], 'control': row['control']}
        | {
          f'{measure}, {rate}': _cell(row[rate][measure])
          for rate in RATES
          for measure in ('early', 'held_out')
        }
        for row in summary['controls']
      ]
    )
  )
  parts.append(
    harness.table(
      [
        {
          'verdict': claim['verdict'],
          'value': float(claim['value'] or np.inf),
          'interval': _interval(claim['interval']),
          'claim': claim['claim'],
        }
        for claim in summary['claims']
      ]
    )
  )
  parts.append(summary['conclusion'])
  return '\n\n'.join(parts)


def _rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
  for row in rows:
    yield {
      'layer': row['layer'],
      'params': row['num_trained_parameters'],
      'early, fixed rate': _cell(row['fixed']['early']),
      'final, fixed rate': _cell(row['fixed']['held_out']),
      'early, tuned': _cell(row['tuned']['early']),
      'final, tuned': _cell(row['tuned']['held_out']),
      'tuned rates (runs)': ' '.join(
        f'{rate}({count})'
        for rate, count in row['tuned_learning_rates'].items()
      ),
    }


def _cell(entry: Mapping[str, Any]) -> str:
  return f'{ratio_text(entry)} {entry["verdict"]}'


def _interval(interval: Sequence[float] | None) -> str:
  return '-' if interval is None else f'[{interval[0]:.3g}, {interval[1]:.3g}]'
