"""The recurrences with matrix products inside chunks of tokens."""

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
from iclcl_jax.types import Array, Float


@door
@widened
def linear_parallel(
  tokens: Stream,
  *,
  decays: float | Float[Array, ' N'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
  chunk_size: int = 64,
) -> Float[Array, 'N d_v']:
  r"""Computes `linear_recurrence` with matrix products inside chunks.

  .. math:: O = c \odot (Q W_0^\top) + (\Gamma \odot Q K^\top)\, V, \qquad
     \Gamma_{ij} = \prod_{l=j+1}^{i} g_l

  Args:
    chunk_size: tokens that are answered together.

  References:
    Yang et al., arXiv:2312.06635, section 2 (chunked form).
  """

  def chunk(weights, part):
    queries, keys, values, _, decays = part
    factors, total = _decay_products(decays)
    scores = factors * (queries @ keys.T)
    read = total[:, None] * (queries @ weights.T)
    outputs = read + scores @ values
    last = factors[-1][:, None]
    return total[-1] * weights + values.T @ (last * keys), outputs

  return _by_chunks(chunk, tokens, 1.0, decays, initial, chunk_size)


@door
@widened
def delta_parallel(
  tokens: Stream,
  *,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
  chunk_size: int = 64,
) -> Float[Array, 'N d_v']:
  r"""Computes `delta_recurrence` with a triangular solve inside chunks.

  The rows :math:`u_t` are step times error signal, so the delta rule is linear
  attention with these values:

  .. math:: (I + \mathrm{diag}(\beta)\,\mathrm{tril}(\Gamma\odot K K^\top, -1))
     \,U = \mathrm{diag}(\beta)\,(V - c \odot K W_0^\top)

  Takes what `linear_parallel` takes, and `rates` as `descend` does; raises
  `ValueError` as both do.

  References:
    Yang et al., arXiv:2406.06484, section 3; arXiv:2412.06464, section 3.
  """

  def chunk(weights, part):
    queries, keys, values, rates, decays = part
    factors, total = _decay_products(decays)
    past = jnp.tril(factors * (keys @ keys.T), -1)
    system = jnp.eye(keys.shape[0], dtype=keys.dtype) + rates[:, None] * past
    errors = values - total[:, None] * (keys @ weights.T)
    signals = jax.scipy.linalg.solve_triangular(
      system, rates[:, None] * errors, lower=True, unit_diagonal=True
    )
    scores = factors * (queries @ keys.T)
    outputs = total[:, None] * (queries @ weights.T) + scores @ signals
    last = factors[-1][:, None]
    return total[-1] * weights + signals.T @ (last * keys), outputs

  return _by_chunks(chunk, tokens, rates, decays, initial, chunk_size)


def _by_chunks(chunk, tokens, rates, decays, initial, chunk_size):
  """Scans a chunked form; the last chunk is filled with tokens of rate 0."""
  _validate.at_least(1, chunk_size=chunk_size)
  start = initial_state(tokens, initial)
  rates, decays = broadcast_gates(tokens, rates, decays)
  if decays.shape[1] > 1:
    raise ValueError(
      f'decays has shape {list(decays.shape)}; expected one number for each '
      'token: a decay of every feature has no chunked form here. Use '
      'linear_recurrence or delta_recurrence.'
    )
  size = tokens.keys.shape[0]
  padding = -size % chunk_size

  def split(array):
    widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
    array = jnp.pad(array, widths)
    return array.reshape(-1, chunk_size, *array.shape[1:])

  parts = jax.tree.map(split, (*tokens, rates, decays[:, 0]))
  _, outputs = jax.lax.scan(jax.checkpoint(chunk), start, parts)
  return outputs.reshape(size + padding, -1)[:size]


def _decay_products(decays):
  """Returns products of the decays from `j + 1` to `i`, and from 1 to `i`.

  They are multiplied, not exponentials of differences of logarithms: factors of
  any sign, zeros among them, have the products and slopes of the recurrence.
  """
  row = jnp.arange(decays.shape[0])
  below = row[:, None] > row[None]
  factors = jnp.cumprod(jnp.where(below, decays[:, None], 1), axis=0)
  visible = row[:, None] >= row[None]
  return jnp.where(visible, factors, 0), jnp.cumprod(decays)
