"""Finite dual models: every map keeps the identity, and says what it costs."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from iclcl_jax import (
  attention,
  budget,
  dual,
  equivalence,
  features,
  finite_duals,
  losses,
  modified,
  projections,
)
from iclcl_jax.precision import tolerance

N, D, D_V = 12, 4, 3


def tokens(dtype='float64', size=N, seed=0, scale=1.5):
  keys = jax.random.split(jax.random.key(seed), 3)
  widths = (D, D, D_V)
  return tuple(
    scale * jax.random.normal(key, (size, width), jnp.dtype(dtype))
    for key, width in zip(keys, widths, strict=True)
  )


def causal(size=N):
  return jnp.tril(jnp.ones((size, size), bool))


def make(name, dtype='float64'):
  queries, keys, _ = tokens(dtype, seed=1)
  if name == 'landmarks':
    return finite_duals.fit_landmarks(queries, keys, num_landmarks=5)
  if name == 'learnt':
    return finite_duals.train_features(
      jax.random.key(0),
      queries,
      keys,
      num_features=5,
      seen=causal(),
      far=causal(),
      num_steps=20,
    )
  if name == 'nystroem':
    return finite_duals.nystroem(keys[:5])
  directions = projections.orthogonal(
    jax.random.key(3), 6, D, dtype=jnp.dtype(dtype)
  )
  base = features.PositiveFeatures(directions)
  return finite_duals.balance(queries, keys, base)


MAPS = pytest.mark.parametrize(
  'name', ['landmarks', 'learnt', 'nystroem', 'balanced']
)
DTYPES = pytest.mark.parametrize('dtype', ['float64', 'float32'])


def kernel_matrix(phi, queries, keys):
  """Of both towers, in NumPy. Shape `[M, N]`."""
  of_query = getattr(phi, 'scaled_query', phi.scaled)

  def plain(tower, rows):
    scale, found = jax.vmap(tower)(rows)
    return np.exp(np.asarray(scale, np.float64)) * np.asarray(found, np.float64)

  return plain(of_query, queries) @ plain(phi.scaled, keys).T


@MAPS
@DTYPES
@pytest.mark.parametrize('loss', [losses.contrastive, losses.squared])
def test_the_identity_is_exact_for_each_map(name, dtype, loss):
  phi = make(name, dtype)
  queries, keys, values = tokens(dtype)
  for options in ({}, {'mask': jnp.arange(N) != 4}, {'num_query_tokens': 2}):
    certificate = equivalence.verify(
      phi, queries[-1], keys, values, loss=loss, **options
    )
    assert certificate.holds or certificate.verdict == 'ill-conditioned', (
      options,
      certificate,
    )
    assert certificate.residual <= tolerance(dtype)


@MAPS
def test_all_doors_read_queries_through_their_tower(name):
  phi = make(name)
  queries, keys, values = tokens()
  weights = kernel_matrix(phi, queries, keys)
  expected = weights @ values / weights.sum(1, keepdims=True)
  rows = np.tril(weights)
  expected_causal = rows @ values / rows.sum(1, keepdims=True)
  one = attention.kernel_attention(phi, queries[0], keys, values)
  many = attention.stream_kernel_attention(
    phi, queries, keys, values, chunk_size=5
  )
  along = attention.causal_kernel_attention(
    phi, queries, keys, values, chunk_size=5
  )
  state = dual.zero_shot(phi, keys[:1], values[:1])
  state = dual.one_step(phi, state, keys[1:], values[1:])
  rtol = {'rtol': 1e-9, 'atol': 1e-9}
  np.testing.assert_allclose(one, expected[0], **rtol)
  np.testing.assert_allclose(many, expected, **rtol)
  np.testing.assert_allclose(along, expected_causal, **rtol)
  np.testing.assert_allclose(
    dual.predict(phi, state, queries[0]), expected[0], **rtol
  )
  if name == 'nystroem':  # Of either sign: no order of scores.
    return
  negative = modified.negative(strength=0.3, num_negatives=2)
  np.testing.assert_allclose(
    negative.stream(phi, queries, keys, values)[1],
    negative(phi, queries[1], keys, values),
    **rtol,
  )


def test_a_map_of_two_towers_is_no_kernel():
  with pytest.raises(ValueError, match='LandmarkFeatures, which reads'):
    features.FeatureKernel(make('landmarks'))


def test_weights_of_landmarks_are_those_of_non_negative_least_squares():
  queries, keys, _ = tokens(size=40)
  phi = finite_duals.fit_landmarks(queries, keys, num_landmarks=6)
  log_a = np.asarray(queries @ keys.T / D**0.5)
  log_z = np.log(np.exp(log_a).sum(1))
  np.testing.assert_allclose(phi.log_normalisers, log_z)
  scale, weights = jax.vmap(phi.scaled)(keys)
  weights = np.asarray(weights * np.exp(scale))
  matrix = np.exp(
    np.asarray(queries @ phi.landmarks.T / D**0.5) - log_z[:, None]
  )
  attended = np.exp(log_a - log_z[:, None])
  assert weights.min() >= 0
  found = np.linalg.norm(matrix @ weights.T - attended, axis=0)
  best = [scipy.optimize.nnls(matrix, column)[1] for column in attended.T]
  size = np.linalg.norm(attended, axis=0)
  assert np.median((found - best) / size) < 0.01
  assert np.max((found - best) / size) < 0.1


def test_landmarks_are_the_pivots_of_the_attention():
  queries, keys, _ = tokens(size=30)
  attended = np.asarray(jax.nn.softmax(queries @ keys.T / D**0.5))
  far = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.7, (30, 30)))
  for seen in (None, far):
    phi = finite_duals.fit_landmarks(
      queries, keys, num_landmarks=8, far=None if seen is None else seen
    )
    rows = attended if seen is None else np.where(seen, attended, 0)
    pivots = scipy.linalg.qr(rows, pivoting=True)[2][:8]
    np.testing.assert_array_equal(phi.landmarks, keys[pivots])


def test_nystroem_is_exact_among_its_landmarks():
  _, keys, _ = tokens()
  phi = finite_duals.nystroem(keys, cutoff=1e-14)
  exact = np.exp(keys @ keys.T / D**0.5)
  np.testing.assert_allclose(kernel_matrix(phi, keys, keys), exact, rtol=1e-8)


def test_balancing_changes_no_kernel_and_is_the_best_of_its_kind():
  queries, keys, _ = tokens(size=50)
  queries = queries * jnp.array([[3.0, 0.3, 1.0, 1.0]]) + 0.5
  phi = finite_duals.balance(queries, keys, features.TaylorFeatures(24))
  few = queries[:3] / 3, keys[:3] / 3
  exact = np.exp(few[0] @ few[1].T / D**0.5)
  np.testing.assert_allclose(kernel_matrix(phi, *few), exact, rtol=1e-6)

  def spread(matrix):
    rows = np.asarray(queries - queries.mean(0, keepdims=True)) @ matrix.T
    columns = np.asarray(keys - keys.mean(0, keepdims=True))
    columns = columns @ np.linalg.inv(matrix)
    return np.mean(np.sum(rows**2, 1)) + np.mean(np.sum(columns**2, 1))

  best = np.asarray(phi.matrix)
  least = spread(best)
  assert least < 0.9 * spread(np.eye(D))
  rng = np.random.default_rng(0)
  for _ in range(10):
    change = rng.normal(size=(D, D)) * 0.1
    assert spread(best + change + change.T) > least * (1 - 1e-3)
  rows = phi.rows(queries, keys)
  plain, balanced = (
    budget.predicted_output_error(
      features.PositiveFeatures, q[:5], k, k, num_directions=64
    )
    for q, k in ((queries, keys), rows)
  )
  assert np.median(balanced) < np.median(plain)


def test_training_brings_the_distributions_together():
  queries, keys, values = tokens(size=32)
  seen = causal(32)
  learner = finite_duals.WindowedLearner(num_sinks=1, window=3)
  far = learner.is_far(jnp.arange(32)[:, None], jnp.arange(32)[None])
  exact = finite_duals.WindowedLearner(num_sinks=0, window=32)

  def error(num_steps):
    phi = finite_duals.train_features(
      jax.random.key(0), queries, keys, num_features=8, seen=seen, far=far,
      num_steps=num_steps,
    )  # fmt: skip
    found = learner.causal(phi, queries, keys, values)
    target = exact.causal(phi, queries, keys, values)
    return float(jnp.linalg.norm(found - target) / jnp.linalg.norm(target))

  first, last = error(1), error(300)
  assert last < 0.6 * first


def dense(phi, learner, queries, keys, values):
  """The sum of learners, pair by pair in NumPy."""
  size = len(keys)
  place = np.arange(size)
  distance = place[:, None] - place[None]
  exact = (distance < learner.window) | (place[None] < learner.num_sinks)
  softmax = np.exp(np.asarray(queries @ keys.T) / D**0.5)
  weights = np.where(exact, softmax, kernel_matrix(phi, queries, keys))
  weights = np.tril(weights)
  return weights @ np.asarray(values) / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
  ('num_sinks', 'window', 'chunk_size'),
  [
    (1, 4, 5),
    (0, 0, 3),
    (3, 1, 1),
    (0, 5, 64),
    (20, 2, 4),
    (2, 40, 4),
    (2, 0, 7),
  ],
)
def test_the_sum_of_learners_is_written_out(num_sinks, window, chunk_size):
  phi = make('landmarks')
  learner = finite_duals.WindowedLearner(num_sinks=num_sinks, window=window)
  rows = tokens()
  found = learner.causal(phi, *rows, chunk_size=chunk_size)
  np.testing.assert_allclose(found, dense(phi, learner, *rows), rtol=1e-9)


@MAPS
def test_parts_of_any_size_are_the_whole(name):
  phi = make(name)
  learner = finite_duals.WindowedLearner(num_sinks=2, window=3)
  rows = tokens()
  whole = learner.causal(phi, *rows)
  state, found = learner.start(phi, *rows[1:]), []
  sizes = jax.tree.map(jnp.shape, state)
  for begin, end in itertools.pairwise([0, 1, 2, 7, 8, 12]):
    state, part = learner.extend(phi, state, *(x[begin:end] for x in rows))
    assert jax.tree.map(jnp.shape, state) == sizes
    found.append(part)
  np.testing.assert_allclose(jnp.concatenate(found), whole, rtol=1e-8)


@pytest.mark.parametrize('chunk_size', [4, 64])
def test_nothing_of_the_future_enters_a_past_output(chunk_size):
  phi = make('landmarks', 'float32')
  learner = finite_duals.WindowedLearner(num_sinks=1, window=2)
  queries, keys, values = tokens('float32')
  before = learner.causal(phi, queries, keys, values, chunk_size=chunk_size)
  for later in (jnp.nan, 30.0):
    after = learner.causal(
      phi,
      queries,
      keys.at[9:].set(later),
      values.at[9:].set(later),
      chunk_size=chunk_size,
    )
    np.testing.assert_array_equal(after[:9], before[:9])


def test_derivatives_are_finite_and_right():
  phi = make('landmarks')
  learner = finite_duals.WindowedLearner(num_sinks=1, window=2)
  rows = tokens()

  @jax.jit
  def loss(*rows):
    return jnp.sum(learner.causal(phi, *rows, chunk_size=5) ** 2)

  jax.test_util.check_grads(loss, rows, order=1, modes=['rev'], rtol=1e-4)


@pytest.mark.parametrize('scale', [10, 100])
def test_large_scores_stay_finite(scale):
  queries, keys, values = tokens('float32', seed=2, scale=scale)
  phi = finite_duals.fit_landmarks(queries, keys, num_landmarks=5)
  learner = finite_duals.WindowedLearner(num_sinks=1, window=2)
  assert np.all(np.isfinite(learner.causal(phi, queries, keys, values)))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_is_read_in_float32(dtype):
  phi = make('landmarks', 'float32')
  learner = finite_duals.WindowedLearner(num_sinks=1, window=2)
  half = tokens(dtype)
  wide = learner.causal(phi, *(x.astype(jnp.float32) for x in half))
  found = learner.causal(phi, *half)
  assert found.dtype == dtype
  np.testing.assert_allclose(
    found.astype(jnp.float32), wide, rtol=2e-2, atol=2e-2
  )
  fitted = finite_duals.fit_landmarks(*half[:2], num_landmarks=3)
  assert fitted.landmarks.dtype == jnp.float32


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    (
      lambda q, k, v: finite_duals.fit_landmarks(q, k, num_landmarks=99),
      ['num_landmarks is 99', f'{N} keys', 'longer text'],
    ),
    (
      lambda q, k, v: finite_duals.fit_landmarks(q, k, num_landmarks=0),
      ['num_landmarks is 0'],
    ),
    (
      lambda q, k, v: finite_duals.fit_landmarks(q, k[:, :2], num_landmarks=2),
      ['d_k', 'queries', 'keys'],
    ),
    (
      lambda q, k, v: finite_duals.balance(q[:1], k, make('learnt')),
      ['M of queries is 1'],
    ),
    (
      lambda q, k, v: finite_duals.WindowedLearner(window=-1),
      ['window is -1'],
    ),
    (
      lambda q, k, v: finite_duals.WindowedLearner().causal(
        make('landmarks'), q, k, v[:2]
      ),
      ['N', 'values'],
    ),
    (
      lambda q, k, v: finite_duals.WindowedLearner().causal(
        make('landmarks'), q, k, v, chunk_size=0
      ),
      ['chunk_size is 0'],
    ),
  ],
)
def test_bad_input_is_named(call, words):
  with pytest.raises(ValueError) as error:  # noqa: PT011
    call(*tokens())
  for word in words:
    assert word in str(error.value)
