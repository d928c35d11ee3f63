"""Random-feature attention against softmax attention, over many draws.

What every question starts from: `measured(config)`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.approximation import inputs
from experiments.approximation.inputs import Condition
from experiments.lab import Config, figures as drawing, pretraining, statistics
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
PAPER_MAP = METHODS[0]


class Record(NamedTuple):
  method: Method
  num_directions: int  # Rows of its projection.
  condition: Condition
  errors: dict[str, np.ndarray]  # Each quantity, for every draw. Shapes `[D]`.
  weights: np.ndarray  # Estimated attention matrices. Shape `[D, n, n]`.

  def units(self, quantity: str) -> np.ndarray:
    """Errors of independent units. Shape `[U]`."""
    return self.condition.units(self.errors[quantity])

  def means(self) -> dict[str, lab.Estimate]:
    return {quantity: mean(self.units(quantity)) for quantity in self.errors}


class Measurements:
  """Records of one number of tokens, looked up by map, condition and size."""

  def __init__(self, records: Sequence[Record]):
    self.conditions = {r.condition.name: r.condition for r in records}
    self.records = {
      (r.method.name, r.condition.name, r.num_directions): r for r in records
    }

  @property
  def num_tokens(self) -> int:
    return next(iter(self.conditions.values())).keys.shape[1]

  def get(self, method: Method, condition: Condition, size: int) -> Record:
    return self.records[method.name, condition.name, size]

  def sizes(self, method: Method) -> list[int]:
    return sorted({size for x, _, size in self.records if x == method.name})

  def draws(
    self, method: Method, condition: Condition, quantity: str, sizes=None
  ) -> np.ndarray:
    """Errors of every draw against directions. Shape `[D, R]`."""
    sizes = self.sizes(method) if sizes is None else sizes
    records = [self.get(method, condition, size) for size in sizes]
    return np.stack([r.errors[quantity] for r in records], axis=1)

  def curve(
    self, method: Method, condition: Condition, quantity: str, sizes=None
  ) -> np.ndarray:
    """Errors of independent units against directions. Shape `[U, R]`."""
    return condition.units(self.draws(method, condition, quantity, sizes))

  def caption(self, names: Iterable[str]) -> str:
    """What the points of a figure of some conditions are means of."""
    shape = next(iter(self.conditions.values())).keys.shape
    text = f"""sd: standard deviation of the entries of queries and keys;
      {shape[1]} tokens of size {shape[2]}; means of {shape[0]} draws, bars: 95
      % bootstrap intervals"""
    seeds = self.conditions['trained'].num_units
    more = f' (trained: over {seeds} seeds)' if 'trained' in names else ''
    return text + more


class Data(NamedTuple):
  first: Measurements  # Every map, at the first number of demonstrations.
  second: Measurements  # The papers' map, at the second.
  layers: inputs.TrainedLayers  # The trained layers of the first.
  directions: Directions  # What the first was measured with.


@lab.once
def measured(config: Config) -> Data:
  """Draws inputs and directions, and measures all maps; two at a time."""
  keys = jax.random.split(jax.random.key(config.seed), 6)

  def prepare(number):
    sizes = config.num_demonstrations, config.second_num_demonstrations
    return inputs.conditions(config, keys[number], sizes[number])

  (first, layers), (second, _) = lab.in_threads(prepare, (0, 1))
  few = sorted({*config.heatmap_features, config.reference_features})
  draw = functools.partial(draw_directions, num_draws=config.num_draws)
  directions = draw(keys[2], METHODS, config.num_features)
  second_directions = draw(keys[3], [PAPER_MAP], few)
  return Data(
    measure(directions, first, METHODS, config.num_features),
    measure(second_directions, second, [PAPER_MAP], few),
    layers,
    directions,
  )


@functools.partial(jax.jit, static_argnums=0)
def estimate(
  feature_map: type,
  directions: Float[Array, 'D R d_k'],
  queries: Float[Array, 'D C n d_k'],
  keys: Float[Array, 'D C n d_k'],
) -> tuple[Float[Array, 'D C n n'], Float[Array, 'D C n']]:
  """Estimates `scores * exp(log_scale)` of the kernel, in one program."""

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
  methods: Sequence[Method],
  num_features: Sequence[int],
  num_draws: int,
) -> Directions:
  """Draws what `measure` needs, the sizes of a projection in one program.

  Maps of one projection share directions; sizes share none. Consumes `key`.
  """
  dim = pretraining.TOKEN_DIM
  result: Directions = {}
  for i, projection in enumerate(dict.fromkeys(m.projection for m in methods)):
    mine = [m for m in methods if m.projection is projection]
    sizes = sorted({r for m in mine for r in m.directions(num_features)})
    starts = np.cumsum([0] + [-(-size // dim) * dim for size in sizes])
    draw = functools.partial(
      projection, num_features=int(starts[-1]), dim=dim, dtype=jnp.float32
    )
    keys = jax.random.split(jax.random.fold_in(key, i), num_draws)
    pool = jax.jit(functools.partial(jax.lax.map, draw))(keys)
    result[projection] = {
      size: pool[:, start : start + size]
      for size, start in zip(sizes, starts, strict=False)
    }
  return result


def measure(
  directions: Directions,
  conditions: Sequence[Condition],
  methods: Sequence[Method],
  num_features: Sequence[int],
) -> Measurements:
  """A record for each map, number of directions, and condition."""

  def of_method(method):
    return [
      x
      for r in method.directions(num_features)
      for x in compare(method, directions[method.projection][r], conditions)
    ]

  groups = lab.in_threads(of_method, methods)
  return Measurements([record for group in groups for record in group])


def compare(
  method: Method,
  directions: Float[Array, 'D R d'],
  conditions: Sequence[Condition],
) -> list[Record]:
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
    kernel = np.float64(scores[:, index])
    weights = kernel / kernel.sum(axis=2, keepdims=True)
    shift = np.float64(log_scale[:, index, :, None]) - logits
    relative = kernel * np.exp(shift) - 1
    output = weights @ np.float64(condition.values)
    errors = (
      {'kernel_relative_mse': np.mean(relative**2, axis=(1, 2))}
      | _errors('attention', weights, exact_weights)
      | _errors('output', output, exact_output)
      | {'negative_weights_fraction': np.mean(weights < 0, axis=(1, 2))}
    )
    size = directions.shape[1]
    records.append(Record(method, size, condition, errors, weights))
  return records


def _errors(
  name: str, estimate: np.ndarray, exact: np.ndarray
) -> dict[str, np.ndarray]:
  """Errors of matrices `[D, n, m]`, a number for each draw."""
  estimate, exact = (x.reshape(len(x), -1) for x in (estimate, exact))
  error = np.abs(estimate - exact)
  squares = np.sum(error**2, axis=1)
  largest, rest = split_by_size(exact, error)
  relative = split_by_size(exact, error / np.abs(exact))
  return {
    f'{name}_mse': np.mean(error**2, axis=1),
    f'{name}_mae': np.mean(error, axis=1),
    f'{name}_frobenius': np.sqrt(squares),
    f'{name}_relative': np.sqrt(squares / np.sum(exact**2, axis=1)),
    f'{name}_pearson': statistics.correlation(estimate, exact),
    f'{name}_largest_tenth_mae': largest,
    f'{name}_rest_mae': rest,
    f'{name}_largest_tenth_relative': relative[0],
    f'{name}_rest_relative': relative[1],
  }


def split_by_size(exact: np.ndarray, error: np.ndarray) -> tuple[Any, Any]:
  """Mean errors `[D]` of the largest tenth of entries `[D, n]`, and others."""
  order = np.argsort(-np.abs(exact), axis=1)
  ranked = np.take_along_axis(error, order, axis=1)
  size = -(-exact.shape[1] // 10)
  return ranked[:, :size].mean(axis=1), ranked[:, size:].mean(axis=1)


def mean(errors: np.ndarray) -> lab.Estimate:
  """The mean over independent units `[U]`, with its bootstrap interval."""
  return statistics.bootstrap(lambda means: means, errors)


def geometric_mean(ratios: np.ndarray) -> lab.Estimate:
  """The geometric mean over units `[U]`, with its bootstrap interval."""
  return statistics.bootstrap(np.exp, np.log(ratios))


def statements(condition: str, text: str, found: Any) -> lab.Claims:
  """Claims about one condition, whose ids are their texts."""
  for claim in lab.statements('', text, found):
    said = f'{claim.claim}: {condition}'
    slug = re.sub('[^a-z0-9]+', '-', said.lower()).strip('-')
    own: Any = {'claim': said, 'more': {'condition': condition}}
    yield dataclasses.replace(claim, id=f'approximation-{slug}', **own)


def words(quantity: str) -> str:
  """A quantity as a reader knows it."""
  name, *kind = quantity.split('_')
  return f'{name} {" ".join(kind)}'.replace('mse', 'MSE').replace('mae', 'MAE')


def error_bars(axis, x, found, index, **look) -> None:
  own = drawing.look(index) | {'ms': 4, 'capsize': 2}
  drawing.bars(axis, x, found, **own | look)
