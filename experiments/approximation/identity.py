"""Is attention with the same features its dual model, to rounding?

Not an approximation: `experiments.equivalence` asks this at length.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.approximation import estimates
from iclcl_jax import equivalence

if TYPE_CHECKING:
  from experiments.approximation import Config

# By map, the largest residual over all queries, for each condition.
Results = Mapping[str, list[float]]


def measure(config: 'Config') -> Results:
  """Compares both through the features of the first draw, in float64."""
  data = estimates.measured(config)
  rows = [
    (c.queries[0], c.keys[0], c.values[0])
    for c in data.first.conditions.values()
  ]
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
    return equivalence.residuals(
      phi, query, keys, values, num_query_tokens=1
    ).residual

  rows = jax.vmap(one, in_axes=(0, None, None))
  return jax.vmap(rows)(queries, keys, values)


def summary(config: 'Config', results: Results) -> dict[str, Any]:
  del config
  return {
    'algebra_residual_float64': max(map(max, results.values())),
    'algebra_residual_float64_by_map': results,
  }


PART = lab.Part(measure, summary=summary)
