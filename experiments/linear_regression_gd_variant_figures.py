"""Figures of stacks, sine waves and separate tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import harness
from experiments.equivalence_figures import BLACK, BLUE, GREEN, GREY, ORANGE


def _band(axis, steps, losses, color, marker, label) -> None:
  """Mean and 95 % interval over seeds."""
  rows = [harness.mean_interval(column) for column in losses.T]
  low, mean, high = (
    np.array([row[name] for row in rows]) for name in ('low', 'mean', 'high')
  )
  low = np.maximum(low, 0.5 * np.min(mean))  # For logarithmic axes.
  axis.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
  axis.plot(steps, mean, marker=marker, color=color, mfc='white', label=label)


def stacks(rows: Sequence[Mapping[str, Any]]) -> Any:
  """Losses of trained stacks against training steps, a panel for each."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(
    1, len(rows), figsize=(4.6 * len(rows), 4.2), sharey=True, squeeze=False
  )
  for axis, row in zip(axes[0], rows, strict=True):
    _band(axis, row['step'], row['loss'], BLUE, 'o', 'trained layers')
    axis.axhline(row['loss_gd'], color=BLACK, ls='--')
    axis.axhline(row['loss_peer'], color=ORANGE, ls='-.')
    names = (('GD', 'loss_gd', BLACK), (row['peer'], 'loss_peer', ORANGE))
    for name, key, color in names:
      axis.annotate(
        name, (0.98, row[key]), xycoords=('axes fraction', 'data'),
        xytext=(0, 3), textcoords='offset points', color=color, fontsize=12,
        ha='right',
      )  # fmt: skip
    title = f'{row["num_layers"]} {row["kind"]} layers'
    axis.set(title=title, xlabel='training steps', ylim=(0, None))
  axes[0, 0].set_ylabel('loss (half squared error)')
  axes[0, -1].legend(loc='lower left')
  return figure


def sine(row: Mapping[str, Any]) -> Any:
  """Losses against training steps, and predictions along one task."""
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
  series = (
    ('attention', 'attention on a network', BLUE, 'o', '-'),
    ('descent', 'GD on the last layer', ORANGE, 's', '--'),
  )
  for name, label, color, marker, line in series:
    # The start is off any scale.
    _band(
      left, row['step'][1:], row[f'loss_{name}'][:, 1:], color, marker, label
    )
    right.plot(
      row['grid'], row[f'along_{name}'].T, color=color, ls=line, lw=1,
      alpha=0.8,
    )  # fmt: skip
    right.plot([], [], color=color, ls=line, label=label)
  left.axhline(row['loss_zero'], color=GREY, ls='-.', label='predicting 0')
  left.set(yscale='log', xlabel='training steps')
  left.set_ylabel('loss (half squared error)')
  left.legend(loc='lower left')
  right.plot(
    *row['context'].T, 'o', color=BLACK, ms=7, label='demonstrations', zorder=3
  )
  right.set(xlabel='input of the query', ylabel='prediction')
  right.margins(y=0.3)
  right.legend(loc='upper center', ncols=2, fontsize=10)
  return figure


def alternating(row: Mapping[str, Any]) -> Any:
  """Losses against training steps, and the attention of the first layer."""
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.2), width_ratios=(1, 1.1)
  )
  _band(left, row['step'], row['loss'], BLUE, 'o', 'softmax, then linear')
  left.axhline(row['loss_gd'], color=BLACK, ls='--', label='one step of GD')
  left.axhline(row['loss_zero'], color=GREY, ls='-.', label='predicting 0')
  left.set(xlabel='training steps', ylabel='loss (half squared error)')
  left.set_ylim(bottom=0)
  left.legend(fontsize=11)
  best = int(np.argmin(row['loss'][:, -1]))
  weights = row['copied'][best]
  image = right.imshow(weights, cmap='Greys', vmin=0, vmax=1, aspect='auto')
  rows = np.arange(len(weights))
  right.plot(
    rows + 1 - 2 * (rows % 2), rows, 's', ms=14, mfc='none', color=GREEN,
    mew=1.5,
  )  # fmt: skip
  labels = [f'${c}_{{{i + 1}}}$' for i in range(len(rows) // 2) for c in 'xy']
  right.set_xticks(range(len(rows) + 1), [*labels, '$x_q$'])
  right.set_yticks(rows, labels)
  right.set(xlabel='token that is read', ylabel='token that reads')
  right.spines[:].set_visible(True)
  figure.colorbar(image, ax=right, label='attention')
  return figure
