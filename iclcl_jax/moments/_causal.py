"""What every position reads of the tokens up to itself, chunk by chunk."""

import math

import jax
import jax.numpy as jnp

from iclcl_jax._mesh import vary_as
from iclcl_jax.moments._state import (
  absorb,
  empty,
  join_chunks,
  labels,
  largest,
  rescale,
  scaled_rows,
  split_chunks,
  zero_log_scale,
)
from iclcl_jax.precision import product, widen
from iclcl_jax.types import Array, Float


def causal_sums(
  phi, queries, keys, values, chunk_size, mask=None, start=None
) -> Float[Array, 'N _']:
  """Returns what each position reads of the tokens up to itself.

  Across chunks the moments of the past are carried along. Inside a chunk the
  scores are written out, relative to the largest log-features of the past
  alone: nothing of the future enters a past output, not even its rounding.
  What `start` has seen is the past of the first.
  Shape `[N, d_v + 2]`, see `types.Form`.
  """
  size = keys.shape[0]
  arrays = (queries, keys, values) + (() if mask is None else (mask,))
  padding = -size % chunk_size
  arrays = jax.tree.map(
    lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), 'edge'),
    arrays,
  )
  chunks, _ = split_chunks(arrays, chunk_size)
  phi = widen(phi)  # Its slopes add up over the chunks.
  step = jax.checkpoint(lambda state, chunk: _causal_chunk(phi, state, *chunk))
  state = empty(phi, keys, values) if start is None else start
  state = vary_as(widen(state), phi, arrays)
  _, sums = jax.lax.scan(step, state, chunks)
  return join_chunks(sums)[:size]


def _causal_chunk(phi, state, queries, keys, values, mask=None):
  """Returns the state after a chunk, and `causal_sums` of its rows.

  Log-features of the chunk are taken relative to those of the past. Where a
  key exceeds the past too far for that, it is left to `_add_steep`.
  """
  key_scale, key_features = scaled_rows(phi, keys, mask)
  query_scale, query_features = scaled_rows(phi, queries)
  rows = labels(values, mask)
  # Every row sees the past and the first key: their maximum is no secret.
  past = jnp.maximum(state.log_scale, jax.lax.stop_gradient(key_scale[0]))
  state = rescale(state, past)
  past = past[None]
  shift = largest(query_scale + past, axis=1)
  relative = key_scale - past
  steep = relative > math.log(jnp.finfo(relative.dtype).max) / 2
  neutral = zero_log_scale(relative.dtype)

  read = jnp.exp(query_scale + past - shift[:, None]) * query_features
  own = jnp.exp(jnp.where(steep, neutral, relative)) * key_features
  weights = jnp.concatenate([state.weights, state.mass[None]])
  scores = jnp.tril(product(read, own.T, values.dtype))
  sums = read @ weights.T + product(scores, rows)
  sums = jnp.concatenate([sums, jnp.diagonal(scores)[:, None]], axis=1)
  sums = jax.lax.cond(
    _any(steep),
    _add_steep,
    lambda sums, *_: sums,
    sums,
    shift,
    (query_scale, query_features),
    (jnp.where(steep, key_scale, neutral), key_features),
    rows,
  )
  return absorb(phi, state, keys, values, mask), sums


def _add_steep(sums, shift, queries, keys, rows):
  """Adds the remaining log-features `[C, R]`, score by score, row by row."""
  positions = jnp.arange(rows.shape[0])

  @jax.checkpoint
  def add(row):
    position, sums, shift, (query_scale, query_features) = row
    exponent = query_scale[None] + keys[0]
    visible = (positions <= position)[:, None]
    exponent = jnp.where(visible, exponent, zero_log_scale(shift.dtype))
    own_scale = largest(exponent)
    terms = jnp.exp(exponent - own_scale) * keys[1] * query_features[None]
    weights = jnp.sum(jnp.where(visible, terms, 0), axis=1)
    top = jnp.maximum(shift, own_scale)
    added = jnp.concatenate([product(weights, rows), weights[position][None]])
    return sums * jnp.exp(shift - top) + added * jnp.exp(own_scale - top)

  return jax.lax.map(add, (positions, sums, shift, queries))


@jax.custom_batching.custom_vmap
def _any(array):
  """`jnp.any` over batch axes too: a `cond` on it stays one under `vmap`."""
  return jnp.any(array)


@_any.def_vmap
def _any_of_batch(axis_size, in_batched, array):
  del axis_size, in_batched
  return _any(array), False
