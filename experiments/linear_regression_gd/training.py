"""What is trained, on which tasks, how, and what is asked of it afterwards.

Evaluation draws from `jax.random`. Training needs a thousand million numbers,
and there `jax.random` would take longer than the training itself, so every
number has a lane: a xorshift generator of 32 bits with a multiplicative output
(Marsaglia, J. Stat. Softw. 8(14), 2003; Vigna, arXiv:1402.6246), seeded by
`jax.random.bits`, of which only the upper bits are used.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import lab
from experiments.lab import Config, figures as drawing
from experiments.lab.loops import train as train_one
from iclcl_jax.accounts import linear_regression_gd as account
from iclcl_jax.types import Array, Float

OSWALD = 'von Oswald et al., arXiv:2212.07677'
statements = functools.partial(lab.statements, 'linear-regression-gd-')
CLOSE = 0.002  # Excess of a loss that counts as none.
NUM_RECORDS = 10
INIT_VARIANCE = 0.002
LARGEST_ACTIVATION = 10.0  # As published, for more than three layers.


class Tasks(NamedTuple):
  tokens: Float[Array, 'B M D']  # Rows `(x_i, y_i)`, then `(x_q, 0)`.
  targets: Float[Array, 'B 1']  # The labels of the queries.


class Source(NamedTuple):
  num_lanes: tuple[int, ...]  # Uniform numbers that a task takes, by shape.
  make: Callable[[Array], Tasks]  # Of U(-1, 1) numbers `[B, *num_lanes]`.


def linear_source(config: Config) -> Source:
  """Linear tasks: inputs uniform, weights normal."""

  def make(uniform):
    edge = jnp.float32(1 - 2**-23)
    normal = jax.lax.erf_inv(jnp.clip(uniform[:, -1], min=-edge, max=edge))
    inputs = config.half_range * uniform[:, :-1]
    return _label(inputs, jnp.float32(2**0.5) * normal)

  return Source((config.num_demonstrations + 2, config.d_x), make)


def _label(inputs: Float[Array, 'B M d_x'], weights) -> Tasks:
  """Labels inputs, and hides the label of the last."""
  labels = jnp.sum(inputs * weights[:, None], axis=2)
  visible = labels.at[:, -1].set(0)
  tokens = jnp.concatenate([inputs, visible[..., None]], axis=2)
  return Tasks(tokens, labels[:, -1:])


def init_lanes(key, batch_size: int, source: Source) -> Array:
  """Seeds a lane for every number of a batch. Shape `[B, *num_lanes]`."""
  bits = jax.random.bits(key, (batch_size, *source.num_lanes), jnp.uint32)
  lanes = jnp.maximum(bits, jnp.uint32(1))  # 0 would stay 0.
  for _ in range(8):
    lanes = _advance(lanes)
  return lanes


def draw_lanes(lanes: Array, source: Source) -> tuple[Array, Tasks]:
  """Draws a batch for training, and moves the lanes on."""
  lanes = _advance(lanes)
  upper = (lanes * jnp.uint32(0x9E3779B1)) >> jnp.uint32(8)
  # The middle of each of the 2^24 cells: symmetric. Rounding may reach 1.
  uniform = (upper.astype(jnp.float32) + 0.5) * jnp.float32(2**-23) - 1
  return lanes, source.make(uniform)


def _advance(lanes: Array) -> Array:
  lanes = lanes ^ (lanes << jnp.uint32(13))
  lanes = lanes ^ (lanes >> jnp.uint32(17))
  return lanes ^ (lanes << jnp.uint32(5))


def draw_inputs(key, count: int, size: int, config: Config) -> Array:
  """Draws uniform inputs for evaluation. Shape `[count, size, d_x]`."""
  shape, half = (count, size, config.d_x), config.half_range
  return jax.random.uniform(key, shape, jnp.float32, minval=-half, maxval=half)


def draw(key, count: int, config: Config) -> Tasks:
  """Draws linear tasks for evaluation: inputs uniform, weights normal."""
  key_inputs, key_weights = jax.random.split(key)
  inputs = draw_inputs(key_inputs, count, config.num_demonstrations + 1, config)
  weights = jax.random.normal(key_weights, (count, config.d_x), jnp.float32)
  return _label(inputs, weights)


def test_tasks(config: Config) -> Tasks:
  """The fixed tasks on which single layers and stacks are evaluated."""
  key = jax.random.fold_in(jax.random.key(config.seed), 2**17)
  return draw(key, config.num_test_tasks, config)


def linear_tasks(config: Config, scale: float = 1.0) -> account.LinearTasks:
  """The distribution of the linear tasks, inputs scaled."""
  half = scale * config.half_range
  return account.LinearTasks(
    d_x=config.d_x,
    num_demonstrations=config.num_demonstrations,
    moments=account.Moments(half**2 / 3, half**4 / 5),
  )


AnswerFn = Callable[[Any, Array], Array]  # (params, tokens [M, D]) -> [1]


class Model(NamedTuple):
  init: Callable[[Any], Any]  # `key -> params`.
  answer: AnswerFn  # `(params, tokens [M, D]) -> [1]`.


def stack_model(
  d_model: int,
  *,
  weights_fn: Callable[..., Any] = account.linear_weights,
  num_heads: int = 1,
  num_layers: int = 1,
  num_distinct: int = 1,
  init_scale: float = 1.0,
) -> Model:
  """Self-attention alone: small truncated normal weights, by distinct layer.

  Tokens have width `d_model`. Layers that share their weights are one distinct
  layer; `init_scale` is a factor of the published initial weights.
  """

  def init(key):
    shape = num_distinct, num_heads, d_model, d_model
    scale = (INIT_VARIANCE / num_layers / d_model) ** 0.5 * init_scale
    return account.SelfAttention(
      *(
        scale * jax.random.truncated_normal(k, -2, 2, shape, jnp.float32)
        for k in jax.random.split(key, 4)
      )
    )

  def answer(layers, rows):
    times = num_layers // num_distinct
    layers = jax.tree.map(lambda w: jnp.concatenate([w] * times), layers)
    if num_layers <= 3:
      return account.predict(layers, rows, weights_fn=weights_fn)

    def step(rows, layer):
      rows = account.attend(layer, rows, weights_fn=weights_fn)
      return jnp.clip(rows, -LARGEST_ACTIVATION, LARGEST_ACTIVATION), None

    before = jax.tree.map(lambda w: w[:-1], layers)
    last = jax.tree.map(lambda w: w[-1], layers)
    rows = jax.lax.scan(step, rows, before)[0]
    return -account.attend_query(last, rows, weights_fn=weights_fn)[-1:]

  return Model(init, answer)


def descent_answer(factors, rows):
  """GD++; GD where the contractions are 0. Params: both factors `[2, K]`."""
  return account.descend_plus_plus(
    rows[:-1, :-1], rows[:-1, -1:], rows[-1, :-1], *factors
  )


class Recipe(NamedTuple):
  num_steps: int
  record_every: int  # Steps between records.
  batch_size: int  # Fresh tasks of a step.
  learning_rate: Any  # Of Adam: a number, or a schedule of optax.
  clip: float  # Largest norm of the gradient.


def cosine_recipe(
  num_steps: int, batch_size: int, largest: float, clip: float
) -> Recipe:
  """A learning rate that rises for a twentieth, then falls to a hundredth."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, largest, max(1, num_steps // 20), num_steps, largest / 100
  )
  return Recipe(num_steps, num_steps // NUM_RECORDS, batch_size, schedule, clip)


class Trained(NamedTuple):
  records: Any  # Weights by seed and record, the first before training.
  steps: np.ndarray  # Of the records. Shape `[T]`.
  seconds: float  # Of training all seeds, compiling excluded.

  def last(self) -> Any:
    """Weights after training, leading axis of seeds."""
    return jax.tree.map(lambda w: w[:, -1], self.records)


def train(
  config: Config,
  model: Model,
  source: Source,
  recipe: Recipe,
  label: int,
  initial: Any = None,
) -> Trained:
  """Trains all seeds, and keeps the weights every `record_every` steps.

  The label sets its random numbers apart; initial weights are drawn if None.
  """
  optimizer = optax.chain(
    optax.clip_by_global_norm(recipe.clip),
    optax.adam(recipe.learning_rate, b1=0.9, b2=0.98),
  )

  def one_seed(args):
    seed, initial = args
    root = jax.random.fold_in(jax.random.key(config.seed), seed)
    keys = jax.random.split(jax.random.fold_in(root, label))
    return train_one(
      functools.partial(loss, model.answer),
      model.init(keys[0]) if initial is None else initial,
      functools.partial(draw_lanes, source=source),
      init_lanes(keys[1], recipe.batch_size, source),
      optimizer,
      num_steps=recipe.num_steps,
      record_every=recipe.record_every,
    )

  seeds = jnp.arange(config.num_seeds)
  run: Any = lab.compile_quickly(lambda *args: jax.lax.map(one_seed, args))
  run = run.lower(seeds, initial).compile()
  start = time.perf_counter()
  records = jax.block_until_ready(run(seeds, initial))
  seconds = time.perf_counter() - start
  steps = np.arange(0, recipe.num_steps + 1, recipe.record_every)
  return Trained(records, steps, seconds)


def predictions(answer: AnswerFn, params, tokens):
  """Answers of one model for many prompts. Shape `[B, 1]`."""
  return jax.vmap(lambda rows: answer(params, rows))(tokens)


def mean_loss(answers, targets):
  """Half the mean squared error, the published loss."""
  return jnp.mean((answers - targets) ** 2) / 2


def loss(answer: AnswerFn, params, tasks: Tasks):
  """The loss of one model. Shape `[]`."""
  return mean_loss(predictions(answer, params, tasks.tokens), tasks.targets)


def losses_of_records(answer: AnswerFn, records, tasks: Tasks):
  """Losses of all records of all seeds. Shape `[S, T]`."""
  return _of_records(lambda params: loss(answer, params, tasks), records)


def _of_records(fn: Callable[[Any], Any], records):
  """What `fn` finds of all records of all seeds. Axes `[S, T, ...]`."""
  return jax.lax.map(lambda seed: jax.lax.map(fn, seed), records)


class Behaviour(NamedTuple):
  """Predictions, and their derivatives in the query: what is learnt."""

  answers: Float[Array, 'B 1']
  slopes: Float[Array, 'B d_x']


def behaviour(answer: AnswerFn, params, tasks: Tasks) -> Behaviour:
  """Predictions of one model, and their slopes in the query."""
  slope = jax.grad(lambda rows: answer(params, rows)[0])
  answers = predictions(answer, params, tasks.tokens)
  return Behaviour(answers, jax.vmap(slope)(tasks.tokens)[:, -1, :-1])


def mean_distance(rows: Float[Array, 'B d']) -> Float[Array, '']:
  """Preds diff, of differences of predictions; Model diff, of slopes."""
  return jnp.mean(jnp.linalg.norm(rows, axis=1))


class Alignment(NamedTuple):
  """Losses, mean distances of predictions and slopes, cosine of slopes."""

  loss: Float[Array, 'S T']
  preds_diff: Float[Array, 'S T']
  model_diff: Float[Array, 'S T']
  model_cos: Float[Array, 'S T']


def alignment(
  answer: AnswerFn, records, tasks: Tasks, reference: Behaviour
) -> Alignment:
  def one(params):
    answers, slopes = behaviour(answer, params, tasks)
    return Alignment(
      mean_loss(answers, tasks.targets),
      mean_distance(answers - reference.answers),
      mean_distance(slopes - reference.slopes),
      account.model_cosine(slopes, reference.slopes),
    )

  return _of_records(one, records)


def loss_rows(layer: str, steps, losses) -> list[dict[str, Any]]:
  axes = {'seed': range(len(losses)), 'step': steps}
  return lab.tidy({'layer': layer}, {'loss': losses}, **axes)


def draw_losses(
  axis: Any, steps, curves: Mapping[str, Any], lines: Mapping[str, Any]
) -> None:
  """Losses `[S, T]` by name, means over seeds, and those of other learners."""
  for index, (label, losses) in enumerate(curves.items(), start=1):
    drawing.means(axis, steps, losses, label=label, **drawing.look(index))
  for index, (label, loss) in enumerate(lines.items(), start=1):
    look = {'color': drawing.GREY, 'ls': drawing.LINES[index]}
    axis.axhline(loss, label=label, **look)
  axis.set(xlabel='training steps', ylabel='loss (half squared error)')
