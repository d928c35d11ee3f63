"""Layers as online learners: definition, recurrence and parallel form agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import attention, features, losses
from iclcl_jax.accounts import online_learners as learners
from tests import tolerances

N, D_K, D_V = 17, 5, 4
PHI = features.IdentityFeatures()


def draw(dtype=jnp.float64, seed=0):
  """A stream and gates."""
  rng = np.random.default_rng(seed)
  queries, keys = rng.normal(size=(2, N, D_K)) / D_K**0.5
  values = rng.normal(size=(N, D_V))
  gates = {
    'rates': rng.uniform(0.1, 1, size=N),
    'decays': rng.uniform(0.5, 1, size=N),
    'vector': rng.uniform(0.5, 1, size=(N, D_K)),
  }
  arrays = (jnp.asarray(x, dtype) for x in (queries, keys, values))
  queries, keys, values = arrays
  features = (jax.vmap(PHI)(x) for x in (queries, keys))
  tokens = learners.Stream(*features, values)
  return tokens, {k: jnp.asarray(x, dtype) for k, x in gates.items()}


LINEAR_FORMS, DELTA_FORMS = (
  [form, functools.partial(form, chunk_size=64)]
  for form in (learners.linear_recurrence, learners.delta_recurrence)
)
# Each layer: its loss, the gates it reads, and its other forms.
LAYERS = {
  'linear attention': (
    losses.contrastive,
    (),
    LINEAR_FORMS,
  ),
  'decay': (
    losses.contrastive,
    ('decays',),
    LINEAR_FORMS,
  ),
  'vector gate': (
    losses.contrastive,
    ('vector',),
    [learners.linear_recurrence],
  ),
  'delta rule': (
    losses.squared,
    ('rates',),
    DELTA_FORMS,
  ),
  'gated delta rule': (
    losses.squared,
    ('rates', 'decays'),
    DELTA_FORMS,
  ),
}


def options_of(gates, names):
  options = {n: gates[n] for n in names if n != 'vector'}
  if 'vector' in names:
    options['decays'] = gates['vector']
  return options


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@pytest.mark.parametrize('layer', LAYERS)
def test_forms_equal_the_inner_learner_with_gradients(layer, dtype):
  loss, names, forms = LAYERS[layer]
  tokens, gates = draw(dtype)
  options = options_of(gates, names)
  definition = lambda tokens: learners.descend(tokens, loss=loss, **options)  # noqa: E731
  expected, pull = jax.vjp(jax.jit(definition), tokens)
  assert expected.dtype == dtype
  atol = 10 * tolerances.IDENTITY[jnp.dtype(dtype).name]
  direction = jnp.ones_like(expected)
  for form in forms:
    outputs, other_pull = jax.vjp(
      jax.jit(lambda tokens, form=form: form(tokens, **options)), tokens
    )
    np.testing.assert_allclose(outputs, expected, atol=atol)
    for a, b in zip(other_pull(direction)[0], pull(direction)[0], strict=True):
      np.testing.assert_allclose(a, b, atol=10 * atol)


@pytest.mark.parametrize('chunk_size', [1, 4, 17, 64])
def test_chunks_do_not_matter(chunk_size):
  tokens, gates = draw()
  options = options_of(gates, ('rates', 'decays'))
  np.testing.assert_allclose(
    learners.delta_recurrence(tokens, chunk_size=chunk_size, **options),
    learners.delta_recurrence(tokens, **options),
    atol=1e-13,
  )
  options.pop('rates')
  np.testing.assert_allclose(
    learners.linear_recurrence(tokens, chunk_size=chunk_size, **options),
    learners.linear_recurrence(tokens, **options),
    atol=1e-13,
  )


def test_recurrences_equal_numpy_loops():
  tokens, gates = draw()
  queries, keys, values = map(np.asarray, tokens)
  rates, decays = np.asarray(gates['rates']), np.asarray(gates['decays'])
  state = {name: np.zeros((D_V, D_K)) for name in ('linear', 'delta')}
  for t in range(N):
    outer = np.outer(values[t], keys[t])
    state['linear'] = decays[t] * state['linear'] + outer
    shrink = np.eye(D_K) - rates[t] * np.outer(keys[t], keys[t])
    state['delta'] = decays[t] * state['delta'] @ shrink + rates[t] * outer
    for name, form, options in (
      ('linear', learners.linear_recurrence, ('decays',)),
      ('delta', learners.delta_recurrence, ('rates', 'decays')),
    ):
      outputs = form(tokens, **options_of(gates, options))
      np.testing.assert_allclose(
        outputs[t], state[name] @ queries[t], atol=1e-13
      )


def test_linear_attention_is_that_of_the_library():
  tokens, _ = draw()
  outputs = learners.linear_recurrence(tokens)
  for t in (0, N - 1):
    np.testing.assert_allclose(
      outputs[t],
      attention.linear_attention(
        PHI, tokens.queries[t], tokens.keys[: t + 1], tokens.values[: t + 1]
      ),
      atol=1e-13,
    )


@pytest.mark.parametrize('momentum', [0.0, 0.7])
def test_momentum_weights_are_those_of_the_heavy_ball(momentum):
  tokens, _ = draw()
  weights = learners.momentum_attention_weights(N, momentum)
  scores = tokens.queries @ tokens.keys.T
  np.testing.assert_allclose(
    learners.descend(tokens, momentum=momentum),
    (weights * scores) @ tokens.values,
    atol=1e-13,
  )


def test_momentum_on_the_delta_rule_equals_its_loop():
  tokens, _ = draw()
  queries, keys, values = map(np.asarray, tokens)
  outputs = learners.descend(
    tokens, loss=losses.squared, rates=0.3, momentum=0.6
  )
  weights, speed = np.zeros((2, D_V, D_K))
  for t in range(N):
    error = values[t] - weights @ keys[t]
    speed = 0.6 * speed + 0.3 * np.outer(error, keys[t])
    weights = weights + speed
    np.testing.assert_allclose(outputs[t], weights @ queries[t], atol=1e-13)


def test_decay_is_a_ridge_for_the_contrastive_loss_alone():
  """Decay, then step at the decayed state: no step on loss plus ridge."""
  tokens, _ = draw()
  decay, rate = 0.9, 0.5

  def with_ridge(loss):
    weights = np.zeros((D_V, D_K))
    for key, value in zip(*map(np.asarray, tokens[1:]), strict=True):
      inner = jax.grad(
        lambda w, k=key, v=value: loss((w @ k)[None], jnp.asarray(v)[None])
      )
      slope = rate * inner(jnp.asarray(weights)) + (1 - decay) * weights
      weights = weights - slope
    return weights @ np.asarray(tokens.queries[-1])

  def with_decay(loss):
    options = {'rates': rate, 'decays': decay}
    return learners.descend(tokens, loss=loss, **options)[-1]

  np.testing.assert_allclose(
    with_decay(losses.contrastive), with_ridge(losses.contrastive), atol=1e-13
  )
  gap = np.abs(with_decay(losses.squared) - with_ridge(losses.squared))
  assert np.max(gap) > 1e-3


@pytest.mark.parametrize('ridge', [1e-2, 1.0])
def test_recursive_least_squares_solves_every_prefix(ridge):
  tokens, _ = draw()
  queries, keys, values = map(np.asarray, tokens)
  solved = learners.least_squares(tokens, ridge=ridge)
  recursive = learners.recursive_least_squares(tokens, ridge=ridge)
  np.testing.assert_allclose(recursive, solved, atol=1e-11)
  for t in (0, 3, N - 1):
    k, v = keys[: t + 1], values[: t + 1]
    dual = k.T @ np.linalg.solve(k @ k.T + ridge * np.eye(t + 1), v)
    np.testing.assert_allclose(solved[t], queries[t] @ dual, atol=1e-11)


def test_delta_rule_with_unit_rate_and_keys_interpolates():
  tokens, _ = draw()
  norm = jnp.linalg.norm(tokens.keys, axis=1, keepdims=True)
  tokens = tokens._replace(keys=tokens.keys / norm, queries=tokens.keys / norm)
  np.testing.assert_allclose(
    learners.delta_recurrence(tokens), tokens.values, atol=1e-13
  )


@pytest.mark.parametrize('scale', [1.0, 100.0])
def test_running_sgd_is_softmax_attention(scale):
  tokens, _ = draw()
  query, keys = scale * tokens.queries[0], scale * tokens.keys
  np.testing.assert_allclose(
    learners.softmax_recurrence(query, keys, tokens.values),
    attention.softmax_attention(query, keys, tokens.values),
    atol=1e-13,
  )


def test_running_sgd_over_prefixes_is_causal_softmax_attention():
  tokens, _ = draw()
  queries, keys, values = tokens
  broken = [x.at[3].set(jnp.nan) for x in (keys, values)]
  seen = jnp.tril(jnp.ones((N, N), bool)).at[:, 3].set(False).at[0].set(False)

  def answers(form, keys, values):
    one = lambda q, mask: form(q, keys, values, mask=mask)  # noqa: E731
    return jax.jit(jax.vmap(one))(queries, seen)

  found = answers(learners.softmax_recurrence, *broken)
  expected = answers(attention.softmax_attention, keys, values)
  np.testing.assert_allclose(found, expected, atol=1e-13)
  assert not jnp.any(found[0])


def test_strong_decays_underflow_without_nan():
  tokens, _ = draw(jnp.float32)
  for decays in (0.0, 1e-30):
    expected, outputs = (f(tokens, decays=decays) for f in LINEAR_FORMS)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


def test_everything_batches():
  tokens, gates = draw()
  batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tokens)
  for form in (LINEAR_FORMS[1], DELTA_FORMS[1]):
    outputs = jax.vmap(lambda t, form=form: form(t, decays=gates['decays']))(
      batch
    )
    np.testing.assert_allclose(
      outputs[0], form(tokens, decays=gates['decays']), atol=1e-13
    )


@pytest.mark.parametrize('factor', [0.0, 1e-8, -0.5])
@pytest.mark.parametrize('pair', [LINEAR_FORMS, DELTA_FORMS])
def test_chunks_have_values_and_slopes_of_the_recurrence(pair, factor):
  tokens, gates = draw(jnp.float32)
  decays = gates['decays'].at[jnp.asarray([1, 7])].set(factor)

  def of(form):
    def total(decays):
      outputs = form(tokens, decays=decays)
      return jnp.sum(outputs), outputs

    return jax.jit(jax.grad(total, has_aux=True))(decays)

  (slope, outputs), (slope_chunked, chunked) = map(of, pair)
  assert jnp.abs(slope[1]) > 1e-2
  np.testing.assert_allclose(chunked, outputs, atol=1e-5)
  np.testing.assert_allclose(slope_chunked, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_least_squares_of_half_precision(dtype):
  tokens, _ = draw(dtype)
  exact, _ = draw()
  found = jax.jit(functools.partial(learners.least_squares, ridge=0.1))(tokens)
  assert found.dtype == dtype
  reference = learners.least_squares(exact, ridge=0.1)
  np.testing.assert_allclose(found.astype(jnp.float64), reference, atol=0.1)


TOKENS, GATES = draw()
delta = functools.partial(learners.delta_recurrence, TOKENS)
descend = functools.partial(learners.descend, TOKENS)


@pytest.mark.parametrize(
  ('message', 'call'),
  [
    ('tokens is a tuple; expected a Stream',
     lambda: learners.descend(tuple(TOKENS))),
    ('momentum is 1.0; expected', lambda: descend(momentum=1.0)),
    (r'momentum is -0\.1', lambda: descend(momentum=-0.1)),
    ('loss is an int', lambda: descend(loss=3)),
    (r'rates has shape \[', lambda: descend(rates=jnp.ones(3))),
    ("decays is 'a'", lambda: delta(decays='a')),
    ("rates is 'a'", lambda: delta(rates='a')),
    ('no chunked form',
     lambda: LINEAR_FORMS[1](TOKENS, decays=GATES['vector'])),
    ('chunk_size is 0', lambda: delta(chunk_size=0)),
    ('ridge is 0.0; exp', lambda: learners.least_squares(TOKENS, ridge=0.0)),
    ('ridge is nan',
     lambda: learners.recursive_least_squares(TOKENS, ridge=np.nan)),
  ],
)  # fmt: skip
def test_bad_input_is_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
