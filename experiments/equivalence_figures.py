"""Figures of `experiments.equivalence`, for a talk.

Colours are those of Okabe and Ito; every series differs in shape or line style
as well, and is named where it is drawn.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness

BLACK, BLUE, ORANGE, GREEN = '#000000', '#0072B2', '#D55E00', '#009E73'
GREY = '#8C8C8C'
NUM_STRIP_PROMPTS = 20


def style() -> Any:
  """Settings under which all figures are drawn, as a context manager."""
  import matplotlib

  matplotlib.use('Agg')
  return matplotlib.rc_context(
    {
      'font.size': 13,
      'axes.titlesize': 14,
      'axes.titlelocation': 'left',
      'axes.spines.top': False,
      'axes.spines.right': False,
      'figure.constrained_layout.use': True,
      'figure.constrained_layout.h_pad': 0.1,
      'svg.fonttype': 'none',
      'legend.frameon': False,
      'legend.fontsize': 12,
    }
  )


def predictions(
  config: Any, results: Mapping[int, Any], summary: Mapping[str, Any]
) -> Any:
  """True label, layer and dual model for a strip of held-out prompts."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(
    len(results), 1, figsize=(10, 3.6 * len(results)), squeeze=False
  )
  per_seed = max(1, NUM_STRIP_PROMPTS // config.num_seeds)
  per_seed = min(per_seed, config.num_dual_prompts)
  for axis, (size, result) in zip(axes[:, 0], results.items(), strict=True):
    target, layer, dual = (
      array[:, :per_seed, 0].ravel()
      for array in (
        result['target'],
        result['one_step_float64'].attention,
        result['descent_float64'].dual,
      )
    )
    order = np.argsort(target)
    _strip(axis, target[order], layer[order], dual[order])
    residual = summary['by_num_demonstrations'][str(size)][
      'residual_multi_epoch_float64'
    ]
    axis.set_title(
      f'N = {size} demonstrations: Transformer and dual model agree to '
      f'{residual:.0e}'
    )
    axis.set_ylabel('label of the query')
  axes[0, 0].legend(
    loc='upper left', ncols=1, handletextpad=0.4, borderaxespad=0
  )
  axes[-1, 0].set_xlabel(
    f'{per_seed} held-out prompts of each of {config.num_seeds} seeds, by '
    f'true label (dual model: {config.dual_epochs} epochs of batch 1, float64)'
  )
  return figure


def _strip(axis, target, layer, dual) -> None:
  places = np.arange(target.size)
  axis.vlines(places, layer, target, color=GREY, linewidth=0.8, zorder=1)
  axis.plot(
    places,
    target,
    '_',
    color=BLACK,
    markersize=15,
    markeredgewidth=2.5,
    label='true label',
  )
  axis.plot(
    places,
    layer,
    'o',
    color=BLUE,
    markerfacecolor='none',
    markersize=11,
    markeredgewidth=2,
    label='Transformer',
  )
  axis.plot(
    places,
    dual,
    'x',
    color=ORANGE,
    markersize=6,
    markeredgewidth=2,
    label='dual model after gradient descent',
  )
  axis.set_xticks([])
  axis.spines['bottom'].set_visible(False)
  axis.axhline(0, color=GREY, linewidth=0.6, zorder=0)


def descent(config: Any, size: int, result: Mapping[str, Any]) -> Any:
  """Distance to the attention output along the steps, and its closed form."""
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
  once, many = result['descent_1_epoch'], result['descent_float64']
  residual = max(np.max(x.curve_residual) for x in (once, many))
  visits = np.arange(size + 1)
  _curves(left, visits, once.distances, once.predicted, 1)
  left.set_title('one epoch, one demonstration a step')
  left.set_xlabel('demonstrations visited')
  left.set_ylabel('distance to the attention output,\nrelative to the start')
  epochs = np.arange(config.dual_epochs + 1)
  every = max(1, config.dual_epochs // 20)
  ends = slice(None, None, size)
  _curves(
    right, epochs, many.distances[..., ends], many.predicted[..., ends], every
  )
  _name_series(right)
  right.set_title(f'{config.dual_epochs} epochs: linear for every prompt')
  right.set_xlabel('whole epochs')
  num_prompts = once.distances.shape[0] * once.distances.shape[1]
  figure.suptitle(
    f'Gradient descent on the contrastive loss, N = {size}: {num_prompts} '
    f'held-out prompts of {config.num_seeds} seeds,\nmeasured and closed form '
    f'agree to {residual:.0e} (float64)',
    fontsize=12,
    color='#404040',
  )
  return figure


def _curves(axis, steps, distances, predicted, every: int) -> None:
  def relative(array):
    rows = array.reshape(-1, array.shape[-1])
    return rows / predicted.reshape(rows.shape)[:, :1]

  measured, closed_form = relative(distances), relative(predicted)
  axis.plot(steps, measured.T, color=GREY, linewidth=0.7, alpha=0.5)
  mean = measured.mean(axis=0)
  axis.plot(steps, mean, color=BLUE, linewidth=3)
  axis.plot(
    steps[::every],
    closed_form.mean(axis=0)[::every],
    'o',
    color=ORANGE,
    markerfacecolor='white',
    markeredgewidth=1.8,
    markersize=7,
    clip_on=False,
    zorder=3,
  )
  axis.set_ylim(bottom=0)
  axis.set_xlim(0, steps[-1])
  axis.locator_params(axis='x', integer=True)


def _name_series(axis) -> None:
  """Names the series in the empty corner of the panel, in their looks."""
  axis.plot([], [], color=GREY, linewidth=0.9, label='each prompt')
  axis.plot([], [], color=BLUE, linewidth=3, label='mean, measured')
  axis.plot(
    [],
    [],
    'o',
    color=ORANGE,
    markerfacecolor='white',
    markeredgewidth=1.8,
    markersize=7,
    label='mean, closed form',
  )
  axis.legend(loc='upper right', handlelength=1.6)


def pretraining(config: Any, curves: Mapping[int, np.ndarray]) -> Any:
  """Loss on new prompts by epoch, over that of predicting 0."""
  import matplotlib.pyplot as plt
  import matplotlib.ticker

  figure, axis = plt.subplots(figsize=(9, 4.8))
  looks = [(BLUE, '-'), (ORANGE, '--'), (GREEN, '-.'), (BLACK, ':')]
  for index, (size, curve) in enumerate(curves.items()):
    color, line = looks[index % len(looks)]
    ratios = curve[:, 0] / np.mean(curve[:, 1], axis=0)[None]
    estimates = [harness.mean_interval(row) for row in np.log(ratios)]
    mean, low, high = (
      np.exp([estimate[name] for estimate in estimates])
      for name in ('mean', 'low', 'high')
    )
    epochs = np.arange(1, mean.size + 1)
    axis.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(epochs, mean, line, color=color, linewidth=2.5)
    axis.annotate(
      f'N = {size}: {mean[-1]:.2f}',
      (epochs[-1], mean[-1]),
      xytext=(6, 0),
      textcoords='offset points',
      color=color,
      va='center',
    )
  axis.axhline(1, color=GREY, linewidth=1)
  axis.annotate(
    'predicting 0',
    (1, 1),
    xycoords=('axes fraction', 'data'),
    xytext=(0, 4),
    textcoords='offset points',
    color='#404040',
    ha='right',
  )
  axis.set_yscale('log')
  axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
  axis.yaxis.set_major_formatter('{x:g}')
  axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axis.set_xlim(0, epochs[-1])
  axis.locator_params(axis='x', integer=True)
  axis.set_xlabel('epoch')
  axis.set_ylabel('squared error of new prompts,\nrelative to predicting 0')
  task = 'a fresh B every prompt' if config.multi_task else 'one B a seed'
  axis.set_title(
    f'Pretraining, {task}: geometric mean of {config.num_seeds} seeds, '
    '95 % interval'
  )
  return figure
