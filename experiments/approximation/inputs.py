"""Queries, keys and values: of controlled norms, and of the trained layer."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import Config, pretraining
from iclcl_jax import attention, features, tasks
from iclcl_jax.types import Array, Float, PRNGKeyArray

NUM_HELD_OUT = 256
# What may stand in for the kernel of the trained layer.
KERNELS = ('trained_directions', 'fresh_directions', 'exact_softmax')


class Condition(NamedTuple):
  name: str  # Such as 'sd 0.5', or 'trained'.
  queries: np.ndarray  # Shape `[D, n, d_k]`.
  keys: np.ndarray  # Shape `[D, n, d_k]`.
  values: np.ndarray  # Shape `[D, n, d_v]`.
  num_units: int  # Independent ones: draws in order may share a layer.

  def units(self, errors: np.ndarray) -> np.ndarray:
    """Means over the draws `[D, ...]` of each independent unit."""
    shape = (self.num_units, -1, *errors.shape[1:])
    return errors.reshape(shape).mean(axis=1)

  def exact(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns exact log-kernel, attention matrices and outputs, in float64."""
    queries, keys, values = (x.astype(np.float64) for x in self[1:4])
    logits = queries @ keys.swapaxes(1, 2) / keys.shape[2] ** 0.5
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights = weights / weights.sum(axis=2, keepdims=True)
    return logits, weights, weights @ values

  def squared_norms(self, sign: int = 1) -> np.ndarray:
    """`|q + sign k|^2 / sqrt(d_k)` of every pair. Shape `[D, n, n]`."""
    queries, keys = (x.astype(np.float64) for x in self[1:3])
    norms = np.sum(queries**2, 2)[:, :, None] + np.sum(keys**2, 2)[:, None]
    products = queries @ keys.swapaxes(1, 2)
    return np.maximum(norms + 2 * sign * products, 0) / keys.shape[2] ** 0.5


class TrainedLayers(NamedTuple):
  """The papers' layer after training, once for each seed."""

  condition: Condition  # Its queries, keys and values of held-out prompts.
  directions: Float[Array, 'D R d']  # It was trained with these, by draw.
  losses: dict[str, np.ndarray]  # Held out, over predicting 0, `[S]`.


def trained(config: Config, key: PRNGKeyArray, size: int) -> TrainedLayers:
  """Trains the papers' layer, and lets it read prompts of that size."""
  count = config.reference_features
  roots = jax.random.split(key, (config.num_seeds, 4))
  runs = pretraining.init_runs(roots[:, 0], num_features=count)
  fresh = pretraining.init_runs(roots[:, 3], num_features=count).phi
  seeds = pretraining.Seeds(runs, roots[:, 1], roots[:, 2])
  prompts = pretraining.Prompts(size)
  params, _ = pretraining.pretrain(
    seeds,
    prompts,
    num_epochs=config.num_epochs,
    learning_rate=config.learning_rate,
  )
  per_seed = config.num_draws // config.num_seeds
  held_out = prompts.held_out(seeds, max(NUM_HELD_OUT, per_seed))
  losses = jax.jit(jax.vmap(_losses))(params, runs.phi, fresh, held_out)
  tokens = held_out.tokens[:, :per_seed]
  shape = config.num_draws, size + 1, -1
  queries, keys, values = (
    np.asarray(tokens @ x[:, None]).reshape(shape) for x in params
  )
  return TrainedLayers(
    Condition('trained', queries, keys, values, config.num_seeds),
    jnp.repeat(runs.phi.projection, per_seed, axis=0),
    {name: np.asarray(losses[name], np.float64) for name in KERNELS},
  )


def _losses(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  fresh: features.PositiveFeatures,
  prompts: tasks.RegressionPrompt,
) -> dict[str, Any]:
  """Held-out losses of one seed over the loss of predicting zero."""

  def softmax_error(prompt):
    query, keys, values = pretraining.project(params, prompt.tokens)
    output = attention.softmax_attention(query, keys, values)
    error = output[-pretraining.LABEL_DIM :] - prompt.target
    return jnp.mean(error**2)

  losses = (
    pretraining.evaluate(params, phi, prompts),
    pretraining.evaluate(params, fresh, prompts),
    jnp.mean(jax.lax.map(softmax_error, prompts)),
  )
  zero = jnp.mean(prompts.target**2)
  return {k: loss / zero for k, loss in zip(KERNELS, losses, strict=True)}


def conditions(
  config: Config, key: PRNGKeyArray, num_demonstrations: int
) -> tuple[list[Condition], TrainedLayers]:
  """Inputs of controlled norms, then of the trained layer.

  Values are standard normal; queries and keys are the same normal draws,
  scaled to each standard deviation. Consumes `key`.
  """
  key_controlled, key_trained = jax.random.split(key)
  shape = 3, config.num_draws, num_demonstrations + 1, pretraining.TOKEN_DIM
  # One axis: several take XLA seconds to compile, for the same numbers.
  flat = jax.random.normal(key_controlled, (math.prod(shape),), jnp.float32)
  queries, keys, values = np.asarray(flat).reshape(shape)
  controlled = [
    Condition(f'sd {x:g}', x * queries, x * keys, values, config.num_draws)
    for x in map(np.float32, config.standard_deviations)
  ]
  layers = trained(config, key_trained, num_demonstrations)
  return [*controlled, layers.condition], layers
