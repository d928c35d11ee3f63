"""Do constructed layers descend? Their residuals against gradient descent."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import lab
from experiments.lab import Config
from experiments.linear_regression_gd import training
from experiments.linear_regression_gd.training import OSWALD
from iclcl_jax import attention
from iclcl_jax.accounts import linear_regression_gd as account

EXACT = 1e-12
SIZES = 7, 5, 3  # Demonstrations, inputs, labels.


# Largest relative errors of what is constructed, in float64, by claim.
Errors = Mapping[str, Any]


def measure(config: Config) -> Errors:
  size, d_x, d_y = SIZES

  def errors(key):
    shapes = (size, d_x), (size, d_y), (d_x,), (d_y, d_x)
    *problem, initial = (
      jax.random.normal(k, shape, jnp.float64)
      for k, shape in zip(jax.random.split(key, 4), shapes, strict=True)
    )
    layers = [x for n in (1, 4) for x in _layer_errors(problem, initial, n)]
    return {
      'construction': jnp.max(jnp.stack(layers)),
      'copy-construction': _copy_error(*problem),
      'kernel-construction': _kernel_error(*problem),
    }

  return lab.largest_errors(errors, config.seed, config.num_seeds)


def _layer_errors(problem, initial, num_steps: int):
  """Layers against GD from `W_0`, and against GD++."""
  inputs, labels, query = problem
  d_y, d_x = initial.shape
  size, rates = len(inputs), jnp.full(num_steps, 0.5)
  tokens = account.make_tokens(*problem, initial=initial)
  layer = account.construct(0.5, size, initial=initial)
  layers = account.repeat(layer, num_steps)
  weights = account.descend(inputs, labels, rates, initial=initial)
  yield lab.distance(account.predict(layers, tokens, d_y=d_y), weights @ query)
  start = jnp.zeros((d_y, d_x))
  layer = account.construct(0.5, size, start, contraction=0.02)
  layers = account.repeat(layer, num_steps)
  factors = rates, 0.02 * jnp.ones(num_steps)
  tokens = account.make_tokens(*problem)
  answer = account.descend_plus_plus(inputs, labels, query, *factors)
  yield lab.distance(account.predict(layers, tokens, d_y=d_y), answer)


def _copy_error(inputs, labels, query):
  """A copy layer and two layers on separate tokens against two steps."""
  (size, d_x), d_y = inputs.shape, labels.shape[1]
  length = 2 * size + 1
  codes = jnp.eye(length)
  rows = account.make_alternating_tokens(inputs, labels, query, codes)
  copy = account.construct_copy(size, d_x=d_x, d_y=d_y, dtype=jnp.float64)
  rows = account.attend(
    copy,
    rows,
    weights_fn=account.softmax_weights,
    visible=jnp.ones((length, length), bool),
  )
  layer = account.construct(0.5, size, initial=jnp.zeros((d_y, d_x)))
  layers = account.repeat(account.widen(layer, length), 2)
  weights = account.descend(inputs, labels, jnp.full(2, 0.5))
  return lab.distance(account.predict(layers, rows, d_y=d_y), weights @ query)


def _kernel_error(inputs, labels, query):
  """The layer on features against a step of kernel regression."""
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
  step = attention.linear_attention(kernel, query, inputs, 0.5 * labels)
  return lab.distance(answer, step / len(inputs))


def claims(config: Config, errors: Errors) -> lab.Claims:
  return training.statements(
    f"""
    construction [{OSWALD}, proposition 1] constructed layers do gradient
      descent, and GD++, from any W_0 | largest relative error over 1 and 4
      layers and random problems, float64
    copy-construction [{OSWALD}, section 5] a constructed copy layer, then
      constructed layers, do gradient descent on inputs and labels that come as
      separate tokens | largest relative error, float64
    kernel-construction [{OSWALD}, proposition 2] the constructed layer on
      features of a network is one step of kernel regression | largest relative
      error, float64
    """,
    {name: lab.at_most(EXACT, error) for name, error in errors.items()},
  )


def summary(config: Config, errors: Errors) -> dict[str, Any]:
  return {
    f'{name.removesuffix("-construction")}_residual_float64': error
    for name, error in errors.items()
  }


def sentence(config: Config, errors: Errors) -> str:
  return f"""Constructed linear self-attention does gradient descent up to
    {errors['construction']:.1e} (float64)."""
