"""Figures of `experiments.demonstration_deletion`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import demonstration_deletion_data as data
from experiments import equivalence_figures as style
from experiments import harness

MODEL_FREE = 'label', 'label times recency', 'recency', 'length', 'random'
TITLES = {'signed': 'effect, with sign', 'size': 'size of the effect'}


def ranks(correlations: Mapping[str, Any]) -> Any:
  """Rank correlations of all prompts, method by method."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(
    1, 2, figsize=(12, 5.4), sharex=True, gridspec_kw={'wspace': 0.08}
  )
  for axis, (question, methods) in zip(axes, correlations.items(), strict=True):
    for row, (name, found) in enumerate(methods.items()):
      _row(axis, row, name, found['spearman'])
    axis.axvline(0, color=style.BLACK, linewidth=0.8)
    axis.set_yticks(range(len(methods)), list(methods))
    axis.invert_yaxis()
    axis.set_title(TITLES[question])
    axis.set_xlabel('Spearman correlation with deletion')
  handles = [
    plt.Line2D([], [], color=color, marker=marker, ls='', mfc=fill, label=text)
    for color, marker, fill, text in (
      (style.BLUE, 'o', style.BLUE, 'mean, 95% interval: needs the model'),
      (style.ORANGE, 's', 'white', 'mean, 95% interval: needs no model'),
      (style.GREY, 'o', 'none', 'prompts (area: how many)'),
    )
  ]
  figure.legend(handles=handles, loc='outside lower center', ncols=3)
  return figure


def _row(axis, row: int, name: str, values: np.ndarray) -> None:
  places, counts = np.unique(np.round(values, 1), return_counts=True)
  axis.scatter(
    places,
    np.full(len(places), row),
    s=700 * counts / len(values),
    facecolors='none',
    edgecolors=style.GREY,
    linewidths=1,
  )
  mean = harness.mean_interval(values)
  model_free = name in MODEL_FREE
  axis.errorbar(
    mean['mean'],
    row,
    xerr=[[mean['mean'] - mean['low']], [mean['high'] - mean['mean']]],
    fmt='s' if model_free else 'o',
    color=style.ORANGE if model_free else style.BLUE,
    mfc='white' if model_free else None,
    capsize=4,
    markersize=8,
    linewidth=2,
    zorder=3,
  )


def scatter(prompts: data.Prompts, results: Mapping[str, np.ndarray]) -> Any:
  """Predictions against what deletion does, demonstration by demonstration."""
  import matplotlib.pyplot as plt

  panels = {
    'contribution': 'direct logit attribution',
    'removal_effect': 'closed-form removal',
    'hidden': 'hidden, positions kept',
  }
  figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True)
  positive = prompts.positive
  for axis, (name, title) in zip(axes, panels.items(), strict=True):
    for chosen, marker, color, label in (
      (positive, 'o', style.BLUE, 'positive demonstration'),
      (~positive, '^', style.ORANGE, 'negative demonstration'),
    ):
      axis.scatter(
        results[name][chosen],
        results['removed'][chosen],
        s=16,
        marker=marker,
        facecolors='none',
        edgecolors=color,
        linewidths=0.8,
        label=label,
      )
    axis.axline((0, 0), slope=1, color=style.BLACK, ls='--', lw=1)
    axis.axhline(0, color=style.GREY, lw=0.8, zorder=0)
    axis.axvline(0, color=style.GREY, lw=0.8, zorder=0)
    axis.set_title(title)
    axis.set_xlabel('predicted (logits)' if name != 'hidden' else 'logits')
  axes[0].set_ylabel('lost by deletion (logits)')
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=2)
  return figure
