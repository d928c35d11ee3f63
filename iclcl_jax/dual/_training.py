"""Many steps on any loss."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, losses
from iclcl_jax._door import door
from iclcl_jax._mesh import vary_as
from iclcl_jax.dual._steps import check_objective
from iclcl_jax.forms import form_of, see
from iclcl_jax.types import (
  Array,
  FeatureMap,
  Float,
  Kernel,
  Loss,
  Penalty,
  State,
)

if TYPE_CHECKING:
  import optax


class Trajectory(NamedTuple):
  """A trained state and what was observed on the way.

  Attributes:
    state: the state after the last step.
    observations: result of `observe` after every step, stacked.
  """

  state: State
  observations: Any


@door
def train(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  optimizer: 'optax.GradientTransformation',
  num_epochs: int,
  batch_size: int,
  loss: Loss = losses.contrastive,
  penalty: Penalty | None = None,
) -> State:
  r"""Trains the dual model for many steps.

  Demonstrations are visited in the order given, `ceil(N / batch_size)` steps
  an epoch; the last batch of an epoch may be smaller. With
  `losses.contrastive` the gradient is constant: `optax.sgd(1 / num_epochs)`
  ends where one full-batch step with `learning_rate=1` ends. The mass then
  includes the demonstrations once.

  Args:
    optimizer: an optax transformation, with its learning rate.
    num_epochs: passes over the demonstrations.
    batch_size: demonstrations in a step, at most `N`.
    loss: `loss(predictions, values) -> []`, evaluated on the batch.
    penalty: as in `one_step_autodiff`, added in every step.

  Example:
    >>> import optax
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> state = dual.zero_shot(kernel, x[:1], v[:1])
    >>> state = dual.train(kernel, state, x[1:], v[1:], num_epochs=4,
    ...                    optimizer=optax.sgd(0.25), batch_size=1)
    >>> dual.predict(kernel, state, x[0]).tolist()
    [0.5, 0.5]
  """
  return train_and_observe(
    phi,
    state,
    keys,
    values,
    optimizer=optimizer,
    num_epochs=num_epochs,
    batch_size=batch_size,
    loss=loss,
    penalty=penalty,
    observe=lambda state: None,
  ).state


@door
def train_and_observe(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  optimizer: 'optax.GradientTransformation',
  num_epochs: int,
  batch_size: int,
  observe: Callable[[State], Any],
  loss: Loss = losses.contrastive,
  penalty: Penalty | None = None,
) -> Trajectory:
  """Trains as `train` does, and looks at the state after every step.

  What `observe` returns of the state, such as a prediction with a fixed
  `normaliser`, gets a leading axis of `num_epochs * ceil(N / batch_size)`.
  """
  _validate.at_least(1, num_epochs=num_epochs, batch_size=batch_size)
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  size = keys.shape[0]
  if batch_size > size:
    raise ValueError(
      f'batch_size is {batch_size}; expected at most the number of '
      f'demonstrations, {size}.'
    )
  _validate.check_optimizer(optimizer)
  if not callable(observe):
    raise ValueError(
      f'observe is a {type(observe).__name__}; expected a function of the '
      'state, such as lambda state: dual.predict(phi, state, query).'
    )
  form = form_of(phi, state)
  padding = -size % batch_size
  check_objective(loss, penalty, values[:batch_size], masked=padding > 0)
  state = see(phi, state, keys, values)
  steps_per_epoch = (size + padding) // batch_size

  def step(carry, index):
    state, optimizer_state = carry
    rows = index % steps_per_epoch * batch_size + jnp.arange(batch_size)
    valid = rows < size if padding else None
    rows = jnp.minimum(rows, size - 1)
    gradient = form.gradient(phi, state, keys, values, rows, valid, loss)
    if penalty is not None:
      gradient = gradient + form.penalty_gradient(phi, state, penalty)
    weights = form.get_weights(state)
    updates, optimizer_state = optimizer.update(
      gradient, optimizer_state, weights
    )
    state = form.with_weights(state, weights + updates)
    return (state, optimizer_state), observe(state)

  carry = state, optimizer.init(form.get_weights(state))
  carry = vary_as(carry, phi, keys, values)
  steps = jnp.arange(num_epochs * steps_per_epoch)
  (state, _), observations = jax.lax.scan(step, carry, steps)
  return Trajectory(state, observations)
