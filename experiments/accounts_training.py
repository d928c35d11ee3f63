"""Tunes the inner learners of the accounts, and trains layers around them.

`config` is that of `experiments.accounts`. Both happen in one program: the
first half of the runs keeps the predicted projections and learns the gates, the
second half starts from random projections and learns everything.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments.accounts_memories import Memory
from iclcl_jax import tasks
from iclcl_jax.accounts import online_learners as learners
from iclcl_jax.types import Array, Float

CLIP = 1.0
INIT_SCALE = 0.5


class Layer(NamedTuple):
  """A memory between projections; the answers of its heads are summed.

  Attributes:
    queries: Shape `[H, d_x + 1, d_x]`.
    keys: Shape `[H, d_x + 1, d_x]`.
    values: Shape `[H, d_x + 1, 1]`.
    gates: free numbers behind the gates. Shape `[G]`.
  """

  queries: Float[Array, 'H D d_x']
  keys: Float[Array, 'H D d_x']
  values: Float[Array, 'H D 1']
  gates: Float[Array, ' G']


def predicted(memory: Memory, d_x: int) -> Layer:
  """Keys and queries are inputs, values are labels; gates at their start."""
  signs = jnp.asarray(memory.signs, jnp.float32)[:, None, None]
  identity = jnp.eye(d_x + 1, d_x, dtype=jnp.float32)[None]
  label = jnp.zeros((1, d_x + 1, 1), jnp.float32).at[:, -1].set(1)
  gates = jnp.asarray([gate.start for gate in memory.gates], jnp.float32)
  ones = jnp.ones_like(signs)
  return Layer(signs * identity, ones * identity, signs * label, gates)


def mirrored(layer: Layer) -> Layer:
  """Queries and values with the other sign.

  As good on average where inputs are symmetric about 0, and the same layer if
  it is linear in the query.
  """
  return layer._replace(queries=-layer.queries, values=-layer.values)


def random(key, memory: Memory, d_x: int) -> Layer:
  """Random projections."""
  like = predicted(memory, d_x)
  queries, keys, values = (
    INIT_SCALE * jax.random.normal(k, w.shape, w.dtype)
    for k, w in zip(jax.random.split(key, 3), like[:3], strict=True)
  )
  return Layer(queries, keys, values, like.gates)


def answers(
  memory: Memory, layer: Layer, tokens: Float[Array, 'M D'], lengths: Array
) -> Float[Array, ' L']:
  """Answers the query, the last row, from the first rows of the context.

  Args:
    memory: the inner learner.
    layer: projections and gates.
    tokens: rows `(x_i, y_i)`, then `(x_q, 0)`.
    lengths: how many rows are read. Shape `[L]`.
  """
  gates = [
    gate.transform(free)
    for gate, free in zip(memory.gates, layer.gates, strict=True)
  ]

  def head(queries, keys, values):
    context, query = tokens[:-1], tokens[-1] @ queries
    stream = learners.Stream(
      jnp.broadcast_to(query, (len(context), len(query))),
      context @ keys,
      context @ values,
    )
    return memory.answer(stream, gates, lengths)[:, 0]

  return jnp.sum(jax.vmap(head)(*layer[:3]), axis=0)


def draw(key, count: int, size: int, config: Any, scale=1.0):
  """Draws prompts with noisy labels, inputs scaled; equal for equal keys."""

  def one(key):
    key_task, key_prompt, key_noise = jax.random.split(key, 3)
    matrix = jax.random.normal(key_task, (1, config.d_x), jnp.float32)
    prompt = tasks.linear_regression(
      key_prompt, size, matrix, input_fn=lambda *a: scale * tasks.uniform(*a)
    )
    noise = config.noise * jax.random.normal(key_noise, (size,), jnp.float32)
    return prompt._replace(tokens=prompt.tokens.at[:-1, -1].add(noise))

  return jax.vmap(one)(jax.random.split(key, count))


def seed_keys(config: Any, purpose: int) -> Array:
  """A key for each seed and purpose."""
  root = jax.random.fold_in(jax.random.key(config.seed), purpose)
  return jax.random.split(root, config.num_seeds)


def draw_all(config: Any) -> dict[str, Any]:
  """Draws what all learners share.

  Returns:
    `training` batches `[S, P, B, ...]`; prompts `testing` `[S, T, ...]`, and
    shorter ones of all scales, `scaled` `[S, A, T, ...]`; `keys` of the random
    projections `[S]`.
  """
  size, scales = (
    config.num_demonstrations,
    jnp.asarray(config.scales, jnp.float32),
  )
  batches = min(config.num_batches, config.num_steps)
  count = batches * config.batch_size

  def training(key):
    shape = batches, config.batch_size
    return jax.tree.map(
      lambda x: x.reshape(*shape, *x.shape[1:]), draw(key, count, size, config)
    )

  def testing(key):
    count, longest = config.num_test_prompts, max(config.lengths)
    return jax.lax.map(
      # The same prompts at all scales.
      lambda a: draw(jax.random.clone(key), count, longest, config, a),
      scales,
    )

  @harness.compile_quickly
  def everything():
    keys, keys_test, keys_fit = (seed_keys(config, use) for use in range(3))
    tested = jax.lax.map(testing, keys_test)
    # Of other scales only prompts as long as in training are asked for.
    short = jnp.delete(tested.tokens, np.s_[size:-1], axis=3)
    return {
      'training': jax.lax.map(training, keys),
      'testing': jax.tree.map(lambda x: x[:, one], tested),
      'scaled': tested._replace(tokens=short),
      'keys': keys_fit,
    }

  one = config.scales.index(1.0)
  return everything()


def fit(
  memory: Memory, prompts: tasks.RegressionPrompt, keys: Array, config: Any
) -> Layer:
  """Learns gates, then layers.

  Args:
    memory: the inner learner.
    prompts: batches of all seeds. Axes `[S, P, B, ...]`.
    keys: a key for each seed. Shape `[S]`.
    config: settings.

  Returns:
    Layers with leading axes `[K, S]`: predicted ones, whose gates are tuned,
    then, if the memory is that of a layer, trained ones.
  """

  def schedule(count):
    part = count.astype(jnp.float32) / config.num_steps
    return config.learning_rate * (1 + jnp.cos(jnp.pi * part)) / 2

  optimizer = optax.chain(
    optax.clip_by_global_norm(CLIP), optax.adam(schedule, b2=0.99)
  )
  lengths = jnp.asarray([config.num_demonstrations])

  def loss(layer, free, batch):
    fixed = jax.tree.map(jax.lax.stop_gradient, layer)
    gates = layer.gates
    layer = jax.tree.map(lambda a, b: jnp.where(free, a, b), layer, fixed)
    layer = layer._replace(gates=gates)
    guess = jax.vmap(lambda t: answers(memory, layer, t, lengths))(batch.tokens)
    return jnp.mean((guess - batch.target) ** 2)

  def run(layer, free, batches):
    count = batches.tokens.shape[0]

    def step(carry, index):
      layer, state = carry
      batch = jax.tree.map(lambda x: x[index % count], batches)
      slope = jax.grad(loss)(layer, free, batch)
      with jax.numpy_dtype_promotion('standard'):  # Optax needs it.
        updates, state = optimizer.update(slope, state)
      return (optax.apply_updates(layer, updates), state), None

    carry = layer, optimizer.init(layer)
    return jax.lax.scan(step, carry, jnp.arange(config.num_steps))[0][0]

  start = jax.tree.map(
    lambda a, b: jnp.stack([jnp.broadcast_to(a, b.shape), b]),
    predicted(memory, config.d_x),
    jax.vmap(lambda key: random(key, memory, config.d_x))(keys),
  )
  free = jnp.arange(1 + memory.is_layer) == 1
  start = jax.tree.map(lambda w: w[: len(free)], start)
  kinds = jax.vmap(run, in_axes=(0, 0, None))  # Tuned alone, or trained.
  seeds = jax.vmap(kinds, in_axes=(1, None, 0), out_axes=1)
  return seeds(start, free, prompts)
