"""Compares trained layers with gradient descent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import linear_regression_gd_data as data
from experiments import linear_regression_gd_training as training
from experiments.linear_regression_gd_steps import linear_tasks
from iclcl_jax.accounts import linear_regression_gd as account

SCALES = np.linspace(0.5, 2.0, 13)
FRACTIONS = np.linspace(0.0, 1.0, 11)
RESIDUAL_SIZES = 7, 5, 3  # Demonstrations, inputs, labels.


def construction_residual(config) -> float:
  """Largest relative error of the constructed layers, W_0 not 0, float64."""
  size, d_x, d_y = RESIDUAL_SIZES

  def errors(key):
    keys = jax.random.split(key, 4)
    shapes = (size, d_x), (size, d_y), (d_x,), (d_y, d_x)
    inputs, labels, query, initial = (
      jax.random.normal(k, shape, jnp.float64)
      for k, shape in zip(keys, shapes, strict=True)
    )
    found = []
    for num_steps in (1, 4):
      tokens = account.make_tokens(inputs, labels, query, initial=initial)
      layer = account.construct(0.5, size, initial=initial)
      layers = account.repeat(layer, num_steps)
      rates = jnp.full(num_steps, 0.5)
      weights = account.descend(inputs, labels, rates, initial=initial)
      pair = account.predict(layers, tokens, d_y=d_y), weights @ query
      found.append(_relative(*pair))
      tokens = account.make_tokens(inputs, labels, query)
      layer = account.construct_plus_plus(
        0.5, 0.02, size, d_x=d_x, d_y=d_y, dtype=jnp.float64
      )
      layers = account.repeat(layer, num_steps)
      factors = rates, 0.02 * jnp.ones(num_steps)
      answer = account.descend_plus_plus(inputs, labels, query, *factors)
      pair = account.predict(layers, tokens, d_y=d_y), answer
      found.append(_relative(*pair))
    return jnp.max(jnp.stack(found))

  with harness.float64_on_host(), jax.default_matmul_precision('highest'):
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    worst = harness.compile_quickly(lambda k: jax.lax.map(errors, k))(keys)
    return float(jnp.max(worst))


def _relative(a, b):
  return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))


def test_tasks(config) -> data.Tasks:
  """The fixed tasks of every evaluation."""
  key = jax.random.fold_in(jax.random.key(config.seed), 2**17)
  return data.draw(key, config.num_test_tasks, config)


def gradient_descent(config, tasks: data.Tasks) -> dict[str, Any]:
  """One step of GD with the best step size for these very tasks."""
  size = config.num_demonstrations
  unit = _stack(account.construct(1.0, size, d_x=config.d_x, dtype=jnp.float32))
  directions = training.predictions(unit, training.LINEAR, tasks.tokens)
  rate = account.fit_learning_rate(directions, tasks.targets)
  layer = _stack(
    account.construct(rate, size, d_x=config.d_x, dtype=jnp.float32)
  )
  answers, slopes = _behaviour(layer, training.LINEAR, tasks)
  context = tasks.tokens[:, :-1]
  centred = context.at[..., :-1].add(
    -jnp.mean(context[..., :-1], axis=1, keepdims=True)
  )
  moved = jnp.concatenate([centred, tasks.tokens[:, -1:]], axis=1)
  directions = training.predictions(unit, training.LINEAR, moved)
  centred_rate = account.fit_learning_rate(directions, tasks.targets)
  return {
    'layer': layer,
    'rate': rate,
    'answers': answers,
    'slopes': slopes,
    'loss': training.mean_loss(answers, tasks.targets),
    'loss_centred': training.mean_loss(
      centred_rate * directions, tasks.targets
    ),
    'mean_prediction': jnp.mean(jnp.abs(answers)),
    'mean_slope': jnp.mean(jnp.linalg.norm(slopes, axis=1)),
  }


def alignment(records, architecture, tasks: data.Tasks, descent):
  """Loss and metrics of all records of all seeds, arrays `[S, T]`."""

  def one(layers):
    answers, slopes = _behaviour(layers, architecture, tasks)
    return {
      'loss': training.mean_loss(answers, tasks.targets),
      'preds_diff': account.predictions_difference(answers, descent['answers']),
      'model_diff': account.model_difference(slopes, descent['slopes']),
      'model_cos': account.model_cosine(slopes, descent['slopes']),
    }

  return jax.lax.map(lambda seed: jax.lax.map(one, seed), records)


def out_of_distribution(config, trained, tasks: data.Tasks, descent):
  """Losses at other input scales: trained `[S, A]`, GD and theory `[A]`."""

  def one_scale(layers, scale):
    tokens, targets = scale * tasks.tokens, scale * tasks.targets
    answers = training.predictions(layers, training.LINEAR, tokens)
    return training.mean_loss(answers, targets)

  def scales(layers):
    grid = jnp.asarray(SCALES, jnp.float32)
    return jax.lax.map(lambda scale: one_scale(layers, scale), grid)

  rate = account.optimal_learning_rate(linear_tasks(config))
  return {
    'trained': jax.lax.map(scales, trained),
    'gd': scales(descent['layer']),
    'closed_form': jnp.asarray(
      [account.expected_loss(linear_tasks(config, a), rate) for a in SCALES],
      jnp.float32,
    ),
  }


def interpolation(config, trained, tasks: data.Tasks, descent):
  """Losses between the trained layer and the constructed one, `[S, F]`."""
  end = _products(descent['layer'], config.d_x)

  def one(layers):
    start = _products(layers, config.d_x)

    def between(fraction):
      layer = _stack(account.interpolate(start, end, fraction))
      answers = training.predictions(layer, training.LINEAR, tasks.tokens)
      return training.mean_loss(answers, tasks.targets)

    return jax.lax.map(between, jnp.asarray(FRACTIONS, jnp.float32))

  return jax.lax.map(one, trained)


def learnt_products(config, trained) -> dict[str, Any]:
  """What the trained layer's products say about its step."""

  def one(layers):
    folded = _products(layers, config.d_x)
    matrix = folded.query_key[0, : config.d_x, : config.d_x]
    column = folded.value_output[0, :, -1]
    off = matrix - jnp.diag(jnp.diagonal(matrix))
    rest = jnp.max(jnp.abs(column[:-1])) / jnp.abs(column[-1])
    return {
      'learning_rate': -config.num_demonstrations * column[-1],
      'diagonal_min': jnp.min(jnp.diagonal(matrix)),
      'diagonal_max': jnp.max(jnp.diagonal(matrix)),
      'off_diagonal': jnp.max(jnp.abs(off)),
      'rest_of_value_column': rest,
      'matrix': matrix * column[-1],
    }

  return jax.lax.map(one, trained)


def _behaviour(layers, architecture, tasks: data.Tasks):
  """Predictions `[B, 1]` and their slopes in the query `[B, d_x]`."""
  layers = training.unroll(layers, architecture)
  d_x = tasks.tokens.shape[2] - 1

  def answer(rows):
    return account.predict(layers, rows, weights_fn=architecture.weights_fn)

  def slope(rows):
    return account.sensitivity(answer, rows, d_x=d_x)[0]

  return jax.vmap(answer)(tasks.tokens), jax.vmap(slope)(tasks.tokens)


def _products(layers, d_x: int) -> account.Folded:
  layer = jax.tree.map(lambda w: w[0], layers)
  return account.normalise(account.fold(layer), d_x=d_x)


def _stack(layer):
  """One layer as a stack."""
  return jax.tree.map(lambda w: w[None], layer)
