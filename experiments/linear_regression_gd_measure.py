"""Compares trained layers with gradient descent."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import linear_regression_gd_data as data
from experiments import linear_regression_gd_models as models
from experiments import linear_regression_gd_training as training
from experiments.linear_regression_gd_steps import linear_tasks
from iclcl_jax.accounts import linear_regression_gd as account

SCALES = np.linspace(0.5, 2.0, 13)
LINEAR = models.Stack(account.linear_weights, 1, 1, 1)
FRACTIONS = np.linspace(0.0, 1.0, 11)
RESIDUAL_SIZES = 7, 5, 3  # Demonstrations, inputs, labels.


def construction_residuals(config) -> dict[str, float]:
  """Largest relative errors of what is constructed, float64."""
  size, d_x, d_y = RESIDUAL_SIZES

  def errors(key):
    keys = jax.random.split(key, 4)
    shapes = (size, d_x), (size, d_y), (d_x,), (d_y, d_x)
    inputs, labels, query, initial = (
      jax.random.normal(k, shape, jnp.float64)
      for k, shape in zip(keys, shapes, strict=True)
    )
    problem = inputs, labels, query
    layers = [
      error
      for num_steps in (1, 4)
      for error in _layer_errors(problem, initial, num_steps)
    ]
    return {
      'layers': jnp.max(jnp.stack(layers)),
      'copy': _copy_error(problem),
      'kernel': _kernel_error(problem),
    }

  with harness.float64_on_host(), jax.default_matmul_precision('highest'):
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    worst = harness.compile_quickly(lambda k: jax.lax.map(errors, k))(keys)
    return {name: float(jnp.max(x)) for name, x in worst.items()}


def _layer_errors(problem, initial, num_steps: int):
  """Layers against GD from `W_0`, and against GD++."""
  (inputs, labels, query), (d_y, d_x) = problem, initial.shape
  size, rates = len(inputs), jnp.full(num_steps, 0.5)
  tokens = account.make_tokens(inputs, labels, query, initial=initial)
  layers = account.repeat(
    account.construct(0.5, size, initial=initial), num_steps
  )
  weights = account.descend(inputs, labels, rates, initial=initial)
  yield _relative(account.predict(layers, tokens, d_y=d_y), weights @ query)
  layer = account.construct_plus_plus(
    0.5, 0.02, size, d_x=d_x, d_y=d_y, dtype=jnp.float64
  )
  layers = account.repeat(layer, num_steps)
  factors = rates, 0.02 * jnp.ones(num_steps)
  tokens = account.make_tokens(inputs, labels, query)
  answer = account.descend_plus_plus(inputs, labels, query, *factors)
  yield _relative(account.predict(layers, tokens, d_y=d_y), answer)


def _copy_error(problem):
  """A copy layer and two layers on separate tokens against two steps."""
  inputs, labels, query = problem
  (size, d_x), d_y = inputs.shape, labels.shape[1]
  length = 2 * size + 1
  rows = account.make_alternating_tokens(*problem, jnp.eye(length))
  copy = account.construct_copy(size, d_x=d_x, d_y=d_y, dtype=jnp.float64)
  rows = account.attend(
    copy, rows, weights_fn=account.softmax_weights,
    visible=jnp.ones((length, length), bool),
  )  # fmt: skip
  layer = account.construct(0.5, size, initial=jnp.zeros((d_y, d_x)))
  layers = account.repeat(account.widen(layer, length), 2)
  weights = account.descend(inputs, labels, jnp.full(2, 0.5))
  return _relative(account.predict(layers, rows, d_y=d_y), weights @ query)


def _kernel_error(problem):
  """The layer on features against a step of kernel regression."""
  inputs, labels, query = problem
  d_y = labels.shape[1]

  def feature_map(x):
    return jnp.concatenate([jnp.sin(x), jnp.tanh(x), x**2])

  def kernel(a, b):
    return feature_map(a) @ feature_map(b)

  moved = jax.vmap(feature_map)(inputs)
  rows = account.make_tokens(moved, labels, feature_map(query))
  start = jnp.zeros((d_y, moved.shape[1]))
  layer = account.construct(0.5, len(inputs), initial=start)
  answer = account.predict(account.repeat(layer, 1), rows, d_y=d_y)
  step = account.kernel_step(kernel, inputs, labels, query, 0.5)
  return _relative(answer, step)


def _relative(a, b):
  return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))


def test_tasks(config) -> data.Tasks:
  """The fixed tasks of every evaluation."""
  key = jax.random.fold_in(jax.random.key(config.seed), 2**17)
  return data.draw(key, config.num_test_tasks, config)


def linear_model(config) -> models.Model:
  """One layer of linear self-attention."""
  return models.stack_model(LINEAR, config.d_x + 1)


def gradient_descent(config, tasks: data.Tasks) -> dict[str, Any]:
  """One step of GD with the best step size for these very tasks."""
  size, linear = config.num_demonstrations, linear_model(config)
  unit = _stack(account.construct(1.0, size, d_x=config.d_x, dtype=jnp.float32))
  directions = training.predictions(linear, unit, tasks.tokens)
  rate = account.fit_learning_rate(directions, tasks.targets)
  layer = _stack(
    account.construct(rate, size, d_x=config.d_x, dtype=jnp.float32)
  )
  answers, slopes = behaviour(linear, layer, tasks)
  context = tasks.tokens[:, :-1]
  centred = context.at[..., :-1].add(
    -jnp.mean(context[..., :-1], axis=1, keepdims=True)
  )
  moved = jnp.concatenate([centred, tasks.tokens[:, -1:]], axis=1)
  directions = training.predictions(linear, unit, moved)
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


def alignment(records, model: models.Model, tasks: data.Tasks, descent):
  """Loss and metrics of all records of all seeds, arrays `[S, T]`."""

  def one(layers):
    answers, slopes = behaviour(model, layers, tasks)
    return {
      'loss': training.mean_loss(answers, tasks.targets),
      'preds_diff': account.predictions_difference(answers, descent['answers']),
      'model_diff': account.model_difference(slopes, descent['slopes']),
      'model_cos': account.model_cosine(slopes, descent['slopes']),
    }

  return jax.lax.map(lambda seed: jax.lax.map(one, seed), records)


def out_of_distribution(config, trained, tasks: data.Tasks, descent):
  """Losses at other input scales: trained `[S, A]`, GD and theory `[A]`."""
  linear = linear_model(config)

  def one_scale(layers, scale):
    tokens, targets = scale * tasks.tokens, scale * tasks.targets
    answers = training.predictions(linear, layers, tokens)
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
  linear = linear_model(config)

  def one(layers):
    start = _products(layers, config.d_x)

    def between(fraction):
      layer = _stack(account.interpolate(start, end, fraction))
      answers = training.predictions(linear, layer, tasks.tokens)
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


def behaviour(model: models.Model, params, tasks: data.Tasks):
  """Predictions `[B, 1]` and their slopes in the query `[B, d_x]`."""
  d_x = tasks.tokens.shape[2] - 1

  def slope(rows):
    answer = functools.partial(model.answer, params)
    return account.sensitivity(answer, rows, d_x=d_x)[0]

  answers = training.predictions(model, params, tasks.tokens)
  return answers, jax.vmap(slope)(tasks.tokens)


def _products(layers, d_x: int) -> account.Folded:
  layer = jax.tree.map(lambda w: w[0], layers)
  return account.normalise(account.fold(layer), d_x=d_x)


def _stack(layer):
  """One layer as a stack."""
  return jax.tree.map(lambda w: w[None], layer)
