"""Comparisons of feature maps, and the trained layer, as figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import approximation_summary as summary
from experiments.approximation_figures import (
  COLOURS,
  MARKERS,
  count_draws,
  label_ends,
  log_axes,
)
from experiments.approximation_measure import Condition, Method
from experiments.approximation_summary import Measurements


def all_maps(
  data: Measurements,
  methods: Sequence[Method],
  names: Sequence[str],
  num_features: Sequence[int],
) -> Any:
  """Relative output error of every map, at equal directions and features."""
  figure, axes = plt.subplots(
    2,
    len(names),
    figsize=(3.9 * len(names), 7.6),
    layout='constrained',
    squeeze=False,
    sharey='col',
  )
  views = ('directions', 'features')
  for row, view in zip(axes, views, strict=True):
    for axis, name in zip(row, names, strict=True):
      condition, labels = data.conditions[name], []
      for i, method in enumerate(methods):
        divisor = method.features_per_direction if view == 'features' else 1
        sizes = [size // divisor for size in num_features]
        errors = data.curve(method, condition, 'output_relative', sizes)
        # Medians: the mean does not exist where the normaliser may vanish.
        value = np.median(errors, axis=0)
        axis.plot(
          num_features, value, color=COLOURS[i], marker=MARKERS[i], ms=4, lw=1.2
        )
        labels.append((value[-1], _short(method), COLOURS[i]))
      log_axes(axis, num_features)
      label_ends(axis, labels)
      axis.set_title(f'{name}, equal {view}')
      axis.set_xlabel(f'number of {view}')
    row[0].set_ylabel('relative error of the output (median)')
  figure.suptitle(
    'All feature maps against exact softmax. pos: positive, hyp: hyperbolic, '
    'trig: trigonometric; G: gaussian, O: orthogonal, S: simplex, '
    f'S+: simplex+\n{count_draws(data, names).split(";")[0]}; medians over '
    'draws (trained: over seeds)',
    fontsize=10.5,
  )
  return figure


def _short(method: Method) -> str:
  family, projection = method.name.split()
  family = {'positive': 'pos', 'hyperbolic': 'hyp', 'trigonometric': 'trig'}[
    family
  ]
  letter = projection[0].upper() + '+' * projection.endswith('+')
  return f'{family} {letter}'


def maps_compared(
  data: Measurements, rows: Sequence[Mapping[str, Any]], quantity: str
) -> Any:
  """Error of each map over that of the papers' map, at equal cost."""
  names = list(data.conditions)
  maps = list(data.methods)
  figure, axes = plt.subplots(
    1,
    len(names),
    figsize=(2.1 * len(names) + 2, 4.4),
    sharey=True,
    layout='constrained',
    squeeze=False,
  )
  styles = (
    ('directions', -0.14, 'o', '#0072B2'),
    ('features', 0.14, 's', '#D55E00'),
  )
  for axis, name in zip(axes[0], names, strict=True):
    for view, offset, marker, colour in styles:
      estimates = np.array(
        [
          row[f'{quantity}_ratio_at_equal_{view}']
          for row in rows
          if row['condition'] == name
        ]
      )
      order = [maps.index(r['map']) for r in rows if r['condition'] == name]
      value, low, high = estimates.T
      axis.errorbar(
        value,
        np.asarray(order) + offset,
        xerr=[value - low, high - value],
        fmt=marker,
        color=colour,
        ms=5,
        capsize=2,
        lw=1.2,
        mfc=colour if view == 'directions' else 'white',
        label=f'equal number of {view}',
      )
    axis.axvline(1, color='black', lw=0.8, ls=':')
    axis.set_xscale('log')
    axis.set_title(name)
    axis.grid(alpha=0.25, lw=0.5)
    axis.set_xlabel('error ratio')
  axes[0, 0].set_yticks(range(len(maps)), maps)
  axes[0, 0].invert_yaxis()
  handles = axes[0, 0].get_legend_handles_labels()
  figure.legend(*handles, loc='outside lower center', ncols=2, fontsize=8.5)
  figure.suptitle(
    f'{summary.words(quantity)} over that of '
    f'{maps[0]} features (left of 1: better), geometric means over R\n'
    f'{count_draws(data, names)}',
    fontsize=10.5,
  )
  return figure


def trained_layer(
  conditions: Sequence[Condition], losses: Mapping[str, np.ndarray]
) -> Any:
  """Why the trained layer is out of reach, and what it is instead."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.4), layout='constrained'
  )
  for i, condition in enumerate(conditions):
    squares = np.sort(condition.squared_norms().ravel())
    left.plot(
      squares, np.linspace(0, 1, squares.size), color=COLOURS[i], lw=1.6
    )
    level = 0.12 + 0.14 * i
    x = np.quantile(squares, level)
    left.plot(x, level, MARKERS[i], color=COLOURS[i])
    left.annotate(
      f' {condition.name}',
      (x, level),
      color=COLOURS[i],
      fontsize=8.5,
      ha='left',
      va='top',
    )
  left.set_xscale('log')
  left.axvspan(4, left.get_xlim()[1], color='0.9', zorder=0)
  left.set_xlabel(
    'v = |q + k|²/√d of a pair; relative variance is (exp(v) − 1)/R'
  )
  left.set_ylabel('fraction of pairs below')
  names = list(losses)
  values = np.array(list(losses.values()))
  right.plot(range(3), values, '-', color='0.75', lw=0.8)
  for i, row in enumerate(values):
    right.plot(np.full(row.size, i), row, MARKERS[i], color=COLOURS[i], ms=5)
    mean = np.exp(np.mean(np.log(row)))
    right.text(i + 0.08, mean, f'{mean:.2f}', fontsize=9, va='center')
  right.axhline(1, color='black', lw=0.8, ls=':')
  right.text(-0.35, 1.05, 'predicting zero', fontsize=8)
  right.set_xticks(range(3), [n.replace('_', ' ') for n in names])
  right.set_xlim(-0.4, 2.5)
  right.set_yscale('log')
  right.set_ylabel('held-out loss / loss of predicting zero')
  right.set_title(
    f'{values.shape[1]} trained layers (joined by lines; number: geometric '
    'mean)\nsame weights, another kernel'
  )
  left.set_title(
    'Training drives |q + k| out of the regime of random features\n'
    'grey: a kernel value needs over 5000 directions for an error of 10 %'
  )
  return figure
