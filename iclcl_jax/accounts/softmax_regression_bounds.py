r"""How far a shift can move the target of a softmax regression.

The published constant, kept in logarithms because it overflows, next to the
true one: the Jacobian of the softmax has spectral norm at most 1/2 and does not
see the mean `1 - P` of the words, so

.. math:: |f(A, x) - f(A, y)| \le \tfrac12 |P A|\, |x - y|, \qquad
   |f(A, x) - f(B, x)| \le \tfrac12 |P (A - B)|\, |x|.
"""

import math

import jax.numpy as jnp

from iclcl_jax import _validate, precision
from iclcl_jax._door import door
from iclcl_jax.accounts import softmax_regression as account
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

  Example:
    >>> float(log_published_bound(1, 2.0))
    40.0

  References:
    Li, Song, Xia, Yu & Zhou, arXiv:2304.13276, main theorem.
  """
  _validate.at_least(1, num_words=num_words)
  _validate.non_negative(radius=radius)
  radius = jnp.asarray(radius, float)
  return 1.5 * math.log(num_words) + 10 * radius**2


def log_chained_bound(
  num_words: int, radius: float | Array
) -> Float[Array, '']:
  r"""Returns the logarithm of `4 R n^1.5 exp(4 R^2)`, which the lemmas give.

  It bounds the same ratio, from the norms of `exp(A x)`, their differences and
  a normaliser of at least `exp(-R^2)`, and is below `M` for every radius.

  Takes what `log_published_bound` takes, a positive radius.

  References:
    Derived from the lemmas of Deng, Li & Song, arXiv:2304.10411.
  """
  _validate.at_least(1, num_words=num_words)
  _validate.non_negative(radius=radius)
  radius = jnp.asarray(radius, float)
  return jnp.log(4 * radius) + 1.5 * math.log(num_words) + 4 * radius**2


@door
def lipschitz_in_weights(document: Float[Array, 'n d']) -> Float[Array, '']:
  """Returns `|P A| / 2`, at most `R / 2`: the constant of a weight shift."""
  words = precision.widen(account.centre(document))
  return jnp.linalg.norm(words, 2).astype(document.dtype) / 2


@door
def lipschitz_in_document(weights: Float[Array, ' d']) -> Float[Array, '']:
  """Returns `|x| / 2`, the constant of a data shift of size `|P(A - B)|`."""
  return jnp.linalg.norm(weights) / 2
