r"""A trained network as attention over its own training history.

A linear layer trained by gradient descent on inputs :math:`x_t` with error
signals :math:`d_t = \partial L/\partial(W x_t)` ends in a sum of products:

.. math:: W_T\, x = c\, W_0\, x + \sum_t w_t\, d_t\, \langle x_t, x\rangle,

unnormalised linear attention whose keys are the layer's training inputs and
whose values are its error signals (not the labels), times the weight
:math:`w_t` that the optimizer has left of step `t`. `train` records both,
`recall` attends to them, `attribute` says what each training example adds. The
inputs of a layer, `[d_in]`, have a 1 appended, whose weights are the biases.

The optimizer is SGD with heavy-ball momentum and coupled weight decay. Adam,
which rescales entry by entry, has no such form.

References:
  Irie, Csordas & Schmidhuber, arXiv:2202.05798, section 3, Corollary 3.1 and
  eq. 4 (plain SGD); momentum and decay are derived here.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, attention, features
from iclcl_jax._door import door
from iclcl_jax._program import compiled
from iclcl_jax.types import Array, Float, Int, PRNGKeyArray

_INNER_PRODUCT = features.IdentityFeatures()
Params = tuple[Float[Array, 'd_out d_in'], ...]


class History(NamedTuple):
  """The inputs and error signals of one linear layer during training.

  The signals are slopes of the mean loss in the layer's outputs.
  """

  inputs: Float[Array, 'T B d_in']
  signals: Float[Array, 'T B d_out']


class Remains(NamedTuple):
  """What training leaves of initial weights and gradients: `c` and `w_t`."""

  initial: Array
  steps: Array


@door
def init_network(
  key: PRNGKeyArray, widths: Sequence[int], *, dtype=jnp.float32
) -> Params:
  """Draws a ReLU network: matrices `[d_out, d_in + 1]`.

  For the widths of input, hidden layers and output. Entries have the variance
  `2 / d_in`; the last column, the bias, is 0.
  """
  _validate.check_float_dtype('dtype', dtype)
  if len(widths) < 2:
    raise ValueError(
      f'widths is {tuple(widths)}; expected those of input and output at least.'
    )
  for width in widths:
    _validate.at_least(1, widths=width)

  def draw(key, width, after):
    matrix = (2 / width) ** 0.5 * jax.random.normal(key, (after, width), dtype)
    return jnp.pad(matrix, [(0, 0), (0, 1)])

  keys = jax.random.split(key, len(widths) - 1)
  return tuple(map(draw, keys, widths[:-1], widths[1:]))


@door
def layer_inputs(
  params: Params, inputs: Float[Array, ' d']
) -> tuple[tuple[Array, ...], Float[Array, ' d_out']]:
  """Returns the input of every layer for one example, and the last output."""
  _check_params(params)
  _validate.check_same(
    'd', 'inputs', inputs.shape[0], 'params', params[0].shape[1] - 1
  )
  seen, x = [], inputs
  for matrix in params:
    x = jnp.concatenate([x, jnp.ones(1, x.dtype)])
    seen.append(x)
    output = matrix @ x
    x = jax.nn.relu(output)
  return tuple(seen), output


@door
def train(
  params: Params,
  inputs: Float[Array, 'n d'],
  labels: Int[Array, ' n'],
  batches: Int[Array, 'T B'],
  *,
  learning_rate: float | Array,
  momentum: float | Array = 0.0,
  weight_decay: float | Array = 0.0,
) -> tuple[Params, tuple[History, ...]]:
  r"""Trains by SGD on cross-entropy; returns weights and `History` of layers.

  .. math:: m_{t+1} = \mu m_t + (g_t + \lambda W_t), \quad
     W_{t+1} = W_t - \eta\, m_{t+1}

  with the `momentum` :math:`\mu` in `[0, 1)` and the coupled `weight_decay`
  :math:`\lambda`.

  Args:
    inputs, labels: training examples `[n, d]` and their classes `[n]`;
      `ValueError` if one is out of range.
    batches: rows of the examples of each step, likewise. Shape `[T, B]`.
  """
  _validate.non_negative(learning_rate=learning_rate, weight_decay=weight_decay)
  _validate.below_one(momentum=momentum)
  params = tuple(params)
  _check_params(params)
  _validate.check_dtypes({'inputs': inputs, 'params': params[0]})
  if 0 in batches.shape:
    raise ValueError(
      f'batches has shape {list(batches.shape)}; expected at least one step of '
      'at least one example.'
    )
  remedy = 'Each class has an output of the last layer.'
  _validate.check_ids('labels', labels, 0, len(params[-1]), remedy)
  _validate.check_ids('batches', batches, 0, len(inputs), 'Count the inputs.')
  size = batches.shape[1]

  def example_loss(biases, params, x, label):
    pairs = zip(params, biases, strict=True)
    moved = tuple(matrix.at[:, -1].set(bias) for matrix, bias in pairs)
    seen, output = layer_inputs(moved, x)
    return -jax.nn.log_softmax(output)[label] / size, seen

  def step(carry, rows):
    params, speeds = carry
    # The slope of an output is that of its bias.
    biases = tuple(matrix[:, -1] for matrix in params)
    slope = jax.grad(example_loss, has_aux=True)
    signals, seen = jax.vmap(slope, in_axes=(None, None, 0, 0))(
      biases, params, inputs[rows], labels[rows]
    )
    gradients = jax.tree.map(lambda d, x: d.T @ x, signals, seen)
    speeds = jax.tree.map(
      lambda m, g, w: momentum * m + g + weight_decay * w,
      *(speeds, gradients, params),
    )
    params = jax.tree.map(lambda w, m: w - learning_rate * m, params, speeds)
    return (params, speeds), tuple(map(History, seen, signals))

  speeds = jax.tree.map(jnp.zeros_like, params)
  (params, _), histories = jax.lax.scan(step, (params, speeds), batches)
  return params, histories


@compiled
def remains(
  num_steps: int,
  *,
  learning_rate: float | Array,
  momentum: float | Array = 0.0,
  weight_decay: float | Array = 0.0,
) -> Remains:
  r"""Returns what training leaves of initial weights and gradients.

  Weights and speed obey a linear recurrence of two numbers. Without decay it
  gives :math:`w_t = -\eta (1 - \mu^{T-t})/(1 - \mu)`, without momentum
  :math:`w_t = -\eta (1 - \eta\lambda)^{T-1-t}` and
  :math:`c = (1 - \eta\lambda)^T`. The hyper-parameters are those of `train`.

  Example:
    >>> remains(3, learning_rate=0.5, momentum=0.5).steps.tolist()
    [-0.875, -0.75, -0.5]
  """
  _validate.at_least(1, num_steps=num_steps)
  _validate.non_negative(learning_rate=learning_rate, weight_decay=weight_decay)
  _validate.below_one(momentum=momentum)
  rate, momentum, weight_decay = (
    jnp.asarray(x, float) for x in (learning_rate, momentum, weight_decay)
  )

  def advance(state, _):
    weight, speed = state
    speed = momentum * speed + weight_decay * weight
    return (weight - rate * speed, speed), weight

  one, zero = jnp.ones_like(rate), jnp.zeros_like(rate)
  (initial, _), _ = jax.lax.scan(advance, (one, zero), length=num_steps)
  # A gradient enters as speed 1 and weight -eta, then both run on.
  _, ages = jax.lax.scan(advance, (-rate, one), length=num_steps)
  return Remains(initial, ages[::-1])


@door
def recall(
  initial: Float[Array, 'd_out d_in'],
  history: History,
  left: Remains,
  inputs: Float[Array, ' d_in'],
) -> Float[Array, ' d_out']:
  """Returns the trained layer's output `[d_out]` without its trained weights.

  One batch is scored at a time. The weights `initial` are those before
  training, `left` is what the optimizer leaves of the steps (`remains`).
  """
  weights = _weights(history, left, inputs.dtype)

  def attend(total, step):
    keys, signals, weight = step
    return total + weight * attention.linear_attention(
      _INNER_PRODUCT, inputs, keys, signals
    ), None

  start = left.initial.astype(inputs.dtype) * (initial @ inputs)
  return jax.lax.scan(attend, start, (*history, weights))[0]


@door
def attribute(
  history: History,
  left: Remains,
  inputs: Float[Array, ' d_in'],
  direction: Float[Array, ' d_out'],
) -> Float[Array, 'T B']:
  r"""Returns what each visit of a training example adds to the output.

  .. math:: w_t \langle x_{tb}, x\rangle \langle d_{tb}, r\rangle

  Their sum is the output of the layer along the `direction` :math:`r`, a unit
  vector for one, less the part of the initial weights. Arguments are those of
  `recall`. Shape `[T, B]`: step `t`, row `b` of its batch.
  """
  weights = _weights(history, left, inputs.dtype)

  def score(step):
    keys, signals, weight = step
    return weight * (keys @ inputs) * (signals @ direction)

  return jax.lax.map(score, (*history, weights))


def _weights(history: History, left: Remains, dtype) -> Float[Array, ' T']:
  num_steps = len(history.inputs)
  _validate.check_same('T', 'left', len(left.steps), 'history', num_steps)
  return left.steps.astype(dtype)


def _check_params(params: Params) -> None:
  if not params:
    raise ValueError('params has no layer; expected at least one matrix.')
  named = {f'params[{depth}]': matrix for depth, matrix in enumerate(params)}
  for name, matrix in named.items():
    _validate.check_array(name, matrix, 'd_out d_in')
  _validate.check_dtypes(named)
  for (name, matrix), (next_name, after) in itertools.pairwise(named.items()):
    _validate.check_same(
      'width', name, len(matrix), f'{next_name} less bias', after.shape[1] - 1
    )
