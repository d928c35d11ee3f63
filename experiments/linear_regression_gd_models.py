"""What `experiments.linear_regression_gd` trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax.accounts import linear_regression_gd as account

INIT_VARIANCE = 0.002
LARGEST_ACTIVATION = 10.0  # As published, for more than three layers.
D_POSITION = 10
WAVE_LENGTH = 1e4


class Model(NamedTuple):
  """A model of in-context learning.

  Attributes:
    init: `key -> params`.
    answer: `(params, tokens [M, D]) -> [1]`.
  """

  init: Callable[[Any], Any]
  answer: Callable[[Any, Any], Any]


class Stack(NamedTuple):
  """Layers of self-attention.

  Attributes:
    weights_fn: linear or softmax weights.
    num_heads: number of heads.
    num_layers: number of layers.
    num_distinct: 1 if all layers share their weights, else `num_layers`.
    init_scale: factor of the published initial weights.
  """

  weights_fn: Callable[..., Any]
  num_heads: int
  num_layers: int
  num_distinct: int
  init_scale: float = 1.0


def stack_model(stack: Stack, d_model: int) -> Model:
  """Self-attention alone."""

  def answer(layers, rows):
    return stack_answer(stack, layers, rows)

  return Model(lambda key: init_stack(key, stack, d_model), answer)


def init_stack(key, stack: Stack, d_model: int) -> account.SelfAttention:
  """Small truncated normal weights, by distinct layer."""
  shape = (stack.num_distinct, stack.num_heads, d_model, d_model)
  scale = (INIT_VARIANCE / stack.num_layers / d_model) ** 0.5
  scale = scale * stack.init_scale
  return account.SelfAttention(
    *(
      scale * jax.random.truncated_normal(k, -2, 2, shape, jnp.float32)
      for k in jax.random.split(key, 4)
    )
  )


def stack_answer(stack: Stack, layers, rows):
  """The prediction of all layers, shared ones repeated. Shape `[1]`."""
  times = stack.num_layers // stack.num_distinct
  layers = jax.tree.map(lambda w: jnp.concatenate([w] * times), layers)
  if stack.num_layers <= 3:
    return account.predict(layers, rows, weights_fn=stack.weights_fn)

  def step(rows, layer):
    rows = account.attend(layer, rows, weights_fn=stack.weights_fn)
    return jnp.clip(rows, -LARGEST_ACTIVATION, LARGEST_ACTIVATION), None

  before = jax.tree.map(lambda w: w[:-1], layers)
  last = jax.tree.map(lambda w: w[-1], layers)
  rows = jax.lax.scan(step, rows, before)[0]
  return -account.attend_query(last, rows, weights_fn=stack.weights_fn)[-1:]


def _descent_answer(factors, rows):
  return account.descend_plus_plus(
    rows[:-1, :-1], rows[:-1, -1:], rows[-1, :-1], *factors
  )


def _no_init(key):
  raise ValueError('factors of descent are given, not drawn.')


# GD++; GD where the contractions are 0. Params: both factors `[2, K]`.
DESCENT = Model(_no_init, _descent_answer)


def positions(length: int) -> np.ndarray:
  """Sines and cosines of ever longer waves. Shape `[length, D_POSITION]`."""
  pairs = np.arange(D_POSITION) // 2
  angles = np.arange(length)[:, None] / WAVE_LENGTH ** (2 * pairs / D_POSITION)
  even = np.arange(D_POSITION) % 2 == 0
  return np.where(even, np.sin(angles), np.cos(angles)).astype(np.float32)


def alternating_rows(rows, codes):
  """Rows `(x_i, y_i)` to rows of inputs and of labels in turn."""
  pair = rows[:-1, :-1], rows[:-1, -1:]
  return account.make_alternating_tokens(*pair, rows[-1, :-1], codes)


def alternating_model(
  num_demonstrations: int, d_x: int, first_fn, init_scale: float = 5.0
) -> Model:
  """Two layers on separate tokens: `first_fn` weights, then linear ones."""
  codes = positions(2 * num_demonstrations + 1)
  d_model = D_POSITION + d_x + 1
  first = Stack(first_fn, 1, 2, 1, init_scale)
  second = Stack(account.linear_weights, 1, 2, 1, init_scale)

  def init(key):
    keys = jax.random.split(key)
    return (
      init_stack(keys[0], first, d_model),
      init_stack(keys[1], second, d_model),
    )

  def answer(params, rows):
    copy, descend = (jax.tree.map(lambda w: w[0], layer) for layer in params)
    rows = account.attend(
      copy, alternating_rows(rows, jnp.asarray(codes)), weights_fn=first_fn
    )
    return -account.attend_query(descend, rows)[-1:]

  return Model(init, answer)


def _init_network(key, d_in: int, width: int) -> dict[str, Any]:
  """An embedding, then one residual block that widens by 4."""
  shapes = {
    'embed': (d_in, width),
    'wide': (width, 4 * width),
    'narrow': (4 * width, width),
  }
  params = {
    name: jax.random.normal(k, shape, jnp.float32) / shape[0] ** 0.5
    for (name, shape), k in zip(
      shapes.items(), jax.random.split(key, 3), strict=True
    )
  }
  biases = {
    'embed_bias': jnp.zeros(width, jnp.float32),
    'bias': jnp.zeros(4 * width, jnp.float32),
  }
  return params | biases


def _network(params, rows):
  """The network, row by row. Shape `[M, width]`."""
  rows = rows @ params['embed'] + params['embed_bias'][None]
  wide = jax.nn.gelu(rows @ params['wide'] + params['bias'][None])
  return rows + wide @ params['narrow']


def attention_on_network(width: int) -> Model:
  """A network on tokens, then one layer of linear self-attention."""
  stack = Stack(account.linear_weights, 1, 1, 1)

  def init(key):
    keys = jax.random.split(key)
    layer = init_stack(keys[1], stack._replace(init_scale=5.0), width)
    return _init_network(keys[0], 2, width), layer

  def answer(params, rows):
    network, layer = params
    return stack_answer(stack, layer, _network(network, rows))

  return Model(init, answer)


def descent_on_network(width: int) -> Model:
  """A network on inputs, then one step of GD on its last layer.

  Network, start of the last layer, and step size are trained.
  """

  def init(key):
    keys = jax.random.split(key)
    network = _init_network(keys[0], 1, width)
    head = 0.01 * jax.random.normal(keys[1], (1, width), jnp.float32)
    return network, head, jnp.zeros((), jnp.float32)

  def answer(params, rows):
    network, head, log_rate = params
    inputs = _network(network, rows[:, :-1])
    tokens = account.make_tokens(
      inputs[:-1], rows[:-1, -1:], inputs[-1], initial=head
    )
    layer = account.construct(jnp.exp(log_rate), len(rows) - 1, initial=head)
    # The query's row starts at -W_0 m(x_q): the prediction includes W_0.
    return -account.attend_query(layer, tokens)[-1:]

  return Model(init, answer)
