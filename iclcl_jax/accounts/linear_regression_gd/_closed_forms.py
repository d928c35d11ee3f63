"""Answers and losses of descent in closed form."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.types import Array, Float


@door
def expected_loss_given_inputs(
  eigenvalues: Float[Array, ' d_x'],
  learning_rates: Float[Array, ' K'],
  contractions: Float[Array, ' K'],
  num_demonstrations: int,
  *,
  second_moment: float | Array,
  task_variance: float | Array = 1.0,
) -> Float[Array, '']:
  r"""Returns the mean loss `[]` of `K` steps from 0, for fixed inputs.

  The mean is over tasks and queries. Everything that GD and GD++ do is a
  function of :math:`X^\top X`, so each of its eigenvalues :math:`\lambda_j` has
  a share :math:`1 - g_j` of the task that is not learnt, and

  .. math:: E\,\tfrac12|\hat y - y|^2 = \tfrac12 \tau^2 m_2 \sum_j (1 - g_j)^2.

  For gradient descent :math:`1 - g_j = \prod_k (1 - \eta_k \lambda_j / N)`.
  Averaged over draws of the inputs, this is the loss over random tasks with a
  fraction of the spread.

  Args:
    eigenvalues: of :math:`X^\top X`, zeros included. Shape `[d_x]`.
    learning_rates: step sizes `eta`. Shape `[K]`.
    contractions: factors `gamma` of GD++, 0 for gradient descent. Shape `[K]`.
    num_demonstrations: number of demonstrations `N`.
    second_moment: variance of the coordinates of the query.
    task_variance: variance of the entries of the task.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or an eigenvalue or variance
      is negative beyond rounding.

  Example:
    >>> expected_loss_given_inputs(
    ...   jnp.ones(2), jnp.ones(1), jnp.zeros(1), 2, second_moment=1.0
    ... ).tolist()  # (1 - 1 / 2)^2
    0.25

  References:
    von Oswald et al., arXiv:2212.07677, eq. 4 and section 4.3, averaged.
  """
  _validate.at_least(1, num_demonstrations=num_demonstrations)
  _validate.non_negative(
    second_moment=second_moment, task_variance=task_variance
  )
  _validate.look(_check_not_negative, eigenvalues)

  def step(carry, factors):
    # Shares of input and label rows, which still stand, and what is learnt.
    moved, left, learnt = carry
    rate, contraction = factors
    size = rate / num_demonstrations * eigenvalues * moved
    shrink = 1 - contraction * eigenvalues * moved**2
    gain = size * left * moved
    return (moved * shrink, left - gain, learnt + gain), None

  ones = jnp.ones_like(eigenvalues)
  carry = ones, ones, jnp.zeros_like(eigenvalues)
  rates = learning_rates, contractions
  learnt = jax.lax.scan(step, carry, rates)[0][2]
  return 0.5 * task_variance * second_moment * jnp.sum((1 - learnt) ** 2)


@door
def kernel_step(
  kernel: Callable[[Array, Array], Array],
  inputs: Float[Array, 'N d_x'],
  labels: Float[Array, 'N d_y'],
  query: Float[Array, ' d_x'],
  learning_rate: float | Array,
) -> Float[Array, ' d_y']:
  r"""Returns the prediction `[d_y]` of one step of kernel regression from 0.

  .. math:: \hat y = \frac\eta N \sum_i y_i\, k(x_i, x_q)

  With :math:`k(x, x') = \langle m(x), m(x')\rangle` it is one step on the last
  layer of the network :math:`W m(x)`, and the layer of `construct` on tokens
  :math:`(m(x_i), y_i)`.

  Args:
    kernel: `(x, x') -> []`, one of `kernels` or your own.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or `kernel` is no function
      of two vectors.

  Example:
    >>> kernel_step(
    ...   jnp.dot, jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones(3), 1.0
    ... ).tolist()
    [3.0]
  """
  _validate.finite(learning_rate=learning_rate)
  _validate.check_function('kernel', kernel, 2, "(x, x') -> []")
  scores = jax.vmap(lambda x: kernel(x, query))(inputs)
  _validate.check_result('kernel, of all inputs,', scores, inputs.shape[:1])
  return learning_rate / len(inputs) * scores @ labels


def _check_not_negative(eigenvalues) -> None:
  """Checks that eigenvalues of `X^T X` are not negative beyond rounding."""
  lowest = float(np.min(eigenvalues, initial=0))
  slack = 100 * float(jnp.finfo(eigenvalues.dtype).eps)
  if lowest < -slack * float(np.max(np.abs(eigenvalues), initial=0)):
    raise ValueError(
      f'eigenvalues has {lowest:g}; expected those of X^T X, not negative.'
    )
