"""How do the feature maps compare, at equal directions and equal features?

Geometric means and medians, since the mean error of a map with negative weights
is infinite: its normaliser may vanish. And is attention through each of them
its dual model, to rounding? That is no approximation: `experiments.equivalence`
asks it at length.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.approximation import estimates, falling
from experiments.approximation.estimates import Data, Measurements
from experiments.lab import Config, figures as drawing
from iclcl_jax import equivalence

PAPER_MAP = estimates.PAPER_MAP
COMPARED = 'attention_mse'
VIEWS = 'directions', 'features'


class Results(NamedTuple):
  first: Measurements  # Every map, at the first number of demonstrations.
  second: Measurements  # The papers' map, at the second.
  comparisons: Sequence[Mapping[str, Any]]  # Of maps with the papers' one.
  residuals: Mapping[str, Sequence[float]]  # By map, for each condition.


def measure(config: Config) -> Results:
  data = estimates.measured(config)
  return Results(
    data.first,
    data.second,
    _comparisons(config.num_features, data.first),
    _identity(config, data),
  )


def _comparisons(sizes: Sequence[int], data: Measurements) -> list[Any]:
  """Each map's error over that of the papers': geometric means over R."""

  def ratio(method, condition, divisor):
    shown = [size // divisor for size in sizes]
    logs = np.log(data.draws(method, condition, COMPARED, shown))
    base = np.log(data.draws(PAPER_MAP, condition, COMPARED, sizes))
    ratios = np.exp(condition.units(logs - base).mean(axis=1))
    return estimates.geometric_mean(ratios)

  return [
    {
      'map': method.name,
      'condition': name,
      f'{COMPARED}_ratio_at_equal_directions': ratio(method, condition, 1),
      f'{COMPARED}_ratio_at_equal_features': ratio(
        method, condition, method.features_per_direction
      ),
    }
    for method in estimates.METHODS
    for name, condition in data.conditions.items()
  ]


def _identity(config: Config, data: Data) -> dict[str, list[float]]:
  """Largest residuals of the first draw, through the same features."""
  cases = data.first.conditions.values()
  rows = [(c.queries[0], c.keys[0], c.values[0]) for c in cases]
  arrays = [np.float64(np.stack(part)) for part in zip(*rows, strict=True)]

  @lab.float64_on_host()
  def of_method(method):
    projection = data.directions[method.projection][config.reference_features]
    phi = method.feature_map(jnp.asarray(np.float64(projection[0])))
    result = _residuals(phi, *map(jnp.asarray, arrays))
    return np.max(result, axis=1).tolist()

  return {method.name: of_method(method) for method in estimates.METHODS}


@jax.jit
def _residuals(phi, queries, keys, values):
  def one(query, keys, values):
    found = equivalence.residuals(phi, query, keys, values, num_query_tokens=1)
    return found.residual

  rows = jax.vmap(one, in_axes=(0, None, None))
  return jax.vmap(rows)(queries, keys, values)


def _norms(condition: estimates.Condition) -> dict[str, Any]:
  """Quantiles of what the variance of positive features grows with."""
  squares = condition.squared_norms()
  names = 'median', 'quantile_90', 'max'
  quantiles = np.quantile(squares, [0.5, 0.9, 1])
  return {'mean': squares.mean(), **dict(zip(names, quantiles, strict=True))}


def summary(config: Config, results: Results) -> dict[str, Any]:
  data, size = results.first, config.reference_features
  methods = estimates.METHODS
  return {
    f'errors_at_{size}_directions': {
      m.name: {
        name: data.get(m, condition, size).means()
        for name, condition in data.conditions.items()
      }
      for m in methods
    },
    'squared_norm_of_sum_over_sqrt_dim': {
      name: _norms(condition) for name, condition in data.conditions.items()
    },
    'slope_of_log_error_per_log_direction': {
      m.name: falling.slopes(data, m) for m in methods
    },
    'map_comparisons': results.comparisons,
    'algebra_residual_float64': max(map(max, results.residuals.values())),
    'algebra_residual_float64_by_map': results.residuals,
  }


def metrics(config: Config, results: Results) -> lab.Metrics:
  for data in (results.first, results.second):
    for (name, condition, size), record in data.records.items():
      row = {
        'map': name,
        'condition': condition,
        'num_tokens': data.num_tokens,
        'num_directions': size,
        'num_features': size * record.method.features_per_direction,
      }
      for quantity, errors in record.errors.items():
        row[quantity] = np.mean(errors)
        row[f'{quantity}_median'] = np.median(errors)
      yield row


def tables(config: Config, results: Results) -> dict[str, Any]:
  rows: dict[str, dict[str, Any]] = {}
  for row in results.comparisons:
    cells = rows.setdefault(row['map'], {'map': row['map']})
    for view in VIEWS:
      ratio = row[f'{COMPARED}_ratio_at_equal_{view}'].value
      cells[f'{row["condition"]}, equal {view}'] = ratio
  return {'maps': list(rows.values())}


def figures(config: Config, results: Results) -> list[lab.Figure]:
  names = list(results.first.conditions)
  size = 2.3 * len(names) + 2.5, 5
  figure, axes = drawing.subplots(
    1, len(names), figsize=size, sharey=True, squeeze=False
  )
  looks: tuple[dict[str, Any], ...] = (
    {'offset': -0.14, 'fmt': 'o', 'color': drawing.BLUE},
    {'offset': 0.14, 'fmt': 's', 'color': drawing.ORANGE, 'mfc': 'white'},
  )
  for axis, name in zip(axes[0], names, strict=True):
    for view, look in zip(VIEWS, looks, strict=True):
      shown = {
        row['map']: row[f'{COMPARED}_ratio_at_equal_{view}']
        for row in results.comparisons
        if row['condition'] == name
      }
      label = f'equal number of {view}'
      drawing.forest(axis, shown, reference=1, label=label, **look)
    axis.set(xscale='log', title=name, xlabel='error ratio')
    axis.grid(alpha=0.25, lw=0.5)
  drawing.legend(axes[0, 0], 2)
  caption = f"""Error ({estimates.words(COMPARED)}) of each feature map over
    that of {PAPER_MAP.name} features, geometric means over R, at equal numbers
    of directions and of features; left of 1 is better.
    {results.first.caption(names)}."""
  return [lab.Figure('maps_compared', figure, caption)]
