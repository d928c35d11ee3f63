"""Tests of the layers that `experiments.modifications_training` trains."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import equivalence_training as base
from experiments import harness
from experiments import modifications_training as training
from experiments.modifications_layers import Prompt
from iclcl_jax.types import Array


class Results(NamedTuple):
  """What a panel measures. Axes: epochs E, seeds S, layers V, rates L.

  Attributes:
    losses: mean training loss of each epoch. Shape `[E, S, V, L]`.
    zero: that of predicting 0. Shape `[E, S]`.
    tests: mean loss on each test set. Shapes `[S, V, L]`.
    test_zero: that of predicting 0. Shapes `[S]`.
    params: trained parameters of each group, with axes `[S, V * L]`.
  """

  losses: np.ndarray
  zero: np.ndarray
  tests: dict[str, np.ndarray]
  test_zero: dict[str, np.ndarray]
  params: Any


def draw_tests(
  config: Any, start: training.Start
) -> dict[str, tuple[Prompt, Array]]:
  """Test prompts and targets of all seeds, `[S, P, ...]`, by name."""
  seeds = start.seeds
  fresh = dataclasses.replace(config, multi_task=True)
  short, long = config.num_demonstrations, config.longer_num_demonstrations

  def draw(settings, size, number):
    steps = number * config.num_test_prompts
    steps = steps + jnp.arange(config.num_test_prompts)
    prompts = base.draw_prompts(
      settings, seeds.testing, seeds.runs.task_matrix, steps, size
    )
    # Training counts epochs from 0: tests are far away.
    number = 1_000_000 + number
    return training.with_noise(start.noise, number, prompts), prompts.target

  @harness.compile_quickly
  def draw_all():
    held_out, target = draw(config, short, 0)
    scale = jnp.asarray(config.input_scale, held_out.tokens.dtype)
    scaled = held_out._replace(tokens=scale * held_out.tokens)
    return {
      'held_out': (held_out, target),
      'longer': draw(config, long, 1),
      'scaled': (scaled, scale * target),
      'other_task': draw(fresh, short, 2),
    }

  return draw_all()


def evaluate(
  config: Any, panel: training.Panel, layers: tuple[Any, Any], tests: Any
) -> dict[str, np.ndarray]:
  """Mean loss of trained layers on each test set. Shapes `[S, V, L]`."""

  def errors(params, directions, prompt, target):
    def of(group, params, directions):
      settings, _ = training.all_rates(config, group)
      predict = jax.vmap(group.predict, (0, 0, None, None))
      error = predict(params, settings, directions, prompt) - target[None]
      return jnp.mean(error**2, axis=1)

    parts = map(of, panel.groups, params, directions)
    return jnp.concatenate(list(parts))

  def of_seed(inputs):
    layers, tests = inputs

    def of_test(test):
      each = jax.lax.map(lambda x: errors(*layers, *x), test)
      return jnp.mean(each, axis=0)

    return jax.lax.map(of_test, tests)

  @harness.compile_quickly
  def run(layers, test):
    return jax.lax.map(of_seed, (layers, test))

  results: dict[str, np.ndarray] = {}
  for names in _same_shapes(tests):
    # Prompts of one shape together: fewer compilations.
    test = jax.tree.map(
      lambda *x: jnp.stack(x, axis=1), *(tests[name] for name in names)
    )
    losses = jax.device_get(run(layers, test))
    results |= {name: losses[:, i] for i, name in enumerate(names)}
  shape = config.num_seeds, -1, len(config.rate_factors)
  return {name: results[name].reshape(shape) for name in tests}


def _same_shapes(tests: Any) -> list[list[str]]:
  """Names of tests by the shape of their prompts."""
  shapes: dict[tuple[int, ...], list[str]] = {}
  for name, (prompts, _) in tests.items():
    shapes.setdefault(prompts.tokens.shape, []).append(name)
  return list(shapes.values())


def measure(
  config: Any,
  start: training.Start,
  panel: training.Panel,
  tests: Any,
  workdir: harness.Workdir,
) -> Results:
  """Trains a panel and tests it.

  Args:
    config: settings.
    start: what training starts from.
    panel: which layers.
    tests: what `draw_tests` returns.
    workdir: folder of the checkpoints.

  Returns:
    The results.

  Raises:
    ValueError: if the plain layer diverges at the fixed rate.
  """
  layers = training.init_layers(config, start, panel)
  params, losses, zero = training.train(config, start, panel, layers, workdir)
  if not np.all(np.isfinite(losses[..., 0, config.rate_factors.index(1.0)])):
    raise ValueError(
      f'learning_rate is {config.learning_rate:g}, with which the plain layer '
      'diverged; lower it.'
    )
  return Results(
    losses=losses,
    zero=zero,
    tests=evaluate(config, panel, (params, layers[1]), tests),
    test_zero={
      name: np.mean(np.asarray(target) ** 2, axis=(1, 2))
      for name, (_, target) in tests.items()
    },
    params=jax.device_get(params),
  )
