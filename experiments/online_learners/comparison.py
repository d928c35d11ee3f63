"""How well does each layer, untrained, learn a linear regression in context?"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import figures as drawing
from experiments.lab import statistics
from iclcl_jax import losses
from iclcl_jax.accounts import online_learners as learners

DECAY, MOMENTUM = 0.95, 0.5
GRID = tuple(float(x) for x in np.geomspace(1e-3, 1e2, 41))
# Better, worse, and who says so.
ORDERS = (
  ('delta rule', 'linear attention', 'Schlag et al., arXiv:2102.11174'),
  ('least squares (mesa)', 'delta rule', 'von Oswald et al., arXiv:2309.05858'),
)


class Layer(NamedTuple):
  """A layer of the comparison.

  Attributes:
    predict: `(tokens, parameter) -> [N, 1]`, its answers after each token.
    parameter: what is tuned.
  """

  predict: Callable[[learners.Stream, jax.Array], jax.Array]
  parameter: str


def _one_step(tokens, rate):
  """Linear attention with the step of a mean loss, `eta / N`."""
  count = jnp.arange(1, tokens.keys.shape[0] + 1, dtype=tokens.keys.dtype)
  return rate / count[:, None] * learners.linear_recurrence(tokens)


def _softmax(tokens, sharpness):
  """Softmax attention of the repeated query over every prefix."""
  scores = sharpness * jnp.sum(tokens.queries * tokens.keys, axis=1)
  weights = jnp.exp(scores - jnp.max(scores))[:, None]
  return jnp.cumsum(weights * tokens.values, 0) / jnp.cumsum(weights, 0)


LAYERS = {
  'softmax (Nadaraya-Watson)': Layer(_softmax, 'sharpness'),
  'linear attention': Layer(_one_step, 'step size times N'),
  'decay .95': Layer(
    lambda tokens, rate: (
      rate * learners.linear_recurrence(tokens, decays=DECAY)
    ),
    'step size',
  ),
  'delta rule': Layer(
    lambda tokens, rate: learners.delta_recurrence(tokens, rates=rate),
    'step size',
  ),
  'gated delta rule, .95': Layer(
    lambda tokens, rate: learners.delta_recurrence(
      tokens, rates=rate, decays=DECAY
    ),
    'step size',
  ),
  'delta rule, momentum .5': Layer(
    lambda tokens, rate: learners.descend(
      tokens, loss=losses.squared, rates=rate, momentum=MOMENTUM
    ),
    'step size',
  ),
  'least squares (mesa)': Layer(
    lambda tokens, ridge: learners.recursive_least_squares(tokens, ridge=ridge),
    'ridge',
  ),
}


class Losses(NamedTuple):
  """Losses of one layer over that of predicting 0, on groups of tasks.

  Attributes:
    tuned: its number, chosen on tasks of their own.
    by_length: after each demonstration. Shape `[G, N]`.
    by_scale: at the tuning length, by scale of the inputs. Shape `[S, G]`.
  """

  tuned: np.ndarray
  by_length: np.ndarray
  by_scale: np.ndarray


Results = Mapping[str, Losses]  # By layer.


@lab.float64_on_host()
@jax.default_matmul_precision('highest')
def measure(config: Any) -> Results:
  """Tunes each layer on one group of tasks, and measures it on the others."""
  shape = config.num_groups + 1, config.tasks_per_group
  key_inputs, key_weights = jax.random.split(jax.random.key(config.seed))
  inputs = config.half_range * jax.random.uniform(
    key_inputs, (*shape, config.max_length + 1, config.dim), minval=-1.0
  )
  weights = jax.random.normal(key_weights, (*shape, config.dim))

  def losses_of(layer, parameter, inputs, weights):
    """Mean squared error after each demonstration of a group. `[N]`."""

    def error(x, w):
      values = x[:-1] @ w
      queries = jnp.broadcast_to(x[-1][None], x[:-1].shape)
      tokens = learners.Stream(queries, x[:-1], values[:, None])
      return (layer.predict(tokens, parameter)[:, 0] - x[-1] @ w) ** 2

    squared = jax.vmap(error)(inputs, weights)
    zero = jnp.mean(jnp.sum(inputs[:, -1] * weights, 1) ** 2)
    return jnp.mean(squared, axis=0) / zero

  @functools.partial(lab.compile_quickly, static_argnames='name')
  def tuned(name, inputs, weights):
    layer, grid = LAYERS[name], jnp.asarray(GRID)
    tune = jax.lax.map(
      lambda p: losses_of(layer, p, inputs[0], weights[0]), grid
    )
    at_length = tune[:, config.tuning_length - 1]
    best = grid[jnp.nanargmin(at_length)]
    groups = inputs[1:], weights[1:]
    curves = jax.lax.map(lambda g: losses_of(layer, best, *g), groups)

    def scaled(scale):
      return jax.lax.map(
        lambda g: losses_of(layer, best, scale * g[0], g[1]), groups
      )[:, config.tuning_length - 1]

    return best, curves, jax.lax.map(scaled, jnp.asarray(config.scales))

  return {
    name: Losses(*jax.device_get(tuned(name, inputs, weights)))
    for name in LAYERS
  }


def judged_length(config: Any) -> int:
  """The number of demonstrations at which layers are compared."""
  return min(2 * config.dim, config.max_length)


def losses_at(results: Results, length: int) -> dict[str, lab.Estimate]:
  """Loss of each layer after so many demonstrations, mean over groups."""
  return {
    name: statistics.mean(found.by_length[:, length - 1])
    for name, found in results.items()
  }


def claims(config: Any, results: Results) -> list[lab.Claim]:
  at = judged_length(config)
  return [
    lab.Claim(
      id=f'online-learners-{better}-beats-{worse}',
      source=source,
      claim=f'{better} learns better in context than {worse}',
      statistic=f'loss ratio after {at} demonstrations, geometric mean over '
      'groups of tasks; below 1',
      estimate=statistics.paired_ratio(
        results[better].by_length[:, at - 1],
        results[worse].by_length[:, at - 1],
      ),
      at_most=1.0,
    )
    for better, worse, source in ORDERS
  ]


def figures(config: Any, results: Results) -> list[lab.Figure]:
  caption = (
    'Loss of untrained layers on linear regression in context, over that of '
    'predicting 0: against the number of demonstrations (left) and against the '
    f'scale of the inputs at {config.tuning_length} demonstrations (right). '
    f'One number of each layer is tuned at {config.tuning_length} '
    'demonstrations and scale 1, on other tasks. Means over '
    f'{config.num_groups} groups of {config.tasks_per_group} tasks with their '
    '95 % intervals, mostly narrower than the lines.'
  )
  return [lab.Figure('learners', _draw(config, results), caption)]


def _draw(config: Any, results: Results) -> Any:
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
  sizes = np.arange(1, config.max_length + 1)
  for index, (name, found) in enumerate(results.items()):
    for axis, x, samples in (
      (axes[0], sizes, found.by_length.T),
      (axes[1], config.scales, found.by_scale),
    ):
      drawing.band(
        axis,
        x,
        [statistics.mean(row) for row in samples],
        markevery=max(1, len(x) // 8),
        label=name,
        **drawing.look(index),
      )
  for axis, tuned in zip(axes, (config.tuning_length, 1), strict=True):
    axis.axhline(1, color=drawing.BLACK, linewidth=0.8)
    axis.axvline(tuned, color=drawing.BLACK, linestyle=':')
    axis.set_yscale('log')
    axis.set_ylim(1e-3, 30)
  axes[0].set_ylabel('loss / loss of predicting 0')
  axes[0].set_xlabel('number of demonstrations (dotted: where tuned)')
  axes[1].set_xlabel('scale of the inputs (dotted: where tuned)')
  axes[1].legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
  return figure


def summary(config: Any, results: Results) -> dict[str, Any]:
  return {
    'tuned': {name: found.tuned for name, found in results.items()},
    'loss_by_num_demonstrations': _means(results, 'by_length', axis=0),
    'loss_by_scale': _means(results, 'by_scale', axis=1),
    'scales': config.scales,
  }


def _means(results: Results, name: str, axis: int) -> dict[str, np.ndarray]:
  return {k: getattr(x, name).mean(axis=axis) for k, x in results.items()}


def metrics(config: Any, results: Results) -> list[dict[str, Any]]:
  return [
    {'layer': name, 'num_demonstrations': size + 1, 'loss': curve[size]}
    for name, curve in _means(results, 'by_length', axis=0).items()
    for size in range(config.max_length)
  ]


PART = lab.Part(measure, claims, figures, summary=summary, metrics=metrics)
