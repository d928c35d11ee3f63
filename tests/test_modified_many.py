"""Every modified attention, by every door, beside two oracles.

NumPy on whole matrices, which shares no code with the package; and the door of
one query, under `jax.vmap`. A new modification is one line in `CASES`.
"""

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import attention, features, kernels, losses, modified
from tests import oracles, tolerances

N, D, D_V, R = 7, 4, 3, 8
CHUNK = 3  # Chunks and a rest.
EVERYBODY, NOBODY = np.ones(N, bool), np.zeros(N, bool)
MASK = np.array([True, True, False, True, True, False, True])
PROJECTION = np.random.default_rng(0).standard_normal((R, D))
WEIGHTS = np.random.default_rng(5).standard_normal((N, D_V))
MAPS: dict[str, Any] = {
  'positive': (
    features.PositiveFeatures(jnp.asarray(PROJECTION)),
    oracles.feature_kernel(
      functools.partial(oracles.positive_features, PROJECTION)
    ),
  ),
  'trigonometric': (
    features.TrigonometricFeatures(jnp.asarray(PROJECTION) / 2),
    oracles.feature_kernel(
      functools.partial(oracles.trigonometric_features, PROJECTION / 2)
    ),
  ),
  'elu': (
    features.EluPlusOneFeatures(),
    oracles.feature_kernel(oracles.elu_plus_one_features),
  ),
  'softmax': (kernels.ExponentialKernel(), oracles.exponential_kernel),
  'truncated': (
    oracles.truncated_exponential(2),
    functools.partial(oracles.truncated_exponential_kernel, 2),
  ),
}
POSITIVE, SOFTMAX = MAPS['positive'][0], MAPS['softmax'][0]


# What a modification does to a matrix `A` of attention weights, in NumPy:
# `(A, V, visible [N, N]) -> [N, d_v]`.


def chosen_negatives(weights, visible, k):
  """Row by row the k lowest of the others, by sorting; one stays out."""
  chosen = np.zeros(weights.shape, bool)
  for j, row in enumerate(weights):
    allowed = [i for i in range(len(row)) if i != j and visible[j, i]]
    order = sorted(allowed, key=lambda i: (row[i], i))
    chosen[j, order[: min(k, visible[j].sum() - 1)]] = True
  return chosen


def equal_parts(total, among):
  return total * among / np.maximum(among.sum(1, keepdims=True), 1)


def negative_matrix(weights, values, visible):
  chosen = chosen_negatives(weights, visible, 2)
  raised = np.where(chosen.any(1)[:, None], visible & ~chosen, False)
  change = equal_parts(0.3, raised) - equal_parts(0.3, chosen)
  return (weights + change) @ values


def token_negative_matrix(weights, values, visible):
  mixing = equal_parts(0.3, chosen_negatives(weights, visible, 2))
  return weights @ (values - mixing @ values)


def second_step_outputs(kernel, queries, keys, values, visible):
  """Row by row: labels that attention has not learnt, read at the keys."""

  def attend(queries, seen, labels):
    scores = np.array([[kernel(k, q) for k in keys] for q in queries]) * seen
    return scores @ labels / scores.sum(1, keepdims=True)

  rows = []
  for query, seen in zip(queries, visible, strict=True):
    left = values - attend(keys, seen, values)
    rows.append(attend(query[None], seen, 1.2 * values + 0.7 * left)[0])
  return np.stack(rows)


@dataclasses.dataclass(frozen=True)
class Case:
  """A modification, its matrix form, and the query side of one query."""

  attend: modified.Attention
  matrix: Callable[..., Any]
  num_query_tokens: int | None = 1
  left_of_one: float = 1.0  # Of the value of a token that is alone.


CASES = {
  'regularised': Case(
    modified.regularised(strength=0.35),
    lambda weights, values, _: (
      (weights - 0.35 * np.diag(np.diag(weights))) @ values
    ),
    left_of_one=0.65,
  ),
  'printed': Case(
    modified.regularised_as_printed(strength=0.7),
    lambda weights, values, _: weights @ values - 0.7 * values,
    left_of_one=0.3,
  ),
  'augmented': Case(
    modified.augmented(
      augment_keys=lambda key: 2 * key, augment_values=jnp.tanh
    ),
    lambda weights, values, _: weights @ np.tanh(values),
  ),
  'negatives': Case(
    modified.negative(num_negatives=2, strength=0.3), negative_matrix
  ),
  'token negatives': Case(
    modified.token_negative(num_negatives=2, strength=0.3),
    token_negative_matrix,
    num_query_tokens=None,  # One query does not bring the others.
  ),
  'second step': Case(
    modified.second_step(learning_rate=0.7, momentum=0.2),
    second_step_outputs,
    num_query_tokens=0,
    left_of_one=1.2,
  ),
  'loss': Case(
    modified.attention_from_loss(losses.squared, learning_rate=0.6),
    lambda weights, values, _: 0.6 * weights @ values,
    num_query_tokens=0,
    left_of_one=0.6,
  ),
}
DOORS = pytest.mark.parametrize('door', ['stream', 'causal'])
BOTH_MAPS = pytest.mark.parametrize('name', ['positive', 'softmax'])
ALL_CASES = pytest.mark.parametrize('case', sorted(CASES))
A_FEW = pytest.mark.parametrize(
  'case', ['regularised', 'negatives', 'token negatives']
)


def draw(seed=0, size=N, scale=1.0, dtype='float64'):
  """Queries, keys, values."""
  generator = np.random.default_rng(seed)
  rows = [generator.standard_normal((size, d)) for d in (D, D, D_V)]
  return tuple(
    (scale * rows[i] if i < 2 else rows[i]).astype(dtype) for i in range(3)
  )


def cast(phi, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), phi)


def with_slopes(fn, arrays):
  """Outputs, and the gradient of a weighted sum of them."""

  def total(arrays):
    output = fn(*arrays)
    return jnp.sum(jnp.asarray(WEIGHTS) * output), output

  slopes, output = jax.grad(total, has_aux=True)(arrays)
  return output, slopes


@functools.partial(jax.jit, static_argnames=('fn', 'chunk_size'))
def answer(fn, phi, queries, keys, values, mask=None, *, chunk_size=CHUNK):
  return fn(phi, queries, keys, values, mask=mask, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames=('case', 'door'))
def all_rows(case, door, phi, arrays, mask):
  """Outputs and gradients; one compilation serves every mask and norm."""
  # Streams in one chunk compile in half the time.
  chunk_size = CHUNK if door == 'causal' else N
  fn = getattr(CASES[case].attend, door)
  return with_slopes(
    lambda *arrays: fn(phi, *arrays, mask=mask, chunk_size=chunk_size), arrays
  )


@functools.partial(jax.jit, static_argnames=('attend', 'num_query_tokens'))
def one_by_one(attend, num_query_tokens, phi, arrays, visible):
  """The door of one query, each token brought to the end, with gradients."""

  def rows(queries, keys, values):
    def row(query, j, visible):
      order = (jnp.arange(N) + j + 1) % N
      return attend(
        phi,
        query,
        keys[order],
        values[order],
        num_query_tokens=num_query_tokens,
        mask=visible[order],
      )

    return jax.vmap(row)(queries, jnp.arange(N), visible)

  return with_slopes(rows, tuple(map(jnp.asarray, arrays)))


def visible_by(door, mask):
  seen = np.broadcast_to(mask, (N, N))
  return np.tril(seen) if door == 'causal' else seen


def matrix(name, queries, keys, visible):
  """Attention weights `[N, N]` in NumPy; what is not visible is zero."""
  kernel = MAPS[name][1]
  scores = np.array([[kernel(key, query) for key in keys] for query in queries])
  scores = scores * visible
  return scores / scores.sum(1, keepdims=True)


def expected_of(case, door, name, arrays, mask):
  queries, keys, values = (np.asarray(x, 'float64') for x in arrays)
  keys, values = (np.where(mask[:, None], x, 0) for x in (keys, values))
  visible = visible_by(door, mask)
  if case == 'augmented':
    keys = 2 * keys
  if case == 'second step':
    kernel, form = MAPS[name][1], CASES[case].matrix
    return form(kernel, queries, keys, values, visible)
  weights = matrix(name, queries, keys, visible)
  return CASES[case].matrix(weights, values, visible)


def compare(found, expected, name='positive', dtype='float64'):
  """The trigonometric map cancels; its rounding is that of its products."""
  tolerance = tolerances.IDENTITY[dtype]
  tolerance *= 100 if name == 'trigonometric' else 1
  assert found.dtype == dtype
  found, expected = (np.asarray(x, 'float64') for x in (found, expected))
  scale = np.max(np.abs(expected))
  assert np.max(np.abs(found - expected)) <= tolerance * max(scale, 1)


@BOTH_MAPS
@DOORS
@ALL_CASES
def test_every_door_is_the_matrix_form_and_the_door_of_one_query(
  case, door, name
):
  phi, attend = MAPS[name][0], CASES[case].attend
  for mask in (EVERYBODY, MASK):
    queries, *tokens = draw()
    hidden = [np.where(mask[:, None], x, np.nan) for x in tokens]
    found, slopes = all_rows(case, door, phi, (queries, *hidden), mask)
    expected = expected_of(case, door, name, (queries, *hidden), mask)
    compare(found, expected, name)
    for slope in slopes[1:]:
      np.testing.assert_array_equal(slope[~mask], 0)
    count = CASES[case].num_query_tokens
    if count is None or (case, name) == ('augmented', 'softmax'):
      continue
    visible = visible_by(door, mask)
    one = one_by_one(attend, count, phi, draw(), visible)
    compare(found, one[0], name)
    for slope, by_hand in zip(slopes, one[1], strict=True):
      assert np.any(by_hand != 0)
      np.testing.assert_allclose(slope, by_hand, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('name', ['trigonometric', 'elu', 'truncated'])
@DOORS
@pytest.mark.parametrize('case', ['regularised', 'negatives'])
def test_other_maps_equal_the_matrix_form(name, door, case):
  fn, arrays = getattr(CASES[case].attend, door), draw()
  found = answer(fn, MAPS[name][0], *arrays)
  compare(found, expected_of(case, door, name, arrays, EVERYBODY), name)


@BOTH_MAPS
@pytest.mark.parametrize('case', ['regularised', 'negatives'])
def test_float32_equals_the_matrix_form(name, case):
  arrays = draw(dtype='float32')
  phi = cast(MAPS[name][0], 'float32')
  found = answer(CASES[case].attend.stream, phi, *arrays)
  expected = expected_of(case, 'stream', name, arrays, EVERYBODY)
  compare(found, expected, name, 'float32')


@BOTH_MAPS
def test_token_negatives_need_the_query_of_every_token(name):
  phi, attend = MAPS[name][0], CASES['token negatives'].attend
  queries, keys, values = draw()
  with pytest.raises(ValueError, match=r'query is one; .* Call stream'):
    attend(phi, queries[0], keys, values)


@pytest.mark.parametrize(
  ('rule', 'select'),
  [
    ('unnormalised', 'lowest_scores'),
    ('scale_others', 'highest_scores'),
  ],
)
def test_every_rule_and_selection_passes_through(rule, select):
  attend = modified.negative(
    num_negatives=2,
    strength=0.3,
    renormalise=getattr(modified, rule),
    select=getattr(modified, select),
  )
  arrays, visible = draw(1), visible_by('stream', EVERYBODY)
  expected, _ = one_by_one(attend, 1, SOFTMAX, arrays, visible)
  compare(answer(attend.stream, SOFTMAX, *arrays), expected)


def test_candidates_are_the_callers():
  attend = modified.negative(
    num_negatives=2,
    strength=0.3,
    candidates_fn=lambda j, i: (i < 3) & (i != j),
  )
  queries, keys, values = draw()
  found = answer(attend.stream, SOFTMAX, queries, keys, values)
  visible = visible_by('stream', EVERYBODY)
  weights = matrix('softmax', queries, keys, visible)
  first = visible & (np.arange(N) < 3)[None]
  chosen = chosen_negatives(weights, first, 2)
  change = equal_parts(0.3, ~chosen) - equal_parts(0.3, chosen)
  compare(found, (weights + change) @ values)


def test_views_may_change_the_width_of_values_and_queries_may_be_fewer():
  attend = modified.augmented(augment_values=lambda v: jnp.tanh(v)[:2])
  queries, keys, values = draw()
  found = answer(attend.stream, POSITIVE, queries[:4], keys, values, MASK)
  assert found.shape == (4, 2)
  expected = attend(POSITIVE, queries[3], keys, values, mask=MASK)
  compare(found[3], expected)


# Settings that are numbers are leaves: a sweep is one `vmap`.

SWEEPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
  'regularised': (lambda x: modified.regularised(strength=x), (0.5, -0.5)),
  'printed': (
    lambda x: modified.regularised_as_printed(strength=x),
    (0.5, -0.5),
  ),
  'both forms': (
    lambda x: modified.Regularised(decay=x, residual=0.1 - x),
    (0.5, -0.5),
  ),
  'strength': (
    lambda x: modified.negative(num_negatives=2, strength=x),
    (0.5, 0.1),
  ),
  'counts': (
    lambda k: modified.negative(num_negatives=k, strength=0.3),
    (0, 1, 3, 99),
  ),
  'counts of tokens': (
    lambda k: modified.token_negative(num_negatives=k, strength=0.3),
    (0, 1, 3, 99),
  ),
  'loss': (
    lambda x: modified.attention_from_loss(losses.squared, learning_rate=x),
    (0.5, 2.0),
  ),
  'views': (
    lambda x: modified.augmented(
      augment_values=jax.tree_util.Partial(jnp.multiply, jnp.asarray(x))
    ),
    (0.5, 2.0),
  ),
}


@pytest.mark.parametrize('case', sorted(SWEEPS))
def test_a_sweep_of_settings_is_a_vmap(case):
  make, values = SWEEPS[case]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(make, values))
  single = case != 'counts of tokens'

  def both(attend, arrays, mask):
    queries, keys, labels = arrays
    many = attend.stream(POSITIVE, *arrays, mask=mask)
    if not single:
      return many, many
    one = attend(POSITIVE, queries[0], keys, labels, num_query_tokens=1)
    return many, one

  for mask in (None, MASK):
    swept = jax.jit(jax.vmap(both, (0, None, None)))(stacked, draw(), mask)
    for i, value in enumerate(values):
      expected = jax.jit(functools.partial(both, make(value)))(draw(), mask)
      for found, by_hand in zip(swept, expected, strict=True):
        compare(found[i], by_hand)


# Causal rows.


@pytest.mark.parametrize('case', ['regularised', 'augmented', 'negatives'])
def test_causal_rows_before_the_first_visible_key_are_zero(case):
  mask = np.arange(N) >= 3
  found, _ = all_rows(case, 'causal', POSITIVE, draw(), mask)
  np.testing.assert_array_equal(found[:3], 0)
  assert np.all(found[3:] != 0)


def test_causal_own_score_survives_keys_that_rise_steeply():
  """Pairs of equal keys, each pair beyond the exponents of the one before."""
  queries, _, values = draw()
  keys = np.repeat(np.arange(4.0) + 1, 2)[:N, None] * np.ones((1, D))
  phi = features.PositiveFeatures(jnp.full((R, D), 400.0))
  attend = modified.regularised(strength=0.5)
  found = answer(attend.causal, phi, queries, keys, values)
  # The first of a pair has weight 1 on itself, the second 1/2 on each.
  expected = values / 2
  expected[1::2] = values[1::2] / 4 + values[: N - 1 : 2] / 2
  compare(found, expected)


# Properties of all of them.

NEUTRAL = {
  'regularised': modified.regularised(strength=0.0),
  'printed': modified.regularised_as_printed(strength=0.0),
  'augmented': modified.augmented(),
  'no token negatives': modified.token_negative(num_negatives=0, strength=0.5),
  'weak token negatives': modified.token_negative(
    num_negatives=2, strength=0.0
  ),
}


@pytest.mark.parametrize('case', sorted(NEUTRAL))
@pytest.mark.parametrize('door', ['stream', 'causal'])
def test_neutral_settings_are_plain_attention_to_the_bit(case, door):
  plain = answer(
    getattr(attention, f'{door}_kernel_attention'), POSITIVE, *draw()
  )
  found = answer(getattr(NEUTRAL[case], door), POSITIVE, *draw())
  np.testing.assert_array_equal(found, plain)


@DOORS
@pytest.mark.parametrize('settings', [(2, 0.0), (0, 0.5)])
def test_neutral_negatives_are_plain_attention(door, settings):
  k, strength = settings
  attend = modified.negative(num_negatives=k, strength=strength)
  plain = answer(
    getattr(attention, f'{door}_kernel_attention'), POSITIVE, *draw()
  )
  compare(answer(getattr(attend, door), POSITIVE, *draw()), plain)


@DOORS
@A_FEW
def test_chunks_heads_and_single_tokens(case, door):
  fn, heads = getattr(CASES[case].attend, door), [draw(0), draw(1)]
  alone = [answer(fn, POSITIVE, *head, chunk_size=N) for head in heads]
  stacked = tuple(np.stack(x) for x in zip(*heads, strict=True))
  chunked = functools.partial(fn, POSITIVE, chunk_size=CHUNK)
  for found, expected in zip(
    jax.jit(jax.vmap(chunked))(*stacked), alone, strict=True
  ):
    compare(found, expected)
  arrays = draw(size=1)
  found = answer(fn, POSITIVE, *arrays)
  left = CASES[case].left_of_one
  np.testing.assert_allclose(found, left * arrays[2], rtol=1e-12)


def test_chunks_do_not_matter_to_gradients():
  fn = CASES['regularised'].attend.stream
  _, expected = all_rows('regularised', 'stream', POSITIVE, draw(), EVERYBODY)
  chunked = functools.partial(fn, POSITIVE, chunk_size=CHUNK)
  by_chunks = jax.jit(lambda arrays: with_slopes(chunked, arrays)[1])
  for found, slope in zip(by_chunks(draw()), expected, strict=True):
    np.testing.assert_allclose(found, slope, rtol=1e-9, atol=1e-12)


@DOORS
@ALL_CASES
def test_huge_norms_are_finite_and_nobody_is_zero_with_gradients(case, door):
  huge = all_rows(case, door, POSITIVE, draw(scale=100.0), MASK)
  for leaf in jax.tree.leaves(huge):
    assert np.all(np.isfinite(leaf))
  found, slopes = all_rows(case, door, POSITIVE, draw(), NOBODY)
  for leaf in jax.tree.leaves((found, slopes)):
    np.testing.assert_array_equal(leaf, 0)


# Choosing.


@pytest.mark.parametrize('size', [1, 2, 17, 50])
def test_selection_in_two_levels_and_by_rank_is_sorting(size):
  """Few distinct weights, so that most choices are ties."""
  generator = np.random.default_rng(size)
  weights = generator.integers(0, 4, (20, size)).astype(float)
  candidates = generator.random((20, size)) < 0.7
  count = min(5, size)

  def choose(count):
    return jax.jit(jax.vmap(lambda w, c: modified.lowest_scores(w, c, count)))(
      weights, candidates
    )

  for found in (choose(count), choose(jnp.asarray(count))):
    for row, allowed, chosen in zip(weights, candidates, found, strict=True):
      order = sorted(np.flatnonzero(allowed), key=lambda i: (row[i], i))
      expected = sorted(order[:count])
      np.testing.assert_array_equal(np.flatnonzero(chosen), expected)


def test_nothing_of_size_n_squared_is_held():
  """Temporary memory of the negatives: blocks of scores, and the features."""
  size = 512
  arrays = draw(size=size)
  fn = modified.negative(num_negatives=3, strength=0.1).stream
  compiled = (
    jax.jit(lambda *x: fn(POSITIVE, *x, chunk_size=8)).lower(*arrays).compile()
  )
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < size * size * 8 / 4


@DOORS
@ALL_CASES
def test_bad_input_names_the_argument(case, door):
  fn, (queries, keys, values) = getattr(CASES[case].attend, door), draw()
  own = 'augmented', 'loss', 'second step'  # Queries of their own.
  if door == 'causal' or case not in own:
    with pytest.raises(ValueError, match='queries and keys disagree in N'):
      fn(POSITIVE, queries[:3], keys, values)
  with pytest.raises(ValueError, match='chunk_size'):
    fn(POSITIVE, queries, keys, values, chunk_size=0)
  with pytest.raises(ValueError, match='mask'):
    fn(POSITIVE, queries, keys, values, mask=MASK[:3])


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: modified.regularised(strength=np.nan), 'strength is nan'),
    (
      lambda: modified.regularised_as_printed(strength='x'),
      "strength is 'x'; expected a finite number",
    ),
    (
      lambda: modified.negative(num_negatives=-1, strength=0.1),
      'num_negatives is -1; expected an integer >= 0',
    ),
    (
      lambda: modified.negative(num_negatives=1.5, strength=0.1),
      r'num_negatives is 1\.5; expected an integer >= 0',
    ),
    (
      lambda: modified.negative(num_negatives=jnp.array(1.5), strength=0.1),
      r'num_negatives is .*1\.5.*; expected an integer >= 0',
    ),
    (
      lambda: modified.token_negative(num_negatives=1, strength=jnp.ones(2)),
      r'strength has shape \[2\]; expected a scalar',
    ),
  ],
)
def test_bad_settings_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_numpy_rows_are_taken():
  phi, arrays = MAPS['elu'][0], draw()
  for name in ('regularised', 'printed'):
    attend = CASES[name].attend
    np.testing.assert_allclose(
      attend.stream(phi, *arrays),
      attend.stream(phi, *map(jnp.asarray, arrays)),
    )


def test_other_answers_check_their_counts():
  queries, keys, _ = draw()
  push = modified.negative(num_negatives=1, strength=0.1)
  for count in (-1, N + 1):
    with pytest.raises(ValueError, match=f'num_query_tokens is {count}'):
      push.change(SOFTMAX, queries[0], keys, num_query_tokens=count)


@pytest.mark.parametrize('door', ['stream', 'causal'])
def test_a_loss_with_a_ridge_is_its_loss_under_jit(door):
  arrays = draw()
  plain = modified.attention_from_loss(losses.squared)
  attend = modified.attention_from_loss(
    losses.squared, penalty=losses.ridge(0.5)
  )
  found = jax.jit(functools.partial(getattr(attend, door), SOFTMAX))(*arrays)
  expected = getattr(plain, door)(SOFTMAX, *arrays)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize('door', ['stream', 'causal'])
def test_a_loss_can_be_spread_over_a_mesh(door):
  arrays = [jnp.stack([array] * 2) for array in draw()]
  attend = modified.attention_from_loss(losses.squared)
  fn = jax.vmap(functools.partial(getattr(attend, door), SOFTMAX))
  mesh, spec = jax.sharding.Mesh(jax.devices()[:1], 'heads'), jax.P('heads')
  spread = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)
  np.testing.assert_allclose(jax.jit(spread)(*arrays), fn(*arrays), rtol=1e-12)


def test_attentions_can_be_pickled():
  for attend in (
    modified.augmented(),
    modified.negative(num_negatives=1, strength=0.1),
    modified.attention_from_loss(losses.squared),
  ):
    copy = pickle.loads(pickle.dumps(attend))
    assert jax.tree.structure(copy) == jax.tree.structure(attend)


def test_what_a_caller_s_function_returns_is_checked():
  arrays = draw()
  views = modified.augmented(augment_values=lambda row: row > 0)
  with pytest.raises(ValueError, match=r'dtypes disagree .*augment_values: bo'):
    views.stream(POSITIVE, *arrays)
  push = modified.negative(
    num_negatives=1, strength=0.1, renormalise=lambda weights, *_: weights[0]
  )
  with pytest.raises(ValueError, match='renormalise returned'):
    push.stream(POSITIVE, *arrays)


@pytest.mark.parametrize('phi', [SOFTMAX, features.EluPlusOneFeatures])
def test_only_a_feature_map_has_a_kernel(phi):
  with pytest.raises(ValueError, match='phi is'):
    features.FeatureKernel(phi)


def triplet(predictions, values):
  """Each row is pushed from the value of the next."""
  other = jnp.sum(predictions * (jnp.roll(values, 1, axis=0) - values), axis=1)
  return jnp.sum(jax.nn.softplus(1 + other))


@pytest.mark.parametrize('loss', [losses.info_nce(0.7), triplet])
@pytest.mark.parametrize(
  'phi', [kernels.ExponentialKernel(), features.EluPlusOneFeatures()]
)
def test_a_loss_that_is_no_sum_is_causal_by_its_prefixes(loss, phi):
  size = 5
  rng = np.random.default_rng(0)
  queries, keys = jnp.asarray(rng.normal(size=(2, size, 3)))
  values = jnp.asarray(rng.normal(size=(size, 2)))
  attend = modified.attention_from_loss(loss)
  found = jax.jit(attend.causal)(phi, queries, keys, values)
  for n in range(1, size + 1):
    expected = attend(phi, queries[n - 1], keys[:n], values[:n])
    np.testing.assert_allclose(found[n - 1], expected, rtol=1e-11, atol=1e-12)
  mask = jnp.arange(size) != 2
  if loss is triplet:
    with pytest.raises(ValueError, match=r'a keyword mask \[N\]'):
      attend.causal(phi, queries, keys, values, mask=mask)
    return
  masked = attend.causal(phi, queries, keys, values, mask=mask, chunk_size=2)
  alone = attend.causal(phi, queries[mask], keys[mask], values[mask])
  np.testing.assert_allclose(masked[mask], alone, rtol=1e-11, atol=1e-12)
  streamed = attend.stream(phi, queries, keys, values, mask=mask)
  alone = attend.stream(phi, queries, keys[mask], values[mask])
  np.testing.assert_allclose(streamed, alone, rtol=1e-11, atol=1e-12)
