"""Trains and tests layers side by side: a panel is one compiled program.

Every layer is attention of `iclcl_jax.modified` on projected tokens. All
layers, learning rates and seeds take each SGD step together, on the same prompt
of their seed; layers of one structure share one `vmap`. Only the label column
of the value projection is ever read. A run (seed) is the unit of every
interval.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, pretraining
from experiments.modifications.comparison import Results
from iclcl_jax import features, modified, types
from iclcl_jax.types import Array, Float, Kernel, PRNGKeyArray

DIM, LABELS = pretraining.TOKEN_DIM, pretraining.LABEL_DIM
# Trained numbers: queries and keys, and the label column of the values.
PROJECTION, VALUE = DIM * DIM, DIM * LABELS


class Prompt(NamedTuple):
  tokens: Float[Array, 'n d_model']  # Demonstrations, then the query.
  noise: Float[Array, ' n']  # A random number for each token.


@types.dataclass
class Layer:
  """One attention on projected tokens; a pytree, whose settings are leaves."""

  attend: modified.Attention
  num_params: ClassVar[int] = 2 * PROJECTION + VALUE  # Trained numbers.

  def init(self, key: PRNGKeyArray, run: pretraining.Run) -> dict[str, Array]:
    """The projections of a run; `key` is for matrices that it lacks."""
    del key
    query, keys, value = run.params
    return {'query': query, 'key': keys, 'value': value[:, -LABELS:]}

  def directions(self, key: PRNGKeyArray, run: pretraining.Run) -> Array:
    """Those of the random features."""
    del key
    return run.phi.projection

  def keys(self, params: Mapping[str, Array], tokens: Array) -> Array:
    """The keys of all tokens. Shape `[n, d_k]`."""
    return tokens @ params['key']

  def predict(
    self, params: Mapping[str, Array], phi: Kernel, prompt: Prompt
  ) -> Float[Array, ' d_y']:
    """The label of the query, which is the last token."""
    tokens = prompt.tokens
    query, keys = tokens[-1] @ params['query'], self.keys(params, tokens)
    values = tokens @ params['value']
    return self.attend(phi, query, keys, values, num_query_tokens=1)


def draw_matrix(key: PRNGKeyArray, *shape: int) -> Array:
  """Entries from N(0, 1 / fan-in)."""
  return jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5


def kernel(directions: Array) -> Kernel:
  """That of positive random features, which are never formed."""
  return features.FeatureKernel(features.PositiveFeatures(directions))


class Start(NamedTuple):
  """What training starts from; all leaves have a leading axis of seeds."""

  seeds: pretraining.Seeds  # Those of `experiments.equivalence`.
  extras: Any  # Keys of the matrices that only modified layers have.
  noise: Any  # Root keys of the random choice of negatives.


@lab.once
def start_of(config: Config) -> Start:
  def extra_keys(seed):
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    # `init_seeds` splits this key into three: the number 3 is unused.
    return jax.random.split(jax.random.fold_in(key, 3))

  seeds = pretraining.init_seeds(
    config.seed, config.num_seeds, num_features=config.num_features
  )
  draw = lab.compile_quickly(lambda x: jax.lax.map(extra_keys, x))
  keys = draw(jnp.arange(config.num_seeds))
  return Start(seeds, keys[:, 0], keys[:, 1])


def _prompts(config: Config) -> pretraining.Prompts:
  return pretraining.Prompts(
    num_demonstrations=config.num_demonstrations,
    input_distribution=config.input_distribution,
    multi_task=config.multi_task,
  )


def _with_noise(keys: Any, step: Any, prompts: Any) -> Prompt:
  """Adds noise to the tokens of prompts `[S, P, n, d_model]`."""
  shape = prompts.tokens.shape[1:3]

  def draw(key):
    return jax.random.uniform(jax.random.fold_in(key, step), shape, jnp.float32)

  return Prompt(prompts.tokens, jax.lax.map(draw, keys))


@lab.once
def tests_of(config: Config) -> dict[str, tuple[Prompt, Array]]:
  """Test prompts and targets of all seeds, `[S, P, ...]`, by name."""
  start = start_of(config)

  def draw(number, **changes):
    steps = number * config.num_test_prompts
    steps = steps + jnp.arange(config.num_test_prompts)
    prompts = dataclasses.replace(_prompts(config), **changes).draw(
      start.seeds.testing, start.seeds.runs.task_matrix, steps
    )
    # Training counts epochs from 0: tests are far away.
    number = 1_000_000 + number
    return _with_noise(start.noise, number, prompts), prompts.target

  @lab.compile_quickly
  def draw_all():
    held_out, target = draw(0)
    scale = jnp.asarray(config.input_scale, held_out.tokens.dtype)
    scaled = held_out._replace(tokens=scale * held_out.tokens)
    longer = config.longer_num_demonstrations
    return {
      'held_out': (held_out, target),
      'longer': draw(1, num_demonstrations=longer),
      'scaled': (scaled, scale * target),
      'other_task': draw(2, multi_task=True),
    }

  return draw_all()


class _Group(NamedTuple):
  """Layers of one structure at all rates, on an axis `[V * L]`."""

  names: tuple[str, ...]
  layers: Layer
  rates: Array


def measure_panel(
  config: Config, name: str, layers: Mapping[str, Layer]
) -> Results:
  """Trains the layers of a panel with all rates and seeds, and tests them.

  The plain layer comes first; the name is that of its checkpoints.
  """
  start, tests = start_of(config), tests_of(config)
  groups = _groups(config, layers)
  params, directions = _init(start, groups)
  params, losses, zero = _train(config, name, start, groups, params, directions)
  tested = _test(groups, params, directions, tests)
  num_rates = len(config.rate_factors)
  trained, drawn = {}, {}
  everything = zip(groups, jax.device_get(params), directions, strict=True)
  for group, tree, x in everything:
    for i, layer in enumerate(group.names):
      own = slice(i * num_rates, (i + 1) * num_rates)
      trained[layer] = jax.tree.map(lambda x, own=own: x[:, own], tree)
      drawn[layer] = x
  order = [list(trained).index(layer) for layer in layers]

  def by_layer(losses):
    """From `[..., V * L]`, grouped, to `[..., V, L]`; infinite if diverged."""
    losses = np.asarray(losses, np.float64)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    return losses.reshape(*losses.shape[:-1], -1, num_rates)[..., order, :]

  curves = by_layer(losses)
  early, late = slice(config.early_epochs), slice(-config.early_epochs, None)
  values = {'early': _mean_ratio(curves[early], zero[early])}
  for test, (_, target) in tests.items():
    test_zero = np.mean(np.asarray(target) ** 2, axis=(1, 2))
    values[test] = by_layer(tested[test]) / test_zero[:, None, None]
  chosen = choose_rates(_mean_ratio(curves[late], zero[late]))
  fixed = config.rate_factors.index(1.0)
  if not np.all(np.isfinite(curves[:, :, 0, fixed])):
    raise ValueError(
      f'learning_rate is {config.rate:g}, with which the plain layer '
      'diverged; lower it.'
    )
  return Results(
    layers=layers,
    fixed={test: value[..., fixed] for test, value in values.items()},
    tuned={
      test: np.take_along_axis(value, chosen[..., None], axis=2)[..., 0]
      for test, value in values.items()
    },
    chosen=chosen,
    curves=curves / zero[:, :, None, None],
    params=trained,
    directions=drawn,
  )


def _groups(config, layers) -> list[_Group]:
  """Stacks layers of one structure, each once for every rate."""
  rates = config.rate * np.asarray(config.rate_factors)
  alike: dict[Any, list[str]] = {}
  for name, layer in layers.items():
    alike.setdefault(jax.tree.structure(layer), []).append(name)

  def stack(*settings):
    dtype = jnp.int32 if isinstance(settings[0], int) else jnp.float32
    return jnp.repeat(jnp.array(settings, dtype), rates.size)

  return [
    _Group(
      tuple(names),
      jax.tree.map(stack, *(layers[x] for x in names)),
      jnp.asarray(np.tile(rates, len(names)), jnp.float32),
    )
    for names in alike.values()
  ]


def _init(start, groups) -> tuple[Any, Any]:
  """Parameters and directions of each group, axes `[S, V * L]` and `[S]`."""

  @lab.compile_quickly
  def draw(keys, runs):
    def of_layer(layer):
      return jax.lax.map(
        lambda x: (layer.init(*x), layer.directions(*x)), (keys, runs)
      )

    return [of_layer(jax.tree.map(lambda x: x[0], g.layers)) for g in groups]

  pairs = draw(start.extras, start.seeds.runs)
  params = tuple(
    jax.tree.map(lambda x, n=group.rates.size: jnp.repeat(x[:, None], n, 1), p)
    for (p, _), group in zip(pairs, groups, strict=True)
  )
  return params, tuple(directions for _, directions in pairs)


def _train(config, name, start, groups, params, directions):
  """Returns parameters, losses `[E, S, V * L]`, those of 0 `[E, S]`."""
  num_prompts = config.tokens_per_epoch // (config.num_demonstrations + 1)
  prompts, seeds = _prompts(config), start.seeds

  def descend(group, params, directions, prompt, target):
    phi = kernel(directions)

    def step(layer, rate, params):
      def loss_fn(params):
        return jnp.mean((layer.predict(params, phi, prompt) - target) ** 2)

      loss, slope = jax.value_and_grad(loss_fn)(params)
      return jax.tree.map(lambda p, g: p - rate * g, params, slope), loss

    return jax.vmap(step)(group.layers, group.rates, params)

  def of_seed(seed):
    params, directions, inputs = seed

    def step(params, pair):
      everything = zip(groups, params, directions, strict=True)
      both = [descend(*x, *pair) for x in everything]
      losses = jnp.concatenate([loss for _, loss in both])
      return tuple(new for new, _ in both), losses

    return jax.lax.scan(step, params, inputs)

  def epoch(params, number):
    steps = number * num_prompts + jnp.arange(num_prompts)
    drawn = prompts.draw(seeds.training, seeds.runs.task_matrix, steps)
    inputs = _with_noise(start.noise, number, drawn), drawn.target
    # One seed after the other: all its layers share one matrix product with
    # the directions, which is faster on a CPU than a product of batches.
    params, losses = jax.lax.map(of_seed, (params, directions, inputs))
    zero = jnp.mean(drawn.target**2, axis=(1, 2))
    return params, (jnp.mean(losses, axis=1), zero)

  params, (losses, zero) = lab.scan_blocks(
    epoch,
    params,
    config.num_epochs,
    block_size=config.block_epochs,
    name=name,
    description=f'{name}, {config.num_seeds} seeds',
  )
  return params, np.asarray(losses), np.asarray(zero)


def _test(groups, params, directions, tests) -> dict[str, np.ndarray]:
  """Mean loss of trained layers on each test set. Shapes `[S, V * L]`."""

  def errors(params, directions, prompt, target):
    def of(group, params, directions):
      phi = kernel(directions)
      labels = jax.vmap(lambda layer, p: layer.predict(p, phi, prompt))(
        group.layers, params
      )
      return jnp.mean((labels - target[None]) ** 2, axis=1)

    return jnp.concatenate(list(map(of, groups, params, directions)))

  def of_seed(inputs):
    params, directions, test = inputs
    each = jax.lax.map(lambda x: errors(params, directions, *x), test)
    return jnp.mean(each, axis=0)

  # Compiled once for all prompts of one shape.
  run = lab.compile_quickly(lambda *inputs: jax.lax.map(of_seed, inputs))
  found = {k: run(params, directions, test) for k, test in tests.items()}
  return jax.device_get(found)


def _mean_ratio(losses: np.ndarray, zero: np.ndarray) -> np.ndarray:
  return losses.mean(axis=0) / zero.mean(axis=0)[:, None, None]


def choose_rates(losses: np.ndarray) -> np.ndarray:
  """Chooses each layer's rate in each run by the other runs alone.

  From training losses `[S, V, L]`, perhaps infinite: the rate of lowest
  geometric mean over the other runs, `[S, V]`.
  """
  logs = np.log(losses)
  others = ~np.eye(logs.shape[0], dtype=bool)
  means = [logs[mask].mean(axis=0) for mask in others]
  return np.argmin(np.array(means), axis=2)
