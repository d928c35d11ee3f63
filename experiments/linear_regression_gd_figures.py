"""Figures of `experiments.linear_regression_gd`."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments import linear_regression_gd_variant_figures as variants
from experiments.equivalence_figures import BLACK, BLUE, GREEN, GREY, ORANGE
from experiments.linear_regression_gd_measure import FRACTIONS, SCALES
from experiments.linear_regression_gd_step_claims import YARDSTICKS
from experiments.linear_regression_gd_steps import UNTIED, linear_tasks
from iclcl_jax.accounts import linear_regression_gd as account

LAYERS = {
  'linear': ('linear attention', BLUE, 'o'),
  'softmax_2': ('softmax, two heads', ORANGE, 's'),
  'softmax_1': ('softmax, one head', GREEN, '^'),
}


def draw(config, result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """All figures, each with its name."""
  yield 'training', _training(config, result)
  yield 'generalisation', _generalisation(result)
  yield 'products', _products(config, result)
  if 'steps' in result:
    yield 'steps', _steps(config, result)
  if 'stacks' in result:
    yield 'stacks', variants.stacks(result['stacks'])
  if 'sine' in result:
    yield 'sine', variants.sine(result['sine'])
  if 'alternating' in result:
    yield 'alternating', variants.alternating(result['alternating'])


def _training(config, result) -> Any:
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
  for name, (label, color, marker) in LAYERS.items():
    if name not in result['curves']:
      continue
    curve = result['curves'][name]
    for axis, key in ((left, 'loss'), (right, 'model_cos')):
      axis.plot(curve['step'], curve[key].T, color=color, lw=0.6, alpha=0.6)
      axis.plot(
        curve['step'],
        np.median(curve[key], axis=0),
        color=color,
        marker=marker,
        mfc='white',
        label=label,
      )
  descent = result['descent']
  zero = account.expected_loss(linear_tasks(config), 0.0)
  left.axhline(descent['loss'], color=BLACK, ls='--', label='one step of GD')
  left.axhline(
    descent['loss_centred'], color=GREY, ls=':', label='GD, centred inputs'
  )
  left.axhline(zero, color=GREY, ls='-.', label='predicting 0')
  right.axhline(1, color=BLACK, ls='--')
  left.set(ylabel='loss (half squared error)', xlabel='training steps')
  right.set(ylabel='Model cos with one step', xlabel='training steps')
  for axis in (left, right):
    axis.set_xscale('symlog', linthresh=config.record_every, linscale=0.5)
    axis.set_xlim(left=0)
  figure.legend(
    *left.get_legend_handles_labels(), loc='outside upper center', ncols=3
  )
  return figure


def _generalisation(result) -> Any:
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
  scales = result['scales']
  rows = [harness.mean_interval(x) for x in scales['trained'].T]
  low, mean, high = (
    np.array([row[key] for row in rows]) for key in ('low', 'mean', 'high')
  )
  tiny = 0.1 * np.min(mean)  # For the logarithmic axis.
  left.fill_between(
    SCALES, np.maximum(low, tiny), high, color=BLUE, alpha=0.2, lw=0
  )
  left.plot(SCALES, mean, 'o', color=BLUE, mfc='white', label='trained layer')
  left.plot(SCALES, scales['gd'], '+', color=ORANGE, ms=10, label='one GD step')
  left.plot(SCALES, scales['closed_form'], '--', color=BLACK, label='theory')
  left.axvline(1, color=GREY, lw=0.8)
  left.set(yscale='log', xlabel='scale of the inputs', ylabel='loss')
  left.legend()
  between = result['interpolation']
  right.plot(FRACTIONS, between.T, color=BLUE, lw=0.7, alpha=0.7)
  right.plot(
    FRACTIONS, np.median(between, axis=0), 'o-', color=BLUE, mfc='white',
    label='interpolated (median)',
  )  # fmt: skip
  loss = result['descent']['loss']
  right.axhline(loss, color=BLACK, ls='--', label='one GD step')
  right.set(
    xlabel='trained (0) to constructed (1)',
    ylabel='loss',
    ylim=(0.97 * loss, max(1.05 * loss, 1.02 * np.max(between))),
  )
  right.legend()
  return figure


def _products(config, result) -> Any:
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.8))
  rate = float(result['descent']['rate']) / config.num_demonstrations
  found = result['products']['matrix'][0]
  made = -rate * np.eye(config.d_x)
  for axis, matrix, title in zip(
    axes, (found, made), ('trained', 'constructed'), strict=True
  ):
    image = axis.imshow(matrix, cmap='PuOr', vmin=-rate, vmax=rate)
    axis.set(title=title, xlabel='input of the key')
    axis.spines[:].set_visible(True)
  axes[0].set_ylabel('input of the query')
  figure.colorbar(image, ax=axes, label='product of weights')
  return figure


def _steps(config, result) -> Any:
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(6.5, 4))
  rows = result['steps']
  first = [row for row in rows if row['num_steps'] == 1]
  series = (
    ('GD', BLUE, 'o', '-'),
    ('GD++', ORANGE, 's', '--'),
    (UNTIED, GREEN, '^', ':'),
  )
  for name, color, marker, line in series:
    own = [row for row in rows if row['method'] == name]
    own = own if name == 'GD' else first + own
    axis.errorbar(
      [row['num_steps'] for row in own],
      [row['loss'] for row in own],
      [1.96 * row['standard_error'] for row in own],
      color=color, marker=marker, mfc='white', label=name, capsize=3,
      linestyle=line,
    )  # fmt: skip
  settings = config.d_x, config.num_demonstrations, config.half_range
  if settings == (10, 10, 0.5):
    axis.plot(
      [steps for _, steps in YARDSTICKS],
      list(YARDSTICKS.values()),
      'x', color=BLACK, ms=9, label='expected', zorder=3,
    )  # fmt: skip
  axis.set(xlabel='steps (layers)', ylabel='loss (half squared error)')
  axis.set_ylim(bottom=0)
  axis.set_xticks(sorted({row['num_steps'] for row in rows}))
  axis.legend()
  return figure
