"""Inputs and labels as separate tokens, and the layer that joins them."""

import math

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts.linear_regression_gd._products import SelfAttention
from iclcl_jax.types import Array, Float


@door
def make_alternating_tokens(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  query: Float[Array, ' d_x'],
  positions: Float[Array, 'M d_p'],
) -> Float[Array, 'M D']:
  """Puts a regression problem into tokens `x_1, y_1, ..., x_N, y_N, x_q`.

  A row is `(position, input, label)`: rows of inputs have label 0, rows of
  labels have input 0.

  Args:
    inputs: training inputs. Shape `[N, d_x]`.
    labels: their labels. Shape `[N, d_y]`.
    query: test input. Shape `[d_x]`.
    positions: code of each place: one-hot (`jnp.eye(2 * N + 1)`) for
      `construct_copy`. Shape `[2 N + 1, d_p]`.

  Returns:
    The tokens. Shape `[2 N + 1, d_p + d_x + d_y]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  Example:
    >>> make_alternating_tokens(
    ...   jnp.ones((1, 1)), 2 * jnp.ones((1, 1)), 3 * jnp.ones(1), jnp.eye(3)
    ... )[:, 3:].tolist()
    [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]

  References:
    von Oswald et al., arXiv:2212.07677, section 5 (copying).
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
  no input and are silent.

  Args:
    num_demonstrations: number of demonstrations `N`.
    d_x: width of the inputs.
    d_y: width of the labels.
    sharpness: the score of the successor, before the division by the square
      root of `2 N + 1`; the others have 0.
    dtype: of the layer.

  Returns:
    The layer, with one head, for tokens of `make_alternating_tokens`.

  Raises:
    ValueError: if a count is below 1, `dtype` is no floating-point dtype, or
      `sharpness` overflows it or leaves the successor less than half of the
      attention, which copies nothing.

  References:
    von Oswald et al., arXiv:2212.07677, section 5 (copying).
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
  """Adds columns in front of the tokens, which the layer does not touch.

  Args:
    layer: a layer for tokens of width `D`.
    width: number of new columns, such as those of positions.

  Returns:
    The layer for tokens of width `width + D`.

  Raises:
    ValueError: if `width` is negative, or `layer` is not one layer.
  """
  _validate.at_least(0, width=width)
  front = (0, 0), (width, 0), (0, 0)
  queries, keys, values = (jnp.pad(w, front) for w in layer[:3])
  outputs = jnp.pad(layer.outputs, ((0, 0), (0, 0), (width, 0)))
  return SelfAttention(queries, keys, values, outputs)
