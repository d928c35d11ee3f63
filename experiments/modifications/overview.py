"""All layers side by side: beside the plain one, their controls, and tests.

Ratios are not corrected for their number. Tuned rates are chosen for each layer
by the training loss of the other runs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import lab
from experiments.lab import figures as drawing
from experiments.lab import statistics
from experiments.modifications import (
  augmented,
  comparison,
  negatives,
  regularised,
)
from experiments.modifications.training import PLAIN, RATES, Results

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
  'fixed': {'fmt': 'o', 'mfc': drawing.BLUE, 'color': drawing.BLUE},
  'tuned': {'fmt': 's', 'mfc': 'white', 'color': drawing.ORANGE},
}
TEST_STYLE = {
  'held_out': {'fmt': 'o', 'color': drawing.BLACK},
  'longer': {'fmt': '^', 'color': drawing.BLUE, 'mfc': 'white'},
  'scaled': {'fmt': 's', 'color': drawing.GREEN, 'mfc': 'white'},
  'other_task': {'fmt': 'X', 'color': drawing.ORANGE},
}


def measure(config: Any) -> dict[str, Results]:
  """The results of all panels, which their own questions have measured."""
  return {
    'regularised': regularised.measure(config).panel,
    'augmented': augmented.measure(config),
    'negatives': negatives.measure(config),
  }


def learning_rates(config: Any) -> list[float]:
  """The rates to choose from."""
  return [config.rate * x for x in config.rate_factors]


def _entry(value: lab.Estimate) -> dict[str, Any]:
  return {
    'value': value.value,
    'interval': [value.low, value.high] if np.isfinite(value.low) else None,
  }


def _judged(config, value: lab.Estimate) -> dict[str, Any]:
  return _entry(value) | {
    'verdict': comparison.verdict(value, config.num_seeds)
  }


def _loss(results: Results, rate: str, measure: str, name: str):
  return statistics.geometric_mean(results.losses(rate, measure, name))


def _layer(config, panel: str, results: Results, name: str) -> dict[str, Any]:
  """One layer: ratios to the plain one, losses, chosen rates."""
  chosen = results.chosen[:, list(results.layers).index(name)].tolist()
  rates = learning_rates(config)
  row: dict[str, Any] = {
    'panel': panel,
    'layer': name,
    'num_trained_parameters': results.layers[name].num_params,
    'tuned_learning_rates': {
      f'{rates[j]:g}': count for j, count in sorted(Counter(chosen).items())
    },
  }
  for rate in RATES:
    row[rate] = {
      measure: _judged(config, results.ratio(rate, measure, name))
      | {'relative_loss': _entry(_loss(results, rate, measure, name))}
      for measure in MEASURES
    }
  return row


def _controls(config, results: Mapping[str, Results]) -> Iterator[Any]:
  """Each modification over its control."""
  for panel, question in PANELS.items():
    for name, control in question.controls(config):
      yield {'layer': name, 'control': control} | {
        rate: {
          measure: _judged(
            config, results[panel].ratio(rate, measure, name, control)
          )
          for measure in ('early', 'held_out')
        }
        for rate in RATES
      }


def _layers(config, results: Mapping[str, Results]) -> list[dict[str, Any]]:
  return [
    _layer(config, panel, result, name)
    for panel, result in results.items()
    for name in result.layers
  ]


def memorisation(config: Any, results: Mapping[str, Results]) -> str:
  """What all of this measures; with fresh matrices, how little is learnt."""
  text = comparison.memorisation(config, results['regularised'])
  if not config.multi_task:
    return text
  best = (
    min(
      _loss(result, rate, 'held_out', name)
      for result in results.values()
      for name in result.layers
    )
    for rate in RATES
  )
  return (
    f'{text} That of the best of all layers: {" and ".join(map(str, best))}.'
  )


def summary(config: Any, results: Mapping[str, Results]) -> dict[str, Any]:
  plain = results['regularised']
  return {
    'num_seeds': config.num_seeds,
    'learning_rate': config.rate,
    'learning_rates': learning_rates(config),
    'units': 'Losses are relative to that of predicting 0 on the same prompts; '
    'ratios are to the plain layer, geometric means of paired runs.',
    'interval': '95 % t-interval of the mean log over runs',
    'measures': {x: comparison.words(config, x) for x in MEASURES},
    'plain': {
      rate: {
        measure: _entry(_loss(plain, rate, measure, PLAIN))
        for measure in MEASURES
      }
      for rate in RATES
    },
    'layers': _layers(config, results),
    'controls': list(_controls(config, results)),
    'single_task': not config.multi_task,
    'memorisation': memorisation(config, results),
  }


def conclude(config: Any, results: Mapping[str, Any], claims: Any) -> str:
  """One paragraph, from the numbers."""
  panels = results['overview']
  layers = {row['layer']: row for row in _layers(config, panels)}
  sentences = []
  for rate, words in zip(
    RATES, ('At the fixed learning rate', 'With tuned rates'), strict=True
  ):
    counts = Counter(
      claim.verdict for name, claim in claims.items() if name.endswith(rate)
    )
    sentences.append(
      f'{words}, {counts["reproduced"]} of {counts.total()} statements '
      f'reproduced, {counts["not reproduced"]} did not, and '
      f'{counts["undecided"]} stay undecided.'
    )
  named = [n for x in PANELS.values() for n in x.published(config)]
  for rate, words in RATE_WORDS.items():
    best = [
      n for n in named if 'better' in layers[n][rate]['held_out']['verdict']
    ]
    sentences.append(
      f'At the {words} the published layers with a lower final loss than the '
      f'plain one are: {", ".join(best) or "none"}.'
    )
  for rate, words in RATE_WORDS.items():
    beaten = [
      f'{row["layer"]} over {row["control"]}'
      for row in _controls(config, panels)
      if 'better' in row[rate]['held_out']['verdict']
    ]
    sentences.append(
      f'Layers with a lower final loss than their control at the {words}: '
      f'{", ".join(beaten) or "none"}.'
    )
  chosen: Counter[int] = Counter()
  for result in panels.values():
    chosen.update(result.chosen.ravel().tolist())
  rates = learning_rates(config)
  largest = int(np.argmax(rates))
  sentences.append(
    f'The largest rate of the grid, {rates[largest]:g}, was chosen in '
    f'{chosen[largest]} of {chosen.total()} runs of all layers; there a larger '
    'one may be better still.'
  )
  sentences.append(
    'The printed regularised form with alpha < 0 is a residual connection on '
    "the token's value (largest relative difference at the trained layers in "
    f'float64: {results["regularised"].identity:.1g}).'
  )
  return ' '.join([*sentences, memorisation(config, panels)])


def tables(config: Any, results: Mapping[str, Results]) -> dict[str, Any]:
  """Ratios of all layers to the plain one, and to their controls."""

  def cell(entry):
    if entry['interval'] is None:
      return 'diverged'
    estimate = lab.Estimate(entry['value'], *entry['interval'])
    return f'{estimate} {entry["verdict"]}'

  def cells(row):
    return {
      f'{measure}, {rate}': cell(row[rate][measure])
      for rate in RATES
      for measure in ('early', 'held_out')
    }

  layers = [
    {'layer': row['layer'], 'params': row['num_trained_parameters']}
    | cells(row)
    | {
      'tuned rates (runs)': ' '.join(
        f'{rate}({count})'
        for rate, count in row['tuned_learning_rates'].items()
      )
    }
    for row in _layers(config, results)
  ]
  controls = [
    {'layer': row['layer'], 'control': row['control']} | cells(row)
    for row in _controls(config, results)
  ]
  return {'layers': layers, 'controls': controls}


def metrics(
  config: Any, results: Mapping[str, Results]
) -> list[dict[str, Any]]:
  """Training curves: one row for each layer, rate and epoch."""
  return [
    {
      'panel': panel,
      'layer': name,
      'learning_rate': rate,
      'epoch': epoch + 1,
      'training_loss_over_zero_loss_by_seed': [
        float(f'{x:.5g}') for x in result.curves[epoch, :, i, j]
      ],
    }
    for panel, result in results.items()
    for i, name in enumerate(result.layers)
    for j, rate in enumerate(learning_rates(config))
    for epoch in range(config.num_epochs)
  ]


def figures(config: Any, results: Mapping[str, Results]) -> list[lab.Figure]:
  note = f'{comparison.setting(config)} {memorisation(config, results)}'
  return [
    lab.Figure(
      'ratios',
      _ratios(config, results),
      'Loss of every layer and control over that of the plain layer in the '
      'same run, geometric mean with its 95 % interval, not corrected for the '
      'number of rows; below 1 is better. Mean training loss of epochs '
      f'1-{config.early_epochs} and loss on held-out prompts after training, '
      'at the fixed learning rate (discs) and at one tuned for each layer '
      '(squares). Grey band: comparable; names in grey italics: controls. '
      f'Tuned rates are chosen by the last {config.early_epochs} epochs of the '
      f'other runs. {note}',
    ),
    lab.Figure(
      'tests',
      _tests(config, results),
      'Loss after training relative to predicting 0 on the same prompts '
      '(dashed line: no better than that), on held-out prompts, on prompts '
      f'with N = {config.longer_num_demonstrations}, on inputs '
      f'{config.input_scale:g} times as large, and on prompts of other '
      'matrices B; geometric mean over runs with its 95 % interval. Plain and '
      'published layers alone: strict forms and controls are in the figure of '
      f'ratios. {note}',
    ),
  ]


def _places(results, shown) -> list[tuple[float, Results, str]]:
  """Rows of a list figure, with a gap before each panel."""
  rows, place = [], 0.0
  for panel, result in results.items():
    for name in shown[panel]:
      rows.append((place, result, name))
      place += 1
    place += 0.8
  return rows


def _label_rows(axis, rows, controls: Sequence[str] = ()) -> None:
  axis.set_yticks(
    [place for place, *_ in rows],
    [comparison.pretty(name) for *_, name in rows],
    fontsize=8,
  )
  for label, (*_, name) in zip(axis.get_yticklabels(), rows, strict=True):
    if name in controls:
      label.set(color='0.4', style='italic')
  axis.set_ylim(rows[-1][0] + 0.8, -0.8)
  axis.tick_params(axis='y', length=0)


def _ratios(config, results):
  """Forest plot: early and final ratios, at fixed and at tuned rates."""
  import matplotlib.pyplot as plt

  shown = {panel: list(x.layers)[1:] for panel, x in results.items()}
  rows = _places(results, shown)
  size = 13, 0.23 * len(rows) + 1.8
  figure, axes = plt.subplots(1, 4, figsize=size, sharey=True)
  columns = [(rate, x) for rate in RATES for x in ('early', 'held_out')]
  words = {'early': f'epochs 1-{config.early_epochs}', 'held_out': 'held out'}
  for axis, (rate, measure) in zip(axes, columns, strict=True):
    axis.axvspan(*comparison.MARGIN, color='0.86', lw=0)
    axis.axvline(1, color='0.3', lw=1)
    points = [(y, x.ratio(rate, measure, name)) for y, x, name in rows]
    _points(axis, points, **RATE_STYLE[rate])
    axis.set_title(f'{words[measure]}, {RATE_WORDS[rate]}')
    axis.set_xlabel('loss / loss of plain layer')
  controls = [c for x in PANELS.values() for _, c in x.controls(config)]
  _label_rows(axes[0], rows, controls)
  return figure


def _tests(config, results):
  """Losses in and out of distribution, published layers alone."""
  import matplotlib.pyplot as plt

  shown = {panel: x.published(config) for panel, x in PANELS.items()}
  shown['regularised'] = [PLAIN, *shown['regularised']]
  rows = _places(results, shown)
  size = 11, 0.36 * len(rows) + 1.9
  figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
  for axis, rate in zip(axes, RATES, strict=True):
    axis.axvline(1, color='0.3', lw=1, ls='--')
    for k, (test, look) in enumerate(TEST_STYLE.items()):
      points = [
        (y + 0.18 * (k - 1.5), _loss(x, rate, test, name))
        for y, x, name in rows
      ]
      _points(axis, points, label=MEASURES[test], **look)
    axis.set_title(RATE_WORDS[rate])
    axis.set_xlabel('loss / loss of predicting 0')
  _label_rows(axes[0], rows)
  labels = axes[0].get_legend_handles_labels()
  figure.legend(*labels, loc='outside lower center', ncols=4)
  return figure


def _points(axis, points, **look) -> None:
  """Estimates by height on a log axis; a word where a run diverged."""
  finite = [(y, x) for y, x in points if np.isfinite(x.low)]
  for place, _ in (point for point in points if point not in finite):
    axis.text(
      1.0,
      place,
      'diverged',
      transform=axis.get_yaxis_transform(),
      **{'fontsize': 7, 'ha': 'right', 'va': 'center', 'color': look['color']},
    )
  if finite:
    value, low, high = np.array([x for _, x in finite]).T
    axis.errorbar(
      value,
      [y for y, _ in finite],
      xerr=[value - low, high - value],
      **{'ms': 4.5, 'lw': 1.2, 'capsize': 2} | look,
    )
  axis.set_xscale('log')
  low, high = axis.get_xlim()  # A factor of 2 looks like what it is.
  axis.set_xlim(min(low, 0.5), max(high, 2.0))
  drawing.plain_ticks(axis.xaxis)
  axis.grid(alpha=0.25, lw=0.5, axis='x')


PART = lab.Part(measure, lambda *_: (), figures, summary, tables, metrics)
