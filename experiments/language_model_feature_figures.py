"""Figures of random features on the heads of a language model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.equivalence_figures import BLACK, BLUE, GREEN, GREY, ORANGE
from experiments.language_model_features import MAPS, TARGET, Study
from iclcl_jax import budget

# Colour, marker and its size: positive and hyperbolic features often coincide.
LOOKS = {
  'positive': (BLUE, 'o', 12),
  'hyperbolic': (GREEN, 's', 5),
  'trigonometric': (ORANGE, '^', 8),
}
PREDICTED_LINES = {'positive': '-', 'hyperbolic': '--', 'trigonometric': ':'}
LINES = {'gaussian': '--', 'orthogonal': '-'}


def figures(study: Study) -> Mapping[str, Any]:
  """All figures of the study, by name."""
  return {
    'random_features': overview(study),
    'random_features_layers': layers(study),
  }


def overview(study: Study) -> Any:
  """Errors against R; directions needed; the prediction checked."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 3, figsize=(15.5, 5.2))
  _errors(axes[0], study)
  _needed(axes[1], study)
  _check(axes[2], study)
  return figure


def _errors(axis, study: Study) -> None:
  for name, (color, marker, size) in LOOKS.items():
    for projection, line in LINES.items():
      # Median over heads, positions and draws; a band from head to head.
      rows = [study.errors[r][f'{name}, {projection}'] for r in study.counts]
      heads = [np.median(array, axis=(0, 3)).ravel() for array in rows]
      axis.plot(
        study.counts,
        [np.median(array) for array in heads],
        line,
        color=color,
        marker=marker,
        markersize=size,
        markerfacecolor='none' if name == 'positive' else color,
        markeredgewidth=1.8,
        label=f'{name}, {projection}',
      )
      if projection == 'orthogonal':
        low, high = np.quantile(heads, [0.25, 0.75], axis=1)
        axis.fill_between(
          study.counts, low, high, color=color, alpha=0.15, linewidth=0
        )
  mean = np.median(study.mean_errors)
  axis.axhline(mean, color=BLACK, linestyle=':', linewidth=2)
  axis.axhline(TARGET, color=GREY, linewidth=1)
  axis.annotate(
    'error of 10 %',
    (1, TARGET),
    xycoords=('axes fraction', 'data'),
    xytext=(-2, 3),
    textcoords='offset points',
    ha='right',
    color='#404040',
    fontsize=11,
  )
  axis.plot([], [], ':', color=BLACK, linewidth=2, label='plain mean of values')
  axis.set_xscale('log', base=2)
  axis.set_yscale('log')
  axis.set_ylim(TARGET / 30, None)
  axis.set_xticks(study.counts, [str(r) for r in study.counts])
  axis.set_xlabel('random directions R')
  axis.set_ylabel('relative error of the output')
  axis.set_title('measured: median, quartiles of heads')
  axis.legend(fontsize=9.5, loc='lower left', ncols=1)


def _needed(axis, study: Study) -> None:
  num_layers = study.mean_errors.shape[0]
  steps = np.arange(num_layers)
  for name, (color, marker, size) in LOOKS.items():
    values = study.log_needed[name].reshape(num_layers, -1)
    axis.plot(
      steps,
      np.median(values, axis=1),
      marker=marker,
      color=color,
      markersize=size * 0.7,
      markerfacecolor='none' if name == 'positive' else color,
      label=name,
    )
    low, high = values.min(axis=1), values.max(axis=1)
    axis.fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)
  axis.axhline(np.log10(study.num_tokens), color=BLACK, linestyle=':')
  axis.annotate(
    f'tokens of the prompt ({study.num_tokens})',
    (num_layers - 1, np.log10(study.num_tokens)),
    xytext=(0, 4),
    textcoords='offset points',
    ha='right',
    fontsize=11,
  )
  axis.set_ylim(0, None)
  axis.set_xlabel('layer')
  axis.set_ylabel('$\\log_{10}$ of the directions R')
  axis.set_title('predicted: R for an error of 10 %')
  axis.legend(fontsize=11, loc='upper right')


def _check(axis, study: Study) -> None:
  found = study.shrunk
  for name, (color, marker, size) in LOOKS.items():
    axis.plot(
      found.factors,
      found.predicted[name],
      PREDICTED_LINES[name],
      color=color,
      label=f'{name}, predicted',
    )
    axis.plot(
      found.factors,
      found.measured[name],
      marker,
      color=color,
      markerfacecolor='white',
      markeredgewidth=1.8,
      markersize=max(size, 8),
      label=f'{name}, measured',
    )
  limit = budget.LARGEST_VALID_ERROR
  axis.axhspan(limit, 1e9, color=GREY, alpha=0.15, linewidth=0)
  axis.annotate(
    'prediction not valid',
    (0.98, limit),
    xycoords=('axes fraction', 'data'),
    xytext=(0, 5),
    textcoords='offset points',
    ha='right',
    fontsize=11,
    color='#404040',
  )
  axis.set_yscale('log')
  smallest = min(
    min(rows[name].min() for name in MAPS)
    for rows in (found.measured, found.predicted)
  )
  axis.set_ylim(bottom=max(smallest / 2, 1e-6))
  axis.set_xlabel('queries and keys multiplied by (1: the model)')
  axis.set_ylabel('relative error of the output, r.m.s.')
  axis.set_title(f'the prediction checked, R = {found.num_directions}')
  axis.set_ylim(top=3e3)
  axis.legend(fontsize=9.5, loc='upper right')


def layers(study: Study) -> Any:
  """Median error of each layer, a panel for each map, a line for each R."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(
    len(MAPS), 1, figsize=(10, 9), sharex=True, sharey=True
  )
  steps = np.arange(study.mean_errors.shape[0])
  shades = np.linspace(0.6, 0, len(study.counts))
  markers = 'osD^vP*X'
  for axis, name in zip(axes, MAPS, strict=True):
    for index, count in enumerate(study.counts):
      array = study.errors[count][f'{name}, orthogonal']
      axis.plot(
        steps,
        np.median(array, axis=(0, 2, 3)),
        marker=markers[index % len(markers)],
        markersize=6,
        color=str(shades[index]),
        linewidth=1.3,
        label=f'R = {count}',
      )
    axis.plot(
      steps,
      np.median(study.mean_errors, axis=(1, 2)),
      ':',
      color=BLUE,
      linewidth=2.5,
      label='plain mean of values',
    )
    axis.axhline(TARGET, color=GREY, linewidth=1)
    axis.set_yscale('log')
    axis.set_title(f'{name} features, orthogonal directions')
    axis.set_ylabel('relative error')
  axes[0].annotate(
    'error of 10 %', (0, TARGET), xytext=(0, 4), textcoords='offset points'
  )
  axes[0].legend(
    ncols=len(study.counts) + 1,
    loc='lower center',
    bbox_to_anchor=(0.5, 1.12),
    fontsize=11,
  )
  axes[-1].set_xlabel('layer')
  return figure
