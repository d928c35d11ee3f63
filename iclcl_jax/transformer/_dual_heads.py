"""Heads as dual models: one training set for each key-value head.

The query heads that share it differ in their test inputs alone. Nothing here
calls softmax attention.
"""

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, dual, forms, losses, moments
from iclcl_jax._door import door
from iclcl_jax.precision import cast_like, widen
from iclcl_jax.transformer import _forward, _parts, _stacks
from iclcl_jax.transformer._types import Architecture
from iclcl_jax.types import (
  Array,
  FeatureMap,
  Float,
  Int,
  Kernel,
  KernelDualState,
  Mask,
  Reading,
  State,
)

# Queries whose states are held at a time.
_CHUNK_SIZE = 64


@door
def predict_heads(
  architecture: Architecture,
  heads: _forward.Heads,
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
  phi: FeatureMap | Kernel | None = None,
) -> Float[Array, 'H N d_k']:
  r"""Answers every query of every head by a dual model after one step.

  .. math:: f_h(q) = \sum_i c_i\, k(k_i, q) \Big/ \sum_i k(k_i, q)

  with coefficients :math:`c_i = v_i` from one gradient step on the contrastive
  loss of the tokens that the query sees. With `transformer.causal` and no
  positions of the caller's own this is one online pass over the tokens,
  otherwise a state for each query. The predictions are the heads' attention
  outputs; those of a query that sees no token are zero.

  Example:
    >>> architecture, block = transformer.example()
    >>> heads = transformer.heads(architecture, block, jnp.ones((3, 4)))
    >>> predict_heads(architecture, heads).shape
    (2, 3, 2)
  """
  is_causal = architecture.visible is _parts.causal and positions is None
  # One state does not forget what leaves a window.
  is_online = is_causal and heads.window is None
  answer_fn = answer_online if is_online else answer_per_query
  return _answer(answer_fn, architecture, heads, positions, mask, phi)


@door
def predict_heads_autodiff(
  architecture: Architecture,
  heads: _forward.Heads,
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
  phi: FeatureMap | Kernel | None = None,
) -> Float[Array, 'H N d_k']:
  """Answers as `predict_heads`, with weights from `jax.grad` of the loss.

  The definition. The token itself gives the zero-shot weights, all others that
  it sees are demonstrations: one gradient for each position and key-value head.

  Example:
    >>> architecture, block = transformer.example()
    >>> heads = transformer.heads(architecture, block, jnp.eye(3, 4))
    >>> pair = predict_heads, predict_heads_autodiff
    >>> bool(jnp.allclose(*(predict(architecture, heads) for predict in pair)))
    True
  """
  return _answer(answer_by_gradients, architecture, heads, positions, mask, phi)


def _answer(answer_fn, architecture, heads, positions, mask, phi) -> Array:
  """Groups queries by the key-value head that they ask, and answers them."""
  queries, keys, values, sinks, window = heads
  _stacks.check_groups('heads.queries', len(queries), 'heads.keys', len(keys))
  sizes = queries.shape[1], keys.shape[1]
  _validate.check_same('N', 'heads.queries', sizes[0], 'heads.keys', sizes[1])
  positions = _forward.default_positions(keys[0], positions)
  seen = _forward.visibility(architecture, positions, positions, mask, window)
  keys = moments.visible(keys, mask)
  values = widen(moments.visible(values, mask))  # Labels are summed.
  phi = architecture.kernel if phi is None else phi
  groups = queries.reshape(len(keys), -1, *queries.shape[1:])
  if sinks is not None:
    sinks = sinks.reshape(len(keys), -1)

  def answer(queries, keys, values, sinks):
    return answer_fn(phi, queries, keys, values, sinks, seen)

  rows = groups, keys, values, sinks
  if len(keys) == 1:  # On a CPU a batch of one takes twice the time of none.
    answers = answer(*jax.tree.map(lambda x: x[0], rows))[None]
  else:
    answers = jax.vmap(answer)(*rows)
  return cast_like(answers.reshape(queries.shape), queries)


# How one key-value head answers: queries `[r, N, d_k]` of the query heads that
# share it, keys `[N, d_k]`, values `[N, d_v]`, who sees whom `[N, N]`; answers
# `[r, N, d_v]`.


def answer_online(phi, queries, keys, values, sinks, seen) -> Array:
  """Learns token after token and answers the queries of each."""
  state = dual.empty(phi, keys, values, capacity=keys.shape[0])

  def step(carry, token):
    state, has_seen = carry
    key, value, is_valid, queries = token
    has_seen = has_seen | is_valid
    rows = key[None], value[None]
    state = dual.one_step(phi, state, *rows, mask=is_valid[None])
    return (state, has_seen), _read_all(phi, state, queries, sinks, has_seen)

  tokens = keys, values, jnp.diagonal(seen), jnp.swapaxes(queries, 0, 1)
  _, answers = jax.lax.scan(step, (state, jnp.zeros((), bool)), tokens)
  return jnp.swapaxes(answers, 0, 1)


def answer_per_query(phi, queries, keys, values, sinks, seen) -> Array:
  """Trains a state for each position, on the tokens that it sees."""

  def answer(row):
    queries, mask = row
    if _validate.is_feature_map(phi):
      state = dual.empty(phi, keys, values)
      state = dual.one_step(phi, state, keys, values, mask=mask)
    else:  # Rows that are not seen have mass 0: no copy of the coefficients.
      state = KernelDualState(keys, values, mask.astype(values.dtype))
    return _read_all(phi, state, queries, sinks, jnp.any(mask))

  return _over_positions(answer, queries, seen)


def answer_by_gradients(phi, queries, keys, values, sinks, seen) -> Array:
  """Trains as `answer_per_query`, by `jax.grad` of the loss."""

  def answer(row):
    queries, mask, index = row
    own = jnp.arange(keys.shape[0]) == index
    state = gradient_state(phi, keys, values, mask & own, mask & ~own)
    return _read_all(phi, state, queries, sinks, jnp.any(mask))

  positions = jnp.arange(keys.shape[0])
  return _over_positions(answer, queries, seen, positions)


def gradient_state(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  own: Mask,
  demonstrations: Mask,
) -> State:
  """Returns the state after one step along `jax.grad` of the loss.

  The same as `dual.zero_shot`, then `dual.one_step_autodiff`. For a kernel it
  is written out: the one zero-shot row is evaluated at the demonstrations, in
  time linear in their number.
  """
  if _validate.is_feature_map(phi):
    start = dual.zero_shot(phi, keys, values, mask=own)
    return dual.one_step_autodiff(phi, start, keys, values, mask=demonstrations)
  row = jnp.argmax(own)[None]
  start = dual.zero_shot(phi, keys[row], values[row], mask=own[row])

  def predict(key):
    reading = coefficients.read(phi, start, key)
    largest = jnp.finfo(reading.log_scale.dtype).max
    scale = jnp.minimum(jnp.exp(reading.log_scale), largest)
    return reading.numerator * scale

  def objective(predictions):
    rows = demonstrations[:, None]
    return losses.contrastive(
      jnp.where(rows, predictions, 0), jnp.where(rows, values, 0)
    )

  gradient = jax.grad(objective)(jax.vmap(predict)(keys))
  initial = jnp.where(own[:, None], values, 0)
  mass = (own | demonstrations).astype(values.dtype)
  return KernelDualState(keys, initial - gradient, mass)


def _over_positions(answer, queries, *rows):
  """Answers position after position, in chunks. Shape `[r, N, d_v]`."""
  rows = (jnp.swapaxes(queries, 0, 1), *rows)
  return jnp.swapaxes(moments.map_chunks(answer, rows, _CHUNK_SIZE), 0, 1)


def _read_all(phi, state, queries, sinks, has_seen) -> Array:
  """Predicts for the query heads that share a state. Shape `[r, d_v]`.

  As `dual.predict`; zeros from a state that has seen no token. A sink is a
  demonstration with the label 0: it adds to the normaliser alone.
  """

  def read(query, sink):
    reading = forms.form_of(phi).read(phi, state, query)
    one = jnp.ones_like(reading.denominator)
    mass = jnp.where(has_seen, reading.denominator, one)
    reading = reading._replace(denominator=mass)
    if sink is not None:
      nothing = jnp.zeros_like(reading.numerator)
      unlearnt = Reading(nothing, one, sink.astype(one.dtype))
      reading = forms.add_readings(reading, unlearnt)
    return jnp.where(has_seen, reading.numerator, 0) / reading.denominator

  return jax.vmap(read)(queries, sinks)
