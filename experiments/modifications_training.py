"""Training of `experiments.modifications`: a panel is one compiled program.

All layers, learning rates and seeds of a panel take each SGD step together, on
the same prompt of their seed. `config` is that of the experiment.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import equivalence_training as base
from experiments import harness
from experiments.modifications_layers import Group, Prompt
from iclcl_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
  """Layers that are shown together; the first is the plain layer.

  Attributes:
    name: short name.
    title: for readers.
    groups: the layers, by structure.
  """

  name: str
  title: str
  groups: tuple[Group, ...]

  @property
  def names(self) -> tuple[str, ...]:
    return sum((group.names for group in self.groups), ())

  @property
  def num_params(self) -> tuple[int, ...]:
    return sum((group.num_params for group in self.groups), ())


class Start(NamedTuple):
  """What training starts from; all leaves have a leading axis of seeds.

  Attributes:
    seeds: layers, feature maps, tasks and root keys, those of
      `experiments.equivalence`.
    extras: keys of the matrices that only modified layers have.
    noise: root keys of the random choice of negatives.
  """

  seeds: base.Seeds
  extras: jax.Array
  noise: jax.Array


def init(config: Any) -> Start:
  """Draws everything that training starts from."""

  def extra_keys(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    # `init_seeds` splits this key into three: the number 3 is unused.
    return jax.random.split(jax.random.fold_in(key, 3))

  seeds = base.init_seeds(config)
  draw = harness.compile_quickly(lambda x: jax.lax.map(extra_keys, x))
  keys = draw(jnp.arange(config.num_seeds))
  return Start(seeds, keys[:, 0], keys[:, 1])


def with_noise(keys: jax.Array, step: Array, prompts: Any) -> Prompt:
  """Adds noise to the tokens of prompts `[S, P, n, d_model]`."""
  shape = prompts.tokens.shape[1:3]

  def draw(key):
    return jax.random.uniform(jax.random.fold_in(key, step), shape, jnp.float32)

  return Prompt(prompts.tokens, jax.lax.map(draw, keys))


def train(
  config: Any,
  start: Start,
  panel: Panel,
  layers: tuple[Any, Any],
  workdir: harness.Workdir,
) -> tuple[Any, np.ndarray, np.ndarray]:
  """Trains all layers of a panel with all rates and seeds.

  Args:
    config: settings.
    start: what training starts from.
    panel: which layers.
    layers: what `init_layers` returns.
    workdir: folder of the checkpoints.

  Returns:
    Trained parameters by group, losses `[E, S, V, L]`, and the loss of
    predicting 0, `[E, S]`.
  """
  num_prompts = config.tokens_per_epoch // (config.num_demonstrations + 1)
  params, directions = layers
  descend = _scan(_sgd(config, panel))

  def epoch(params, number):
    prompts = base.draw_prompts(
      config,
      start.seeds.training,
      start.seeds.runs.task_matrix,
      number * num_prompts + jnp.arange(num_prompts),
      config.num_demonstrations,
    )
    inputs = with_noise(start.noise, number, prompts), prompts.target
    # One seed after the other: all its layers share one matrix product with
    # the directions, which is faster on a CPU than a product of batches.
    params, losses = jax.lax.map(descend, (params, directions, inputs))
    zero = jnp.mean(prompts.target**2, axis=(1, 2))
    return params, (jnp.mean(losses, axis=1), zero)

  params, (losses, zero) = harness.scan_blocks(
    epoch,
    params,
    config.num_epochs,
    block_size=config.block_epochs,
    checkpoints=workdir / 'checkpoints' / panel.name,
    description=f'{panel.title}, {config.num_seeds} seeds',
  )
  shape = *losses.shape[:2], -1, len(config.rate_factors)
  return params, np.asarray(losses).reshape(shape), np.asarray(zero)


def init_layers(config: Any, start: Start, panel: Panel) -> tuple[Any, Any]:
  """Parameters and directions of each group, axes `[S, V * L]` and `[S]`."""

  @harness.compile_quickly
  def draw(keys, runs):
    def of_group(number, group):
      def init(inputs):
        key, run = inputs
        return group.init(jax.random.fold_in(key, number), run)

      return jax.lax.map(init, (keys, runs))

    return [of_group(*pair) for pair in enumerate(panel.groups)]

  pairs = draw(start.extras, start.seeds.runs)
  counts = [len(g.names) * len(config.rate_factors) for g in panel.groups]
  params = tuple(
    jax.tree.map(lambda x, count=count: jnp.repeat(x[:, None], count, 1), p)
    for (p, _), count in zip(pairs, counts, strict=True)
  )
  return params, tuple(directions for _, directions in pairs)


def all_rates(config: Any, group: Group) -> tuple[Any, Array]:
  """Settings and learning rates of a group, with axes `[V * L]`."""
  count = len(config.rate_factors)
  settings = jax.tree.map(lambda x: jnp.repeat(x, count), group.settings)
  rates = config.learning_rate * np.asarray(config.rate_factors)
  rates = jnp.asarray(np.tile(rates, len(group.names)), jnp.float32)
  return settings, rates


def _sgd(config: Any, panel: Panel) -> Callable[..., Any]:
  """One step of all layers and rates of one seed, `[V * L]` at a time."""

  def step(all_params, all_directions, prompt, target):
    results = []
    for group, params, directions in zip(
      panel.groups, all_params, all_directions, strict=True
    ):
      settings, rates = all_rates(config, group)
      descend = jax.vmap(
        lambda *x, group=group, directions=directions: _descend(
          group, directions, prompt, target, *x
        )
      )
      results.append(descend(params, settings, rates))
    params = tuple(params for params, _ in results)
    return params, jnp.concatenate([loss for _, loss in results])

  return step


def _descend(group, directions, prompt, target, params, settings, rate):
  def loss_fn(params):
    prediction = group.predict(params, settings, directions, prompt)
    return jnp.mean((prediction - target) ** 2)

  loss, gradient = jax.value_and_grad(loss_fn)(params)
  return jax.tree.map(lambda p, g: p - rate * g, params, gradient), loss


def _scan(step_fn: Callable[..., Any]) -> Callable[..., Any]:
  """All prompts of one seed, in order."""

  def run(seed):
    params, directions, inputs = seed
    return jax.lax.scan(
      lambda params, pair: step_fn(params, directions, *pair), params, inputs
    )

  return run
