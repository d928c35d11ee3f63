"""Do errors fall with the number of features R, how fast, and how low?

For the papers' map: positive features with gaussian directions.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.approximation import closed_form, estimates
from experiments.approximation.estimates import Measurements, Method
from experiments.lab import Config, figures as drawing, pretraining, statistics

PAPER_MAP = estimates.PAPER_MAP
LOW_LEVEL = 0.1  # Relative error that counts as low.
PARTS = 'attention', 'output'
SOURCE = 'v1 Fig. 3 centre and right; v2 appendix'
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


class Results(NamedTuple):
  data: Measurements  # The measurements of the first number of demonstrations.
  predicted: Mapping[str, Mapping[str, np.ndarray]]  # Closed forms, `[D, R]`.
  slopes: Mapping[str, Mapping[str, lab.Estimate]]  # Of log error on log R.
  errors: Mapping[str, lab.Estimate]  # Of outputs, relative, at one R.


def measure(config: Config) -> Results:
  data, size = estimates.measured(config).first, config.reference_features
  errors = {
    name: data.get(PAPER_MAP, condition, size).means()['output_relative']
    for name, condition in data.conditions.items()
  }
  predicted = closed_form.predicted(config)[PAPER_MAP.name]
  return Results(data, predicted, slopes(data, PAPER_MAP), errors)


def slopes(data: Measurements, method: Method) -> dict[str, dict[str, Any]]:
  """Fits log mean error against log R, for each condition and quantity."""
  fit = statistics.log_slope(data.sizes(method))
  return {
    name: {
      error: statistics.bootstrap(fit, data.curve(method, condition, error))
      for part in PARTS
      for error in (f'{part}_mse', f'{part}_mae', f'{part}_relative')
    }
    for name, condition in data.conditions.items()
  }


def claims(config: Config, results: Results) -> lab.Claims:
  sizes = config.num_features
  ranks = 'Spearman correlation of mean error and R'
  conditions = results.data.conditions.items()
  for (name, condition), part in itertools.product(conditions, PARTS):
    mse, mae, relative = (
      results.data.curve(PAPER_MAP, condition, f'{part}_{kind}', sizes)
      for kind in ('mse', 'mae', 'relative')
    )
    slope = statistics.bootstrap(statistics.log_slope(sizes), mse)
    yield from estimates.statements(
      name,
      f"""
      mse [{SOURCE}] {part} MSE falls with the number of features | {ranks}
      mae [{SOURCE}] {part} MAE falls with the number of features | {ranks}
      slope [{SOURCE}] {part} MSE falls like 1/R | slope of log mean error
        against log R
      level [{SOURCE}] {part} error falls to a low level | relative Frobenius
        error at {sizes[-1]} features
      """,
      {
        'mse': lab.at_most(-0.9, _ranks(mse, sizes)),
        'mae': lab.at_most(-0.9, _ranks(mae, sizes)),
        'slope': lab.within(-1.15, -0.85, slope),
        'level': lab.at_most(LOW_LEVEL, estimates.mean(relative[:, -1])),
      },
    )


def _ranks(errors: np.ndarray, sizes: Sequence[int]) -> lab.Estimate:
  return statistics.bootstrap(
    lambda means: statistics.rank_correlation(means, sizes), errors
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'num_draws': config.num_draws,
    'num_trained_layers': config.num_seeds,
    'num_features': config.num_features,
    'num_tokens': [
      1 + size
      for size in (config.num_demonstrations, config.second_num_demonstrations)
    ],
    'token_size': pretraining.TOKEN_DIM,
    'interval': '95 % bootstrap percentile interval over draws; at trained '
    'weights over layers',
    'units': UNITS,
    'approximation_error': results.errors,
  }


def tables(config: Config, results: Results) -> dict[str, Any]:
  rows = [
    {
      'inputs': name,
      'mean |q+k|2/sqrt(d)': condition.squared_norms().mean(),
      'output error': results.errors[name].value,
    }
    | {
      f'slope of {estimates.words(k)}': x.value
      for k, x in results.slopes[name].items()
    }
    for name, condition in results.data.conditions.items()
  ]
  return {'papers_map': rows}


def figures(config: Config, results: Results) -> list[lab.Figure]:
  data = results.data
  caption = f"""Mean squared, mean absolute and relative error of attention
    matrix and output against the number of features R, at controlled norms and
    at trained weights, by {PAPER_MAP.name} features; beside each curve the
    slope of log error against log R. Independent draws would give -1 (squared)
    and -1/2 (absolute), which small norms alone reach. Dashed: first-order
    closed form, unless it lies above the axes.
    {data.caption(data.conditions)}."""
  return [lab.Figure('errors', _draw_errors(config, results), caption)]


def _draw_errors(config: Config, results: Results) -> Any:
  figure, axes = drawing.subplots(2, 3, figsize=(14, 9), sharex=True)
  kinds = {
    'mse': ('mean squared error', ' [value units²]'),
    'mae': ('mean absolute error', ' [value units]'),
    'relative': ('relative Frobenius error', ''),
  }
  data, sizes = results.data, config.num_features
  for row, part in zip(axes, PARTS, strict=True):
    for axis, (kind, (words, unit)) in zip(row, kinds.items(), strict=True):
      quantity, labels = f'{part}_{kind}', []
      for i, (name, condition) in enumerate(data.conditions.items()):
        errors = data.curve(PAPER_MAP, condition, quantity, sizes)
        found = [estimates.mean(column) for column in errors.T]
        estimates.error_bars(axis, sizes, found, i, lw=1.2, linestyle='-')
        said = f'{name}: {results.slopes[name][quantity].value:.2f}'
        labels.append((found[-1].value, said, drawing.COLOURS[i]))
      drawing.log_axes(axis, sizes, rotation=60)
      limits = axis.get_ylim()
      for i, predicted in enumerate(results.predicted.values()):
        if quantity in predicted:
          line = predicted[quantity].mean(axis=0)
          look = {'color': drawing.COLOURS[i], 'lw': 1.6, 'zorder': 1}
          axis.plot(data.sizes(PAPER_MAP), line, '--', **look)
      axis.set_ylim(limits)
      drawing.label_ends(axis, labels)
      what = 'attention matrix' if part == 'attention' else 'output'
      axis.set_title(f'{what}: {words}')
      axis.set_ylabel(words + (unit if part == 'output' else ''))
  for axis in axes[1]:
    axis.set_xlabel('number of random features R')
  return figure
