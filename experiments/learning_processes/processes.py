"""Do the self-supervised processes collapse, and what do they represent?

SimSiam, BYOL and kernel learning descend on the weights of `f(x) = W phi(x)`
and see two views of the same tokens, their keys and their values. They compare
`f` with the second view, through `W` itself (SimSiam, behind a stop-gradient)
or a moving average of it (BYOL), by a predictor and cosines; or an anchor with
its other view and another token's, with orthonormal rows of `W` (kernel
learning).

References:
  Chen & He, arXiv:2011.10566, eq. 1 to 4 (SimSiam); Grill et al.,
  arXiv:2006.07733, eq. 2 (BYOL); Esser, Fleissner & Ghoshdastidar,
  arXiv:2309.02028 (contrastive kernel learning).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing
from experiments.learning_processes import prompts
from experiments.learning_processes.prompts import Encoder
from iclcl_jax import losses
from iclcl_jax.types import Array, Float

Branch: TypeAlias = Callable[[Encoder, Array], Array]
SIMSIAM = 'Chen & He, arXiv:2011.10566, Fig. 2, in this small setting'
BYOL = 'Grill et al., arXiv:2006.07733, in this small setting'
KERNELS = 'Esser et al., arXiv:2309.02028'
KEPT, COLLAPSED = 0.9, 0.1  # Shares of the spread at the start.
DUAL, KERNEL = 'dual model', 'kernel learning'


class Process(NamedTuple):
  """Two branches, each `(encoder, features [N, R]) -> [N, d]`."""

  online: Branch
  target: Branch


def through(part: str) -> Branch:
  """Features through `weights` or their moving `average`."""
  return lambda encoder, features: features @ getattr(encoder, part).T


def predicted(encoder: Encoder, features: Array) -> Array:
  """Features through the weights, then the predictor."""
  return features @ encoder.weights.T @ encoder.predictor.T


def stopped(branch: Branch) -> Branch:
  """The same branch, through which no gradient flows."""
  return lambda encoder, x: jax.lax.stop_gradient(branch(encoder, x))


PROCESSES = {
  'SimSiam': Process(predicted, stopped(through('weights'))),
  'BYOL': Process(predicted, stopped(through('average'))),
  'SimSiam without predictor': Process(
    through('weights'), stopped(through('weights'))
  ),
  'SimSiam without stop-gradient': Process(predicted, through('weights')),
  'SimSiam without both': Process(through('weights'), through('weights')),
}


def cosine_loss(
  process: Process, encoder: Encoder, first: Array, second: Array
) -> Float[Array, '']:
  """Mean of minus the cosine of both views, each as the online one once."""

  def one_way(a, b):
    online, target = process.online(encoder, a), process.target(encoder, b)
    return losses.cosine(online, target) / a.shape[0]

  return (one_way(first, second) + one_way(second, first)) / 2


def train(
  config: Config,
  process: Process,
  encoder: Encoder,
  pair: tuple[Array, Array],
  observe: Callable[[Encoder], Any],
) -> Any:
  """Descends on `cosine_loss` of both views `[N, R]`.

  Returns what `observe(encoder)` saw before every step and after the last.
  """

  def step(encoder):
    slope = jax.grad(lambda e: cosine_loss(process, e, *pair))(encoder)
    weights, predictor = (
      x - config.learning_rate * y
      for x, y in zip(encoder[:2], slope[:2], strict=True)
    )
    kept = config.momentum * encoder.average
    return Encoder(weights, predictor, kept + (1 - config.momentum) * weights)

  return _follow(step, encoder, config.num_process_steps, observe)


def _follow(step, state, num_steps, observe) -> Any:
  state, seen = jax.lax.scan(
    lambda state, _: (step(state), observe(state)), state, length=num_steps
  )
  last = observe(state)
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), seen, last)


def kernel_loss(weights: Array, first: Array, second: Array) -> Array:
  """Mean of `f(anchor) . (f(negative) - f(positive))`.

  The positive of a token is its second view, its negative that of the next.
  """
  apart = jnp.roll(second, -1, axis=0) - second
  outputs = (first @ weights.T) * (apart @ weights.T)
  return jnp.sum(outputs) / first.shape[0]


def orthonormal_rows(weights: Float[Array, 'd R']) -> Float[Array, 'd R']:
  """The nearest orthonormal rows, by Newton's iteration.

  Converges for singular values in `(0, sqrt(3))`, quickly around 1.
  """
  for _ in range(10):
    weights = 1.5 * weights - 0.5 * (weights @ weights.T) @ weights
  return weights


class KernelProblem(NamedTuple):
  start: Float[Array, 'd R']  # Orthonormal rows.
  best: Float[Array, '']  # The least loss.
  step_size: Float[Array, '']  # Half the inverse of the largest curvature.


def kernel_problem(weights: Array, pair: tuple[Array, Array]) -> KernelProblem:
  """Solves kernel learning from the span of the rows of `weights`.

  The loss is one quadratic form of each row: for orthonormal rows it is at
  least a sum of the lowest eigenvalues.
  """
  curvature = jax.hessian(lambda row: kernel_loss(row[None], *pair))(weights[0])
  eigenvalues = jnp.linalg.eigvalsh(curvature)
  best = jnp.sum(eigenvalues[: weights.shape[0]]) / 2
  start = jnp.linalg.qr(weights.T)[0].T
  return KernelProblem(start, best, 0.5 / jnp.max(jnp.abs(eigenvalues)))


def train_kernel(
  problem: KernelProblem,
  pair: tuple[Array, Array],
  num_steps: int,
  observe: Callable[[Array], Any],
) -> Any:
  """Projected gradient descent on `kernel_loss`; returns as `train`."""

  def step(weights):
    slope = jax.grad(kernel_loss)(weights, *pair)
    return orthonormal_rows(weights - problem.step_size * slope)

  return _follow(step, problem.start, num_steps, observe)


# By process, by quantity, before every step and after the last: arrays
# `[S, P, T + 1]`; of the dual model after its one step, `[S, P]`.
Looks = Mapping[str, Mapping[str, Any]]


def measure(config: Config) -> dict[str, Looks]:
  found = prompts.of_every(config, lambda prompt: _looks(config, prompt))
  if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found)):
    raise ValueError(
      f'learning_rate is {config.learning_rate:g}, too large: weights or '
      'outputs of a process are not finite. Lower it.'
    )
  return found


def _looks(config: Config, prompt: prompts.Prompt) -> Looks:
  values, keys = prompt.values[:-1], prompt.views.keys
  first, second = pair = prompt.views.pair()
  step = values.T @ keys  # Attention's.
  dual, query = keys @ step.T, prompt.views.query

  def look(weights, targets, loss):
    outputs = first @ weights.T
    return {
      'output_spread': spread(outputs),
      'target_spread': spread(targets),
      'alignment': alignment(outputs, dual),
      'answer_angle': prompts.angle(weights @ query, step @ query),
      'loss': loss,
    }

  def along(process):
    def observe(encoder):
      loss = cosine_loss(process, encoder, *pair)
      return look(encoder.weights, process.target(encoder, second), loss)

    return train(config, process, prompt.start, pair, observe)

  problem = kernel_problem(prompt.start.weights, pair)

  def see(weights):
    loss = kernel_loss(weights, *pair) / problem.best
    excess = weights @ weights.T - jnp.eye(weights.shape[0])
    found = look(weights, second @ weights.T, loss)
    return found | {'constraint': jnp.max(jnp.abs(excess))}

  return {
    DUAL: {'output_spread': spread(dual), 'target_spread': spread(values)},
    **{name: along(x) for name, x in PROCESSES.items()},
    KERNEL: train_kernel(problem, pair, config.num_process_steps, see),
  }


def spread(rows: Float[Array, 'N d']) -> Float[Array, '']:
  """0 if all rows point one way (collapse), 1 if their directions cancel."""
  mean = jnp.mean(prompts.normalise(rows), axis=0)
  return jnp.sqrt(jnp.maximum(1 - mean @ mean, 0))


def alignment(a: Float[Array, 'N d'], b: Float[Array, 'N d']) -> Array:
  """Linear centred kernel alignment: blind to rotations and scales."""
  a, b = (x - jnp.mean(x, axis=0)[None] for x in (a, b))
  cross = jnp.sum((a.T @ b) ** 2)
  own = [jnp.linalg.norm(x.T @ x) for x in (a, b)]
  return cross / (own[0] * own[1])


def claims(config: Config, results: Mapping[str, Looks]) -> lab.Claims:
  for data, looks in results.items():
    spread = looks[DUAL]['output_spread'] / looks[DUAL]['target_spread']
    kept = {
      name: look['output_spread'][..., -1] / look['output_spread'][..., 0]
      for name, look in looks.items()
      if name != DUAL
    }
    yield from prompts.statements(
      data,
      f"""
      dual_keeps_the_spread_of_its_targets [{prompts.COMPARISON}] one step of
        the dual model does not collapse | spread of its predictions / of the
        values
      kernel_learning_finds_its_optimum [{KERNELS}] contrastive kernel learning
        ends in the lowest eigenvectors | loss / least loss
      SimSiam_keeps_its_spread [{SIMSIAM}] SimSiam does not collapse | spread of
        outputs, end / start
      BYOL_keeps_its_spread [{BYOL}] BYOL does not collapse | spread of outputs,
        end / start
      """,
      {
        'dual_keeps_the_spread_of_its_targets': lab.at_least(0.5, spread),
        'kernel_learning_finds_its_optimum': lab.at_least(
          0.99, looks[KERNEL]['loss'][..., -1]
        ),
        'SimSiam_keeps_its_spread': lab.at_least(KEPT, kept['SimSiam']),
        'BYOL_keeps_its_spread': lab.at_least(KEPT, kept['BYOL']),
      },
    )
    for missing in ('predictor', 'stop-gradient', 'both'):
      name, key = f'SimSiam without {missing}', f'SimSiam_without_{missing}'
      less = kept[name] - kept['SimSiam']
      yield from prompts.statements(
        data,
        f"""
        {key}_collapses [{SIMSIAM}] {name} collapses | spread of outputs, end /
          start
        {key}_loses_spread [{SIMSIAM}] {name} loses more spread than SimSiam |
          difference of spreads of outputs, end / start
        """,
        {
          f'{key}_collapses': lab.at_most(COLLAPSED, kept[name]),
          f'{key}_loses_spread': lab.at_most(0, less),
        },
      )


def figures(config: Config, results: Mapping[str, Looks]) -> list[lab.Figure]:
  figure, axes = drawing.subplots(
    2, len(results), figsize=(11, 8.6), sharex=True, sharey='row'
  )
  for column, (data, looks) in enumerate(results.items()):
    for row, quantity in enumerate(('output_spread', 'alignment')):
      axis = axes[row, column]
      for index, name in enumerate((*PROCESSES, KERNEL), start=1):
        prompts.draw_curve(axis, index, name, looks[name][quantity])
      level = prompts.by_seed(looks[DUAL]['output_spread']).mean()
      black = {'color': drawing.BLACK, 'linestyle': '--', 'linewidth': 2}
      axis.axhline(1 if row else level, **black, label=DUAL)
      axis.set_ylim(0, 1.05)
    axes[0, column].set_title(f'demonstrations: {data}')
    axes[1, column].set_xlabel('gradient steps + 1')
  axes[0, 0].set_ylabel('spread of the outputs')
  axes[1, 0].set_ylabel("alignment with the\ndual model's predictions")
  drawing.legend(axes[0, 0], 3, handlelength=3.2)
  caption = f"""Self-supervised learning on the same demonstrations, whose keys
    and values are the two views. Top: spread of the outputs (0: all point one
    way); the first point is the untrained start. Bottom: linear centred kernel
    alignment with the dual model's predictions (1: equal up to rotation and
    scale). Dashed: the dual model after its one step.
    {prompts.about(config, 'shaded')}"""
  return [lab.Figure('processes', figure, caption)]


def metrics(config: Config, results: Mapping[str, Looks]) -> lab.Metrics:
  for data, looks in results.items():
    for name, look in looks.items():
      yield from prompts.curve_rows(data, 'processes', name, look)
