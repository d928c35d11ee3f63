"""How alike two models of in-context learning are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts import _numerics
from iclcl_jax.accounts.linear_regression_gd._layers import check_part
from iclcl_jax.types import Array, Float


@door
def sensitivity(
  predict_fn: Callable[[Array], Array], tokens: Float[Array, 'M D'], *, d_x: int
) -> Float[Array, 'd_y d_x']:
  """Returns the derivative `[d_y, d_x]` of the prediction in the query's input.

  For gradient descent on a linear model from 0 it is the learnt weights. The
  model is `predict_fn`, `tokens [M, D] -> [d_y]`.
  """
  _validate.check_function('predict_fn', predict_fn, 1, '(tokens) -> [d_y]')
  check_part('d_x', d_x, tokens.shape[1])

  def of_query(query):
    return predict_fn(tokens.at[-1, :d_x].set(query))

  return jax.jacrev(of_query)(tokens[-1, :d_x])


@door
def mean_difference(
  rows: Float[Array, 'B d'], others: Float[Array, 'B d']
) -> Float[Array, '']:
  """Returns the mean 2-norm of the difference of two models' rows.

  Of predictions, a row for each task, it is Preds diff; of the sensitivities of
  one label it is Model diff.

  Example:
    >>> float(mean_difference(jnp.ones((2, 1)), jnp.zeros((2, 1))))
    1.0
  """
  return jnp.mean(jnp.linalg.norm(rows - others, axis=1))


@door
def model_cosine(
  sensitivities: Float[Array, 'B d_x'], others: Float[Array, 'B d_x']
) -> Float[Array, '']:
  """Returns Model cos, the mean cosine of the angle between sensitivities.

  Whatever their size; NaN if one is 0, which has no angle.

  Example:
    >>> f'{float(model_cosine(jnp.ones((2, 3)), -jnp.ones((2, 3)))):.3f}'
    '-1.000'

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1; they add 1e-8 to norms.
  """
  return jnp.mean(jax.vmap(_numerics.cosine)(sensitivities, others))
