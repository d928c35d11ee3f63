"""Random projections: geometry, and what maps built on them estimate.

Monte-Carlo tests compare a mean (variance) with its closed form, at
`tolerances.SIGMAS` standard errors, with `q + k` along `+-(1, .., 1)`: there
the bias of a decomposition without the sign fix is largest, and random
vectors would hide it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import budget, features, projections
from tests import tolerances

ALL = [
  projections.gaussian,
  projections.orthogonal,
  projections.simplex,
  projections.simplex_plus,
]
BLOCKED = ALL[1:]
CLOSED_FORM = ALL[:3]
MAPS = [
  features.PositiveFeatures,
  features.HyperbolicFeatures,
  features.TrigonometricFeatures,
]
NUM_DRAWS = 20_000
DIM = 4


def by_name(function):
  return function.__name__


@functools.cache
def draws(projection_fn):
  """Independent projections of three blocks. Shape [NUM_DRAWS, 10, DIM]."""
  keys = jax.random.split(jax.random.key(7), NUM_DRAWS)
  draw = functools.partial(
    projection_fn, num_features=10, dim=DIM, dtype=jnp.float64
  )
  return jax.jit(jax.vmap(draw))(keys)


def raw_qr(key, num_features, dim, *, dtype):
  """One block of `projections.orthogonal`, without the sign fix."""
  key_norms, key_rotation = jax.random.split(key)
  normal = jax.random.normal(key_norms, (dim, dim), dtype)
  rotation, _ = jnp.linalg.qr(
    jax.random.normal(key_rotation, (dim, dim), dtype)
  )
  return (jnp.linalg.norm(normal, axis=1)[:, None] * rotation)[:num_features]


def pair(sum_vector, difference):
  """Query and key with `(q + k, q - k) / d ** 0.25` as given."""
  scale = DIM**0.25 / 2
  return (
    jnp.asarray(scale * (sum_vector + difference)),
    jnp.asarray(scale * (sum_vector - difference)),
  )


ONES = np.ones(DIM) / DIM**0.5
PAIRS = {
  'along +1': pair(ONES, 0.8 * ONES),
  'along -1': pair(-ONES, -1.2 * ONES),
  'oblique': pair(np.array([0.7, -0.2, 0.1, 0.9]), np.array([0, 1.0, -0.5, 0])),
}


def relative_estimates(feature_map, stack):
  """Estimates of the kernel over its value, one for each projection.

  Shape `[len(PAIRS), num_draws]`.
  """
  return np.asarray(estimate(feature_map(stack)))


@jax.jit
@functools.partial(jax.vmap, out_axes=1)
def estimate(phi):
  queries, keys = map(jnp.stack, zip(*PAIRS.values(), strict=True))
  estimates = jnp.sum(jax.vmap(phi)(queries) * jax.vmap(phi)(keys), axis=1)
  return estimates / jnp.exp(jnp.sum(queries * keys, axis=1) / DIM**0.5)


def closed_forms(feature_map, projection_fn, num_directions):
  sign = -1 if feature_map is features.TrigonometricFeatures else 1
  pairs = np.array(list(PAIRS.values()))
  squares = np.sum((pairs[:, 0] + sign * pairs[:, 1]) ** 2, axis=1) / DIM**0.5
  return np.exp(
    budget.log_relative_variance_at(
      feature_map,
      projection_fn,
      squares,
      dim=DIM,
      num_directions=num_directions,
    )
  )


def assert_means(samples, expected, variances):
  """Means over the last axis, within the error that the variances allow."""
  errors = abs(samples.mean(axis=-1) - np.asarray(expected))
  bounds = (np.asarray(variances) / samples.shape[-1]) ** 0.5
  np.testing.assert_array_less(errors, tolerances.SIGMAS * bounds)


def assert_variances(samples, expected):
  squares = (samples - samples.mean(axis=-1, keepdims=True)) ** 2
  errors = abs(squares.mean(axis=-1) - np.asarray(expected))
  bounds = squares.std(axis=-1) / samples.shape[-1] ** 0.5
  np.testing.assert_array_less(errors, tolerances.SIGMAS * bounds)


# Estimates of the softmax kernel.


@pytest.mark.parametrize('feature_map', MAPS, ids=by_name)
@pytest.mark.parametrize('num_directions', [3, 10])
@pytest.mark.parametrize('projection_fn', CLOSED_FORM, ids=by_name)
def test_mean_and_variance_are_the_closed_forms(
  projection_fn, num_directions, feature_map
):
  # 3 directions: part of a block. 10: blocks of 4, 4 and 2.
  variances = closed_forms(feature_map, projection_fn, num_directions)
  stack = draws(projection_fn)[:, :num_directions]
  samples = relative_estimates(feature_map, stack)
  assert_means(samples, 1, variances)
  assert_variances(samples, variances)


@pytest.mark.parametrize('feature_map', MAPS, ids=by_name)
def test_simplex_plus_is_unbiased(feature_map):
  samples = relative_estimates(feature_map, draws(projections.simplex_plus))
  assert_means(samples, 1, samples.var(axis=-1))


def test_simplex_plus_has_the_smallest_variance_of_positive_features():
  variances = [
    relative_estimates(features.PositiveFeatures, draws(fn))[0].var()
    for fn in ALL
  ]
  assert variances == sorted(variances, reverse=True)
  assert variances[-1] < 0.97 * variances[-2]


def test_the_check_catches_an_orthogonal_draw_without_the_sign_fix():
  # The very check of the tests above, for the right draw and the wrong one.
  feature_map = features.PositiveFeatures
  variances = closed_forms(feature_map, projections.orthogonal, DIM)
  right = relative_estimates(
    feature_map, draws(projections.orthogonal)[:, :DIM]
  )
  assert_means(right, 1, variances)
  wrong = relative_estimates(feature_map, draws(raw_qr)[:, :DIM])
  for name, samples, variance in zip(PAIRS, wrong, variances, strict=True):
    if name.startswith('along'):
      with pytest.raises(AssertionError):
        assert_means(samples, 1, variance)
  # The size of the bias in 4 dimensions, along +1 and -1.
  np.testing.assert_allclose(wrong[:2].mean(axis=1), [0.813, 1.187], atol=0.02)


@pytest.mark.parametrize('feature_map', MAPS[1:], ids=by_name)
def test_even_maps_do_not_feel_the_missing_sign_fix(feature_map):
  samples = relative_estimates(feature_map, draws(raw_qr)[:, :DIM])
  assert_means(samples, 1, samples.var(axis=-1))


# Geometry.


def unit_rows(array):
  return array / jnp.linalg.norm(array, axis=-1, keepdims=True)


def blocks(projection_fn):
  """The rows of the blocks of a few draws, the last block cut."""
  rows = np.asarray(draws(projection_fn)[:50])
  return [rows[:, :DIM], rows[:, DIM : 2 * DIM], rows[:, 2 * DIM :]]


def test_rows_of_an_orthogonal_block_are_orthogonal():
  for rows in blocks(projections.orthogonal):
    gram = unit_rows(rows) @ unit_rows(rows).mT
    expected = np.broadcast_to(np.eye(rows.shape[1]), gram.shape)
    np.testing.assert_allclose(gram, expected, atol=1e-13)


def test_rows_of_a_simplex_block_are_a_regular_simplex():
  for rows in blocks(projections.simplex):
    unit = np.asarray(unit_rows(rows))
    expected = np.where(np.eye(rows.shape[1]), 1.0, -1 / (DIM - 1))
    gram = unit @ unit.mT
    expected = np.broadcast_to(expected, gram.shape)
    np.testing.assert_allclose(gram, expected, atol=1e-13)
    if rows.shape[1] == DIM:
      np.testing.assert_allclose(unit.sum(axis=1), 0, atol=1e-13)
      assert np.linalg.matrix_rank(unit[0], tol=1e-9) == DIM - 1


@pytest.mark.parametrize('projection_fn', ALL[2:], ids=by_name)
def test_two_dimensional_simplices_are_opposite_pairs(projection_fn):
  rows = projection_fn(jax.random.key(1), 3, 2, dtype=jnp.float64)
  unit = unit_rows(rows)
  np.testing.assert_allclose(unit[0], -unit[1], atol=1e-13)


def test_simplex_plus_sums_to_less_than_simplex():
  # The same keys, and so the same norms.
  simplex, _, _ = blocks(projections.simplex)
  plus, _, _ = blocks(projections.simplex_plus)
  np.testing.assert_allclose(
    np.linalg.norm(simplex, axis=2), np.linalg.norm(plus, axis=2), rtol=1e-12
  )
  lengths = [np.linalg.norm(x.sum(axis=1), axis=1) for x in (plus, simplex)]
  assert np.all(lengths[0] < lengths[1])


@pytest.mark.parametrize('projection_fn', ALL, ids=by_name)
def test_rows_are_marginally_standard_normal(projection_fn):
  rows = np.asarray(draws(projection_fn))
  for moment, expected in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)]:
    power = rows**moment
    error = power.std(axis=0) / NUM_DRAWS**0.5
    assert np.all(abs(power.mean(axis=0) - expected) <= 5 * error)
  products = rows[..., :-1] * rows[..., 1:]
  error = products.std(axis=0) / NUM_DRAWS**0.5
  assert np.all(abs(products.mean(axis=0)) <= 5 * error)


@pytest.mark.parametrize('projection_fn', ALL, ids=by_name)
def test_norms_are_chi_distributed_and_independent(projection_fn):
  rows = np.asarray(draws(projection_fn))
  squares = np.sum(rows**2, axis=-1)
  assert_means(squares[:, 0], DIM, 2 * DIM)
  assert_variances(squares[:, 0], 2 * DIM)
  directions = rows[..., 0] ** 2 / squares  # Mean 1 / DIM.
  columns = [squares[:, 0], squares[:, 1], squares[:, 5], directions[:, 0]]
  columns += [directions[:, 1], rows[:, 1, 0] / squares[:, 1] ** 0.5]
  # Correlations of norms with other norms and with directions.
  correlations = np.corrcoef(np.stack(columns))[0, 1:]
  assert np.all(abs(correlations) <= 5 / NUM_DRAWS**0.5)


@pytest.mark.parametrize('projection_fn', BLOCKED, ids=by_name)
def test_blocks_are_independent(projection_fn):
  rows = unit_rows(draws(projection_fn))
  cosines = np.asarray(jnp.sum(rows[:, 0] * rows[:, DIM], axis=-1))
  assert_means(cosines, 0.0, 1 / DIM)
  assert_means(cosines**2, 1 / DIM, 2 / DIM**2)  # Loose: Var(cos^2) is smaller.


def test_sign_of_the_first_entry_is_fair():
  negative = np.asarray(draws(projections.orthogonal)[:, 0, 0] < 0)
  assert_means(negative, 0.5, 0.25)


# Contract.


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('projection_fn', ALL, ids=by_name)
def test_shape_and_dtype(projection_fn, dtype):
  array = projection_fn(jax.random.key(0), 7, 3, dtype=jnp.dtype(dtype))
  assert array.shape == (7, 3)
  assert array.dtype == dtype
  # All dtypes below float64 are rounded from one draw.
  full = projection_fn(jax.random.key(0), 7, 3)
  assert full.dtype == jnp.float32
  if projection_fn is not projections.gaussian:
    np.testing.assert_array_equal(array, full.astype(dtype))


@pytest.mark.parametrize('projection_fn', ALL, ids=by_name)
def test_a_key_determines_the_draw_under_jit_and_vmap(projection_fn):
  stack = draws(projection_fn)
  keys = jax.random.split(jax.random.key(7), NUM_DRAWS)[:2]
  for i in range(2):
    one = projection_fn(keys[i], 10, DIM, dtype=jnp.float64)
    np.testing.assert_allclose(stack[i], one, rtol=1e-11, atol=1e-12)
  assert not np.allclose(stack[0], stack[1])


KEY = jax.random.key(0)


@pytest.mark.parametrize('projection_fn', ALL, ids=by_name)
@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((KEY, 0, 4), 'num_features is 0; expected an integer >= 1'),
    ((KEY, 2.0, 4), 'num_features is 2.0; expected an integer'),
    ((KEY, True, 4), 'num_features is True; expected an integer'),
    ((KEY, 4, 0), 'dim is 0; expected an integer >= '),
    ((KEY, 4, -3), 'dim is -3; expected an integer >= '),
    ((jnp.zeros(2, jnp.uint32), 4, 3), 'expected a typed random key'),
    ((0, 4, 3), 'key is an int; expected a typed'),
    (
      (jax.random.split(KEY, 2), 4, 3),
      r'key has shape \[2\]; expected one',
    ),
  ],
)
def test_bad_arguments_are_named(projection_fn, arguments, message):
  with pytest.raises(ValueError, match=message):
    projection_fn(*arguments)


@pytest.mark.parametrize('projection_fn', ALL, ids=by_name)
def test_bad_dtypes_are_named(projection_fn):
  with pytest.raises(ValueError, match='expected a floating-point dtype'):
    projection_fn(KEY, 4, 3, dtype=jnp.int32)


@pytest.mark.parametrize('projection_fn', ALL[2:], ids=by_name)
def test_a_simplex_needs_two_dimensions(projection_fn):
  with pytest.raises(ValueError, match='dim is 1; expected an integer >= 2'):
    projection_fn(KEY, 4, 1)
