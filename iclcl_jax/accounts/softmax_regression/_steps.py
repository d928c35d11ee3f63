"""Gradient steps on weights and on the document, as shifts of the target."""

import jax
import numpy as np

from iclcl_jax import _validate, attention, features
from iclcl_jax._door import door
from iclcl_jax.accounts.softmax_regression._calculus import (
  Problem,
  centre,
  gradients,
)
from iclcl_jax.types import Array, Float

_INNER_PRODUCT = features.IdentityFeatures()


@door
def attend(
  posed: Problem, queries: Float[Array, 'M d'], *, learning_rate: float | Array
) -> Float[Array, ' M']:
  r"""Returns logits `[M]` of the first gradient step, as linear attention.

  .. math:: z_i = \frac{\eta}{n} \sum_j \langle q_i, a_j\rangle (b_j - 1/n)

  The weights start at 0. With the document's own words as queries, a softmax of
  these logits is the prediction after the step; with another document's, what
  the new weights say about that. The derivative of a logit by its query is the
  new weights.

  Args:
    posed: the problem, with a target that sums to one.
    queries: words that are asked for. Shape `[M, d]`.

  References:
    von Oswald et al., arXiv:2212.07677, Proposition 1 (the linear case).
  """
  _validate.finite(learning_rate=learning_rate)
  num_words = len(posed.target)
  values = (learning_rate / num_words) * (posed.target - 1 / num_words)

  def one_query(query):
    return attention.linear_attention(
      _INNER_PRODUCT, query, posed.document, values[:, None]
    )[0]

  return jax.vmap(one_query)(queries)


@door
def weight_shift(
  posed: Problem, weights: Float[Array, ' d'], *, learning_rate: float | Array
) -> Float[Array, ' d']:
  """Returns the weights `[d]` after one gradient step on them."""
  _validate.finite(learning_rate=learning_rate)
  return weights - learning_rate * gradients(posed, weights).weights


@door
def data_shift(
  posed: Problem, weights: Float[Array, ' d'], *, learning_rate: float | Array
) -> Float[Array, 'n d']:
  """Returns the document after one gradient step, which is 0 at weights 0."""
  _validate.finite(learning_rate=learning_rate)
  return posed.document - learning_rate * gradients(posed, weights).document


@door
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

  Example:
    >>> before, after = jnp.array([0.5, 0.5]), jnp.array([0.75, 0.25])
    >>> shifted_target(jnp.array([1.0, 0.0]), before, after).tolist()
    [0.75, 0.25]

  References:
    Li et al., arXiv:2304.13276, main theorem (both parts rest on it).
  """
  return target - (after - before)


@door
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

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or the old weights are 0.
  """
  _validate.look(_check_not_zero, weights)
  move = centre(document) @ (new_weights - weights)
  return document + move[:, None] * (weights / (weights @ weights))[None]


def _check_not_zero(weights: Array) -> None:
  if not np.any(weights):
    raise ValueError(
      'weights are all 0; expected others: at 0 every document predicts the '
      'same, and no data shift moves it.'
    )
