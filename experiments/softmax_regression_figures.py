"""Figures of `experiments.softmax_regression`."""

from typing import Any

import numpy as np

from experiments import harness
from experiments import softmax_regression_training as training
from experiments.equivalence_figures import BLACK, BLUE, GREEN, GREY, ORANGE

STYLES = {
  'linear': (BLUE, 'o', '-'),
  'softmax, one head': (GREEN, '^', '-.'),
  'softmax, two heads': (ORANGE, 's', '--'),
}
PANELS = (
  ('loss_ratio', 'loss / loss at start'),
  ('preds_diff', 'Preds diff'),
  ('model_diff', 'Model diff'),
  ('model_cos', 'Model cos'),
)


def band(axis: Any, x: Any, samples: Any, label: str, look: Any) -> None:
  """Draws means over runs with their 95 % intervals; samples `[runs, x]`."""
  color, marker, line = look
  rows = [harness.mean_interval(column) for column in np.asarray(samples).T]
  mean, low, high = (
    np.array([row[k] for row in rows]) for k in ('mean', 'low', 'high')
  )
  axis.plot(
    x, mean, line, marker=marker, color=color, label=label, mfc='white', ms=5
  )
  axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def training_curves(config: Any, results: Any) -> Any:
  """Four metrics against steps, one column for each frame."""
  import matplotlib.pyplot as plt

  few, middle = config.num_words[0], config.widths[len(config.widths) // 2]
  figure, axes = plt.subplots(4, 2, figsize=(11, 12), sharex=True)
  steps = np.linspace(0, config.num_steps, config.num_records + 1)
  for row, (name, label) in zip(axes, PANELS, strict=True):
    for frame, axis in enumerate(row):
      for layer, look in STYLES.items():
        runs = results.trained(layer, (few, middle))
        band(axis, steps, runs[name][frame], layer, look)
      if name == 'loss_ratio':
        runs = results.trained('linear', (few, middle))
        ratio = runs['gd_ratio'][frame, :, -1].mean()
        axis.axhline(ratio, color=BLACK, ls=':', label='one gradient step')
        axis.set_title(training.FRAMES[frame])
        axis.set_ylim(0, 1.5)
      if name == 'model_cos':
        axis.axhline(1, color=BLACK, ls=':', lw=1)
        axis.set(xlabel='training steps', ylim=(-0.15, 1.08))
      elif name != 'loss_ratio':
        axis.set_ylim(0, 1.7)
      if frame == 0:
        axis.set_ylabel(label)
  handles = axes[0, 0].get_legend_handles_labels()
  figure.legend(*handles, loc='outside upper center', ncols=4)
  return figure


def sizes(config: Any, results: Any) -> Any:
  """One gradient step against words and width, and the published layer."""
  import matplotlib.pyplot as plt

  middle = config.widths[len(config.widths) // 2]
  most = config.num_words[-1]
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
  lines = (
    (axes[0], [(n, middle) for n in config.num_words], 0, f'd = {middle}'),
    (axes[1], [(most, d) for d in config.widths], 1, f'n = {most}'),
  )
  looks = (BLUE, 'o', '-'), (ORANGE, 's', '--')
  for axis, cells, index, title in lines:
    x = np.array([cell[index] for cell in cells], float)
    for frame, look in enumerate(looks):
      samples = np.stack(
        [results.steps[cell]['ratio_weights'][frame] for cell in cells], 1
      )
      label = f'one gradient step, {training.FRAMES[frame]}'
      band(axis, x, samples, label, look)
    theory = [n / (n + d) for n, d in cells]
    axis.plot(x, theory, ':', color=BLACK, label='n / (n + d)')
    for frame, (marker, color) in enumerate((('D', BLUE), ('x', ORANGE))):
      trained = [
        (cell[index], results.trained(results.published, cell))
        for cell in cells
        if (results.published, cell) in results.runs
      ]
      axis.plot(
        [place for place, _ in trained],
        [runs['loss_ratio'][frame, :, -1].mean() for _, runs in trained],
        marker,
        color=color,
        ms=8,
        mfc='none',
        label=f'trained layer, {training.FRAMES[frame]}',
      )
    axis.set(xscale='log', title=title)
    axis.set_xticks(x, [f'{v:g}' for v in x])
    axis.minorticks_off()
    axis.set_xlabel('words n' if index == 0 else 'width d')
    axis.axhline(1, color=GREY, lw=0.8)
  axes[0].set_ylabel('loss / loss at start')
  axes[0].set_ylim(bottom=0)
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
  return figure


def bound(config: Any, results: Any) -> Any:
  """Published, chained, true and observed constants, in decades."""
  import matplotlib.pyplot as plt

  del config
  found, radii = results.constants, np.asarray(results.radii)
  figure, axis = plt.subplots(figsize=(8, 4.6))
  decades = np.log(10)
  for values, look, label in (
    (found['log_published'] / decades, 'v-', 'published bound M'),
    (found['log_chained'] / decades, '^-.', 'where its lemmas lead'),
    (np.log10(found['true']), 's--', 'true constant R / 2'),
    (np.log10(found['observed']), 'o:', 'largest observed'),
  ):
    colors = {'v-': ORANGE, '^-.': GREEN, 's--': BLUE, 'o:': BLACK}
    axis.plot(radii, values, look, color=colors[look], label=label, mfc='white')
  axis.set_yscale('symlog', linthresh=2)
  axis.set(
    xlabel='radius R (norm of document and weights)',
    ylabel="log10 of |f - f'| / |x - x'|",
  )
  ticks = [-1, 0, 1, 2, 10, 100]
  axis.set_yticks(ticks, [str(tick) for tick in ticks])
  axis.legend()
  return figure


FIGURES = {
  'training': training_curves,
  'sizes': sizes,
  'bound': bound,
}
