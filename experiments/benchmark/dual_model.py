"""How fast is a step on very many demonstrations, and training a layer?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import peers, timing
from experiments.benchmark.timing import Goal, Rows, compile_call
from experiments.lab import pretraining
from iclcl_jax import dual

LEARNING_RATE = 0.003
NUM_DEMONSTRATIONS_OF_PROMPT = 15


def state(config: Any) -> Rows:
  """The dual model's weights after one step on very many demonstrations."""
  phi = timing.feature_map(config)
  shape = 2, config.num_demonstrations, config.dim
  key = jax.random.key(config.seed)
  keys, values = jax.random.normal(key, shape, jnp.float32) / 2

  def step(keys, values):
    state = dual.zero_shot(phi, keys[:0], values[:0])
    return dual.stream_step(phi, state, keys, values, chunk_size=2048)

  compiled = compile_call(step, keys, values)
  name = f'dual state of {config.num_demonstrations} demonstrations'
  calls = {name: compiled.call, 'matmul': timing.matmul(config)}
  seconds = timing.measure(calls, config.repetitions)
  operations = 4 * config.num_demonstrations * config.num_features * config.dim
  memory = f'{name}: MiB besides the inputs'
  goals = [
    Goal(memory, compiled.temporary_mib, 1024, False),
    timing.rate_goal(config, seconds, name, operations, 0.5),
  ]
  return Rows('dual state', goals, seconds, {name: operations})


def training(config: Any) -> Rows:
  """Training steps of the papers' layer: one seed, many, and the peer."""

  def draw(key):
    run = pretraining.init_run(key, num_features=config.layer_features)
    prompts = pretraining.draw_prompts(
      key,
      jnp.arange(config.num_steps),
      lambda _: run.task_matrix,
      NUM_DEMONSTRATIONS_OF_PROMPT,
    )
    return run.params, run.phi, prompts

  def train(params, phi, prompts):
    return pretraining.train(params, phi, prompts, LEARNING_RATE)

  keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
  many = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
  one = jax.tree.map(lambda array: array[0], many)
  times = config.num_seeds
  together, apart = f'{times} seeds by vmap', f'one seed, {times} times'
  peer = 'torch, eager loop'
  calls: timing.Calls = {
    apart: timing.repeated(compile_call(train, *one).call, times),
    together: compile_call(jax.vmap(train), *many).call,
    peer: peer_loop(*one),
    'matmul': timing.matmul(config),
  }
  seconds = timing.measure(calls, config.repetitions)
  speed = timing.ratio(seconds, peer, apart)
  cost = times * seconds[together] / seconds[apart]
  goals = [
    Goal(
      f'one seed: speed / speed of {peer}',
      None if speed is None else times * speed,
      15,
    ),
    Goal(f'{together}: time / time of one seed', cost, times, False),
  ]
  return Rows(f'{config.num_steps} training steps', goals, seconds, {})


def peer_loop(params, phi, prompts) -> timing.Call | None:
  """The same steps by the peer."""
  return peers.training_loop(
    [np.asarray(array) for array in params],
    np.asarray(phi.projection),
    np.asarray(prompts.tokens),
    np.asarray(prompts.target),
    LEARNING_RATE,
  )
