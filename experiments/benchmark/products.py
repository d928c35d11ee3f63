"""The bare matrix products of the linear forms: what streaming cannot beat.

The same products in the same chunks, of keys and queries in place of their
features and without any exponential; and as many exponentials, without any
product. The fraction of a form's speed is stated of this skeleton, measured in
the same run.
"""

import jax
import jax.numpy as jnp

from iclcl_jax import moments


def streamed(projection, queries, keys, values, *, chunk_size=1024):
  """Sums `[v, 1] (P k)^T` over the keys, and reads it by `P q`."""
  state = summed(projection, keys, values, chunk_size=chunk_size)

  def read(rows):
    return (rows @ projection.T) @ state.T

  return jax.lax.map(read, _chunks(queries, chunk_size))


def summed(projection, keys, values, *, chunk_size):
  """The sum `[d_v + 1, R]` alone."""

  def absorb(state, chunk):
    rows, labels = chunk
    return state + labels.T @ (rows @ projection.T), None

  start = jnp.zeros((values.shape[1] + 1, projection.shape[0]), values.dtype)
  chunks = (
    _chunks(keys, chunk_size),
    _chunks(moments.labels(values), chunk_size),
  )
  return jax.lax.scan(absorb, start, chunks)[0]


def causal(projection, queries, keys, values, *, chunk_size=64):
  """Reads the sum of the past, and the scores inside each chunk."""

  def step(state, chunk):
    asked, rows, labels = chunk
    read, own = asked @ projection.T, rows @ projection.T
    answers = read @ state.T + jnp.tril(read @ own.T) @ labels
    return state + labels.T @ own, answers

  start = jnp.zeros((values.shape[1] + 1, projection.shape[0]), values.dtype)
  chunks = [
    _chunks(x, chunk_size) for x in (queries, keys, moments.labels(values))
  ]
  return jax.lax.scan(step, start, tuple(chunks))[1]


def exponentials(projection, *sides, chunk_size=1024):
  """As many exponentials as these keys and queries have features."""
  repeats = projection.shape[0] // projection.shape[1]

  def total(rows):
    return jnp.sum(jnp.exp(jnp.tile(rows, repeats)), axis=0)

  return [jax.lax.map(total, _chunks(rows, chunk_size)) for rows in sides]


def _chunks(rows, chunk_size):
  """Whole chunks `[n, c, d]`; what remains is left out."""
  return moments.split_chunks(rows, min(chunk_size, rows.shape[0]))[0]
