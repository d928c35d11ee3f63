"""Regression problems as rows of tokens."""

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.types import Array, Bool, Float


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
      `(x_q, -W_0 x_q)`. Give `construct` the same. Shape `[d_y, d_x]`.

  Returns:
    The tokens. Shape `[N + 1, d_x + d_y]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or there is no
      demonstration.

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


def check_problem(inputs, labels, query, initial) -> Float[Array, 'd_y d_x']:
  """Checks a regression problem, `query` or not, and fills in `W_0 = 0`."""
  _validate.check_array('inputs', inputs, 'N d_x')
  _validate.check_array('labels', labels, 'N d_y')
  _validate.check_same('N', 'inputs', len(inputs), 'labels', len(labels))
  for name, array in (('inputs', inputs), ('labels', labels)):
    if 0 in array.shape:
      raise ValueError(
        f'{name} has shape {list(array.shape)}; expected at least one '
        'demonstration, of width at least 1.'
      )
  query = inputs[0] if query is None else query
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
