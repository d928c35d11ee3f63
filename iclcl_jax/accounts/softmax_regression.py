r"""Softmax regression: what a weight shift and a data shift do to its target.

A document :math:`A` (one word a row) and a target :math:`b` in the simplex pose

.. math:: \min_x L = \tfrac12 |c|^2, \quad c = f - b, \quad
   f(A, x) = \mathrm{softmax}(A x).

A gradient step on `x` (a weight shift) and a step on `A` (a data shift, as an
attention layer rewrites its document) are compared as changes of the target.
All derivatives need no more than :math:`f`: with
:math:`J v = f \circ v - f \langle f, v\rangle` they are

.. math:: \nabla_x L = A^\top J c, \quad \nabla_A L = (J c)\, x^\top, \quad
   \nabla_b L = -c, \quad \nabla_x^2 L = A^\top B A

with `B` the Hessian in the logits. The calculus, the identities and Lipschitz
constants of `J` hold for any target; `gradient_bound`, `safe_learning_rate` and
`convexity_penalty` need one in the simplex, which `problem` checks.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, attention, features
from iclcl_jax.types import Array, Float

# Extremes over the simplex of |J c| and of the eigenvalues of B: those of two
# words with a one-hot target. Numerical for more words, not proved.
LARGEST_LOGIT_GRADIENT = 8 * math.sqrt(2) / 27


def _two_word_curvature(p: float) -> float:
  return 4 * p * (1 - p) ** 2 * (3 * p - 1)


SMALLEST_CURVATURE = _two_word_curvature((9 - math.sqrt(33)) / 24)
LARGEST_CURVATURE = _two_word_curvature((9 + math.sqrt(33)) / 24)
_INNER_PRODUCT = features.IdentityFeatures()


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


def problem(
  document: Float[Array, 'n d'], target: Float[Array, ' n']
) -> Problem:
  """Poses a softmax regression with a target in the simplex.

  For a target outside of it, call `Problem` itself: derivatives and identities
  hold there, the bounds that need the simplex do not.

  Args:
    document: words, one a row. Shape `[n, d]`.
    target: nonnegative entries that sum to one. Shape `[n]`.

  Returns:
    The `Problem`.

  Raises:
    ValueError: if shapes or dtypes disagree, an entry is not finite, or the
      target is outside the simplex.

  Example:
    >>> posed = problem(jnp.eye(2), jnp.array([0.25, 0.75]))
    >>> predict(posed.document, jnp.zeros(2)).tolist()
    [0.5, 0.5]

  References:
    Li, Song, Xia, Yu & Zhou, arXiv:2304.13276 (the problem).
  """
  posed = Problem(document, target)
  _check_problem(posed)
  if not _validate.is_concrete(document, target):
    return posed
  for name, array in posed._asdict().items():
    if not bool(jnp.all(jnp.isfinite(array))):
      raise ValueError(
        f'{name} has entries that are not finite; expected finite numbers. '
        'Remove or replace those rows.'
      )
  lowest, total = float(jnp.min(target)), float(jnp.sum(target))
  slack = 10 * target.shape[0] * float(jnp.finfo(target.dtype).eps)
  if lowest < -slack or abs(total - 1) > slack:
    raise ValueError(
      f'target has sum {total:g} and smallest entry {lowest:g}; expected '
      'nonnegative entries that sum to one. Apply jax.nn.softmax, or construct '
      'Problem(document, target) itself: the bounds do not hold there.'
    )
  return posed


def predict(
  document: Float[Array, 'n d'], weights: Float[Array, ' d']
) -> Float[Array, ' n']:
  """Returns `f = softmax(A x)`; no exponential of a logit is ever formed alone.

  Args:
    document: words `A`. Shape `[n, d]`.
    weights: `x`. Shape `[d]`.

  Returns:
    The prediction. Shape `[n]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.
  """
  _check_document(document, weights)
  return jax.nn.softmax(document @ weights)


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
  _check_problem(posed, weights)
  error = predict(posed.document, weights) - posed.target
  return jnp.sum(error**2) / 2


def apply_jacobian(
  prediction: Float[Array, ' n'], vector: Float[Array, ' n']
) -> Float[Array, ' n']:
  """Returns `J v = f o v - f <f, v>` in `O(n)`: the Jacobian of the softmax.

  Args:
    prediction: `f`. Shape `[n]`.
    vector: `v`. Shape `[n]`.

  Returns:
    The product. Shape `[n]`.
  """
  return prediction * (vector - prediction @ vector)


def gradients(posed: Problem, weights: Float[Array, ' d']) -> Gradients:
  """Returns all three gradients of the loss, in closed form.

  Args:
    posed: the problem.
    weights: `x`. Shape `[d]`.

  Returns:
    The `Gradients`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  References:
    Li et al., arXiv:2304.13276; Deng, Li & Song, arXiv:2304.10411.
  """
  _check_problem(posed, weights)
  prediction = predict(posed.document, weights)
  error = prediction - posed.target
  signal = apply_jacobian(prediction, error)
  return Gradients(
    posed.document.T @ signal, signal[:, None] * weights[None], -error
  )


def apply_logit_hessian(
  prediction: Float[Array, ' n'],
  target: Float[Array, ' n'],
  vector: Float[Array, ' n'],
) -> Float[Array, ' n']:
  r"""Returns `B v` in `O(n)`, for the Hessian `B` of the loss in the logits.

  .. math:: B = J J + \mathrm{diag}(J c) - f (J c)^\top - (J c) f^\top

  Args:
    prediction: `f`. Shape `[n]`.
    target: `b`. Shape `[n]`.
    vector: `v`. Shape `[n]`.

  Returns:
    The product. Shape `[n]`.
  """
  signal = apply_jacobian(prediction, prediction - target)
  twice = apply_jacobian(prediction, apply_jacobian(prediction, vector))
  rank_two = prediction * (signal @ vector) + signal * (prediction @ vector)
  return twice + signal * vector - rank_two


def logit_hessian(
  prediction: Float[Array, ' n'], target: Float[Array, ' n']
) -> Float[Array, 'n n']:
  """Returns `B` as a matrix.

  Its eigenvalues lie between `SMALLEST_CURVATURE` (negative: the loss is not
  convex) and `LARGEST_CURVATURE`, for a target in the simplex.

  Args:
    prediction: `f`. Shape `[n]`.
    target: `b`. Shape `[n]`.

  Returns:
    The Hessian in the logits. Shape `[n, n]`.

  References:
    Deng, Li & Song, arXiv:2304.10411 (its pieces, not its constants).
  """
  identity = jnp.eye(prediction.shape[0], dtype=prediction.dtype)
  product = jax.vmap(apply_logit_hessian, in_axes=(None, None, 0))
  return product(prediction, target, identity)


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
  _check_problem(posed, weights)
  prediction = predict(posed.document, weights)
  curvature = logit_hessian(prediction, posed.target)
  return posed.document.T @ curvature @ posed.document


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
  may go uphill.

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
      or there are fewer words than weights, where every system is singular.

  References:
    Li, Song & Zhou, arXiv:2303.15725; Deng, Li & Song, arXiv:2304.10411.
  """
  _check_problem(posed, weights)
  _validate.check_array('penalties', penalties, 'n')
  num_words, width = posed.document.shape
  _validate.check_same('n', 'penalties', len(penalties), 'document', num_words)
  _validate.check_count('num_steps', num_steps)
  _validate.check_scalar('damping', damping, minimum=0)
  if num_words < width:
    raise ValueError(
      f'document has {num_words} words of width {width}; expected at least as '
      'many words as the width, or every Newton system is singular. Project '
      'the document to fewer columns.'
    )
  document = posed.document

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
  return NewtonTrace(
    *(jnp.concatenate([x, y[None]]) for x, y in zip(rows, end, strict=True))
  )


def weight_shift(
  posed: Problem,
  weights: Float[Array, ' d'],
  *,
  learning_rate: float | Array,
) -> Float[Array, ' d']:
  """Takes one gradient step on the weights.

  Args:
    posed: the problem.
    weights: `x`. Shape `[d]`.
    learning_rate: the step size.

  Returns:
    The new weights. Shape `[d]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or the rate is not finite.
  """
  _validate.check_scalar('learning_rate', learning_rate)
  return weights - learning_rate * gradients(posed, weights).weights


def data_shift(
  posed: Problem,
  weights: Float[Array, ' d'],
  *,
  learning_rate: float | Array,
) -> Float[Array, 'n d']:
  """Takes one gradient step on the document; none at weights 0.

  Args:
    posed: the problem.
    weights: `x`. Shape `[d]`.
    learning_rate: the step size.

  Returns:
    The new document. Shape `[n, d]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or the rate is not finite.
  """
  _validate.check_scalar('learning_rate', learning_rate)
  return posed.document - learning_rate * gradients(posed, weights).document


def shifted_target(
  target: Float[Array, ' n'],
  before: Float[Array, ' n'],
  after: Float[Array, ' n'],
) -> Float[Array, ' n']:
  r"""Returns the target that has the same error at the OLD prediction.

  .. math:: f_1 - b = f_0 - \tilde b, \qquad \tilde b = b - (f_1 - f_0)

  It keeps the sum of the target but may leave the simplex.

  Args:
    target: `b`. Shape `[n]`.
    before: prediction before the shift, of weights or of data. Shape `[n]`.
    after: prediction after it. Shape `[n]`.

  Returns:
    The target. Shape `[n]`.

  Example:
    >>> before, after = jnp.array([0.5, 0.5]), jnp.array([0.75, 0.25])
    >>> shifted_target(jnp.array([1.0, 0.0]), before, after).tolist()
    [0.75, 0.25]

  References:
    Li et al., arXiv:2304.13276, main theorem (both parts rest on it).
  """
  return target - (after - before)


def smallest_data_shift(
  document: Float[Array, 'n d'],
  weights: Float[Array, ' d'],
  new_weights: Float[Array, ' d'],
) -> Float[Array, 'n d']:
  r"""Returns the nearest document that does to OLD weights what a shift did.

  .. math:: A' = A + P A\,(x_1 - x_0)\, x_0^\top / |x_0|^2
     \quad\Rightarrow\quad f(A', x_0) = f(A, x_1)

  `P` removes the mean over words, which no softmax sees: of all documents with
  that property this one is nearest in Frobenius norm.

  Args:
    document: `A`. Shape `[n, d]`.
    weights: the old weights `x_0`, not 0. Shape `[d]`.
    new_weights: the new ones `x_1`. Shape `[d]`.

  Returns:
    The document `A'`. Shape `[n, d]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or the old weights are 0.
  """
  _check_document(document, weights)
  _check_document(document, new_weights)
  if _validate.is_concrete(weights) and not bool(jnp.any(weights)):
    raise ValueError(
      'weights are all 0; expected others: at 0 every document predicts the '
      'same, and no data shift moves it.'
    )
  move = centre(document) @ (new_weights - weights)
  return document + move[:, None] * (weights / (weights @ weights))[None]


def attend(
  posed: Problem,
  queries: Float[Array, 'M d'],
  *,
  learning_rate: float | Array,
) -> Float[Array, ' M']:
  r"""The first gradient step from weights 0, as linear attention over words.

  .. math:: z_i = \frac{\eta}{n} \sum_j \langle q_i, a_j\rangle (b_j - 1/n)

  With the document's own words as queries, a softmax of these logits is the
  prediction after the step; with another document's, what the new weights say
  about that. The derivative of a logit by its query is the new weights.

  Args:
    posed: the problem, with a target that sums to one.
    queries: words that are asked for. Shape `[M, d]`.
    learning_rate: the step size `eta`.

  Returns:
    Logits. Shape `[M]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or the rate is not finite.

  References:
    von Oswald et al., arXiv:2212.07677, Proposition 1 (the linear case).
  """
  _check_problem(posed)
  _validate.check_scalar('learning_rate', learning_rate)
  num_words = posed.target.shape[0]
  values = (learning_rate / num_words) * (posed.target - 1 / num_words)

  def one_query(query):
    return attention.linear_attention(
      _INNER_PRODUCT, query, posed.document, values[:, None]
    )[0]

  return jax.vmap(one_query)(queries)


def descend_logits(
  posed: Problem,
  logits: Float[Array, ' n'],
  *,
  num_steps: int,
  learning_rate: float | Array,
) -> Float[Array, ' n']:
  r"""Gradient descent on the weights, written in the logits alone.

  .. math:: z \leftarrow z - \eta\, A A^\top J(f)\,(f - b)

  Each step is a layer of linear attention whose values are `-J c`.

  Args:
    posed: the problem.
    logits: `A x` at the start. Shape `[n]`.
    num_steps: number of steps (layers).
    learning_rate: the step size `eta`.

  Returns:
    Logits after the last step. Shape `[n]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or a setting is out of
      range.
  """
  _check_problem(posed)
  _validate.check_count('num_steps', num_steps)
  _validate.check_scalar('learning_rate', learning_rate)

  def layer(z, _):
    prediction = jax.nn.softmax(z)
    signal = apply_jacobian(prediction, prediction - posed.target)
    move = posed.document @ (posed.document.T @ signal)
    return z - learning_rate * move, None

  return jax.lax.scan(layer, logits, length=num_steps)[0]


def centre(document: Float[Array, 'n d']) -> Float[Array, 'n d']:
  """Removes the mean word, to which softmax regression is blind.

  Args:
    document: `A`. Shape `[n, d]`.

  Returns:
    `P A`. Shape `[n, d]`.
  """
  return document - jnp.mean(document, axis=0, keepdims=True)


def _check_document(document, weights) -> None:
  _validate.check_array('document', document, 'n d')
  _validate.check_array('weights', weights, 'd')
  _validate.check_same(
    'd', 'weights', weights.shape[0], 'document', document.shape[1]
  )
  _validate.check_dtypes(document=document, weights=weights)


def _check_problem(posed: Problem, weights=None) -> None:
  document, target = posed
  _validate.check_array('document', document, 'n d')
  _validate.check_array('target', target, 'n')
  _validate.check_same(
    'n', 'target', target.shape[0], 'document', document.shape[0]
  )
  _validate.check_dtypes(document=document, target=target)
  if 0 in document.shape:
    raise ValueError(
      f'document has shape {list(document.shape)}; expected at least one word '
      'of width at least 1.'
    )
  if weights is not None:
    _check_document(document, weights)
