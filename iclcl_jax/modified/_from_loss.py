"""From a loss to its attention."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from iclcl_jax import _validate, losses
from iclcl_jax._program import compiled
from iclcl_jax.modified._loss_attention import LossAttention
from iclcl_jax.types import Array, Loss, Penalty

if TYPE_CHECKING:
  import optax

# What an optimizer is tried on, also scaled.
_GRADIENT = np.array([[1.0, -2.0], [0.5, 3.0]])
_WEIGHTS = np.array([[2.0, 1.0], [-1.0, 0.25]])
_SCALES = (1.0, 1e4)


def attention_from_loss(
  loss: Loss,
  *,
  penalty: Penalty | None = None,
  optimizer: 'optax.GradientTransformation | None' = None,
  learning_rate: float | Array = 1.0,
) -> LossAttention:
  r"""Builds the attention that one gradient step on a loss implies.

  .. math:: h = \Bigl[(1-\delta)\,W_0\phi(q) + \sum_i u_i\,\phi(k_i)^\top\phi(q)
     - \eta\nabla P(W_0)\,\phi(q)\Bigr] \big/ D, \qquad
     u_i = -\eta\, \partial L/\partial f(k_i)

  Args:
    loss: `loss(predictions [N, d_v], values [N, d_v]) -> []`, differentiable in
      the predictions. It may declare a keyword `normaliser`, the `D` of the
      query.
    penalty: `penalty(weights [d_v, R]) -> []`. With a kernel, the weights are
      those of an orthonormal basis of the span of the keys.
    optimizer: an optax transformation that is linear in gradient and weights;
      None for `optax.sgd(1.0)`. Its first step is taken. The sign belongs to
      it: `optax.identity()` and `optax.scale(1.0)` ASCEND the loss, which gives
      minus the attention.
    learning_rate: factor of the update.

  Raises:
    ValueError: if the optimizer's first step is zero or not proportional to the
      gradient.

  Example:
    >>> import jax.numpy as jnp
    >>> from iclcl_jax import kernels
    >>> attend = attention_from_loss(losses.contrastive)
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> attend(kernels.ExponentialKernel(), jnp.ones(4), keys, values).tolist()
    [2.0]

  References:
    Ren & Liu, arXiv:2310.13220, section 4 (from losses to layers).
  """
  losses.check_loss(loss)
  losses.check_penalty(penalty)
  _validate.non_negative(learning_rate=learning_rate)
  step_size, decay = (1.0, 0.0) if optimizer is None else _linear(optimizer)
  return LossAttention(
    loss=loss,
    penalty=penalty,
    step_size=learning_rate * step_size,
    decay=learning_rate * decay,
  )


def _linear(optimizer: 'optax.GradientTransformation') -> tuple[float, float]:
  """Returns step size and decay of an optimizer that is linear, or raises."""
  _validate.check_optimizer(optimizer)
  with jax.ensure_compile_time_eval():
    tried = _try_steps(optimizer, _GRADIENT, _WEIGHTS)
  if not _validate.is_concrete(tried):
    raise ValueError(
      'optimizer holds traced values, so that its step cannot be examined; '
      'expected concrete ones. Pass learning_rate for a traced step size.'
    )
  first, last, *found = map(np.asarray, tried)
  step_size, decay = -float(first[0, 0]), -float(last[0, 0]) / 2
  expected = -(step_size * _GRADIENT + decay * _WEIGHTS)
  for scale, step in zip(_SCALES, found, strict=True):
    if not np.allclose(step, scale * expected, rtol=1e-4, atol=1e-4 * scale):
      raise ValueError(
        'optimizer takes a step that is not proportional to the gradient '
        '(adaptive or clipping), so one step is not attention; expected a '
        'linear one, such as optax.sgd(0.1).'
      )
  if step_size == 0:
    raise ValueError(
      'optimizer does not move in its first step (a schedule that starts at 0, '
      'or steps that are accumulated); expected a step, such as that of '
      'optax.sgd(0.1).'
    )
  return step_size, decay


@compiled
def _try_steps(optimizer, gradient: Any, weights: Any) -> list[Array]:
  """Returns steps along the gradient, by the weights, and along both."""
  zero = 0 * gradient
  pairs = [(gradient, zero), (zero, weights)]
  pairs += [(scale * gradient, scale * weights) for scale in _SCALES]
  return [
    optimizer.update(gradient, optimizer.init(weights), weights)[0]
    for gradient, weights in pairs
  ]
