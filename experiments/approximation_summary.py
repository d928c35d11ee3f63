"""Slopes, closed forms and comparisons of `experiments.approximation`."""

from collections.abc import Sequence
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


def words(quantity: str) -> str:
  name, *kind = quantity.split('_')
  return f'{name} {" ".join(kind)}'.replace('mse', 'MSE').replace('mae', 'MAE')
