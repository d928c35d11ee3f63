"""A gradient step as linear attention over words."""

import jax

from iclcl_jax import _validate, attention, features
from iclcl_jax.accounts.softmax_regression._problem import (
  Problem,
  check_problem,
)
from iclcl_jax.types import Array, Float

_INNER_PRODUCT = features.IdentityFeatures()


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
  check_problem(posed)
  _validate.check_scalar('learning_rate', learning_rate)
  _validate.check_array('queries', queries, 'M d')
  num_words, width = posed.document.shape
  _validate.check_same('d', 'queries', queries.shape[1], 'document', width)
  _validate.check_dtypes(queries=queries, document=posed.document)
  values = (learning_rate / num_words) * (posed.target - 1 / num_words)

  def one_query(query):
    return attention.linear_attention(
      _INNER_PRODUCT, query, posed.document, values[:, None]
    )[0]

  return jax.vmap(one_query)(queries)
