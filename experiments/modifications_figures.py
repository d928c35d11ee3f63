"""Figures of `experiments.modifications`."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import harness
from experiments import modifications_panels as panels
from experiments import modifications_report as report
from experiments import modifications_statistics as statistics
from experiments.approximation_figures import (
  COLOURS,
  MARKERS,
  STYLE,
  label_ends,
  plain_ticks,
)
from experiments.modifications_statistics import Measured
from experiments.modifications_training import Panel

LINES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
SMOOTHING = 5  # Epochs of the moving average of curves.
RATE_STYLE = {
  'fixed': {'marker': 'o', 'mfc': COLOURS[1], 'color': COLOURS[1]},
  'tuned': {'marker': 's', 'mfc': 'white', 'color': COLOURS[3]},
}
RATE_WORDS = {'fixed': 'fixed rate', 'tuned': 'tuned rate'}
TEST_STYLE = {
  'held_out': ('o', COLOURS[0]),
  'longer': ('^', COLOURS[1]),
  'scaled': ('s', COLOURS[2]),
  'other_task': ('X', COLOURS[3]),
}


def save(
  config: Any,
  all_panels: Sequence[Panel],
  data: Mapping[str, Measured],
  summary: dict[str, Any],
  folder: harness.Workdir,
) -> None:
  """Writes all figures; lists them in `summary['figures']`.

  Args:
    config: settings of the experiment.
    all_panels: the panels.
    data: by panel, what was measured.
    summary: the summary; the list of figures is added.
    folder: the workdir.
  """
  with plt.rc_context(STYLE | {'svg.hashsalt': 'modifications'}):
    drawn = {
      'training_loss': _training_loss(config, all_panels, data),
      'ratios': _ratios(config, summary['layers']),
      'tests': _tests(config, all_panels, summary['layers']),
    }
    for name, figure in drawn.items():
      harness.save_figure(folder, name, figure)
  captions = _captions(config, summary['memorisation'])
  summary['figures'] = [
    {'file': f'figures/{name}.png', 'caption': captions[name]} for name in drawn
  ]


def _captions(config: Any, memorisation: str) -> dict[str, str]:
  setting = (
    f'{config.num_seeds} paired runs, N = {config.num_demonstrations}, '
    f'{config.input_distribution} inputs, fixed learning rate '
    f'{config.learning_rate:g}, {config.num_epochs} epochs of '
    f'{config.tokens_per_epoch} tokens.'
  )
  return {
    'training_loss': 'Training loss of the modified layers at the fixed rate, '
    'relative to predicting 0: geometric mean over runs with its 95 % '
    f'interval, moving average over the last {SMOOTHING} epochs. {setting} '
    f'{memorisation}',
    'ratios': 'Loss of every layer and control over that of the plain layer in '
    'the same run, geometric mean with its 95 % interval, not corrected for '
    'the number of rows; below 1 is better. Mean training loss of epochs '
    f'1-{config.early_epochs} and loss on held-out prompts after training, at '
    'the fixed learning rate (discs) and at one tuned for each layer '
    '(squares). Grey band: comparable; names in grey italics: controls. '
    f'{setting} Tuned rates are chosen by the '
    f'last {config.early_epochs} epochs of the other runs. {memorisation}',
    'tests': 'Loss after training relative to predicting 0 on the same '
    'prompts (dashed line: no better than that), on held-out prompts, on '
    f'prompts with N = {config.longer_num_demonstrations}, on inputs '
    f'{config.input_scale:g} times as large, and on prompts of other matrices '
    'B; geometric mean over runs with its 95 % interval. Plain and published '
    'layers alone: strict forms and controls are in the figure of ratios. '
    f'{setting} {memorisation}',
  }


def pretty(name: str) -> str:
  """A layer's name with Greek letters."""
  for word, symbol in (
    ('alpha=', 'α = '),
    ('beta=', 'β = '),
    ('k=', 'k = '),
    (' β', ', β'),
    ('-0', '−0'),
  ):
    name = name.replace(word, symbol)
  return name


def _training_loss(config, all_panels, data):
  """Three panels of curves."""
  figure, axes = plt.subplots(
    1, 3, figsize=(13, 4.3), layout='constrained', sharey=True
  )
  shown = panels.published(config)
  for axis, panel in zip(axes, all_panels, strict=True):
    _curves(axis, config, panel, data[panel.name], shown[panel.name])
  # Limits are shared: labels are placed when all curves are drawn.
  axes[0].set_ylim(_widened(*axes[0].get_ylim()))
  for axis in axes:
    plain_ticks(axis.yaxis)
    label_ends(
      axis,
      [
        (line.get_ydata()[-1], line.get_label(), line.get_color())
        for line in axis.get_lines()
      ],
    )
  kind = 'fresh B per prompt' if config.multi_task else 'memorising one B'
  axes[0].set_ylabel(f'training loss / loss of predicting 0\n({kind})')
  return figure


def _curves(axis, config, panel, data, names):
  fixed = config.rate_factors.index(1.0)
  epochs = np.arange(1, config.num_epochs + 1)
  for k, name in enumerate([panels.PLAIN, *names]):
    curve = data.curves[:, :, panel.names.index(name), fixed]
    mean, low, high = statistics.band(statistics.smooth(curve, SMOOTHING))
    colour = COLOURS[k % len(COLOURS)]
    axis.fill_between(epochs, low, high, color=colour, alpha=0.13, lw=0)
    axis.plot(
      epochs,
      mean,
      color=colour,
      ls=LINES[k % len(LINES)],
      lw=2.2 if name == panels.PLAIN else 1.5,
      marker=MARKERS[k % len(MARKERS)],
      ms=5,
      markevery=(k * 2, max(config.num_epochs // 6, 1)),
      label=pretty(name.removeprefix('printed ').removeprefix('lowest ')),
    )
  titles = {
    'regularised': 'regularised, printed form (A − αI)V',
    'augmented': 'augmented keys and values',
    'negatives': 'negatives: k lowest scores lose β',
  }
  axis.set_yscale('log')
  axis.set_xlabel('epoch')
  axis.set_title(titles[panel.name])
  axis.grid(alpha=0.25, lw=0.5)


def _rows(layers: Sequence[Mapping[str, Any]], with_plain: bool):
  """Rows of a list figure, with a gap before each panel."""
  places, place, panel = [], 0.0, None
  for row in layers:
    if row['layer'] == panels.PLAIN and (not with_plain or place > 0):
      continue
    if panel not in (None, row['panel']):
      place += 0.8
    panel = row['panel']
    places.append((place, row))
    place += 1
  return places


def _label_rows(axis, rows, controls=frozenset()):
  axis.set_yticks(
    [place for place, _ in rows], [pretty(row['layer']) for _, row in rows]
  )
  for label, (_, row) in zip(axis.get_yticklabels(), rows, strict=True):
    if row['layer'] in controls:
      label.set(color='0.4', style='italic')
  axis.set_ylim(rows[-1][0] + 0.8, -0.8)
  axis.tick_params(axis='y', length=0)


def _ratios(config, layers):
  """Forest plot: early and final ratios, at fixed and at tuned rates."""
  rows = _rows(layers, with_plain=False)
  figure, axes = plt.subplots(
    1,
    4,
    figsize=(13, 0.23 * len(rows) + 1.8),
    layout='constrained',
    sharey=True,
  )
  columns = [(rate, x) for rate in report.RATES for x in ('early', 'held_out')]
  words = {'early': f'epochs 1-{config.early_epochs}', 'held_out': 'held out'}
  for axis, (rate, measure) in zip(axes, columns, strict=True):
    axis.axvspan(*statistics.MARGIN, color='0.86', lw=0)
    axis.axvline(1, color='0.3', lw=1)
    entries = [(place, row[rate][measure]) for place, row in rows]
    _points(axis, entries, **RATE_STYLE[rate])
    _log_axis(axis)
    axis.set_title(f'{words[measure]}, {RATE_WORDS[rate]}')
    axis.set_xlabel('loss / loss of plain layer')
  _label_rows(axes[0], rows, _controls(config))
  return figure


def _controls(config) -> set[str]:
  return {control for _, _, control in panels.controls(config)}


def _widened(low: float, high: float) -> tuple[float, float]:
  """Limits that show a factor of 2 as what it is, however close the data."""
  return min(low, 0.5), max(high, 2.0)


def _log_axis(axis):
  axis.set_xscale('log')
  axis.set_xlim(_widened(*axis.get_xlim()))
  plain_ticks(axis.xaxis)
  axis.grid(alpha=0.25, lw=0.5, axis='x')


def _points(axis, entries, *, marker, mfc, color, label=None):
  """Values with intervals `(place, entry)`; a word where one diverged."""
  for place, entry in entries:
    if entry['interval'] is None:
      axis.text(
        1.0,
        place,
        'diverged',
        transform=axis.get_yaxis_transform(),
        fontsize=7,
        color=color,
        ha='right',
        va='center',
      )
  rows = [
    (place, entry['value'], *entry['interval'])
    for place, entry in entries
    if entry['interval'] is not None
  ]
  if not rows:
    return
  places, values, low, high = np.array(rows).T
  axis.errorbar(
    values,
    places,
    xerr=[values - low, high - values],
    fmt=marker,
    mfc=mfc,
    color=color,
    ms=4.5,
    lw=1.2,
    capsize=2,
    label=label,
  )


def _tests(config, all_panels, layers):
  """Losses in and out of distribution, published layers alone."""
  names = {n for x in panels.published(config).values() for n in x}
  layers = [
    row for row in layers if row['layer'] in names or row['layer'] == 'plain'
  ]
  rows = _rows(layers, with_plain=True)
  figure, axes = plt.subplots(
    1,
    2,
    figsize=(11, 0.36 * len(rows) + 1.9),
    layout='constrained',
    sharey=True,
  )
  for axis, rate in zip(axes, report.RATES, strict=True):
    axis.axvline(1, color='0.3', lw=1, ls='--')
    for k, (test, (marker, colour)) in enumerate(TEST_STYLE.items()):
      entries = [
        (place + 0.18 * (k - 1.5), row[rate][test]['relative_loss'])
        for place, row in rows
      ]
      _points(
        axis,
        entries,
        marker=marker,
        mfc='white' if marker in 's^' else colour,
        color=colour,
        label=statistics.MEASURES[test],
      )
    _log_axis(axis)
    axis.set_title(RATE_WORDS[rate])
    axis.set_xlabel('loss / loss of predicting 0')
  _label_rows(axes[0], rows)
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4
  )
  return figure
