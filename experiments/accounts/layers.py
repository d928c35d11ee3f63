r"""The accounts as layers, and their tuning and training.

A memory is what a layer does between projections and answer: it answers the
query from the first `n` keys and values, for several `n`. Its gates are the few
numbers of its inner learner. Where keys and queries are the inputs and values
the labels, it is the account's learner, and its gates are tuned; with trained
projections it is a layer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import Config
from experiments.lab.loops import train
from iclcl_jax import losses, tasks
from iclcl_jax.accounts import (
  linear_regression_gd,
  meta_optimizer,
  online_learners as learners,
)
from iclcl_jax.types import Array, Float

NUM_STEPS = 2  # Of gradient descent and GD++.
NUM_EPOCHS = 4  # Of SGD on the demonstrations.
CLIP = 1.0
INIT_SCALE = 0.5


class Gate(NamedTuple):
  """A number of an inner learner: its name, its range, and where to start."""

  name: str  # What it is.
  transform: Callable[[Array], Array]  # From a free number to its range.
  start: float  # The free number to start from.


class Memory(NamedTuple):
  account: str  # The paper behind it.
  # `(tokens, gates, length) -> [1]`: the answer to the last query from the
  # first `length` tokens.
  answer: Callable[[learners.Stream, Sequence[Array], Array], Array]
  gates: tuple[Gate, ...]  # Its numbers, in the order of `answer`.
  signs: tuple[float, ...] = (1.0,)  # Of queries and values, by head.
  is_layer: bool = True  # Whether a layer is trained around it, or it is tuned.

  def numbers(self, free: Array) -> list[Array]:
    """The gates, each in its range, from free numbers with axes `[G, ...]`."""
    pairs = zip(self.gates, free, strict=True)
    return [gate.transform(number) for gate, number in pairs]


def _scores(tokens) -> Float[Array, ' N']:
  return tokens.keys @ tokens.queries[-1]


def _seen(tokens, length) -> Float[Array, ' N']:
  """One where the prefix holds the token."""
  count = tokens.keys.shape[0]
  return (jnp.arange(count) < length).astype(tokens.keys.dtype)


def linear_attention(tokens, gates, length) -> Float[Array, ' 1']:
  """One step of gradient descent on the mean squared loss, from 0."""
  weights = _seen(tokens, length) * _scores(tokens)
  return gates[0] / length.astype(weights.dtype) * (weights @ tokens.values)


def _softmax_of(scores, tokens, length) -> Float[Array, ' N']:
  """Softmax over the prefix, zeros beyond."""
  seen = _seen(tokens, length) > 0
  return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))


def softmax(tokens, gates, length) -> Float[Array, ' 1']:
  """Nadaraya-Watson: softmax attention with a sharpness of its own."""
  scores = gates[0] * _scores(tokens)
  return _softmax_of(scores, tokens, length) @ tokens.values


def momentum_attention(tokens, gates, length) -> Float[Array, ' 1']:
  """Softmax attention plus the decayed sum of the past values."""
  padded = jnp.pad(tokens.values, [(0, 1), (0, 0)])
  past = meta_optimizer.momentum_values(padded, decay=gates[1])
  return softmax(tokens, gates, length) + past[length]


def gated_decay(tokens, gates, length) -> Float[Array, ' 1']:
  """Linear attention; every later token shrinks what is there."""
  scores = _scores(tokens)
  later = jnp.maximum(length - 1 - jnp.arange(scores.shape[0]), 0)
  shrunk = gates[1] ** later.astype(scores.dtype)
  return gates[0] * ((_seen(tokens, length) * shrunk * scores) @ tokens.values)


def _recurrence(*names: str) -> Callable[..., Float[Array, ' 1']]:
  """Descends on the squared loss, a step a token; the gates are its numbers."""

  def answer(tokens, gates, length):
    options = dict(zip(names, gates, strict=True))
    descend = functools.partial(learners.descend, loss=losses.squared)
    rule = descend if 'momentum' in options else learners.delta_recurrence
    return rule(tokens, **options)[length - 1]

  return answer


def least_squares(tokens, gates, length) -> Float[Array, ' 1']:
  """Ridge regression, solved for each length alone."""
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)
  seen = tokens.keys * _seen(tokens, length)[:, None]
  gram = seen.T @ seen + gates[0] * identity
  read = jnp.linalg.solve(gram, tokens.queries[-1])
  return (seen @ read) @ tokens.values


def sgd(tokens, gates, length) -> Float[Array, ' 1']:
  """Several epochs of SGD on the demonstrations, one of them a step."""
  again = jax.tree.map(lambda x: jnp.concatenate([x] * NUM_EPOCHS), tokens)
  rates = jnp.concatenate([gates[0] * _seen(tokens, length)] * NUM_EPOCHS)
  return learners.delta_recurrence(again, rates=rates)[-1]


def gd(tokens, gates, length) -> Float[Array, ' 1']:
  """Steps of gradient descent on the mean squared loss."""
  return gd_plus_plus(tokens, (gates[0], jnp.zeros_like(gates[0])), length)


def gd_plus_plus(tokens, gates, length) -> Float[Array, ' 1']:
  """GD++, whose contraction is of the mean outer product of the inputs."""
  size, seen = tokens.keys.shape[0], _seen(tokens, length)[:, None]
  count, ones = length.astype(seen.dtype), jnp.ones(NUM_STEPS, seen.dtype)
  return linear_regression_gd.descend_plus_plus(
    tokens.keys * seen,
    tokens.values * seen,
    tokens.queries[-1],
    gates[0] * size / count * ones,
    gates[1] / count * ones,
  )


def softmax_regression(tokens, gates, length) -> Float[Array, ' 1']:
  r"""One step of softmax regression: documents of inputs, targets of labels.

  The target is the softmax of the labels, the answer the query's logit.
  """
  target = _softmax_of(tokens.values[:, 0], tokens, length)
  uniform = _seen(tokens, length) / length.astype(target.dtype)
  return (gates[0] * ((target - uniform) @ _scores(tokens)))[None]


def _rate(start: float = -1.0) -> Gate:
  return Gate('step size', jnp.exp, start)


_SHARPNESS = Gate('sharpness', jnp.exp, 0.0)
_DECAY = Gate('decay', jax.nn.sigmoid, 2.0)
_OSWALD = 'von Oswald et al., arXiv:2212.07677'
_REN = 'Ren & Liu, arXiv:2310.13220'


MEMORIES = {
  'softmax': Memory(_REN, softmax, (_SHARPNESS,)),
  'momentum attention': Memory(
    'Dai et al., arXiv:2212.10559',
    momentum_attention,
    (_SHARPNESS, Gate('decay of past values', jax.nn.sigmoid, -1.0)),
  ),
  'softmax regression': Memory(
    'Li et al., arXiv:2304.13276',
    softmax_regression,
    (_rate(0.0),),
    is_layer=False,
  ),
  'gated decay': Memory(
    'Yang et al., arXiv:2312.06635', gated_decay, (_rate(), _DECAY)
  ),
  'linear attention': Memory(_OSWALD, linear_attention, (_rate(0.0),)),
  'two-head softmax': Memory(  # A head is softmax times a size.
    _OSWALD,
    lambda tokens, gates, length: gates[1] * softmax(tokens, gates, length),
    (_SHARPNESS, Gate('size', jnp.exp, 0.0)),
    (1, -1),
  ),
  'GD (2 steps)': Memory(_OSWALD, gd, (_rate(0.0),), is_layer=False),
  'delta rule': Memory(  # A step on the squared loss for each token.
    'Schlag et al., arXiv:2102.11174', _recurrence('rates'), (_rate(),)
  ),
  'gated delta rule': Memory(  # Decay, then such a step.
    'Yang et al., arXiv:2412.06464',
    _recurrence('rates', 'decays'),
    (_rate(), _DECAY),
  ),
  'delta rule (momentum)': Memory(
    'Behrouz et al., arXiv:2501.00663',
    _recurrence('rates', 'momentum'),
    (_rate(-2.0), Gate('momentum', jax.nn.sigmoid, -1.0)),
  ),
  'GD++ (2 steps)': Memory(
    _OSWALD,
    gd_plus_plus,
    (_rate(0.0), Gate('contraction', jnp.exp, -1.0)),
    is_layer=False,
  ),
  'SGD (4 epochs)': Memory(
    'Irie et al., arXiv:2202.05798', sgd, (_rate(),), is_layer=False
  ),
  'least squares (mesa)': Memory(
    'von Oswald et al., arXiv:2309.05858',
    least_squares,
    (Gate('ridge', jnp.exp, -1.0),),
  ),
}


class Layer(NamedTuple):
  """A memory between projections; the answers of its heads are summed."""

  queries: Float[Array, 'H D d_x']
  keys: Float[Array, 'H D d_x']
  values: Float[Array, 'H D 1']
  gates: Float[Array, ' G']  # The free numbers behind those of the memory.


def predicted(memory: Memory, d_x: int) -> Layer:
  """Keys and queries are inputs, values are labels; gates at their start."""
  signs = jnp.asarray(memory.signs, jnp.float32)[:, None, None]
  identity = jnp.eye(d_x + 1, d_x, dtype=jnp.float32)[None]
  label = jnp.zeros((1, d_x + 1, 1), jnp.float32).at[:, -1].set(1)
  gates = jnp.asarray([gate.start for gate in memory.gates], jnp.float32)
  ones = jnp.ones_like(signs)
  return Layer(signs * identity, ones * identity, signs * label, gates)


def mirrored(layer: Layer) -> Layer:
  """Queries and values with the other sign: as good for symmetric inputs."""
  return layer._replace(queries=-layer.queries, values=-layer.values)


def random(key, memory: Memory, d_x: int) -> Layer:
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

  Rows are `(x_i, y_i)`, then `(x_q, 0)`; `lengths [L]` are how many are read.
  """
  gates = memory.numbers(layer.gates)

  def head(queries, keys, values):
    context, query = tokens[:-1], tokens[-1] @ queries
    stream = learners.Stream(
      jnp.broadcast_to(query, (len(context), len(query))),
      context @ keys,
      context @ values,
    )
    answer = jax.vmap(lambda length: memory.answer(stream, gates, length)[0])
    return answer(lengths)

  return jnp.sum(jax.vmap(head)(*layer[:3]), axis=0)


def draw(key, count: int, size: int, config: Config, scale=1.0):
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


class Prompts(NamedTuple):
  training: tasks.RegressionPrompt  # Batches of each seed, `[S, P, B, ...]`.
  testing: tasks.RegressionPrompt  # Long prompts. Axes `[S, T, ...]`.
  scaled: tasks.RegressionPrompt  # The same, short, at all scales `[S, A, T]`.
  keys: Array  # Of the random projections. Shape `[S]`.


@lab.once
def draw_all(config: Config) -> Prompts:
  size = config.num_demonstrations
  shape = min(config.num_batches, config.num_steps), config.batch_size

  def training(key):
    drawn = draw(key, shape[0] * shape[1], size, config)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), drawn)

  def testing(key):
    count, longest = config.num_test_prompts, max(config.lengths)
    return jax.lax.map(
      # The same prompts at all scales.
      lambda a: draw(jax.random.clone(key), count, longest, config, a),
      jnp.asarray(config.scales, 'float32'),
    )

  def seed_keys(purpose):
    root = jax.random.fold_in(jax.random.key(config.seed), purpose)
    return jax.random.split(root, config.num_seeds)

  @lab.compile_quickly
  def everything():
    keys, keys_test, keys_fit = (seed_keys(use) for use in range(3))
    tested = jax.lax.map(testing, keys_test)
    # Of other scales only prompts as long as in training are asked for.
    short = jnp.delete(tested.tokens, np.s_[size:-1], axis=3)
    one = config.scales.index(1.0)
    return Prompts(
      training=jax.lax.map(training, keys),
      testing=jax.tree.map(lambda x: x[:, one], tested),
      scaled=tested._replace(tokens=short),
      keys=keys_fit,
    )

  return everything()


def fit(memory: Memory, prompts: Any, keys: Array, config: Config) -> Layer:
  """Tunes gates, then trains layers, both in one program.

  From batches of all seeds, axes `[S, P, B, ...]`, and a key for each. Returns
  layers with leading axes `[S, K]`: those that keep the predicted projections
  and learn the gates; then, of the memory of a layer, random ones that learn
  everything.
  """
  rates = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
  adam = optax.adam(rates, b2=0.99)
  optimizer = optax.chain(optax.clip_by_global_norm(CLIP), adam)
  length = jnp.asarray([config.num_demonstrations])

  def run(layer, is_free, batches):
    def loss(layer, batch):
      fixed = jax.tree.map(jax.lax.stop_gradient, layer)
      held = jax.tree.map(lambda a, b: jnp.where(is_free, a, b), layer, fixed)
      held = held._replace(gates=layer.gates)
      guess = jax.vmap(lambda t: answers(memory, held, t, length))(batch.tokens)
      return jnp.mean((guess - batch.target) ** 2)

    def draw_batch(index):  # The batches are used again in turn.
      count = batches.tokens.shape[0]
      return index + 1, jax.tree.map(lambda x: x[index % count], batches)

    records = train(
      loss,
      layer,
      draw_batch,
      jnp.zeros((), jnp.int32),
      optimizer,
      num_steps=config.num_steps,
      record_every=config.num_steps,
    )
    return jax.tree.map(lambda w: w[-1], records)

  def one_seed(key, batches):
    kinds = [predicted(memory, config.d_x)]
    if memory.is_layer:
      kinds.append(random(key, memory, config.d_x))
    start = jax.tree.map(lambda *w: jnp.stack(w), *kinds)
    is_free = jnp.arange(len(kinds)) == 1  # Tuned alone, or trained.
    return jax.vmap(run, in_axes=(0, 0, None))(start, is_free, batches)

  return jax.vmap(one_seed)(keys, prompts)
