"""Random-feature attention against softmax attention, over many draws."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import approximation_statistics as statistics
from iclcl_jax import attention, features, projections
from iclcl_jax.types import Array, Float, PRNGKeyArray

# By projection, then by number of directions: arrays `[D, R, d]`.
Directions: TypeAlias = dict[Callable[..., Any], dict[int, Array]]

BATCH_SIZE = 10  # Draws that `vmap` takes at a time: bounds the memory.


class Method(NamedTuple):
  """A random feature map: class, directions, features for each direction."""

  name: str
  feature_map: type
  projection: Callable[..., Any]
  features_per_direction: int

  def directions(self, num_features: Sequence[int]) -> list[int]:
    """Directions that give as many features, and as many directions."""
    halves = {size // self.features_per_direction for size in num_features}
    return sorted(halves | set(num_features))


POSITIVE = (features.PositiveFeatures, 1)
HYPERBOLIC = (features.HyperbolicFeatures, 2)
TRIGONOMETRIC = (features.TrigonometricFeatures, 2)

# The first is the map of the papers.
METHODS = tuple(
  Method(name, feature_map, projection, count)
  for name, projection, (feature_map, count) in (
    ('positive gaussian', projections.gaussian, POSITIVE),
    ('positive orthogonal', projections.orthogonal, POSITIVE),
    ('positive simplex', projections.simplex, POSITIVE),
    ('positive simplex+', projections.simplex_plus, POSITIVE),
    ('hyperbolic gaussian', projections.gaussian, HYPERBOLIC),
    ('hyperbolic orthogonal', projections.orthogonal, HYPERBOLIC),
    ('trigonometric gaussian', projections.gaussian, TRIGONOMETRIC),
    ('trigonometric orthogonal', projections.orthogonal, TRIGONOMETRIC),
  )
)


def _float64(array: Any) -> np.ndarray:
  return np.asarray(array, np.float64)


class Condition(NamedTuple):
  """Queries, keys and values of every draw.

  Attributes:
    name: such as 'sd 0.5', or 'trained'.
    queries: shape `[D, n, d_k]`.
    keys: shape `[D, n, d_k]`.
    values: shape `[D, n, d_v]`.
    num_units: independent units among the draws, in order: consecutive draws
      of one unit share the trained layer, for instance.
  """

  name: str
  queries: np.ndarray
  keys: np.ndarray
  values: np.ndarray
  num_units: int

  def units(self, errors: np.ndarray) -> np.ndarray:
    """Means over the draws `[D, ...]` of each independent unit."""
    shape = (self.num_units, -1, *errors.shape[1:])
    return errors.reshape(shape).mean(axis=1)

  def exact(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns exact log-kernel, attention matrices and outputs, in float64."""
    queries, keys, values = map(_float64, self[1:4])
    logits = queries @ keys.swapaxes(1, 2) / keys.shape[2] ** 0.5
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights = weights / weights.sum(axis=2, keepdims=True)
    return logits, weights, weights @ values

  def squared_norms(self, sign: int = 1) -> np.ndarray:
    """`|q + sign k|^2 / sqrt(d_k)` of every pair. Shape `[D, n, n]`."""
    queries, keys = _float64(self.queries), _float64(self.keys)
    norms = np.sum(queries**2, 2)[:, :, None] + np.sum(keys**2, 2)[:, None]
    products = queries @ keys.swapaxes(1, 2)
    return np.maximum(norms + 2 * sign * products, 0) / keys.shape[2] ** 0.5


class Record(NamedTuple):
  """One map with one number of directions, in one condition.

  Attributes:
    method: the map.
    num_directions: rows of its projection.
    condition: the inputs.
    errors: each quantity, for every draw. Shapes `[D]`.
    weights: estimated attention matrices. Shape `[D, n, n]`.
  """

  method: Method
  num_directions: int
  condition: Condition
  errors: dict[str, np.ndarray]
  weights: np.ndarray

  @property
  def num_features(self) -> int:
    return self.num_directions * self.method.features_per_direction


@functools.partial(jax.jit, static_argnums=0)
def estimate(
  feature_map: type,
  directions: Float[Array, 'D R d_k'],
  queries: Float[Array, 'D C n d_k'],
  keys: Float[Array, 'D C n d_k'],
) -> tuple[Float[Array, 'D C n n'], Float[Array, 'D C n']]:
  """Estimates the kernel of all draws and conditions, in one program.

  Args:
    feature_map: class of the map.
    directions: a projection for every draw. Shape `[D, R, d_k]`.
    queries: of every draw and condition. Shape `[D, C, n, d_k]`.
    keys: shape `[D, C, n, d_k]`.

  Returns:
    `(scores, log_scale)`: the estimates are `scores * exp(log_scale)`. Shapes
    `[D, C, n, n]` and `[D, C, n]`.
  """

  def one_draw(arrays):
    directions, queries, keys = arrays
    rows = jax.vmap(
      functools.partial(attention.scores, feature_map(directions)),
      in_axes=(0, None),
    )
    return jax.vmap(rows)(queries, keys)

  arrays = (directions, queries, keys)
  return jax.lax.map(one_draw, arrays, batch_size=BATCH_SIZE)


def draw_directions(
  key: PRNGKeyArray,
  projection: Callable[..., Any],
  sizes: Sequence[int],
  num_draws: int,
  dim: int,
) -> dict[int, Float[Array, 'D R d']]:
  """Draws independent projections of several sizes, in one program.

  Args:
    key: consumed.
    projection: one of `iclcl_jax.projections`.
    sizes: numbers of directions `R`.
    num_draws: number of draws `D`.
    dim: width of a direction.

  Returns:
    For each size an array `[D, R, d]`. Sizes share no block of directions.
  """
  starts = np.cumsum([0] + [-(-size // dim) * dim for size in sizes])

  @jax.jit
  def draw(keys):
    return jax.lax.map(
      lambda key: projection(key, int(starts[-1]), dim, dtype=jnp.float32),
      keys,
    )

  pool = draw(jax.random.split(key, num_draws))
  return {
    size: pool[:, start : start + size]
    for size, start in zip(sizes, starts, strict=False)
  }


def draw_all_directions(
  key: PRNGKeyArray,
  methods: Sequence[Method],
  num_features: Sequence[int],
  num_draws: int,
  dim: int,
) -> Directions:
  """Draws what `measure` needs; maps of one projection share directions."""
  result: Directions = {}
  for index, name in enumerate(dict.fromkeys(m.projection for m in methods)):
    mine = [m for m in methods if m.projection is name]
    sizes = sorted({r for m in mine for r in m.directions(num_features)})
    key_here = jax.random.fold_in(key, index)
    result[name] = draw_directions(key_here, name, sizes, num_draws, dim)
  return result


def measure(
  directions: Directions,
  conditions: Sequence[Condition],
  methods: Sequence[Method],
  num_features: Sequence[int],
) -> list[Record]:
  """Measures all maps at equal directions and at equal feature counts.

  Args:
    directions: from `draw_all_directions`.
    conditions: the inputs, of equal shapes.
    methods: the maps.
    num_features: numbers of directions, and of features.

  Returns:
    A record for each map, number of directions, and condition.
  """
  return [
    record
    for method in methods
    for size in method.directions(num_features)
    for record in compare(
      method, directions[method.projection][size], conditions
    )
  ]


def compare(
  method: Method,
  directions: Float[Array, 'D R d'],
  conditions: Sequence[Condition],
) -> list[Record]:
  """Compares one map and number of directions with softmax attention."""
  scores, log_scale = jax.device_get(
    estimate(
      method.feature_map,
      directions,
      np.stack([c.queries for c in conditions], axis=1),
      np.stack([c.keys for c in conditions], axis=1),
    )
  )
  records = []
  for index, condition in enumerate(conditions):
    logits, exact_weights, exact_output = condition.exact()
    kernel = _float64(scores[:, index])
    weights = kernel / kernel.sum(axis=2, keepdims=True)
    shift = _float64(log_scale[:, index, :, None]) - logits
    relative = kernel * np.exp(shift) - 1
    errors = {'kernel_relative_mse': np.mean(relative**2, axis=(1, 2))}
    errors |= _errors('attention', weights, exact_weights)
    output = weights @ _float64(condition.values)
    errors |= _errors('output', output, exact_output)
    errors['negative_weights_fraction'] = np.mean(weights < 0, axis=(1, 2))
    size = directions.shape[1]
    records.append(Record(method, size, condition, errors, weights))
  return records


def _errors(
  name: str, estimate: np.ndarray, exact: np.ndarray
) -> dict[str, np.ndarray]:
  """Errors of matrices `[D, n, m]`, a number for each draw."""
  error = np.abs(estimate - exact)
  squares = np.sum(error**2, axis=(1, 2))
  largest, rest = statistics.split_by_size(exact, error)
  relative = statistics.split_by_size(exact, error / np.abs(exact))
  return {
    f'{name}_mse': np.mean(error**2, axis=(1, 2)),
    f'{name}_mae': np.mean(error, axis=(1, 2)),
    f'{name}_frobenius': np.sqrt(squares),
    f'{name}_relative': np.sqrt(squares / np.sum(exact**2, axis=(1, 2))),
    f'{name}_pearson': statistics.pearson(estimate, exact),
    f'{name}_largest_tenth_mae': largest,
    f'{name}_rest_mae': rest,
    f'{name}_largest_tenth_relative': relative[0],
    f'{name}_rest_relative': relative[1],
  }
