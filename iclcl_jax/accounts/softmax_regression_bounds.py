r"""How far a shift can move the target of a softmax regression.

The published constant, kept in logarithms because it overflows, next to the
true one: the Jacobian of the softmax has spectral norm at most 1/2 and does not
see the mean `1 - P` of the words, so

.. math:: |f(A, x) - f(A, y)| \le \tfrac12 |P A|\, |x - y|, \qquad
   |f(A, x) - f(B, x)| \le \tfrac12 |P (A - B)|\, |x|.
"""

import math

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.accounts import _numerics
from iclcl_jax.accounts import softmax_regression as account
from iclcl_jax.accounts.softmax_regression._problem import (
  check_full_rank,
  check_problem,
)
from iclcl_jax.types import Array, Float


def log_published_bound(
  num_words: int, radius: float | Array
) -> Float[Array, '']:
  r"""Returns `log M` of the published `M = n^1.5 exp(10 R^2)`.

  The published theorem moves the target by at most `M` times the size of the
  move of weights or of data; `M` itself overflows float32 at radius 3.

  Args:
    num_words: `n`.
    radius: bound `R` on the norms of the document and of the weights.

  Returns:
    The logarithm. Shape `[]`.

  Raises:
    ValueError: if `num_words < 1`, or the radius is negative or not finite.

  Example:
    >>> float(log_published_bound(1, 2.0))
    40.0

  References:
    Li, Song, Xia, Yu & Zhou, arXiv:2304.13276, main theorem.
  """
  _check(num_words, radius)
  radius = jnp.asarray(radius, float)
  return 1.5 * math.log(num_words) + 10 * radius**2


def log_chained_bound(
  num_words: int, radius: float | Array
) -> Float[Array, '']:
  r"""Returns the logarithm of `4 R n^1.5 exp(4 R^2)`, where the lemmas lead.

  It bounds the same ratio, from the norms of `exp(A x)`, their differences and
  a normaliser of at least `exp(-R^2)`, and is below `M` for every radius.

  Args:
    num_words: `n`.
    radius: bound `R` on the norms of the document and of the weights, positive.

  Returns:
    The logarithm. Shape `[]`.

  Raises:
    ValueError: if `num_words < 1`, or the radius is negative or not finite.

  References:
    Derived from the lemmas of Deng, Li & Song, arXiv:2304.10411.
  """
  _check(num_words, radius)
  radius = jnp.asarray(radius, float)
  return jnp.log(4 * radius) + 1.5 * math.log(num_words) + 4 * radius**2


def lipschitz_in_weights(document: Float[Array, 'n d']) -> Float[Array, '']:
  """Returns `|P A| / 2`, at most `R / 2`: the true constant of a weight shift.

  Args:
    document: `A`. Shape `[n, d]`.

  Returns:
    The constant. Shape `[]`.

  Raises:
    ValueError: if the document is no matrix.
  """
  _validate.check_array('document', document, 'n d')
  singular = _singular_values(account.centre(document))
  return jnp.max(singular).astype(document.dtype) / 2


def lipschitz_in_document(weights: Float[Array, ' d']) -> Float[Array, '']:
  """Returns `|x| / 2`, the true constant of a data shift of size `|P(A - B)|`.

  Args:
    weights: `x`. Shape `[d]`.

  Returns:
    The constant. Shape `[]`.

  Raises:
    ValueError: if the weights are no vector.
  """
  _validate.check_array('weights', weights, 'd')
  return jnp.linalg.norm(weights) / 2


def gradient_bound(document: Float[Array, 'n d']) -> Float[Array, '']:
  """Returns a bound on the gradient in the weights: 8 sqrt(2) / 27 `|P A|`.

  Args:
    document: `A`. Shape `[n, d]`.

  Returns:
    The bound, for targets in the simplex. Shape `[]`.

  Raises:
    ValueError: if the document is no matrix.
  """
  return 2 * account.LARGEST_LOGIT_GRADIENT * lipschitz_in_weights(document)


def safe_learning_rate(document: Float[Array, 'n d']) -> Float[Array, '']:
  """Returns the largest step on the weights that never increases the loss.

  Args:
    document: `A`. Shape `[n, d]`.

  Returns:
    `2 / (LARGEST_CURVATURE |P A|^2)`, for targets in the simplex. Useful steps
    near the uniform prediction are 100 to 10,000 times larger. Infinite if
    all words are equal: the loss is constant, so no step increases it. Shape
    `[]`.

  Raises:
    ValueError: if the document is no matrix.
  """
  squared = 4 * lipschitz_in_weights(document) ** 2
  return 2 / (account.LARGEST_CURVATURE * squared)


def convexity_penalty(
  document: Float[Array, 'n d'], strength: float | Array
) -> Float[Array, '']:
  """Returns a penalty for every word that makes the loss strongly convex.

  Args:
    document: `A`, of full column rank. Shape `[n, d]`.
    strength: the smallest eigenvalue that the Hessian shall have, positive.

  Returns:
    `w` with `w^2 = 0.2405 + strength / sigma_min(A)^2`. Shape `[]`.

  Raises:
    ValueError: if the document is no matrix of full column rank (where no
      penalty of the logits makes the loss convex in every direction; under
      `jit` the result is then infinite or huge), or the strength is negative.

  References:
    Deng, Li & Song, arXiv:2304.10411 (same form, larger constant).
  """
  _validate.check_array('document', document, 'n d')
  _validate.check_scalar('strength', strength, minimum=0)
  check_full_rank(document)
  smallest = _singular_values(document)[-1]
  strength = jnp.asarray(strength, smallest.dtype)
  squared = strength / smallest**2 - account.SMALLEST_CURVATURE
  return jnp.sqrt(squared).astype(document.dtype)


def one_step_distance(
  posed: account.Problem,
  weights: Float[Array, ' d'],
  *,
  learning_rate: float | Array,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  r"""Bounds how far a weight step and the best matched data step come apart.

  With `lo` and `hi` the extreme eigenvalues of `P A A^T P` off the constant
  vector, the data step of size :math:`\eta (hi + lo) / (2 |x|^2)` obeys

  .. math:: |f_{weight} - f_{data}| \le \tfrac{|\eta|}{4} (hi - lo)\, |J c|.

  Args:
    posed: the problem, with at least two words.
    weights: `x`, not 0. Shape `[d]`.
    learning_rate: step size `eta` of the weight step.

  Returns:
    The bound, and the step size of the data step. Shapes `[]`.

  Raises:
    ValueError: if shapes or dtypes disagree, there is one word, the weights
      are 0, or the rate is not finite.
  """
  _validate.check_scalar('learning_rate', learning_rate)
  check_problem(posed, weights)
  prediction = account.predict(posed.document, weights)
  signal = account.apply_jacobian(prediction, prediction - posed.target)
  num_words, width = posed.document.shape
  if num_words < 2:
    raise ValueError('document has 1 word; expected at least two.')
  if _validate.is_concrete(weights) and not bool(jnp.any(weights)):
    raise ValueError(
      'weights are all 0; expected others: at 0 a data step moves nothing.'
    )
  singular = _singular_values(account.centre(posed.document))
  singular = singular.astype(weights.dtype)
  high = singular[0] ** 2
  # The constant vector takes one of the n eigenvalues.
  few = width < num_words - 1
  low = jnp.zeros_like(high) if few else singular[num_words - 2] ** 2
  bound = jnp.abs(learning_rate) / 4 * (high - low) * jnp.linalg.norm(signal)
  return bound, learning_rate * (high + low) / 2 / (weights @ weights)


def _singular_values(matrix) -> Float[Array, ' k']:
  return jnp.linalg.svd(_numerics.widen(matrix), compute_uv=False)


def _check(num_words: int, radius) -> None:
  _validate.check_count('num_words', num_words)
  _validate.check_scalar('radius', radius, minimum=0)
