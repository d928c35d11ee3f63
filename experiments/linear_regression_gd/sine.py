"""Does attention on a network learn sine waves as a step on its last layer?

Sine waves are no linear task, but a network that is trained with the layer
turns them into one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing, statistics
from experiments.linear_regression_gd import training
from experiments.linear_regression_gd.training import CLOSE, OSWALD
from iclcl_jax.accounts import linear_regression_gd as account
from iclcl_jax.types import Array, Float

FIRST_LABEL = 32
CLIP = 1.0
LEARNING_RATE = 5e-3
NUM_GRID = 61


class Learnt(NamedTuple):
  """Losses of the records, and final predictions along one task."""

  loss: Float[Array, 'S T']
  along: Float[Array, 'S G']


class Results(NamedTuple):
  steps: np.ndarray
  attention: Learnt
  descent: Learnt
  preds_diff: Float[Array, ' S']  # Of the final predictions of both.
  preds_diff_of_seeds: Float[Array, ' S']  # Of the steps of two seeds.
  mean_prediction: Float[Array, ' S']
  loss_zero: Float[Array, '']
  context: Float[Array, 'N 2']
  grid: Float[Array, ' G']


def source(num_demonstrations: int, *, phase_lane: int) -> training.Source:
  """Sine waves `A sin(x + phase)`: A of U(.1, .5), phase of U(0, pi).

  Inputs are of U(-5, 5). The phase is made of the number `phase_lane`: -1 for
  its own, -2 for that of the amplitude, as in the released code.
  """

  def make(uniform):
    inputs = 5 * uniform[:, :-2]
    amplitude = 0.3 + 0.2 * uniform[:, -2:-1]
    phase = math.pi / 2 * (1 + uniform[:, phase_lane][:, None])
    labels = amplitude * jnp.sin(inputs + phase)
    visible = labels.at[:, -1].set(0)
    return training.Tasks(jnp.stack([inputs, visible], axis=2), labels[:, -1:])

  return training.Source((num_demonstrations + 3,), make)


def _init_network(key, d_in: int, width: int) -> dict[str, Any]:
  """An embedding, then one residual block that widens by 4."""
  shapes = {
    'embed': (d_in, width),
    'wide': (width, 4 * width),
    'narrow': (4 * width, width),
  }
  keys = jax.random.split(key, 3)
  params = {
    name: jax.random.normal(k, shape, jnp.float32) / shape[0] ** 0.5
    for (name, shape), k in zip(shapes.items(), keys, strict=True)
  }
  return params | {
    'embed_bias': jnp.zeros(width, jnp.float32),
    'bias': jnp.zeros(4 * width, jnp.float32),
  }


def network(params, rows):
  """The network, row by row. Shape `[M, width]`."""
  rows = rows @ params['embed'] + params['embed_bias'][None]
  wide = jax.nn.gelu(rows @ params['wide'] + params['bias'][None])
  return rows + wide @ params['narrow']


def attention_on_network(width: int) -> training.Model:
  """A network on tokens, then one layer of linear self-attention."""
  layer = training.stack_model(width, init_scale=5.0)

  def init(key):
    keys = jax.random.split(key)
    return _init_network(keys[0], 2, width), layer.init(keys[1])

  def answer(params, rows):
    return layer.answer(params[1], network(params[0], rows))

  return training.Model(init, answer)


def descent_on_network(width: int) -> training.Model:
  """A network, then one step of GD on its last layer; all are trained."""

  def init(key):
    keys = jax.random.split(key)
    head = 0.01 * jax.random.normal(keys[1], (1, width), jnp.float32)
    return _init_network(keys[0], 1, width), head, jnp.zeros((), jnp.float32)

  def answer(params, rows):
    body, head, log_rate = params
    inputs = network(body, rows[:, :-1])
    tokens = account.make_tokens(
      inputs[:-1], rows[:-1, -1:], inputs[-1], initial=head
    )
    layer = account.construct(jnp.exp(log_rate), len(rows) - 1, initial=head)
    # The query's row starts at -W_0 m(x_q): the prediction includes W_0.
    return -account.attend_query(layer, tokens)[-1:]

  return training.Model(init, answer)


def measure(config: Config) -> Results:
  lane = -2 if config.sine_shared_key else -1
  waves = source(config.num_demonstrations, phase_lane=lane)
  width = config.sine_width
  models = attention_on_network(width), descent_on_network(width)
  recipe = training.cosine_recipe(
    config.sine_steps, config.sine_batch_size, LEARNING_RATE, CLIP
  )
  trained = [
    training.train(config, model, waves, recipe, FIRST_LABEL + label)
    for label, model in enumerate(models)
  ]
  key = jax.random.fold_in(jax.random.key(config.seed), 2**18)
  shape = config.num_test_tasks, *waves.num_lanes
  tasks = waves.make(jax.random.uniform(key, shape, jnp.float32, minval=-1))

  @lab.compile_quickly
  def compare(*records):
    rows = tasks.tokens[0]
    grid = jnp.linspace(-5, 5, NUM_GRID, dtype=jnp.float32)
    along = jax.vmap(lambda x: rows.at[-1, 0].set(x))(grid)

    def learnt(model, kept):
      last = jax.tree.map(lambda w: w[:, -1], kept)

      def predict(tokens):
        return jax.lax.map(
          lambda p: training.predictions(model.answer, p, tokens)[:, 0], last
        )

      losses = training.losses_of_records(model.answer, kept, tasks)
      return predict(tasks.tokens), Learnt(losses, predict(along))

    (a, attention), (b, descent) = map(learnt, models, records)
    return Results(
      trained[0].steps,
      attention,
      descent,
      preds_diff=jnp.mean(jnp.abs(a - b), axis=1),
      preds_diff_of_seeds=jnp.mean(jnp.abs(b - jnp.roll(b, 1, axis=0)), axis=1),
      mean_prediction=jnp.mean(jnp.abs(b), axis=1),
      loss_zero=jnp.mean(tasks.targets**2) / 2,
      context=rows[:-1],
      grid=grid,
    )

  return jax.device_get(compare(*(both.records for both in trained)))


def claims(config: Config, results: Results) -> list[lab.Claim]:
  attention = results.attention.loss[:, -1]
  worse = attention - results.descent.loss[:, -1]
  further = results.preds_diff - results.preds_diff_of_seeds
  return training.statements(
    f"""
    sine-loss [{OSWALD}, figure 5] attention on a network does as well on sine
      waves as one step on the last layer of a network | loss minus that of the
      step, each with its own trained network
    sine-learns [{OSWALD}, figure 5] attention on a network learns sine waves in
      context | loss over that of predicting 0
    sine-predictions [{OSWALD}, figure 5] both predict the same | mean absolute
      difference of their predictions minus that of steps of two seeds
    """,
    {
      'sine-loss': lab.at_most(CLOSE, worse),
      'sine-learns': lab.at_most(0.2, attention / results.loss_zero),
      'sine-predictions': lab.at_most(0.0, further),
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  samples = {
    'loss_attention': results.attention.loss[:, -1],
    'loss_descent': results.descent.loss[:, -1],
    'preds_diff': results.preds_diff,
    'preds_diff_of_seeds': results.preds_diff_of_seeds,
    'mean_prediction': results.mean_prediction,
  }
  found: dict[str, Any] = {k: statistics.mean(v) for k, v in samples.items()}
  return {'sine': found | {'loss_zero_predictor': results.loss_zero}}


def metrics(config: Config, results: Results) -> list[dict[str, Any]]:
  steps, attention, descent = results[:3]
  return [
    *training.loss_rows('sine_attention', steps, attention.loss),
    *training.loss_rows('sine_descent', steps, descent.loss),
  ]


def sentence(config: Config, results: Results) -> str:
  return f"""On sine waves attention on a network ends at
    {np.mean(results.attention.loss[:, -1]):.4f}, one step on the last layer of
    a network at {np.mean(results.descent.loss[:, -1]):.4f} (predicting 0:
    {results.loss_zero:.4f})."""


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, (left, right) = drawing.subplots(1, 2, figsize=(9.5, 3.9))
  both = {
    'attention on a network': results.attention,
    'GD on the last layer': results.descent,
  }
  training.draw_losses(  # The start is off any scale.
    left,
    results.steps[1:],
    {label: found.loss[:, 1:] for label, found in both.items()},
    {'predicting 0': results.loss_zero},
  )
  left.set_yscale('log')
  for index, found in enumerate(both.values(), start=1):
    look = drawing.look(index) | {'marker': '', 'lw': 1}
    right.plot(results.grid, found.along.T, **look)
  context = results.context.T
  right.plot(*context, 'ko', ms=7, label='demonstrations', zorder=3)
  right.set(xlabel='input of the query', ylabel='prediction')
  figure.legend(loc='outside upper center', ncols=4)
  caption = f"""Sine waves. Left: loss of linear self-attention on a network,
    and of one gradient step on the last layer of a network whose start and step
    size are trained, mean and 95 % interval over {config.num_seeds} seeds.
    Right: predictions of all seeds of both along one task."""
  return [lab.Figure('sine', figure, caption)]
