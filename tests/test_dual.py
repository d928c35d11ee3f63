"""The dual model: definition and fast path, schedules, states, twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from iclcl_jax import (
  attention,
  dual,
  features,
  kernels,
  losses,
  projections,
)
from tests import oracles, tolerances

N, D_K, D_V, R = 6, 4, 3, 8
F64 = np.float64


# Compiled once for each shape: faster here than op by op.
zero_shot = jax.jit(dual.zero_shot)
one_step = jax.jit(dual.one_step, static_argnames='chunk_size')
one_step_autodiff = jax.jit(
  dual.one_step_autodiff, static_argnames=('loss', 'penalty', 'optimizer')
)
predict = jax.jit(dual.predict)
find_normaliser = jax.jit(dual.normaliser)
train = jax.jit(
  dual.train,
  static_argnames=('loss', 'penalty', 'optimizer', 'num_epochs', 'batch_size'),
)
merge = jax.jit(dual.merge)


def fit(train, phi, start, keys, values, optimizer, epochs, batch, **options):
  """`train` in one line."""
  schedule = {'num_epochs': epochs, 'batch_size': batch}
  options |= schedule | {'optimizer': optimizer}
  return train(phi, start, keys, values, **options)


def make_phi(dtype=F64):
  return features.PositiveFeatures(
    projections.gaussian(jax.random.key(0), R, D_K, dtype=dtype)
  )


PHIS = {
  'positive': make_phi,
  'exponential': lambda dtype=F64: kernels.ExponentialKernel(),
}
BOTH = pytest.mark.parametrize('name', list(PHIS))


def make_tokens(dtype=F64, size=N, seed=0):
  rng = np.random.default_rng(seed)
  return (
    jnp.asarray(rng.normal(size=D_K), dtype),
    jnp.asarray(rng.normal(size=(size, D_K)), dtype),
    jnp.asarray(rng.normal(size=(size, D_V)), dtype),
  )


def close(actual, expected, dtype=F64, order=True):
  """Equal up to rounding, relative to the largest entry."""
  table = tolerances.OTHER_SUMMATION_ORDER if order else tolerances.IDENTITY
  expected = np.asarray(expected)
  np.testing.assert_allclose(
    np.asarray(actual, F64),
    expected.astype(F64),
    rtol=0,
    atol=table[jnp.dtype(dtype).name] * max(1, np.abs(expected).max()),
  )


def same_model(phi, a, b, query, dtype=F64):
  close(predict(phi, a, query), predict(phi, b, query), dtype)


def unscaled(state):
  """`(W, z)` of the papers."""
  scale = jnp.exp(state.log_scale)
  return state.weights * scale[None], state.mass * scale


# The definition.


def test_one_step_is_the_gradient_of_the_papers_loss():
  """`W - eta grad L`, with `W [d_v, R]` explicit and D in the loss."""
  phi, (query, keys, values), eta = make_phi(), make_tokens(), 0.7
  start = zero_shot(phi, keys[4:], values[4:])
  normaliser = find_normaliser(phi, keys, query)

  def loss(weights):
    scores = jax.vmap(lambda v, k: v @ weights @ phi(k))(values[:4], keys[:4])
    return -jnp.sum(scores) / (eta * normaliser)

  initial = unscaled(start)[0] / normaliser
  trained = initial - eta * jax.jit(jax.grad(loss))(initial)
  by_hand = initial + values[:4].T @ jax.vmap(phi)(keys[:4]) / normaliser
  close(trained, by_hand)
  output = attention.kernel_attention(phi, query, keys, values)
  close(trained @ phi(query), output)
  state = one_step(phi, start, keys[:4], values[:4])
  close(unscaled(state)[0] / normaliser, trained)
  close(predict(phi, state, query), output)


@BOTH
def test_closed_form_equals_autodiff(name, dtype):
  phi, (_, keys, values) = PHIS[name](dtype), make_tokens(dtype)
  start = zero_shot(phi, keys[4:], values[4:])
  for rate in (0.0, 0.3, 1.0):
    options = {'learning_rate': rate}
    closed = one_step(phi, start, keys[:4], values[:4], **options)
    auto = one_step_autodiff(phi, start, keys[:4], values[:4], **options)
    assert type(closed) is type(auto)
    for a, b in zip(*map(jax.tree.leaves, (closed, auto)), strict=True):
      assert a.dtype == b.dtype == dtype
      close(a, b, dtype)


def test_weights_and_mass_equal_the_oracle():
  phi, (query, keys, values) = make_phi(), make_tokens()
  fn = functools.partial(oracles.positive_features, np.asarray(phi.projection))
  weights, mass = oracles.dual_weights(fn, np.asarray(keys), np.asarray(values))
  state = zero_shot(phi, keys, values)
  close(unscaled(state)[0], weights)
  close(unscaled(state)[1], mass)
  expected = oracles.dual_prediction(fn, weights, mass, np.asarray(query))
  close(predict(phi, state, query), expected)


def test_exact_kernel_dual_is_softmax_attention(dtype):
  """The claim that no paper checks, against a third party and an oracle."""
  kernel, (query, keys, values) = PHIS['exponential'](), make_tokens(dtype)
  expected = oracles.softmax_attention(*map(np.asarray, (query, keys, values)))
  heads = (query[None, None], keys[:, None], values[:, None])
  flax = nn.dot_product_attention(*(x[None] for x in heads))[0, 0, 0]
  start = zero_shot(kernel, keys[5:], values[5:])
  for step in (one_step, one_step_autodiff):
    state = step(kernel, start, keys[:5], values[:5])
    prediction = predict(kernel, state, query)
    close(prediction, expected, dtype, order=False)
    close(prediction, flax, dtype, order=False)


@BOTH
def test_query_free_form_equals_fixed_normaliser(name, dtype):
  phi, (query, keys, values) = PHIS[name](dtype), make_tokens(dtype)
  state = one_step(
    phi, zero_shot(phi, keys[4:], values[4:]), keys[:4], values[:4]
  )
  for point in (query, -2 * query):
    normaliser = find_normaliser(phi, keys, point)
    fixed = predict(phi, state, point, normaliser=normaliser)
    close(fixed, predict(phi, state, point), dtype)
    negative = predict(phi, state, point, normaliser=-normaliser)
    close(negative, -fixed, dtype)


def test_learning_rate_moves_the_weights_and_not_the_mass():
  phi, (_, keys, values) = make_phi(), make_tokens()
  start = dual.empty(phi, keys, values)
  one = one_step(phi, start, keys, values)
  third = one_step(phi, start, keys, values, learning_rate=0.25)
  np.testing.assert_array_equal(one.mass, third.mass)
  close(third.weights, one.weights / 4)


# Schedules.


@BOTH
@pytest.mark.parametrize('batch_size', [1, 4, N])
@pytest.mark.parametrize('num_epochs', [1, 3])
def test_schedules_end_where_one_step_ends(name, batch_size, num_epochs):
  phi, (query, keys, values) = PHIS[name](), make_tokens()
  start = zero_shot(phi, keys[:1], values[:1])
  goal = predict(phi, one_step(phi, start, keys, values), query)
  optimizer = optax.sgd(1 / num_epochs)  # One, for one compilation.
  for order in (np.arange(N), np.random.default_rng(1).permutation(N)):
    rows = keys[order], values[order]
    state = fit(train, phi, start, *rows, optimizer, num_epochs, batch_size)
    close(predict(phi, state, query), goal)


def test_a_sweep_vmaps_over_rates():
  """A traced rate, here float64, under strict promotion of dtypes."""
  phi, (_, keys, values) = make_phi(), make_tokens()
  start = zero_shot(phi, keys[:1], values[:1])

  def weights(rate):
    return fit(
      dual.train, phi, start, keys, values, optax.sgd(rate), 2, N
    ).weights

  rates = jnp.array([0.1, 0.5])
  steps = [
    one_step(phi, start, keys, values, learning_rate=2 * rate).weights
    for rate in rates
  ]
  close(jax.vmap(weights)(rates), jnp.stack(steps))


@BOTH
def test_distance_to_attention_along_the_way(name):
  """After demonstrations `0..t` exactly the later terms are missing."""
  phi, (query, keys, values) = PHIS[name](), make_tokens()
  start = zero_shot(phi, keys[5:], values[5:])
  normaliser = find_normaliser(phi, keys, query)

  def observe(state):
    return predict(phi, state, query, normaliser=normaliser)

  scores, log_scale = attention.scores(phi, query, keys)
  shares = scores * jnp.exp(log_scale) / normaliser
  terms = shares[:5, None] * values[:5]
  output = shares @ values
  missing = jnp.cumsum(terms[::-1], axis=0)[::-1]
  for epochs in (1, 4):
    rows, optimizer = (keys[:5], values[:5]), optax.sgd(1 / epochs)
    trajectory = fit(
      dual.train,
      phi,
      start,
      *rows,
      optimizer,
      epochs,
      1,
      observe=observe,
    )
    assert trajectory.observations.shape == (5 * epochs, D_V)
    gaps = output[None] - trajectory.observations
    close(gaps[-1], np.zeros(D_V))
    if epochs == 1:
      close(gaps[:-1], missing[1:])
    for epoch in range(1, epochs + 1):
      left = (1 - epoch / epochs) * missing[0]
      close(gaps[5 * epoch - 1], left)


# What the step minimises.


def test_step_minimises_the_proximal_objective():
  """`L(W) + |W - W_0|^2 / (2 eta)`; from W_0 = 0 this is ridge."""
  phi, (_, keys, values), eta = make_phi(), make_tokens(), 0.3
  rows = jax.vmap(phi)(keys)
  for start in (
    dual.empty(phi, keys, values),
    zero_shot(phi, keys[:2], values[:2]),
  ):
    initial = unscaled(start)[0]

    @jax.jit
    def objective(weights, initial=initial):
      fit = losses.contrastive(rows @ weights.T, values)
      return fit + jnp.sum((weights - initial) ** 2) / (2 * eta)

    state = one_step(phi, start, keys, values, learning_rate=eta)
    trained = unscaled(state)[0]
    close(jax.jit(jax.grad(objective))(trained), np.zeros((D_V, R)))
    for seed in range(5):
      move = 1e-2 * jax.random.normal(jax.random.key(seed), (D_V, R), F64)
      assert objective(trained + move) > objective(trained)


def test_ridge_penalty_shrinks_the_start():
  """`W_1 = (1 - eta alpha) W_0 + eta sum v phi^T`; the mass is untouched."""
  phi, (_, keys, values) = make_phi(), make_tokens()
  eta, alpha = 0.7, 0.4
  start = zero_shot(phi, keys[4:], values[4:])
  options = {'learning_rate': eta}
  plain = one_step(phi, start, keys[:4], values[:4], **options)
  options |= {'penalty': losses.ridge(alpha)}
  ridge = one_step_autodiff(phi, start, keys[:4], values[:4], **options)
  expected = unscaled(plain)[0] - eta * alpha * unscaled(start)[0]
  close(unscaled(ridge)[0], expected)
  close(ridge.mass, plain.mass)


@BOTH
def test_loss_never_rises_in_one_step(name):
  phi = PHIS[name]()
  for seed in range(5):
    _, keys, values = make_tokens(seed=seed)
    gram = jax.vmap(lambda key, keys=keys: kernel_row(phi, key, keys))(keys)
    drop = -jnp.sum((values @ values.T) * gram)
    start = zero_shot(phi, keys[:2], values[:2])
    trained = one_step(phi, start, keys, values)

    @jax.jit
    def loss(state, keys=keys, values=values):
      fixed = functools.partial(predict, phi, state, normaliser=1.0)
      return losses.contrastive(jax.vmap(fixed)(keys), values)

    close(loss(trained) - loss(start), drop)
    assert drop <= 0


def kernel_row(phi, key, keys):
  scores, log_scale = attention.scores(phi, key, keys)
  return scores * jnp.exp(log_scale)


@BOTH
def test_squared_loss_agrees_in_the_first_step_only(name):
  phi, (query, keys, values) = PHIS[name](), make_tokens()
  start = dual.empty(phi, keys, values)
  squared = functools.partial(
    one_step_autodiff, phi, loss=losses.squared, learning_rate=0.1
  )
  first = one_step(phi, start, keys, values, learning_rate=0.1)
  same_model(phi, squared(start, keys, values), first, query)
  after = squared(zero_shot(phi, keys, values), keys, values)
  start = zero_shot(phi, keys, values)
  plain = one_step(phi, start, keys, values, learning_rate=0.1)
  difference = predict(phi, after, query) - predict(phi, plain, query)
  assert jnp.max(jnp.abs(difference)) > 1e-3


def test_squared_loss_is_the_delta_rule():
  phi, (_, keys, values) = make_phi(), make_tokens()
  rows, labels = np.asarray(jax.vmap(phi)(keys)), np.asarray(values)
  weights = np.zeros((D_V, R))
  for _ in range(2):
    for feature, label in zip(rows, labels, strict=True):
      weights += 0.2 * np.outer(label - weights @ feature, feature)
  start, optimizer = dual.empty(phi, keys, values), optax.sgd(0.2)
  state = fit(
    dual.train, phi, start, keys, values, optimizer, 2, 1, loss=losses.squared
  )
  close(unscaled(state)[0], weights)


PAIRS = {
  'truncated': (
    features.TaylorFeatures(order=2),
    oracles.truncated_exponential(2),
  ),
  'linear': (features.IdentityFeatures(), kernels.LinearKernel()),
}
OPTIMIZERS = {
  'sgd': optax.sgd(0.03),
  'momentum': optax.sgd(0.03, momentum=0.9),
  'decay': optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.03)),
}


@pytest.mark.parametrize('pair', list(PAIRS))
@pytest.mark.parametrize('optimizer', list(OPTIMIZERS))
@pytest.mark.parametrize('loss', [losses.contrastive, losses.squared])
def test_functional_gradient_is_the_feature_gradient(pair, optimizer, loss):
  """Training in the RKHS of a finite-dimensional kernel, and in its features.

  The last batch is incomplete.
  """
  query, keys, values = make_tokens()

  def answer(phi):
    start = zero_shot(phi, keys[:2], values[:2])
    rule = OPTIMIZERS[optimizer]
    state = fit(dual.train, phi, start, keys, values, rule, 3, 4, loss=loss)
    return predict(phi, state, query, normaliser=1.0)

  phi, kernel = PAIRS[pair]
  close(answer(phi), answer(kernel))


# States.


@BOTH
def test_merge_is_associative_and_knows_the_empty_state(name, dtype):
  phi, (query, keys, values) = PHIS[name](dtype), make_tokens(dtype)
  parts = [
    zero_shot(phi, keys[rows], values[rows])
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6))
  ]
  empty = dual.empty(phi, keys, values)
  whole = zero_shot(phi, keys, values)
  a, b, c = parts
  for merged in (
    merge(merge(a, b), c),
    merge(a, merge(b, c)),
    merge(c, merge(b, a)),
    merge(empty, merge(whole, empty)),
  ):
    same_model(phi, merged, whole, query, dtype)
  both_empty = merge(empty, empty)
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in both_empty[:3])


@BOTH
def test_absorbing_in_pieces_is_absorbing_at_once(name, dtype):
  phi, (query, keys, values) = PHIS[name](dtype), make_tokens(dtype)
  start = zero_shot(phi, keys[:1], values[:1])
  whole = one_step(phi, start, keys, values, learning_rate=0.5)
  pieces = start
  for rows in (slice(0, 1), slice(1, 4), slice(4, N)):
    pieces = one_step(phi, pieces, keys[rows], values[rows], learning_rate=0.5)
  same_model(phi, pieces, whole, query, dtype)


def test_large_norms_survive_every_order(dtype):
  """The running maximum: a huge key may come first or last."""
  phi, (query, keys, values) = make_phi(dtype), make_tokens(dtype)
  keys = keys * jnp.asarray([30.0, 1, 1, 1, 1, 0.1], dtype)[:, None]
  for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
    state = dual.empty(phi, keys, values)
    for i in order:
      state = one_step(phi, state, keys[i : i + 1], values[i : i + 1])
    expected = attention.kernel_attention(phi, query, keys, values)
    close(predict(phi, state, query), expected, dtype)


@pytest.mark.parametrize('chunk_size', [1, 4, 6, 100])
@pytest.mark.parametrize('masked', [False, True])
def test_streamed_step_is_the_step(chunk_size, masked):
  phi, (_, keys, values) = make_phi(), make_tokens()
  mask = jnp.arange(N) % 3 != 1 if masked else None
  start = zero_shot(phi, keys[:1], values[:1])
  options = {'learning_rate': 0.5, 'mask': mask}
  streamed = one_step(
    phi, start, keys, values, chunk_size=chunk_size, **options
  )
  plain = one_step(phi, start, keys, values, **options)
  close(unscaled(streamed)[0], unscaled(plain)[0])
  close(unscaled(streamed)[1], unscaled(plain)[1])


def test_kernel_removal_is_exact():
  kernel, (query, keys, values) = PHIS['exponential'](), make_tokens()
  state = zero_shot(kernel, keys, values)
  removal = dual.remove(kernel, state, keys[2], values[2])
  keep = np.arange(N) != 2
  rest = zero_shot(kernel, keys[keep], values[keep])
  assert removal.amplification == 1
  same_model(kernel, removal.state, rest, query)
  for bad in (keys[2] + 1, keys[2]):  # Never seen; already removed.
    with pytest.raises(ValueError, match='the mass is lost'):
      dual.remove(kernel, removal.state, bad, values[2])
  # A duplicated demonstration loses one copy, not both.
  twice = merge(state, state)
  once = dual.remove(kernel, twice, keys[2], values[2]).state
  assert float(jnp.sum(once.mass)) == 2 * N - 1


def test_a_row_that_is_not_there_or_the_only_one_loses_the_mass():
  kernel, (_, keys, values) = PHIS['exponential'](), make_tokens()
  values = values.at[2].set(0)  # Found once even with the value zero.
  rest = dual.remove(
    kernel, zero_shot(kernel, keys, values), keys[2], values[2]
  ).state
  assert float(jnp.sum(rest.mass)) == N - 1
  for state, row in (
    (rest, 2),
    (zero_shot(kernel, keys[:0], values[:0]), 0),
    (zero_shot(kernel, keys[:1], values[:1]), 0),
  ):
    with pytest.raises(ValueError, match='the mass is lost'):
      dual.remove(kernel, state, keys[row], values[row])


def dominated(width, dtype=F64):
  """A map whose first feature has next to no mass but that of key 2."""
  phi, (query, keys, values) = make_phi(dtype), make_tokens(dtype)
  phi = features.PositiveFeatures(width * phi.projection)
  peak = phi.projection[0] * jnp.asarray(D_K**0.25, dtype)
  return phi, query, keys.at[2].set(peak), values


def test_feature_removal_is_bounded_by_its_amplification(dtype):
  eps = float(jnp.finfo(dtype).eps)
  keep = np.arange(N) != 2
  seen = []
  for width in (0.5, 1.0, 2.0):
    phi, query, keys, values = dominated(width, dtype)
    start = dual.empty(phi, keys, values)
    state = one_step(phi, start, keys, values, learning_rate=0.5)
    removal = dual.remove(phi, state, keys[2], values[2], learning_rate=0.5)
    rest = one_step(phi, start, keys[keep], values[keep], learning_rate=0.5)
    error = predict(phi, removal.state, query) - predict(phi, rest, query)
    bound = 8 * N * eps * removal.amplification * jnp.max(jnp.abs(values))
    assert jnp.max(jnp.abs(error)) <= bound
    seen.append(float(removal.amplification))
  assert 1 <= seen[0] < 10
  assert seen[-1] > 100


def test_lost_mass_is_an_error_or_not_a_number():
  phi, _, keys, values = dominated(8.0)
  for map_or_kernel, key in (
    (phi, keys[2]),
    (PHIS['exponential'](), keys[2] + 1),
  ):
    state = zero_shot(map_or_kernel, keys, values)
    with pytest.raises(ValueError, match='the mass is lost'):
      dual.remove(map_or_kernel, state, key, values[2])
    removal = jax.jit(dual.remove)(map_or_kernel, state, key, values[2])
    assert jnp.isinf(removal.amplification)
    assert all(bool(jnp.all(jnp.isnan(x))) for x in removal.state[:3])


# Masks.


@BOTH
@pytest.mark.parametrize('step', [one_step, one_step_autodiff])
def test_masked_rows_are_as_if_absent(name, step):
  phi, (query, keys, values) = PHIS[name](), make_tokens()
  mask = jnp.asarray([True, False, True, True, False, True])
  keep = np.asarray(mask)
  dirty_keys = jnp.where(mask[:, None], keys, jnp.nan)
  dirty_values = jnp.where(mask[:, None], values, jnp.inf)
  start = zero_shot(phi, keys[:1], values[:1])

  def answer(query, keys, values, rate, mask=None):
    state = step(phi, start, keys, values, mask=mask, learning_rate=rate)
    return predict(phi, state, query)

  short = answer(query, keys[keep], values[keep], 0.5)
  close(answer(query, dirty_keys, dirty_values, 0.5, mask), short)

  def total(query, keys, values, rate, mask=None):
    return jnp.sum(answer(query, keys, values, rate, mask) ** 2)

  slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
  found = slopes(query, dirty_keys, dirty_values, 0.5, mask)
  expected = slopes(query, keys[keep], values[keep], 0.5)
  close(found[0], expected[0])
  close(found[3], expected[3])
  for full, part in zip(found[1:3], expected[1:3], strict=True):
    close(full[keep], part)
    np.testing.assert_array_equal(full[~keep], 0)


@BOTH
def test_a_loss_with_a_mask_leaves_rows_out(name):
  phi, (query, keys, values) = PHIS[name](), make_tokens()
  start = zero_shot(phi, keys[:1], values[:1])
  options = {'loss': losses.info_nce(), 'learning_rate': 0.5}
  masked = one_step_autodiff(
    phi, start, keys, values, mask=jnp.arange(N) < 4, **options
  )
  alone = one_step_autodiff(phi, start, keys[:4], values[:4], **options)
  same_model(phi, masked, alone, query)

  def train(keys, values):
    options = {'optimizer': optax.sgd(0.5), 'loss': losses.info_nce()}
    return dual.train(
      phi, start, keys, values, num_epochs=1, batch_size=4, **options
    )

  whole = train(keys[:4], values[:4])
  rest = one_step_autodiff(phi, whole, keys[4:], values[4:], **options)
  same_model(phi, train(keys, values), rest, query)


@BOTH
def test_nothing_visible_leaves_the_start(name):
  phi, (query, keys, values) = PHIS[name](), make_tokens()
  start = zero_shot(phi, keys[:2], values[:2])
  hidden = jnp.zeros(N, bool)
  state = one_step(phi, start, keys, values, mask=hidden)
  same_model(phi, state, start, query)
  empty = zero_shot(phi, keys, values, mask=hidden)
  assert jnp.all(jnp.isnan(predict(phi, empty, query)))
  same_model(phi, one_step(phi, empty, keys[:2], values[:2]), start, query)


# Use inside other programs.


@BOTH
def test_many_queries_are_answered_like_one(name):
  phi, (_, keys, values) = PHIS[name](), make_tokens()
  state = zero_shot(phi, keys, values)
  queries = make_tokens(size=5, seed=3)[1]
  expected = jnp.stack([predict(phi, state, q) for q in queries])
  close(jax.vmap(lambda q: predict(phi, state, q))(queries), expected)


@BOTH
@pytest.mark.parametrize('step', [one_step, one_step_autodiff])
def test_gradients_of_the_dual_are_gradients_of_attention(name, step, dtype):
  """In query, keys, values and, for a feature map, the projection."""

  def via_dual(phi, query, keys, values):
    state = zero_shot(phi, keys[4:], values[4:])
    state = step(phi, state, keys[:4], values[:4])
    return jnp.sum(predict(phi, state, query) ** 2)

  def via_attention(phi, query, keys, values):
    output = attention.kernel_attention(phi, query, keys, values)
    return jnp.sum(output**2)

  arguments = (PHIS[name](dtype), *make_tokens(dtype))
  found, expected = (
    jax.jit(jax.grad(fn, argnums=(0, 1, 2, 3)))(*arguments)
    for fn in (via_dual, via_attention)
  )
  found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
  assert len(found) == (4 if name == 'positive' else 3)
  for a, b in zip(found, expected, strict=True):
    assert jnp.max(jnp.abs(b)) > 1e-3
    close(a, b, dtype)


@BOTH
@pytest.mark.parametrize('half', ['bfloat16', 'float16'])
def test_half_precision_stays_half(name, half):
  half = jnp.dtype(half)
  phi, (query, keys, values) = PHIS[name](half), make_tokens(half)

  start = zero_shot(phi, keys[:2], values[:2])
  states = [
    step(phi, start, keys, values, learning_rate=1.0)
    for step in (one_step, one_step_autodiff)
  ]
  everything = [jnp.concatenate([x[:2], x]) for x in (keys, values)]
  wide = [np.asarray(x, F64) for x in (query, *everything)]
  feature_fn = functools.partial(
    oracles.positive_features,
    np.asarray(getattr(phi, 'projection', np.zeros((1, 1))), F64),
  )
  kernel = (
    oracles.feature_kernel(feature_fn)
    if name == 'positive'
    else oracles.exponential_kernel
  )
  expected = oracles.kernel_attention(kernel, *wide)
  for state in states:
    found = predict(phi, state, query)
    assert found.dtype == half
    np.testing.assert_allclose(np.asarray(found, F64), expected, atol=5e-2)


@BOTH
def test_new_values_do_not_compile_anew(name):
  traces = []

  @jax.jit
  def run(phi, query, keys, values, rate):
    traces.append(1)
    state = zero_shot(phi, keys[:1], values[:1])
    state = one_step(phi, state, keys, values, learning_rate=rate)
    return predict(phi, state, query)

  phi = PHIS[name]()
  for seed, rate in enumerate((0.1, 0.2, 0.3)):
    run(jax.tree.map(lambda x: 2 * x, phi), *make_tokens(seed=seed), rate)
  assert len(traces) == 1


@BOTH
def test_vmap_makes_batches_of_dual_models(name):
  phi = PHIS[name]()
  batch = [make_tokens(seed=seed) for seed in range(3)]

  def run(query, keys, values):
    state = zero_shot(phi, keys[:1], values[:1])
    state = one_step_autodiff(phi, state, keys, values)
    return predict(phi, state, query)

  found = jax.jit(jax.vmap(run))(*map(jnp.stack, zip(*batch, strict=True)))
  close(found, jnp.stack([run(*tokens) for tokens in batch]))


def test_numpy_arrays_are_welcome():
  phi, tokens = make_phi(), make_tokens()
  query, keys, values = map(np.asarray, tokens)
  start = zero_shot(phi, keys[:1], values[:1])
  state = fit(dual.train, phi, start, keys, values, optax.sgd(1.0), 1, 4)
  goal = one_step(phi, start, *tokens[1:])
  same_model(phi, state, goal, query)


CAPACITY = 8


def online(phi, keys, values, step):
  """Predicts after every token, one at a time."""

  def see(state, token):
    key, value = token
    state = step(phi, state, key[None], value[None])
    return state, dual.predict(phi, state, key)

  state = dual.empty(phi, keys, values, capacity=CAPACITY)
  return jax.lax.scan(see, state, (keys, values))


@pytest.mark.parametrize(
  'phi', [kernels.ExponentialKernel(), features.EluPlusOneFeatures()]
)
@pytest.mark.parametrize('step', [dual.one_step, dual.one_step_autodiff])
def test_a_state_of_fixed_capacity_is_the_carry_of_a_scan(phi, step):
  rng = np.random.default_rng(0)
  keys, values = (jnp.asarray(rng.normal(size=(6, n))) for n in (3, 2))
  state, found = jax.jit(functools.partial(online, phi, step=step))(
    keys, values
  )
  expected = attention.causal_kernel_attention(phi, keys, keys, values)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  removed = dual.remove(phi, state, keys[1], values[1]).state
  rest = jnp.array([0, 2, 3, 4, 5])
  np.testing.assert_allclose(
    dual.predict(phi, removed, keys[0]),
    attention.kernel_attention(phi, keys[0], keys[rest], values[rest]),
    rtol=1e-10,
  )
  if isinstance(phi, kernels.ExponentialKernel):
    for full in (dual.one_step, dual.one_step_autodiff):
      with pytest.raises(
        ValueError, match='state has room for 8 tokens, and 12'
      ):
        full(phi, state, keys, values)
    traced = jax.jit(functools.partial(dual.one_step, phi))
    late = traced(state, keys, values)
    assert jnp.all(jnp.isnan(dual.predict(phi, late, keys[0])))
    both = dual.merge(
      dual.one_step(
        phi, dual.empty(phi, keys, values, capacity=9), keys, values
      ),
      dual.one_step(
        phi, dual.empty(phi, keys, values, capacity=4), keys[:1], values[:1]
      ),
    )
    assert (int(both.used), both.mass.tolist()) == (7, [1.0] * 7 + [0.0] * 2)
