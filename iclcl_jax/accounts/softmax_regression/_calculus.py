"""The problem; its loss, gradients and Hessians in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax._door import door, eager_door
from iclcl_jax.types import Array, Float


class Problem(NamedTuple):
  """A softmax regression. `problem` makes one and checks it.

  Attributes:
    document: words, one a row. Shape `[n, d]`.
    target: what their softmax should be. Shape `[n]`.
  """

  document: Float[Array, 'n d']
  target: Float[Array, ' n']


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


@eager_door
def problem(
  document: Float[Array, 'n d'], target: Float[Array, ' n']
) -> Problem:
  """Poses a softmax regression with a target in the simplex.

  For a target outside of it, call `Problem` itself: derivatives and identities
  hold there, the bounds that need the simplex do not.

  Args:
    document: words, one a row. Shape `[n, d]`.
    target: nonnegative entries that sum to one. Shape `[n]`.

  Raises:
    ValueError: if shapes or dtypes disagree, an entry is not finite, or the
      target is outside the simplex.

  Example:
    >>> posed = problem(jnp.eye(2), jnp.array([0.25, 0.75]))
    >>> posed.target.tolist()
    [0.25, 0.75]

  References:
    Li, Song, Xia, Yu & Zhou, arXiv:2304.13276 (the problem).
  """
  if 0 in document.shape:
    raise ValueError(
      f'document has shape {list(document.shape)}; expected at least one word.'
    )
  _validate.look(_check_problem, document, target)
  return Problem(document, target)


def _check_problem(document: Array, target: Array) -> None:
  for name, array in (('document', document), ('target', target)):
    if not np.all(np.isfinite(array)):
      raise ValueError(
        f'{name} has entries that are not finite; expected finite numbers. '
        'Remove or replace those rows.'
      )
  lowest, total = float(np.min(target)), float(np.sum(np.asarray(target)))
  slack = 10 * target.shape[0] * float(jnp.finfo(target.dtype).eps)
  if lowest < -slack or abs(total - 1) > slack:
    raise ValueError(
      f'target has sum {total:g} and smallest entry {lowest:g}; expected '
      'nonnegative entries that sum to one. Apply jax.nn.softmax, or construct '
      'Problem(document, target) itself: the bounds do not hold there.'
    )


@door
def centre(document: Float[Array, 'n d']) -> Float[Array, 'n d']:
  """Removes the mean word, to which softmax regression is blind: `P A`."""
  return document - jnp.mean(document, axis=0, keepdims=True)


@door
def predict(
  document: Float[Array, 'n d'], weights: Float[Array, ' d']
) -> Float[Array, ' n']:
  """Returns `f = softmax(A x)`, `[n]`, without exponentials that overflow."""
  return jax.nn.softmax(document @ weights)


@door
def loss(posed: Problem, weights: Float[Array, ' d']) -> Float[Array, '']:
  """Returns `L = |f - b|^2 / 2`."""
  error = predict(posed.document, weights) - posed.target
  return jnp.sum(error**2) / 2


@door
def apply_jacobian(
  prediction: Float[Array, ' n'], vector: Float[Array, ' n']
) -> Float[Array, ' n']:
  """Returns `J v = f o v - f <f, v>` in `O(n)`: the Jacobian of the softmax."""
  return prediction * (vector - prediction @ vector)


@door
def gradients(posed: Problem, weights: Float[Array, ' d']) -> Gradients:
  """Returns all three gradients of the loss, in closed form.

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
  """
  prediction = predict(posed.document, weights)
  curvature = logit_hessian(prediction, posed.target)
  return posed.document.T @ curvature @ posed.document
