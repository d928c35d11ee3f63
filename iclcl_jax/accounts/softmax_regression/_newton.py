"""Newton's method on the regularised loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.accounts import _numerics
from iclcl_jax.accounts.softmax_regression._calculus import (
  gradients,
  logit_hessian,
  predict,
)
from iclcl_jax.accounts.softmax_regression._problem import (
  Problem,
  check_full_rank,
  check_problem,
)
from iclcl_jax.types import Array, Float


class NewtonTrace(NamedTuple):
  """A run of Newton's method, the start included.

  Attributes:
    weights: iterates. Shape `[K + 1, d]`.
    losses: regularised losses. Shape `[K + 1]`.
    gradient_norms: norms of the regularised gradients. Shape `[K + 1]`.
  """

  weights: Float[Array, 'steps d']
  losses: Float[Array, ' steps']
  gradient_norms: Float[Array, ' steps']


def newton(
  posed: Problem,
  weights: Float[Array, ' d'],
  penalties: Float[Array, ' n'],
  *,
  num_steps: int,
  damping: float | Array = 0.0,
) -> NewtonTrace:
  r"""Newton's method on :math:`L + |\mathrm{diag}(w) A x|^2 / 2`.

  The systems solved are :math:`A^\top (B + \mathrm{diag}(w)^2 + \delta I) A`.
  Penalties of at least `convexity_penalty` or a damping above
  `-SMALLEST_CURVATURE` keep them positive definite; without both the method
  may go uphill. Half precisions are solved in float32.

  Args:
    posed: the problem, with at least as many words as the width.
    weights: where to start. Shape `[d]`.
    penalties: `w`, one for each word. Shape `[n]`.
    num_steps: number of steps `K`.
    damping: `delta`, not negative.

  Returns:
    The `NewtonTrace`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, a setting is out of range,
      or a system is singular: always where the document has no full column
      rank. Under `jit`, which cannot look, the iterates are then NaN or
      meaningless.

  References:
    Li, Song & Zhou, arXiv:2303.15725; Deng, Li & Song, arXiv:2304.10411.
  """
  check_problem(posed, weights)
  _validate.check_array('penalties', penalties, 'n')
  num_words = len(posed.document)
  _validate.check_same('n', 'penalties', len(penalties), 'document', num_words)
  _validate.check_count('num_steps', num_steps)
  _validate.check_scalar('damping', damping, minimum=0)
  check_full_rank(posed.document)
  dtype = posed.document.dtype
  posed, weights, penalties = jax.tree.map(
    _numerics.widen, (posed, weights, penalties)
  )
  document, damping = posed.document, jnp.asarray(damping, weights.dtype)

  def evaluate(x):
    prediction, logits = predict(document, x), document @ x
    penalty = jnp.sum((penalties * logits) ** 2) / 2
    gradient = gradients(posed, x).weights
    gradient = gradient + document.T @ (penalties**2 * logits)
    value = jnp.sum((prediction - posed.target) ** 2) / 2 + penalty
    return prediction, gradient, (x, value, jnp.linalg.norm(gradient))

  def step(x, _):
    prediction, gradient, row = evaluate(x)
    curvature = logit_hessian(prediction, posed.target)
    curvature = curvature + jnp.diag(penalties**2 + damping)
    move = jnp.linalg.solve(document.T @ curvature @ document, gradient)
    return x - move, row

  last, rows = jax.lax.scan(step, weights, length=num_steps)
  end = evaluate(last)[2]
  trace = NewtonTrace(
    *(
      jnp.concatenate([x, y[None]]).astype(dtype)
      for x, y in zip(rows, end, strict=True)
    )
  )
  _check_finite(trace)
  return trace


def _check_finite(trace: NewtonTrace) -> None:
  if _validate.is_concrete(trace) and not bool(
    jnp.all(jnp.isfinite(trace.weights))
  ):
    raise ValueError(
      'posed has a singular Newton system on the way; expected positive '
      'definite ones. Raise damping, or penalties to convexity_penalty.'
    )
