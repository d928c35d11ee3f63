"""Regression problems as rows of tokens."""

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
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

  Args:
    initial: weights `W_0` before the first step, None for 0: the query row is
      `(x_q, -W_0 x_q)`. Give `construct` the same. Shape `[d_y, d_x]`.

  Returns:
    The tokens. Shape `[N + 1, d_x + d_y]`.

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
  labels have input 0.

  Args:
    positions: code of each place: one-hot (`jnp.eye(2 * N + 1)`) for
      `construct_copy`. Shape `[2 N + 1, d_p]`.

  Returns:
    The tokens. Shape `[2 N + 1, d_p + d_x + d_y]`.

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


def context_only(num_tokens: int) -> Bool[Array, 'M M']:
  """Returns the mask of the construction: rows see all rows but the query's.

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
  _validate.at_least(2, num_tokens=num_tokens)
  column = jnp.arange(num_tokens) < num_tokens - 1
  return jnp.broadcast_to(column[None], (num_tokens, num_tokens))


def initial_weights(
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  initial: Float[Array, 'd_y d_x'] | None,
) -> Float[Array, 'd_y d_x']:
  """Returns the weights `W_0`: 0 unless others are given."""
  if initial is not None:
    return initial
  return jnp.zeros((labels.shape[1], inputs.shape[1]), inputs.dtype)


def check_part(name: str, width: int, tokens_width: int) -> None:
  """Checks the width of inputs or of labels, a part of the tokens."""
  _validate.at_least(1, **{name: width})
  if width >= tokens_width:
    raise ValueError(
      f'{name} is {width}; expected less than the width of the tokens, '
      f'{tokens_width}.'
    )
