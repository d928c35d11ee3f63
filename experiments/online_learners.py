r"""Sequence layers as online learners: identities, and what each one learns.

Two questions. Is each published recurrence, and its parallel form, the inner
gradient step (or exact solve) that it is said to be? A residual says so. And
how well does each of them, untrained, learn a linear regression in context?
The same tasks for all, one number tuned for each layer at one length, then
other lengths and input scales::

  python -m experiments.online_learners --workdir=out/online_learners

It takes about 20 s of CPU time. Expect residuals of at most 1e-15 and, after 20
demonstrations of width 10, losses over that of predicting 0 of .55 (softmax),
.39 (linear attention), .15 (delta rule) and 1e-5 or less (least squares).

Tasks: `y = w . x` with `w` from N(0, I), inputs from U(-a, a), no noise; the
loss is relative to that of predicting 0. A group of tasks is the unit of the
intervals (95 %, t).

References:
  iclcl_jax.accounts.online_learners, whose table names the papers.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import equivalence_figures, harness
from experiments.claims import claims_text, judge
from iclcl_jax import _validate, features, losses
from iclcl_jax.accounts import online_learners as learners

COMMAND = 'python -m experiments.online_learners --workdir=DIR'
EXACT = 1e-12
DECAY, MOMENTUM = 0.95, 0.5
GRID = tuple(float(x) for x in np.geomspace(1e-3, 1e2, 41))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  seed: int = harness.option(0, 'root of all random numbers')
  dim: int = harness.option(10, 'width d of the inputs')
  num_groups: int = harness.option(10, 'groups of tasks, at least 5')
  tasks_per_group: int = harness.option(500, 'tasks of a group')
  half_range: float = harness.option(0.5, 'inputs are from U(-a, a)')
  tuning_length: int = harness.option(10, 'demonstrations at which is tuned')
  max_length: int = harness.option(40, 'most demonstrations')
  scales: tuple[float, ...] = harness.option(
    (0.5, 0.75, 1.0, 1.5, 2.0), 'input scales, at the tuning length'
  )

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    _validate.check_count('num_groups', self.num_groups, minimum=5)
    for name in ('dim', 'tasks_per_group', 'tuning_length', 'max_length'):
      _validate.check_count(name, getattr(self, name))
    _validate.check_scalar('half_range', self.half_range, minimum=1e-3)
    for scale in self.scales:
      _validate.check_scalar('scales', scale, minimum=1e-3)
    if self.tuning_length > self.max_length:
      raise ValueError(
        f'tuning_length is {self.tuning_length}; expected at most max_length, '
        f'{self.max_length}.'
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


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Checks the identities, compares the learners, draws.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary.

  Raises:
    ValueError: if the workdir cannot be used.
  """
  start = time.perf_counter()
  path = harness.open_workdir(config, workdir)
  with harness.float64_on_host(), jax.default_matmul_precision('highest'):
    residuals = _residuals(config)
    result = _compare(config)
  summary = _summarise(config, residuals, result)
  summary['seconds'] = time.perf_counter() - start
  harness.write_metrics(
    path,
    [
      {'layer': name, 'num_demonstrations': size + 1, 'loss': curve[size]}
      for name, curve in summary['loss_by_num_demonstrations'].items()
      for size in range(config.max_length)
    ],
  )
  with equivalence_figures.style():
    harness.save_figure(path, 'learners', _figure(config, result))
  summary = dict(harness.write_summary(path, summary))
  print(claims_text(summary))
  return summary


def _residuals(config: Config) -> dict[str, float]:
  """Largest difference between the definition and the other forms."""
  rng = np.random.default_rng(config.seed)
  size, width = 2 * config.max_length, config.dim
  arrays = rng.normal(size=(3, size, width)) / width**0.5
  tokens = learners.stream(
    features.IdentityFeatures(), *(jnp.asarray(x) for x in arrays)
  )
  rates, decays = jnp.asarray(rng.uniform(0.2, 1, size=(2, size)))
  initial = jnp.asarray(rng.normal(size=(width, width)))
  squared = functools.partial(learners.descend, loss=losses.squared)
  linear, delta = learners.linear_recurrence, learners.delta_recurrence
  chunked = learners.linear_parallel, learners.delta_parallel
  start = {'initial': initial}
  gate, both = start | {'decays': decays}, start | {'rates': rates}
  ridge = {'ridge': 0.1}
  forms: dict[str, list[tuple[Callable[..., Any], dict[str, Any]]]] = {
    'linear attention': [
      (f, start) for f in (learners.descend, linear, chunked[0])
    ],
    'decay': [(f, gate) for f in (learners.descend, linear, chunked[0])],
    'vector gate': [
      (f, start | {'decays': decays[:, None] ** rates[None, :width]})
      for f in (learners.descend, linear)
    ],
    'delta rule': [(f, both) for f in (squared, delta, chunked[1])],
    'gated delta rule': [
      (f, both | gate) for f in (squared, delta, chunked[1])
    ],
    'momentum': [
      (learners.descend, {'momentum': MOMENTUM}),
      (_momentum_attention, {}),
    ],
    'least squares (mesa)': [
      (f, ridge)
      for f in (learners.least_squares, learners.recursive_least_squares)
    ],
  }

  @harness.compile_quickly
  def outputs(tokens):
    return {
      name: [fn(tokens, **options) for fn, options in pairs]
      for name, pairs in forms.items()
    }

  return {
    name: float(
      max(np.max(np.abs(other - first)) for other in others)
      / np.max(np.abs(first))
    )
    for name, (first, *others) in jax.device_get(outputs(tokens)).items()
  }


def _momentum_attention(tokens: learners.Stream) -> jax.Array:
  weights = learners.momentum_attention_weights(tokens.keys.shape[0], MOMENTUM)
  return (weights * (tokens.queries @ tokens.keys.T)) @ tokens.values


def _compare(config: Config) -> dict[str, Any]:
  """Losses over that of predicting 0, by layer; tuned on tasks of their own."""
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

  @functools.partial(harness.compile_quickly, static_argnames='name')
  def measure(name, inputs, weights):
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
    name: jax.device_get(measure(name, inputs, weights)) for name in LAYERS
  }


def _summarise(config: Config, residuals, result) -> dict[str, Any]:
  worst = max(residuals.values())
  at = min(2 * config.dim, config.max_length) - 1
  claims = [
    {
      'id': f'online-learners-{name}',
      'source': 'iclcl_jax.accounts.online_learners',
      'claim': f'{name}: recurrence and parallel form are the inner learner',
      'statistic': 'largest difference of the forms over the largest output, '
      f'float64; at most {EXACT:g}',
      'value': residual,
      'interval': None,
      'verdict': judge(residual, residual, at_most=EXACT),
      'command': COMMAND,
    }
    for name, residual in residuals.items()
  ]
  claims += [
    _order_claim(result, at, better, worse, source)
    for better, worse, source in (
      (
        'delta rule',
        'linear attention',
        'Schlag et al., arXiv:2102.11174',
      ),
      (
        'least squares (mesa)',
        'delta rule',
        'von Oswald et al., arXiv:2309.05858',
      ),
    )
  ]
  losses_at = {
    name: harness.mean_interval(curves[:, at])
    for name, (_, curves, _) in result.items()
  }
  text = ', '.join(
    '{name} {mean:.2g} [{low:.2g}, {high:.2g}]'.format(name=name, **estimate)
    for name, estimate in losses_at.items()
  )
  return {
    'residuals_float64': residuals,
    'tuned': {name: float(best) for name, (best, _, _) in result.items()},
    'loss_by_num_demonstrations': {
      name: np.mean(curves, axis=0) for name, (_, curves, _) in result.items()
    },
    'loss_by_scale': {
      name: np.mean(scaled, axis=1) for name, (_, _, scaled) in result.items()
    },
    'scales': config.scales,
    'claims': claims,
    'figures': [
      {
        'file': 'figures/learners.png',
        'caption': 'Loss of untrained layers on linear regression in context, '
        'over that of predicting 0: against the number of demonstrations '
        '(left) and against the scale of the inputs at '
        f'{config.tuning_length} demonstrations (right). One number of each '
        f'layer is tuned at {config.tuning_length} demonstrations and scale 1, '
        f'on other tasks. Means over {config.num_groups} groups of '
        f'{config.tasks_per_group} tasks with their 95 % intervals, mostly '
        'narrower than the lines.',
      }
    ],
    'conclusion': (
      'Every recurrence, and every parallel form, is its inner learner, up to '
      f'{worst:.0e} in float64. As learners of a linear regression with '
      f'{config.dim} inputs they differ: after {at + 1} demonstrations the '
      f'loss over that of predicting 0 is {text}.'
    ),
  }


def _order_claim(result, at, better, worse, source) -> dict[str, Any]:
  ratio = harness.mean_interval(
    np.log(result[better][1][:, at] / result[worse][1][:, at])
  )
  value, low, high = (np.exp(ratio[key]) for key in ('mean', 'low', 'high'))
  return {
    'id': f'online-learners-{better}-beats-{worse}',
    'source': source,
    'claim': f'{better} learns better in context than {worse}',
    'statistic': f'loss ratio after {at + 1} demonstrations, geometric mean '
    'over groups of tasks; below 1',
    'value': float(value),
    'interval': [float(low), float(high)],
    'verdict': judge(low, high, at_most=1.0),
    'command': COMMAND,
  }


def _figure(config: Config, result) -> Any:
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(14, 5), sharey=True)
  sizes = np.arange(1, config.max_length + 1)
  styles = ['-', '--', '-.', ':', '-', '--', '-.']
  marks = ['o', 's', '^', 'D', 'v', 'P', 'X']
  colours = [
    equivalence_figures.BLACK,
    equivalence_figures.BLUE,
    '#56B4E9',
    equivalence_figures.ORANGE,
    '#E69F00',
    '#CC79A7',
    equivalence_figures.GREEN,
  ]
  for (name, (_, curves, scaled)), style, mark, colour in zip(
    result.items(), styles, marks, colours, strict=True
  ):
    for axis, x, samples in (
      (axes[0], sizes, curves),
      (axes[1], np.asarray(config.scales), scaled.T),
    ):
      mean = samples.mean(axis=0)
      intervals = [harness.mean_interval(column) for column in samples.T]
      axis.plot(
        x,
        mean,
        style,
        marker=mark,
        markevery=max(1, len(x) // 8),
        color=colour,
        label=name,
      )
      axis.fill_between(
        x,
        [row['low'] for row in intervals],
        [row['high'] for row in intervals],
        color=colour,
        alpha=0.25,
        linewidth=0,
      )
  for axis in axes:
    axis.axhline(1, color='black', linewidth=0.8)
    axis.set_yscale('log')
    axis.set_ylim(1e-3, 30)
  axes[0].axvline(config.tuning_length, color='black', linestyle=':')
  axes[1].axvline(1, color='black', linestyle=':')
  axes[0].set_ylabel('loss / loss of predicting 0')
  axes[0].set_xlabel('number of demonstrations (dotted: where tuned)')
  axes[1].set_xlabel('scale of the inputs (dotted: where tuned)')
  axes[1].legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
  return figure


if __name__ == '__main__':
  harness.run_binary(Config, run)
