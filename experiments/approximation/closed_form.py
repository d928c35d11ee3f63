"""Does the closed form of the variance predict what is measured?

The closed forms are those of `iclcl_jax.budget`, averaged over the very
queries, keys and values that were measured.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.approximation import estimates
from experiments.approximation.estimates import Measurements, Method
from experiments.approximation.inputs import Condition
from experiments.lab import Config, figures as drawing, statistics
from iclcl_jax import budget, features, projections

GRID_SIZE = 200  # Nodes of an interpolation in log v; relative error < 1e-3.
LARGEST_JUDGED_NORM = 2.0  # Mean |q + k|^2 / sqrt(d_k) of visible variances.

# Closed forms by map, condition and quantity. Shapes `[D, R]`.
Predictions = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]


class Results(NamedTuple):
  data: Measurements  # The measurements of the first number of demonstrations.
  predicted: Predictions  # What they should be.
  # Measured over predicted, by map, condition and quantity.
  ratios: Mapping[str, Mapping[str, Mapping[str, lab.Estimate]]]


def measure(config: Config) -> Results:
  """Compares by the geometric mean over R."""
  data, lines = estimates.measured(config).first, predicted(config)

  def ratio(means):
    logs = np.log(means[..., 0]) - np.log(means[..., 1])
    return np.exp(np.mean(logs, axis=1))

  def compare(method, condition, quantity, line):
    measured = data.curve(method, condition, quantity)
    both = np.stack([measured, condition.units(line)], axis=2)
    return statistics.bootstrap(ratio, both)

  ratios = {
    method.name: {
      name: {
        quantity: compare(method, condition, quantity, line)
        for quantity, line in lines[method.name][name].items()
      }
      for name, condition in data.conditions.items()
    }
    for method in estimates.METHODS
  }
  return Results(data, lines, ratios)


@lab.once
def predicted(config: Config) -> Predictions:
  """All closed forms, against the directions that were measured."""
  data = estimates.measured(config).first
  return {
    method.name: {
      name: predictions(method, condition, data.sizes(method))
      for name, condition in data.conditions.items()
    }
    for method in estimates.METHODS
  }


def predictions(
  method: Method, condition: Condition, sizes: Sequence[int]
) -> dict[str, np.ndarray]:
  """The closed forms of every draw against directions. Shapes `[D, R]`."""
  result = {}
  if method.projection is not projections.simplex_plus:  # It has none.
    kernel = [kernel_relative_mse(method, size, condition) for size in sizes]
    result['kernel_relative_mse'] = np.stack(kernel, axis=1)
  if method.projection is projections.gaussian:  # Independent directions.
    for name, mse in first_order_mse(method, condition).items():
      result[name] = mse[:, None] / np.asarray(sizes, float)[None]
  return result


def kernel_relative_mse(
  method: Method, num_directions: int, condition: Condition
) -> np.ndarray:
  """Variance of the kernel estimate over its square, mean over pairs `[D]`."""
  trigonometric = method.feature_map is features.TrigonometricFeatures
  squares = condition.squared_norms(-1 if trigonometric else 1)
  log_squares = np.log(np.maximum(squares, 1e-12))
  grid = np.linspace(log_squares.min(), log_squares.max(), GRID_SIZE)
  log_variance = budget.log_relative_variance_at(
    method.feature_map,
    method.projection,
    np.exp(grid),
    dim=condition.keys.shape[2],
    num_directions=num_directions,
  )
  # Without its leading term v the logarithm is flat, and interpolates well.
  rest = np.interp(log_squares, grid, log_variance - np.exp(grid))
  logs = rest + np.exp(log_squares)
  return np.mean(np.exp(np.minimum(logs, 700)), axis=(1, 2))


def first_order_mse(method: Method, condition: Condition) -> dict[str, Any]:
  """First-order `attention_mse` and `output_mse` of ONE direction, `[D]`."""
  _, weights, outputs = condition.exact()
  identity: Any = np.eye(weights.shape[2])
  predict = functools.partial(
    budget.predicted_output_error, method.feature_map, num_directions=1
  )
  draws = list(zip(*condition[1:4], strict=True))
  # The attention matrix is the output for one-hot values.
  attention = [predict(queries, keys, identity) for queries, keys, _ in draws]
  output = [predict(*draw) for draw in draws]
  return {
    'attention_mse': np.mean(weights**2, axis=(1, 2)) * np.square(attention),
    'output_mse': np.mean(outputs**2, axis=(1, 2)) * np.square(output),
  }


def claims(config: Config, results: Results) -> lab.Claims:
  """Judged where the closed form can be seen.

  At larger norms the variance is carried by draws rarer than one in the number
  of draws: the ratio is reported, and decides nothing.
  """
  for method, by_condition in results.ratios.items():
    for name, quantities in by_condition.items():
      norm = results.data.conditions[name].squared_norms().mean()
      if norm <= LARGEST_JUDGED_NORM:
        yield from estimates.statements(
          name,
          '\n'.join(
            f"""{quantity} [closed-form variance of each map]
            {estimates.words(quantity)} equals its closed form, {method} |
            measured over predicted, geometric mean over R"""
            for quantity in quantities
          ),
          {k: lab.within(0.85, 1.15, x) for k, x in quantities.items()},
        )


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {'measured_over_closed_form': results.ratios}


def figures(config: Config, results: Results) -> list[lab.Figure]:
  data, names = results.data, list(results.data.conditions)[:-1][:3]
  size = 5 * len(names), 9
  figure, axes = drawing.subplots(2, len(names), figsize=size, squeeze=False)
  for row, count in zip(axes, (1, 2), strict=True):
    group = [m for m in estimates.METHODS if m.features_per_direction == count]
    for axis, name in zip(row, names, strict=True):
      condition, labels = data.conditions[name], []
      for i, method in enumerate(group):
        sizes = np.asarray(data.sizes(method))
        errors = data.curve(method, condition, 'kernel_relative_mse')
        found = [estimates.mean(x) for x in (errors * sizes[None]).T]
        estimates.error_bars(axis, sizes, found, i, linestyle='', mfc='white')
        end = found[-1].value
        line = results.predicted[method.name][name].get('kernel_relative_mse')
        if line is not None:
          curve = line.mean(axis=0) * sizes
          axis.plot(sizes, curve, '-', color=drawing.COLOURS[i], lw=1.4)
          end = curve[-1]
        labels.append((end, method.name.replace(' ', '\n'), drawing.COLOURS[i]))
      drawing.log_axes(axis, data.sizes(group[0]), rotation=60)
      low, high = axis.get_ylim()
      axis.set_ylim(low / 1.15, high * 1.15)
      drawing.label_ends(axis, labels, gap=0.12)
      mean = condition.squared_norms().mean()
      axis.set_title(f'{name}: mean |q+k|²/√d = {mean:.2g}')
      axis.set_xlabel('number of directions R')
    row[0].set_ylabel('R × relative variance of a kernel value')
  caption = f"""Relative variance of a kernel value, times R: measured (points)
    and its closed form (lines; simplex+ has none), for each feature map. Where
    points lie far below their line, draws rarer than these carry the mean.
    {data.caption(names)}."""
  return [lab.Figure('kernel_variance', figure, caption)]
