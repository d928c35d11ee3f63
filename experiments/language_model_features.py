"""Random features on the queries and keys of a real model.

Errors are of single attention outputs, relative: `|h_R - h| / |h|` of one head
at one position, with the tokens that this position sees.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from iclcl_jax import (
  attention,
  budget,
  features,
  pretrained,
  projections,
  transformer,
)
from iclcl_jax.types import Array

MAPS: dict[str, Any] = {
  'positive': features.PositiveFeatures,
  'hyperbolic': features.HyperbolicFeatures,
  'trigonometric': features.TrigonometricFeatures,
}
PROJECTIONS: dict[str, Any] = {
  'gaussian': projections.gaussian,
  'orthogonal': projections.orthogonal,
}
GAUSSIAN = {'gaussian': projections.gaussian}
SHRINK_FACTORS = 0.1, 0.2, 0.3, 0.6, 1.0
TARGET = 0.1  # Relative error of an output that is asked for.


class HeadInputs(NamedTuple):
  """What chosen heads see at chosen positions.

  Attributes:
    queries: rotated. Shape `[L, H, M, d_k]`.
    keys: rotated. Shape `[L, H, N, d_k]`.
    values: Shape `[L, H, N, d_k]`.
    positions: of the queries; a query sees the tokens up to its own. Shape
      `[M]`.
  """

  queries: np.ndarray
  keys: np.ndarray
  values: np.ndarray
  positions: np.ndarray


def collect(
  model: pretrained.LanguageModel,
  tokens: Array,
  *,
  num_heads: int,
  num_queries: int,
) -> HeadInputs:
  """Reads queries, keys and values off a forward pass.

  Args:
    model: the model.
    tokens: ids of the prompt. Shape `[N]`.
    num_heads: query heads of a layer, evenly chosen; at most all.
    num_queries: positions, evenly chosen from the later half of the prompt.

  Returns:
    The `HeadInputs`.
  """
  total = model.blocks.query.weight.shape[2]
  groups = model.blocks.key.weight.shape[2]
  chosen = _evenly(0, total - 1, num_heads)
  positions = _evenly(len(tokens) // 2, len(tokens) - 1, num_queries)

  def step(stream, block):
    heads = transformer.heads(model.architecture, block, stream)
    stream = transformer.apply_block(model.architecture, block, stream)
    owners = chosen * groups // total
    return stream, (
      heads.queries[chosen][:, positions],
      heads.keys[owners],
      heads.values[owners],
    )

  def read(model, tokens):
    x = pretrained.embed(model, tokens)
    return jax.lax.scan(step, x, model.blocks)[1]

  with jax.default_matmul_precision('highest'):
    arrays = jax.device_get(harness.compile_quickly(read)(model, tokens))
  queries, keys, values = arrays
  return HeadInputs(queries, keys, values, positions)


def _evenly(first: int, last: int, count: int) -> np.ndarray:
  """At most `count` different integers, the last one among them."""
  return np.unique(np.linspace(last, first, count).round().astype(int))


def measure(
  inputs: HeadInputs,
  projection_fns: Mapping[str, Any],
  num_directions: int,
  num_draws: int,
  seed: int,
) -> dict[str, np.ndarray]:
  """Relative errors of attention by random features.

  Args:
    inputs: of the heads.
    projection_fns: such as `PROJECTIONS`, by name.
    num_directions: rows `R` of the projections.
    num_draws: of each projection.
    seed: of the draws.

  Returns:
    Errors by `'map, projection'`. Shapes `[D, L, H, M]`.
  """
  key = jax.random.fold_in(jax.random.key(seed), num_directions)
  draw = functools.partial(
    _draw, tuple(projection_fns.values()), num_directions
  )
  keys = jax.random.split(key, num_draws)
  dim = inputs.keys.shape[-1]
  directions = harness.compile_quickly(
    lambda keys: jax.lax.map(lambda k: draw(dim, k), keys)
  )(keys)
  heads = tuple(x.reshape(-1, *x.shape[2:]) for x in inputs[:3])
  found = jax.device_get(_all_errors(directions, inputs.positions, heads))
  shape = num_draws, *inputs.queries.shape[:3]
  return {
    f'{name}, {projection}': array[:, index].reshape(shape)
    for name, array in found.items()
    for index, projection in enumerate(projection_fns)
  }


def _draw(projection_fns, num_directions, dim, key) -> Array:
  """One draw of each projection. Shape `[P, R, d_k]`."""
  keys = jax.random.split(key, len(projection_fns))
  rows = [
    fn(key, num_directions, dim, dtype=jnp.float32)
    for fn, key in zip(projection_fns, keys, strict=True)
  ]
  return jnp.stack(rows)


@harness.compile_quickly
def _all_errors(directions, positions, heads) -> dict[str, Array]:
  """Errors by map. Shapes `[D, P, L H, M]`."""

  def of_head(directions, head):
    queries, keys, values = head
    mask = jnp.arange(keys.shape[0])[None] <= positions[:, None]
    return {
      name: _errors(make(directions), mask, queries, keys, values)
      for name, make in MAPS.items()
    }

  def of_projection(directions):
    return jax.lax.map(functools.partial(of_head, directions), heads)

  return jax.lax.map(lambda rows: jax.lax.map(of_projection, rows), directions)


def _errors(phi, mask, queries, keys, values) -> Array:
  """Of one head: an error for each query. Shape `[M]`."""
  exact = jax.vmap(
    lambda query, seen: attention.softmax_attention(
      query, keys, values, mask=seen
    )
  )(queries, mask)
  estimate = jax.vmap(
    lambda query, seen: attention.kernel_attention(
      phi, query, keys, values, mask=seen
    )
  )(queries, mask)
  return _relative(estimate, exact)


def _relative(estimate, exact) -> Array:
  return jnp.linalg.norm(estimate - exact, axis=-1) / jnp.linalg.norm(
    exact, axis=-1
  )


def mean_errors(inputs: HeadInputs) -> np.ndarray:
  """Errors of the plain mean of the visible values. Shape `[L, H, M]`."""
  queries, keys, values, positions = inputs
  scores = np.einsum('lhmd,lhnd->lhmn', queries, keys) / keys.shape[-1] ** 0.5
  seen = np.arange(keys.shape[2])[None] <= positions[:, None]
  scores = np.where(seen, scores.astype(np.float64), -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  exact = weights @ values
  mean = (seen / seen.sum(-1, keepdims=True)) @ values
  return np.linalg.norm(mean - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


def predict(inputs: HeadInputs, num_directions: int) -> dict[str, np.ndarray]:
  """Root-mean-square output errors that the feature budget predicts.

  To first order and for independent directions, over the queries of a head;
  they fall as `1 / sqrt(R)` and are valid up to `budget.LARGEST_VALID_ERROR`.

  Args:
    inputs: of the heads.
    num_directions: rows `R`.

  Returns:
    Predicted errors by map. Shapes `[L, H, M]`.
  """
  shape = inputs.queries.shape[:3]
  result = {name: np.zeros(shape) for name in MAPS}
  for layer, head, row in np.ndindex(shape):
    seen = slice(inputs.positions[row] + 1)
    arrays = (
      inputs.queries[layer, head, row][None],
      inputs.keys[layer, head, seen],
      inputs.values[layer, head, seen],
    )
    for name, feature_map in MAPS.items():
      result[name][layer, head, row] = budget.predicted_output_error(
        feature_map,
        *(jnp.asarray(array) for array in arrays),
        num_directions=num_directions,
      )
  return result


class Study(NamedTuple):
  """Random features on the heads of a model.

  Attributes:
    counts: directions `R` that were tried.
    num_tokens: tokens of the prompt.
    errors: by `R` and `'map, projection'`. Shapes `[D, L, H, M]`.
    mean_errors: of the plain mean of the visible values. Shape `[L, H, M]`.
    log_needed: log10 of the predicted directions for an error of `TARGET`, by
      map. Shapes `[L, H, M]`.
    shrunk: `Shrunk`, the check of the prediction.
  """

  counts: tuple[int, ...]
  num_tokens: int
  errors: dict[int, dict[str, np.ndarray]]
  mean_errors: np.ndarray
  log_needed: dict[str, np.ndarray]
  shrunk: 'Shrunk'


class Shrunk(NamedTuple):
  """The same heads with queries and keys multiplied by a factor.

  Attributes:
    factors: the last one is 1, the model as it is. Shape `[F]`.
    num_directions: directions `R`.
    measured: root-mean-square errors over draws and heads of every layer, by
      map. Shapes `[F]`.
    predicted: the same as the budget predicts. Shapes `[F]`.
  """

  factors: tuple[float, ...]
  num_directions: int
  measured: dict[str, np.ndarray]
  predicted: dict[str, np.ndarray]


def study(config: Any, model: pretrained.LanguageModel, tokens: Array) -> Study:
  """Tries random features on the heads, and predicts how many they need.

  Args:
    config: of `experiments.language_model`.
    model: the model.
    tokens: ids of the prompt. Shape `[N]`.

  Returns:
    The `Study`.
  """
  inputs = collect(model, tokens, num_heads=config.feature_heads, num_queries=1)
  counts = tuple(sorted(config.num_features))
  errors = {
    count: measure(
      inputs, PROJECTIONS, count, config.feature_draws, config.seed
    )
    for count in counts
  }
  predicted = predict(inputs, counts[-1])
  return Study(
    counts,
    len(tokens),
    errors,
    mean_errors(inputs),
    {k: directions_needed(v, counts[-1]) for k, v in predicted.items()},
    shrink(inputs, counts[-1], config.feature_draws, config.seed),
  )


def shrink(
  inputs: HeadInputs, num_directions: int, num_draws: int, seed: int
) -> Shrunk:
  """Compares measured with predicted errors as queries and keys shrink.

  Args:
    inputs: of the heads; one head of every third layer is used.
    num_directions: rows `R` of a Gaussian projection.
    num_draws: of the projection.
    seed: of the draws.

  Returns:
    The `Shrunk`.
  """
  one = inputs._replace(
    queries=inputs.queries[::3, :1],
    keys=inputs.keys[::3, :1],
    values=inputs.values[::3, :1],
  )
  found: dict[str, dict[str, list[Any]]] = {'measured': {}, 'predicted': {}}
  for factor in SHRINK_FACTORS:
    small = one._replace(
      queries=one.queries * np.float32(factor),
      keys=one.keys * np.float32(factor),
    )
    measured = measure(small, GAUSSIAN, num_directions, num_draws, seed)
    predicted = predict(small, num_directions)
    for name in MAPS:
      rows = measured[f'{name}, gaussian'], predicted[name]
      for kind, array in zip(found, rows, strict=True):
        found[kind].setdefault(name, []).append(np.sqrt(np.mean(array**2)))
  arrays = {
    kind: {name: np.array(row) for name, row in rows.items()}
    for kind, rows in found.items()
  }
  return Shrunk(
    SHRINK_FACTORS, num_directions, arrays['measured'], arrays['predicted']
  )


def directions_needed(predicted: np.ndarray, num_directions: int) -> np.ndarray:
  """Log10 of the directions that reach `TARGET`, at least 0.

  Args:
    predicted: errors with `num_directions`.
    num_directions: rows `R`.

  Returns:
    The logarithms. The shape of `predicted`.

  Example:
    >>> directions_needed(np.array([1.0]), 10).tolist()
    [3.0]
  """
  with np.errstate(divide='ignore'):
    log_error = np.log10(np.asarray(predicted, np.float64) / TARGET)
  return np.maximum(np.log10(num_directions) + 2 * log_error, 0)
