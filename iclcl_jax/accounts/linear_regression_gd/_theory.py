"""Gradient descent itself, what it can reach, and how alike two models are."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts import _numerics
from iclcl_jax.accounts.linear_regression_gd._layers import initial_weights
from iclcl_jax.types import Array, Float


class Moments(NamedTuple):
  """Variance and mean fourth power of a coordinate, symmetric about 0.

  Of `U(-a, a)` they are `a**2 / 3` and `a**4 / 5`.
  """

  second: float | Array
  fourth: float | Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearTasks:
  """Random tasks `y = w . x` with independent, symmetric coordinates.

  The entries of `w` have variance 1, the coordinates of inputs and query these
  `moments`; labels of the `num_demonstrations` context rows have this noise.
  """

  d_x: int
  num_demonstrations: int
  moments: Moments
  noise_variance: float = 0.0

  def __post_init__(self):
    _validate.at_least(
      1, d_x=self.d_x, num_demonstrations=self.num_demonstrations
    )
    _validate.non_negative(noise_variance=self.noise_variance)
    expected = 'Moments, such as Moments(1 / 3, 1 / 5)'
    _validate.check_type('moments', self.moments, Moments, expected)
    _validate.non_negative(
      **{f'moments.{name}': m for name, m in self.moments._asdict().items()}
    )


def expected_loss(
  tasks: LinearTasks, learning_rate: float | Array
) -> float | Array:
  r"""Returns the mean loss after one step from 0.

  .. math:: E\,\tfrac12 |\hat y - y|^2
     = \tfrac12 m_2 (d - 2\eta d m_2 + \eta^2 T_2), \qquad
     T_2 = E\,\mathrm{tr}\,S^2 = \frac{d}{N}
     \big(m_4 + (d-1) m_2^2 + (N-1) m_2^2\big)

  without noise, with :math:`S = \frac1N\sum_i x_i x_i^\top`.

  Example:
    >>> tasks = LinearTasks(
    ...   d_x=10, num_demonstrations=10, moments=Moments(1 / 12, 1 / 80)
    ... )
    >>> rate = optimal_learning_rate(tasks)
    >>> f'{rate:.4f} {expected_loss(tasks, rate):.5f}'
    '6.0606 0.20623'
  """
  _validate.finite(learning_rate=learning_rate)
  gain, spread = _gain_and_spread(tasks)
  change = -2 * learning_rate * gain + learning_rate**2 * spread
  return 0.5 * tasks.moments.second * (tasks.d_x + change)


def optimal_learning_rate(tasks: LinearTasks) -> float | Array:
  """Returns the step size that minimises `expected_loss`."""
  gain, spread = _gain_and_spread(tasks)
  return gain / spread


def _gain_and_spread(tasks: LinearTasks):
  """Returns the coefficients of `-2 eta` and `eta^2` in the loss."""
  d_x, size = tasks.d_x, tasks.num_demonstrations
  second, fourth = tasks.moments
  gain = d_x * second
  same = d_x * fourth + d_x * (d_x - 1) * second**2
  spread = same + (size - 1) * gain * second + tasks.noise_variance * gain
  return gain, spread / size


@door
def fit_learning_rate(
  directions: Float[Array, 'B d_y'], targets: Float[Array, 'B d_y']
) -> Float[Array, '']:
  r"""Returns the best step size of one step from 0 for given tasks.

  .. math:: \eta^* = \langle t, p\rangle / \langle p, p\rangle

  The directions `p` are predictions after a step of size 1, the targets `t`
  labels of the queries. It is NaN if all directions are 0.

  Example:
    >>> float(fit_learning_rate(jnp.ones((3, 1)), 2 * jnp.ones((3, 1))))
    2.0
  """
  # Each is scaled, or the square of one overflows or vanishes.
  size, scaled = _numerics.scaled(directions)
  target_size, scaled_targets = _numerics.scaled(targets)
  rate = jnp.sum(scaled * scaled_targets) / jnp.sum(scaled**2)
  return (rate * (target_size / size)).astype(directions.dtype)


@door
def descend(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  learning_rates: Float[Array, ' K'],
  *,
  initial: Float[Array, 'd_y d_x'] | None = None,
) -> Float[Array, 'd_y d_x']:
  r"""Returns the weights after `K` steps, by `jax.grad`: the definition.

  .. math:: L(W) = \frac1{2N}\sum_i |W x_i - y_i|^2

  There is one step size for each step. The weights start at `initial`, None
  for 0.
  """
  initial = initial_weights(inputs, labels, initial)

  def loss(weights):
    return jnp.sum((inputs @ weights.T - labels) ** 2) / (2 * len(inputs))

  def step(weights, rate):
    return weights - rate * jax.grad(loss)(weights), None

  return jax.lax.scan(step, initial, learning_rates)[0]


@door
def descend_plus_plus(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  query: Float[Array, ' d_x'],
  learning_rates: Float[Array, ' K'],
  contractions: Float[Array, ' K'],
) -> Float[Array, ' d_y']:
  r"""Returns the prediction of GD++ from 0, which also moves inputs at a step.

  Steps of the sizes `eta`, each followed by `x <- (I - gamma X^T X) x` with its
  contraction `gamma`; the last contraction does not matter.
  """

  def step(carry, factors):
    inputs, residuals, query, answer = carry
    rate, contraction = factors
    weights = rate / len(inputs) * residuals.T @ inputs
    answer = answer + weights @ query
    residuals = residuals - inputs @ weights.T
    gram = inputs.T @ inputs
    inputs = inputs - contraction * inputs @ gram
    return (inputs, residuals, query - contraction * gram @ query, answer), None

  carry = inputs, labels, query, jnp.zeros_like(labels[0])
  return jax.lax.scan(step, carry, (learning_rates, contractions))[0][3]


@door
def model_cosine(
  sensitivities: Float[Array, 'B d_x'], others: Float[Array, 'B d_x']
) -> Float[Array, '']:
  """Returns Model cos, the mean cosine of the angle between sensitivities.

  They are derivatives of a prediction in the query's input, the learnt weights
  of a linear model. Whatever their size; NaN if one is 0, which has no angle.

  Example:
    >>> f'{float(model_cosine(jnp.ones((2, 3)), -jnp.ones((2, 3)))):.3f}'
    '-1.000'
  """
  return jnp.mean(jax.vmap(_numerics.cosine)(sensitivities, others))
