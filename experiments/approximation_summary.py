"""Slopes, verdicts and comparisons of `experiments.approximation`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import approximation_statistics as statistics
from experiments import approximation_theory as theory
from experiments.approximation_inputs import TrainedLayers
from experiments.approximation_measure import Condition, Method, Record
from experiments.approximation_statistics import Estimate

SLOPED = (
  'attention_mse',
  'attention_mae',
  'attention_relative',
  'output_mse',
  'output_mae',
  'output_relative',
)
LOW_LEVEL = 0.1  # Relative error that counts as low.
LARGEST_JUDGED_NORM = 2.0  # Mean |q + k|^2 / sqrt(d_k) of visible variances.


class Measurements:
  """Records, looked up by map, condition and number of directions."""

  def __init__(self, records: Sequence[Record]):
    self.records = list(records)
    self.conditions = {r.condition.name: r.condition for r in records}
    self.methods = {r.method.name: r.method for r in records}
    self._predicted: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    self._index = {
      (r.method.name, r.condition.name, r.num_directions): r for r in records
    }

  def get(self, method: Method, condition: Condition, size: int) -> Record:
    """Returns the record of `size` directions."""
    return self._index[method.name, condition.name, size]

  def sizes(self, method: Method, condition: Condition) -> list[int]:
    """Returns all numbers of directions that were measured."""
    keys = (method.name, condition.name)
    return sorted(size for *rest, size in self._index if tuple(rest) == keys)

  def predicted(
    self, method: Method, condition: Condition
  ) -> dict[str, np.ndarray]:
    """Closed forms of every draw against all directions. Shapes `[D, R]`."""
    key = (method.name, condition.name)
    if key not in self._predicted:
      sizes = self.sizes(method, condition)
      self._predicted[key] = theory.predictions(method, condition, sizes)
    return self._predicted[key]

  def curve(
    self, method: Method, condition: Condition, quantity: str, sizes=None
  ) -> np.ndarray:
    """Errors of independent units against directions. Shape `[U, R]`."""
    sizes = self.sizes(method, condition) if sizes is None else sizes
    records = [self.get(method, condition, size) for size in sizes]
    errors = np.stack([r.errors[quantity] for r in records], axis=1)
    return condition.units(errors)


def slopes(
  data: Measurements, method: Method
) -> dict[str, dict[str, Estimate]]:
  """Fits log mean error against log R, for each condition and quantity."""
  result: dict[str, dict[str, Estimate]] = {}
  for name, condition in data.conditions.items():
    fit = statistics.slope(data.sizes(method, condition))
    result[name] = {
      quantity: statistics.bootstrap(
        fit, data.curve(method, condition, quantity)
      )
      for quantity in SLOPED
    }
  return result


def closed_form_ratios(
  data: Measurements, method: Method
) -> dict[str, dict[str, Estimate]]:
  """Measured over predicted mean squared errors, geometric mean over R."""
  result: dict[str, dict[str, Estimate]] = {}
  for name, condition in data.conditions.items():
    result[name] = {}
    for quantity, predicted in data.predicted(method, condition).items():
      measured = data.curve(method, condition, quantity)
      both = np.stack([measured, condition.units(predicted)], axis=2)
      result[name][quantity] = statistics.bootstrap(_ratio, both)
  return result


def _ratio(means: np.ndarray) -> np.ndarray:
  logs = np.log(means[..., 0]) - np.log(means[..., 1])
  return np.exp(np.mean(logs, axis=1))


def comparisons(
  data: Measurements,
  base: Method,
  num_features: Sequence[int],
  quantity: str = 'attention_mse',
) -> list[dict[str, Any]]:
  """Each map's error over that of `base`: geometric means over draws and R.

  Geometric means, since the mean error of a map with negative weights is
  infinite: its normaliser may vanish.
  """
  rows = []
  for method in data.methods.values():
    for name, condition in data.conditions.items():
      row: dict[str, Any] = {'map': method.name, 'condition': name}
      for view, divisor in (
        ('equal_directions', 1),
        ('equal_features', method.features_per_direction),
      ):
        logs = log_ratios(
          data, base, method, condition, num_features, divisor, quantity
        )
        ratios = np.exp(logs.mean(axis=1))
        row[f'{quantity}_ratio_at_{view}'] = statistics.geometric_mean(ratios)
      rows.append(row)
  return rows


def log_ratios(
  data, base, method, condition, num_features, divisor, quantity
) -> np.ndarray:
  """Log ratio of errors of paired units against `num_features`. `[U, R]`."""
  sizes = [size // divisor for size in num_features]
  a = _logs(data, method, condition, sizes, quantity)
  b = _logs(data, base, condition, num_features, quantity)
  return condition.units(a - b)


def _logs(data, method, condition, sizes, quantity):
  records = [data.get(method, condition, size) for size in sizes]
  return np.log(np.stack([r.errors[quantity] for r in records], axis=1))


def falling_claims(
  data: Measurements, method: Method, num_features: Sequence[int]
) -> list[dict[str, Any]]:
  """Do the errors fall with R, how fast, and how low?"""
  claims = []
  for condition in data.conditions.values():
    for quantity in (
      'attention_mse',
      'attention_mae',
      'output_mse',
      'output_mae',
    ):
      errors = data.curve(method, condition, quantity, num_features)
      rank = statistics.bootstrap(statistics.spearman, errors)
      claims.append(
        _claim(
          f'{words(quantity)} falls with the number of features',
          'Spearman correlation of mean error and R; at most -0.9',
          condition,
          rank,
          at_most=-0.9,
        )
      )
      if quantity.endswith('mse'):
        fit = statistics.bootstrap(statistics.slope(num_features), errors)
        claims.append(
          _claim(
            f'{words(quantity)} falls like 1/R',
            'slope of log mean error against log R; in [-1.15, -0.85]',
            condition,
            fit,
            at_least=-1.15,
            at_most=-0.85,
          )
        )
    for name in ('attention', 'output'):
      errors = data.curve(method, condition, f'{name}_relative', num_features)
      claims.append(
        _claim(
          f'{name} error falls to a low level',
          f'relative Frobenius error at {num_features[-1]} features; at most '
          f'{LOW_LEVEL:g}',
          condition,
          statistics.mean(errors[:, -1]),
          at_most=LOW_LEVEL,
        )
      )
  return claims


def heatmap_claims(
  data: Measurements, method: Method, size: int, num_features: Sequence[int]
) -> list[dict[str, Any]]:
  """Do estimated matrices look like the exact ones, better with more R?"""
  claims = []
  for condition in data.conditions.values():
    tokens = condition.keys.shape[1]
    one = functools.partial(_one, data, method, condition, size)

    for name in ('attention', 'output'):
      claims.append(
        _claim(
          f'{name} entries fit, {tokens} tokens',
          f'Pearson correlation of exact and estimated entries at R = {size}; '
          'at least 0.9',
          condition,
          statistics.mean(one(f'{name}_pearson')),
          at_least=0.9,
        )
      )
      for kind, word in (('relative', 'relative'), ('mae', 'absolute')):
        if (name, kind) == ('output', 'relative'):
          continue  # Outputs pass through zero.
        excess = one(f'{name}_largest_tenth_{kind}') - one(
          f'{name}_rest_{kind}'
        )
        claims.append(
          _claim(
            f'large {name} entries fit less well ({word}), {tokens} tokens',
            f'mean {word} error of the largest tenth minus that of the rest '
            f'at R = {size}; above 0',
            condition,
            statistics.mean(excess),
            at_least=0,
          )
        )
      errors = data.curve(method, condition, f'{name}_frobenius', num_features)
      claims.append(
        _claim(
          f'{name} heatmap gets better with R, {tokens} tokens',
          'largest ratio of successive mean Frobenius errors, R = '
          f'{", ".join(map(str, num_features))}; below 1',
          condition,
          statistics.bootstrap(_largest_ratio, errors),
          at_most=1,
        )
      )
  return claims


def closed_form_claims(
  ratios: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
  data: Measurements,
) -> list[dict[str, Any]]:
  """Does the closed form predict what is measured, where that can be seen?

  At larger norms the variance is carried by draws rarer than one in the number
  of draws: the ratio is reported, and decides nothing.
  """
  claims = []
  for method, by_condition in ratios.items():
    for name, quantities in by_condition.items():
      condition = data.conditions[name]
      if condition.squared_norms().mean() > LARGEST_JUDGED_NORM:
        continue
      claims += [
        _claim(
          f'{words(quantity)} equals its closed form, {method}',
          'measured over predicted, geometric mean over R; in [0.85, 1.15]',
          condition,
          estimate,
          at_least=0.85,
          at_most=1.15,
        )
        for quantity, estimate in quantities.items()
      ]
  return claims


def trained_claims(losses: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
  """Is the trained layer softmax attention in disguise?"""
  return [
    statistics.claim(
      f'trained layer works as well with {name.replace("_", " ")}: trained',
      'held-out loss over that with the trained directions, geometric mean '
      'over layers; at most 1.1',
      statistics.geometric_mean(losses[name] / losses['trained_directions']),
      at_most=1.1,
    )
    | {'condition': 'trained'}
    for name in ('fresh_directions', 'exact_softmax')
  ]


def trained_layer(
  layers: TrainedLayers, own_errors, size: int
) -> dict[str, Any]:
  """Losses of the trained layers, and errors with their own directions."""
  return {
    'held_out_loss_ratio': {
      name: statistics.geometric_mean(losses)
      for name, losses in layers.losses.items()
    },
    f'errors_with_trained_directions_at_{size}': {
      name: statistics.mean(layers.condition.units(errors))
      for name, errors in own_errors.items()
    },
  }


def errors_at(
  data: Measurements, method: Method, size: int
) -> dict[str, dict[str, Estimate]]:
  """Mean errors at one number of directions, by condition."""
  return {
    name: {
      quantity: statistics.mean(condition.units(errors))
      for quantity, errors in data.get(method, condition, size).errors.items()
    }
    for name, condition in data.conditions.items()
  }


def norms(data: Measurements) -> dict[str, dict[str, float]]:
  """Quantiles of what the variance of positive features grows with."""
  result = {}
  for name, condition in data.conditions.items():
    squares = condition.squared_norms()
    result[name] = {
      'mean': float(squares.mean()),
      'median': float(np.median(squares)),
      'quantile_90': float(np.quantile(squares, 0.9)),
      'max': float(squares.max()),
    }
  return result


def _one(data, method, condition, size, quantity) -> np.ndarray:
  return data.curve(method, condition, quantity, [size])[:, 0]


def _claim(text, statistic, condition, estimate, **limits):
  result = statistics.claim(
    f'{text}: {condition.name}', statistic, estimate, **limits
  )
  return result | {'condition': condition.name}


def _largest_ratio(errors: np.ndarray) -> np.ndarray:
  return np.max(errors[:, 1:] / errors[:, :-1], axis=1)


def words(quantity: str) -> str:
  name, *kind = quantity.split('_')
  return f'{name} {" ".join(kind)}'.replace('mse', 'MSE').replace('mae', 'MAE')
