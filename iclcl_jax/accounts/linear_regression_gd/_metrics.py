"""How alike two models of in-context learning are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.accounts import _numerics
from iclcl_jax.types import Array, Float


def sensitivity(
  predict_fn: Callable[[Array], Array],
  tokens: Float[Array, 'M D'],
  *,
  d_x: int,
) -> Float[Array, 'd_y d_x']:
  """Derivative of the prediction in the query's input.

  For gradient descent on a linear model from 0 it is the learnt weights.

  Args:
    predict_fn: `tokens [M, D] -> [d_y]`.
    tokens: rows, the query last. Shape `[M, D]`.
    d_x: width of the inputs, the first columns of the rows.

  Returns:
    The derivative. Shape `[d_y, d_x]`.

  Raises:
    ValueError: if `tokens` has another rank, `d_x` is not within it, or
      `predict_fn` is no function of it.

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1.
  """
  _validate.check_array('tokens', tokens, 'M D')
  _validate.check_count('d_x', d_x)
  _validate.check_function('predict_fn', predict_fn, 1, '(tokens) -> [d_y]')
  if d_x >= tokens.shape[1]:
    raise ValueError(
      f'd_x is {d_x}; expected less than the width of the tokens, '
      f'{tokens.shape[1]}.'
    )

  def of_query(query):
    return predict_fn(tokens.at[-1, :d_x].set(query))

  return jax.jacrev(of_query)(tokens[-1, :d_x])


def predictions_difference(
  predictions: Float[Array, 'B d_y'], others: Float[Array, 'B d_y']
) -> Float[Array, '']:
  """Preds diff: mean 2-norm of the difference of two models' predictions.

  Args:
    predictions: of one model, a row for each task. Shape `[B, d_y]`.
    others: of the other. Shape `[B, d_y]`.

  Returns:
    The mean. Shape `[]`.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> float(predictions_difference(jnp.ones((2, 1)), jnp.zeros((2, 1))))
    1.0

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1.
  """
  _check_pair('predictions', predictions, others, 'B d_y')
  return jnp.mean(jnp.linalg.norm(predictions - others, axis=1))


def model_difference(
  sensitivities: Float[Array, 'B d_x'], others: Float[Array, 'B d_x']
) -> Float[Array, '']:
  """Model diff: mean 2-norm of the difference of sensitivities.

  Args:
    sensitivities: of one model, of one label. Shape `[B, d_x]`.
    others: of the other. Shape `[B, d_x]`.

  Returns:
    The mean. Shape `[]`.

  Raises:
    ValueError: if shapes disagree.

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1.
  """
  _check_pair('sensitivities', sensitivities, others, 'B d_x')
  return jnp.mean(jnp.linalg.norm(sensitivities - others, axis=1))


def model_cosine(
  sensitivities: Float[Array, 'B d_x'], others: Float[Array, 'B d_x']
) -> Float[Array, '']:
  """Model cos: mean cosine of the angle between sensitivities.

  Args:
    sensitivities: of one model, of one label. Shape `[B, d_x]`.
    others: of the other. Shape `[B, d_x]`.

  Returns:
    The mean, whatever the size of the sensitivities; NaN if one is 0, which has
    no angle. Shape `[]`.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> f'{float(model_cosine(jnp.ones((2, 3)), -jnp.ones((2, 3)))):.3f}'
    '-1.000'

  References:
    von Oswald et al., arXiv:2212.07677, section 3.1; they add 1e-8 to norms.
  """
  _check_pair('sensitivities', sensitivities, others, 'B d_x')
  return jnp.mean(jax.vmap(_numerics.cosine)(sensitivities, others))


def _check_pair(name: str, array, others, shape: str) -> None:
  _validate.check_array(name, array, shape)
  _validate.check_array('others', others, shape)
  if array.shape != others.shape:
    raise ValueError(
      f'{name} and others have shapes {list(array.shape)} and '
      f'{list(others.shape)}; expected equal ones, a row for each task.'
    )
  _validate.check_dtypes(**{name: array, 'others': others})
