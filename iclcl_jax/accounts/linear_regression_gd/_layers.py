"""Problems as tokens, layers of self-attention, and constructed ones."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax._program import compiled
from iclcl_jax.types import Array, Bool, Float


@door
def make_tokens(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  query: Float[Array, ' d_x'],
  *,
  initial: Float[Array, 'd_y d_x'] | None = None,
) -> Float[Array, 'N_plus_1 D']:
  """Puts a regression problem into tokens `(x_i, y_i)`, the query last.

  With weights `W_0` before the first step, `initial` (None for 0), the query
  row is `(x_q, -W_0 x_q)`. Give `construct` the same.

  Example:
    >>> make_tokens(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones(3)).shape
    (3, 4)
  """
  initial = initial_weights(inputs, labels, initial)
  last = jnp.concatenate([query, -initial @ query])
  context = jnp.concatenate([inputs, labels], axis=1)
  return jnp.concatenate([context, last[None]])


@door
def make_alternating_tokens(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  query: Float[Array, ' d_x'],
  positions: Float[Array, 'M d_p'],
) -> Float[Array, 'M D']:
  """Puts a regression problem into tokens `x_1, y_1, ..., x_N, y_N, x_q`.

  A row is `(position, input, label)`: rows of inputs have label 0, rows of
  labels have input 0. Positions `[2 N + 1, d_p]` are the code of each place,
  one-hot (`jnp.eye(2 * N + 1)`) for `construct_copy`.

  Example:
    >>> make_alternating_tokens(
    ...   jnp.ones((1, 1)), 2 * jnp.ones((1, 1)), 3 * jnp.ones(1), jnp.eye(3)
    ... )[:, 3:].tolist()
    [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]
  """
  length, (_, d_x), d_y = 2 * len(inputs) + 1, inputs.shape, labels.shape[1]
  if len(positions) != length:
    raise ValueError(
      f'positions has {len(positions)} rows; expected {length}, one for each '
      f'input and label of {len(inputs)} demonstrations and for the query.'
    )
  rows = jnp.zeros((length, d_x + d_y), inputs.dtype)
  rows = rows.at[0:-1:2, :d_x].set(inputs).at[1::2, d_x:].set(labels)
  rows = rows.at[-1, :d_x].set(query)
  return jnp.concatenate([positions, rows], axis=1)


def initial_weights(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  initial: Float[Array, 'd_y d_x'] | None,
) -> Float[Array, 'd_y d_x']:
  if initial is not None:
    return initial
  return jnp.zeros((labels.shape[1], inputs.shape[1]), inputs.dtype)


def check_part(name: str, width: int, tokens_width: int) -> None:
  _validate.at_least(1, **{name: width})
  if width >= tokens_width:
    raise ValueError(
      f'{name} is {width}; expected less than the width of the tokens, '
      f'{tokens_width}.'
    )


class SelfAttention(NamedTuple):
  """Weights `W_q`, `W_k`, `W_v` and `W_p` of a layer whose heads are summed."""

  queries: Float[Array, 'H D d_k']
  keys: Float[Array, 'H D d_k']
  values: Float[Array, 'H D d_v']
  outputs: Float[Array, 'H d_v D']


class Folded(NamedTuple):
  """The products that a layer depends on, `W_q W_k^T` and `W_v W_p`."""

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
def normalise(folded: Folded, *, d_x: int) -> Folded:
  """Moves the scale of `W_q W_k^T` to `W_v W_p`: the same linear attention.

  The mean diagonal of the block of the inputs becomes 1; of one that is 0 the
  result is not finite.
  """
  check_part('d_x', d_x, folded.query_key.shape[1])
  diagonal = jnp.diagonal(folded.query_key, axis1=1, axis2=2)[:, :d_x]
  scale = jnp.mean(diagonal, axis=1)[:, None, None]
  return Folded(folded.query_key / scale, folded.value_output * scale)


@door
def interpolate(
  start: Folded, end: Folded, fraction: float | Array
) -> SelfAttention:
  """Interpolates between two layers, product by product.

  `fraction` is 0 for the first and 1 for the second; `normalise` both before.
  `W_k` and `W_p` are identities: the keys have the width of the tokens, by
  which softmax attention scales.
  """
  _validate.finite(fraction=fraction)
  query_key, value_output = jax.tree.map(
    lambda a, b: (1 - fraction) * a + fraction * b, start, end
  )
  unit = jnp.eye(query_key.shape[1], dtype=query_key.dtype)
  unit = jnp.broadcast_to(unit, query_key.shape)
  return SelfAttention(query_key, unit, value_output, unit)


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
    tokens: rows `E`; the context `C` is all but the last. Shape `[M, D]`.
    weights_fn: `(scores [Q, K], visible [Q, K], d_k) -> [Q, K]`, row by row:
      `linear_weights`, `softmax_weights`, or one of your own. `visible` may
      have one row for all.
    visible: which row sees which column, None for all but the query's. Other
      masks break the construction: a query among the keys sees its own
      prediction, and causal rows get gradients of their prefix.
  """
  _check_call(tokens, weights_fn)
  if visible is None:
    visible = jnp.arange(len(tokens))[None] < len(tokens) - 1
  return _attend(layer, tokens, tokens, weights_fn, visible)


@door
def attend_query(
  layer: SelfAttention,
  tokens: Float[Array, 'M D'],
  *,
  weights_fn: WeightsFn = linear_weights,
) -> Float[Array, ' D']:
  """Returns the last row `[D]` of `attend` without computing the others."""
  _check_call(tokens, weights_fn)
  visible = jnp.ones((1, len(tokens) - 1), bool)
  return _attend(layer, tokens[-1:], tokens[:-1], weights_fn, visible)[0]


def _attend(layer, rows, context, weights_fn, visible) -> Float[Array, 'Q D']:
  """Returns some rows after what all heads read of the context."""

  def head(query_key, value_output):
    scores = rows @ query_key @ context.T
    weights = weights_fn(scores, visible, layer.keys.shape[2])
    _validate.check_result('weights_fn', weights, scores.shape)
    return weights @ context @ value_output

  return rows + jnp.sum(jax.vmap(head)(*fold(layer)), axis=0)


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
    d_y, weights_fn: width of a label; as in `attend`.

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
  """Stacks one layer: a looped network, the same weights in all layers."""
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


@door
def construct(
  learning_rate: float | Array,
  num_demonstrations: int,
  initial: Float[Array, 'd_y d_x'],
  *,
  contraction: float | Array = 0.0,
) -> SelfAttention:
  r"""Constructs the layer, of one head, that does one step of gradient descent.

  .. math:: W_q = W_k = \begin{pmatrix}I&0\\0&0\end{pmatrix},\quad
     W_v = \begin{pmatrix}I&W_0^\top\\0&-I\end{pmatrix},\quad
     W_p = \begin{pmatrix}-\gamma I&0\\0&\frac{\eta}{N} I\end{pmatrix}

  `K` copies of it do `K` steps, from any `W_0`, which both the layer and the
  query's token hold: call `make_tokens` with the SAME `initial`. With another
  the layers descend from neither. The layer takes its dtype.

  The `contraction` `gamma` of GD++ is for a step from `W_0 = 0` that also moves
  every input, the query's too, to `(I - gamma X^T X) x_j`: a sum that is not
  divided by `N`.
  """
  _validate.finite(learning_rate=learning_rate, contraction=contraction)
  _validate.at_least(1, num_demonstrations=num_demonstrations)
  (d_y, d_x), dtype = initial.shape, initial.dtype
  is_input = jnp.arange(d_x + d_y) < d_x
  select = jnp.diag(is_input.astype(dtype))
  signs = jnp.diag(jnp.where(is_input, 1, -1).astype(dtype))
  size = jnp.asarray(learning_rate, dtype) / num_demonstrations
  shrink = -jnp.asarray(contraction, dtype)
  values = signs.at[:d_x, d_x:].set(initial.T)
  outputs = jnp.diag(jnp.where(is_input, shrink, size))
  return SelfAttention(*(w[None] for w in (select, select, values, outputs)))


def construct_copy(
  num_demonstrations: int,
  *,
  d_x: int,
  d_y: int = 1,
  sharpness: float | Array = 1e3,
  dtype=float,
) -> SelfAttention:
  """Constructs the softmax layer that writes each label next to its input.

  With one-hot positions every row attends to its successor, and adds the
  label that stands there; the last row, the query, looks at the first, where
  no label stands. Use it with `softmax_weights` and all rows visible. The
  layers of `construct`, widened by `widen`, then descend: rows of labels have
  no input and are silent. The `sharpness` is the score of the successor, before
  the division by the root of `2 N + 1`; the others have 0. It is a `ValueError`
  if it overflows `dtype`, or leaves the successor less than half.
  """
  _validate.at_least(1, num_demonstrations=num_demonstrations, d_x=d_x, d_y=d_y)
  _validate.check_float_dtype('dtype', dtype)
  length = 2 * num_demonstrations + 1
  # The successor's share e^s / (e^s + length - 1), with the score s =
  # sharpness / sqrt(length), is at least one half.
  least = math.log(length - 1) * length**0.5
  largest = float(jnp.finfo(dtype).max)
  _validate.check_scalar('sharpness', sharpness, minimum=least, maximum=largest)
  width = length + d_x + d_y
  place = jnp.eye(width, length, dtype=dtype)
  successor = jnp.roll(place, 1, axis=1)
  last = jnp.diag((jnp.arange(width) >= length + d_x).astype(dtype))
  scale = jnp.asarray(sharpness, dtype)
  layer = scale * successor, place, last, jnp.eye(width, dtype=dtype)
  return SelfAttention(*(w[None] for w in layer))


@door
def widen(layer: SelfAttention, width: int) -> SelfAttention:
  """Adds columns that the layer does not touch, such as positions."""
  _validate.at_least(0, width=width)
  front = (0, 0), (width, 0), (0, 0)
  queries, keys, values = (jnp.pad(w, front) for w in layer[:3])
  outputs = jnp.pad(layer.outputs, ((0, 0), (0, 0), (width, 0)))
  return SelfAttention(queries, keys, values, outputs)
