"""Could random features stand in for the softmax of a real model?

Errors are of single attention outputs, relative: `|h_R - h| / |h|` of one head
at the last position.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing, statistics
from experiments.language_model import identity, prompts
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
JUDGED = 'positive, orthogonal'
PLAIN = 'plain mean of values'
# Positive and hyperbolic features often coincide: one mark inside the other.
LOOKS: dict[str, dict[str, Any]] = {
  'positive': drawing.look(1) | {'marker': 'o', 'ms': 12, 'mfc': 'none'},
  'hyperbolic': drawing.look(2) | {'marker': 's', 'ms': 5},
  'trigonometric': drawing.look(3) | {'marker': '^', 'ms': 8},
}


class HeadInputs(NamedTuple):
  """What chosen heads see at the last position of the prompt."""

  queries: np.ndarray  # Rotated. Shape `[L, H, d_k]`.
  keys: np.ndarray  # Rotated, of all tokens. Shape `[L, H, N, d_k]`.
  values: np.ndarray  # Shape `[L, H, N, d_k]`.


@jax.default_matmul_precision('highest')
def collect(
  model: pretrained.LanguageModel, tokens: Array, num_heads: int
) -> HeadInputs:
  """Reads queries, keys and values off a forward pass of `N` tokens.

  Of so many query heads of a layer, evenly chosen; at most all.
  """
  total = model.blocks.query.weight.shape[2]
  chosen = np.unique(np.linspace(total - 1, 0, num_heads).round().astype(int))
  owners = chosen * model.blocks.key.weight.shape[2] // total

  def step(stream, block):
    heads = transformer.heads(model.architecture, block, stream)
    stream = transformer.apply_block(model.architecture, block, stream)
    return stream, HeadInputs(
      heads.queries[chosen][:, -1], heads.keys[owners], heads.values[owners]
    )

  def read(model, tokens):
    x = pretrained.embed(model, tokens)
    return transformer.scan_blocks(model.architecture, model.blocks, step, x)[1]

  return lab.compute(read, model, tokens)


def errors_of(
  inputs: HeadInputs, fns: Mapping[str, Any], count: int, config: Config
) -> dict[str, np.ndarray]:
  """Relative errors of attention by random features of so many directions.

  By `'map, projection'`, such as of `PROJECTIONS`; a number for each draw, `[D,
  L, H]`.
  """
  root = jax.random.fold_in(jax.random.key(config.seed), count)
  dim = inputs.keys.shape[-1]

  def draw(key):  # One of each projection, `[P, R, d_k]`.
    keys = jax.random.split(key, len(fns))
    return jnp.stack(
      [
        fn(key, count, dim, dtype=jnp.float32)
        for fn, key in zip(fns.values(), keys, strict=True)
      ]
    )

  draws = jax.random.split(root, config.feature_draws)
  directions = lab.compute_each(draw, draws)
  heads = tuple(x.reshape(-1, *x.shape[2:]) for x in inputs)
  found = jax.device_get(_all_errors(directions, heads))
  shape = config.feature_draws, *inputs.queries.shape[:2]
  return {
    f'{name}, {projection}': array[:, index].reshape(shape)
    for name, array in found.items()
    for index, projection in enumerate(fns)
  }


@lab.compile_quickly
def _all_errors(directions, heads) -> dict[str, Array]:
  """Errors by map. Shapes `[D, P, L H]`."""

  def of_head(directions, head):
    exact = attention.softmax_attention(*head)
    estimates = {
      name: attention.kernel_attention(make(directions), *head)
      for name, make in MAPS.items()
    }
    return {
      name: jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)
      for name, x in estimates.items()
    }

  def of_projection(directions):
    return jax.lax.map(functools.partial(of_head, directions), heads)

  return jax.lax.map(lambda rows: jax.lax.map(of_projection, rows), directions)


def mean_errors(inputs: HeadInputs) -> np.ndarray:
  """Errors of the plain mean of all values. Shape `[L, H]`."""
  queries, keys, values = inputs
  scores = np.einsum('lhd,lhnd->lhn', queries, keys) / keys.shape[-1] ** 0.5
  scores = scores.astype(np.float64)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  exact = np.einsum('lhn,lhnd->lhd', weights, values)
  distance = np.linalg.norm(values.mean(axis=2) - exact, axis=-1)
  return distance / np.linalg.norm(exact, axis=-1)


def predict(inputs: HeadInputs, num_directions: int) -> dict[str, np.ndarray]:
  """Root-mean-square output errors that the feature budget predicts.

  By map, shapes `[L, H]`. To first order and for independent directions; they
  fall as `1 / sqrt(R)` and are valid up to `budget.LARGEST_VALID_ERROR`.
  """
  shape = inputs.queries.shape[:2]
  result = {name: np.zeros(shape) for name in MAPS}
  for at in np.ndindex(shape):
    query, keys, values = (jnp.asarray(x[at]) for x in inputs)
    for name, feature_map in MAPS.items():
      result[name][at] = budget.predicted_output_error(
        feature_map, query[None], keys, values, num_directions=num_directions
      )
  return result


class Shrunk(NamedTuple):
  """The same heads with queries and keys multiplied by a factor."""

  factors: tuple[float, ...]  # The last one is 1, the model as it is, `[F]`.
  num_directions: int  # Directions `R`.
  measured: dict[str, np.ndarray]  # Root-mean-square errors, by map, `[F]`.
  predicted: dict[str, np.ndarray]  # The same as the budget predicts, `[F]`.


class Results(NamedTuple):
  counts: tuple[int, ...]  # Directions `R` that were tried.
  num_tokens: int  # Tokens of the prompt.
  errors: dict[int, dict[str, np.ndarray]]  # By `R` and map, `[D, L, H]`.
  mean_errors: np.ndarray  # Of the plain mean of the visible values, `[L, H]`.
  log_needed: dict[str, np.ndarray]  # log10 of `R` for `TARGET`, `[L, H]`.
  shrunk: Shrunk  # `Shrunk`, the check of the prediction.

  @property
  def judged(self) -> np.ndarray:
    """Errors with the most directions of the map that is judged."""
    return self.errors[self.counts[-1]][JUDGED]


@lab.once
def measure(config: Config) -> Results | None:
  """Tries random features on the heads; None if `num_features` is 0.

  None, too, if a head is no softmax over the whole prompt.
  """
  loaded = prompts.load(config)
  model, size = loaded.model, len(loaded.tokens)
  windows = [layer.window or size for layer in model.architecture.layers]
  is_capped = model.architecture.score_cap is not None
  is_plain = min(windows) >= size and model.blocks.sinks is None
  if config.num_features == (0,) or is_capped or not is_plain:
    return None
  identity.first_pass(config)  # Not beside what is timed.
  inputs = collect(loaded.model, loaded.tokens, config.feature_heads)
  counts = tuple(sorted(config.num_features))
  errors = {r: errors_of(inputs, PROJECTIONS, r, config) for r in counts}
  predicted = predict(inputs, counts[-1])
  return Results(
    counts,
    len(loaded.tokens),
    errors,
    mean_errors(inputs),
    {k: directions_needed(v, counts[-1]) for k, v in predicted.items()},
    shrink(inputs, counts[-1], config),
  )


def shrink(inputs: HeadInputs, count: int, config: Config) -> Shrunk:
  """Measured and predicted errors as queries and keys shrink, some heads."""
  queries, keys, values = (x[::3, :1] for x in inputs)
  measured, predicted = (
    {name: np.zeros(len(SHRINK_FACTORS)) for name in MAPS} for _ in range(2)
  )
  for index, factor in enumerate(map(np.float32, SHRINK_FACTORS)):
    small = HeadInputs(queries * factor, keys * factor, values)
    errors = errors_of(small, GAUSSIAN, count, config)
    expected = predict(small, count)
    for name in MAPS:
      for row, found in (
        (measured, errors[f'{name}, gaussian']),
        (predicted, expected[name]),
      ):
        row[name][index] = np.sqrt(np.mean(found**2))
  return Shrunk(SHRINK_FACTORS, count, measured, predicted)


def directions_needed(predicted: np.ndarray, num_directions: int) -> np.ndarray:
  """Log10 of the directions that reach `TARGET`, at least 0.

  Example:
    >>> directions_needed(np.array([1.0]), 10).tolist()
    [3.0]
  """
  with np.errstate(divide='ignore'):
    log_error = np.log10(np.asarray(predicted, np.float64) / TARGET)
  return np.maximum(np.log10(num_directions) + 2 * log_error, 0)


def claims(config: Config, results: Results | None) -> list[lab.Claim]:
  if results is None:
    return []
  judged = results.judged
  error = lab.Estimate(float(np.median(judged)), *_interval(judged))
  return lab.statements(
    'language-model-',
    f"""random-features [{identity.REN}, random features in place of the
    softmax] {results.counts[-1]} positive random features imitate the heads of
    a real model | median relative error of an output over
    {results.mean_errors.size} heads, orthogonal directions""",
    {'random-features': lab.at_most(TARGET, error)},
  )


def _interval(errors: np.ndarray) -> list[float]:
  return list(statistics.median(np.median(errors, axis=0))[1:])


def summary(config: Config, results: Results | None) -> dict[str, Any]:
  if results is None:
    return {'random_features': None}
  most = results.errors[results.counts[-1]]
  needed = results.log_needed
  return {
    'random_features': {
      'median_error': {
        count: {name: np.median(x) for name, x in rows.items()}
        for count, rows in results.errors.items()
      },
      'median_error_interval': {k: _interval(x) for k, x in most.items()},
      'median_error_of_plain_mean': np.median(results.mean_errors),
      'num_heads': results.mean_errors.size,
      'num_draws': len(results.judged),
      'log10_directions_needed': {
        name: np.quantile(x, [0.1, 0.5, 0.9]) for name, x in needed.items()
      },
      'log10_directions_needed_least': {k: x.min() for k, x in needed.items()},
      'shrunk': results.shrunk._asdict(),
    }
  }


def of_layer(results: Results, layer: int) -> dict[str, Any]:
  return {
    'median_feature_error': {
      count: {name: np.median(x[:, layer]) for name, x in rows.items()}
      for count, rows in results.errors.items()
    },
    'log10_directions_needed': {
      name: np.median(x[layer]) for name, x in results.log_needed.items()
    },
  }


def sentence(config: Config, results: Results | None) -> str:
  if results is None:
    return ''
  error = np.median(results.judged)
  verb = 'imitate' if error <= TARGET else 'do not imitate'
  return f"""Positive random features {verb} these heads: with
    {results.counts[-1]} directions the median relative error of an output is
    {error:.2f}, beside {np.median(results.mean_errors):.2f} for the plain mean
    of all values, and for 10 % the feature budget asks for
    10^{np.median(results.log_needed['positive']):.0f} directions in the median
    head."""


def captions(results: Results | None) -> dict[str, str]:
  if results is None:
    return {}
  return {
    'random_features': 'Random features on the queries and keys of the model: '
    'measured errors against the number of directions, directions that the '
    'feature budget predicts for an error of 10 %, and predicted beside '
    'measured errors as queries and keys are shrunk.',
    'random_features_layers': 'Median relative error of the outputs of the '
    'heads of each layer by random features, orthogonal directions, beside '
    'that of the plain mean of the visible values.',
  }


def figures(config: Config, results: Results | None) -> list[lab.Figure]:
  if results is None:
    return []
  overview, axes = drawing.subplots(1, 3, figsize=(15.5, 5.2))
  _draw_errors(axes[0], results)
  _draw_needed(axes[1], results)
  _draw_check(axes[2], results)
  drawn = overview, _draw_layers(results)
  said = captions(results).items()
  return [
    lab.Figure(name, figure, text)
    for (name, text), figure in zip(said, drawn, strict=True)
  ]


def _quantiles(rows: Any, low: float, high: float) -> list[lab.Estimate]:
  return [lab.Estimate(*np.quantile(row, [0.5, low, high])) for row in rows]


def _draw_errors(axis, results: Results) -> None:
  for name, look in LOOKS.items():
    for projection in PROJECTIONS:
      # Median over draws of each head; a band from head to head.
      heads = [
        np.median(results.errors[r][f'{name}, {projection}'], axis=0)
        for r in results.counts
      ]
      label = f'{name}, {projection}'
      if projection == 'orthogonal':
        bands, line = _quantiles(heads, 0.25, 0.75), {'linestyle': '-'}
        drawing.band(axis, results.counts, bands, label=label, **look | line)
      else:
        values, line = [np.median(x) for x in heads], {'linestyle': '--'}
        axis.plot(results.counts, values, label=label, **look | line)
  plain = np.median(results.mean_errors)
  axis.axhline(plain, color=drawing.BLACK, ls=':', lw=2, label=PLAIN)
  axis.axhline(TARGET, color=drawing.GREY, linewidth=1)
  drawing.note(axis, 'error of 10 %', TARGET, color='#404040')
  axis.set_xscale('log', base=2)
  axis.set(yscale='log', ylim=(TARGET / 30, None))
  axis.set_xticks(results.counts, [str(r) for r in results.counts])
  axis.set(xlabel='random directions R', ylabel='relative error of the output')
  axis.set_title('measured: median, quartiles of heads')
  axis.legend(loc='lower left')


def _draw_needed(axis, results: Results) -> None:
  steps = np.arange(results.mean_errors.shape[0])
  for name, look in LOOKS.items():
    bands = _quantiles(results.log_needed[name], 0, 1)
    drawing.band(axis, steps, bands, label=name, **look)
  height = np.log10(results.num_tokens)
  axis.axhline(height, color=drawing.BLACK, linestyle=':')
  said = f'tokens of the prompt ({results.num_tokens})'
  drawing.note(axis, said, height, color='#404040')
  axis.set_ylim(0, None)
  axis.set(xlabel='layer', ylabel='$\\log_{10}$ of the directions R')
  axis.set_title('predicted: R for an error of 10 %')
  axis.legend(loc='upper right')


def _draw_check(axis, results: Results) -> None:
  found = results.shrunk
  for name, look in LOOKS.items():
    for rows, own, word in (
      (found.predicted, {'marker': ''}, 'predicted'),
      (found.measured, {'linestyle': '', 'mfc': 'white'}, 'measured'),
    ):
      label = f'{name}, {word}'
      axis.plot(found.factors, rows[name], label=label, **look | own)
  limit = budget.LARGEST_VALID_ERROR
  axis.axhspan(limit, 1e9, color=drawing.GREY, alpha=0.15, linewidth=0)
  drawing.note(axis, 'prediction not valid', limit, color='#404040')
  axis.set_yscale('log')
  curves = [*found.measured.values(), *found.predicted.values()]
  axis.set_ylim(max(np.min(curves) / 2, 1e-6), 3e3)
  axis.set_xlabel('queries and keys multiplied by (1: the model)')
  axis.set_ylabel('relative error of the output, r.m.s.')
  axis.set_title(f'the prediction checked, R = {found.num_directions}')
  axis.legend(loc='upper right')


def _draw_layers(results: Results) -> Any:
  """Median error of each layer, a panel for each map, a line for each R."""
  figure, axes = drawing.subplots(
    len(MAPS), 1, figsize=(10, 9), sharex=True, sharey=True
  )
  steps = np.arange(results.mean_errors.shape[0])
  shades = np.linspace(0.6, 0, len(results.counts))
  for axis, name in zip(axes, MAPS, strict=True):
    for index, count in enumerate(results.counts):
      array = results.errors[count][f'{name}, orthogonal']
      look = drawing.look(index) | {'color': str(shades[index])}
      look |= {'linestyle': '-', 'ms': 6, 'lw': 1.3, 'label': f'R = {count}'}
      axis.plot(steps, np.median(array, axis=(0, 2)), **look)
    plain = np.median(results.mean_errors, axis=1)
    axis.plot(steps, plain, ':', color=drawing.BLUE, lw=2.5, label=PLAIN)
    axis.axhline(TARGET, color=drawing.GREY, linewidth=1)
    axis.set(yscale='log', title=f'{name} features, orthogonal directions')
    axis.set_ylabel('relative error')
  look = {'xycoords': 'data', 'ha': 'left'}
  drawing.note(axes[0], 'error of 10 %', TARGET, 0, **look)
  ncols = len(results.counts) + 1
  axes[0].legend(ncols=ncols, loc='lower center', bbox_to_anchor=(0.5, 1.12))
  axes[-1].set_xlabel('layer')
  return figure
