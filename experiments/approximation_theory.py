"""What the library predicts for `experiments.approximation`, and its algebra.

The closed forms are those of `iclcl_jax.budget`, averaged over the very
queries, keys and values that were measured.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.approximation_measure import Condition, Method
from iclcl_jax import budget, equivalence, features, projections
from iclcl_jax.types import Array, Float

GRID_SIZE = 200  # Nodes of an interpolation in log v; relative error < 1e-3.


def kernel_relative_mse(
  method: Method, num_directions: int, condition: Condition
) -> np.ndarray | None:
  """Variance of the kernel estimate over the squared kernel, mean over pairs.

  Args:
    method: the map.
    num_directions: rows of its projection.
    condition: the inputs.

  Returns:
    One number for each draw `[D]`; None for simplex+, which has no closed form.
  """
  if method.projection is projections.simplex_plus:
    return None
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


def first_order_mse(
  method: Method, condition: Condition
) -> dict[str, np.ndarray] | None:
  """First-order mean squared errors of one direction, for every draw.

  Args:
    method: the map.
    condition: the inputs.

  Returns:
    `attention_mse` and `output_mse`, to be divided by the number of
    directions. Shapes `[D]`. None unless directions are independent.
  """
  if method.projection is not projections.gaussian:
    return None
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


def predictions(
  method: Method, condition: Condition, sizes: Sequence[int]
) -> dict[str, np.ndarray]:
  """All closed forms of every draw against directions. Shapes `[D, R]`."""
  result = {}
  kernel = [kernel_relative_mse(method, size, condition) for size in sizes]
  if all(variance is not None for variance in kernel):
    result['kernel_relative_mse'] = np.stack(kernel, axis=1)  # type: ignore
  for name, mse in (first_order_mse(method, condition) or {}).items():
    result[name] = mse[:, None] / np.asarray(sizes, float)[None]
  return result


def algebra_residual(
  method: Method,
  directions: Float[Array, 'R d'],
  conditions: Sequence[Condition],
) -> list[float]:
  """Attention against its dual model, through the same features, in float64.

  Args:
    method: the map.
    directions: one projection. Shape `[R, d]`.
    conditions: the inputs, of which the first draw is taken.

  Returns:
    For each condition the largest residual over its queries.
  """
  rows = [(c.queries[0], c.keys[0], c.values[0]) for c in conditions]
  arrays = [
    np.stack(part).astype(np.float64) for part in zip(*rows, strict=True)
  ]
  with harness.float64_on_host():
    phi = method.feature_map(jnp.asarray(np.float64(directions)))
    result = _residuals(phi, *map(jnp.asarray, arrays))
    return np.max(result, axis=1).tolist()


@jax.jit
def _residuals(phi, queries, keys, values):
  def one(query, keys, values):
    return equivalence.residuals(
      phi, query, keys, values, num_query_tokens=1
    ).residual

  rows = jax.vmap(one, in_axes=(0, None, None))
  return jax.vmap(rows)(queries, keys, values)
