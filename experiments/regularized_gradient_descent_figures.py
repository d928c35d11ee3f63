"""Figures of `experiments.regularized_gradient_descent`.

Colours are those of Okabe and Ito; every series differs in marker or line style
as well.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special

from experiments import harness
from experiments import regularized_gradient_descent_summary as summary_of
from experiments.equivalence_figures import (
  BLACK,
  BLUE,
  GREEN,
  GREY,
  ORANGE,
  style,
)

PURPLE = '#CC79A7'
COLORS = (BLUE, GREEN, BLACK, ORANGE, PURPLE)
MARKERS = 'sDo^v'
LINES = ('-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)))
NUM_STRIP_PROMPTS = 20


def draw(
  config: Any,
  results: summary_of.Results,
  summary: Mapping[str, Any],
  workdir: harness.Workdir,
) -> list[dict[str, str]]:
  """Writes all figures; returns `[{'file', 'caption'}]`."""
  listed = []
  makers = {'epochs': epochs, 'exact': exact, 'predictions': predictions}
  for name, make in makers.items():
    with style():
      figure, caption = make(config, results, summary)
      harness.save_figure(workdir, name, figure)
    listed.append({'file': f'figures/{name}.png', 'caption': caption})
  return listed


def _mean_and_band(rows: np.ndarray):
  """Mean over seeds (first axis), and half of its 95 % t-interval."""
  quantile = scipy.special.stdtrit(rows.shape[0] - 1, 0.975)
  half = quantile * rows.std(axis=0, ddof=1) / rows.shape[0] ** 0.5
  return rows.mean(axis=0), half


def _looks(config: Any, index: int) -> dict[str, Any]:
  index %= len(COLORS)
  return {'color': COLORS[index], 'linestyle': LINES[index]}


def epochs(
  config: Any, results: summary_of.Results, summary: Mapping[str, Any]
):
  """Deviation from the strict layer at the end of each epoch."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.6))
  count = config.dual_epochs[-1]
  layer = results.full_batch.strict[:, :, :, None]
  marked = np.unique(np.linspace(0, count, 9).round().astype(int))
  titles = {
    summary_of.PER_EPOCH: 'decay of alpha / N in each visit',
    summary_of.PER_VISIT: 'decay of alpha in each visit',
  }
  for axis, reading in zip(axes, titles, strict=True):
    curves = results.epochs[count][reading]
    measured = summary_of.deviation(results, count, reading)
    shape = curves.predicted.shape
    predicted = summary_of.relative(
      curves.predicted - layer, np.broadcast_to(layer, shape)
    )
    for k, alpha in enumerate(config.alphas):
      mean, half = _mean_and_band(measured[:, k])
      x, looks = np.arange(count + 1), _looks(config, k)
      axis.plot(x, mean, label=f'alpha = {alpha:g}', **looks)
      axis.fill_between(
        x, mean - half, mean + half, color=looks['color'], alpha=0.15, lw=0
      )
      axis.plot(
        marked,
        predicted[:, k].mean(axis=0)[marked],
        MARKERS[k % len(MARKERS)],
        color=looks['color'],
        markerfacecolor='none',
        markersize=9,
      )
    axis.set_xlabel(f'epoch of {count} (batch 1, step size 1/{count})')
    axis.set_title(titles[reading])
  axes[0].set_ylim(bottom=0)
  axes[1].set_yscale('symlog', linthresh=1)
  axes[1].set_ylim(bottom=0)
  axes[1].set_ylabel('linear below 1, logarithmic above')
  axes[0].set_ylabel('relative deviation from the strict layer')
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=5
  )
  ends = {
    (row['reading'], row['alpha']): row['relative_deviation']['value']
    for row in summary['deviations']
    if row['num_epochs'] == count
  }
  said = '; '.join(
    f'{words}: '
    + ', '.join(
      f'{ends[reading, a]:.2g} (alpha = {a:g})' for a in config.alphas
    )
    for reading, words in titles.items()
  )
  return figure, (
    'Distance between the prediction of the dual model and the regularised '
    'layer (strict form), relative to the output of the layer, at the end of '
    f'each of {count} epochs of batch 1 with a ridge. Lines: gradient descent, '
    f'mean over {config.num_seeds} pretrained layers with 95 % t-intervals '
    'over these; markers: closed form. The right axis is linear up to 1, then '
    f'logarithmic. After the last epoch it is, {said}.'
  )


def exact(config: Any, results: summary_of.Results, summary: Mapping[str, Any]):
  """Residual of one full-batch step against both layers and losses."""
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(9, 5.8))
  found, largest = summary_of.residuals(results), summary['residuals']
  series = {
    'printed_ridge': ('printed layer, loss with a ridge', ORANGE, '^'),
    'printed_pair': ('printed layer, loss with one more pair', BLUE, 's'),
    'strict_ridge': ('strict layer, loss with a ridge', BLACK, 'o'),
  }
  places = np.arange(len(config.alphas))
  floor = np.finfo(float).eps / 4
  for shift, (name, look) in zip((-0.15, 0, 0.15), series.items(), strict=True):
    label, color, marker = look
    each = np.maximum(found[name].max(axis=1), floor)
    for k, x in enumerate(places + shift):
      axis.plot(
        np.full(each.shape[0], x),
        each[:, k],
        marker,
        color=color,
        markerfacecolor='none',
        markersize=8,
        label=label if k == 0 else None,
      )
  axis.axhline(summary_of.EXACT, color=GREY, linestyle='--')
  axis.text(
    places[-1] + 0.3,
    summary_of.EXACT * 1.6,
    'tolerance of an identity',
    color='#555555',
    ha='right',
  )
  axis.set_yscale('log')
  axis.set_xticks(places, [f'{alpha:g}' for alpha in config.alphas])
  axis.set_xlabel('alpha')
  axis.set_ylabel('residual, relative to the scale of rounding')
  axis.set_title('One full batch, both learning rates 1')
  figure.legend(loc='outside lower center', ncols=2)
  return figure, (
    'Largest residual between a regularised layer and its dual model after ONE '
    'full-batch gradient step in float64, one marker for each of '
    f'{config.num_seeds} pretrained layers (largest of '
    f'{config.num_test_prompts} held-out prompts; drawn at {floor:.0e} if it '
    'is smaller). Largest of all: '
    f'{largest["strict_ridge"]:.1e} for the strict form and the ridge, '
    f'{largest["printed_ridge"]:.1e} for the printed form (A - alpha I) V and '
    f'the ridge, {largest["printed_pair"]:.1e} for the printed form and a loss '
    "with one more pair, which un-learns the query's own label at the test "
    'input.'
  )


def predictions(
  config: Any, results: summary_of.Results, summary: Mapping[str, Any]
):
  """Predicted labels of the layers and of both dual models."""
  del summary
  import matplotlib.pyplot as plt

  chosen = [0, len(config.alphas) - 1]
  figure, axes = plt.subplots(2, 1, figsize=(11, 7.4), sharex=True)
  count = config.dual_epochs[-1]
  per_seed = max(1, NUM_STRIP_PROMPTS // config.num_seeds)
  per_seed = min(per_seed, config.num_test_prompts)
  order = np.argsort(results.target[:, :per_seed, 0].ravel())
  places = np.arange(order.size)

  def strip(array):
    return array[:, :per_seed, 0].ravel()[order]

  for axis, k in zip(axes, chosen, strict=True):
    step = results.full_batch
    last = results.epochs[count][summary_of.PER_EPOCH].measured[:, :, k, -1]
    series = (
      (results.target, '_', BLACK, 14, 'true label'),
      (step.printed[:, :, k], '^', ORANGE, 9, 'printed layer'),
      (step.strict[:, :, k], 'o', BLUE, 11, 'strict layer'),
      (step.ridge[:, :, k], 'x', BLACK, 6, 'dual model, one full batch'),
      (last, 'D', GREEN, 6, f'dual model, {count} epochs, alpha / N'),
    )
    for array, marker, color, size, label in series:
      axis.plot(
        places,
        strip(array),
        marker,
        color=color,
        markerfacecolor='none',
        markersize=size,
        markeredgewidth=1.6,
        label=label,
      )
    axis.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    axis.set_xticks([])
    axis.set_ylabel('label of the query')
    axis.set_title(f'alpha = {config.alphas[k]:g}')
  axes[1].set_xlabel(
    f'{per_seed} held-out prompts of each of {config.num_seeds} seeds, by true '
    'label'
  )
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3
  )
  return figure, (
    'Predicted labels of held-out prompts: the regularised layer in its strict '
    'form (circles) and as printed (triangles), the dual model after one '
    f'full-batch step with a ridge (crosses) and after {count} epochs of batch '
    '1 (diamonds). The layers were pretrained '
    f'without a ridge for {config.num_epochs} epochs'
    + (
      '.' if config.multi_task else ' on one task matrix, which they memorise.'
    )
  )
