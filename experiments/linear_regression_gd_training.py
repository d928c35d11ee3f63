"""Trains self-attention layers on random linear tasks."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments import linear_regression_gd_data as data
from iclcl_jax.accounts import linear_regression_gd as account

INIT_VARIANCE = 0.002


class Architecture(NamedTuple):
  """What is trained.

  Attributes:
    weights_fn: linear or softmax weights.
    num_heads: number of heads.
    num_layers: number of layers.
    looped: 1 if all layers share their weights, else the number of layers.
  """

  weights_fn: Callable[..., Any]
  num_heads: int
  num_layers: int
  num_distinct: int


LINEAR = Architecture(account.linear_weights, 1, 1, 1)
SOFTMAX_1 = Architecture(account.softmax_weights, 1, 1, 1)
SOFTMAX_2 = Architecture(account.softmax_weights, 2, 1, 1)


def init(key, architecture: Architecture, d_model: int):
  """Small truncated normal weights, by distinct layer."""
  shape = (architecture.num_distinct, architecture.num_heads, d_model, d_model)
  scale = (INIT_VARIANCE / architecture.num_layers / d_model) ** 0.5
  return account.SelfAttention(
    *(
      scale * jax.random.truncated_normal(k, -2, 2, shape, jnp.float32)
      for k in jax.random.split(key, 4)
    )
  )


def unroll(layers, architecture: Architecture):
  """All layers, shared ones repeated."""
  times = architecture.num_layers // architecture.num_distinct
  return jax.tree.map(lambda w: jnp.concatenate([w] * times), layers)


def predictions(layers, architecture: Architecture, tokens):
  """Answers of one set of layers for many prompts. Shape `[B, 1]`."""
  layers = unroll(layers, architecture)

  def answer(rows):
    return account.predict(layers, rows, weights_fn=architecture.weights_fn)

  return jax.vmap(answer)(tokens)


def mean_loss(answers, targets):
  """Half the mean squared error, the published loss."""
  return jnp.mean((answers - targets) ** 2) / 2


def train(config, architecture: Architecture, num_steps: int, label: int):
  """Trains all seeds at once, and keeps the weights every `record_every`.

  Args:
    config: settings.
    architecture: what is trained.
    num_steps: steps of training.
    label: sets the random numbers of this training apart.

  Returns:
    Weights with leading axes of seeds and records, the first before training;
    the steps of the records; seconds, compiling excluded.
  """
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.adam(config.learning_rate, b1=0.9, b2=0.98),
  )
  d_model = config.d_x + 1

  def loss(layers, tasks):
    answers = predictions(layers, architecture, tasks.tokens)
    return mean_loss(answers, tasks.targets)

  def step(carry, _):
    layers, state, lanes = carry
    lanes, tasks = data.draw_lanes(lanes, config)
    gradient = jax.grad(loss)(layers, tasks)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(layers, updates), state, lanes), None

  def block(carry, _):
    carry, _ = jax.lax.scan(step, carry, length=config.record_every)
    return carry, carry[0]

  def one_seed(seed):
    root = jax.random.fold_in(jax.random.key(config.seed), seed)
    keys = jax.random.split(jax.random.fold_in(root, label))
    layers = init(keys[0], architecture, d_model)
    carry = layers, optimizer.init(layers), data.init_lanes(keys[1], config)
    length = num_steps // config.record_every
    _, records = jax.lax.scan(block, carry, length=length)
    return jax.tree.map(
      lambda w, r: jnp.concatenate([w[None], r]), layers, records
    )

  seeds = jnp.arange(config.num_seeds)
  run: Any = harness.compile_quickly(lambda seeds: jax.lax.map(one_seed, seeds))
  run = run.lower(seeds).compile()
  start = time.perf_counter()
  records = jax.block_until_ready(run(seeds))
  seconds = time.perf_counter() - start
  steps = np.arange(0, num_steps + 1, config.record_every)
  return records, steps, seconds
