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

  For gradient descent on a linear model from 0 it is the learnt weights.

  Args:
    predict_fn: `tokens [M, D] -> [d_y]`.

  Raises:
    ValueError: if `tokens` has another rank, `d_x` is not within it, or
      `predict_fn` is no function of it.
  """
  _validate.check_function('predict_fn', predict_fn, 1, '(tokens) -> [d_y]')
  check_part('d_x', d_x, tokens.shape[1])

  def of_query(query):
    return predict_fn(tokens.at[-1, :d_x].set(query))

  return jax.jacrev(of_query)(tokens[-1, :d_x])


@door
def predictions_difference(
  predictions: Float[Array, 'B d_y'], others: Float[Array, 'B d_y']
) -> Float[Array, '']:
  """Returns Preds diff, the mean 2-norm of the predictions' difference.

  Args:
    predictions: of one model, a row for each task. Shape `[B, d_y]`.
    others: of the other. Shape `[B, d_y]`.

  Example:
    >>> float(predictions_difference(jnp.ones((2, 1)), jnp.zeros((2, 1))))
    1.0
  """
  return jnp.mean(jnp.linalg.norm(predictions - others, axis=1))


@door
def model_difference(
  sensitivities: Float[Array, 'B d_x'], others: Float[Array, 'B d_x']
) -> Float[Array, '']:
  """Returns Model diff, the mean 2-norm of the sensitivities' difference.

  Args:
    sensitivities: of one model, of one label. Shape `[B, d_x]`.
    others: of the other. Shape `[B, d_x]`.
  """
  return jnp.mean(jnp.linalg.norm(sensitivities - others, axis=1))


@door
def model_cosine(
  sensitivities: Float[Array, 'B d_x'], others: Float[Array, 'B d_x']
) -> Float[Array, '']:
  """Returns Model cos, the mean cosine of the angle between sensitivities.

  Takes what `model_difference` takes.

  Returns:
    The mean, whatever the size of the sensitivities; NaN if one is 0, which has
    no angle. Shape `[]`.

  Example:
    >>> f'{float(model_cosine(jnp.ones((2, 3)), -jnp.ones((2, 3)))):.3f}'
    '-1.000'

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1; they add 1e-8 to norms.
  """
  return jnp.mean(jax.vmap(_numerics.cosine)(sensitivities, others))
