"""Queries, keys and values: of controlled norms, and of the trained layer."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pretraining
from experiments.approximation_measure import Condition
from iclcl_jax import attention, features
from iclcl_jax.types import Array, Float, PRNGKeyArray

NUM_HELD_OUT = 256
TOKENS_PER_EPOCH = 1024
# What may stand in for the kernel of the trained layer.
KERNELS = ('trained_directions', 'fresh_directions', 'exact_softmax')


def controlled(
  key: PRNGKeyArray,
  standard_deviations: Sequence[float],
  num_draws: int,
  num_tokens: int,
) -> list[Condition]:
  """Draws standard normal values, and normal queries and keys of each sd.

  Args:
    key: consumed.
    standard_deviations: of the entries of queries and keys.
    num_draws: number of draws `D`.
    num_tokens: number of tokens `n`.

  Returns:
    A condition for each standard deviation: the same draws, scaled.
  """
  shape = 3, num_draws, num_tokens, pretraining.TOKEN_DIM
  # One axis: several take XLA seconds to compile, for the same numbers.
  flat = jax.random.normal(key, (math.prod(shape),), jnp.float32)
  draws = np.asarray(flat).reshape(shape)
  return [
    Condition(
      name=f'sd {sd:g}',
      queries=np.float32(sd) * draws[0],
      keys=np.float32(sd) * draws[1],
      values=draws[2],
      num_units=num_draws,
    )
    for sd in standard_deviations
  ]


class TrainedLayers(NamedTuple):
  """The papers' layer after training, once for each seed.

  Attributes:
    condition: its queries, keys and values of held-out prompts.
    directions: the directions it was trained with, for every draw. Shape
      `[D, R, d]`.
    losses: held-out loss of each seed over the loss of predicting zero, by
      what stands in for the kernel. Shapes `[S]`.
  """

  condition: Condition
  directions: Float[Array, 'D R d']
  losses: dict[str, np.ndarray]


def trained(
  key: PRNGKeyArray,
  num_demonstrations: int,
  *,
  num_draws: int,
  num_seeds: int,
  num_features: int,
  num_epochs: int,
  learning_rate: float,
) -> TrainedLayers:
  """Trains the papers' layer, and lets it read held-out prompts.

  Args:
    key: consumed.
    num_demonstrations: demonstrations `N` of a prompt; the query is one more.
    num_draws: held-out prompts of all seeds, a multiple of `num_seeds`.
    num_seeds: independent layers `S`, each with its own task and directions.
    num_features: random features `R` of the layer.
    num_epochs: epochs of 1024 tokens.
    learning_rate: of SGD, one prompt a step.

  Returns:
    The `TrainedLayers`.

  Raises:
    ValueError: if `num_draws` is no multiple of `num_seeds`.
  """
  if num_draws % num_seeds:
    raise ValueError(
      f'num_draws is {num_draws} with num_seeds={num_seeds}; expected a '
      'multiple of it, so that every seed has as many held-out prompts.'
    )
  num_tokens = num_demonstrations + 1
  roots = jax.random.split(key, (num_seeds, 4))
  runs = _init(roots[:, 0], num_features)
  held_out, params, losses = _train_and_test(
    roots[:, 1:3],
    runs,
    _init(roots[:, 3], num_features).phi,
    num_demonstrations,
    num_epochs * (TOKENS_PER_EPOCH // num_tokens),
    max(NUM_HELD_OUT, num_draws // num_seeds),
    learning_rate,
  )
  per_seed = num_draws // num_seeds
  tokens = held_out.tokens[:, :per_seed]
  queries, keys, values = (
    np.asarray(tokens @ weights[:, None]).reshape(num_draws, num_tokens, -1)
    for weights in params
  )
  return TrainedLayers(
    condition=Condition(
      name='trained',
      queries=queries,
      keys=keys,
      values=values,
      num_units=num_seeds,
    ),
    directions=jnp.repeat(runs.phi.projection, per_seed, axis=0),
    losses={name: np.asarray(losses[name], np.float64) for name in KERNELS},
  )


@functools.partial(jax.jit, static_argnums=1)
def _init(keys: PRNGKeyArray, num_features: int) -> pretraining.Run:
  init = functools.partial(pretraining.init_run, num_features=num_features)
  return jax.lax.map(init, keys)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _train_and_test(
  keys, runs, fresh, num_demonstrations, num_steps, num_held_out, learning_rate
):
  """Trains all seeds; returns held-out prompts, layers and losses."""

  def draw(keys, num_prompts):
    return jax.lax.map(
      lambda args: pretraining.draw_prompts(
        args[0], jnp.arange(num_prompts), lambda _: args[1], num_demonstrations
      ),
      (keys, runs.task_matrix),
    )

  train = functools.partial(pretraining.train, learning_rate=learning_rate)
  prompts = draw(keys[:, 0], num_steps)
  params, _ = jax.vmap(train)(runs.params, runs.phi, prompts)
  held_out = draw(keys[:, 1], num_held_out)
  losses = jax.vmap(_losses)(params, runs.phi, fresh, held_out)
  return held_out, params, losses


def _losses(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  fresh: features.PositiveFeatures,
  prompts: pretraining.tasks.RegressionPrompt,
) -> dict[str, Array]:
  """Held-out losses of one seed over the loss of predicting zero."""

  def softmax_error(prompt):
    query, keys, values = pretraining.project(params, prompt.tokens)
    output = attention.softmax_attention(query, keys, values)
    error = output[-pretraining.LABEL_DIM :] - prompt.target
    return jnp.mean(error**2)

  zero = jnp.mean(prompts.target**2)
  losses = {
    'trained_directions': pretraining.evaluate(params, phi, prompts),
    'fresh_directions': pretraining.evaluate(params, fresh, prompts),
    'exact_softmax': jnp.mean(jax.lax.map(softmax_error, prompts)),
  }
  return {name: loss / zero for name, loss in losses.items()}
