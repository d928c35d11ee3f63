"""The zero-shot state, one gradient step from it, and many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, losses, moments
from iclcl_jax._door import door
from iclcl_jax._mesh import vary_as
from iclcl_jax.forms import form_of, see
from iclcl_jax.types import (
  Array,
  Bool,
  FeatureMap,
  Float,
  Kernel,
  Loss,
  Mask,
  Optimizer,
  Penalty,
  State,
)


@door
def empty(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'n d_k'],
  values: Float[Array, 'n d_v'],
  *,
  capacity: int | None = None,
) -> State:
  r"""Returns the dual model that has seen nothing: :math:`W = 0`.

  Args:
    keys, values: any; widths and dtype are read. `[n, d_k]` and `[n, d_v]`.
    capacity: how many tokens the state of a kernel holds, so that it keeps its
      shape and can be the carry of a `lax.scan`; None for one that grows. A
      token beyond is a `ValueError`, or NaN where the state is traced. The
      state of a feature map always keeps its shape.

  Example:
    >>> phi, x = features.EluPlusOneFeatures(), jnp.ones((5, 2))
    >>> dual.empty(phi, x, x).weights.tolist()
    [[0.0, 0.0], [0.0, 0.0]]
  """
  if capacity is not None:
    _validate.at_least(1, capacity=capacity)
  state = form_of(phi).empty(phi, keys, values, capacity)
  return vary_as(state, phi, keys, values)  # As a carry of their scan must.


@door
def zero_shot(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'n d_k'],
  values: Float[Array, 'n d_v'],
  *,
  mask: Bool[Array, ' n'] | None = None,
) -> State:
  r"""Returns the initial state, which the query-side tokens give.

  .. math:: W_0 = \sum_{t} v_t\,\phi(k_t)^\top

  Commonly there is one token; none at all give `empty`.

  Example:
    >>> state = dual.zero_shot(
    ...     kernels.ExponentialKernel(), jnp.ones((1, 4)), jnp.ones((1, 2)))
    >>> state.coefficients.tolist()
    [[1.0, 1.0]]
  """
  form = form_of(phi)
  return form.absorb(phi, form.empty(phi, keys, values), keys, values, mask)


@door
def one_step(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  learning_rate: float | Array = 1.0,
  chunk_size: int | None = None,
  mask: Mask | None = None,
) -> State:
  r"""Takes one gradient step on the contrastive loss, in closed form.

  .. math:: W_1 = W_0 + \eta \sum_{i} v_i\,\phi(k_i)^\top

  The mass then includes the demonstrations. Others are absorbed by other calls:
  the gradient does not depend on `W`. By chunks, None for all at once, no more
  features are held at a time.

  Example:
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> state = dual.zero_shot(kernel, x[:1], v[:1])
    >>> state = dual.one_step(kernel, state, x[1:], v[1:])
    >>> dual.predict(kernel, state, x[0]).tolist()
    [0.5, 0.5]
  """
  _validate.non_negative(learning_rate=learning_rate)
  form = form_of(phi, state)
  # A masked NaN would return in the gradient.
  labels = moments.visible(jnp.asarray(values), mask)
  labels = jnp.asarray(learning_rate, labels.dtype) * labels
  if chunk_size is not None:
    _validate.at_least(1, chunk_size=chunk_size)
  return form.absorb(phi, state, keys, labels, mask, chunk_size)


@door
def one_step_autodiff(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  loss: Loss = losses.contrastive,
  penalty: Penalty | None = None,
  learning_rate: float | Array = 1.0,
  optimizer: Optimizer | None = None,
  mask: Mask | None = None,
) -> State:
  r"""Takes one gradient step on any loss, by `jax.grad`.

  .. math:: W_1 = W_0 - \eta\,
     \nabla_W\, \bigl[L(W\phi(K), V) + P(W)\bigr]_{W_0}

  This is the definition; `one_step` is the fast path for `losses.contrastive`.
  A masked loss is a declared sum, or takes the mask: else it is a `ValueError`.

  Args:
    loss: `loss(predictions [N, d_v], values [N, d_v]) -> []`.
    penalty: `penalty(weights [d_v, R]) -> []`; with a kernel, the weights are
      those of an orthonormal basis of the span of the keys.
    learning_rate: factor of the update.
    optimizer: an optax transformation; None for `optax.sgd(1.0)`. It sees
      gradient and weights divided by the state's scale, feature by feature,
      which leaves linear transformations (SGD, momentum, weight decay) exact.

  Example:
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> state = dual.zero_shot(kernel, x[:1], v[:1])
    >>> state = dual.one_step_autodiff(kernel, state, x[1:], v[1:])
    >>> dual.predict(kernel, state, x[0]).tolist()
    [0.5, 0.5]
  """
  _validate.non_negative(learning_rate=learning_rate)
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  if optimizer is None:
    import optax

    optimizer = optax.sgd(1.0)
  _validate.check_optimizer(optimizer)
  form = form_of(phi, state)
  _check_objective(loss, penalty, values)
  loss = losses.of_visible(loss, mask)
  state = see(phi, state, keys, values, mask)
  rows = jnp.arange(keys.shape[0])
  gradient = form.gradient(phi, state, keys, values, rows, mask, loss)
  if penalty is not None:
    gradient = gradient + form.penalty_gradient(phi, state, penalty)
  weights = form.get_weights(state)
  updates, _ = optimizer.update(gradient, optimizer.init(weights), weights)
  rate = jnp.asarray(learning_rate, weights.dtype)
  return form.with_weights(state, weights + rate * updates)


def _check_objective(
  loss: Loss, penalty: Penalty | None, values: Array
) -> None:
  """Checks that a state can descend a loss and a penalty of its weights."""
  losses.check_loss(loss)
  _validate.check_real_scalar('loss', loss, values, values)
  losses.check_penalty(penalty)


class Trajectory(NamedTuple):
  """A trained state, and what was observed after every step, stacked."""

  state: State
  observations: Any


@door
def train(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  optimizer: Optimizer,
  num_epochs: int,
  batch_size: int,
  loss: Loss = losses.contrastive,
  penalty: Penalty | None = None,
  observe: Callable[[State], Any] | None = None,
) -> Any:
  r"""Trains the dual model for many steps.

  Demonstrations are visited in the order given; the last batch of an epoch may
  be smaller. With `losses.contrastive` the gradient is constant:
  `optax.sgd(1 / num_epochs)` ends where one full-batch step with
  `learning_rate=1` ends. The mass then includes the demonstrations once.

  Args:
    optimizer: an optax transformation, with its learning rate.
    num_epochs: passes over the demonstrations.
    batch_size: demonstrations in a step, at most `N`.
    loss, penalty: as in `one_step_autodiff`, of the batch in every step.
    observe: a function of the state, such as a prediction with a fixed
      `normaliser`, that is called after every step, `num_epochs * ceil(N /
      batch_size)` times. With it a `Trajectory` is returned, else the state.

  Example:
    >>> import optax
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> state = dual.zero_shot(kernel, x[:1], v[:1])
    >>> state = dual.train(kernel, state, x[1:], v[1:], num_epochs=4,
    ...                    optimizer=optax.sgd(0.25), batch_size=1)
    >>> dual.predict(kernel, state, x[0]).tolist()
    [0.5, 0.5]
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
  if observe is not None:
    expected = 'of the state, such as lambda state: state.weights'
    _validate.check_function('observe', observe, 1, expected)
  form = form_of(phi, state)
  padding = -size % batch_size
  _check_objective(loss, penalty, values[:batch_size])
  state = see(phi, state, keys, values)
  steps_per_epoch = (size + padding) // batch_size

  def step(carry, index):
    state, optimizer_state = carry
    rows = index % steps_per_epoch * batch_size + jnp.arange(batch_size)
    valid = rows < size if padding else None
    rows = jnp.minimum(rows, size - 1)
    visible = losses.of_visible(loss, valid)
    gradient = form.gradient(phi, state, keys, values, rows, valid, visible)
    if penalty is not None:
      gradient = gradient + form.penalty_gradient(phi, state, penalty)
    weights = form.get_weights(state)
    updates, optimizer_state = optimizer.update(
      gradient, optimizer_state, weights
    )
    state = form.with_weights(state, weights + updates)
    return (state, optimizer_state), observe and observe(state)

  carry = state, optimizer.init(form.get_weights(state))
  carry = vary_as(carry, phi, keys, values)
  steps = jnp.arange(num_epochs * steps_per_epoch)
  (state, _), observations = jax.lax.scan(step, carry, steps)
  return state if observe is None else Trajectory(state, observations)
