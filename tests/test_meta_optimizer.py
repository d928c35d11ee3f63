"""Implicit finetuning: dual forms, the convex mix, momentum, metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from iclcl_jax import attention, features
from iclcl_jax.accounts import (
  meta_optimizer as account,
  meta_optimizer_metrics as metrics,
)
from tests import tolerances

N, M, D, D_K, D_V = 9, 4, 7, 5, 3
WIDTH, DRAWS = 2048, 200


def draw(*shapes, dtype=jnp.float64, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_demonstrations_update_the_weights_of_linear_attention(dtype):
  query, keys, values = draw((D_K,), (N, D_K), (N, D_V), dtype=dtype)
  zero_shot = account.weight_update(keys[-M:], values[-M:])
  update = account.weight_update(keys[:-M], values[:-M])
  assert update.dtype == dtype
  phi = features.IdentityFeatures()
  np.testing.assert_allclose(
    (zero_shot + update) @ query,
    attention.linear_attention(phi, query, keys, values),
    atol=10 * tolerances.IDENTITY[jnp.dtype(dtype).name],
  )


def test_finetuned_keys_and_values_update_the_weights_too():
  tokens, query, wk, wv, dk, dv = draw(
    (M, D), (D_K,), (D, D_K), (D, D_V), (D, D_K), (D, D_V)
  )
  head, changes = account.Head(wk, wv), account.Head(dk, dv)
  update = account.finetuned_update(tokens, head, changes)
  before = account.weight_update(tokens @ wk, tokens @ wv)
  after = attention.linear_attention(
    features.IdentityFeatures(), query, tokens @ (wk + dk), tokens @ (wv + dv)
  )
  np.testing.assert_allclose((before + update) @ query, after, rtol=1e-12)
  gram = tokens.T @ tokens
  published = wk.T @ gram @ dv + dk.T @ gram @ wv + dk.T @ gram @ dv
  np.testing.assert_allclose(update.T, published, rtol=1e-11)


def test_softmax_attention_is_a_convex_mix():
  query, keys, values = draw((D_K,), (N, D_K), (N, D_V))
  keys = 30 * keys  # The mass of a side must not overflow.
  mix = account.softmax_mix(query, keys, values, num_query_tokens=M)
  whole = attention.softmax_attention(query, keys, values)
  mixed = (1 - mix.share) * mix.zero_shot + mix.share * mix.demonstrations
  np.testing.assert_allclose(mixed, whole, atol=1e-14)
  milder = account.softmax_mix(query, keys / 30, values, num_query_tokens=M)
  assert 0.1 < milder.share < 0.9
  whole = attention.softmax_attention(query, keys / 30, values)
  naive = milder.zero_shot + milder.demonstrations
  assert jnp.max(jnp.abs(naive - whole)) > 0.1


def stream(dtype=jnp.float64):
  return draw((N, D_K), (N, D_K), (N, D_V), dtype=dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@pytest.mark.parametrize('decay', [0.0, 0.1, 0.9])
def test_momentum_attention_is_plain_attention_and_a_matrix(decay, dtype):
  queries, keys, values = stream(dtype)
  full = account.momentum_attention(queries, keys, values, decay=decay)
  assert full.dtype == dtype
  seen = np.tril(np.ones((N, N), bool))
  scores = np.where(seen, np.asarray(queries @ keys.T) / D_K**0.5, -np.inf)
  plain = scipy.special.softmax(scores, axis=1) @ np.asarray(values)
  age = np.subtract.outer(np.arange(N), np.arange(N))
  matrix = np.where(age > 0, decay ** np.maximum(age, 1.0), 0)
  atol = tolerances.IDENTITY[jnp.dtype(dtype).name]
  np.testing.assert_allclose(
    full, plain + matrix @ np.asarray(values), atol=10 * atol
  )


def test_no_momentum_is_plain_attention_bit_for_bit():
  queries, keys, values = stream()

  @jax.jit  # One program as well: another one may round otherwise.
  @jax.vmap
  def plain(query, mask):
    return attention.softmax_attention(query, keys, values, mask=mask)

  ours = account.momentum_attention(queries, keys, values, decay=0.0)
  np.testing.assert_array_equal(ours, plain(queries, jnp.tri(N, dtype=bool)))


def test_momentum_attention_sees_no_future():
  queries, keys, values = stream()
  run = jax.jit(functools.partial(account.momentum_attention, decay=0.5))
  before = run(queries, keys, values)
  after = run(*(x.at[5].add(100.0) for x in (queries, keys, values)))
  np.testing.assert_array_equal(after[:5], before[:5])
  assert jnp.all(jnp.max(jnp.abs(after[5:] - before[5:]), axis=1) > 0.1)


def test_heads_learn_their_own_decay():
  queries, keys, values = stream()
  decays = jnp.array([0.0, 0.5])

  def total(decays):
    heads = jax.vmap(
      lambda decay: account.momentum_attention(
        queries, keys, values, decay=decay
      )
    )
    return jnp.sum(heads(decays), axis=(1, 2))

  outputs = jax.jit(total)(decays)
  slopes = jnp.diag(jax.jit(jax.jacfwd(total))(decays))
  more = jax.jit(total)(decays + 1e-6)
  np.testing.assert_allclose((more - outputs) / 1e-6, slopes, rtol=1e-4)
  assert jnp.all(jnp.isfinite(slopes))


def noisy(scale, shrink=0.0):
  """Unrelated updates of the same outputs: noise, and what both forget."""
  zero, one, two = draw(*[(DRAWS, WIDTH)] * 3)
  kept = (1 - shrink) * zero
  return kept + scale * one, kept + scale * two, zero


@pytest.mark.parametrize('variance', [0.1, 1.0, 10.0])
def test_normalising_first_makes_noise_look_alike(variance):
  outputs = noisy(variance**0.5)
  expected = (1 - 1 / (1 + variance) ** 0.5) / 2
  biased = jax.vmap(metrics.normalised_update_similarity)(*outputs)
  np.testing.assert_allclose(jnp.mean(biased), expected, atol=0.01)
  for metric in (metrics.update_similarity, metrics.partial_update_similarity):
    np.testing.assert_allclose(
      jnp.mean(jax.vmap(metric)(*outputs)), 0, atol=0.01
    )


def test_a_shared_baseline_makes_updates_look_alike():
  outputs = noisy(0.2, shrink=0.5)
  raw = jax.vmap(metrics.update_similarity)(*outputs)
  expected = 0.25 / (0.25 + 0.04)
  np.testing.assert_allclose(jnp.mean(raw), expected, atol=0.01)
  partial = jax.vmap(metrics.partial_update_similarity)(*outputs)
  np.testing.assert_allclose(jnp.mean(partial), 0, atol=0.01)


def test_equal_updates_score_one_and_no_update_is_undefined():
  after, _, zero = (x[0] for x in noisy(1.0))
  for metric in (
    metrics.update_similarity,
    metrics.normalised_update_similarity,
    metrics.partial_update_similarity,
  ):
    np.testing.assert_allclose(metric(after, after, zero), 1, rtol=1e-12)
    assert jnp.isnan(metric(after, zero, zero))
  heads = after.reshape(8, -1), zero.reshape(8, -1)
  np.testing.assert_allclose(
    metrics.map_similarity(heads[0], heads[0], heads[1]), 1
  )
  assert jnp.isnan(metrics.map_similarity(heads[0], heads[1], heads[1]))
  right = jnp.array([True, False, True])
  scores = metrics.recovery(right, right, ~right)
  assert scores.percent == 100
  assert jnp.isnan(metrics.recovery(right, right, right).percent)


def test_attention_maps_share_a_baseline_that_their_updates_do_not():
  zero, one, two = draw(*[(DRAWS, 4, 128)] * 3)
  variance = 0.49
  outputs = zero + variance**0.5 * one, zero + variance**0.5 * two
  raw = jax.vmap(metrics.map_similarity)(*outputs)
  np.testing.assert_allclose(jnp.mean(raw), 1 / (1 + variance), atol=0.01)
  change = jax.vmap(metrics.map_similarity)(*outputs, zero)
  np.testing.assert_allclose(jnp.mean(change), 0, atol=0.02)


def test_kendall_is_that_of_scipy():
  a, b = draw((20,), (20,))
  expected = scipy.stats.kendalltau(np.asarray(a), np.asarray(b)).statistic
  np.testing.assert_allclose(metrics.kendall(a, b), expected, atol=1e-15)
  assert metrics.kendall(a, -a) == -1
  # Ties count as neither: tau-a, not tau-b.
  np.testing.assert_allclose(
    metrics.kendall(jnp.array([1.0, 1, 2]), jnp.array([1.0, 2, 3])), 2 / 3
  )


def test_recovery_counts():
  in_context = jnp.array([True, True, False, False, True, True])
  finetuned = jnp.array([True, False, True, True, True, False])
  zero_shot = jnp.array([False, False, False, False, True, False])
  scores = metrics.recovery(in_context, finetuned, zero_shot)
  assert (int(scores.recovered), int(scores.gained)) == (1, 3)
  np.testing.assert_allclose(scores.percent, 100 / 3)
  np.testing.assert_allclose(scores.chance, 60)
  np.testing.assert_allclose(scores.percent - scores.chance, 100 / 3 - 60)
  null = jax.jit(functools.partial(metrics.recovery_null, num_draws=2000))(
    jax.random.key(0), in_context, finetuned, zero_shot
  )
  # Three of five, without replacement: variance (.6 * .4 / 3) * (2 / 4).
  sigma = 100 * (0.6 * 0.4 / 3 * 0.5) ** 0.5
  bound = tolerances.SIGMAS * sigma / 2000**0.5
  np.testing.assert_allclose(jnp.mean(null), scores.chance, atol=bound)
  np.testing.assert_allclose(jnp.std(null), sigma, rtol=0.1)


def test_nulls_tell_what_the_query_says_from_what_all_share():
  zero, own, noise = draw((16, 256), (16, 256), (16, 256))
  (shared,) = draw((256,), seed=1)
  both = shared[None] + 0.5 * own
  in_context, finetuned = zero + both, zero + both + 0.1 * noise
  similarity = metrics.update_similarity
  observed = jnp.mean(jax.vmap(similarity)(in_context, finetuned, zero))
  null = functools.partial(
    metrics.random_null, similarity=similarity, num_draws=30
  )
  options = {'in_context': in_context, 'finetuned': finetuned}
  random = jax.jit(lambda key: null(key, **options, zero_shot=zero))(
    jax.random.key(0)
  )
  permuted = jax.jit(
    lambda key: metrics.permuted_null(
      key, similarity, in_context, finetuned, zero, num_draws=30
    )
  )(jax.random.key(0))
  assert random.shape == permuted.shape == (30,)
  assert observed > 0.98
  np.testing.assert_allclose(jnp.mean(random), 0, atol=0.02)
  np.testing.assert_allclose(permuted, jnp.full(30, 0.8), atol=0.05)


def test_nobody_keeps_their_own_update_in_the_permuted_null():
  in_context = jnp.eye(5)
  zero = jnp.zeros_like(in_context)
  null = metrics.permuted_null(
    jax.random.key(0),
    metrics.update_similarity,
    in_context,
    in_context,
    zero,
    num_draws=50,
  )
  np.testing.assert_array_equal(null, jnp.zeros(50))


SIMILARITIES = {
  'update': metrics.update_similarity,
  'normalised': metrics.normalised_update_similarity,
  'partial': metrics.partial_update_similarity,
  'map update': lambda *x: metrics.map_similarity(*(y[None] for y in x)),
}


@pytest.mark.parametrize('name', SIMILARITIES)
@pytest.mark.parametrize(
  ('dtype', 'size', 'rtol'),
  [
    (jnp.float16, 1e3, 2e-2),
    (jnp.float32, 1e25, 1e-5),
    (jnp.float32, 1e-25, 1e-5),
  ],
)
def test_similarities_do_not_depend_on_the_size(name, dtype, size, rtol):
  activations = draw(*[(WIDTH,)] * 3)
  similarity = jax.jit(SIMILARITIES[name])
  found = similarity(*(jnp.asarray(size * x, dtype) for x in activations))
  assert found.dtype == dtype
  np.testing.assert_allclose(found, similarity(*activations), rtol=rtol)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.float32, jnp.float64])
def test_parallel_updates_have_no_partial_similarity(dtype):
  partial = jax.jit(jax.vmap(metrics.partial_update_similarity))
  rows = draw((50, WIDTH), dtype=dtype)[0]
  assert jnp.all(jnp.isnan(partial(2 * rows, 3 * rows, rows)))
  small, baseline = jnp.zeros_like(rows), jnp.zeros_like(rows).at[:, 0].set(1)
  small = small.at[:, 1].set(100 * jnp.finfo(dtype).eps)
  update = baseline + small
  np.testing.assert_allclose(partial(update, update, baseline), 1, rtol=1e-3)


def test_nulls_of_half_precision_are_finite():
  activations = draw((4, 512), (4, 512), (4, 512), dtype=jnp.float16)
  found = metrics.random_null(
    jax.random.key(0),
    metrics.update_similarity,
    *(100 * x for x in activations),
    num_draws=2,
  )
  assert jnp.all(jnp.isfinite(found))


def test_ranks_of_many_tokens_do_not_overflow():
  order = jnp.arange(400).astype(jnp.float16)
  assert metrics.kendall(order, order) == 1
  assert metrics.kendall(order, order).dtype == jnp.float16


QUERIES, KEYS, VALUES = stream()
TOKENS, *PROJECTIONS = draw((M, D), (D, D_K), (D, D_V))
HEAD, RIGHT = account.Head(*PROJECTIONS), jnp.array([True, False])
ONES = [jnp.ones((2, 3))] * 3
PERMUTED = functools.partial(
  metrics.permuted_null, jax.random.key(0), metrics.update_similarity
)


def attend(queries=QUERIES, decay=0.1):
  return account.momentum_attention(queries, KEYS, VALUES, decay=decay)


@pytest.mark.parametrize(
  ('message', 'call'),
  [
    ('decay is 1.0; expected .* >= 0 and < 1', lambda: attend(decay=1.0)),
    (r'decay is -0\.1', lambda: account.momentum_values(VALUES, decay=-0.1)),
    ('queries and keys disagree in N: 8 and 9', lambda: attend(QUERIES[1:])),
    ('num_query_tokens is 9 of 9', lambda: account.softmax_mix(
      QUERIES[0], KEYS, VALUES, num_query_tokens=N)),
    ('tokens and head.keys disagree in d: 6 and 7',
     lambda: account.finetuned_update(TOKENS[:, 1:], HEAD, HEAD)),
    ('head.keys and changes.keys disagree in d_k: 5 and 3',
     lambda: account.finetuned_update(
       TOKENS, HEAD, account.Head(*HEAD[::-1]))),
    ('head is a tuple',
     lambda: account.finetuned_update(TOKENS, tuple(HEAD), HEAD)),
    ('zero_shot has dtype float64; expected booleans',
     lambda: metrics.recovery(RIGHT, RIGHT, VALUES[:2, 0])),
    (r'finetuned has shape \[1\]; expected \[2\]: Q is 2',
     lambda: metrics.recovery(RIGHT, RIGHT[1:], RIGHT)),
    ('in_context and zero_shot disagree in d: 3 and 5',
     lambda: metrics.update_similarity(VALUES[0], VALUES[0], QUERIES[0])),
    ('at least two', lambda: metrics.kendall(jnp.ones(1), jnp.ones(1))),
    ('in_context has 1 query',
     lambda: PERMUTED(*[VALUES[:1]] * 3, num_draws=1)),
    ('num_draws is 0', lambda: PERMUTED(*[VALUES] * 3, num_draws=0)),
    ('activations disagree',
     lambda: PERMUTED(VALUES, VALUES, KEYS, num_draws=1)),
    ('similarity is a str', lambda: metrics.random_null(
      jax.random.key(0), 'cos', *ONES, num_draws=2)),
  ],
)  # fmt: skip
def test_bad_input_is_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
