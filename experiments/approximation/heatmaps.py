"""Do estimated matrices look like the exact ones, better with more features?"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import lab
from experiments.approximation import estimates
from experiments.approximation.estimates import Condition, Data, Measurements
from experiments.lab import Config, figures as drawing, statistics

PAPER_MAP = estimates.PAPER_MAP
NUM_SHOWN = 4  # Draws of a scatter plot.
PARTS = 'attention', 'output'
measure = estimates.measured


def claims(config: Config, results: Data) -> lab.Claims:
  size, sizes = config.reference_features, config.heatmap_features
  for (data, source), part in itertools.product(
    ((results.first, 'v1 Figs. 4, 6 and 7'), (results.second, 'v1 Fig. 9')),
    PARTS,
  ):
    for condition in data.conditions.values():
      own = data.get(PAPER_MAP, condition, size)
      errors = data.curve(PAPER_MAP, condition, f'{part}_frobenius', sizes)
      relative, absolute = (
        estimates.mean(
          own.units(f'{part}_largest_tenth_{kind}')
          - own.units(f'{part}_rest_{kind}')
        )
        for kind in ('relative', 'mae')
      )
      rise = statistics.bootstrap(
        lambda means: np.max(means[:, 1:] / means[:, :-1], axis=1), errors
      )
      found = {
        'fit': lab.at_least(0.9, estimates.mean(own.units(f'{part}_pearson'))),
        'relative': lab.at_least(0, relative),
        'absolute': lab.at_least(0, absolute),
        'better': lab.at_most(1, rise),
      }
      if part == 'output':  # Outputs pass through zero.
        del found['relative']
      ends, tokens = f'at R = {size}', f'{data.num_tokens} tokens'
      yield from estimates.statements(
        condition.name,
        f"""
        fit [{source}] {part} entries fit, {tokens} | Pearson correlation of
          exact and estimated entries {ends}
        relative [{source}] large {part} entries fit less well (relative),
          {tokens} | mean relative error of the largest tenth minus that of the
          rest {ends}
        absolute [{source}] large {part} entries fit less well (absolute),
          {tokens} | mean absolute error of the largest tenth minus that of the
          rest {ends}
        better [{source}] {part} heatmap gets better with R, {tokens} | largest
          ratio of successive mean Frobenius errors, R =
          {', '.join(map(str, sizes))}
        """,
        found,
      )


def figures(config: Config, results: Data) -> list[lab.Figure]:
  drawn, size = [], config.reference_features
  for data in (results.first, results.second):
    *controlled, trained = data.conditions
    names = [*(controlled[:3][1:] or controlled), trained]
    tokens, draws = data.num_tokens, len(data.conditions[trained].keys)
    drawn += [
      lab.Figure(
        f'heatmaps_{part}_{tokens}_tokens',
        _draw_heatmaps(data, names, config.heatmap_features, part),
        f"""Exact attention ({'matrix' if part == 'attention' else 'output'}) of
        {tokens} tokens, and its estimates by {PAPER_MAP.name} features at
        growing R, for one draw; the errors beside them are of this draw, and
        the colours of a row share the exact range.""",
      )
      for part in PARTS
    ]
    caption = f"""Estimated against exact entries at R = {size}, {tokens}
      tokens, {PAPER_MAP.name} features: entries of {NUM_SHOWN} draws; Pearson
      and relative error: means of {draws} draws. Triangles: largest tenth of
      the entries of a draw; line: equality."""
    drawing_of = _draw_entries(data, names, size)
    drawn.append(lab.Figure(f'entries_{tokens}_tokens', drawing_of, caption))
  return drawn


def _matrices(
  data: Measurements, condition: Condition, part: str, size: int = 0
) -> np.ndarray:
  """Attention matrices or outputs of all draws `[D, n, m]`: exact, or of R."""
  _, weights, _ = condition.exact()
  if size:
    weights = data.get(PAPER_MAP, condition, size).weights
  if part == 'attention':
    return weights
  return weights @ np.float64(condition.values)


def _draw_heatmaps(
  data: Measurements, names: Sequence[str], sizes: Sequence[int], part: str
) -> Any:
  """Exact and estimated matrices of the first draw: a row each condition."""
  shape = len(names), len(sizes) + 1
  figure, axes = drawing.subplots(
    *shape, figsize=(2.8 * shape[1] + 1.2, 2.9 * shape[0] + 0.8), squeeze=False
  )
  for row, name in zip(axes, names, strict=True):
    condition = data.conditions[name]
    panels = [_matrices(data, condition, part, size)[0] for size in (0, *sizes)]
    exact = panels[0]
    scale = {'vmin': min(0, exact.min()), 'vmax': exact.max()}
    for axis, panel, size in zip(row, panels, [0, *sizes], strict=True):
      image = axis.imshow(panel, cmap='cividis', aspect='auto', **scale)
      axis.set_xticks([])
      axis.set_yticks([])
      axis.set_title(f'R = {size}' if size else 'exact softmax')
      if size:
        error = np.linalg.norm(panel - exact) / np.linalg.norm(exact)
        fit = statistics.correlation(panel.ravel(), exact.ravel())
        axis.set_xlabel(f'error {error:.0%}, Pearson {fit:.2f}', fontsize=10)
    row[0].set_ylabel(f'{name}\nquery token')
    row[0].set_xlabel('key token' if part == 'attention' else 'component')
    unit = 'attention weight' if part == 'attention' else 'value units'
    figure.colorbar(image, ax=row[-1], label=unit, extend='both')
  return figure


def _draw_entries(data: Measurements, names: Sequence[str], size: int) -> Any:
  figure, axes = drawing.subplots(
    2, len(names), figsize=(3.7 * len(names), 7.6), squeeze=False
  )
  # Far apart, so that they come from different trained layers.
  total = data.conditions[names[0]].keys.shape[0]
  shown = np.linspace(0, total - 1, NUM_SHOWN).astype(int)
  for row, part in zip(axes, PARTS, strict=True):
    for axis, name in zip(row, names, strict=True):
      condition = data.conditions[name]
      exact, estimate = (
        _matrices(data, condition, part, count)[shown].reshape(NUM_SHOWN, -1)
        for count in (0, size)
      )
      cut = np.quantile(np.abs(exact), 0.9, axis=1, keepdims=True)
      large = np.abs(exact) >= cut
      for some, look in (
        (~large, {'marker': 'o', 'ms': 2, 'color': drawing.BLUE, 'mew': 0}),
        (large, {'marker': '^', 'ms': 4, 'color': drawing.ORANGE, 'mew': 0.7}),
      ):
        look |= {'mfc': 'none'} if look['mew'] else {'alpha': 0.5}
        axis.plot(exact[some], estimate[some], ls='', rasterized=True, **look)
      ends = [exact.min(), exact.max()]
      axis.plot(ends, ends, color='black', lw=0.9)
      if part == 'attention':
        axis.set(xscale='log', yscale='log')
        drawing.plain_ticks(axis.xaxis)
        drawing.plain_ticks(axis.yaxis)
      record = data.get(PAPER_MAP, condition, size)
      fit = record.units(f'{part}_pearson').mean()
      error = record.units(f'{part}_relative').mean()
      axis.set_title(f'{part}, {name}\nPearson {fit:.2f}, error {error:.0%}')
      unit = 'weight' if part == 'attention' else 'output [value units]'
      axis.set_xlabel(f'exact {unit}')
    row[0].set_ylabel(f'estimated {unit}')
  return figure
