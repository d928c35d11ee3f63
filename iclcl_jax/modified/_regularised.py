"""Regularised attention: a ridge on the dual weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, attention
from iclcl_jax.modified._weights import attention_weights, visible_values
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask


def regularised_attention(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  strength: float | Array,
  learning_rate: float | Array = 1.0,
  num_query_tokens: int = 1,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""One gradient step with a ridge: part of the initial weights is forgotten.

  .. math:: h = \sum_i a_i v_i - \eta\alpha \sum_{t} a_t v_t,

  the second sum over the query side. Its loss is `losses.contrastive` with the
  penalty `losses.ridge(strength)`.

  Args:
    phi: feature map or kernel.
    query: the test input. Shape `[d_k]`.
    keys: keys of demonstrations, then of query-side tokens. Shape `[N, d_k]`.
    values: their values. Shape `[N, d_v]`.
    strength: the coefficient `alpha`, of either sign.
    learning_rate: the step size `eta` of the ridge.
    num_query_tokens: how many of the last rows give `W_0`.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention output. Shape `[d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, `num_query_tokens` is more
      than N, or a hyper-parameter is not finite.

  References:
    Ren & Liu, arXiv:2310.13220, section 4.1, derived strictly.
  """
  weights = attention_weights(phi, query, keys, values, mask)
  # A lone query token is a prompt too: its weights are forgotten in part.
  _validate.check_count('num_query_tokens', num_query_tokens, minimum=0)
  if num_query_tokens > keys.shape[0]:
    raise ValueError(
      f'num_query_tokens is {num_query_tokens} of {keys.shape[0]} tokens; '
      'expected no more than there are.'
    )
  _validate.check_scalar('strength', strength)
  _validate.check_scalar('learning_rate', learning_rate, minimum=0)
  is_query_side = jnp.arange(keys.shape[0]) >= keys.shape[0] - num_query_tokens
  decay = jnp.asarray(learning_rate * strength, values.dtype)
  weights = jnp.where(is_query_side, (1 - decay) * weights, weights)
  return visible_values(values, mask).T @ weights


def regularised_attention_as_printed(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  strength: float | Array,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""The printed form of the regularised layer, `(A - alpha I) V`.

  .. math:: h = \sum_i a_i v_i - \alpha v_q,

  `v_q` the last row (zero if it is masked). It is not the step of
  `regularised_attention`: there the own value carries its attention weight. It
  is a residual connection of strength `-alpha` through the value projection.

  Args:
    phi: feature map or kernel.
    query: the test input. Shape `[d_k]`.
    keys: keys of demonstrations, then of the query token. Shape `[N, d_k]`.
    values: their values. Shape `[N, d_v]`.
    strength: the coefficient `alpha`, of either sign.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention output. Shape `[d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  References:
    Ren & Liu, arXiv:2310.13220v2, section 4.1, as printed.
  """
  _validate.check_scalar('strength', strength)
  output = attention.kernel_attention(phi, query, keys, values, mask=mask)
  own = visible_values(values, mask)[-1]
  return output - jnp.asarray(strength, values.dtype) * own


class TrainingWeights(NamedTuple):
  """What many regularised steps leave of each part.

  Attributes:
    initial: factor of `W_0`. Shape `[]`.
    demonstrations: factor of each demonstration. Shape `[N]`.
  """

  initial: Float[Array, '']
  demonstrations: Float[Array, ' N']


def regularised_training_weights(
  num_demonstrations: int,
  num_epochs: int,
  *,
  learning_rate: float | Array,
  strength: float | Array,
) -> TrainingWeights:
  r"""Solves regularised training with batches of one in closed form.

  With the decay :math:`r = 1 - \eta\alpha` of one visit,

  .. math:: W = r^{NE}\, W_0 + \sum_i \eta\, r^{N-1-i}
     \frac{1 - r^{NE}}{1 - r^N}\, v_i\,\phi(k_i)^\top.

  Args:
    num_demonstrations: demonstrations `N`, visited in order.
    num_epochs: epochs `E`.
    learning_rate: the step size `eta` of one visit.
    strength: the coefficient `alpha` of one visit.

  Returns:
    The `TrainingWeights`.

  Raises:
    ValueError: if a count is not positive.

  Example:
    >>> weights = regularised_training_weights(
    ...     2, 4, learning_rate=0.25, strength=0.0)
    >>> weights.demonstrations.tolist()
    [1.0, 1.0]

  References:
    Ren & Liu, arXiv:2310.13220v1, section 5 (setting); derived here.
  """
  _validate.check_count('num_demonstrations', num_demonstrations)
  _validate.check_count('num_epochs', num_epochs)
  _validate.check_scalar('learning_rate', learning_rate, minimum=0)
  _validate.check_scalar('strength', strength)
  rate = jnp.asarray(learning_rate, float)
  decay = 1 - rate * strength
  epoch = decay**num_demonstrations
  # A finite sum instead of the quotient: exact at decay = 1.
  epochs = jnp.sum(_powers(epoch, num_epochs))
  ages = _powers(decay, num_demonstrations)[::-1]
  return TrainingWeights(epoch**num_epochs, rate * ages * epochs)


def _powers(base: Float[Array, ''], count: int) -> Float[Array, ' _']:
  """`base ** [0, ..., count - 1]` by products, with all derivatives at 0."""
  steps = jnp.full(count, base).at[0].set(1)
  return jax.lax.associative_scan(jnp.multiply, steps)
