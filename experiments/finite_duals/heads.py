"""How far is a head with `R` features from the softmax?

Errors are of all outputs of a query head in the second half of a text,
`|h_R - h| / |h|`, on texts that the maps were not fitted to (but for those
called 'own').
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.finite_duals import texts
from experiments.lab import figures as drawing, statistics
from iclcl_jax import (
  attention,
  budget,
  features,
  finite_duals,
  kernels,
  pretrained,
  projections,
  transformer,
)
from iclcl_jax.types import Array

WINDOW = 'window alone'
JUDGED = 'landmarks'
OWN = 'landmarks, own'
TRAINED = 'learnt'
RANDOM = 'random'
BALANCED = 'random, balanced'
MAPS = (JUDGED, OWN, TRAINED, 'Nystroem, own', BALANCED, RANDOM)
TARGET = 0.2
ALONE = ', alone'  # Without sink and window.


class Rows(NamedTuple):
  """Queries and keys of all key-value heads on one text."""

  queries: Array  # Rotated. Shape `[L G, r, N, d_k]`.
  keys: Array  # Rotated. Shape `[L G, N, d_k]`.
  values: Array  # Shape `[L G, N, d_k]`.


class Results(NamedTuple):
  counts: tuple[int, ...]  # Features `R`.
  # By map and `R`, with the window and, of one `R`, 'alone'. Shape `[P, L, H]`.
  errors: dict[str, dict[int, np.ndarray]]
  window: np.ndarray  # Errors of the window alone. Shape `[P, L, H]`.
  tokens: np.ndarray  # How many are attended to, exp of the entropy, `[L, H]`.
  sink: np.ndarray  # Mean weight of the first token. Shape `[L, H]`.
  # log10 of the random directions for an error of .1, by map; a query of each
  # key-value head. Shape `[L G]`.
  log_needed: dict[str, np.ndarray]
  seconds: dict[str, float]  # Fitting and judging `R` features, by map.
  num_features: int  # The `R` of single numbers.

  def of(self, name: str) -> np.ndarray:
    """Errors of a map with one `R`, a mean over texts. Shape `[L, H]`."""
    return self.errors[name][self.num_features].mean(axis=0)


@functools.partial(jax.jit, static_argnums=2)
def collect(model, tokens, num_groups) -> Rows:
  def layer(stream, block):
    heads = transformer.heads(model.architecture, block, stream)
    stream = transformer.apply_block(model.architecture, block, stream)
    return stream, (heads.queries, heads.keys, heads.values)

  x = pretrained.embed(model, tokens)
  _, rows = transformer.scan_blocks(model.architecture, model.blocks, layer, x)
  queries, keys, values = rows
  size, width = keys.shape[2:]
  return Rows(
    queries.reshape(-1, queries.shape[1] // num_groups, size, width),
    keys.reshape(-1, size, width),
    values.reshape(-1, size, width),
  )


def make(name: str, count: int, own, calibration, key, config) -> Any:
  """Makes the map of one key-value head; rows are `(queries, keys)`."""
  queries, keys = own if name.endswith('own') else calibration
  size, width = keys.shape
  place = jnp.arange(size)
  learner = texts.learner(config)
  far = jnp.tile(learner.is_far(place[:, None], place[None]), (len(queries), 1))
  queries = queries.reshape(-1, width)
  if name in (RANDOM, BALANCED):
    directions = projections.orthogonal(key, count, width, dtype=keys.dtype)
    random = features.PositiveFeatures(directions)
    if name == RANDOM:
      return random
    return finite_duals.balance(queries, keys, random)
  if name == TRAINED:
    seen = jnp.tile(place[:, None] >= place[None], (len(far) // size, 1))
    return finite_duals.train_features(
      key,
      queries,
      keys,
      num_features=count,
      seen=seen,
      far=far & seen,
      num_steps=config.train_steps,
    )
  phi = finite_duals.fit_landmarks(queries, keys, num_landmarks=count, far=far)
  if name.startswith('Nystroem'):
    return finite_duals.nystroem(phi.landmarks)
  return phi


def softmax_outputs(judged: Rows) -> Array:
  """What the heads answer in second halves. Shape `[P, L G, r, N / 2, d_k]`."""

  def of_head(rows):
    def of_query_head(queries):
      found = attention.causal_kernel_attention(
        kernels.ExponentialKernel(), queries, rows.keys, rows.values
      )
      return found[queries.shape[0] // 2 :]

    return jax.vmap(of_query_head)(rows.queries)

  of_text = functools.partial(jax.lax.map, of_head)
  return lab.compile_quickly(lambda rows: jax.lax.map(of_text, rows))(judged)


def errors_of(
  name, count, learner, judged, outputs, calibration, config
) -> np.ndarray:
  """Errors of all heads on all texts. Shape `[P, L G, r]`."""

  def of_head(texts_of_head, rows, key):
    fitted = None
    if name != WINDOW and not name.endswith('own'):
      fitted = make(name, count, None, rows[:2], key, config)

    def of_text(text):
      own, exact_outputs = text
      phi = fitted
      if name == WINDOW:
        phi = texts.nothing(width=own.keys.shape[-1])
      elif phi is None:
        phi = make(name, count, own[:2], None, key, config)

      def of_query_head(queries, exact):
        found = learner.causal(phi, queries, own.keys, own.values)
        found = found[queries.shape[0] // 2 :]
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

      return jax.vmap(of_query_head)(own.queries, exact_outputs)

    return jax.lax.map(of_text, texts_of_head)

  size = calibration.keys.shape[0]
  keys = jax.random.split(jax.random.key(config.seed), size)
  both = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (judged, outputs))
  return np.swapaxes(lab.compute_each(of_head, both, calibration, keys), 0, 1)


def measure(config: Any) -> Results:
  loaded = texts.load(config)
  model = loaded.model
  num_layers, _, num_groups, _ = model.blocks.key.weight.shape
  calibration = collect(model, loaded.calibration, num_groups)
  few = loaded.reviews[: config.num_head_texts]
  rows = [collect(model, tokens, num_groups) for tokens in few]
  judged = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  exact = softmax_outputs(judged)
  learner = texts.learner(config)
  alone = finite_duals.WindowedLearner(num_sinks=0, window=0)
  seconds = {}

  def errors(name, count, learner):
    begin = time.perf_counter()
    found = errors_of(name, count, learner, judged, exact, calibration, config)
    seconds[name] = time.perf_counter() - begin
    return found.reshape(len(found), num_layers, -1)

  measured: dict[str, dict[int, np.ndarray]] = {}
  for name in MAPS:
    one = config.num_features
    measured[name + ALONE] = {one: errors(name, one, alone)}
    counts = (one,) if name == TRAINED else config.counts
    measured[name] = {count: errors(name, count, learner) for count in counts}
  tokens, sink = _attended(jax.tree.map(lambda x: x[0], judged))
  return Results(
    config.counts,
    measured,
    errors(WINDOW, 1, learner),
    tokens.reshape(num_layers, -1),
    sink.reshape(num_layers, -1),
    _needed(calibration, jax.tree.map(lambda x: x[0], judged)),
    seconds,
    config.num_features,
  )


def _attended(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
  """Effective number of tokens, and weight of the first, of query heads."""

  def of_query_head(queries, keys):
    size, width = keys.shape
    exponent = jnp.where(
      jnp.tril(jnp.ones((size, size), bool)),
      queries @ keys.T / width**0.5,
      -jnp.inf,
    )
    weights = jax.nn.softmax(exponent)[size // 2 :]
    entropy = -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=1)
    return jnp.mean(jnp.exp(entropy)), jnp.mean(weights[:, 0])

  of_head = jax.vmap(of_query_head, in_axes=(0, None))
  return lab.compute_each(of_head, rows.queries, rows.keys)


def _needed(calibration: Rows, judged: Rows) -> dict[str, np.ndarray]:
  """Directions that the budget asks for, of the last query of each head."""
  phi = features.PositiveFeatures(calibration.keys[0, :1])
  count, _, width = calibration.keys.shape
  flat = calibration.queries.reshape(count, -1, width)
  maps = lab.compute_each(
    lambda x, y: finite_duals.balance(x, y, phi), flat, calibration.keys
  )
  found: dict[str, list[float]] = {RANDOM: [], BALANCED: []}
  for head in range(count):
    rows = judged.queries[head, 0, -1:], judged.keys[head]
    balanced = jax.tree.map(lambda x, head=head: x[head], maps).rows(*rows)
    for name, (query, keys) in ((RANDOM, rows), (BALANCED, balanced)):
      error = budget.predicted_output_error(
        features.PositiveFeatures,
        query,
        keys,
        judged.values[head],
        num_directions=1,
      )
      found[name].append(max(2 * float(np.log10(error / 0.1)), 0))
  return {name: np.array(x) for name, x in found.items()}


def claims(config: Any, results: Results) -> list[lab.Claim]:
  window = results.window.mean(axis=0)
  source = 'ours; Ren & Liu, arXiv:2310.13220, features in place of the softmax'
  where = f"""{window.size} heads, {results.num_features} features, first token
      and window exact"""
  found = {
    'error': (TARGET, results.of(OWN)),
    'error-transferred': (TARGET, results.of(JUDGED)),
    'window': (0.6, results.of(JUDGED) / window),
    'random': (0.95, results.of(RANDOM) / window),
  }
  return lab.statements(
    'finite-duals-head-',
    f"""
    error [{source}] a few landmarks of a text imitate the heads of a real model
      on it | median relative error of a head, {where}
    error-transferred [{source}] landmarks of another text of the kind imitate
      the heads of a real model | median relative error of a head, {where}
    window [{source}] landmarks of another text imitate heads by their features,
      not by the exact window | median of the error over that of the window
      alone, {where}
    random [{source}] random features, as many, add something to the window |
      median of the error over that of the window alone, {where}
    """,
    {k: lab.at_most(x, statistics.median(y)) for k, (x, y) in found.items()},
  )


def _median(errors: np.ndarray) -> lab.Estimate:
  return statistics.median(errors.mean(axis=0))


def summary(config: Any, results: Results) -> dict[str, Any]:
  count = results.num_features
  rows = {
    name: {r: _median(x) for r, x in errors.items()}
    for name, errors in results.errors.items()
  }
  own = f'median_error_r{count}_sink{config.window}'
  return {
    own: rows[OWN][count].value,
    f'{own}_transferred': rows[JUDGED][count].value,
    'median_error_window_only': _median(results.window).value,
    'median_error': rows,
    'log10_directions_needed': {
      k: np.quantile(x, [0.1, 0.5, 0.9]) for k, x in results.log_needed.items()
    },
    'hardest': {
      'rank_correlation_with_tokens': statistics.rank_correlation(
        results.of(JUDGED).ravel(), results.tokens.ravel()
      )
    },
    'seconds_by_map': results.seconds,
  }


def tables(config: Any, results: Results) -> dict[str, Any]:
  count = results.num_features
  columns = {
    'landmarks': results.of(JUDGED),
    'landmarks, own': results.of(OWN),
    'window alone': results.window.mean(axis=0),
    'effective tokens': results.tokens,
    'weight of the first token': results.sink,
  }
  leaderboard = [
    {'layer': layer, 'head': head}
    | {name: float(x[layer, head]) for name, x in columns.items()}
    for layer, head in np.ndindex(results.tokens.shape)
  ]
  leaderboard.sort(key=lambda row: row['landmarks'])
  maps = [
    {'map': name, 'features': r, 'median': float(np.median(x.mean(axis=0)))}
    | {'90 %': float(np.quantile(x.mean(axis=0), 0.9))}
    for name, errors in [*results.errors.items(), (WINDOW, {0: results.window})]
    for r, x in errors.items()
  ]
  return {f'heads_r{count}': leaderboard, 'maps': maps}


def sentence(config: Any, results: Results) -> str:
  error, own = (np.median(results.of(x)) for x in (JUDGED, OWN))
  window = np.median(results.window.mean(axis=0))
  random = np.median(results.of(RANDOM))
  needed = {k: np.median(x) for k, x in results.log_needed.items()}
  return f"""With {results.num_features} landmarks of another text, the first
    token and the last {config.window} exactly, the median head is off by
    {error:.2f} ({own:.2f} with landmarks of its own text); the window alone is
    off by {window:.2f}, and with as many random features by {random:.2f}: for
    .1 the budget asks for 10^{needed[RANDOM]:.0f} of them, balanced
    10^{needed[BALANCED]:.0f}."""


def figures(config: Any, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 2, figsize=(13, 5))
  _draw_counts(axes[0], results)
  _draw_heads(axes[1], results)
  caption = f"""Errors of single heads on texts that maps were not fitted to
    (unless they are called own). Left: median over heads with its interval;
    crosses without first token and window. Right: each head with
    {results.num_features} landmarks beside its window alone; the colour is the
    effective number of tokens that it attends to."""
  return [lab.Figure('heads', figure, caption)]


def _draw_counts(axis, results: Results) -> None:
  for index, name in enumerate(MAPS):
    errors = results.errors[name]
    look = drawing.look(index)
    bands = list(map(_median, errors.values()))
    drawing.band(axis, list(errors), bands, label=name, **look)
    alone = np.median(results.of(name + ALONE))
    cross = {'color': look['color'], 'ms': 8, 'mew': 2}
    axis.plot(results.num_features, alone, 'x', **cross)
  window = _median(results.window)
  axis.axhline(window.value, color=drawing.BLACK, ls=':', lw=2, label=WINDOW)
  axis.axhline(TARGET, color=drawing.GREY, linewidth=1)
  axis.set_yscale('log')
  drawing.plain_ticks(axis.yaxis)
  drawing.size_axis(axis, results.counts)
  axis.set(xlabel='features R', ylabel='relative error of a head')
  axis.legend(fontsize='small', ncols=2)


def _draw_heads(axis, results: Results) -> None:
  window = results.window.mean(axis=0).ravel()
  found = results.of(JUDGED).ravel()
  points = axis.scatter(
    window, found, c=np.log10(results.tokens.ravel()), s=16, cmap='viridis'
  )
  most = max(window.max(), found.max()) * 1.05
  axis.plot([0, most], [0, most], color=drawing.GREY, lw=1)
  axis.set_xlabel('error of the window alone')
  axis.set_ylabel(f'error with {results.num_features} landmarks')
  axis.figure.colorbar(points, ax=axis, label='log10 of effective tokens')
