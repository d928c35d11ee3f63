"""Trains models of in-context learning on random tasks."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments import linear_regression_gd_data as data
from experiments.linear_regression_gd_models import Model

NUM_RECORDS = 10


class Recipe(NamedTuple):
  """How a model is trained.

  Attributes:
    num_steps: number of steps.
    record_every: steps between records.
    batch_size: fresh tasks of a step.
    learning_rate: of Adam: a number, or a schedule of optax.
    clip: largest norm of the gradient.
  """

  num_steps: int
  record_every: int
  batch_size: int
  learning_rate: Any
  clip: float


def cosine(largest: float, num_steps: int) -> Any:
  """A learning rate that rises for a twentieth, then falls to a hundredth."""
  return optax.warmup_cosine_decay_schedule(
    0.0, largest, max(1, num_steps // 20), num_steps, largest / 100
  )


def predictions(model: Model, params, tokens):
  """Answers of one model for many prompts. Shape `[B, 1]`."""
  return jax.vmap(lambda rows: model.answer(params, rows))(tokens)


def mean_loss(answers, targets):
  """Half the mean squared error, the published loss."""
  return jnp.mean((answers - targets) ** 2) / 2


def losses_of_records(model: Model, records, tasks: data.Tasks):
  """Losses of all records of all seeds. Shape `[S, T]`."""

  def one(params):
    answers = predictions(model, params, tasks.tokens)
    return mean_loss(answers, tasks.targets)

  return jax.lax.map(lambda seed: jax.lax.map(one, seed), records)


class Trained(NamedTuple):
  """What a training leaves.

  Attributes:
    records: weights with leading axes of seeds and records, the first before
      training.
    steps: of the records.
    seconds: of training all seeds, compiling excluded; None if not waited for.
  """

  records: Any
  steps: np.ndarray
  seconds: float | None


def train(
  config,
  model: Model,
  source: data.Source,
  recipe: Recipe,
  label: int,
  initial: Any = None,
) -> Trained:
  """Trains all seeds, and keeps the weights every `record_every` steps.

  Args:
    config: settings: root of random numbers, number of seeds.
    model: what is trained.
    source: its tasks.
    recipe: how.
    label: sets the random numbers of this training apart.
    initial: weights of every seed, leading axis `S`; None to draw them.

  Returns:
    The records.
  """
  seeds = jnp.arange(config.num_seeds)

  def one_seed(args):
    seed, initial = args
    root = jax.random.fold_in(jax.random.key(config.seed), seed)
    keys = jax.random.split(jax.random.fold_in(root, label))
    params = model.init(keys[0]) if initial is None else initial
    return _train_one(keys[1], params, model, source, recipe)

  run: Any = harness.compile_quickly(lambda *args: jax.lax.map(one_seed, args))
  run = run.lower(seeds, initial).compile()
  start = time.perf_counter()
  records = jax.block_until_ready(run(seeds, initial))
  seconds = time.perf_counter() - start
  steps = np.arange(0, recipe.num_steps + 1, recipe.record_every)
  return Trained(records, steps, seconds)


def _train_one(key, params, model: Model, source: data.Source, recipe: Recipe):
  optimizer = optax.chain(
    optax.clip_by_global_norm(recipe.clip),
    optax.adam(recipe.learning_rate, b1=0.9, b2=0.98),
  )

  def loss(params, tasks):
    answers = predictions(model, params, tasks.tokens)
    return mean_loss(answers, tasks.targets)

  def step(carry, _):
    params, state, lanes = carry
    lanes, tasks = data.draw_lanes(lanes, source)
    gradient = jax.grad(loss)(params, tasks)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state, lanes), None

  def block(carry, _):
    carry, _ = jax.lax.scan(step, carry, length=recipe.record_every)
    return carry, carry[0]

  lanes = data.init_lanes(key, recipe.batch_size, source)
  carry = params, optimizer.init(params), lanes
  length = recipe.num_steps // recipe.record_every
  _, records = jax.lax.scan(block, carry, length=length)
  return jax.tree.map(
    lambda w, r: jnp.concatenate([w[None], r]), params, records
  )
