r"""What `experiments.regularized_gradient_descent` measures on one prompt.

All functions take a layer, its feature map and one prompt; values are reduced
to the label, the part that is predicted. One query-side token gives `W_0`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from experiments import pretraining
from iclcl_jax import attention, bounds, dual, features, losses, modified
from iclcl_jax.types import Array, Float


class Layer(NamedTuple):
  """The arguments of attention on one prompt, and what scales its rounding.

  Attributes:
    query: shape `[d_k]`.
    keys: of demonstrations, then of the query. Shape `[N + 1, d_k]`.
    values: their labels. Shape `[N + 1, d_y]`.
    weights: attention weights. Shape `[N + 1]`.
    normaliser: the `D` of the query. Shape `[]`.
    scale: `sum_i a_i |v_i| + |v_q|`, what rounding is relative to. Shape `[]`.
  """

  query: Float[Array, ' d_k']
  keys: Float[Array, 'n d_k']
  values: Float[Array, 'n d_y']
  weights: Float[Array, ' n']
  normaliser: Float[Array, '']
  scale: Float[Array, '']


def layer(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
) -> Layer:
  """Projects a prompt."""
  query, keys, values = pretraining.project(params, tokens)
  values = values[:, -pretraining.LABEL_DIM :]
  scores, _ = attention.scores(phi, query, keys)
  weights = scores / jnp.sum(scores)
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
  """One full-batch step with both learning rates 1, and the layers.

  Attributes:
    strict: regularised layer, `(A - alpha diag A) V`. Shape `[d_y]`.
    printed: the printed one, `(A - alpha I) V`. Shape `[d_y]`.
    ridge: dual model after one step with the ridge. Shape `[d_y]`.
    pair: after one step on the loss with one more pair, which un-learns the
      query's own label. Shape `[d_y]`.
  """

  strict: Float[Array, ' d_y']
  printed: Float[Array, ' d_y']
  ridge: Float[Array, ' d_y']
  pair: Float[Array, ' d_y']


def full_batch(
  phi: features.PositiveFeatures, prompt: Layer, strength: Array
) -> FullBatch:
  """Takes one step by `jax.grad` on each of the two losses.

  References:
    Ren & Liu, arXiv:2310.13220v1, Fig. 10 (one full batch).
  """
  query, keys, values = prompt.query, prompt.keys, prompt.values
  start = dual.zero_shot(phi, keys[-1:], values[-1:])

  def step(keys, values, penalty):
    state = dual.one_step_autodiff(
      phi, start, keys, values, penalty=penalty, learning_rate=1.0
    )
    return dual.predict(phi, state, query, normaliser=prompt.normaliser)

  # The label of the extra pair, -alpha D v_q / |phi(q)|^2, at the test input.
  log_square = bounds.log_diagonal(phi, query[None])[0]
  extra = prompt.normaliser * jnp.exp(-log_square) * values[-1:]
  return FullBatch(
    strict=modified.regularised(strength=strength)(phi, query, keys, values),
    printed=modified.regularised_as_printed(strength=strength)(
      phi, query, keys, values
    ),
    ridge=step(keys[:-1], values[:-1], losses.ridge(strength)),
    pair=step(
      jnp.concatenate([keys[:-1], query[None]]),
      jnp.concatenate([values[:-1], -strength * extra]),
      None,
    ),
  )


class Epochs(NamedTuple):
  """Batch 1 for E epochs with a ridge, at the end of epochs 0, 1, ..., E.

  Attributes:
    measured: prediction by gradient descent. Shape `[E + 1, d_y]`.
    predicted: its closed form. Shape `[E + 1, d_y]`.
  """

  measured: Float[Array, '_ d_y']
  predicted: Float[Array, '_ d_y']


def train(
  phi: features.PositiveFeatures,
  prompt: Layer,
  strength: Array,
  *,
  num_epochs: int,
) -> Epochs:
  r"""Trains with step size `1 / E` and the ridge in every visit.

  Args:
    phi: feature map of the layer.
    prompt: the prompt.
    strength: coefficient of the ridge in ONE visit.
    num_epochs: the number of epochs E.

  Returns:
    Both curves.

  References:
    Ren & Liu, arXiv:2310.13220v1, Fig. 10 (batch 1, E epochs).
  """
  keys, values, size = prompt.keys, prompt.values, prompt.keys.shape[0] - 1

  def predict(state):
    return dual.predict(phi, state, prompt.query, normaliser=prompt.normaliser)

  start = dual.zero_shot(phi, keys[size:], values[size:])
  outputs = dual.train_and_observe(
    phi,
    start,
    keys[:size],
    values[:size],
    optimizer=optax.sgd(1 / num_epochs),
    penalty=losses.ridge(strength),
    num_epochs=num_epochs,
    batch_size=1,
    observe=predict,
  ).observations[size - 1 :: size]
  first = predict(start)[None]
  return Epochs(
    jnp.concatenate([first, outputs]),
    jnp.concatenate([first, closed_form(prompt, strength, num_epochs)]),
  )


def closed_form(
  prompt: Layer, strength: Array, num_epochs: int
) -> Float[Array, 'E d_y']:
  """Predictions at the end of every epoch, without training.

  An epoch is an affine map of the weights, so that the factors after e epochs
  follow from those after one. The last ones come from the library's solution.
  """
  size = prompt.keys.shape[0] - 1
  one, last = (
    modified.regularised_training_weights(
      size, count, learning_rate=1 / num_epochs, strength=strength
    )
    for count in (1, num_epochs)
  )
  powers = one.initial ** jnp.arange(1, num_epochs).astype(one.initial.dtype)
  sums = jnp.cumsum(jnp.concatenate([jnp.ones(1, powers.dtype), powers]))[:-1]
  initial = jnp.append(powers, last.initial)
  factors = jnp.concatenate(
    [
      sums[:, None] * one.demonstrations[None],
      last.demonstrations[None],
    ]
  )
  factors = jnp.concatenate([factors, initial[:, None]], axis=1)
  return (factors * prompt.weights[None]) @ prompt.values
