"""Constructed layers whose forward pass is gradient descent."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts.linear_regression_gd._products import SelfAttention
from iclcl_jax.types import Array, Float


@door
def construct(
  learning_rate: float | Array,
  num_demonstrations: int,
  *,
  d_x: int | None = None,
  initial: Float[Array, 'd_y d_x'] | None = None,
  dtype: DTypeLike = float,
) -> SelfAttention:
  r"""Constructs the layer that does one step of gradient descent.

  .. math:: W_q = W_k = \begin{pmatrix}I&0\\0&0\end{pmatrix},\quad
     W_v = \begin{pmatrix}0&W_0^\top\\0&-I\end{pmatrix},\quad
     W_p = \frac{\eta}{N} I

  `K` copies of it do `K` steps, from any `W_0`, which both the layer and the
  query's token hold: call `make_tokens` with the SAME `initial`. With another
  the layers descend from neither.

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
    ValueError: if `num_demonstrations < 1`, `learning_rate` is not finite,
      `dtype` is no floating-point dtype, or not exactly one of `d_x` and
      `initial` is given.

  References:
    von Oswald et al., arXiv:2212.07677, proposition 1.
  """
  _validate.finite(learning_rate=learning_rate)
  _validate.at_least(1, num_demonstrations=num_demonstrations)
  _validate.check_float_dtype('dtype', dtype)
  initial = _initial(d_x, initial, dtype)
  d_y, d_x = initial.shape
  of_labels = jnp.concatenate([initial.T, -jnp.eye(d_y, dtype=initial.dtype)])
  values = jnp.pad(of_labels, [(0, 0), (d_x, 0)])
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
  r"""Constructs the layer of GD++, whose step also transforms the inputs.

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
    ValueError: if a count is below 1, a scalar is not finite, or `dtype` is no
      floating-point dtype.

  References:
    von Oswald et al., arXiv:2212.07677, section 4.3 and appendix A.10.
  """
  _validate.finite(learning_rate=learning_rate, contraction=contraction)
  _validate.at_least(1, num_demonstrations=num_demonstrations, d_x=d_x, d_y=d_y)
  _validate.check_float_dtype('dtype', dtype)
  signs = jnp.concatenate([jnp.ones(d_x, dtype), -jnp.ones(d_y, dtype)])
  size = jnp.asarray(learning_rate, signs.dtype) / num_demonstrations
  gamma = jnp.asarray(contraction, signs.dtype)
  sizes = jnp.where(signs > 0, -gamma, size)
  return _layer_of_inputs(d_x, jnp.diag(signs), jnp.diag(sizes))


def _layer_of_inputs(d_x: int, values, outputs) -> SelfAttention:
  """Makes a layer of one head whose scores are inner products of inputs."""
  kept = jnp.arange(values.shape[0]) < d_x
  select = jnp.diag(kept.astype(values.dtype))
  return SelfAttention(*(w[None] for w in (select, select, values, outputs)))


def _initial(d_x, initial, dtype) -> Float[Array, 'd_y d_x']:
  if (d_x is None) == (initial is None):
    raise ValueError(
      f'd_x is {d_x!r} and initial is {type(initial).__name__}; expected '
      'exactly one of them: initial has the width d_x already.'
    )
  if initial is not None:
    return initial
  _validate.at_least(1, d_x=d_x)
  return jnp.zeros((1, d_x), dtype)
