"""Figures of `experiments.learning_processes`.

Colours are those of Okabe and Ito; every series has a line style and a marker
of its own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import equivalence_figures, harness
from experiments.learning_processes_measure import INGREDIENTS
from experiments.learning_processes_report import by_seed, shown_steps

LOOKS = {
  'contrastive': ('#000000', '-', 'o'),
  'squared': ('#0072B2', '--', 's'),
  'InfoNCE': ('#D55E00', '-.', '^'),
  'cosine': ('#009E73', ':', 'D'),
  'SimSiam': ('#0072B2', '-', 's'),
  'BYOL': ('#56B4E9', '--', 'D'),
  'SimSiam without predictor': ('#E69F00', '-.', '^'),
  'SimSiam without stop-gradient': ('#D55E00', ':', 'v'),
  'SimSiam without both': ('#CC79A7', '--', 'x'),
  'kernel learning': ('#009E73', '-.', 'P'),
}
DATA_LOOKS = {
  'random': ('#0072B2', 'o', 0.12),
  'trained layer': ('#D55E00', 's', -0.12),
}


def draw(
  config: Any, results: Mapping[str, Any], folder: harness.Workdir
) -> list[dict[str, str]]:
  """Draws and saves all figures; returns their captions."""
  number = (
    f'{config.num_seeds} seeds of {config.num_prompts} prompts, N = '
    f'{config.num_demonstrations} demonstrations; shaded: 95 % intervals'
  )
  parts = {
    'duals': (
      _duals,
      'Dual models that descend on four losses, full batch, along steps of '
      'fixed size; the first step of all is equally long. Left: angle of the '
      "change of the weights and attention's step. Right: angle of the answer "
      'to the query and the attention output. On the contrastive loss both '
      'are zero at every step. On the squared loss they are zero at the first '
      'step alone. InfoNCE begins with centred values and the cosine with the '
      'query token, so their first steps are other attentions. '
      f'{number}.',
    ),
    'processes': (
      _processes,
      'Self-supervised learning on the same demonstrations, key and value of a '
      'token being its two views. Top: spread of the outputs (0: all point one '
      'way); the first point is the untrained start. Bottom: linear centred '
      'kernel alignment of the outputs with the '
      "dual model's predictions (1: equal up to rotation and scale). The black "
      'dashed line is the dual model after its one step. '
      f'{number}.',
    ),
    'ingredients': (
      _ingredients,
      "Angle of the first step of the weights with attention's, from the same "
      "random weights, with one of SimSiam's ingredients at a time and with "
      'all of them (90 degrees: nothing in common). '
      f'{number.replace("shaded", "bars")}.',
    ),
  }
  rows = []
  for name, (figure, caption) in parts.items():
    with equivalence_figures.style():
      harness.save_figure(folder, name, figure(results))
    rows.append({'file': f'figures/{name}.png', 'caption': caption})
  return rows


def _curve(axis, name: str, array: Any, first: int) -> None:
  """Mean over seeds with its interval; `first` is the number of step 0."""
  look, rows = LOOKS[name], by_seed(array)
  shown = shown_steps(rows.shape[1])
  estimates = [harness.mean_interval(rows[:, step]) for step in shown]
  mean, low, high = (
    np.array([estimate[key] for estimate in estimates])
    for key in ('mean', 'low', 'high')
  )
  steps = shown + first
  axis.fill_between(steps, low, high, color=look[0], alpha=0.15, linewidth=0)
  axis.plot(
    steps,
    mean,
    look[1],
    color=look[0],
    marker=look[2],
    markevery=(list(LOOKS).index(name) % 3, 6),
    markersize=7,
    linewidth=2.2,
    label=name,
  )


def _log_steps(axis) -> None:
  axis.set_xscale('log')
  axis.set_xlim(left=0.95)
  axis.xaxis.set_major_formatter('{x:g}')


def _duals(results) -> Any:
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(
    2, len(results), figsize=(11, 7.6), sharex=True, sharey=True
  )
  axes = axes.T.reshape(len(results), 2).T
  quantities = {
    'weights_angle': "weights and attention's,\nangle in degrees",
    'answer_angle': 'answer and attention output,\nangle in degrees',
  }
  for row, (quantity, label) in zip(axes, quantities.items(), strict=True):
    row[0].set_ylabel(label)
    for axis, (data, result) in zip(row, results.items(), strict=True):
      for name in ('contrastive', 'squared', 'InfoNCE', 'cosine'):
        _curve(axis, name, result['duals'][name][quantity], 1)
      _log_steps(axis)
      if quantity == 'weights_angle':
        axis.set_title(f'demonstrations: {data}')
      else:
        axis.set_xlabel('gradient steps')
  axes[0, 0].set_ylim(-3, 92)
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=4,
    handlelength=3.2,
  )
  return figure


def _processes(results) -> Any:
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(
    2, len(results), figsize=(11, 8.6), sharex=True, sharey='row'
  )
  axes = axes.reshape(2, len(results))
  for column, (data, result) in enumerate(results.items()):
    spread, alignment = axes[:, column]
    for name, look in result['processes'].items():
      if name == 'dual model':
        continue
      _curve(spread, name, look['output_spread'], 1)
      _curve(alignment, name, look['alignment'], 1)
    dual = by_seed(result['processes']['dual model']['output_spread']).mean()
    for axis, level in ((spread, dual), (alignment, 1)):
      axis.axhline(
        level, color='black', linestyle='--', linewidth=2, label='dual model'
      )
      _log_steps(axis)
      axis.set_ylim(0, 1.05)
    spread.set_title(f'demonstrations: {data}')
    alignment.set_xlabel('gradient steps + 1')
  axes[0, 0].set_ylabel('spread of the outputs')
  axes[1, 0].set_ylabel("alignment with the\ndual model's predictions")
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=3,
    handlelength=3.2,
  )
  return figure


def _ingredients(results) -> Any:
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(10, 4.6))
  places = np.arange(len(INGREDIENTS))[::-1]
  for data, result in results.items():
    color, marker, offset = DATA_LOOKS[data]
    estimates = [
      harness.mean_interval(column)
      for column in by_seed(result['ingredients']).T
    ]
    mean, low, high = (
      np.array([estimate[key] for estimate in estimates])
      for key in ('mean', 'low', 'high')
    )
    axis.errorbar(
      mean,
      places + offset,
      xerr=[mean - low, high - mean],
      fmt=marker,
      color=color,
      markersize=9,
      capsize=4,
      linewidth=2,
      label=f'demonstrations: {data}',
    )
  axis.axvline(90, color='#8C8C8C', linewidth=1, linestyle=':')
  axis.set_yticks(places, INGREDIENTS)
  axis.set_xticks(range(0, 91, 15))
  axis.set_xlabel("first step and attention's, angle in degrees")
  axis.set_title("What is added to attention's loss")
  figure.legend(
    *axis.get_legend_handles_labels(), loc='outside lower center', ncols=2
  )
  return figure
