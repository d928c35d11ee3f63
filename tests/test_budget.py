"""Closed-form variances and the feature budget.

That the variances are those of the maps is in `test_projections.py`; here they
are held to independent series, to known numbers, and to their limits.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from iclcl_jax import attention, budget, features, projections

POSITIVE, HYPERBOLIC, TRIGONOMETRIC = MAPS = [
  features.PositiveFeatures,
  features.HyperbolicFeatures,
  features.TrigonometricFeatures,
]
GAUSSIAN, ORTHOGONAL, SIMPLEX = PROJECTIONS = [
  projections.gaussian,
  projections.orthogonal,
  projections.simplex,
]


def by_name(function):
  return function.__name__


def variance_at(feature_map, projection_fn, square, dim, num_directions):
  return np.exp(
    budget.log_relative_variance_at(
      feature_map,
      projection_fn,
      square,
      dim=dim,
      num_directions=num_directions,
    )
  )


def joint_moment(t, cosine, dim):
  """`E exp((r1 u1 + r2 u2) . z)`, `|z|^2 = t`, as a sum over three powers."""

  def moment(p):  # E r^p of a chi variable.
    return 2 ** (p / 2) * math.exp(
      math.lgamma((dim + p) / 2) - math.lgamma(dim / 2)
    )

  total = 0.0
  for k in range(60):
    square = sum(
      math.factorial(k)
      / (math.factorial(a) * math.factorial(b) * math.factorial(k - a - b))
      * (2 * cosine) ** (k - a - b)
      * moment(2 * a + k - a - b)
      * moment(2 * b + k - a - b)
      for a in range(k + 1)
      for b in range(k + 1 - a)
    )
    log_factor = math.lgamma(dim / 2) - math.lgamma(k + dim / 2)
    total += math.exp(log_factor - math.lgamma(k + 1)) * (t / 4) ** k * square
  return total


# Closed forms.


@pytest.mark.parametrize('square', [0.01, 0.7, 3.0])
def test_independent_rows(square):
  even = 2 * math.sinh(square / 2) ** 2  # cosh - 1
  forms = [math.expm1(square), even, even]
  for feature_map, form in zip(MAPS, forms, strict=True):
    found = variance_at(feature_map, GAUSSIAN, square, 6, 10)
    np.testing.assert_allclose(found, form / 10, rtol=1e-12)


def test_the_squared_norm_is_of_sum_or_difference():
  x, y = np.random.default_rng(0).normal(size=(2, 9)) / 2
  plus, minus = (np.sum((x + s * y) ** 2) / 3 for s in (1, -1))
  for feature_map, square in zip(MAPS, [plus, plus, minus], strict=True):
    for projection_fn in PROJECTIONS:
      found = budget.feature_budget(
        feature_map, projection_fn, x[None], y[None], num_directions=5
      )
      expected = variance_at(feature_map, projection_fn, square, 9, 5)
      error = found.kernel_error_median
      np.testing.assert_allclose(error**2, expected, rtol=1e-12)


@pytest.mark.parametrize('dim', [3, 4, 7])
@pytest.mark.parametrize('square', [0.05, 0.9, 1.1, 2.5])
@pytest.mark.parametrize('projection_fn', PROJECTIONS[1:], ids=by_name)
def test_rows_of_a_block_against_the_series(projection_fn, square, dim):
  num_directions = 2 * dim + 2  # Two blocks and a part of one.
  partners = (2 * dim * (dim - 1) + 2) / num_directions
  c = 0.0 if projection_fn is ORTHOGONAL else -1 / (dim - 1)
  real, imaginary = (
    [math.exp(-t) * joint_moment(t, s * c, dim) - 1 for s in (1, -1)]
    for t in (square, -square)
  )
  even = math.cosh(square) - 1
  forms = [
    math.expm1(square) + partners * real[0],
    even + partners * sum(real) / 2,
    even + partners * sum(imaginary) / 2,
  ]
  for feature_map, form in zip(MAPS, forms, strict=True):
    found = variance_at(feature_map, projection_fn, square, dim, num_directions)
    np.testing.assert_allclose(found, form / num_directions, rtol=1e-10)


@pytest.mark.parametrize('dim', [2, 3, 16, 64])
def test_orthogonal_rows_against_scipy(dim):
  squares = np.array([1e-3, 0.3, 0.999, 1.001, 8.0, 40.0, 90.0])
  hyp1f1 = scipy.special.hyp1f1(dim, dim / 2, squares / 2)
  expected = np.expm1(squares) + (dim - 1) * (np.exp(-squares) * hyp1f1 - 1)
  found = variance_at(POSITIVE, ORTHOGONAL, squares, dim, dim)
  np.testing.assert_allclose(found, expected / dim, rtol=1e-9)


@pytest.mark.parametrize(
  ('dim', 'square', 'orthogonal', 'simplex'),
  [
    (16, 0.25, 0.911, 0.077),
    (16, 1.0, 0.782, 0.274),
    (16, 4.0, 0.922, 0.882),
    (64, 0.25, 0.896, 0.028),
    (64, 1.0, 0.731, 0.170),
    (64, 4.0, 0.879, 0.818),
  ],
)
def test_gain_over_independent_rows(dim, square, orthogonal, simplex):
  independent = variance_at(POSITIVE, GAUSSIAN, square, dim, dim)
  for projection_fn, ratio in [(ORTHOGONAL, orthogonal), (SIMPLEX, simplex)]:
    found = variance_at(POSITIVE, projection_fn, square, dim, dim)
    assert abs(found / independent - ratio) <= 6e-4


def test_which_projection_helps_which_map():
  # Simulated variances of one pair, d = R = 6, v = 1.13, u = 1.29.
  scale = math.exp((1.13 - 1.29) / 2)
  expected = {
    (POSITIVE, GAUSSIAN): 0.322,
    (POSITIVE, ORTHOGONAL): 0.273,
    (POSITIVE, SIMPLEX): 0.1517,
    (TRIGONOMETRIC, GAUSSIAN): 0.146,
    (TRIGONOMETRIC, ORTHOGONAL): 0.0436,
    (TRIGONOMETRIC, SIMPLEX): 0.0675,
  }
  for (feature_map, projection_fn), variance in expected.items():
    square = 1.29 if feature_map is TRIGONOMETRIC else 1.13
    found = scale * variance_at(feature_map, projection_fn, square, 6, 6)
    np.testing.assert_allclose(found, variance, rtol=0.01)


@pytest.mark.parametrize('projection_fn', PROJECTIONS, ids=by_name)
@pytest.mark.parametrize('feature_map', MAPS, ids=by_name)
def test_limits(feature_map, projection_fn):
  squares = np.array([0.0, 1e-12, 1e-6, 1.0, 1e2, 199.0, 201.0, 1e3, 1e6])
  for dim in (2, 3, 64):
    logs = budget.log_relative_variance_at(
      feature_map, projection_fn, squares, dim=dim, num_directions=dim
    )
    assert logs[0] == -np.inf  # Exact: all features are equal.
    assert np.all(np.isfinite(logs[3:]))
    assert np.all(np.diff(logs[2:]) > 0)
    # The variance of one row takes over.
    leading = squares - math.log(dim)
    leading = leading - (0 if feature_map is POSITIVE else math.log(2))
    np.testing.assert_allclose(logs[-2:], leading[-2:], atol=0.05)


def test_one_row_has_no_partners():
  for feature_map in MAPS:
    one = [variance_at(feature_map, p, 0.8, 5, 1) for p in PROJECTIONS]
    np.testing.assert_allclose(one, one[0], rtol=1e-13)
  alone = variance_at(POSITIVE, ORTHOGONAL, 0.8, 1, 4)  # Blocks of one.
  np.testing.assert_allclose(alone, math.expm1(0.8) / 4, rtol=1e-13)


# The budget.


def gaussian_tokens(seed, size, dim, num_queries=24, num_keys=128):
  rng = np.random.default_rng(seed)
  return (
    size * rng.normal(size=(num_queries, dim)),
    size * rng.normal(size=(num_keys, dim)),
    rng.normal(size=(num_keys, dim)),
  )


def measured_error(feature_map, tokens, num_directions, num_draws):
  queries, keys, values = map(jnp.asarray, tokens)
  stack = np.random.default_rng(9).normal(
    size=(num_draws, num_directions, keys.shape[1])
  )

  @jax.jit
  @jax.vmap
  def answers(projection):
    return attention.stream_kernel_attention(
      feature_map(projection), queries, keys, values
    )

  exact = jax.jit(
    jax.vmap(lambda q: attention.softmax_attention(q, keys, values))
  )(queries)
  errors = answers(jnp.asarray(stack)) - exact[None]
  return float(jnp.sqrt(jnp.mean(errors**2) / jnp.mean(exact**2)))


@pytest.mark.parametrize(
  ('feature_map', 'known'),
  [(POSITIVE, 0.076), (HYPERBOLIC, 0.047), (TRIGONOMETRIC, 0.047)],
  ids=['positive', 'hyperbolic', 'trigonometric'],
)
def test_predicted_output_error_is_the_measured_one(feature_map, known):
  tokens = gaussian_tokens(0, 0.25, 64)
  predicted = budget.predicted_output_error(
    feature_map, *tokens, num_directions=256
  )
  measured = measured_error(feature_map, tokens, 256, 16)
  assert abs(measured / predicted - 1) <= 0.15
  assert abs(predicted / known - 1) <= 0.3  # Other tokens.


@pytest.mark.parametrize('feature_map', MAPS, ids=by_name)
def test_predicted_output_error_of_few_tokens(feature_map):
  tokens = gaussian_tokens(1, 0.5, 6, num_queries=4, num_keys=7)
  predicted = budget.predicted_output_error(
    feature_map, *tokens, num_directions=512
  )
  measured = measured_error(feature_map, tokens, 512, 200)
  assert abs(measured / predicted - 1) <= 0.15


def test_predicted_output_error_is_its_formula():
  (query,), keys, values = gaussian_tokens(2, 1.0, 5, 1, 600)  # Two chunks.
  weights = np.exp(keys @ query / 5**0.5)
  weights /= weights.sum()
  output = weights @ values
  for feature_map, sign, growth in [
    (POSITIVE, 1, np.exp),
    (HYPERBOLIC, 1, np.cosh),
    (TRIGONOMETRIC, -1, np.cosh),
  ]:
    z = (query + sign * keys) / 5**0.25
    square = np.einsum(
      'j,l,jv,lv,jl->',
      *(weights, weights, values - output, values - output),
      growth(z @ z.T),
      optimize=True,
    )
    found = budget.predicted_output_error(
      feature_map, query[None], keys, values, num_directions=7
    )
    expected = (square / 7) ** 0.5 / np.linalg.norm(output)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize(
  ('size', 'dim', 'verdict', 'needed'),
  [
    (0.22, 64, 'fine', 115),
    (0.5, 16, 'caution', 639),
    (0.5, 128, 'warn', 2.9e4),
    (1.0, 64, 'hopeless', 8.9e8),
    (1.0, 128, 'hopeless', 6.7e11),
  ],
)
def test_verdicts_by_norm(size, dim, verdict, needed):
  queries, keys, _ = gaussian_tokens(3, size, dim)
  result = budget.feature_budget(
    POSITIVE, GAUSSIAN, queries, keys, num_directions=256
  )
  assert result.verdict == verdict
  mean = 2 * size**2 * dim**0.5
  assert abs(result.squared_norm_median / mean - 1) < 0.15
  at_mean = budget.feature_budget_at(
    POSITIVE, GAUSSIAN, mean, dim=dim, num_directions=256
  )
  assert at_mean.verdict == verdict
  np.testing.assert_allclose(at_mean.directions_median, needed, rtol=0.15)


def test_verdict_levels_are_inclusive():
  def verdict(square, **more):
    return budget.feature_budget_at(
      POSITIVE, GAUSSIAN, square, dim=8, num_directions=64, **more
    ).verdict

  squares = [1.0, 1.001, 4.0, 4.001, 8.0, 8.001]
  assert [verdict(v) for v in squares] == [
    'fine',
    'caution',
    'caution',
    'warn',
    'warn',
    'hopeless',
  ]
  # Too few directions: out of regime whatever the norms.
  assert verdict(0.5, output_error=0.2) == 'fine'
  assert verdict(0.5, output_error=0.21) == 'warn'
  assert verdict(9.0, output_error=0.21) == 'hopeless'


def test_needed_directions_reach_the_target():
  for feature_map in MAPS:
    result = budget.feature_budget_at(
      feature_map, GAUSSIAN, 2.0, dim=8, num_directions=64, target_error=0.05
    )
    needed = int(result.directions_90)
    assert variance_at(feature_map, GAUSSIAN, 2.0, 8, needed) <= 0.05**2
    assert variance_at(feature_map, GAUSSIAN, 2.0, 8, needed - 1) > 0.05**2
    error = variance_at(feature_map, GAUSSIAN, 2.0, 8, 64) ** 0.5
    np.testing.assert_allclose(result.kernel_error_median, error, rtol=1e-12)


def test_quantiles_are_of_all_pairs():
  queries, keys, values = gaussian_tokens(4, 0.5, 9, 5, 7)
  for feature_map, sign in zip(MAPS, [1, 1, -1], strict=True):
    result = budget.feature_budget(
      feature_map, SIMPLEX, queries, keys, values, num_directions=32
    )
    squares = [np.sum((q + sign * k) ** 2) / 3 for q in queries for k in keys]
    np.testing.assert_allclose(
      [result.squared_norm_median, result.squared_norm_90],
      np.quantile(squares, [0.5, 0.9]),
      rtol=1e-12,
    )


def test_dtype_and_overflow_of_the_inputs_do_not_matter():
  queries, keys, values = gaussian_tokens(5, 0.5, 16, 4, 8)
  precise = budget.feature_budget(
    POSITIVE, GAUSSIAN, queries, keys, values, num_directions=64
  )
  for dtype in ('float32', 'bfloat16'):
    tokens = [jnp.asarray(x, dtype) for x in (queries, keys, values)]
    rounded = budget.feature_budget(
      POSITIVE, GAUSSIAN, *tokens, num_directions=64
    )
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
      rounded.output_error, precise.output_error, rtol=tolerance
    )
  huge = [jnp.asarray(1e4 * x, 'float32') for x in (queries, keys)]
  for feature_map in MAPS:
    result = budget.feature_budget(
      feature_map, ORTHOGONAL, *huge, tokens[2].astype('f4'), num_directions=64
    )
    assert result.verdict == 'hopeless'
    numbers = [x for x in vars(result).values() if isinstance(x, float)]
    assert len(numbers) == 8
    assert np.all(np.isfinite(numbers))
    assert result.directions_median > 1e300


def test_a_budget_prints_and_converts_to_json():
  queries, keys, values = gaussian_tokens(6, 1.0, 64, 8, 32)
  result = budget.feature_budget(
    POSITIVE, ORTHOGONAL, queries, keys, values, num_directions=256
  )
  text = str(result)
  assert 'PositiveFeatures, orthogonal, 256 directions' in text
  assert 'out of regime (above 0.2)' in text
  assert text.splitlines()[-1].split() == ['verdict', 'hopeless']
  assert max(map(len, text.splitlines())) <= 80
  json.dumps(dataclasses.asdict(result), allow_nan=False)
  small = budget.feature_budget(
    HYPERBOLIC, ORTHOGONAL, queries / 5, keys / 5, values, num_directions=256
  )
  assert f'{small.output_error:.2g}' in str(small)
  without = budget.feature_budget(
    HYPERBOLIC, ORTHOGONAL, queries, keys, num_directions=256
  )
  assert without.output_error is None
  assert 'no values given' in str(without)


def test_equal_values_have_no_error():
  queries, keys, values = gaussian_tokens(7, 0.5, 4, 2, 5)
  same = np.ones_like(values)
  found = budget.predicted_output_error(
    POSITIVE, queries, keys, same, num_directions=1
  )
  assert found < 1e-12
  zero = budget.predicted_output_error(
    POSITIVE, queries, keys, 0 * same, num_directions=1
  )
  assert zero == 0


def test_norms_alone():
  queries, keys, _ = gaussian_tokens(8, 0.5, 64, 64, 64)
  squares = [np.sum(x**2, axis=1) for x in (queries, keys)]
  typical = np.add.outer(*squares) / 64**0.5
  for feature_map in MAPS:
    by_norms, by_tokens = (
      budget.feature_budget_at(
        feature_map, GAUSSIAN, typical, dim=64, num_directions=256
      ),
      budget.feature_budget(
        feature_map, GAUSSIAN, queries, keys, num_directions=256
      ),
    )
    np.testing.assert_allclose(
      by_norms.squared_norm_median, by_tokens.squared_norm_median, rtol=0.05
    )


# Bad input.


X, TOKENS = np.linspace(0, 1, 4), np.zeros((3, 4))


def feature_budget(queries=TOKENS, keys=TOKENS, values=None, **more):
  more = {'num_directions': 8} | more
  return budget.feature_budget(
    POSITIVE, GAUSSIAN, queries, keys, values, **more
  )


def variance(feature_map=POSITIVE, projection_fn=GAUSSIAN, x=X, y=X):
  return budget.feature_budget(
    feature_map, projection_fn, x[None], y[None], num_directions=2
  )


FAULTS = [
  (
    lambda: variance(POSITIVE, projections.simplex_plus),
    'projection_fn is simplex_plus, for wh',
  ),
  (
    lambda: variance(POSITIVE, lambda key: key),
    r'no closed form .*projections\.simplex',
  ),
  (
    lambda: variance(features.TaylorFeatures),
    'feature_map is TaylorFeatures; expect',
  ),
  (
    lambda: variance(POSITIVE(jnp.ones((2, 4)))),
    'expected one of the classes features',
  ),
  (
    lambda: variance(POSITIVE, SIMPLEX, X[:1], X[:1]),
    'dim is 1; expected an integer >= 2',
  ),
  (lambda: variance(y=X[:3]), 'queries and keys disagree in d_k: 4 and'),
  (lambda: variance(x=X.astype(int)), 'queries has dtype int64'),
  (
    lambda: jax.jit(lambda x: variance(x=x))(X),
    'queries is traced; expect',
  ),
  (
    lambda: feature_budget(num_directions=0),
    'num_directions is 0; expect',
  ),
  (lambda: feature_budget(target_error=0.0), r'target_error is 0\.0; expected'),
  (lambda: feature_budget(queries=X), r'queries has shape \[4\]; expected \['),
  (
    lambda: feature_budget(keys=np.zeros((3, 5))),
    'queries and keys disagree in d_k',
  ),
  (
    lambda: feature_budget(values=np.zeros((2, 4))),
    'keys and values disagree in N: 3 and',
  ),
  (lambda: feature_budget(keys=TOKENS[:0]), 'keys is empty'),
  (lambda: feature_budget(queries=TOKENS[:0]), 'squared_norms is empty'),
  (
    lambda: feature_budget(queries=TOKENS[:0], values=TOKENS),
    'queries is empty',
  ),
  (lambda: feature_budget(queries=TOKENS + np.nan), 'queries holds NaN or inf'),
  (lambda: feature_budget(values=TOKENS + np.inf), 'values holds NaN or inf'),
  (lambda: variance_at(POSITIVE, GAUSSIAN, -1.0, 4, 2), 'negative or non-fini'),
  (
    lambda: jax.vmap(lambda v: variance_at(POSITIVE, GAUSSIAN, v, 4, 2))(X),
    'squared_norms is traced',
  ),
]


@pytest.mark.parametrize(('call', 'message'), FAULTS, ids=range(len(FAULTS)))
def test_what_does_not_fit_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
