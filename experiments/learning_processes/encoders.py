"""What a dual model is compared with: SimSiam, BYOL, kernel learning.

All are gradient descent on the weights of `f(x) = W phi(x)` and see two views
of the same tokens, their keys and their values, through the same features. They
differ in what `f` is compared with:

SimSiam, BYOL
  the second view of the token, through `W` itself (behind a stop-gradient) or
  through a moving average of it; a predictor; cosine similarity.
contrastive kernel learning
  an anchor, its other view, another token's view; orthonormal rows of `W`.

References:
  Chen & He, arXiv:2011.10566, eq. 1 to 4 (SimSiam); Grill et al.,
  arXiv:2006.07733, eq. 2 (BYOL); Esser, Fleissner & Ghoshdastidar,
  arXiv:2309.02028 (contrastive kernel learning).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import losses
from iclcl_jax.types import Array, Float

Branch: TypeAlias = Callable[['Encoder', Array], Array]


class Encoder(NamedTuple):
  """What the self-supervised processes train.

  Attributes:
    weights: `W`. Shape `[d, R]`.
    predictor: linear. Shape `[d, d]`.
    average: moving average of `W`. Shape `[d, R]`.
  """

  weights: Float[Array, 'd R']
  predictor: Float[Array, 'd d']
  average: Float[Array, 'd R']


class Process(NamedTuple):
  """Two branches, each `(encoder, features [N, R]) -> [N, d]`."""

  online: Branch
  target: Branch


def init_encoder(key: Array, width: int, num_features: int, dtype) -> Encoder:
  """Draws weights and predictor; the average starts as the weights."""
  key_weights, key_predictor = jax.random.split(key)
  weights = jax.random.normal(key_weights, (width, num_features), dtype)
  predictor = jax.random.normal(key_predictor, (width, width), dtype)
  weights, predictor = weights / width**0.5, predictor / width**0.5
  return Encoder(weights, predictor, weights)


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
  config: Any,
  process: Process,
  encoder: Encoder,
  pair: tuple[Array, Array],
  observe: Callable[[Encoder], Any],
) -> Any:
  """Gradient descent on `cosine_loss`.

  Args:
    config: has step size, momentum of the average, and number of steps `T`.
    process: the branches.
    encoder: where training starts.
    pair: both views of the demonstrations. Shapes `[N, R]`.
    observe: `encoder -> anything`.

  Returns:
    What was observed before every step and after the last, stacked.
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


def kernel_loss(
  weights: Array, first: Array, second: Array
) -> Float[Array, '']:
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
  """Where contrastive kernel learning starts and ends.

  Attributes:
    start: orthonormal rows. Shape `[d, R]`.
    best: the least loss. Shape `[]`.
    step_size: half the inverse of the largest curvature. Shape `[]`.
  """

  start: Float[Array, 'd R']
  best: Float[Array, '']
  step_size: Float[Array, '']


def kernel_problem(
  weights: Float[Array, 'd R'], pair: tuple[Array, Array]
) -> KernelProblem:
  """Solves kernel learning from the span of the rows of `weights`.

  The loss is a quadratic form of each row of the weights, the same for all;
  its least value for orthonormal rows is a sum of the lowest eigenvalues.
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
