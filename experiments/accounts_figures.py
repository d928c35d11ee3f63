"""The figure of `experiments.accounts`: the whole family.

Colours are those of Okabe and Ito; every learner has its own marker and, within
a colour, its own line style.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.accounts_claims import (
  CLOSE,
  TRAINED,
  TUNED,
  layers,
  within,
)

BLACK, BLUE, SKY, ORANGE = '#000000', '#0072B2', '#56B4E9', '#D55E00'
YELLOW, GREEN, PINK, GREY = '#E69F00', '#009E73', '#CC79A7', '#8C8C8C'


class Look(NamedTuple):
  colour: str
  line: str
  marker: str


LOOKS = {
  'softmax': Look(BLACK, '-', 'o'),
  'momentum attention': Look(GREY, '--', 'x'),
  'softmax regression': Look(PINK, '-', 'p'),
  'gated decay': Look(SKY, '--', 'v'),
  'linear attention': Look(BLUE, '-', 's'),
  'two-head softmax': Look(BLACK, '-.', 'h'),
  'GD (2 steps)': Look(BLUE, '--', 'd'),
  'delta rule': Look(ORANGE, '-', '^'),
  'gated delta rule': Look(YELLOW, '--', '<'),
  'delta rule (momentum)': Look(ORANGE, ':', '+'),
  'GD++ (2 steps)': Look(BLUE, ':', 'D'),
  'SGD (4 epochs)': Look(PINK, '--', '*'),
  'least squares (mesa)': Look(GREEN, '-', 'P'),
}
SHOWN = (
  'softmax',
  'two-head softmax',
  'gated decay',
  'linear attention',
  'delta rule',
  'least squares (mesa)',
)
FRAME = 3e-4, 8.0
TICKS = -20, -5, -1, 0, 1, 5, 20, 100  # Excess losses, in percent.


def draw(config: Any, result: Mapping[str, Any]) -> Any:
  """Draws the four panels.

  Args:
    config: settings of the experiment.
    result: what `accounts_measure.measure` returns, by memory.

  Returns:
    The figure.
  """
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(2, 2, figsize=(14, 11))
  learners, alike, scale, length = axes.ravel()
  shown = [name for name in SHOWN if name in result]
  _curves(learners, config.lengths, result, 'loss', [TUNED])
  _ratios(alike, result)
  both = {name: result[name] for name in shown}
  _curves(scale, config.scales, both, 'scaled', [TUNED, TRAINED])
  _curves(length, config.lengths, both, 'loss', [TUNED, TRAINED])
  for axis in (learners, length):
    _lengths(axis, config)
  scale.set_xticks(config.scales, [f'{a:g}' for a in config.scales])
  scale.axvline(1, color=GREY, linestyle=':', linewidth=1.5)
  scale.set_xlabel('scale of the inputs at test time')
  learners.set_title('(a) predicted inner learners, tuned')
  alike.set_title('(b) trained layers against them', pad=34)
  scale.set_title('(c) input scale: tuned (lines), trained (markers)')
  length.set_title('(d) length: tuned (lines), trained (markers)')
  handles, labels = learners.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=4)
  return figure


def _lengths(axis, config) -> None:
  axis.set_xscale('log')
  axis.set_xticks(config.lengths, [str(n) for n in config.lengths])
  axis.minorticks_off()
  axis.axvline(
    config.num_demonstrations, color=GREY, linestyle=':', linewidth=1.5
  )
  axis.set_xlabel('number of demonstrations N (log scale)')


def _curves(axis, places, result, key, kinds) -> None:
  """Means over seeds with their intervals, against the places."""
  for name, arrays in result.items():
    look, values = LOOKS[name], arrays[key]
    mean, low, high = _estimate(values[TUNED])
    axis.plot(
      places,
      mean,
      linestyle=look.line,
      color=look.colour,
      marker=None if TRAINED in kinds else look.marker,
      markersize=8,
      linewidth=2,
      label=name,
    )
    axis.fill_between(
      places, low, high, color=look.colour, alpha=0.2, linewidth=0
    )
    if TRAINED in kinds:
      mean, low, high = _estimate(values[TRAINED])
      axis.errorbar(
        places,
        mean,
        yerr=[mean - low, high - mean],
        linestyle='none',
        marker=look.marker,
        markersize=9,
        markerfacecolor='white',
        markeredgewidth=1.8,
        color=look.colour,
        capsize=3,
      )
  axis.axhline(1, color=BLACK, linewidth=0.8)
  axis.set_yscale('log')
  axis.set_ylim(*FRAME)
  axis.set_ylabel('loss / loss of predicting 0')


def _estimate(samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Geometric means over seeds with their intervals; losses are positive."""
  rows = [harness.mean_interval(np.log(column)) for column in samples.T]
  mean, low, high = (
    np.exp([row[key] for row in rows]) for key in ('mean', 'low', 'high')
  )
  return mean, low, high


def _ratios(axis, result) -> None:
  """Excess loss of each trained layer over its tuned inner learner."""
  names = layers(result)[::-1]
  for place, name in enumerate(names):
    look, ratios = LOOKS[name], result[name]['ratio']
    mean, low, high = (100 * (x[0] - 1) for x in _estimate(ratios[:, None]))
    axis.errorbar(
      mean,
      place + 0.2,
      xerr=[[mean - low], [high - mean]],
      marker=look.marker,
      markersize=10,
      markerfacecolor='white',
      markeredgewidth=2,
      color=look.colour,
      capsize=5,
    )
    axis.plot(
      100 * (ratios - 1),
      np.full(len(ratios), place - 0.2),
      'o',
      color=look.colour,
      markersize=5,
      alpha=0.6,
    )
    apart = len(ratios) - within(ratios, **CLOSE)
    for column, entry in (
      (1.1, f'{apart} of {len(ratios)}'),
      (1.28, f'{np.mean(result[name]["cosine"]):.3f}'),
    ):
      _beside(axis, column, place, entry)
  _beside(axis, 1.1, len(names) + 0.1, 'seeds\noutside')
  _beside(axis, 1.28, len(names) + 0.1, 'mean\ncosine')
  _percent(axis)
  axis.set_yticks(range(len(names)), names)
  axis.set_ylim(-0.6, len(names) - 0.4)


def _beside(axis, column, place, entry) -> None:
  """Writes into a column right of the axis."""
  axis.text(
    column,
    place,
    entry,
    transform=axis.get_yaxis_transform(),
    ha='center',
    va='center',
  )


def _percent(axis) -> None:
  axis.set_xscale('symlog', linthresh=1, linscale=0.6)
  axis.set_xticks(TICKS, [f'{tick:g}' for tick in TICKS])
  axis.set_xticks([], minor=True)
  low, high = axis.get_xlim()  # No seed is left out.
  axis.set_xlim(min(low, TICKS[0]), max(high, TICKS[-1]))
  axis.axvspan(-1, 1, color=GREY, alpha=0.2, linewidth=0)
  axis.axvline(0, color=BLACK, linewidth=0.8)
  for edge in CLOSE.values():
    axis.axvline(100 * (edge - 1), color=GREY, linestyle='--', linewidth=1)
  axis.set_xlabel('excess loss of the trained layer (%)')
