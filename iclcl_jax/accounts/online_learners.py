r"""Sequence layers as online learners: one inner step for every token.

A layer with state :math:`W_t` reads a stream of keys and values and answers
:math:`o_t = W_t\,\phi(q_t)`, together `[N, d_v]`. `descend` is the
definition of all that learn by gradient steps: at each token the state decays,
then takes a step on an inner loss, found by `jax.grad`. The other functions are
the published recurrences and their parallel forms, which need no gradient;
their arguments are as in `descend`.

====================  ===========  =====================================  ===
layer                 inner loss   inner update                           by
====================  ===========  =====================================  ===
linear attention      contrastive  step 1                                 1
RetNet, Mamba-2       contrastive  decay g, step 1                        2
gated linear att.     contrastive  decay by feature, step 1               3
DeltaNet              squared      step beta                              4
gated DeltaNet        squared      decay g first, then step beta there    5
momentum              either       heavy ball                             6
mesa, least squares   squared      exact minimiser over the past, ridge   7
softmax               squared      exact minimiser for each query         8
====================  ===========  =====================================  ===

1 Katharopoulos et al., arXiv:2006.16236, eq. 9; 2 Sun et al., arXiv:2307.08621,
eq. 5, Dao & Gu, arXiv:2405.21060; 3 Yang et al., arXiv:2312.06635, eq. 3, and
section 2 for the form in chunks; 4 Schlag et al., arXiv:2102.11174, eq. 24; 5
Yang et al., arXiv:2412.06464, eq. 10, and section 3 with arXiv:2406.06484,
section 3, for the form in chunks; 6 Behrouz et al., arXiv:2501.00663, without
gates; 7 von Oswald et al., arXiv:2309.05858, section 3 and eq. 9; 8
Nadaraya-Watson, run as by Milakov & Gimelshein, arXiv:1805.02867. Layers as
inner learners: Sun et al., arXiv:2407.04620, section 2. Deployed layers add
normalisation, convolutions and output gates: the table is the memory alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, losses, moments
from iclcl_jax._door import door
from iclcl_jax._mesh import vary_as
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, Float, Loss, Mask


class Stream(NamedTuple):
  """A stream of tokens: values, and features `phi(x)` of queries and keys."""

  queries: Float[Array, 'N R']
  keys: Float[Array, 'N R']
  values: Float[Array, 'N d_v']


@door
@widened
def descend(
  tokens: Stream,
  *,
  loss: Loss = losses.contrastive,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  momentum: float | Array = 0.0,
) -> Float[Array, 'N d_v']:
  r"""Learns by one gradient step for each token: the definition.

  .. math:: \tilde W = W_{t-1} \odot g_t, \quad
     M_t = \mu M_{t-1} - \beta_t \nabla_W\, L(\tilde W\phi(k_t), v_t),
     \quad W_t = \tilde W + M_t

  Args:
    loss: inner loss `loss(predictions [1, d_v], values [1, d_v]) -> []`.
    rates: step sizes `beta`, one or one for each token.
    decays: factors `g` of the state, one, one for each token, or one for each
      token and feature.
    momentum: the factor `mu` of the heavy ball, in `[0, 1)`.

  Example:
    >>> x = jnp.eye(2)
    >>> descend(Stream(x, x, x)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  losses.check_loss(loss)
  _validate.below_one(momentum=momentum)
  start, rates, decays = _start(tokens, rates, decays)

  def step(carry, token):
    weights, speed = carry
    query, key, value, rate, decay = token
    weights = weights * decay[None]

    def inner(weights):
      return loss((weights @ key)[None], value[None])

    speed = momentum * speed - rate * jax.grad(inner)(weights)
    weights = weights + speed
    return (weights, speed), weights @ query

  carry = start, jnp.zeros_like(start)
  return jax.lax.scan(step, carry, (*tokens, rates, decays))[1]


def _start(
  tokens: Stream, rates: Any, decays: Any
) -> tuple[Array, Float[Array, ' N'], Array]:
  """Returns the zero state, step sizes `[N]`, decays `[N, 1]` or `[N, R]`."""
  size, width = tokens.keys.shape
  rates = _as_gate('rates', rates, tokens, [(), (size,)])
  decays = _as_gate('decays', decays, tokens, [(), (size,), (size, width)])
  if decays.ndim < 2:
    decays = jnp.broadcast_to(decays, (size,))[:, None]
  return _zero_state(tokens), jnp.broadcast_to(rates, (size,)), decays


def _as_gate(name: str, value: Any, tokens: Stream, shapes) -> Array:
  try:
    gate = jnp.asarray(value, tokens.keys.dtype)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{name} is {value!r}; expected a number or an array of numbers.'
    ) from error
  if gate.shape not in shapes:
    expected = ' or '.join(str(list(shape)) for shape in shapes)
    raise ValueError(
      f'{name} has shape {list(gate.shape)}; expected {expected}: one, or one '
      'for each token.'
    )
  return gate


def _zero_state(tokens: Stream) -> Array:
  shape = tokens.values.shape[1], tokens.keys.shape[1]
  return vary_as(jnp.zeros(shape, tokens.values.dtype), tokens)


@door
@widened
def linear_recurrence(
  tokens: Stream,
  *,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  chunk_size: int | None = None,
) -> Float[Array, 'N d_v']:
  r"""Runs linear attention with decay.

  .. math:: W_t = g_t W_{t-1} + v_t\,\phi(k_t)^\top

  In chunks, if decays are of whole tokens, by matrix products:

  .. math:: O = c \odot (Q W_0^\top) + (\Gamma \odot Q K^\top)\, V, \qquad
     \Gamma_{ij} = \prod_{l=j+1}^{i} g_l

  so many tokens together as `chunk_size`; None for one by one.
  """
  if chunk_size is None:
    return _recur(lambda weights, key, value, _: value, tokens, 1.0, decays)

  def labels(weights, keys, values, *gates):
    return values

  return _by_chunks(labels, tokens, 1.0, decays, chunk_size)


@door
@widened
def delta_recurrence(
  tokens: Stream,
  *,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  chunk_size: int | None = None,
) -> Float[Array, 'N d_v']:
  r"""Runs the (gated) delta rule.

  .. math:: W_t = g_t W_{t-1}\,(I - \beta_t\,\phi(k_t)\phi(k_t)^\top)
     + \beta_t\, v_t\,\phi(k_t)^\top

  It is stable where :math:`0 \le \beta_t |\phi(k_t)|^2 \le 2`. In chunks, as
  `linear_recurrence`, it is linear attention whose values are the rows
  :math:`u_t`, step times error signal:

  .. math:: (I + \mathrm{diag}(\beta)\,\mathrm{tril}(\Gamma\odot K K^\top, -1))
     \,U = \mathrm{diag}(\beta)\,(V - c \odot K W_0^\top)
  """

  def signal(weights, key, value, rate):
    return rate * (value - weights @ key)

  def signals(weights, keys, values, rates, factors, total):
    past = jnp.tril(factors * (keys @ keys.T), -1)
    system = jnp.eye(keys.shape[0], dtype=keys.dtype) + rates[:, None] * past
    errors = values - total[:, None] * (keys @ weights.T)
    return jax.scipy.linalg.solve_triangular(
      system, rates[:, None] * errors, lower=True, unit_diagonal=True
    )

  if chunk_size is None:
    return _recur(signal, tokens, rates, decays)
  return _by_chunks(signals, tokens, rates, decays, chunk_size)


def _recur(label_fn, tokens, rates, decays) -> Float[Array, 'N d_v']:
  """Runs linear attention with these labels, token after token."""
  start, rates, decays = _start(tokens, rates, decays)

  def step(weights, token):
    query, key, value, rate, decay = token
    weights = weights * decay[None]
    label = label_fn(weights, key, value, rate)
    weights = weights + label[:, None] * key[None]
    return weights, weights @ query

  return jax.lax.scan(step, start, (*tokens, rates, decays))[1]


def _by_chunks(labels_fn, tokens, rates, decays, chunk_size):
  """Runs linear attention with these labels; rates of 0 fill the last chunk."""
  _validate.at_least(1, chunk_size=chunk_size)
  start, rates, decays = _start(tokens, rates, decays)
  if decays.shape[1] > 1:
    raise ValueError(
      f'decays has shape {list(decays.shape)}; expected one number for each '
      'token: a decay of every feature has no chunked form here. Leave '
      'chunk_size out.'
    )
  size = tokens.keys.shape[0]
  padding = -size % chunk_size

  def split(array):
    widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
    array = jnp.pad(array, widths)
    return array.reshape(-1, chunk_size, *array.shape[1:])

  def chunk(weights, part):
    queries, keys, values, rates, decays = part
    factors, total = _decay_products(decays)
    labels = labels_fn(weights, keys, values, rates, factors, total)
    scores = factors * (queries @ keys.T)
    outputs = total[:, None] * (queries @ weights.T) + scores @ labels
    last = factors[-1][:, None]
    return total[-1] * weights + labels.T @ (last * keys), outputs

  parts = jax.tree.map(split, (*tokens, rates, decays[:, 0]))
  _, outputs = jax.lax.scan(jax.checkpoint(chunk), start, parts)
  return outputs.reshape(size + padding, -1)[:size]


def _decay_products(decays):
  """Returns products of the decays from `j + 1` to `i`, and from 1 to `i`."""
  # Not by logarithms: factors of any sign, and zeros, have their slopes too.
  row = jnp.arange(decays.shape[0])
  below = row[:, None] > row[None]
  factors = jnp.cumprod(jnp.where(below, decays[:, None], 1), axis=0)
  visible = row[:, None] >= row[None]
  return jnp.where(visible, factors, 0), jnp.cumprod(decays)


def momentum_attention_weights(
  num_tokens: int, momentum: float | Array
) -> Float[Array, 'N N']:
  r"""Returns the weights that the heavy ball gives to past tokens.

  .. math:: o_t = \sum_{i\le t} \frac{1 - \mu^{t-i+1}}{1 - \mu}\,
     (\phi(q_t)^\top\phi(k_i))\, v_i

  Recent tokens get LESS weight than old ones: momentum is no moving average of
  the values. Row `t`, column `i`; zeros above the diagonal.

  Example:
    >>> momentum_attention_weights(2, 0.5).tolist()
    [[1.0, 0.0], [1.5, 1.0]]
  """
  _validate.at_least(1, num_tokens=num_tokens)
  _validate.below_one(momentum=momentum)
  position = jnp.arange(num_tokens)
  age = position[:, None] - position[None] + 1
  factor = jnp.asarray(momentum, float)
  power = jnp.maximum(age, 0).astype(factor.dtype)
  return jnp.where(age > 0, (1 - factor**power) / (1 - factor), 0)


@door
@widened
def softmax_recurrence(
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Computes softmax attention by running SGD on :math:`\tfrac12|o - v_i|^2`.

  The step size of token `i` is its own normalised weight among the tokens so
  far. Every query runs its own: no state of finite size serves all. One that
  sees no token by the mask gets zeros.
  """
  lowest = jnp.finfo(keys.dtype).min
  # A masked NaN would return in the gradient.
  keys, values = moments.visible(keys, mask), moments.visible(values, mask)
  scores = keys @ query / query.shape[0] ** 0.5
  scores = scores if mask is None else jnp.where(mask, scores, lowest)

  def step(carry, token):
    output, largest, total = carry
    score, value = token
    top = jnp.maximum(largest, score)
    weight = jnp.exp(score - top)
    total = total * jnp.exp(largest - top) + weight
    slope = jax.grad(lambda output: jnp.sum((output - value) ** 2) / 2)(output)
    output = output - weight / total * slope
    return (output, top, total), None

  zero = jnp.zeros((), keys.dtype)
  start = jnp.zeros_like(values[0]), zero + lowest, zero
  start = vary_as(start, scores, values)
  return jax.lax.scan(step, start, (scores, values))[0][0]


@door
@widened
def least_squares(
  tokens: Stream, *, ridge: float | Array
) -> Float[Array, 'N d_v']:
  r"""Solves the ridge regression of every prefix: the definition of mesa.

  .. math:: W_t = \arg\min_W \tfrac12\sum_{i\le t} |W\phi(k_i) - v_i|^2
     + \tfrac\lambda2 |W|_F^2

  The relative error is about the machine epsilon times the largest eigenvalue
  of the Gram matrix over `ridge`, which is positive: in float32 a ridge below
  1e-7 of that eigenvalue may give NaN.
  """
  _validate.positive(ridge=ridge)
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)

  def step(sums, token):
    gram, cross = sums
    query, key, value = token
    gram = gram + key[:, None] * key[None]
    cross = cross + value[:, None] * key[None]
    solved = jax.scipy.linalg.solve(gram, query, assume_a='pos')
    return (gram, cross), cross @ solved

  ridge = jnp.asarray(ridge, identity.dtype)
  sums = ridge * identity, _zero_state(tokens)
  return jax.lax.scan(step, vary_as(sums, tokens), tokens)[1]


@door
@widened
def recursive_least_squares(
  tokens: Stream, *, ridge: float | Array
) -> Float[Array, 'N d_v']:
  r"""Solves `least_squares` by a rank-one update for each token.

  .. math:: W_t = W_{t-1} + (v_t - W_{t-1}\phi(k_t))\,
     \frac{(P_{t-1}\phi(k_t))^\top}{1 + \phi(k_t)^\top P_{t-1}\,\phi(k_t)}

  with :math:`P_0 = I/\lambda`: a delta rule whose step size is a matrix.
  """
  _validate.positive(ridge=ridge)
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)

  def step(carry, token):
    weights, inverse = carry
    query, key, value = token
    gain = inverse @ key
    gain = gain / (1 + key @ gain)
    weights = weights + (value - weights @ key)[:, None] * gain[None]
    inverse = inverse - gain[:, None] * (inverse @ key)[None]
    return (weights, inverse), weights @ query

  carry = _zero_state(tokens), identity / ridge
  return jax.lax.scan(step, vary_as(carry, tokens), tokens)[1]
