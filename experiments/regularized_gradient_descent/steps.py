"""Is the regularised layer one gradient step on the loss with a ridge?

The strict form `(A - alpha diag A) V` is; the printed form `(A - alpha I) V` is
one step on another loss, with one more pair that un-learns the query's own
label. Both learning rates are 1, the batch is the whole prompt, and the query's
token gives `W_0`. Values are reduced to the label, the part that is predicted.

References:
  Ren & Liu, arXiv:2310.13220v1, Fig. 10 (one full batch).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing, pretraining
from iclcl_jax import attention, bounds, dual, features, losses, modified
from iclcl_jax.types import Array, Float

SOURCE = 'arXiv:2310.13220v1, Fig. 10'
statements = functools.partial(lab.statements, 'regularized_gradient_descent/')
EXACT = 1e-10


class Layer(NamedTuple):
  """The arguments of attention on one prompt, and what scales its rounding."""

  query: Float[Array, ' d_k']
  keys: Float[Array, 'n d_k']  # Of demonstrations, then of the query.
  values: Float[Array, 'n d_y']  # Their labels. Shape `[N + 1, d_y]`.
  weights: Float[Array, ' n']  # Attention weights. Shape `[N + 1]`.
  normaliser: Float[Array, '']  # The `D` of the query.
  scale: Float[Array, '']  # `sum_i a_i |v_i| + |v_q|`, that of rounding.


def layer(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
) -> Layer:
  query, keys, values = pretraining.project(params, tokens)
  values = values[:, -pretraining.LABEL_DIM :]
  weights = attention.weights(phi, query, keys)
  sizes = jnp.sum(jnp.abs(values), axis=1)
  return Layer(
    query,
    keys,
    values,
    weights,
    dual.normaliser(phi, keys, query),
    weights @ sizes + sizes[-1],
  )


class FullBatch(NamedTuple):
  """One full-batch step, and the layers. Shapes `[d_y]`."""

  strict: Any  # Regularised layer, `(A - alpha diag A) V`.
  printed: Any  # The printed one, `(A - alpha I) V`.
  ridge: Any  # Dual model after one step with the ridge.
  pair: Any  # After one step on the loss with one more pair.


def full_batch(
  phi: features.PositiveFeatures, prompt: Layer, strength: Array
) -> FullBatch:
  """Takes one step by `jax.grad` on each of the two losses."""
  query, keys, values = prompt.query, prompt.keys, prompt.values
  start = dual.zero_shot(phi, keys[-1:], values[-1:])

  def step(keys, values, penalty):
    state = dual.one_step_autodiff(
      phi, start, keys, values, penalty=penalty, learning_rate=1.0
    )
    return dual.predict(phi, state, query, normaliser=prompt.normaliser)

  strict = modified.regularised(strength=strength)
  printed = modified.regularised_as_printed(strength=strength)
  # The label of the extra pair, -alpha D v_q / |phi(q)|^2, at the test input.
  log_square = bounds.log_diagonal(phi, query[None])[0]
  extra = prompt.normaliser * jnp.exp(-log_square) * values[-1:]
  return FullBatch(
    strict=strict(phi, query, keys, values),
    printed=printed(phi, query, keys, values),
    ridge=step(keys[:-1], values[:-1], losses.ridge(strength)),
    pair=step(
      jnp.concatenate([keys[:-1], query[None]]),
      jnp.concatenate([values[:-1], -strength * extra]),
      None,
    ),
  )


class Results(NamedTuple):
  """What one step does on all prompts, leading axes `[S, P]`."""

  layers: Layer  # The prompts as the layers see them.
  steps: FullBatch  # With an axis of strengths. Shapes `[S, P, K, d_y]`.
  trained: pretraining.Trained


@lab.once
def measure(config: Config) -> Results:
  """Pretrains the layers, and takes one step on their held-out prompts."""
  seeds = pretraining.init_seeds(
    config.seed, config.num_seeds, num_features=config.num_features
  )
  trained = pretraining.trained(config, seeds, config.num_demonstrations)

  def one(phi, prompt):
    over = jax.vmap(full_batch, (None, None, 0))
    return prompt, over(phi, prompt, jnp.array(config.alphas))

  layers, steps = on_prompts(one, trained)
  return Results(layers, steps, trained)


def on_prompts(fn: Callable[..., Any], trained: pretraining.Trained) -> Any:
  """Maps `fn(phi, prompt)` over all prompts in float64. Axes `[S, P]`."""

  def of_prompt(params, phi, tokens):
    return fn(phi, layer(params, phi, tokens))

  return pretraining.over_prompts(of_prompt, trained, 'float64')


def residuals(results: Results) -> dict[str, np.ndarray]:
  """Largest distances over the scale of rounding, `[S, P, K]`."""
  scale, step = results.layers.scale[:, :, None], results.steps
  pairs = {
    'strict_ridge': (step.strict, step.ridge),
    'printed_ridge': (step.printed, step.ridge),
    'printed_pair': (step.printed, step.pair),
  }
  apart = {k: np.abs(a - b) for k, (a, b) in pairs.items()}
  return {k: np.max(x, axis=3) / scale for k, x in apart.items()}


def claims(config: Config, results: Results) -> list[lab.Claim]:
  equals = 'one full batch with both learning rates 1 equals the regularised'
  largest = 'largest residual over prompts, seeds and alpha, float64'
  return statements(
    f"""
    strict_ridge [{SOURCE}] {equals} layer: strict form (A - alpha diag A) V |
      {largest}
    printed_ridge [{SOURCE}] {equals} layer: printed form (A - alpha I) V |
      {largest}
    printed_pair [{SOURCE}] the printed form is exact for another loss: one more
      pair un-learns the query's own label at the test input | {largest}
    """,
    {k: lab.at_most(EXACT, x.max()) for k, x in residuals(results).items()},
  )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axis = drawing.subplots(figsize=(9, 5.8))
  found = residuals(results)
  labels = {
    'strict_ridge': 'strict layer, loss with a ridge',
    'printed_pair': 'printed layer, loss with one more pair',
    'printed_ridge': 'printed layer, loss with a ridge',
  }
  x, floor = np.arange(len(config.alphas)), np.finfo(float).eps / 4
  for k, (name, label) in enumerate(labels.items()):
    each = np.maximum(found[name].max(axis=1), floor)  # [S, K]
    axis.plot(
      x + 0.15 * (k - 1),
      each.T,
      **drawing.look(k) | {'linestyle': 'none', 'mfc': 'none', 'ms': 8},
      label=[label] + [None] * (config.num_seeds - 1),
    )
  axis.axhline(EXACT, color=drawing.GREY, linestyle='--')
  axis.text(x[-1] + 0.3, EXACT * 1.6, 'tolerance of an identity', ha='right')
  axis.set(yscale='log', xlabel='alpha')
  axis.set_xticks(x, [f'{alpha:g}' for alpha in config.alphas])
  axis.set_ylabel('residual, relative to the scale of rounding')
  axis.set_title('One full batch, both learning rates 1')
  figure.legend(loc='outside lower center', ncols=2)
  largest = {name: f'{x.max():.1e}' for name, x in found.items()}
  caption = f"""Largest residual between a regularised layer and its dual model
    after ONE full-batch gradient step in float64, one marker for each of
    {config.num_seeds} pretrained layers (largest of {config.num_test_prompts}
    held-out prompts; at least {floor:.0e}). Largest of all:
    {largest['strict_ridge']} for the strict form and the ridge,
    {largest['printed_ridge']} for the printed form and the ridge,
    {largest['printed_pair']} for the printed form and a loss with one more
    pair, which un-learns the query's own label at the test input."""
  return [lab.Figure('exact', figure, caption)]


def summary(config: Config, results: Results) -> dict[str, Any]:
  meaning = (
    'Single-task pretraining: the loss measures memorisation of one task '
    'matrix. No claim here depends on it.'
  )
  if config.multi_task:
    meaning = 'A fresh task matrix for every prompt.'
  loss, zero = results.trained.losses[-1]
  return {
    'num_seeds': config.num_seeds,
    'residuals': {x: float(y.max()) for x, y in residuals(results).items()},
    'pretraining_loss_over_zero_predictor': float(np.mean(loss / zero)),
    'pretraining_meaning': meaning,
  }
