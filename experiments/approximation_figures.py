"""Curves of `experiments.approximation`.

Every line has its own marker and is labelled where it ends, so the figures
read without colour.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from experiments import approximation_statistics as statistics
from experiments import approximation_summary as summary
from experiments.approximation_measure import Method
from experiments.approximation_summary import Measurements

# Okabe & Ito: distinguishable with any colour vision.
COLOURS = (
  '#000000',
  '#0072B2',
  '#009E73',
  '#D55E00',
  '#CC79A7',
  '#56B4E9',
  '#E69F00',
  '#7F7F7F',
)
MARKERS = 'osD^vPX*'

STYLE: dict[Any, Any] = {
  'font.size': 9,
  'axes.titlesize': 9.5,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'svg.hashsalt': 'approximation',
}


def label_ends(
  axis: Any, labels: Sequence[tuple[float, str, str]], gap: float = 0.062
) -> None:
  """Writes `(y, text, colour)` beside the right edge, without overlap."""
  low, high = np.log(axis.get_ylim())
  ends = sorted((np.log(y) - low) / (high - low) for y, _, _ in labels)
  order = sorted(labels)
  places = np.clip(ends, 0.0, 1.0)
  for _ in range(200):  # Push neighbours apart until all keep the gap.
    for i in range(len(places) - 1):
      overlap = max(gap - (places[i + 1] - places[i]), 0)
      places[i] -= overlap / 2
      places[i + 1] += overlap / 2
    places = np.clip(places, 0.0, 1.0)
  for place, end, (_, text, colour) in zip(places, ends, order, strict=True):
    frame = {'transform': axis.transAxes, 'color': colour, 'clip_on': False}
    axis.plot([1.0, 1.05], [min(max(end, 0), 1), place], lw=0.6, **frame)
    axis.text(1.06, place, text, va='center', fontsize=8, **frame)


def _plot(axis, sizes, errors, index, **style) -> float:
  """Draws means over units with their intervals; returns the last mean."""
  estimates = [statistics.mean(column) for column in errors.T]
  value, low, high = np.array(estimates).T
  axis.errorbar(
    sizes,
    value,
    yerr=[value - low, high - value],
    color=COLOURS[index % len(COLOURS)],
    marker=MARKERS[index % len(MARKERS)],
    ms=4,
    lw=1.2,
    capsize=2,
    **style,
  )
  return value[-1]


def log_axes(axis: Any, sizes: Sequence[int]) -> None:
  """Makes both axes logarithmic, with a tick at every size."""
  axis.set_xscale('log')
  axis.set_yscale('log')
  axis.set_xticks(sizes, [str(size) for size in sizes], rotation=60)
  axis.minorticks_off()
  axis.grid(alpha=0.25, lw=0.5)
  plain_ticks(axis.yaxis)


def plain_ticks(axis: Any) -> None:
  """Labels 1, 2, 5 of each decade where a log axis spans few decades."""
  low, high = axis.get_view_interval()
  if high / low < 200:
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:g}'))
    axis.set_minor_formatter(ticker.NullFormatter())


def errors_against_features(
  data: Measurements, method: Method, sizes: Sequence[int]
) -> Any:
  """The papers' map: MSE, MAE and relative error against R."""
  figure, axes = plt.subplots(
    2, 3, figsize=(12, 7.4), sharex=True, layout='constrained'
  )
  units = {
    'mse': ('mean squared error', '', ' [value units²]'),
    'mae': ('mean absolute error', '', ' [value units]'),
    'relative': ('relative Frobenius error', '', ''),
  }
  for row, name in zip(axes, ('attention', 'output'), strict=True):
    for axis, (kind, (words, *unit)) in zip(row, units.items(), strict=True):
      labels = []
      for i, (label, condition) in enumerate(data.conditions.items()):
        errors = data.curve(method, condition, f'{name}_{kind}', sizes)
        end = _plot(axis, sizes, errors, i, ls='-')
        labels.append((end, label, COLOURS[i]))
      log_axes(axis, sizes)
      limits = axis.get_ylim()
      if kind == 'mse':
        _closed_form(axis, data, method, sizes, f'{name}_mse')
      axis.set_ylim(limits)
      label_ends(axis, labels)
      axis.set_title(
        f'{"attention matrix" if name == "attention" else "output"}: {words}'
      )
      axis.set_ylabel(words + unit[name == 'output'])
  for axis in axes[1]:
    axis.set_xlabel('number of random features R')
  figure.suptitle(
    f'{method.name.capitalize()} features against exact softmax: the error '
    f'falls like 1/R at small norms only\n'
    f'{count_draws(data, data.conditions)}\n'
    'dashed: first-order closed form; where it is missing, it lies above the '
    'axes',
    fontsize=10.5,
  )
  return figure


def _closed_form(axis, data, method, sizes, quantity) -> None:
  for i, condition in enumerate(data.conditions.values()):
    predicted = data.predicted(method, condition).get(quantity)
    if predicted is not None:
      axis.plot(
        sizes,
        predicted.mean(axis=0),
        '--',
        color=COLOURS[i],
        lw=1.6,
        zorder=1,
      )


def count_draws(data: Measurements, names: Iterable[str]) -> str:
  """The line that says how many draws the points are means of."""
  conditions = [data.conditions[name] for name in names]
  condition = conditions[0]
  num_tokens = condition.keys.shape[1]
  units = {c.num_units for c in conditions}
  text = f'{num_tokens} tokens of size {condition.keys.shape[2]}; means of '
  text += f'{condition.keys.shape[0]} draws, bars: 95 % bootstrap intervals'
  if len(units) > 1:
    text += f' (trained: over {min(units)} seeds)'
  return text


def kernel_variance(
  data: Measurements, methods: Sequence[Method], names: Sequence[str]
) -> Any:
  """Measured variance of one kernel value against its closed form."""
  groups = [
    [m for m in methods if m.features_per_direction == count]
    for count in (1, 2)
  ]
  figure, axes = plt.subplots(
    2,
    len(names),
    figsize=(4.1 * len(names), 7.2),
    layout='constrained',
    squeeze=False,
  )
  for row, group in zip(axes, groups, strict=True):
    for axis, name in zip(row, names, strict=True):
      condition = data.conditions[name]
      labels = []
      for i, method in enumerate(group):
        sizes = data.sizes(method, condition)
        errors = data.curve(method, condition, 'kernel_relative_mse', sizes)
        scaled = errors * np.asarray(sizes)[None]
        end = _plot(axis, sizes, scaled, i, ls='none', mfc='white')
        predicted = data.predicted(method, condition).get('kernel_relative_mse')
        if predicted is not None:
          line = predicted.mean(axis=0) * np.asarray(sizes)
          axis.plot(sizes, line, '-', color=COLOURS[i], lw=1.4)
          end = line[-1]
        labels.append((end, method.name.replace(' ', '\n'), COLOURS[i]))
      ticks = data.sizes(group[0], condition)
      log_axes(axis, ticks)
      low, high = axis.get_ylim()
      axis.set_ylim(low / 1.15, high * 1.15)
      label_ends(axis, labels, gap=0.135)
      mean = condition.squared_norms().mean()
      axis.set_title(f'{name}: mean |q+k|²/√d = {mean:.2g}')
      axis.set_xlabel('number of directions R')
    row[0].set_ylabel('R × relative variance of a kernel value')
  figure.suptitle(
    'Measured variance of the kernel estimate (points) and its closed form '
    f'(lines; simplex+ has none)\n{count_draws(data, names)}\nwhere '
    'points lie far below their line, draws rarer than these carry the mean',
    fontsize=10.5,
  )
  return figure


def slopes(
  fits: Mapping[str, Mapping[str, statistics.Estimate]], data: Measurements
) -> Any:
  """Fitted exponents of the papers' map in every condition."""
  figure, axis = plt.subplots(figsize=(7.6, 4.4), layout='constrained')
  kinds = ('attention_mse', 'output_mse', 'attention_mae', 'output_mae')
  for i, kind in enumerate(kinds):
    value, low, high = np.array([fit[kind] for fit in fits.values()]).T
    x = np.arange(len(fits)) + 0.13 * (i - 1.5)
    axis.errorbar(
      x,
      value,
      yerr=[value - low, high - value],
      fmt=MARKERS[i],
      ms=5,
      color=COLOURS[i],
      capsize=2,
      mfc='white' if 'output' in kind else None,
      label=summary.words(kind),
    )
  for level, text in ((-1, 'MSE ∝ 1/R'), (-0.5, 'MAE ∝ 1/√R')):
    axis.axhline(level, color='black', lw=0.8, ls=':')
    axis.text(len(fits) - 0.5, level, text, va='bottom', ha='right', fontsize=8)
  axis.set_xticks(range(len(fits)), list(fits))
  axis.set_xlabel('standard deviation of queries and keys')
  axis.set_ylabel('slope of log error against log R')
  axis.legend(loc='upper left', fontsize=8)
  axis.set_title(
    'How fast positive gaussian features approach softmax\n'
    + count_draws(data, data.conditions)
  )
  return figure
