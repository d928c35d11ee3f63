"""Synthetic in-context tasks, as NamedTuples of arrays."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.types import Array, Float, PRNGKeyArray


class RegressionPrompt(NamedTuple):
  """One prompt of in-context linear regression, `y = B s`.

  The tokens `[N + 1, d_x + d_y]` are demonstrations `[s_i ; y_i]`, then the
  query `[s_q ; 0]`; the target is its label `B s_q`.
  """

  tokens: Float[Array, 'n d_model']
  target: Float[Array, ' d_y']


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype) -> Array:
  """Draws inputs from `U(-1, 1)`, the default of the papers' experiments."""
  return jax.random.uniform(key, shape, dtype, minval=-1, maxval=1)


@door
def linear_regression(
  key: PRNGKeyArray,
  num_demonstrations: int,
  task_matrix: Float[Array, 'd_y d_x'],
  *,
  input_fn: Callable[..., Array] = uniform,
) -> RegressionPrompt:
  """Draws a prompt whose labels are `task_matrix @ input`, without noise.

  One fixed `task_matrix` for all prompts is the papers' setting.

  Args:
    num_demonstrations: number of demonstrations `N >= 0`.
    input_fn: distribution of the inputs: `uniform` or `jax.random.normal`.

  Example:
    >>> prompt = linear_regression(jax.random.key(0), 15, jnp.ones((1, 11)))
    >>> prompt.tokens.shape, prompt.target.shape
    ((16, 12), (1,))

  References:
    Ren & Liu, arXiv:2310.13220, section 5 (inputs and one matrix B).
  """
  _validate.at_least(0, num_demonstrations=num_demonstrations)
  expected = '(key, shape, dtype) -> array, such as tasks.uniform'
  _validate.check_function('input_fn', input_fn, 3, expected)
  shape = (num_demonstrations + 1, task_matrix.shape[1])
  inputs = input_fn(key, shape, task_matrix.dtype)
  labels = inputs @ task_matrix.T
  visible = labels.at[-1].set(0)
  return RegressionPrompt(
    tokens=jnp.concatenate([inputs, visible], axis=1), target=labels[-1]
  )
