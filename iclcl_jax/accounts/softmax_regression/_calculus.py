"""Loss, gradients and Hessians in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax._door import door
from iclcl_jax.accounts.softmax_regression._problem import Problem
from iclcl_jax.types import Array, Float


class Gradients(NamedTuple):
  """Gradients of the loss.

  Attributes:
    weights: with respect to `x`. Shape `[d]`.
    document: with respect to `A`. Shape `[n, d]`.
    target: with respect to `b`. Shape `[n]`.
  """

  weights: Float[Array, ' d']
  document: Float[Array, 'n d']
  target: Float[Array, ' n']


@door
def predict(
  document: Float[Array, 'n d'], weights: Float[Array, ' d']
) -> Float[Array, ' n']:
  """Returns `f = softmax(A x)` without exponentials that overflow.

  Args:
    document: words `A`. Shape `[n, d]`.
    weights: `x`. Shape `[d]`.

  Returns:
    The prediction. Shape `[n]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.
  """
  return jax.nn.softmax(document @ weights)


@door
def loss(posed: Problem, weights: Float[Array, ' d']) -> Float[Array, '']:
  """Returns `L = |f - b|^2 / 2`.

  Args:
    posed: the problem.
    weights: `x`. Shape `[d]`.

  Returns:
    The loss. Shape `[]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.
  """
  error = predict(posed.document, weights) - posed.target
  return jnp.sum(error**2) / 2


@door
def apply_jacobian(
  prediction: Float[Array, ' n'], vector: Float[Array, ' n']
) -> Float[Array, ' n']:
  """Returns `J v = f o v - f <f, v>` in `O(n)`: the Jacobian of the softmax.

  Args:
    prediction: `f`. Shape `[n]`.
    vector: `v`. Shape `[n]`.

  Returns:
    The product. Shape `[n]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.
  """
  return prediction * (vector - prediction @ vector)


@door
def gradients(posed: Problem, weights: Float[Array, ' d']) -> Gradients:
  """Returns all three gradients of the loss, in closed form.

  Args:
    posed: the problem.
    weights: `x`. Shape `[d]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  References:
    Li et al., arXiv:2304.13276; Deng, Li & Song, arXiv:2304.10411.
  """
  prediction = predict(posed.document, weights)
  error = prediction - posed.target
  signal = apply_jacobian(prediction, error)
  return Gradients(
    posed.document.T @ signal, signal[:, None] * weights[None], -error
  )


@door
def logit_hessian(
  prediction: Float[Array, ' n'], target: Float[Array, ' n']
) -> Float[Array, 'n n']:
  r"""Returns the Hessian `B` of the loss in the logits.

  .. math:: B = J J + \mathrm{diag}(J c) - f (J c)^\top - (J c) f^\top

  Its eigenvalues lie between -0.2405 (negative: the loss is not convex) and
  0.3082, those of two words with a one-hot target, for a target in the simplex.
  The extremes are numerical for more than two words, not proved.

  Args:
    prediction: `f`. Shape `[n]`.
    target: `b`. Shape `[n]`.

  Returns:
    The Hessian in the logits. Shape `[n, n]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  References:
    Deng, Li & Song, arXiv:2304.10411 (its pieces, not its constants).
  """
  jacobian = jnp.diag(prediction) - prediction[:, None] * prediction[None]
  signal = apply_jacobian(prediction, prediction - target)
  cross = prediction[:, None] * signal[None]
  return jacobian @ jacobian + jnp.diag(signal) - cross - cross.T


@door
def hessian(posed: Problem, weights: Float[Array, ' d']) -> Float[Array, 'd d']:
  """Returns `A^T B A`, the Hessian of the loss in the weights.

  That in the document, read row by row, is the Kronecker product of `B` with
  the outer product of the weights.

  Args:
    posed: the problem.
    weights: `x`. Shape `[d]`.

  Returns:
    The Hessian. Shape `[d, d]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.
  """
  prediction = predict(posed.document, weights)
  curvature = logit_hessian(prediction, posed.target)
  return posed.document.T @ curvature @ posed.document
