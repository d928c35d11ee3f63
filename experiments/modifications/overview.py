"""All layers side by side: beside the plain one, their controls, and tests.

Ratios are not corrected for their number. Tuned rates are chosen for each layer
by the training loss of the other runs.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing
from experiments.modifications import (
  augmented,
  comparison,
  negatives,
  regularised,
)
from experiments.modifications.comparison import PLAIN, RATES, Results

PANELS = {
  'regularised': regularised,
  'augmented': augmented,
  'negatives': negatives,
}
# The measures, and what they are.
MEASURES = {
  'early': 'training loss, first epochs',
  'held_out': 'held-out prompts',
  'longer': 'more demonstrations',
  'scaled': 'larger inputs',
  'other_task': 'another B',
}
RATE_WORDS = {'fixed': 'fixed rate', 'tuned': 'tuned rate'}
RATE_STYLE = {
  'fixed': {'fmt': 'o', 'color': drawing.BLUE},
  'tuned': {'fmt': 's', 'color': drawing.ORANGE, 'mfc': 'white'},
}
TEST_STYLE = {
  'held_out': {'fmt': 'o', 'color': drawing.BLACK},
  'longer': {'fmt': '^', 'color': drawing.BLUE, 'mfc': 'white'},
  'scaled': {'fmt': 's', 'color': drawing.GREEN, 'mfc': 'white'},
  'other_task': {'fmt': 'X', 'color': drawing.ORANGE},
}


class Row(NamedTuple):
  panel: str  # Their panel.
  layer: str  # Its name.
  control: str  # The name of the other.
  num_params: int  # Trained numbers of the layer.
  rates: Mapping[str, int]  # How many runs chose which learning rate.
  entries: Mapping[str, Mapping[str, comparison.Entry]]  # By rate and measure.

  @property
  def cells(self) -> dict[str, str]:
    return {
      f'{measure}, {rate}': str(self.entries[rate][measure])
      for rate in RATES
      for measure in ('early', 'held_out')
    }


class Overview(NamedTuple):
  panels: Mapping[str, Results]  # Their results.
  layers: Sequence[Row]  # Every layer beside the plain one.
  controls: Sequence[Row]  # Every modification beside its control.


def measure(config: Config) -> Overview:
  panels = {
    'regularised': regularised.measure(config).panel,
    'augmented': augmented.measure(config),
    'negatives': negatives.measure(config),
  }

  def compare(panel, name, control=PLAIN):
    results, rates = panels[panel], learning_rates(config)
    chosen = results.chosen[:, list(results.layers).index(name)].tolist()
    entries = {
      rate: {x: results.compare(rate, x, name, control) for x in MEASURES}
      for rate in RATES
    }
    return Row(
      panel,
      name,
      control,
      results.layers[name].num_params,
      {f'{rates[j]:g}': n for j, n in sorted(Counter(chosen).items())},
      entries,
    )

  return Overview(
    panels,
    [compare(panel, x) for panel in panels for x in panels[panel].layers],
    [
      compare(panel, *pair)
      for panel, question in PANELS.items()
      for pair in question.controls(config)
    ],
  )


def learning_rates(config: Config) -> list[float]:
  return [config.rate * x for x in config.rate_factors]


def memorisation(config: Config, panels: Mapping[str, Results]) -> str:
  """What all of this measures; with fresh matrices, how little is learnt."""
  text = comparison.memorisation(config, panels['regularised'])
  if not config.multi_task:
    return text
  best = (
    min(
      result.loss(rate, 'held_out', name)
      for result in panels.values()
      for name in result.layers
    )
    for rate in RATES
  )
  said = ' and '.join(map(str, best))
  return f'{text} That of the best of all layers: {said}.'


def summary(config: Config, results: Overview) -> dict[str, Any]:
  def layer(row):
    return {
      'panel': row.panel,
      'layer': row.layer,
      'num_trained_parameters': row.num_params,
      'tuned_learning_rates': row.rates,
    } | {
      rate: {
        x: entry.to_dict() | {'relative_loss': comparison.plain(entry.loss)}
        for x, entry in row.entries[rate].items()
      }
      for rate in RATES
    }

  def control(row):
    return {'layer': row.layer, 'control': row.control} | {
      rate: {x: row.entries[rate][x] for x in ('early', 'held_out')}
      for rate in RATES
    }

  return {
    'num_seeds': config.num_seeds,
    'learning_rate': config.rate,
    'learning_rates': learning_rates(config),
    'units': 'Losses are relative to that of predicting 0 on the same prompts; '
    'ratios are to the plain layer, geometric means of paired runs.',
    'interval': '95 % t-interval of the mean log over runs',
    'measures': {x: comparison.words(config, x) for x in MEASURES},
    'plain': {
      rate: {x: comparison.plain(entry.loss) for x, entry in by_measure.items()}
      for rate, by_measure in results.layers[0].entries.items()
    },
    'layers': [layer(row) for row in results.layers],
    'controls': [control(row) for row in results.controls],
    'single_task': not config.multi_task,
    'memorisation': memorisation(config, results.panels),
  }


def conclude(config: Config, results: Mapping[str, Any], claims: Any) -> str:
  found = results['overview']

  def statements(rate, words):
    counts = Counter(x.verdict for k, x in claims.items() if k.endswith(rate))
    return f"""{words}, {counts['reproduced']} of {counts.total()} statements
      reproduced, {counts['not reproduced']} did not, and {counts['undecided']}
      stay undecided."""

  def better(rows, rate, name_fn):
    lower = (x for x in rows if 'better' in x.entries[rate]['held_out'].verdict)
    return ', '.join(map(name_fn, lower)) or 'none'

  named = {n for x in PANELS.values() for n in x.published(config)}
  rows = [row for row in found.layers if row.layer in named]
  chosen = sum((Counter(row.rates) for row in found.layers), Counter())
  largest = f'{max(learning_rates(config)):g}'
  lower = {  # At each rate: published layers, and layers with a control.
    rate: (
      better(rows, rate, lambda x: x.layer),
      better(found.controls, rate, '{0.layer} over {0.control}'.format),
    )
    for rate in RATES
  }
  return f"""{statements('fixed', 'At the fixed learning rate')}
    {statements('tuned', 'With tuned rates')} Published layers with a lower
    final loss than the plain one: {lower['fixed'][0]} at the fixed rate,
    {lower['tuned'][0]} at tuned ones. Layers with a lower final loss than their
    control: {lower['fixed'][1]} at the fixed rate, {lower['tuned'][1]} at tuned
    ones. The largest rate of the grid, {largest}, was chosen in
    {chosen[largest]} of {chosen.total()} runs of all layers; there a larger one
    may be better still. The printed regularised form with alpha < 0 is a
    residual connection on the token's value (largest relative difference at the
    trained layers in float64: {results['regularised'].identity:.1g}).
    {memorisation(config, found.panels)}"""


def tables(config: Config, results: Overview) -> dict[str, Any]:
  return {
    'layers': [
      {'layer': row.layer, 'params': row.num_params}
      | row.cells
      | {
        'tuned rates (runs)': ' '.join(
          f'{rate}({count})' for rate, count in row.rates.items()
        )
      }
      for row in results.layers
    ],
    'controls': [
      {'layer': row.layer, 'control': row.control} | row.cells
      for row in results.controls
    ],
  }


def metrics(config: Config, results: Overview) -> lab.Metrics:
  axes: Any = {'learning_rate': learning_rates(config)}
  axes['epoch'] = range(1, config.num_epochs + 1)
  for panel, result in results.panels.items():
    curves = np.transpose(result.curves, (2, 3, 0, 1))  # Seeds last.
    found = {'training_loss_over_zero_loss_by_seed': curves}
    yield from lab.tidy({'panel': panel}, found, layer=[*result.layers], **axes)


def figures(config: Config, results: Overview) -> list[lab.Figure]:
  note = f'{comparison.setting(config)} {memorisation(config, results.panels)}'
  ratios = f"""Loss of every layer and control over that of the plain layer in
    the same run, geometric mean with its 95 % interval, not corrected for the
    number of rows; below 1 is better. Training loss of epochs
    1-{config.early_epochs} and held-out loss, at the fixed learning rate
    (discs) and at one tuned for each layer (squares) by the last
    {config.early_epochs} epochs of the other runs. Grey band: comparable; names
    in grey italics: controls. {note}"""
  tests = f"""Loss after training relative to predicting 0 on the same prompts
    (dashed line), on held-out prompts, with N =
    {config.longer_num_demonstrations}, on inputs {config.input_scale:g} times
    as large, and on prompts of other matrices B; geometric mean over runs with
    its 95 % interval. Plain and published layers alone: the others are in the
    figure of ratios. {note}"""
  return [
    lab.Figure('ratios', _ratios(config, results), ratios),
    lab.Figure('tests', _tests(config, results), tests),
  ]


def _ratios(config, results):
  """Forest plot: early and final ratios, at fixed and at tuned rates."""
  rows = [row for row in results.layers if row.layer != PLAIN]
  size = 13, 0.23 * len(rows) + 1.8
  figure, axes = drawing.subplots(1, 4, figsize=size, sharey=True)
  columns = [(rate, x) for rate in RATES for x in ('early', 'held_out')]
  words = {'early': f'epochs 1-{config.early_epochs}', 'held_out': 'held out'}
  for axis, (rate, measure) in zip(axes, columns, strict=True):
    axis.axvspan(*comparison.MARGIN, color='0.86', lw=0)
    axis.axvline(1, color='0.3', lw=1)
    ratios = [row.entries[rate][measure].ratio for row in rows]
    _points(axis, rows, ratios, **RATE_STYLE[rate])
    _finish(axis, rows)
    axis.set_title(f'{words[measure]}, {RATE_WORDS[rate]}')
    axis.set_xlabel('loss / loss of plain layer')
  controls = [row.control for row in results.controls]
  for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
    if row.layer in controls:
      label.set(color='0.4', style='italic')
  return figure


def _tests(config, results):
  """Losses in and out of distribution, published layers alone."""
  shown = {n for x in PANELS.values() for n in x.published(config)}
  rows = [x for x in results.layers[1:] if x.layer in shown]
  rows.insert(0, results.layers[0])  # The plain layer.
  size = 11, 0.36 * len(rows) + 1.9
  figure, axes = drawing.subplots(1, 2, figsize=size, sharey=True)
  for axis, rate in zip(axes, RATES, strict=True):
    axis.axvline(1, color='0.3', lw=1, ls='--')
    for k, (test, look) in enumerate(TEST_STYLE.items()):
      losses = [row.entries[rate][test].loss for row in rows]
      look = look | {'offset': 0.18 * (k - 1.5), 'label': MEASURES[test]}
      _points(axis, rows, losses, **look)
    _finish(axis, rows)
    axis.set(title=RATE_WORDS[rate], xlabel='loss / loss of predicting 0')
  drawing.legend(axes[0], 4)
  return figure


def _points(axis, rows, estimates, **look) -> None:
  """Estimates by layer; a word where a run diverged."""
  none = lab.exactly(np.nan)
  points = {
    comparison.pretty(row.layer): x if np.isfinite(x.low) else none
    for row, x in zip(rows, estimates, strict=True)
  }
  drawing.forest(axis, points, ms=4.5, lw=1.2, **look)
  for place, x in enumerate(points.values()):
    if x is none:
      axis.text(
        1.0,
        place + look.get('offset', 0.0),
        'diverged',
        transform=axis.get_yaxis_transform(),
        fontsize=7,
        ha='right',
        va='center',
        color=look['color'],
      )


def _finish(axis, rows) -> None:
  """Rules off the panels, and fits the axes to all that is drawn."""
  for place, pair in enumerate(itertools.pairwise(rows)):
    if pair[0].panel != pair[1].panel:
      axis.axhline(place + 0.5, color='0.7', lw=0.8)
  axis.tick_params(axis='y', length=0, labelsize=8)
  drawing.ratio_axis(axis, 'x')
