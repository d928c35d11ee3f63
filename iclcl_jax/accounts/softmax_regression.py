r"""Softmax regression: what a weight shift and a data shift do to its target.

A document :math:`A` (one word a row) and a target :math:`b` pose

.. math:: \min_x L = \tfrac12 |c|^2, \quad c = f - b, \quad
   f(A, x) = \mathrm{softmax}(A x).

A gradient step on `x` (a weight shift) and a step on `A` (a data shift, as an
attention layer rewrites its document) are compared as changes of the target.
With the Jacobian :math:`J v = f \circ v - f \langle f, v\rangle` of the softmax

.. math:: \nabla_x L = A^\top J c, \quad \nabla_A L = (J c)\, x^\top, \quad
   \nabla_b L = -c.

How far a shift can move the target: the published constant, kept in logarithms
because it overflows, stands beside the true one. `J` has spectral norm at most
1/2 and does not see the mean `1 - P` of words, so

.. math:: |f(A, x) - f(A, y)| \le \tfrac12 |P A|\, |x - y|, \qquad
   |f(A, x) - f(B, x)| \le \tfrac12 |P (A - B)|\, |x|.

Throughout, `document` is :math:`A` `[n, d]`, `weights` are :math:`x` `[d]`,
`target` is :math:`b` `[n]`, `prediction` is :math:`f` `[n]`, `posed` holds
document and target, and `learning_rate` is the step size :math:`\eta`.

References:
  Li, Song, Xia, Yu & Zhou, arXiv:2304.13276 (the problem, both shifts, and the
  published bound); Deng, Li & Song, arXiv:2304.10411 (gradients, the pieces of
  the Hessian, not its constants); von Oswald et al., arXiv:2212.07677,
  Proposition 1 (`attend`, the linear case).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, attention, features, precision
from iclcl_jax._door import door
from iclcl_jax.types import Array, Float


class Problem(NamedTuple):
  """A softmax regression: words, and a target, commonly in the simplex."""

  document: Float[Array, 'n d']
  target: Float[Array, ' n']


class Gradients(NamedTuple):
  """Gradients of the loss with respect to weights, document and target."""

  weights: Float[Array, ' d']
  document: Float[Array, 'n d']
  target: Float[Array, ' n']


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

  A data shift is a step against that of the document, 0 at weights 0.
  """
  prediction = predict(posed.document, weights)
  error = prediction - posed.target
  signal = apply_jacobian(prediction, error)
  return Gradients(
    posed.document.T @ signal, signal[:, None] * weights[None], -error
  )


@door
def hessian(posed: Problem, weights: Float[Array, ' d']) -> Float[Array, 'd d']:
  r"""Returns `A^T B A`, the Hessian of the loss in the weights.

  .. math:: B = J J + \mathrm{diag}(J c) - f (J c)^\top - (J c) f^\top

  For a target in the simplex the eigenvalues of `B`, the Hessian in the logits,
  lie between -0.2405 (negative: the loss is not convex) and 0.3082, those of
  two words with a one-hot target; for more words the extremes are numerical.
  The Hessian in the document, read row by row, is the Kronecker product of `B`
  with the outer product of the weights.
  """
  prediction = predict(posed.document, weights)
  jacobian = jnp.diag(prediction) - prediction[:, None] * prediction[None]
  signal = apply_jacobian(prediction, prediction - posed.target)
  cross = prediction[:, None] * signal[None]
  curvature = jacobian @ jacobian + jnp.diag(signal) - cross - cross.T
  return posed.document.T @ curvature @ posed.document


_INNER_PRODUCT = features.IdentityFeatures()


@door
def attend(
  posed: Problem, queries: Float[Array, 'M d'], *, learning_rate: float | Array
) -> Float[Array, ' M']:
  r"""Returns logits `[M]` of the first gradient step, as linear attention.

  .. math:: z_i = \frac{\eta}{n} \sum_j \langle q_i, a_j\rangle (b_j - 1/n)

  The weights start at 0. With the document's own words as queries, a softmax of
  these logits is the prediction after the step; with another document's, what
  the new weights say about that. The target sums to one.
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
def shifted_target(
  target: Float[Array, ' n'],
  before: Float[Array, ' n'],
  after: Float[Array, ' n'],
) -> Float[Array, ' n']:
  r"""Returns the target that has the same error at the OLD prediction.

  .. math:: f_1 - b = f_0 - \tilde b, \qquad \tilde b = b - (f_1 - f_0)

  It keeps the sum of the target but may leave the simplex. The predictions
  `before` and `after` a shift, of weights or of data, are `f_0` and `f_1`.

  Example:
    >>> before, after = jnp.array([0.5, 0.5]), jnp.array([0.75, 0.25])
    >>> shifted_target(jnp.array([1.0, 0.0]), before, after).tolist()
    [0.75, 0.25]
  """
  return target - (after - before)


@door
def smallest_data_shift(
  document: Float[Array, 'n d'],
  weights: Float[Array, ' d'],
  new_weights: Float[Array, ' d'],
) -> Float[Array, 'n d']:
  r"""Returns the nearest document that moves the logits as a weight shift does.

  .. math:: A' = A + P A\,(x_1 - x_0)\, x_0^\top / |x_0|^2
     \quad\Rightarrow\quad f(A', x_0) = f(A, x_1)

  `P` removes the mean over words, which no softmax sees: of all documents with
  that property this one is nearest in Frobenius norm. The `weights` are the old
  ones `x_0`, not 0.
  """
  move = centre(document) @ (new_weights - weights)
  return document + move[:, None] * (weights / (weights @ weights))[None]


def log_published_bound(
  num_words: int, radius: float | Array
) -> Float[Array, '']:
  r"""Returns `log M` of the published `M = n^1.5 exp(10 R^2)`.

  The target moves by at most `M` times the move of weights or of data, whose
  norms the radius bounds; at 3 `M` itself overflows float32.

  Example:
    >>> float(log_published_bound(1, 2.0))
    40.0
  """
  _validate.at_least(1, num_words=num_words)
  _validate.non_negative(radius=radius)
  radius = jnp.asarray(radius, float)
  return 1.5 * math.log(num_words) + 10 * radius**2


@door
def lipschitz_in_weights(document: Float[Array, 'n d']) -> Float[Array, '']:
  """Returns `|P A| / 2`, at most `R / 2`: the constant of a weight shift."""
  words = precision.widen(centre(document))
  return jnp.linalg.norm(words, 2).astype(document.dtype) / 2
