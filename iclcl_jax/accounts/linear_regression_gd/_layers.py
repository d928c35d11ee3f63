"""Layers of self-attention alone, and the answer of a stack of them."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax._program import compiled
from iclcl_jax.accounts.linear_regression_gd._products import (
  SelfAttention,
  fold,
)
from iclcl_jax.accounts.linear_regression_gd._tokens import (
  check_part,
  context_only,
)
from iclcl_jax.types import Array, Bool, Float

WeightsFn: TypeAlias = Callable[[Array, Array, int], Array]


def linear_weights(scores: Array, visible: Array, d_k: int) -> Array:
  """Returns the visible scores themselves: linear self-attention."""
  del d_k
  return jnp.where(visible, scores, 0)


def softmax_weights(scores: Array, visible: Array, d_k: int) -> Array:
  """Returns the softmax of the visible scores divided by `sqrt(d_k)`."""
  return jax.nn.softmax(scores / d_k**0.5, axis=-1, where=visible)


@door
def attend(
  layer: SelfAttention,
  tokens: Float[Array, 'M D'],
  *,
  weights_fn: WeightsFn = linear_weights,
  visible: Bool[Array, 'M M'] | None = None,
) -> Float[Array, 'M D']:
  r"""Returns all rows `[M, D]` after one layer, with a residual connection.

  .. math:: E \leftarrow E + \sum_h
     \big((E W_q^h)(C W_k^h)^\top (C W_v^h)\big) W_p^h

  Args:
    layer: weights of the layer.
    tokens: rows `E`; the context `C` is all but the last. Shape `[M, D]`.
    weights_fn: `(scores [Q, K], visible [Q, K], d_k) -> [Q, K]`, row by row:
      `linear_weights`, `softmax_weights`, or one of your own. `visible` may
      have one row for all.
    visible: which row sees which column, None for `context_only`. Other masks
      break the construction: a query among the keys sees its own
      prediction, and causal rows get gradients of their prefix.

  Raises:
    ValueError: if shapes or dtypes disagree, or `weights_fn` is no function
      that returns one weight for each score.
  """
  _check_call(tokens, weights_fn)
  if visible is None:
    visible = context_only(tokens.shape[0])
  width = layer.keys.shape[2]

  def head(query_key, value_output):
    scores = tokens @ query_key @ tokens.T
    weights = weights_fn(scores, visible, width)
    _validate.check_result('weights_fn', weights, scores.shape)
    return weights @ tokens @ value_output

  return tokens + jnp.sum(jax.vmap(head)(*fold(layer)), axis=0)


@door
def attend_query(
  layer: SelfAttention,
  tokens: Float[Array, 'M D'],
  *,
  weights_fn: WeightsFn = linear_weights,
) -> Float[Array, ' D']:
  """Returns the last row `[D]` of `attend` without computing the others.

  Args:
    weights_fn: as in `attend`.

  Raises:
    ValueError: as `attend`.
  """
  _check_call(tokens, weights_fn)
  context, row = tokens[:-1], tokens[-1]
  folded = fold(layer)
  scores = jnp.einsum('d,hde->he', row, folded.query_key) @ context.T
  visible = jnp.ones((1, context.shape[0]), bool)
  weights = weights_fn(scores, visible, layer.keys.shape[2])
  _validate.check_result('weights_fn', weights, scores.shape)
  read = weights @ context
  return row + jnp.einsum('hd,hde->e', read, folded.value_output)


@compiled
def predict(
  layers: SelfAttention,
  tokens: Float[Array, 'M D'],
  *,
  d_y: int = 1,
  weights_fn: WeightsFn = linear_weights,
) -> Float[Array, ' d_y']:
  """Returns minus the label part `[d_y]` of the query's row after all layers.

  Args:
    layers: weights, stacked along a leading axis of layers; see `repeat`.
    weights_fn: as in `attend`.

  Raises:
    ValueError: as `attend`, or if `layers` is no stack, or `d_y` is not less
      than the width of the tokens.

  Example:
    >>> rows = jnp.asarray([[1.0, 2.0], [3.0, 0.0]])  # (x_1, y_1), (x_q, 0)
    >>> product = jnp.diag(jnp.asarray([1.0, 0.0]))[None]
    >>> minus = jnp.diag(jnp.asarray([0.0, -1.0]))[None]
    >>> layer = SelfAttention(product, product, minus, jnp.eye(2)[None])
    >>> predict(repeat(layer, 1), rows).tolist()
    [6.0]
  """
  _validate.check_array('layers.queries', layers.queries, 'L H D d_k')
  _validate.check_array('tokens', tokens, 'M D')
  check_part('d_y', d_y, tokens.shape[1])
  before = jax.tree.map(lambda w: w[:-1], layers)
  last = jax.tree.map(lambda w: w[-1], layers)

  def step(rows, layer):
    return attend(layer, rows, weights_fn=weights_fn), None

  rows = jax.lax.scan(step, tokens, before)[0]
  return -attend_query(last, rows, weights_fn=weights_fn)[-d_y:]


def repeat(layer: SelfAttention, num_layers: int) -> SelfAttention:
  """Stacks one layer `L` times: a looped network, the same weights everywhere.

  Args:
    layer: the layer.
    num_layers: number of layers `L`.
  """
  _validate.at_least(1, num_layers=num_layers)
  return jax.tree.map(
    lambda w: jnp.broadcast_to(w[None], (num_layers, *w.shape)), layer
  )


def _check_call(tokens: Array, weights_fn: WeightsFn) -> None:
  if len(tokens) < 2:
    raise ValueError(
      f'tokens has {len(tokens)} rows; expected at least 2: a demonstration '
      'and the query.'
    )
  _validate.check_function(
    'weights_fn', weights_fn, 3, '(scores, visible, d_k) -> weights'
  )
