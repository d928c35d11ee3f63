"""Tasks, self-attention layers, and their training, for softmax regression."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from iclcl_jax.accounts import softmax_regression as account

FRAMES = 'in place', 'held out'
SHARPNESS = 2.0  # Of the targets of the frame 'held out'.


class Tasks(NamedTuple):
  """Softmax regressions, and the words on which they are judged."""

  posed: account.Problem
  queries: Any
  answer: Any


class Layer(NamedTuple):
  """An attention layer without its parameters.

  Attributes:
    normalise: scores `[M, n]` to attention weights.
    signs: initial output weight of each head; a head of sign 0 stays silent.
  """

  normalise: Callable[[Any], Any]
  signs: tuple[float, ...]


LAYERS = {
  'linear': Layer(lambda scores: scores / scores.shape[1], (1.0,)),
  'softmax, one head': Layer(lambda s: jax.nn.softmax(s, axis=1), (1.0,)),
  'softmax, two heads': Layer(lambda s: jax.nn.softmax(s, axis=1), (1.0, -1.0)),
}


def draw(key: Any, num_words: int, width: int, frame: Any) -> Tasks:
  """Draws one task.

  Args:
    key: consumed.
    num_words: words of a document.
    width: of a word.
    frame: 0 for a target that has nothing to do with its document, judged in
      place; 1 for a target that a hidden vector makes, judged on a new
      document with the same vector.

  Returns:
    The task.
  """
  keys = jax.random.split(key, 4)
  shape = num_words, width
  document = jax.random.normal(keys[0], shape) / width**0.5
  other = jax.random.normal(keys[1], shape) / width**0.5
  hidden = SHARPNESS * jax.random.normal(keys[2], (width,))
  waits = jax.random.exponential(keys[3], (num_words,))
  free = waits / jnp.sum(waits)  # Uniform on the simplex.
  made, answer = (jax.nn.softmax(x @ hidden) for x in (document, other))
  target = jnp.where(frame == 0, free, made)
  return Tasks(
    account.Problem(document, target),
    jnp.where(frame == 0, document, other),
    jnp.where(frame == 0, free, answer),
  )


def unit_rate(num_words: int, width: int) -> float:
  """The step that is best where the prediction is nearly uniform."""
  return num_words**2 * width / (num_words + width)


def initialise(key: Any, layer: Layer, width: int) -> dict[str, Any]:
  """Draws parameters: each head has queries, keys and an output weight."""
  keys = jax.random.split(key)
  shape = len(layer.signs), width, width
  return {
    'queries': jax.random.normal(keys[0], shape) / width**0.5,
    'keys': jax.random.normal(keys[1], shape) / width**0.5,
    'outputs': jnp.asarray(layer.signs, float),
  }


def answer(layer: Layer, params: Any, posed: account.Problem, queries: Any):
  """Logits of the queries; values are the targets, less their mean, alone."""
  num_words, width = posed.document.shape
  values = unit_rate(num_words, width) * (posed.target - 1 / num_words)

  def head(into_queries, into_keys, output):
    scores = (queries @ into_queries) @ (posed.document @ into_keys).T
    return output * (layer.normalise(scores) @ values)

  heads = params['queries'], params['keys'], params['outputs']
  return jnp.sum(jax.vmap(head)(*heads), axis=0)


def train(config: Any, name: str, size: tuple[int, int], rates: Any) -> Any:
  """Trains a layer on fresh tasks, for all frames and seeds at once.

  Args:
    config: of the experiment.
    name: of the layer.
    size: words of a document and their width.
    rates: step size of gradient descent for each frame.

  Returns:
    Metrics by name, each `[frames, seeds, records]`.
  """
  layer = LAYERS[name]
  schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
  batch = max(1, config.words_per_batch // size[0])

  def objective(params, tasks):
    def one(task):
      logits = answer(layer, params, task.posed, task.queries)
      error = jax.nn.softmax(logits) - task.answer
      start = task.answer - 1 / size[0]
      return jnp.sum(error**2), jnp.sum(start**2)

    ours, start = jax.vmap(one)(tasks)
    return jnp.mean(ours) / jnp.mean(start)

  def tasks_of(key, count, frame):
    keys = jax.random.split(key, count)
    return jax.vmap(lambda k: draw(k, *size, frame))(keys)

  def one_run(frame, rate, key):
    key_start, key_tasks, key_test = jax.random.split(key, 3)
    test = tasks_of(key_test, config.num_test, frame)
    params = initialise(key_start, layer, size[1])

    def step(carry, index):
      params, state = carry
      key = jax.random.fold_in(key_tasks, index)
      slope = jax.grad(objective)(params, tasks_of(key, batch, frame))
      updates, state = optimizer.update(slope, state)
      return (optax.apply_updates(params, updates), state), None

    def record(carry, indices):
      return jax.lax.scan(step, carry, indices)[0], carry[0]

    carry = params, optimizer.init(params)
    indices = jnp.arange(config.num_steps).reshape(config.num_records, -1)
    carry, records = jax.lax.scan(record, carry, indices)
    records = jax.tree.map(
      lambda x, y: jnp.concatenate([x, y[None]]), records, carry[0]
    )
    return jax.lax.map(lambda p: compare(layer, p, test, rate), records)

  def one_frame(inputs):
    # Made anew in each frame: both see the same documents.
    root = jax.random.fold_in(jax.random.key(config.seed), size[0] + 1)
    keys = jax.random.split(jax.random.fold_in(root, size[1]), config.num_seeds)
    return jax.vmap(one_run, in_axes=(None, None, 0))(*inputs, keys)

  return jax.lax.map(one_frame, (jnp.arange(len(FRAMES)), rates))


def compare(layer: Layer, params: Any, tests: Tasks, rate: Any) -> Any:
  """Metrics of a layer against one gradient step, means over tasks."""

  def one(task):
    def ours(queries):
      return answer(layer, params, task.posed, queries)

    zero = jnp.zeros(task.posed.document.shape[1], task.answer.dtype)
    weights = account.weight_shift(task.posed, zero, learning_rate=rate)
    logits = ours(task.queries)
    steps = account.attend(task.posed, task.queries, learning_rate=rate)
    # A logit depends on its own query alone: one gradient has all rows.
    slopes = jax.grad(lambda q: jnp.sum(ours(q)))(task.queries)
    f, g = jax.nn.softmax(logits), jax.nn.softmax(steps)
    away = slopes - weights[None]
    norms = jnp.linalg.norm(slopes, axis=1) * jnp.linalg.norm(weights)
    cosines = (slopes @ weights) / norms
    start = task.answer - 1 / task.answer.shape[0]
    return {
      'loss': jnp.sum((f - task.answer) ** 2) / 2,
      'loss_gd': jnp.sum((g - task.answer) ** 2) / 2,
      'loss_start': jnp.sum(start**2) / 2,
      'preds_diff': jnp.linalg.norm(f - g),
      'preds_move': jnp.linalg.norm(g - 1 / task.answer.shape[0]),
      'model_diff': jnp.mean(jnp.linalg.norm(away, axis=1)),
      'model_size': jnp.linalg.norm(weights),
      'model_cos': jnp.mean(cosines),
      'logit_cos': cosine(logits, steps),
    }

  return jax.tree.map(jnp.mean, jax.vmap(one)(tests))


def cosine(a: Any, b: Any) -> Any:
  """Cosine of two vectors of logits, whose means say nothing."""
  a, b = a - jnp.mean(a), b - jnp.mean(b)
  return (a @ b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
