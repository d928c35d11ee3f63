"""Weights of a layer, and the products that it depends on."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts.linear_regression_gd._tokens import check_part
from iclcl_jax.types import Array, Float


class SelfAttention(NamedTuple):
  """Weights of one layer; heads are summed, rows are tokens.

  Attributes:
    queries: `W_q`. Shape `[H, D, d_k]`.
    keys: `W_k`. Shape `[H, D, d_k]`.
    values: `W_v`. Shape `[H, D, d_v]`.
    outputs: the projection `W_p`. Shape `[H, d_v, D]`.
  """

  queries: Float[Array, 'H D d_k']
  keys: Float[Array, 'H D d_k']
  values: Float[Array, 'H D d_v']
  outputs: Float[Array, 'H d_v D']


class Folded(NamedTuple):
  """The two products that a layer depends on.

  Attributes:
    query_key: `W_q W_k^T`. Shape `[H, D, D]`.
    value_output: `W_v W_p`. Shape `[H, D, D]`.
  """

  query_key: Float[Array, 'H D D']
  value_output: Float[Array, 'H D D']


@door
def fold(layer: SelfAttention) -> Folded:
  """Returns `(W_q W_k^T, W_v W_p)` of each head, to compare layers by."""
  return Folded(
    jnp.einsum('hdk,hek->hde', layer.queries, layer.keys),
    jnp.einsum('hdv,hve->hde', layer.values, layer.outputs),
  )


@door
def unfold(folded: Folded) -> SelfAttention:
  """Makes a layer of its products: `W_k` and `W_p` become identities.

  Its keys have the width of the tokens, by which softmax attention scales.
  """
  identity = jnp.broadcast_to(
    jnp.eye(folded.query_key.shape[1], dtype=folded.query_key.dtype),
    folded.query_key.shape,
  )
  return SelfAttention(
    folded.query_key, identity, folded.value_output, identity
  )


@door
def normalise(folded: Folded, *, d_x: int) -> Folded:
  """Moves the scale of `W_q W_k^T` to `W_v W_p`.

  Linear attention with the rescaled products is the same.

  Args:
    folded: the products.
    d_x: width of the inputs; the mean diagonal of this block becomes 1.

  Raises:
    ValueError: if `d_x` is not within the tokens, or the mean diagonal of a
      head is 0 (its result is not finite under `jit`).
  """
  check_part('d_x', d_x, folded.query_key.shape[1])
  diagonal = jnp.diagonal(folded.query_key, axis1=1, axis2=2)[:, :d_x]
  scale = jnp.mean(diagonal, axis=1)[:, None, None]
  _validate.look(functools.partial(_check_diagonal, d_x), folded.query_key)
  return Folded(folded.query_key / scale, folded.value_output * scale)


def _check_diagonal(d_x: int, query_key: Array) -> None:
  diagonal = np.diagonal(query_key, axis1=1, axis2=2)[:, :d_x]
  if not np.all(np.mean(diagonal, axis=1)):
    raise ValueError(
      'folded.query_key has a mean diagonal of 0; expected a number that can '
      'be made 1. Train the layer first, or compare it as it is.'
    )


@door
def interpolate(
  start: Folded, end: Folded, fraction: float | Array
) -> SelfAttention:
  """Interpolates between two layers, product by product.

  Args:
    start: products of the first; see `normalise`.
    end: products of the second, of equal shapes.
    fraction: 0 for the first, 1 for the second.
  """
  _validate.finite(fraction=fraction)
  return unfold(
    jax.tree.map(lambda a, b: (1 - fraction) * a + fraction * b, start, end)
  )
