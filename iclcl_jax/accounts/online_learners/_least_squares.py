"""Exact solves: ridge regression of every prefix."""

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts.online_learners._stream import Stream, initial_state
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, Float


@door
@widened
def least_squares(
  tokens: Stream, *, ridge: float | Array
) -> Float[Array, 'N d_v']:
  r"""Solves the ridge regression of every prefix: the definition of mesa.

  .. math:: W_t = \arg\min_W \tfrac12\sum_{i\le t} |W\phi(k_i) - v_i|^2
     + \tfrac\lambda2 |W|_F^2

  Half precisions are solved in float32. The relative error is about the machine
  epsilon times the largest eigenvalue of the Gram matrix over `ridge`: in
  float32 a ridge below 1e-5 of that eigenvalue costs most digits, and below
  1e-7 the answer may be NaN. Raise the ridge, or use float64.

  Args:
    tokens: the stream.
    ridge: the strength `lambda`, positive: a prefix shorter than `R` has no
      unique solution without it.

  References:
    von Oswald et al., arXiv:2309.05858, section 3.
  """
  _validate.positive(ridge=ridge)
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)

  def step(sums, token):
    gram, cross = sums
    query, key, value = token
    gram = gram + key[:, None] * key[None]
    cross = cross + value[:, None] * key[None]
    solved = jax.scipy.linalg.solve(gram, query, assume_a='pos')
    return (gram, cross), cross @ solved

  ridge = jnp.asarray(ridge, identity.dtype)
  sums = ridge * identity, initial_state(tokens, None)
  return jax.lax.scan(step, sums, tokens)[1]


@door
@widened
def recursive_least_squares(
  tokens: Stream, *, ridge: float | Array
) -> Float[Array, 'N d_v']:
  r"""Solves `least_squares` by a rank-one update for each token.

  .. math:: W_t = W_{t-1} + (v_t - W_{t-1}\phi(k_t))\,
     \frac{(P_{t-1}\phi(k_t))^\top}{1 + \phi(k_t)^\top P_{t-1}\,\phi(k_t)}

  with :math:`P_0 = I/\lambda`: a delta rule whose step size is a matrix.

  Takes what `least_squares` takes.

  References:
    von Oswald et al., arXiv:2309.05858, eq. 9.
  """
  _validate.positive(ridge=ridge)
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)

  def step(carry, token):
    weights, inverse = carry
    query, key, value = token
    gain = inverse @ key
    gain = gain / (1 + key @ gain)
    weights = weights + (value - weights @ key)[:, None] * gain[None]
    inverse = inverse - gain[:, None] * (inverse @ key)[None]
    return (weights, inverse), weights @ query

  carry = initial_state(tokens, None), identity / ridge
  return jax.lax.scan(step, carry, tokens)[1]
