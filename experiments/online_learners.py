"""Sequence layers as online learners: identities, and what each one learns.

Is each published recurrence, and its parallel form, the inner gradient step (or
exact solve) that it is said to be (`identities`)? And how well does each of
them, untrained, learn a linear regression in context (`comparison`)? One number
is tuned for each layer at one length, then come other lengths and scales::

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
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import figures as drawing, statistics
from iclcl_jax import attention, losses
from iclcl_jax.accounts import online_learners as learners


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  dim: int = lab.count(10, 'width d of the inputs', tiny=3)
  num_groups: int = lab.option(10, 'groups of tasks', minimum=5, tiny=5)
  tasks_per_group: int = lab.count(500, 'tasks of a group', tiny=20)
  half_range: float = lab.option(0.5, 'a of inputs U(-a, a)', minimum=1e-3)
  tuning_length: int = lab.count(
    10, 'demonstrations of the tuning', at_most='max_length', tiny=4
  )
  max_length: int = lab.count(40, 'largest number of demonstrations', tiny=8)
  scales: tuple[float, ...] = lab.option(
    (0.5, 0.75, 1.0, 1.5, 2.0), 'input scales', minimum=1e-3, tiny=(1.0, 2.0)
  )


# Is each recurrence, and its parallel form, its inner learner?

EXACT = 1e-12
DECAY, MOMENTUM = 0.95, 0.5


# By learner, the largest difference between its definition and its other forms,
# over the largest output, in float64.
Residuals = Mapping[str, float]


@lab.float64_on_host()
def measure_identities(config: Config) -> Residuals:
  rng = np.random.default_rng(config.seed)
  size, width = max(2 * config.max_length, config.dim), config.dim
  arrays = rng.normal(size=(3, size, width)) / width**0.5
  tokens = learners.Stream(*map(jnp.asarray, arrays))
  rates, decays = jnp.asarray(rng.uniform(0.2, 1, size=(2, size)))
  forms = _forms(rates, decays, width)

  @lab.compile_quickly
  def outputs(tokens):
    return {
      name: [fn(tokens, **options) for fn, options in pairs]
      for name, pairs in forms.items()
    }

  def worst(first, *others):
    largest = max(np.max(np.abs(other - first)) for other in others)
    return float(largest / np.max(np.abs(first)))

  found = jax.device_get(outputs(tokens))
  return {name: worst(*rows) for name, rows in found.items()}


def _forms(rates, decays, width: int) -> dict[str, list[tuple[Any, Any]]]:
  """By learner, its definition and then its other forms, with arguments."""
  descend, linear = learners.descend, learners.linear_recurrence
  squared = functools.partial(descend, loss=losses.squared)
  delta = learners.delta_recurrence
  chunked = [functools.partial(f, chunk_size=64) for f in (linear, delta)]
  gate, both = {'decays': decays}, {'rates': rates}
  gates = {'decays': decays[:, None] ** rates[None, :width]}
  gated = both | gate
  ridge = {'ridge': 0.1}
  return {
    'linear attention': [(f, {}) for f in (descend, linear, chunked[0])],
    'decay': [(f, gate) for f in (descend, linear, chunked[0])],
    'vector gate': [(f, gates) for f in (descend, linear)],
    'delta rule': [(f, both) for f in (squared, delta, chunked[1])],
    'gated delta rule': [(f, gated) for f in (squared, delta, chunked[1])],
    'momentum': [(descend, {'momentum': MOMENTUM}), (_momentum_attention, {})],
    'least squares (mesa)': [
      (f, ridge)
      for f in (learners.least_squares, learners.recursive_least_squares)
    ],
    'softmax': [
      (functools.partial(_over_prefixes, attend), {})
      for attend in (attention.softmax_attention, learners.softmax_recurrence)
    ],
  }


def _momentum_attention(tokens: learners.Stream) -> jax.Array:
  weights = learners.momentum_attention_weights(tokens.keys.shape[0], MOMENTUM)
  return (weights * (tokens.queries @ tokens.keys.T)) @ tokens.values


def _over_prefixes(attend: Callable[..., Any], tokens: learners.Stream) -> Any:
  """Lets every query attend to the tokens up to its own."""
  seen = jnp.tril(jnp.ones((len(tokens.keys),) * 2, bool))

  def answer(query, mask):
    return attend(query, tokens.keys, tokens.values, mask=mask)

  return jax.vmap(answer)(tokens.queries, seen)


def identity_claims(config: Config, results: Residuals) -> list[lab.Claim]:
  return lab.statements(
    'online-learners-',
    '\n'.join(
      f"""{name} [iclcl_jax.accounts.online_learners] {name}: recurrence and
      parallel form are the inner learner | largest difference of the forms over
      the largest output, float64"""
      for name in results
    ),
    {name: lab.at_most(EXACT, x) for name, x in results.items()},
  )


def identity_summary(config: Config, results: Residuals) -> dict[str, Any]:
  return {'residuals_float64': results}


# How well does each layer, untrained, learn a linear regression in context?

GRID = tuple(float(x) for x in np.geomspace(1e-3, 1e2, 41))
# Better, worse, and who says so.
ORDERS = (
  ('delta rule', 'linear attention', 'Schlag et al., arXiv:2102.11174'),
  ('least squares (mesa)', 'delta rule', 'von Oswald et al., arXiv:2309.05858'),
)


def _one_step(tokens, rate):
  """Linear attention with the step of a mean loss, `eta / N`."""
  count = jnp.arange(1, tokens.keys.shape[0] + 1, dtype=tokens.keys.dtype)
  return rate / count[:, None] * learners.linear_recurrence(tokens)


def _softmax(tokens, sharpness):
  """Softmax attention of the repeated query over every prefix."""
  scores = sharpness * jnp.sum(tokens.queries * tokens.keys, axis=1)
  weights = jnp.exp(scores - jnp.max(scores))[:, None]
  return jnp.cumsum(weights * tokens.values, 0) / jnp.cumsum(weights, 0)


# `(tokens, number) -> [N, 1]`: the answers after each token, with a number that
# is tuned: sharpness, step size (of linear attention times N), or ridge.
LAYERS: Mapping[str, Callable[[learners.Stream, jax.Array], jax.Array]] = {
  'softmax (Nadaraya-Watson)': _softmax,
  'linear attention': _one_step,
  'decay .95': lambda tokens, rate: (
    rate * learners.linear_recurrence(tokens, decays=DECAY)
  ),
  'delta rule': lambda tokens, x: learners.delta_recurrence(tokens, rates=x),
  'gated delta rule, .95': lambda tokens, rate: learners.delta_recurrence(
    tokens, rates=rate, decays=DECAY
  ),
  'delta rule, momentum .5': lambda tokens, rate: learners.descend(
    tokens, loss=losses.squared, rates=rate, momentum=MOMENTUM
  ),
  'least squares (mesa)': lambda tokens, ridge: (
    learners.recursive_least_squares(tokens, ridge=ridge)
  ),
}


class Losses(NamedTuple):
  """Losses of one layer over that of predicting 0, on groups of tasks."""

  tuned: np.ndarray  # Its number, chosen on tasks of their own.
  by_length: np.ndarray  # After each demonstration. Shape `[G, N]`.
  by_scale: np.ndarray  # At the tuning length, by scale of inputs, `[S, G]`.


Results = Mapping[str, Losses]  # By layer.


@lab.float64_on_host()
def measure(config: Config) -> Results:
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
      return (layer(tokens, parameter)[:, 0] - x[-1] @ w) ** 2

    squared = jax.vmap(error)(inputs, weights)
    zero = jnp.mean(jnp.sum(inputs[:, -1] * weights, 1) ** 2)
    return jnp.mean(squared, axis=0) / zero

  @functools.partial(lab.compile_quickly, static_argnames='name')
  def tuned(name, inputs, weights):
    fn, grid = LAYERS[name], jnp.asarray(GRID)
    tune = jax.lax.map(lambda p: losses_of(fn, p, inputs[0], weights[0]), grid)
    at_length = tune[:, config.tuning_length - 1]
    best = grid[jnp.nanargmin(at_length)]
    groups = inputs[1:], weights[1:]
    curves = jax.lax.map(lambda g: losses_of(fn, best, *g), groups)

    def scaled(scale):
      return jax.lax.map(
        lambda g: losses_of(fn, best, scale * g[0], g[1]), groups
      )[:, config.tuning_length - 1]

    return best, curves, jax.lax.map(scaled, jnp.asarray(config.scales))

  found = {name: tuned(name, inputs, weights) for name in LAYERS}
  return {name: Losses(*jax.device_get(x)) for name, x in found.items()}


def judged_length(config: Config) -> int:
  return min(2 * config.dim, config.max_length)


def claims(config: Config, results: Results) -> lab.Claims:
  at = judged_length(config)
  for better, worse, source in ORDERS:
    losses = (results[x].by_length[:, at - 1] for x in (better, worse))
    name = f'{better}-beats-{worse}'
    yield from lab.statements(
      'online-learners-',
      f"""{name} [{source}] {better} learns better in context than {worse} |
      loss ratio after {at} demonstrations, geometric mean over groups of
      tasks""",
      {name: lab.at_most(1.0, statistics.paired_ratio(*losses))},
    )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 2, figsize=(12, 4.6), sharey=True)
  sizes = np.arange(1, config.max_length + 1)
  for index, (name, found) in enumerate(results.items()):
    for axis, x, samples in (
      (axes[0], sizes, found.by_length),
      (axes[1], config.scales, found.by_scale.T),
    ):
      look = drawing.look(index) | {'markevery': max(1, len(x) // 8)}
      drawing.means(axis, x, samples, label=name, **look)
  for axis, tuned in zip(axes, (config.tuning_length, 1), strict=True):
    axis.axhline(1, color=drawing.BLACK, linewidth=0.8)
    axis.axvline(tuned, color=drawing.BLACK, linestyle=':')
    axis.set(yscale='log', ylim=(1e-3, 30))
  axes[0].set_ylabel('loss / loss of predicting 0')
  axes[0].set_xlabel('number of demonstrations (dotted: where tuned)')
  axes[1].set_xlabel('scale of the inputs (dotted: where tuned)')
  axes[1].legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
  caption = f"""Loss of untrained layers on linear regression in context, over
    that of predicting 0, against the number of demonstrations (left) and the
    scale of the inputs at {config.tuning_length} demonstrations (right), where
    one number of each layer is tuned at scale 1, on other tasks. Means over
    {config.num_groups} groups of {config.tasks_per_group} tasks with their 95 %
    intervals, mostly narrower than the lines."""
  return [lab.Figure('learners', figure, caption)]


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'tuned': {name: found.tuned for name, found in results.items()},
    'loss_by_num_demonstrations': _means(results, 'by_length', axis=0),
    'loss_by_scale': _means(results, 'by_scale', axis=1),
    'scales': config.scales,
  }


def _means(results: Results, name: str, axis: int) -> dict[str, np.ndarray]:
  return {k: getattr(x, name).mean(axis=axis) for k, x in results.items()}


PARTS = {
  'identities': lab.Part(
    measure_identities, identity_claims, summary=identity_summary
  ),
  'comparison': lab.Part(measure, claims, figures, summary),
}


def conclude(config, results, claims) -> str:
  at = judged_length(config)
  losses = ', '.join(
    f'{name} {statistics.mean(found.by_length[:, at - 1]):.2g}'
    for name, found in results['comparison'].items()
  )
  worst = max(results['identities'].values())
  return f"""Every recurrence, and every parallel form, is its inner learner, up
    to {worst:.0e} in float64. As learners of a linear regression with
    {config.dim} inputs they differ: after {at} demonstrations the loss over
    that of predicting 0 is {losses}."""


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
