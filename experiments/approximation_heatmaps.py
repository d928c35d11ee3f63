"""Heatmaps and scatter plots of `experiments.approximation`."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.approximation_figures import COLOURS, plain_ticks
from experiments.approximation_measure import Condition, Method
from experiments.approximation_summary import Measurements


def _matrices(data, method, condition, size, name) -> np.ndarray:
  """Estimated attention matrices or outputs of all draws. `[D, n, m]`."""
  weights = data.get(method, condition, size).weights
  if name == 'attention':
    return weights
  return weights @ np.float64(condition.values)


def _exact(condition: Condition, name: str) -> np.ndarray:
  _, weights, output = condition.exact()
  return weights if name == 'attention' else output


def heatmaps(
  data: Measurements,
  method: Method,
  names: Sequence[str],
  sizes: Sequence[int],
  name: str,
) -> Any:
  """Exact and estimated matrices of the first draw.

  Args:
    data: the measurements.
    method: the map.
    names: the conditions, one row each.
    sizes: numbers of directions, one column each.
    name: 'attention' or 'output'.

  Returns:
    The figure.
  """
  shape = len(names), len(sizes) + 1
  figure, axes = plt.subplots(
    *shape,
    figsize=(2.35 * shape[1] + 1, 2.5 * shape[0] + 0.6),
    layout='constrained',
    squeeze=False,
  )
  for row, label in zip(axes, names, strict=True):
    condition = data.conditions[label]
    exact = _exact(condition, name)[0]
    panels = [exact] + [
      _matrices(data, method, condition, size, name)[0] for size in sizes
    ]
    scale = {'vmin': min(0, exact.min()), 'vmax': exact.max()}
    for axis, panel, size in zip(row, panels, [0, *sizes], strict=True):
      image = axis.imshow(panel, cmap='cividis', aspect='auto', **scale)
      axis.set_xticks([])
      axis.set_yticks([])
      axis.set_title('exact softmax' if not size else f'R = {size}')
      if size:
        error = np.linalg.norm(panel - exact) / np.linalg.norm(exact)
        fit = np.corrcoef(panel.ravel(), exact.ravel())[0, 1]
        axis.set_xlabel(f'error {error:.0%}, Pearson {fit:.2f}', fontsize=8)
    row[0].set_ylabel(f'{label}\nquery token')
    row[0].set_xlabel(
      'key token' if name == 'attention' else 'component', fontsize=8
    )
    unit = 'attention weight' if name == 'attention' else 'value units'
    figure.colorbar(image, ax=row[-1], label=unit, extend='both')
  what = 'Attention matrix' if name == 'attention' else 'Attention output'
  tokens = data.conditions[names[0]].keys.shape[1]
  figure.suptitle(
    f'{what}, exact and by {method.name} features; first draw, {tokens} '
    'tokens; colours of a row share the exact range',
    fontsize=10.5,
  )
  return figure


def entries(
  data: Measurements,
  method: Method,
  names: Sequence[str],
  size: int,
  num_draws: int = 4,
) -> Any:
  """Exact against estimated entries, the largest tenth marked."""
  figure, axes = plt.subplots(
    2,
    len(names),
    figsize=(3.1 * len(names), 6.4),
    layout='constrained',
    squeeze=False,
  )
  # Far apart, so that they come from different trained layers.
  total = data.conditions[names[0]].keys.shape[0]
  shown = np.linspace(0, total - 1, num_draws).astype(int)
  for row, name in zip(axes, ('attention', 'output'), strict=True):
    for axis, label in zip(row, names, strict=True):
      condition = data.conditions[label]
      exact = _exact(condition, name)[shown].reshape(num_draws, -1)
      panel = _matrices(data, method, condition, size, name)[shown]
      panel = panel.reshape(num_draws, -1)
      cut = np.quantile(np.abs(exact), 0.9, axis=1, keepdims=True)
      large = np.abs(exact) >= cut
      axis.plot(
        exact[~large],
        panel[~large],
        'o',
        ms=2,
        color=COLOURS[1],
        alpha=0.5,
        mew=0,
        rasterized=True,
      )
      axis.plot(
        exact[large],
        panel[large],
        '^',
        ms=4,
        color=COLOURS[3],
        mfc='none',
        mew=0.7,
        rasterized=True,
      )
      ends = [exact.min(), exact.max()]
      axis.plot(ends, ends, color='black', lw=0.9)
      if name == 'attention':
        axis.set_xscale('log')
        axis.set_yscale('log')
        plain_ticks(axis.xaxis)
        plain_ticks(axis.yaxis)
      errors = data.get(method, condition, size).errors
      fit = condition.units(errors[f'{name}_pearson']).mean()
      error = condition.units(errors[f'{name}_relative']).mean()
      axis.set_title(f'{name}, {label}\nPearson {fit:.2f}, error {error:.0%}')
      unit = 'weight' if name == 'attention' else 'output [value units]'
      axis.set_xlabel(f'exact {unit}')
    row[0].set_ylabel(f'estimated {unit}')
  draws, tokens, _ = data.conditions[names[0]].keys.shape
  figure.suptitle(
    f'Entries at R = {size}, {method.name} features, {tokens} tokens: entries '
    f'of {num_draws} draws; Pearson and relative error: means of {draws} '
    'draws\ntriangles: largest tenth of the entries of a draw; line: equality',
    fontsize=10.5,
  )
  return figure
