"""What `experiments.approximation` writes and prints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import harness
from experiments.approximation_measure import METHODS
from experiments.approximation_summary import Measurements

UNITS = {
  'attention_mse': 'squared attention weights',
  'attention_mae': 'attention weights',
  'attention_frobenius': 'attention weights',
  'attention_relative': 'fraction of the Frobenius norm',
  'output_mse': 'squared value units',
  'output_mae': 'value units',
  'output_frobenius': 'value units',
  'output_relative': 'fraction of the Frobenius norm',
  'kernel_relative_mse': 'squared kernel values',
  'pearson': 'correlation of the entries',
  'largest_tenth_relative': 'mean of |error| / |entry|, largest tenth',
  'rest_relative': 'the same, other entries',
  'negative_weights_fraction': 'fraction of the entries',
  'algebra_residual_float64': 'rounding over the sum of absolute terms',
  'approximation_error': 'relative output error at reference_features',
}


def metrics(sets: Sequence[Measurements]) -> list[dict[str, Any]]:
  """One row for each map, number of directions, condition and quantity."""
  rows = []
  for data in sets:
    for record in data.records:
      row = {
        'map': record.method.name,
        'condition': record.condition.name,
        'num_tokens': record.condition.keys.shape[1],
        'num_directions': record.num_directions,
        'num_features': record.num_features,
      }
      for name, errors in record.errors.items():
        row[name] = float(np.mean(errors))
        row[f'{name}_median'] = float(np.median(errors))
      rows.append(row)
  return rows


def save_figures(
  path: harness.Workdir,
  config: Any,
  data: Measurements,
  second: Measurements,
  losses: Mapping[str, np.ndarray],
  summary: Mapping[str, Any],
) -> None:
  """Writes all figures."""
  import matplotlib

  from experiments import approximation_figures

  with matplotlib.rc_context(approximation_figures.STYLE):
    for name, figure in _figures(config, data, second, losses, summary):
      harness.save_figure(path, name, figure)


def _figures(config, data, second, losses, summary) -> Iterator[Any]:
  from experiments import approximation_comparisons as comparisons
  from experiments import approximation_figures as figures
  from experiments import approximation_heatmaps as heatmaps

  paper, names = METHODS[0], list(data.conditions)
  small = names[:-1][:3]
  shown = [*(small[1:] or small), names[-1]]
  slopes = summary['slope_of_log_error_per_log_direction'][paper.name]
  yield (
    'errors',
    figures.errors_against_features(data, paper, config.num_features),
  )
  yield 'slopes', figures.slopes(slopes, data)
  yield 'kernel_variance', figures.kernel_variance(data, METHODS, small)
  yield (
    'all_maps',
    comparisons.all_maps(
      data, METHODS, [*small, names[-1]], config.num_features
    ),
  )
  yield (
    'maps_compared',
    comparisons.maps_compared(
      data, summary['map_comparisons'], 'attention_mse'
    ),
  )
  yield (
    'trained_layer',
    comparisons.trained_layer(list(data.conditions.values()), losses),
  )
  for part in (data, second):
    tokens = part.conditions[names[0]].keys.shape[1]
    for kind in ('attention', 'output'):
      yield (
        f'heatmaps_{kind}_{tokens}_tokens',
        heatmaps.heatmaps(part, paper, shown, config.heatmap_features, kind),
      )
    yield (
      f'entries_{tokens}_tokens',
      heatmaps.entries(part, paper, shown, config.reference_features),
    )


def captions(config: Any, summary: Mapping[str, Any]) -> list[dict[str, str]]:
  """What each figure shows, in full sentences."""
  size = config.reference_features
  draws = f'{summary["num_draws"]} draws'
  texts = {
    'errors': 'Mean squared and mean absolute error of the attention matrix '
    f'and of the output against the number of features R ({draws}, 95 % '
    'intervals), at controlled norms of queries and keys and at trained '
    'weights. Dashed: the first-order closed form.',
    'slopes': 'Fitted slope of log error against log R: -1 is what averaging '
    'independent draws gives; it is reached at small norms only.',
    'kernel_variance': 'Relative variance of a kernel value, times R: measured '
    '(points) and its closed form (lines), for each feature map. At larger '
    'norms the variance is carried by draws rarer than these.',
    'all_maps': 'Median relative error of the output against R for all feature '
    'maps, at equal numbers of directions and of features.',
    'maps_compared': 'Error of each feature map over that of positive gaussian '
    'features, at equal numbers of directions and of features; below 1 is '
    'better.',
    'trained_layer': 'Norms at which the trained layers work, and their '
    'held-out loss with the directions of training, with fresh ones, and with '
    'exact softmax: the trained layer is no approximation of softmax '
    'attention.',
  }
  for tokens in summary['num_tokens']:
    for kind in ('attention', 'output'):
      texts[f'heatmaps_{kind}_{tokens}_tokens'] = (
        f'Exact {kind} matrix of {tokens} tokens, and its estimates at growing '
        'R, for one draw; the errors beside them are means over all draws.'
      )
    texts[f'entries_{tokens}_tokens'] = (
      f'Estimated against exact entries at R = {size}, {tokens} tokens.'
    )
  return [
    {'file': f'figures/{name}.png', 'caption': text}
    for name, text in texts.items()
  ]


def conclusion(config: Any, summary: Mapping[str, Any]) -> str:
  """One paragraph, from the numbers."""
  slopes = summary['slope_of_log_error_per_log_direction'][METHODS[0].name]
  errors = summary['approximation_error']
  rows = '; '.join(
    f'{name}: slope {slopes[name]["attention_mse"][0]:.2f}, output error '
    f'{errors[name][0]:.0%}'
    for name in errors
  )
  low = [name for name, error in errors.items() if error[2] <= 0.1]
  where = f'at {", ".join(low)} only' if low else 'nowhere here'
  return (
    'How far random features are from softmax depends on the norms of queries '
    f'and keys (slope of log MSE against log R, and output error at R = '
    f'{config.reference_features}): {rows}. The error is below 10 % {where}. '
    'The identity between attention and dual model holds in all of them, with '
    f'a residual of {summary["algebra_residual_float64"]:.0e}: approximation '
    'and identity are different questions.'
  )


def tables(config: Any, summary: Mapping[str, Any]) -> str:
  """Formats what a person reads first."""
  size = config.reference_features
  paper = METHODS[0].name
  parts = [
    f'{paper} features against exact softmax ({summary["num_draws"]} draws): '
    f'slopes of log error against log R, errors at R = {size}, and the '
    'residual of attention against its dual model',
    harness.table(list(_paper_rows(summary, paper, size))),
    'attention MSE over that of positive gaussian features: at equal '
    'directions / at equal features (< 1: better)',
    harness.table(list(_map_rows(summary))),
    'measured over closed form: variance of a kernel value (far below 1: draws '
    'rarer than these carry the variance)',
    harness.table(list(_closed_rows(summary))),
    'held-out loss of the trained layers over the loss of predicting zero',
    harness.table(
      [
        {'kernel': name.replace('_', ' '), 'loss ratio': _text(estimate)}
        for name, estimate in summary['trained_layer'][
          'held_out_loss_ratio'
        ].items()
      ]
    ),
    'claims: value, and + reproduced, - not reproduced, ? undecided',
    harness.table(list(_claim_rows(summary['claims']))),
    f'algebra residual (float64) {summary["algebra_residual_float64"]:.1e}: '
    'rounding; the errors above are the approximation.',
  ]
  return '\n\n'.join(parts)


def _text(estimate: Sequence[float]) -> str:
  value, low, high = estimate
  return f'{value:.3g} [{low:.3g}, {high:.3g}]'


def _paper_rows(summary, paper, size) -> Iterator[dict[str, Any]]:
  slopes = summary['slope_of_log_error_per_log_direction'][paper]
  errors = summary[f'errors_at_{size}_directions'][paper]
  residuals = summary['algebra_residual_float64_by_map'][paper]
  for i, (name, slope) in enumerate(slopes.items()):
    yield {
      'inputs': name,
      'mean |q+k|2/sqrt(d)': summary['squared_norm_of_sum_over_sqrt_dim'][name][
        'mean'
      ],
      'slope attention MSE': _text(slope['attention_mse']),
      'MAE': _text(slope['attention_mae']),
      'slope output MSE': _text(slope['output_mse']),
      'MAE ': _text(slope['output_mae']),
      'attention error': f'{errors[name]["attention_relative"].value:.1%}',
      'Pearson': errors[name]['attention_pearson'].value,
      'output error': f'{errors[name]["output_relative"].value:.1%}',
      'dual residual': f'{residuals[i]:.0e}',
    }


def _map_rows(summary) -> Iterator[dict[str, Any]]:
  for method in METHODS[1:]:
    row = {'map': method.name}
    for entry in summary['map_comparisons']:
      if entry['map'] == method.name:
        a = entry['attention_mse_ratio_at_equal_directions'].value
        b = entry['attention_mse_ratio_at_equal_features'].value
        row[entry['condition']] = f'{a:.2g} / {b:.2g}'
    yield row


def _closed_rows(summary) -> Iterator[dict[str, Any]]:
  for name, ratios in summary['measured_over_closed_form'].items():
    row = {'map': name}
    for condition, quantities in ratios.items():
      if 'kernel_relative_mse' in quantities:
        row[condition] = f'{quantities["kernel_relative_mse"].value:.2g}'
    if len(row) > 1:
      yield row


def _claim_rows(claims) -> Iterator[dict[str, Any]]:
  marks = {'reproduced': '+', 'not reproduced': '-', 'undecided': '?'}
  texts: dict[str, dict[str, str]] = {}
  columns = list(dict.fromkeys(claim['condition'] for claim in claims))
  for claim in claims:
    text = claim['claim'].removesuffix(f': {claim["condition"]}')
    cells = texts.setdefault(text, dict.fromkeys(columns, ''))
    cells[claim['condition']] = (
      f'{claim["value"]:.2g} {marks[claim["verdict"]]}'
    )
  for text, cells in texts.items():
    yield {'claim': text} | cells
