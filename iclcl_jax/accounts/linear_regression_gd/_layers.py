"""Self-attention without anything else, and the weights that descend."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from iclcl_jax import _validate
from iclcl_jax.types import Array, Bool, Float

WeightsFn: TypeAlias = Callable[[Array, Array, int], Array]


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


def make_tokens(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  query: Float[Array, ' d_x'],
  *,
  initial: Float[Array, 'd_y d_x'] | None = None,
) -> Float[Array, 'N_plus_1 D']:
  """Puts a regression problem into tokens `(x_i, y_i)`, the query last.

  Args:
    inputs: training inputs. Shape `[N, d_x]`.
    labels: their labels. Shape `[N, d_y]`.
    query: test input. Shape `[d_x]`.
    initial: weights `W_0` before the first step, None for 0: the query row is
      `(x_q, -W_0 x_q)`. Shape `[d_y, d_x]`.

  Returns:
    The tokens. Shape `[N + 1, d_x + d_y]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  Example:
    >>> make_tokens(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones(3)).shape
    (3, 4)

  References:
    von Oswald et al., arXiv:2212.07677, section 3.
  """
  initial = check_problem(inputs, labels, query, initial)
  last = jnp.concatenate([query, -initial @ query])
  context = jnp.concatenate([inputs, labels], axis=1)
  return jnp.concatenate([context, last[None]])


def context_only(num_tokens: int) -> Bool[Array, 'M M']:
  """The mask of the construction: every row sees all rows but the query's.

  Args:
    num_tokens: number of rows, `N + 1`.

  Returns:
    Row, column: whether the row sees the column. Shape `[N + 1, N + 1]`.

  Raises:
    ValueError: if `num_tokens < 2`.

  Example:
    >>> context_only(2).tolist()
    [[True, False], [True, False]]
  """
  _validate.check_count('num_tokens', num_tokens, minimum=2)
  column = jnp.arange(num_tokens) < num_tokens - 1
  return jnp.broadcast_to(column[None], (num_tokens, num_tokens))


def linear_weights(scores: Array, visible: Array, d_k: int) -> Array:
  """Weights of linear self-attention: the visible scores themselves."""
  del d_k
  return jnp.where(visible, scores, 0)


def softmax_weights(scores: Array, visible: Array, d_k: int) -> Array:
  """Weights of softmax self-attention, scores divided by `sqrt(d_k)`."""
  return jax.nn.softmax(scores / d_k**0.5, axis=-1, where=visible)


def attend(
  layer: SelfAttention,
  tokens: Float[Array, 'M D'],
  *,
  weights_fn: WeightsFn = linear_weights,
  visible: Bool[Array, 'M M'] | None = None,
) -> Float[Array, 'M D']:
  r"""Applies one layer to all rows, with a residual connection.

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

  Returns:
    The new rows. Shape `[M, D]`.

  Raises:
    ValueError: if shapes or dtypes disagree.

  References:
    von Oswald et al., arXiv:2212.07677, eq. 1 and appendix A.
  """
  _check_layer(layer, tokens)
  if visible is None:
    visible = context_only(tokens.shape[0])
  elif visible.shape != (tokens.shape[0],) * 2:
    raise ValueError(
      f'visible has shape {list(visible.shape)}; expected '
      f'{[tokens.shape[0]] * 2}, a row and a column for each token.'
    )
  width = layer.keys.shape[2]

  def head(query_key, value_output):
    scores = tokens @ query_key @ tokens.T
    return weights_fn(scores, visible, width) @ tokens @ value_output

  return tokens + jnp.sum(jax.vmap(head)(*fold(layer)), axis=0)


def attend_query(
  layer: SelfAttention,
  tokens: Float[Array, 'M D'],
  *,
  weights_fn: WeightsFn = linear_weights,
) -> Float[Array, ' D']:
  """The last row of `attend`, without the others.

  Args:
    layer: weights of the layer.
    tokens: rows, the query last. Shape `[M, D]`.
    weights_fn: as in `attend`.

  Returns:
    The query's new row. Shape `[D]`.

  Raises:
    ValueError: if shapes or dtypes disagree.
  """
  _check_layer(layer, tokens)
  context, row = tokens[:-1], tokens[-1]
  folded = fold(layer)
  scores = jnp.einsum('d,hde->he', row, folded.query_key) @ context.T
  visible = jnp.ones((1, context.shape[0]), bool)
  weights = weights_fn(scores, visible, layer.keys.shape[2])
  read = weights @ context
  return row + jnp.einsum('hd,hde->e', read, folded.value_output)


def predict(
  layers: SelfAttention,
  tokens: Float[Array, 'M D'],
  *,
  d_y: int = 1,
  weights_fn: WeightsFn = linear_weights,
) -> Float[Array, ' d_y']:
  """Answers the query: minus the label part of its row after all layers.

  Args:
    layers: weights, stacked along a leading axis of layers; see `repeat`.
    tokens: rows, the query last. Shape `[M, D]`.
    d_y: width of the labels, the last columns of the rows.
    weights_fn: as in `attend`.

  Returns:
    The prediction. Shape `[d_y]`.

  Raises:
    ValueError: if shapes or dtypes disagree.

  Example:
    >>> layer = construct(1.0, 2, d_x=2)
    >>> rows = make_tokens(jnp.eye(2), jnp.ones((2, 1)), jnp.ones(2))
    >>> predict(repeat(layer, 1), rows).tolist()
    [1.0]

  References:
    von Oswald et al., arXiv:2212.07677, proposition 1.
  """
  _validate.check_count('d_y', d_y)
  before = jax.tree.map(lambda w: w[:-1], layers)
  last = jax.tree.map(lambda w: w[-1], layers)

  def step(rows, layer):
    return attend(layer, rows, weights_fn=weights_fn), None

  rows = jax.lax.scan(step, tokens, before)[0]
  return -attend_query(last, rows, weights_fn=weights_fn)[-d_y:]


def repeat(layer: SelfAttention, num_layers: int) -> SelfAttention:
  """One layer, looped: the same weights in every layer.

  Args:
    layer: the layer.
    num_layers: number of layers `L`.

  Returns:
    The weights along a leading axis of layers.

  Raises:
    ValueError: if `num_layers < 1`.
  """
  _validate.check_count('num_layers', num_layers)
  return jax.tree.map(
    lambda w: jnp.broadcast_to(w[None], (num_layers, *w.shape)), layer
  )


def construct(
  learning_rate: float | Array,
  num_demonstrations: int,
  *,
  d_x: int | None = None,
  initial: Float[Array, 'd_y d_x'] | None = None,
  dtype: DTypeLike = float,
) -> SelfAttention:
  r"""The layer that does one step of gradient descent.

  .. math:: W_q = W_k = \begin{pmatrix}I&0\\0&0\end{pmatrix},\quad
     W_v = \begin{pmatrix}0&W_0^\top\\0&-I\end{pmatrix},\quad
     W_p = \frac{\eta}{N} I

  `K` copies of it do `K` steps, from any `W_0`.

  Args:
    learning_rate: the step size `eta`.
    num_demonstrations: number of context rows `N`.
    d_x: width of the inputs, for one label and `W_0 = 0`. Give this or
      `initial`.
    initial: weights `W_0` before the first step, whose dtype the layer takes.
      Shape `[d_y, d_x]`.
    dtype: of a layer without `initial`.

  Returns:
    The layer, with one head.

  Raises:
    ValueError: if `num_demonstrations < 1`, `learning_rate` is not finite, or
      not exactly one of `d_x` and `initial` is given.

  References:
    von Oswald et al., arXiv:2212.07677, proposition 1.
  """
  _validate.check_scalar('learning_rate', learning_rate)
  _validate.check_count('num_demonstrations', num_demonstrations)
  initial = _initial(d_x, initial, dtype)
  d_y, d_x = initial.shape
  zeros = jnp.zeros_like
  below = -jnp.eye(d_y, dtype=initial.dtype)
  values = jnp.block(
    [
      [jnp.zeros((d_x, d_x), initial.dtype), initial.T],
      [zeros(initial), below],
    ]
  )
  size = jnp.asarray(learning_rate, initial.dtype) / num_demonstrations
  outputs = size * jnp.eye(d_x + d_y, dtype=initial.dtype)
  return _layer_of_inputs(d_x, values, outputs)


def construct_plus_plus(
  learning_rate: float | Array,
  contraction: float | Array,
  num_demonstrations: int,
  *,
  d_x: int,
  d_y: int = 1,
  dtype: DTypeLike = float,
) -> SelfAttention:
  r"""The layer of GD++: a step that also transforms the inputs.

  .. math:: x_j \leftarrow (I - \gamma X^\top X)\, x_j

  for every row, the query included, at once with the step. The sum over the
  context is not divided by `N`.

  Args:
    learning_rate: the step size `eta`.
    contraction: the factor `gamma`; 0 for plain gradient descent.
    num_demonstrations: number of context rows `N`.
    d_x: width of the inputs.
    d_y: width of the labels.
    dtype: of the layer.

  Returns:
    The layer, with one head, for `W_0 = 0`.

  Raises:
    ValueError: if a count is below 1 or a scalar is not finite.

  References:
    von Oswald et al., arXiv:2212.07677, section 4.3 and appendix A.10.
  """
  _validate.check_scalar('learning_rate', learning_rate)
  _validate.check_scalar('contraction', contraction)
  _validate.check_count('num_demonstrations', num_demonstrations)
  _validate.check_count('d_x', d_x)
  _validate.check_count('d_y', d_y)
  signs = jnp.concatenate([jnp.ones(d_x, dtype), -jnp.ones(d_y, dtype)])
  size = jnp.asarray(learning_rate, signs.dtype) / num_demonstrations
  gamma = jnp.asarray(contraction, signs.dtype)
  sizes = jnp.where(signs > 0, -gamma, size)
  return _layer_of_inputs(d_x, jnp.diag(signs), jnp.diag(sizes))


def fold(layer: SelfAttention) -> Folded:
  """The products that a layer depends on; compare these, not the factors.

  Args:
    layer: the layer.

  Returns:
    `(W_q W_k^T, W_v W_p)` of each head.
  """
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
  """
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
    ValueError: if `d_x` is not within the tokens.

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1 (interpolation).
  """
  _validate.check_count('d_x', d_x)
  width = folded.query_key.shape[1]
  if d_x >= width:
    raise ValueError(
      f'd_x is {d_x}; expected less than the width of the tokens, {width}.'
    )
  diagonal = jnp.diagonal(folded.query_key, axis1=1, axis2=2)[:, :d_x]
  scale = jnp.mean(diagonal, axis=1)[:, None, None]
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
  for name, a, b in zip(Folded._fields, start, end, strict=True):
    if a.shape != b.shape:
      raise ValueError(
        f'start and end disagree in {name}: {list(a.shape)} and '
        f'{list(b.shape)}. Pass layers of the same size and number of heads.'
      )
  return unfold(
    jax.tree.map(lambda a, b: (1 - fraction) * a + fraction * b, start, end)
  )


def check_problem(inputs, labels, query, initial) -> Float[Array, 'd_y d_x']:
  """Checks a regression problem, and fills in `W_0 = 0`."""
  _validate.check_array('inputs', inputs, 'N d_x')
  _validate.check_array('labels', labels, 'N d_y')
  _validate.check_same('N', 'inputs', len(inputs), 'labels', len(labels))
  _validate.check_array('query', query, 'd_x')
  _validate.check_same(
    'd_x', 'query', query.shape[0], 'inputs', inputs.shape[1]
  )
  shape = labels.shape[1], inputs.shape[1]
  if initial is None:
    initial = jnp.zeros(shape, inputs.dtype)
  _validate.check_array('initial', initial, 'd_y d_x')
  if initial.shape != shape:
    raise ValueError(
      f'initial has shape {list(initial.shape)}; expected {list(shape)}, '
      '[d_y, d_x] of labels and inputs.'
    )
  _validate.check_dtypes(
    inputs=inputs, labels=labels, query=query, initial=initial
  )
  return initial


def _layer_of_inputs(d_x: int, values, outputs) -> SelfAttention:
  """A layer of one head whose scores are inner products of inputs."""
  kept = jnp.arange(values.shape[0]) < d_x
  select = jnp.diag(kept.astype(values.dtype))
  return SelfAttention(*(w[None] for w in (select, select, values, outputs)))


def _initial(d_x, initial, dtype) -> Float[Array, 'd_y d_x']:
  if (d_x is None) == (initial is None):
    raise ValueError(
      f'd_x is {d_x!r} and initial is {type(initial).__name__}; expected '
      'exactly one of them: initial has the width d_x already.'
    )
  if initial is None:
    _validate.check_count('d_x', d_x)
    return jnp.zeros((1, d_x), dtype)
  _validate.check_array('initial', initial, 'd_y d_x')
  return initial


def _check_layer(layer: SelfAttention, tokens) -> None:
  _validate.check_array('tokens', tokens, 'M D')
  if tokens.shape[0] < 2:
    raise ValueError(
      f'tokens has {tokens.shape[0]} rows; expected at least 2: a '
      'demonstration and the query.'
    )
  for name, weights in zip(SelfAttention._fields, layer, strict=True):
    _validate.check_array(f'layer.{name}', weights, 'H D width')
    axis = 2 if name == 'outputs' else 1
    _validate.check_same(
      'D', f'layer.{name}', weights.shape[axis], 'tokens', tokens.shape[1]
    )
