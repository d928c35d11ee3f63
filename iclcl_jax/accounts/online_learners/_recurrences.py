"""The published recurrences, one step for each token."""

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts.online_learners._stream import (
  Stream,
  broadcast_gates,
  initial_state,
)
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, Float, Mask


@door
@widened
def linear_recurrence(
  tokens: Stream,
  *,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
) -> Float[Array, 'N d_v']:
  r"""Runs linear attention with decay.

  .. math:: W_t = g_t W_{t-1} + v_t\,\phi(k_t)^\top

  References:
    Katharopoulos et al., arXiv:2006.16236, eq. 9; Sun et al.,
    arXiv:2307.08621, eq. 5; Yang et al., arXiv:2312.06635, eq. 3.
  """
  start = initial_state(tokens, initial)
  _, decays = broadcast_gates(tokens, 1.0, decays)

  def step(weights, token):
    query, key, value, decay = token
    weights = weights * decay[None] + value[:, None] * key[None]
    return weights, weights @ query

  return jax.lax.scan(step, start, (*tokens, decays))[1]


@door
@widened
def delta_recurrence(
  tokens: Stream,
  *,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
) -> Float[Array, 'N d_v']:
  r"""Runs the (gated) delta rule.

  .. math:: W_t = g_t W_{t-1}\,(I - \beta_t\,\phi(k_t)\phi(k_t)^\top)
     + \beta_t\, v_t\,\phi(k_t)^\top

  It is stable where :math:`0 \le \beta_t |\phi(k_t)|^2 \le 2`.

  References:
    Schlag et al., arXiv:2102.11174, eq. 24; Yang et al., arXiv:2412.06464,
    eq. 10.
  """
  start = initial_state(tokens, initial)
  rates, decays = broadcast_gates(tokens, rates, decays)

  def step(weights, token):
    query, key, value, rate, decay = token
    weights = weights * decay[None]
    error = value - weights @ key
    weights = weights + rate * error[:, None] * key[None]
    return weights, weights @ query

  return jax.lax.scan(step, start, (*tokens, rates, decays))[1]


def momentum_attention_weights(
  num_tokens: int, momentum: float | Array
) -> Float[Array, 'N N']:
  r"""Returns the weights that the heavy ball gives to past tokens.

  .. math:: o_t = \sum_{i\le t} \frac{1 - \mu^{t-i+1}}{1 - \mu}\,
     (\phi(q_t)^\top\phi(k_i))\, v_i

  Recent tokens get LESS weight than old ones: momentum is no moving average of
  the values.

  Args:
    num_tokens: number of tokens `N`.
    momentum: the factor `mu`, in `[0, 1)`.

  Returns:
    Row `t`, column `i`; zeros above the diagonal. Shape `[N, N]`.

  Example:
    >>> momentum_attention_weights(2, 0.5).tolist()
    [[1.0, 0.0], [1.5, 1.0]]
  """
  _validate.at_least(1, num_tokens=num_tokens)
  _validate.below_one(momentum=momentum)
  position = jnp.arange(num_tokens)
  age = position[:, None] - position[None] + 1
  factor = jnp.asarray(momentum, float)
  power = jnp.maximum(age, 0).astype(factor.dtype)
  return jnp.where(age > 0, (1 - factor**power) / (1 - factor), 0)


@door
@widened
def softmax_recurrence(
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Computes softmax attention by running SGD on :math:`\tfrac12|o - v_i|^2`.

  The step size of token `i` is its own normalised weight among the tokens so
  far. Every query runs its own: no state of finite size serves all.

  Args:
    query: the query. Shape `[d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    mask: tokens that the query sees, such as those of a prefix. Shape `[N]`;
      None for all.

  Returns:
    The answer, zeros if no token is seen. Shape `[d_v]`.

  References:
    Milakov & Gimelshein, arXiv:1805.02867 (running softmax).
  """
  lowest = jnp.finfo(keys.dtype).min
  if mask is not None:  # A masked NaN would return in the gradient.
    keys = jnp.where(mask[:, None], keys, 0)
    values = jnp.where(mask[:, None], values, 0)
  scores = keys @ query / query.shape[0] ** 0.5
  scores = scores if mask is None else jnp.where(mask, scores, lowest)

  def step(carry, token):
    output, largest, total = carry
    score, value = token
    top = jnp.maximum(largest, score)
    weight = jnp.exp(score - top)
    total = total * jnp.exp(largest - top) + weight
    output = output - weight / total * jax.grad(_half_square)(output, value)
    return (output, top, total), None

  zero = jnp.zeros((), keys.dtype)
  start = jnp.zeros_like(values[0]), zero + lowest, zero
  return jax.lax.scan(step, start, (scores, values))[0][0]


def _half_square(
  output: Float[Array, ' d_v'], value: Float[Array, ' d_v']
) -> Float[Array, '']:
  return jnp.sum((output - value) ** 2) / 2
