"""What `experiments.equivalence` measures on one prompt, as pure functions.

All take a layer, its feature map and one prompt, and compute in the dtype of
these; `for_all` applies them to the prompts of all seeds.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import harness, pretraining
from iclcl_jax import (
  attention,
  dual,
  equivalence,
  features,
  kernels,
  precision,
  projections,
)
from iclcl_jax.types import Array, FeatureMap, Float, Kernel

# Of `Descent.curve_residual` in float64.
CURVE_TOLERANCE = 1e-10


class OneStep(NamedTuple):
  """Attention and ONE gradient step on one prompt.

  Attributes:
    attention: predicted label of the layer. Shape `[d_y]`.
    dual: predicted label of the dual model. Shape `[d_y]`.
    residual: largest distance between attention, closed form and autodiff, see
      `equivalence.Residuals`. Shape `[]`.
    softmax_residual: the same for the exact softmax kernel with the same
      queries, keys and values. Shape `[]`.
  """

  attention: Float[Array, ' d_y']
  dual: Float[Array, ' d_y']
  residual: Float[Array, '']
  softmax_residual: Float[Array, '']


class Descent(NamedTuple):
  """Many gradient steps on one prompt, batch 1, `T` visits in all.

  Attributes:
    dual: predicted label after the last visit. Shape `[d_y]`.
    residual: distance to the attention output then, relative to the scale of
      `equivalence.Residuals`. Shape `[]`.
    distances: distance to the attention output after 0, 1, ..., T visits.
      Shape `[T + 1]`.
    predicted: its closed form. Shape `[T + 1]`.
    curve_residual: largest difference of these two, relative to the same
      scale. Shape `[]`.
  """

  dual: Float[Array, ' d_y']
  residual: Float[Array, '']
  distances: Float[Array, ' _']
  predicted: Float[Array, ' _']
  curve_residual: Float[Array, '']


def for_all(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Applies `fn(params, phi, tokens)` to the prompts of all seeds.

  Args:
    fn: a function of one layer, its features and one prompt.

  Returns:
    The function of layers with a leading axis of seeds `[S, ...]` and prompts
    `[S, P, n, d_model]`. It holds one prompt of every seed at a time: `vmap`
    over seeds inside `lax.map` over prompts.
  """

  def swap(tree):
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)

  def mapped(params, phi, tokens):
    def row(tokens):
      return jax.vmap(fn)(params, phi, tokens)

    return swap(jax.lax.map(row, swap(tokens)))

  return mapped


def one_step(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
) -> OneStep:
  """Compares the layer with one full-batch step, see `OneStep`."""
  arguments = pretraining.project(params, tokens)
  result = equivalence.residuals(phi, *arguments, num_query_tokens=1)
  softmax = equivalence.residuals(
    kernels.ExponentialKernel(), *arguments, num_query_tokens=1
  )
  label = slice(-pretraining.LABEL_DIM, None)
  return OneStep(
    attention=result.attention[label],
    dual=result.autodiff[label],
    residual=result.residual,
    softmax_residual=softmax.residual,
  )


def descend(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
  *,
  num_epochs: int,
) -> Descent:
  r"""Trains the dual model by batch 1 for E epochs, step size `1 / E`.

  The gradient is constant, so the distance to the attention output has a
  closed form: with :math:`n_i` visits to demonstration `i` so far and
  attention weights :math:`a_i`,

  .. math:: |f(q) - h| = \Bigl|\sum_i (1 - n_i / E)\, a_i v_i\Bigr|,

  which is 0 after the last visit, falls linearly over whole epochs, and need
  not fall in every step.

  Args:
    params: the layer.
    phi: its feature map.
    tokens: a prompt. Shape `[n, d_model]`, demonstrations first.
    num_epochs: the number of epochs E.

  Returns:
    A `Descent`.

  References:
    Ren & Liu, arXiv:2310.13220v1, section 5 (batch 1, E epochs, a loss rate
    E times the step size).
  """
  query, keys, values = pretraining.project(params, tokens)
  size = keys.shape[0] - 1
  normaliser = dual.normaliser(phi, keys, query)

  def predict(state):
    return dual.predict(phi, state, query, normaliser=normaliser)

  start = dual.zero_shot(phi, keys[size:], values[size:])
  trajectory = dual.train_and_observe(
    phi,
    start,
    keys[:size],
    values[:size],
    optimizer=optax.sgd(1 / num_epochs),
    num_epochs=num_epochs,
    batch_size=1,
    observe=predict,
  )
  outputs = jnp.concatenate([predict(start)[None], trajectory.observations])
  scores, _ = attention.scores(phi, query, keys)
  weights = scores / jnp.sum(scores)
  target = attention.kernel_attention(phi, query, keys, values)
  visits = (
    jnp.arange(num_epochs * size + 1)[:, None]
    + jnp.arange(size - 1, -1, -1)[None]
  ) // size
  rest = (1 - visits / num_epochs).astype(keys.dtype)
  predicted = (rest * weights[None, :size]) @ values[:size]
  # Positive features: every weight is its own absolute value.
  scale = jnp.max(weights @ (jnp.abs(values) + jnp.abs(target)[None]))
  distances = jnp.linalg.norm(outputs - target[None], axis=1)
  closed_form = jnp.linalg.norm(predicted, axis=1)
  return Descent(
    dual=outputs[-1, -pretraining.LABEL_DIM :],
    residual=jnp.max(jnp.abs(outputs[-1] - target)) / scale,
    distances=distances,
    predicted=closed_form,
    curve_residual=jnp.max(jnp.abs(distances - closed_form)) / scale,
  )


def draw_projections(key: Array, num_features: int) -> dict[str, Array]:
  """Draws the coupled projections of the certificates, in float32."""
  draws = {
    'orthogonal': projections.orthogonal,
    'simplex': projections.simplex,
    'simplex_plus': projections.simplex_plus,
  }
  # One key: they are compared, never combined.
  return {
    name: draw(jax.random.clone(key), num_features, pretraining.TOKEN_DIM)
    for name, draw in draws.items()
  }


def certified_maps(
  drawn: Mapping[str, Array],
) -> dict[str, FeatureMap | Kernel]:
  """Every feature map, and the exact softmax kernel, by name."""
  maps: dict[str, FeatureMap | Kernel] = {
    f'positive, {name}': features.PositiveFeatures(projection)
    for name, projection in drawn.items()
  }
  orthogonal = drawn['orthogonal']
  return maps | {
    'hyperbolic, orthogonal': features.HyperbolicFeatures(orthogonal),
    'trigonometric, orthogonal': features.TrigonometricFeatures(orthogonal),
    'elu + 1': features.EluPlusOneFeatures(),
    'Taylor, order 2': features.TaylorFeatures(order=2),
    'identity': features.IdentityFeatures(),
    'exact softmax': kernels.ExponentialKernel(),
  }


# Their normaliser may vanish: its condition decides whether they can hold.
SIGNED_MAPS = ('trigonometric, orthogonal', 'Taylor, order 2', 'identity')


@functools.cache
def _residuals() -> Callable[..., equivalence.Residuals]:
  return harness.compile_quickly(
    equivalence.residuals, static_argnames='num_query_tokens'
  )


def certify(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'n d_k'],
  values: Float[Array, 'n d_v'],
) -> equivalence.Certificate:
  """`equivalence.verify` with one query-side token, compiled once a map.

  Args:
    phi: feature map or kernel.
    query: the test input. Shape `[d_k]`.
    keys: keys of demonstrations, then of the query. Shape `[n, d_k]`.
    values: their values. Shape `[n, d_v]`.

  Returns:
    The certificate.
  """

  def compiled(unused_fn):
    # The same function; an argument `phi` lets projections share the code.
    return precision.highest(
      functools.partial(_residuals(), phi, num_query_tokens=1)
    )

  return equivalence.verify(
    phi,
    query,
    keys,
    values,
    num_query_tokens=1,
    arithmetic=dataclasses.replace(precision.HIGHEST, transform=compiled),
  )
