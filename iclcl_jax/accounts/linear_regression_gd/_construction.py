"""Constructed layers: gradient descent, and what joins inputs and labels."""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.accounts.linear_regression_gd._layers import SelfAttention
from iclcl_jax.types import Array, Float


@door
def construct(
  learning_rate: float | Array,
  num_demonstrations: int,
  initial: Float[Array, 'd_y d_x'],
) -> SelfAttention:
  r"""Constructs the layer, of one head, that does one step of gradient descent.

  .. math:: W_q = W_k = \begin{pmatrix}I&0\\0&0\end{pmatrix},\quad
     W_v = \begin{pmatrix}0&W_0^\top\\0&-I\end{pmatrix},\quad
     W_p = \frac{\eta}{N} I

  `K` copies of it do `K` steps, from any `W_0`, which both the layer and the
  query's token hold: call `make_tokens` with the SAME `initial`. With another
  the layers descend from neither. The layer takes its dtype.
  """
  _validate.finite(learning_rate=learning_rate)
  _validate.at_least(1, num_demonstrations=num_demonstrations)
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
  r"""Constructs the layer of GD++ from 0: a step that also moves the inputs.

  .. math:: x_j \leftarrow (I - \gamma X^\top X)\, x_j

  for every row, the query included, at once with the step. The sum over the
  context is not divided by `N`.

  Args:
    contraction: the factor `gamma`; 0 for plain gradient descent.
  """
  _validate.finite(learning_rate=learning_rate, contraction=contraction)
  _validate.at_least(1, num_demonstrations=num_demonstrations, d_x=d_x, d_y=d_y)
  _validate.check_float_dtype('dtype', dtype)
  signs = jnp.concatenate([jnp.ones(d_x, dtype), -jnp.ones(d_y, dtype)])
  size = jnp.asarray(learning_rate, signs.dtype) / num_demonstrations
  gamma = jnp.asarray(contraction, signs.dtype)
  sizes = jnp.where(signs > 0, -gamma, size)
  return _layer_of_inputs(d_x, jnp.diag(signs), jnp.diag(sizes))


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
    sharpness: the score of the successor, before the division by the square
      root of `2 N + 1`; the others have 0.

  Raises:
    ValueError: if `sharpness` overflows `dtype`, or leaves the successor less
      than half of the attention, which copies nothing.
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
  """Adds so many columns, of positions say, which the layer does not touch."""
  _validate.at_least(0, width=width)
  front = (0, 0), (width, 0), (0, 0)
  queries, keys, values = (jnp.pad(w, front) for w in layer[:3])
  outputs = jnp.pad(layer.outputs, ((0, 0), (0, 0), (width, 0)))
  return SelfAttention(queries, keys, values, outputs)


def _layer_of_inputs(d_x: int, values, outputs) -> SelfAttention:
  """Makes a layer of one head whose scores are inner products of inputs."""
  kept = jnp.arange(values.shape[0]) < d_x
  select = jnp.diag(kept.astype(values.dtype))
  return SelfAttention(*(w[None] for w in (select, select, values, outputs)))
