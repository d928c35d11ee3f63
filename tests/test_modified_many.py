"""Modified attention of all tokens: one query at a time, and all by matrices.

Two oracles. `jax.vmap` of the one-query functions, with the same feature map;
and NumPy on whole matrices, which shares no code with the package.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import attention, features, kernels, modified
from tests import oracles, tolerances

N, D, D_V, R = 7, 4, 3, 8
CHUNK = 3  # Chunks and a rest.
MASK = np.array([True, True, False, True, True, False, True])
PROJECTION = np.random.default_rng(0).standard_normal((R, D))


def positive():
  return features.PositiveFeatures(jnp.asarray(PROJECTION))


MAPS = {
  'positive': positive(),
  'trigonometric': features.TrigonometricFeatures(jnp.asarray(PROJECTION) / 2),
  'elu': features.EluPlusOneFeatures(),
  'softmax': kernels.ExponentialKernel(),
  'polynomial': kernels.PolynomialKernel(degree=2, offset=1.0),
}
KERNELS = {
  'positive': oracles.feature_kernel(
    functools.partial(oracles.positive_features, PROJECTION)
  ),
  'trigonometric': oracles.feature_kernel(
    functools.partial(oracles.trigonometric_features, PROJECTION / 2)
  ),
  'elu': oracles.feature_kernel(oracles.elu_plus_one_features),
  'softmax': oracles.exponential_kernel,
  'polynomial': functools.partial(oracles.polynomial_kernel, 2, 1.0),
}


def draw(seed=0, size=N, scale=1.0, dtype='float64'):
  """Queries, keys, values."""
  generator = np.random.default_rng(seed)
  rows = [generator.standard_normal((size, d)) for d in (D, D, D_V)]
  return tuple(
    (scale * rows[i] if i < 2 else rows[i]).astype(dtype) for i in range(3)
  )


def cast(phi, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), phi)


# The functions under test, each with its one-query twin `(phi, q, k, v, j,
# mask)` at token j, and its matrix form `(A, V, mask)`.


def last(fn):
  """One query whose token is brought to the end: the query side of one."""

  def twin(phi, query, keys, values, j, mask):
    order = (jnp.arange(N) + j + 1) % N
    mask = None if mask is None else jnp.asarray(mask)[order]
    return fn(phi, query, keys[order], values[order], mask=mask)

  return twin


def others(fn, **settings):
  def twin(phi, query, keys, values, j, mask):
    candidates = jnp.arange(N) != j
    return fn(
      phi, query, keys, values, candidates=candidates, mask=mask, **settings
    )

  return twin


def strict_matrix(weights, values, mask):
  return (weights - 0.35 * np.diag(np.diag(weights))) @ values


def printed_matrix(weights, values, mask):
  return weights @ values - 0.7 * values


def chosen_negatives(weights, mask, k):
  """Row by row the k lowest of the other visible tokens, by sorting."""
  chosen = np.zeros(weights.shape, bool)
  for j, row in enumerate(weights):
    allowed = [i for i in range(len(row)) if i != j and mask[i]]
    chosen[j, sorted(allowed, key=lambda i: (row[i], i))[:k]] = True
  return chosen


def negative_matrix(weights, values, mask):
  chosen = chosen_negatives(weights, mask, 2)
  rest = mask[None] & ~chosen
  raised = 0.3 * rest / rest.sum(1, keepdims=True)
  lowered = 0.3 * chosen / chosen.sum(1, keepdims=True)
  return (weights - lowered + raised) @ values


def token_negative_matrix(weights, values, mask):
  chosen = chosen_negatives(weights, mask, 2)
  mixing = 0.3 * chosen / chosen.sum(1, keepdims=True)
  return weights @ (values - mixing @ values)


RIDGE = {'strength': 0.7, 'learning_rate': 0.5}
PUSHED = {'num_negatives': 2, 'strength': 0.3}
CASES = {
  'regularised': (
    functools.partial(modified.stream_regularised_attention, **RIDGE),
    last(functools.partial(modified.regularised_attention, **RIDGE)),
    strict_matrix,
  ),
  'printed': (
    functools.partial(
      modified.stream_regularised_attention_as_printed, strength=0.7
    ),
    last(
      functools.partial(modified.regularised_attention_as_printed, strength=0.7)
    ),
    printed_matrix,
  ),
  'negatives': (
    functools.partial(modified.stream_negative_attention, **PUSHED),
    others(modified.negative_attention, **PUSHED),
    negative_matrix,
  ),
  'token negatives': (
    functools.partial(modified.stream_token_negative_attention, **PUSHED),
    None,
    token_negative_matrix,
  ),
}
ALL_CASES = pytest.mark.parametrize('case', sorted(CASES))


WEIGHTS = np.random.default_rng(5).standard_normal((N, D_V))


@functools.partial(jax.jit, static_argnames=('fn', 'chunk_size'))
def answer(fn, phi, queries, keys, values, mask=None, *, chunk_size=CHUNK):
  return fn(phi, queries, keys, values, mask=mask, chunk_size=chunk_size)


def with_slopes(fn, arrays):
  """Outputs, and the gradient of a weighted sum of them."""

  def total(arrays):
    output = fn(*arrays)
    return jnp.sum(jnp.asarray(WEIGHTS) * output), output

  slopes, output = jax.grad(total, has_aux=True)(arrays)
  return output, slopes


@functools.partial(jax.jit, static_argnames='fn')
def masked_answer(fn, phi, arrays, mask):
  """Outputs and gradients; one compilation serves every mask and norm."""
  # Streams in one chunk compile in half the time.
  chunk_size = CHUNK if fn.func.__name__.startswith('causal') else N
  return with_slopes(
    lambda *arrays: fn(phi, *arrays, mask=mask, chunk_size=chunk_size), arrays
  )


@functools.partial(jax.jit, static_argnames='twin')
def one_by_one(twin, phi, arrays, mask):
  def rows(queries, keys, values):
    return jax.vmap(lambda query, j: twin(phi, query, keys, values, j, mask))(
      queries, jnp.arange(N)
    )

  return with_slopes(rows, tuple(map(jnp.asarray, arrays)))


def matrix(name, queries, keys, mask):
  """Attention weights `[N, N]` in NumPy; masked columns are zero."""
  kernel = KERNELS[name]
  scores = np.array([[kernel(key, query) for key in keys] for query in queries])
  scores = scores * mask[None]
  return scores / scores.sum(1, keepdims=True)


def compare(found, expected, name, dtype='float64'):
  """The trigonometric map cancels; its rounding is that of its products."""
  tolerance = tolerances.IDENTITY[dtype]
  tolerance *= 100 if name == 'trigonometric' else 1
  assert found.dtype == dtype
  found, expected = (np.asarray(x, 'float64') for x in (found, expected))
  scale = np.max(np.abs(expected))
  assert np.max(np.abs(found - expected)) <= tolerance * max(scale, 1)


BOTH = pytest.mark.parametrize('name', ['positive', 'softmax'])
EVERYBODY, NOBODY = np.ones(N, bool), np.zeros(N, bool)


def hide(keys, values, mask, by):
  return tuple(np.where(mask[:, None], x, by) for x in (keys, values))


@BOTH
@ALL_CASES
def test_equals_the_matrix_form(name, case):
  fn, _, form = CASES[case]
  queries, keys, values = draw()
  for mask in (EVERYBODY, MASK):
    arrays = queries, *hide(keys, values, mask, np.nan)
    found, slopes = masked_answer(fn, MAPS[name], arrays, mask)

    shown = hide(keys, values, mask, 0)
    weights = matrix(name, queries, shown[0], mask)
    compare(found, form(weights, shown[1], mask), name)
    for slope in slopes[1:]:
      np.testing.assert_array_equal(slope[~mask], 0)


@pytest.mark.parametrize('name', ['trigonometric', 'elu', 'polynomial'])
@pytest.mark.parametrize('case', ['regularised', 'negatives'])
def test_other_maps_equal_the_matrix_form(name, case):
  fn, _, form = CASES[case]
  queries, keys, values = draw()
  found = answer(fn, MAPS[name], queries, keys, values)
  weights = matrix(name, queries, keys, EVERYBODY)
  compare(found, form(weights, values, EVERYBODY), name)


@BOTH
@pytest.mark.parametrize('case', ['regularised', 'negatives'])
def test_float32_equals_the_matrix_form(name, case):
  fn, _, form = CASES[case]
  arrays = draw(dtype='float32')
  found = answer(fn, cast(MAPS[name], 'float32'), *arrays)
  queries, keys, values = (x.astype('float64') for x in arrays)
  expected = form(matrix(name, queries, keys, EVERYBODY), values, EVERYBODY)
  compare(found, expected, name, 'float32')


@BOTH
@pytest.mark.parametrize('case', ['regularised', 'printed', 'negatives'])
def test_equals_the_one_query_function_with_gradients(name, case):
  fn, twin, _ = CASES[case]
  for mask in (EVERYBODY, MASK):
    found = masked_answer(fn, MAPS[name], draw(), mask)
    expected = one_by_one(twin, MAPS[name], draw(), mask)
    compare(found[0], expected[0], name)
    for slope, by_hand in zip(found[1], expected[1], strict=True):
      assert np.any(by_hand != 0)
      np.testing.assert_allclose(slope, by_hand, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('name', ['positive', 'softmax'])
def test_token_negatives_are_plain_attention_with_their_labels(name):
  queries, keys, values = draw()
  phi = MAPS[name]
  fn, _, _ = CASES['token negatives']

  @jax.jit
  def by_labels(queries, keys, values):
    labels = modified.token_negative_labels(
      phi, queries, keys, values, **PUSHED
    )
    return jax.vmap(
      lambda query: attention.kernel_attention(phi, query, keys, labels)
    )(queries)

  found = answer(fn, phi, queries, keys, values)
  compare(found, by_labels(queries, keys, values), name)


@pytest.mark.parametrize(
  ('rule', 'select'),
  [
    ('unnormalised', 'lowest_scores'),
    ('scale_others', 'highest_scores'),
    ('divide_all', 'lowest_scores'),
  ],
)
def test_every_rule_and_selection_passes_through(rule, select):
  settings = PUSHED | {
    'renormalise': getattr(modified, rule),
    'select': getattr(modified, select),
  }
  fn = functools.partial(modified.stream_negative_attention, **settings)
  twin = others(modified.negative_attention, **settings)
  arrays, phi = draw(1), MAPS['softmax']
  expected, _ = one_by_one(twin, phi, arrays, EVERYBODY)
  compare(answer(fn, phi, *arrays), expected, 'softmax')


def test_candidates_are_the_callers():
  settings = PUSHED | {'candidates_fn': lambda j, i: (i < 3) & (i != j)}
  fn = functools.partial(modified.stream_negative_attention, **settings)
  queries, keys, values = draw()
  found = answer(fn, MAPS['softmax'], queries, keys, values)

  weights = matrix('softmax', queries, keys, np.ones(N, bool))
  hidden = np.where(np.arange(N)[None] < 3, weights, np.inf)
  chosen = chosen_negatives(hidden, np.arange(N) < 3, 2)
  rest = ~chosen
  weights = weights - 0.15 * chosen + 0.3 * rest / rest.sum(1, keepdims=True)
  compare(found, weights @ values, 'softmax')


GELU = {
  'augment_keys': jax.nn.gelu,
  'augment_values': lambda v: jnp.tanh(v)[:2],
}


@BOTH
def test_augmented_equals_the_one_query_function(name):
  fn = functools.partial(modified.stream_augmented_attention, **GELU)
  one = functools.partial(modified.augmented_attention, **GELU)
  queries, keys, values = draw()
  found = answer(fn, MAPS[name], queries[:4], keys, values, MASK)

  @jax.jit
  def by_vmap(queries):
    return jax.vmap(
      lambda query: one(MAPS[name], query, keys, values, mask=MASK)
    )(queries)

  assert found.shape == (4, 2)
  compare(found, by_vmap(queries[:4]), name)


# Causal forms.

CAUSAL = {
  'regularised': (
    functools.partial(modified.causal_regularised_attention, **RIDGE),
    strict_matrix,
  ),
  'printed': (
    functools.partial(
      modified.causal_regularised_attention_as_printed, strength=0.7
    ),
    printed_matrix,
  ),
  'augmented': (
    functools.partial(
      modified.causal_augmented_attention, augment_values=jnp.tanh
    ),
    lambda weights, values, mask: weights @ np.tanh(values),
  ),
}


@pytest.mark.parametrize('case', sorted(CAUSAL))
def test_causal_equals_the_lower_triangle(case):
  fn, form = CAUSAL[case]
  queries, keys, values = draw()
  for mask in (EVERYBODY, MASK):
    arrays = queries, *hide(keys, values, mask, np.nan)
    found, _ = masked_answer(fn, MAPS['positive'], arrays, mask)

    shown = hide(keys, values, mask, 0)
    weights = np.tril(matrix('positive', queries, shown[0], mask))
    weights /= weights.sum(1, keepdims=True)
    compare(found, form(weights, shown[1], mask), 'positive')


@pytest.mark.parametrize('case', ['regularised', 'augmented'])
def test_causal_rows_before_the_first_visible_key_are_zero(case):
  fn, mask = CAUSAL[case][0], np.arange(N) >= 3
  found, _ = masked_answer(fn, MAPS['positive'], draw(), mask)
  np.testing.assert_array_equal(found[:3], 0)
  assert np.all(found[3:] != 0)


def test_causal_own_score_survives_keys_that_rise_steeply():
  """Pairs of equal keys, each pair beyond the exponents of the one before."""
  queries, _, values = draw()
  keys = np.repeat(np.arange(4.0) + 1, 2)[:N, None] * np.ones((1, D))
  phi = features.PositiveFeatures(jnp.full((R, D), 400.0))
  fn = functools.partial(modified.causal_regularised_attention, strength=1.0)
  found = answer(fn, phi, queries, keys, values)
  # The first of a pair has weight 1 on itself, the second 1/2 on each.
  expected = np.zeros((N, D_V))
  expected[1::2] = values[: N - 1 : 2] / 2
  compare(found, expected, 'positive')


# Properties of all of them.

NEUTRAL = {
  'regularised': (modified.stream_regularised_attention, {'strength': 0.0}),
  'printed': (
    modified.stream_regularised_attention_as_printed,
    {'strength': 0.0},
  ),
  'augmented': (modified.stream_augmented_attention, {}),
  'token negatives': (
    modified.stream_token_negative_attention,
    {'num_negatives': 2, 'strength': 0.0},
  ),
  'no token negatives': (
    modified.stream_token_negative_attention,
    {'num_negatives': 0, 'strength': 0.5},
  ),
}


@pytest.mark.parametrize('case', sorted(NEUTRAL))
def test_neutral_settings_are_streamed_attention_to_the_bit(case):
  fn, settings = NEUTRAL[case]
  arrays, phi = draw(), positive()
  plain = answer(attention.stream_kernel_attention, phi, *arrays)
  found = answer(functools.partial(fn, **settings), phi, *arrays)
  np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize('settings', [(2, 0.0), (0, 0.5)])
def test_neutral_negatives_are_plain_attention(settings):
  k, strength = settings
  fn = functools.partial(
    modified.stream_negative_attention, num_negatives=k, strength=strength
  )
  arrays, phi = draw(), positive()
  plain = answer(attention.stream_kernel_attention, phi, *arrays)
  compare(answer(fn, phi, *arrays), plain, 'positive')


def test_neutral_causal_forms_are_causal_attention_to_the_bit():
  arrays, phi = draw(), positive()
  plain = answer(attention.causal_kernel_attention, phi, *arrays)
  for fn, settings in (
    (modified.causal_regularised_attention, {'strength': 0.0}),
    (modified.causal_regularised_attention_as_printed, {'strength': 0.0}),
    (modified.causal_augmented_attention, {}),
  ):
    found = answer(functools.partial(fn, **settings), phi, *arrays)
    np.testing.assert_array_equal(found, plain)


EVERY = {name: case[0] for name, case in CASES.items()} | {
  f'causal {name}': case[0] for name, case in CAUSAL.items()
}
EVERY['augmented'] = functools.partial(
  modified.stream_augmented_attention, augment_keys=jnp.tanh
)


A_FEW = pytest.mark.parametrize(
  'case', ['regularised', 'negatives', 'token negatives', 'causal regularised']
)


@pytest.mark.parametrize(
  'case', [case for case in sorted(EVERY) if not case.startswith('causal')]
)
def test_chunks_do_not_matter(case):
  arrays, phi = draw(), positive()
  expected, _ = masked_answer(EVERY[case], phi, arrays, EVERYBODY)
  compare(answer(EVERY[case], phi, *arrays), expected, 'positive')


def test_chunks_do_not_matter_to_gradients():
  arrays, phi, fn = draw(), positive(), EVERY['regularised']
  _, expected = masked_answer(fn, phi, arrays, EVERYBODY)
  chunked = functools.partial(fn, phi, chunk_size=CHUNK)
  by_chunks = jax.jit(lambda arrays: with_slopes(chunked, arrays)[1])
  for found, slope in zip(by_chunks(arrays), expected, strict=True):
    np.testing.assert_allclose(found, slope, rtol=1e-9, atol=1e-12)


@A_FEW
def test_one_token_keeps_what_the_formula_leaves(case):
  arrays = draw(size=1)
  left = 0.65 if 'regularised' in case else 1.0
  found = answer(EVERY[case], positive(), *arrays)
  np.testing.assert_allclose(found, left * arrays[2], rtol=1e-12)


@pytest.mark.parametrize('case', sorted(EVERY))
def test_huge_norms_stay_finite_with_gradients(case):
  result = masked_answer(EVERY[case], positive(), draw(scale=100.0), MASK)
  for leaf in jax.tree.leaves(result):
    assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize('case', sorted(EVERY))
def test_all_masked_rows_are_zero_with_zero_gradients(case):
  result = masked_answer(EVERY[case], positive(), draw(), NOBODY)
  for leaf in jax.tree.leaves(result):
    np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize('case', ['regularised', 'printed', 'augmented'])
def test_causal_gradients_are_those_of_the_dense_form(case):
  fn, phi = EVERY[f'causal {case}'], positive()

  def dense(queries, keys, values):
    rows = jax.vmap(lambda q: attention.scores(phi, q, keys)[0])(queries)
    rows = jnp.tril(rows)
    rows = rows / jnp.sum(rows, axis=1, keepdims=True)
    if case == 'augmented':
      return rows @ jnp.tanh(values)
    own = jnp.diag(rows)[:, None] * values
    return rows @ values - (
      0.35 * own if case == 'regularised' else 0.7 * values
    )

  _, slopes = masked_answer(fn, phi, draw(), EVERYBODY)
  by_hand = jax.jit(lambda arrays: with_slopes(dense, arrays)[1])
  for found, expected in zip(slopes, by_hand(draw()), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@A_FEW
def test_vmap_over_heads_is_the_loop(case):
  heads = [draw(seed) for seed in range(2)]
  stacked = tuple(np.stack(x) for x in zip(*heads, strict=True))
  fn = functools.partial(EVERY[case], positive(), chunk_size=CHUNK)
  found = jax.jit(jax.vmap(fn))(*stacked)
  for head, output in zip(heads, found, strict=True):
    compare(output, answer(EVERY[case], positive(), *head), 'positive')


@pytest.mark.parametrize('size', [1, 2, 17, 50])
def test_selection_in_two_levels_is_sorting(size):
  """Few distinct weights, so that most choices are ties."""
  generator = np.random.default_rng(size)
  weights = generator.integers(0, 4, (20, size)).astype(float)
  candidates = generator.random((20, size)) < 0.7
  count = min(5, size)
  found = jax.jit(jax.vmap(lambda w, c: modified.lowest_scores(w, c, count)))(
    weights, candidates
  )
  for row, allowed, chosen in zip(weights, candidates, found, strict=True):
    order = sorted(np.flatnonzero(allowed), key=lambda i: (row[i], i))
    np.testing.assert_array_equal(np.flatnonzero(chosen), sorted(order[:count]))


def test_nothing_of_size_n_squared_is_held():
  """Temporary memory of the negatives: blocks of scores, and the features."""
  size = 512
  arrays, phi = draw(size=size), positive()
  fn = functools.partial(
    modified.stream_negative_attention, num_negatives=3, strength=0.1
  )
  compiled = (
    jax.jit(lambda *x: fn(phi, *x, chunk_size=8)).lower(*arrays).compile()
  )
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < size * size * 8 / 4


def test_bad_input_names_the_argument():
  queries, keys, values = draw()
  phi = positive()
  for fn in (
    functools.partial(modified.stream_regularised_attention, strength=1.0),
    functools.partial(modified.causal_regularised_attention, strength=1.0),
    functools.partial(
      modified.stream_regularised_attention_as_printed, strength=1.0
    ),
    functools.partial(
      modified.causal_regularised_attention_as_printed, strength=1.0
    ),
    functools.partial(modified.stream_negative_attention, **PUSHED),
    functools.partial(modified.stream_token_negative_attention, **PUSHED),
    modified.causal_augmented_attention,
  ):
    with pytest.raises(ValueError, match='queries and keys disagree in N'):
      fn(phi, queries[:3], keys, values)
    with pytest.raises(ValueError, match='chunk_size'):
      fn(phi, queries, keys, values, chunk_size=0)
    with pytest.raises(ValueError, match='mask'):
      fn(phi, queries, keys, values, mask=MASK[:3])
  with pytest.raises(ValueError, match='strength'):
    modified.stream_regularised_attention(
      phi, queries, keys, values, strength=float('nan')
    )
  with pytest.raises(ValueError, match='num_negatives'):
    modified.stream_negative_attention(
      phi, queries, keys, values, num_negatives=-1, strength=0.1
    )
  with pytest.raises(ValueError, match='FeatureMap'):
    modified.causal_regularised_attention(
      MAPS['softmax'], queries, keys, values, strength=0.1
    )


def test_numpy_rows_and_impossible_strengths():
  queries, keys, values = (np.asarray(x) for x in draw())
  phi = MAPS['elu']
  for fn in (
    modified.stream_regularised_attention,
    modified.stream_regularised_attention_as_printed,
  ):
    np.testing.assert_allclose(
      fn(phi, queries, keys, values, strength=0.3),
      fn(phi, *map(jnp.asarray, (queries, keys, values)), strength=0.3),
    )
  with pytest.raises(ValueError, match='strength is 1, so that no weight'):
    modified.stream_negative_attention(
      phi,
      queries,
      keys,
      values,
      num_negatives=1,
      strength=1.0,
      renormalise=modified.divide_all,
    )
  with pytest.raises(ValueError, match=r'learning_rate is -1\.0'):
    modified.stream_regularised_attention(
      phi, queries, keys, values, strength=0.3, learning_rate=-1.0
    )
