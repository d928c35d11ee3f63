"""Training of `experiments.equivalence`: all seeds at once, in blocks.

`config` is that of the experiment.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness, pretraining
from iclcl_jax import tasks

# Inputs s of the regression, and the learning rate that suits them.
INPUTS = {
  'uniform': (tasks.uniform, 0.003),
  'normal': (jax.random.normal, 0.001),
}


class Seeds(NamedTuple):
  """All runs, with a leading axis of seeds.

  Attributes:
    runs: layers before training, feature maps and tasks.
    training: root keys of the training prompts. Shape `[S]`.
    testing: root keys of the held-out prompts. Shape `[S]`.
  """

  runs: pretraining.Run
  training: jax.Array
  testing: jax.Array


def init_seeds(config: Any) -> Seeds:
  """Draws everything that training starts from; equal for every N."""

  def init(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    key_run, key_training, key_testing = jax.random.split(key, 3)
    run = pretraining.init_run(key_run, num_features=config.num_features)
    return Seeds(run, key_training, key_testing)

  seeds = jnp.arange(config.num_seeds)
  return harness.compile_quickly(lambda x: jax.lax.map(init, x))(seeds)


def draw_prompts(
  config: Any, keys: jax.Array, task_matrices: jax.Array, steps, size: int
) -> tasks.RegressionPrompt:
  """Draws the prompts of some steps for all seeds. Axes `[S, P, ...]`."""
  input_fn, _ = INPUTS[config.input_distribution]

  def draw(arguments):
    key, matrix = arguments
    task_fn = pretraining.draw_task if config.multi_task else lambda key: matrix
    return pretraining.draw_prompts(
      key, steps, task_fn, size, input_fn=input_fn
    )

  return jax.lax.map(draw, (keys, task_matrices))


def pretrain(
  config: Any, seeds: Seeds, size: int, workdir: harness.Workdir
) -> tuple[pretraining.LayerParams, np.ndarray]:
  """Trains the layers of all seeds on prompts of `size` demonstrations.

  Every prompt is new, so its loss before its step is a held-out loss.

  Returns:
    The trained layers, and by epoch and seed the mean loss and that of
    predicting 0. Shape `[num_epochs, 2, S]`.

  Raises:
    ValueError: if a loss is not finite.
  """
  num_prompts = config.tokens_per_epoch // (size + 1)
  runs = seeds.runs

  def epoch(params, step):
    steps = step * num_prompts + jnp.arange(num_prompts)
    prompts = draw_prompts(
      config, seeds.training, runs.task_matrix, steps, size
    )
    train = functools.partial(
      pretraining.train, learning_rate=config.learning_rate
    )
    params, losses = jax.vmap(train)(params, runs.phi, prompts)
    zero = jnp.mean(prompts.target**2, axis=(1, 2))
    return params, jnp.stack([jnp.mean(losses, axis=1), zero])

  params, losses = harness.scan_blocks(
    epoch,
    runs.params,
    config.num_epochs,
    block_size=config.block_epochs,
    checkpoints=workdir / 'checkpoints' / f'demonstrations_{size}',
    description=f'pretraining, N = {size}, {config.num_seeds} seeds',
  )
  if not np.all(np.isfinite(losses)):
    raise ValueError(
      f'learning_rate is {config.learning_rate:g}, with which training '
      f'diverged at N = {size}; lower it.'
    )
  return params, np.asarray(losses)


def draw_held_out(
  config: Any, seeds: Seeds, size: int
) -> tasks.RegressionPrompt:
  """Draws the held-out prompts of all seeds as NumPy arrays `[S, P, ...]`."""
  steps = jnp.arange(config.num_test_prompts)
  draw = harness.compile_quickly(
    lambda keys, matrices: draw_prompts(config, keys, matrices, steps, size)
  )
  return jax.device_get(draw(seeds.testing, seeds.runs.task_matrix))
