"""Figures of `experiments.language_model`: residuals and attribution."""

from typing import Any

import numpy as np

from experiments import harness
from experiments import language_model_feature_figures as feature_figures
from experiments.equivalence_figures import BLACK, BLUE, GREY, ORANGE, style

MAX_BARS = 40


def draw_figures(results: Any, workdir: harness.Workdir) -> None:
  """Draws all figures.

  Args:
    results: of `experiments.language_model`.
    workdir: folder of all results.
  """
  with style():
    harness.save_figure(workdir, 'residuals', residuals(results))
    harness.save_figure(workdir, 'attribution', attribution(results))
    if results.study is not None:
      for name, figure in feature_figures.figures(results.study).items():
        harness.save_figure(workdir, name, figure)


def residuals(results: Any) -> Any:
  """Largest residual of each head over positions, a panel for each dtype."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(len(results.certified), 1, figsize=(11, 8))
  for axis, (dtype, certified) in zip(
    axes, results.certified.items(), strict=True
  ):
    certificate = certified.certificate
    found = certificate.residuals
    largest = np.maximum(found.closed_form, found.autodiff).max(axis=2).T
    exponent = int(np.floor(np.log10(max(largest.max(), 1e-300))))
    image = axis.imshow(
      largest / 10.0**exponent, cmap='cividis', vmin=0, aspect='auto'
    )
    head, layer = np.unravel_index(np.argmax(largest), largest.shape)
    axis.plot(layer, head, 'x', color='white', markersize=11, mew=4)
    axis.plot(layer, head, 'x', color='black', markersize=10, mew=2)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label(f'residual / $10^{{{exponent}}}$')
    axis.set_ylabel('head')
    axis.set_yticks(range(0, largest.shape[0], 2))
    axis.set_title(
      f'{dtype}: largest residual {certificate.max_residual:.1e} '
      f'(tolerance {certificate.tolerance:.0e})'
    )
  axes[-1].set_xlabel('layer')
  certificate = results.certified['float32'].certificate
  figure.suptitle(
    f'Attention against one gradient step: {certificate.num_heads} heads, '
    f'largest of {certificate.num_positions} positions',
    fontsize=15,
  )
  return figure


def attribution(results: Any) -> Any:
  """What the answer was read from: demonstrations, and heads."""
  import matplotlib.pyplot as plt

  count = max(len(results.prompt.demonstration_labels), 1)
  height = max(5.6, 1.8 + 0.42 * min(count + 2, MAX_BARS))
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(14, height), width_ratios=(1, 1.25)
  )
  _bars(left, results)
  _discs(figure, right, results)
  found, (first, second) = results.attribution, results.labels
  figure.suptitle(
    f'Logit of "{first}" less that of "{second}": '
    f'{found.logit_difference:.2f}, read by the heads of the last position '
    'from the prompt',
    fontsize=14,
  )
  return figure


def _bars(axis, results) -> None:
  """A bar for each demonstration, and what deleting it takes away."""
  found, prompt = results.attribution, results.prompt
  names = [
    f'{index + 1}  {label}'
    for index, label in enumerate(prompt.demonstration_labels)
  ][:MAX_BARS]
  values = found.of_demonstrations[: len(names)]
  names = [*names, 'rest of the prompt', 'embedding, biases']
  values = [*values, found.rest, found.embedding + found.biases]
  places = np.arange(len(names))
  for place, value in zip(places, values, strict=True):
    axis.barh(
      place,
      value,
      height=0.62,
      color=BLUE if value >= 0 else 'white',
      edgecolor=BLUE if value >= 0 else ORANGE,
      hatch='' if value >= 0 else '////',
      linewidth=1.5,
    )
  shown = len(names) - 2
  looks = [
    (found.removal, 'o', 'removed from the heads, to first order'),
    (found.deletion, 'D', 'deleted from the prompt, measured'),
  ]
  for array, marker, label in looks if shown else []:
    axis.plot(
      array[:shown],
      places[:shown],
      marker,
      color=BLACK,
      markerfacecolor='white',
      markersize=7,
      markeredgewidth=1.6,
      label=label,
    )
  axis.barh(0, 0, color=BLUE, label='contribution, towards the answer')
  axis.barh(
    0,
    0,
    color='white',
    edgecolor=ORANGE,
    hatch='////',
    label='contribution, against it',
  )
  axis.axvline(0, color=GREY, linewidth=1)
  axis.set_yticks(places, names)
  axis.invert_yaxis()
  axis.set_xlabel(f'logits towards "{results.labels[0]}"')
  axis.set_title('by demonstration and its label')
  axis.legend(
    loc='upper center', bbox_to_anchor=(0.4, -0.12), ncols=2, fontsize=10.5
  )


def _discs(figure, axis, results) -> None:
  """A disc for each head: area is size, filled is towards the answer."""
  of_heads = results.attribution.of_heads
  num_layers, num_heads = of_heads.shape
  largest = np.abs(of_heads).max()
  x, y = np.meshgrid(np.arange(num_layers), np.arange(num_heads))
  values = of_heads.T
  for is_positive, color, fill in ((True, BLUE, BLUE), (False, ORANGE, 'none')):
    chosen = (values >= 0) == is_positive
    axis.scatter(
      x[chosen],
      y[chosen],
      s=170 * np.abs(values[chosen]) / largest,
      facecolor=fill,
      edgecolor=color,
      linewidth=1.5,
      label='towards the answer' if is_positive else 'against it',
    )
  axis.set_xlim(-1, num_layers)
  axis.set_ylim(num_heads, -1)
  axis.set_xticks(range(0, num_layers, max(1, num_layers // 10)))
  axis.set_yticks(range(0, num_heads, max(1, num_heads // 10)))
  axis.set_xlabel('layer')
  axis.set_ylabel('head')
  axis.set_title(f'by head (largest disc: {largest:.2f} logits)')
  axis.legend(
    loc='upper center',
    bbox_to_anchor=(0.5, -0.12),
    ncols=2,
    markerscale=0.8,
    fontsize=10.5,
  )
