r"""Sequence layers as online learners: one inner step for every token.

A layer with state :math:`W_t` reads a stream of keys and values and answers
:math:`o_t = W_t\,\phi(q_t)`. `descend` is the definition of all that learn by
gradient steps: at each token the state decays, then takes a step on an inner
loss, found by `jax.grad`. The other functions are the published recurrences
and their parallel forms, which need no gradient.

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

1 Katharopoulos et al., arXiv:2006.16236; 2 Sun et al., arXiv:2307.08621, Dao &
Gu, arXiv:2405.21060; 3 Yang et al., arXiv:2312.06635; 4 Schlag et al.,
arXiv:2102.11174; 5 Yang et al., arXiv:2412.06464; 6 Behrouz et al.,
arXiv:2501.00663, without gates; 7 von Oswald et al., arXiv:2309.05858; 8
Nadaraya-Watson. Deployed layers add normalisation, convolutions and output
gates: the table is the memory alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, losses
from iclcl_jax.types import Array, FeatureMap, Float


class Stream(NamedTuple):
  """A stream of tokens after the feature map.

  Attributes:
    queries: features of the queries. Shape `[N, R]`.
    keys: features of the keys. Shape `[N, R]`.
    values: values. Shape `[N, d_v]`.
  """

  queries: Float[Array, 'N R']
  keys: Float[Array, 'N R']
  values: Float[Array, 'N d_v']


def stream(
  phi: FeatureMap,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
) -> Stream:
  """Applies a feature map to queries and keys.

  Args:
    phi: feature map; `features.IdentityFeatures()` for none.
    queries: queries. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.

  Returns:
    The `Stream`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or `phi` is no feature map.
  """
  _validate.check_feature_map(phi)
  _validate.check_tokens(keys, values, queries=queries)
  _validate.check_same('N', 'queries', queries.shape[0], 'keys', keys.shape[0])
  return Stream(jax.vmap(phi)(queries), jax.vmap(phi)(keys), values)


def descend(
  tokens: Stream,
  *,
  loss: losses.Loss = losses.contrastive,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  momentum: float | Array = 0.0,
  initial: Float[Array, 'd_v R'] | None = None,
) -> Float[Array, 'N d_v']:
  r"""Learns by one gradient step for each token: the definition.

  .. math:: \tilde W = W_{t-1} \odot g_t, \quad
     M_t = \mu M_{t-1} - \beta_t \nabla_W\, L(\tilde W\phi(k_t), v_t),
     \quad W_t = \tilde W + M_t

  Args:
    tokens: the stream.
    loss: inner loss `loss(predictions [1, d_v], values [1, d_v]) -> []`.
    rates: step sizes `beta`, one or one for each token.
    decays: factors `g` of the state, one, one for each token, or one for each
      token and feature.
    momentum: the factor `mu` of the heavy ball, in `[0, 1)`.
    initial: the state before the first token. Shape `[d_v, R]`; None for 0.

  Returns:
    The answers. Shape `[N, d_v]`.

  Raises:
    ValueError: if shapes disagree, `loss` is no function, or `momentum` is
      outside `[0, 1)`.

  Example:
    >>> x = jnp.eye(2)
    >>> descend(Stream(x, x, x)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

  References:
    Sun et al., arXiv:2407.04620, section 2 (layers as inner learners).
  """
  losses.check_loss(loss)
  _validate.check_momentum(momentum)
  start = _initial(tokens, initial)
  rates, decays = _gates(tokens, rates, decays)

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


def linear_recurrence(
  tokens: Stream,
  *,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
) -> Float[Array, 'N d_v']:
  r"""Linear attention with decay.

  .. math:: W_t = g_t W_{t-1} + v_t\,\phi(k_t)^\top

  Args:
    tokens: the stream.
    decays: as in `descend`.
    initial: as in `descend`.

  Returns:
    The answers. Shape `[N, d_v]`.

  Raises:
    ValueError: if shapes disagree.

  References:
    Katharopoulos et al., arXiv:2006.16236, eq. 9; Sun et al.,
    arXiv:2307.08621, eq. 5; Yang et al., arXiv:2312.06635, eq. 3.
  """
  start = _initial(tokens, initial)
  _, decays = _gates(tokens, 1.0, decays)

  def step(weights, token):
    query, key, value, decay = token
    weights = weights * decay[None] + value[:, None] * key[None]
    return weights, weights @ query

  return jax.lax.scan(step, start, (*tokens, decays))[1]


def delta_recurrence(
  tokens: Stream,
  *,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] | Float[Array, 'N R'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
) -> Float[Array, 'N d_v']:
  r"""The (gated) delta rule.

  .. math:: W_t = g_t W_{t-1}\,(I - \beta_t\,\phi(k_t)\phi(k_t)^\top)
     + \beta_t\, v_t\,\phi(k_t)^\top

  Args:
    tokens: the stream.
    rates: as in `descend`; stable where `0 <= beta |phi(k)|^2 <= 2`.
    decays: as in `descend`.
    initial: as in `descend`.

  Returns:
    The answers. Shape `[N, d_v]`.

  Raises:
    ValueError: if shapes disagree.

  References:
    Schlag et al., arXiv:2102.11174, eq. 24; Yang et al., arXiv:2412.06464,
    eq. 10.
  """
  start = _initial(tokens, initial)
  rates, decays = _gates(tokens, rates, decays)

  def step(weights, token):
    query, key, value, rate, decay = token
    weights = weights * decay[None]
    error = value - weights @ key
    weights = weights + rate * error[:, None] * key[None]
    return weights, weights @ query

  return jax.lax.scan(step, start, (*tokens, rates, decays))[1]


def linear_parallel(
  tokens: Stream,
  *,
  decays: float | Float[Array, ' N'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
  chunk_size: int = 64,
) -> Float[Array, 'N d_v']:
  r"""`linear_recurrence` with matrix products inside chunks.

  .. math:: O = c \odot (Q W_0^\top) + (\Gamma \odot Q K^\top)\, V, \qquad
     \Gamma_{ij} = \prod_{l=j+1}^{i} g_l

  Args:
    tokens: the stream.
    decays: factors of the state, one or one for each token, not negative.
    initial: as in `descend`.
    chunk_size: tokens that are answered together.

  Returns:
    The answers. Shape `[N, d_v]`.

  Raises:
    ValueError: if shapes disagree, or `chunk_size < 1`.

  References:
    Yang et al., arXiv:2312.06635, section 2 (chunked form).
  """

  def chunk(weights, part):
    queries, keys, values, _, decays = part
    factors, total = _decay_products(decays)
    scores = factors * (queries @ keys.T)
    read = total[:, None] * (queries @ weights.T)
    outputs = read + scores @ values
    last = factors[-1][:, None]
    return total[-1] * weights + values.T @ (last * keys), outputs

  return _by_chunks(chunk, tokens, 1.0, decays, initial, chunk_size)


def delta_parallel(
  tokens: Stream,
  *,
  rates: float | Float[Array, ' N'] = 1.0,
  decays: float | Float[Array, ' N'] = 1.0,
  initial: Float[Array, 'd_v R'] | None = None,
  chunk_size: int = 64,
) -> Float[Array, 'N d_v']:
  r"""`delta_recurrence` with a triangular solve inside chunks.

  The rows :math:`u_t` are step times error signal, so the delta rule is linear
  attention with these values:

  .. math:: (I + \mathrm{diag}(\beta)\,\mathrm{tril}(\Gamma\odot K K^\top, -1))
     \,U = \mathrm{diag}(\beta)\,(V - c \odot K W_0^\top)

  Args:
    tokens: the stream.
    rates: as in `descend`.
    decays: factors of the state, one or one for each token, not negative.
    initial: as in `descend`.
    chunk_size: tokens that are answered together.

  Returns:
    The answers. Shape `[N, d_v]`.

  Raises:
    ValueError: if shapes disagree, or `chunk_size < 1`.

  References:
    Yang et al., arXiv:2406.06484, section 3; arXiv:2412.06464, section 3.
  """

  def chunk(weights, part):
    queries, keys, values, rates, decays = part
    factors, total = _decay_products(decays)
    past = jnp.tril(factors * (keys @ keys.T), -1)
    system = jnp.eye(keys.shape[0], dtype=keys.dtype) + rates[:, None] * past
    errors = values - total[:, None] * (keys @ weights.T)
    signals = jax.scipy.linalg.solve_triangular(
      system, rates[:, None] * errors, lower=True, unit_diagonal=True
    )
    scores = factors * (queries @ keys.T)
    outputs = total[:, None] * (queries @ weights.T) + scores @ signals
    last = factors[-1][:, None]
    return total[-1] * weights + signals.T @ (last * keys), outputs

  return _by_chunks(chunk, tokens, rates, decays, initial, chunk_size)


def momentum_attention_weights(
  num_tokens: int, momentum: float | Array
) -> Float[Array, 'N N']:
  r"""Factors that the heavy ball puts on past tokens of linear attention.

  .. math:: o_t = \sum_{i\le t} \frac{1 - \mu^{t-i+1}}{1 - \mu}\,
     (\phi(q_t)^\top\phi(k_i))\, v_i

  Recent tokens get LESS weight than old ones: momentum is no moving average of
  the values.

  Args:
    num_tokens: number of tokens `N`.
    momentum: the factor `mu`, in `[0, 1)`.

  Returns:
    Row `t`, column `i`; zeros above the diagonal. Shape `[N, N]`.

  Raises:
    ValueError: if `num_tokens < 1`, or `momentum` is outside `[0, 1)`.

  Example:
    >>> momentum_attention_weights(2, 0.5).tolist()
    [[1.0, 0.0], [1.5, 1.0]]
  """
  _validate.check_count('num_tokens', num_tokens)
  _validate.check_momentum(momentum)
  position = jnp.arange(num_tokens)
  age = position[:, None] - position[None] + 1
  factor = jnp.asarray(momentum, float)
  power = jnp.maximum(age, 0).astype(factor.dtype)
  return jnp.where(age > 0, (1 - factor**power) / (1 - factor), 0)


def least_squares(
  tokens: Stream, *, ridge: float | Array
) -> Float[Array, 'N d_v']:
  r"""Solves the ridge regression of every prefix: the definition of mesa.

  .. math:: W_t = \arg\min_W \tfrac12\sum_{i\le t} |W\phi(k_i) - v_i|^2
     + \tfrac\lambda2 |W|_F^2

  Args:
    tokens: the stream.
    ridge: the strength `lambda`, positive: a prefix shorter than `R` has no
      unique solution without it.

  Returns:
    The answers. Shape `[N, d_v]`.

  Raises:
    ValueError: if shapes disagree, or `ridge` is not positive.

  References:
    von Oswald et al., arXiv:2309.05858, section 3.
  """
  _check_stream(tokens)
  _check_ridge(ridge)
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)

  def step(sums, token):
    gram, cross = sums
    query, key, value = token
    gram = gram + key[:, None] * key[None]
    cross = cross + value[:, None] * key[None]
    solved = jax.scipy.linalg.solve(gram, query, assume_a='pos')
    return (gram, cross), cross @ solved

  sums = ridge * identity, _initial(tokens, None)
  return jax.lax.scan(step, sums, tokens)[1]


def recursive_least_squares(
  tokens: Stream, *, ridge: float | Array
) -> Float[Array, 'N d_v']:
  r"""`least_squares` by a rank-one update for each token.

  .. math:: W_t = W_{t-1} + (v_t - W_{t-1}\phi(k_t))\,
     \frac{(P_{t-1}\phi(k_t))^\top}{1 + \phi(k_t)^\top P_{t-1}\,\phi(k_t)}

  with :math:`P_0 = I/\lambda`: a delta rule whose step size is a matrix.

  Args:
    tokens: the stream.
    ridge: the strength `lambda`, positive.

  Returns:
    The answers. Shape `[N, d_v]`.

  Raises:
    ValueError: if shapes disagree, or `ridge` is not positive.

  References:
    von Oswald et al., arXiv:2309.05858, eq. 9.
  """
  _check_stream(tokens)
  _check_ridge(ridge)
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)

  def step(carry, token):
    weights, inverse = carry
    query, key, value = token
    gain = inverse @ key
    gain = gain / (1 + key @ gain)
    weights = weights + (value - weights @ key)[:, None] * gain[None]
    inverse = inverse - gain[:, None] * (inverse @ key)[None]
    return (weights, inverse), weights @ query

  carry = _initial(tokens, None), identity / ridge
  return jax.lax.scan(step, carry, tokens)[1]


def softmax_recurrence(
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
) -> Float[Array, ' d_v']:
  r"""Softmax attention as running SGD on :math:`\tfrac12|o - v_i|^2`.

  The step size of token `i` is its own normalised weight among the tokens so
  far. Every query runs its own: no state of finite size serves all.

  Args:
    query: the query. Shape `[d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.

  Returns:
    The answer. Shape `[d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  References:
    Milakov & Gimelshein, arXiv:1805.02867 (running softmax).
  """
  _validate.check_tokens(keys, values, query=query)
  scores = keys @ query / query.shape[0] ** 0.5

  def step(carry, token):
    output, largest, total = carry
    score, value = token
    top = jnp.maximum(largest, score)
    weight = jnp.exp(score - top)
    total = total * jnp.exp(largest - top) + weight
    output = output - weight / total * jax.grad(_half_square)(output, value)
    return (output, top, total), None

  lowest = jnp.asarray(jnp.finfo(scores.dtype).min, scores.dtype)
  start = jnp.zeros_like(values[0]), lowest, jnp.zeros_like(lowest)
  return jax.lax.scan(step, start, (scores, values))[0][0]


def _half_square(output, value) -> Float[Array, '']:
  return jnp.sum((output - value) ** 2) / 2


def _by_chunks(chunk, tokens, rates, decays, initial, chunk_size):
  """Scans a chunked form; the last chunk is filled with tokens of rate 0."""
  _validate.check_count('chunk_size', chunk_size)
  start = _initial(tokens, initial)
  rates, decays = _gates(tokens, rates, decays)
  if decays.shape[1] > 1:
    raise ValueError(
      f'decays has shape {list(decays.shape)}; expected one number for each '
      'token: a decay of every feature has no chunked form here. Use '
      'linear_recurrence or delta_recurrence.'
    )
  size = tokens.keys.shape[0]
  padding = -size % chunk_size

  def split(array):
    widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
    array = jnp.pad(array, widths)
    return array.reshape(-1, chunk_size, *array.shape[1:])

  parts = jax.tree.map(split, (*tokens, rates, decays[:, 0]))
  _, outputs = jax.lax.scan(jax.checkpoint(chunk), start, parts)
  return outputs.reshape(size + padding, -1)[:size]


def _decay_products(decays):
  """Products of the decays after `j` up to `i`, and up to `i` from the start.

  Sums of logarithms, but differences of them only below the diagonal, so that
  strong decays underflow to 0 and nothing overflows.
  """
  tiny = jnp.finfo(decays.dtype).tiny
  logs = jnp.cumsum(jnp.log(jnp.maximum(decays, tiny)))
  difference = logs[:, None] - logs[None]
  visible = jnp.tril(jnp.ones_like(difference, dtype=bool))
  return jnp.where(
    visible, jnp.exp(jnp.where(visible, difference, 0)), 0
  ), jnp.exp(logs)


def _gates(tokens: Stream, rates, decays):
  """Step sizes `[N]`, and decays `[N, 1]` or `[N, R]`."""
  size, width = tokens.keys.shape
  dtype = tokens.keys.dtype
  rates, decays = jnp.asarray(rates, dtype), jnp.asarray(decays, dtype)
  for name, array, shapes in (
    ('rates', rates, [(), (size,)]),
    ('decays', decays, [(), (size,), (size, width)]),
  ):
    if array.shape not in shapes:
      expected = ' or '.join(str(list(shape)) for shape in shapes)
      raise ValueError(
        f'{name} has shape {list(array.shape)}; expected {expected}: one, or '
        'one for each token.'
      )
  if decays.ndim < 2:
    decays = jnp.broadcast_to(decays, (size,))[:, None]
  return jnp.broadcast_to(rates, (size,)), decays


def _initial(tokens: Stream, initial) -> Float[Array, 'd_v R']:
  _check_stream(tokens)
  shape = tokens.values.shape[1], tokens.keys.shape[1]
  if initial is None:
    return jnp.zeros(shape, tokens.values.dtype)
  _validate.check_array('initial', initial, 'd_v R')
  if initial.shape != shape:
    raise ValueError(
      f'initial has shape {list(initial.shape)}; expected {list(shape)}, '
      '[d_v, R] of the stream.'
    )
  _validate.check_dtypes(initial=initial, values=tokens.values)
  return initial


def _check_stream(tokens) -> None:
  if not isinstance(tokens, Stream):
    raise ValueError(
      f'tokens is a {type(tokens).__name__}; expected a Stream. Make it with '
      'online_learners.stream(phi, queries, keys, values).'
    )
  _validate.check_tokens(tokens.keys, tokens.values, queries=tokens.queries)
  _validate.check_same(
    'N', 'queries', tokens.queries.shape[0], 'keys', tokens.keys.shape[0]
  )


def _check_ridge(ridge) -> None:
  _validate.check_scalar('ridge', ridge, minimum=0)
  if _validate.is_concrete(ridge) and float(ridge) == 0:
    raise ValueError(
      'ridge is 0; expected a positive number: a prefix shorter than the '
      'number of features has no unique least-squares solution.'
    )
