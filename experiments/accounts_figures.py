"""The figure of `experiments.accounts`: the whole family.

Colours are those of Okabe and Ito; every learner has its own marker and, within
a colour, its own line style.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.accounts_claims import TRAINED, TUNED, layers

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


def draw(config: Any, result: Mapping[str, Any]) -> Any:
  """Draws the four panels.

  Args:
    config: settings of the experiment.
    result: what `accounts_measure.measure` returns, by memory.

  Returns:
    The figure.
  """
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(2, 2, figsize=(17, 12.5))
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
  alike.set_title('(b) trained layers against them')
  scale.set_title('(c) input scale: tuned (lines), trained (markers)')
  length.set_title('(d) length: tuned (lines), trained (markers)')
  handles, labels = learners.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=5)
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
  """Loss of each trained layer over that of its tuned inner learner."""
  names = layers(result)[::-1]
  for place, name in enumerate(names):
    look, ratios = LOOKS[name], result[name]['ratio']
    spread = np.linspace(-0.2, 0.2, len(ratios))
    axis.plot(
      ratios, place + spread, 'o', color=look.colour, markersize=4, alpha=0.6
    )
    mean, low, high = (x[0] for x in _estimate(ratios[:, None]))
    axis.errorbar(
      mean,
      place,
      xerr=[[mean - low], [high - mean]],
      marker=look.marker,
      markersize=11,
      markerfacecolor='white',
      markeredgewidth=2,
      color=look.colour,
      capsize=5,
    )
    cosine = np.mean(result[name]['cosine'])
    axis.text(
      1.02,
      place,
      f'{cosine:.3f}',
      transform=axis.get_yaxis_transform(),
      va='center',
    )
  axis.text(1.02, 1.01, 'Model cos', transform=axis.transAxes)
  axis.axvline(1, color=BLACK, linewidth=0.8)
  axis.set_yticks(range(len(names)), names)
  axis.set_xlabel('loss of trained layer / loss of tuned inner learner')
