"""Weights of a layer, and the products that it depends on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
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


def fold(layer: SelfAttention) -> Folded:
  """The products that a layer depends on; compare these, not the factors.

  Args:
    layer: the layer.

  Returns:
    `(W_q W_k^T, W_v W_p)` of each head.

  Raises:
    ValueError: if `layer` is not one layer.
  """
  check_layer(layer)
  return Folded(
    jnp.einsum('hdk,hek->hde', layer.queries, layer.keys),
    jnp.einsum('hdv,hve->hde', layer.values, layer.outputs),
  )


def unfold(folded: Folded) -> SelfAttention:
  """A layer with these products.

  For softmax, mind that its keys have the width of the tokens.

  Args:
    folded: the products.

  Returns:
    The layer: `W_k` and `W_p` are identities.

  Raises:
    ValueError: if `folded` holds no products of one layer.
  """
  _check_folded('folded', folded)
  identity = jnp.broadcast_to(
    jnp.eye(folded.query_key.shape[1], dtype=folded.query_key.dtype),
    folded.query_key.shape,
  )
  return SelfAttention(
    folded.query_key, identity, folded.value_output, identity
  )


def normalise(folded: Folded, *, d_x: int) -> Folded:
  """Moves the scale of `W_q W_k^T` to `W_v W_p`; linear attention is unmoved.

  Args:
    folded: the products.
    d_x: width of the inputs; the mean diagonal of this block becomes 1.

  Returns:
    The rescaled products.

  Raises:
    ValueError: if `d_x` is not within the tokens, or the mean diagonal of a
      head is 0 (its result is not finite under `jit`).

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1 (interpolation).
  """
  _check_folded('folded', folded)
  _validate.check_count('d_x', d_x)
  width = folded.query_key.shape[1]
  if d_x >= width:
    raise ValueError(
      f'd_x is {d_x}; expected less than the width of the tokens, {width}.'
    )
  diagonal = jnp.diagonal(folded.query_key, axis1=1, axis2=2)[:, :d_x]
  scale = jnp.mean(diagonal, axis=1)[:, None, None]
  if _validate.is_concrete(scale) and not bool(jnp.all(scale)):
    raise ValueError(
      'folded.query_key has a mean diagonal of 0; expected a number that can '
      'be made 1. Train the layer first, or compare it as it is.'
    )
  return Folded(folded.query_key / scale, folded.value_output * scale)


def interpolate(
  start: Folded, end: Folded, fraction: float | Array
) -> SelfAttention:
  """The layer between two others, product by product.

  Args:
    start: products of the first; see `normalise`.
    end: products of the second, of equal shapes.
    fraction: 0 for the first, 1 for the second.

  Returns:
    The layer.

  Raises:
    ValueError: if shapes disagree, or `fraction` is not finite.
  """
  _validate.check_scalar('fraction', fraction)
  _check_folded('start', start)
  _check_folded('end', end)
  for name, a, b in zip(Folded._fields, start, end, strict=True):
    if a.shape != b.shape:
      raise ValueError(
        f'start and end disagree in {name}: {list(a.shape)} and '
        f'{list(b.shape)}. Pass layers of the same size and number of heads.'
      )
  return unfold(
    jax.tree.map(lambda a, b: (1 - fraction) * a + fraction * b, start, end)
  )


def check_layer(layer) -> None:
  """Checks that `layer` is one layer, not a stack of them."""
  _check_type('layer', layer, SelfAttention)
  for name, weights in layer._asdict().items():
    _validate.check_array(f'layer.{name}', weights, 'H D width')
  _validate.check_dtypes(**layer._asdict())


def _check_folded(name: str, folded) -> None:
  _check_type(name, folded, Folded)
  for field, product in folded._asdict().items():
    _validate.check_array(f'{name}.{field}', product, 'H D D')


def _check_type(name: str, value, kind) -> None:
  if not isinstance(value, kind):
    raise ValueError(
      f'{name} is a {type(value).__name__}; expected a {kind.__name__}.'
    )
