"""Rademacher complexity and bounds against plain loops and brute force."""

import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from iclcl_jax import bounds, dual, features, kernels
from tests import oracles
from tests.tolerances import IDENTITY

DIM, WIDTH, NUM_FEATURES = 4, 3, 6
PROJECTION = np.random.default_rng(0).normal(size=(NUM_FEATURES, DIM))
MAPS = {
  'positive': features.PositiveFeatures(jnp.asarray(PROJECTION)),
  'trigonometric': features.TrigonometricFeatures(jnp.asarray(PROJECTION)),
  'identity': features.IdentityFeatures(),
}
KERNELS = {
  'exponential': kernels.ExponentialKernel(),
  'gaussian': kernels.GaussianKernel(),
  'linear': kernels.LinearKernel(),
}
BOTH = MAPS | KERNELS
BALLS = {'frobenius': bounds.FROBENIUS, 'spectral': bounds.SPECTRAL}


def oracle_features(name, x):
  return {
    'positive': lambda: oracles.positive_features(PROJECTION, x),
    'trigonometric': lambda: oracles.trigonometric_features(PROJECTION, x),
    'identity': lambda: oracles.identity_features(x),
  }[name]()


def oracle_kernel(name, x, y):
  if name in MAPS:
    return oracle_features(name, x) @ oracle_features(name, y)
  return {
    'exponential': lambda: math.exp(x @ y / math.sqrt(len(x))),
    'gaussian': lambda: math.exp(
      -((x - y) @ (x - y)) / (2 * math.sqrt(len(x)))
    ),
    'linear': lambda: x @ y,
  }[name]()


def oracle_gram(name, keys):
  return np.array([[oracle_kernel(name, x, y) for y in keys] for x in keys])


def oracle_norm(name, keys, labels, ball):
  """Dual norm of `sum_i u_i phi(k_i)^T`, by an explicit square root of K."""
  eigenvalues, vectors = np.linalg.eigh(oracle_gram(name, keys))
  root = vectors * np.sqrt(np.maximum(eigenvalues, 0))[None]
  order = {'frobenius': 'fro', 'spectral': 'nuc'}[ball]
  return np.linalg.norm(labels.T @ root, order)


def draw(size, seed=0, width=WIDTH, scale=1.0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(size, DIM)) * scale, rng.normal(size=(size, width))


def all_signs(size):
  return np.array(list(itertools.product((-1, 1), repeat=size)))


SIZE, NUM_MANY, NUM_DRAWS = 5, 11, 64
NAMES = ['positive', 'exponential']


@functools.cache
def compiled(name, ball):
  """`(keys, values, many_keys, many_values) -> bound, draws, gap`, compiled."""
  phi, options = BOTH[name], {'radius': 0.7, 'ball': BALLS[ball]}
  embed = functools.partial(bounds.mean_embedding, phi)

  @jax.jit
  def measure(keys, values, many_keys, many_values):
    bound = bounds.rademacher_bound(phi, keys, values, **options)
    draws = bounds.rademacher_draws(
      jax.random.key(0),
      phi,
      keys,
      values,
      num_draws=NUM_DRAWS,
      **options,
    )
    supremum = bounds.gap_supremum(
      phi,
      embed(many_keys, many_values),
      embed(keys, values),
      **options,
    )
    return bound, draws, supremum

  return measure


def measure(name, ball, seed):
  data = *draw(SIZE, seed), *draw(NUM_MANY, seed + 1)
  with mock.patch.multiple(bounds._norms, CHUNK_SIZE=2, _NUM_ROWS=2):
    return data, compiled(name, ball)(*data)


@pytest.mark.parametrize('name', BOTH)
def test_diagonal_matches_plain_loops(name):
  keys, _ = draw(5)
  diagonal = np.array([oracle_kernel(name, x, x) for x in keys])

  found = bounds.log_diagonal(BOTH[name], keys)
  np.testing.assert_allclose(np.exp(found), diagonal, rtol=1e-12)


@pytest.mark.parametrize('ball', BALLS)
@pytest.mark.parametrize('name', [*NAMES, 'trigonometric'])
def test_bound_draws_and_gap_match_plain_loops(name, ball):
  """Every draw is one of the suprema of the 2^N sign vectors."""
  (keys, values, *many), (bound, draws, gap) = measure(name, ball, seed=1)
  squares = [
    (v @ v) * oracle_kernel(name, k, k)
    for k, v in zip(keys, values, strict=True)
  ]
  growth = {'frobenius': 1, 'spectral': math.sqrt(WIDTH)}[ball]
  expected = 0.7 / SIZE * math.sqrt(sum(squares)) * growth
  np.testing.assert_allclose(bound.value, expected, rtol=1e-12)
  suprema = np.array(
    [
      0.7 / SIZE * oracle_norm(name, keys, signs[:, None] * values, ball)
      for signs in all_signs(SIZE)
    ]
  )
  distances = np.abs(np.asarray(draws.value)[:, None] / suprema[None] - 1)
  assert distances.min(axis=1).max() < 1e-12
  # Opposite sign vectors share a supremum; most of the 16 are drawn.
  assert len(set(suprema[distances.argmin(axis=1)].round(9))) >= 12
  expected = 0.7 * oracle_norm(
    name,
    np.concatenate([many[0], keys]),
    np.concatenate([many[1] / NUM_MANY, -values / SIZE]),
    ball,
  )
  np.testing.assert_allclose(gap.value, expected, rtol=1e-12)
  # The bound is above the complexity; Monte Carlo estimates the latter.
  assert suprema.mean() <= bound.value
  sigma = np.std(suprema) / math.sqrt(NUM_DRAWS)
  assert abs(np.mean(draws.value) - suprema.mean()) < 5 * sigma


@pytest.mark.parametrize('name', NAMES)
def test_frobenius_bound_is_tight_up_to_root_two(name):
  """Khinchine and Kahane: E|S| >= sqrt(E|S|^2 / 2) in a Hilbert space."""
  for seed in range(20):
    (keys, values, *_), (bound, *_) = measure(name, 'frobenius', seed=seed)
    if seed < 3:
      exact = np.mean(
        [
          0.7 / SIZE * oracle_norm(name, keys, s[:, None] * values, 'frobenius')
          for s in all_signs(SIZE)
        ]
      )
      assert bound.value / math.sqrt(2) <= exact <= bound.value


@pytest.mark.parametrize('name', NAMES)
def test_spectral_ball_is_larger_but_not_by_more_than_the_rank(name):
  ratios = []
  for seed in range(20):
    frobenius, spectral = (measure(name, ball, seed)[1] for ball in BALLS)
    np.testing.assert_allclose(
      spectral[0].value / frobenius[0].value, math.sqrt(WIDTH), rtol=1e-12
    )
    ratios.append(spectral[1].value / frobenius[1].value)
  ratios = np.stack(ratios)
  assert np.all(ratios >= 1 - 1e-12)
  assert np.all(ratios <= math.sqrt(WIDTH) + 1e-12)
  assert np.mean(ratios) > 1.2


@pytest.mark.parametrize('ball', BALLS)
@pytest.mark.parametrize('name', NAMES)
def test_one_demonstration_has_one_supremum(name, ball):
  """All but one value vanish: no sign matters, the bound is attained.

  For the spectral ball the rank factor alone remains.
  """
  (keys, values, *many), _ = measure(name, ball, seed=6)
  values = values * (np.arange(SIZE) == 2)[:, None]
  bound, draws, _ = compiled(name, ball)(keys, values, *many)
  growth = {'frobenius': 1, 'spectral': math.sqrt(WIDTH)}[ball]
  np.testing.assert_allclose(draws.value * growth, bound.value, rtol=1e-12)


def test_one_demonstration_alone():
  keys, values = draw(1, seed=6)
  upper = bounds.rademacher_bound(
    KERNELS['exponential'], keys, values, radius=2.0, ball=bounds.SPECTRAL
  )
  expected = 2 * np.linalg.norm(values) * math.exp(keys[0] @ keys[0] / 4)
  np.testing.assert_allclose(upper.value, expected, rtol=1e-12)


def test_theorem_has_its_constants():
  keys, values = draw(7, seed=7)
  phi = MAPS['positive']
  bound = jax.jit(
    functools.partial(
      bounds.generalization_bound, phi, radius=0.3, loss_bound=2.0, delta=0.1
    )
  )(keys, values)
  squares = sum(
    (v @ v) * oracle_kernel('positive', k, k)
    for k, v in zip(keys, values, strict=True)
  )
  complexity = 2 * 0.3 / 7 * math.sqrt(squares)
  confidence = 3 * math.sqrt(2) * 2.0 * math.sqrt(math.log(2 / 0.1) / 7)
  np.testing.assert_allclose(bound.complexity.value, complexity, rtol=1e-12)
  np.testing.assert_allclose(bound.confidence.value, confidence, rtol=1e-12)
  np.testing.assert_allclose(
    bound.total.value, complexity + confidence, rtol=1e-12
  )


@functools.cache
def gaps(name):
  """Compiled: gap of a state, supremum, and losses."""

  @jax.jit
  def measure(keys, values, many_keys, many_values, direction):
    phi = BOTH[name]
    state = dual.zero_shot(phi, many_keys, direction)
    population = bounds.mean_embedding(phi, many_keys, many_values)
    sample = bounds.mean_embedding(phi, keys, values)
    gap = bounds.expected_loss(phi, state, population) - bounds.expected_loss(
      phi, state, sample
    )
    zero = dual.zero_shot(phi, many_keys, jnp.zeros_like(direction))
    size = bounds.gap_supremum(phi, state, zero, radius=1.0).value
    supremum = bounds.gap_supremum(phi, population, sample, radius=1.0).value
    return gap / size, supremum

  return measure


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize('name', NAMES)
def test_no_weights_exceed_the_supremum(name, seed):
  direction = np.random.default_rng(seed).normal(size=(11, WIDTH))
  gap, supremum = gaps(name)(
    *draw(5, seed=seed), *draw(11, seed=seed + 1), direction
  )
  assert gap <= supremum * (1 + 1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_the_difference_of_the_means_attains_the_supremum(name):
  keys, values = draw(5, seed=11)
  rows = np.concatenate([draw(6, seed=12)[0], keys])
  many_values = draw(11, seed=13)[1]
  # Keys of the population hold those of the sample: W = mean difference.
  direction = -many_values / 11
  direction[6:] += values / 5
  gap, supremum = gaps(name)(keys, values, rows, many_values, direction)
  np.testing.assert_allclose(gap, supremum, rtol=1e-12)


def test_losses_match_plain_loops():
  keys, values = draw(5, seed=14)
  for name in ('positive', 'exponential'):
    state = dual.zero_shot(BOTH[name], *draw(3, seed=15))
    rows, labels = draw(3, seed=15)
    measure = jax.jit(_losses(BOTH[name]))
    found = measure(state, keys, values)
    expected = -np.mean(
      [
        sum(
          (v @ u) * oracle_kernel(name, k, x)
          for x, u in zip(rows, labels, strict=True)
        )
        for k, v in zip(keys, values, strict=True)
      ]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def _losses(phi):
  def measure(state, keys, values):
    sample = bounds.mean_embedding(phi, keys, values)
    return bounds.expected_loss(phi, state, sample)

  return measure


@pytest.mark.parametrize('ball', BALLS)
@pytest.mark.parametrize('name', NAMES)
def test_logarithms_are_finite_at_any_norm(name, ball):
  """Norms in the hundreds: k(k, k) is about exp(4e4), or exp(-4e4)."""
  keys, values = draw(SIZE, seed=18, scale=200.0)
  many = keys[np.arange(NUM_MANY) % SIZE], draw(NUM_MANY, seed=19)[1]
  top = float(jnp.max(bounds.log_diagonal(BOTH[name], keys)))
  assert abs(top) > 1e4
  upper, draws, gap = compiled(name, ball)(keys, values, *many)
  assert upper.value in (0, np.inf)
  for logs in (upper.log_value, draws.log_value, gap.log_value):
    assert np.all(np.abs(np.asarray(logs) - top / 2) < 10)
  assert np.all(draws.log_value <= upper.log_value + 1e-9)


def test_a_radius_that_underflows_is_given_by_its_logarithm():
  keys, values = draw(5, seed=18, scale=200.0)
  phi = KERNELS['exponential']
  radius = bounds.LogValue(-jnp.max(bounds.log_diagonal(phi, keys)) / 2)
  bound = bounds.generalization_bound(
    phi, keys, values, radius=radius, loss_bound=1.0, delta=0.1
  )
  assert 0 < bound.complexity.value < 10
  with pytest.raises(ValueError, match='radius is 0'):
    bounds.rademacher_bound(phi, keys, values, radius=0.0)


@functools.cache
def logarithms(name, ball, dtype):
  """Compiled: logarithms of all that may not be negative, in `dtype`."""
  phi = BOTH[name]
  options = {'radius': 1e-60, 'ball': BALLS[ball]}
  if name == 'positive':
    phi = features.PositiveFeatures(jnp.asarray(PROJECTION, dtype))

  @jax.jit
  def measure(keys, values):
    bound = bounds.generalization_bound(
      phi, keys, values, loss_bound=1e60, delta=1e-60, **options
    )
    sample, rest = (
      bounds.mean_embedding(phi, keys[part], values[part])
      for part in (slice(2), slice(2, None))
    )
    draws = bounds.rademacher_draws(
      jax.random.key(0), phi, keys, values, num_draws=2, **options
    )
    gap = bounds.gap_supremum(phi, rest, sample, **options)
    return jax.tree.leaves((bound, draws, gap))

  return measure


EXTREMES = [
  ('positive', 'frobenius', 'float32', (1e-34, 1e-25, 1e25, 1e37)),
  ('positive', 'frobenius', 'float16', (1e-3, 1e4)),
  ('exponential', 'spectral', 'float16', (1e-3, 1e4)),
  ('exponential', 'spectral', 'float32', (1e-34, 1e-25, 1e25, 1e37)),
  ('identity', 'spectral', 'bfloat16', (1e-34, 1e25)),
]


@pytest.mark.parametrize(('name', 'ball', 'dtype', 'scales'), EXTREMES)
def test_logarithms_follow_labels_that_cannot_be_squared(
  name, ball, dtype, scales
):
  """All numbers are formed in log space, from hyper-parameters to signs."""
  keys, values = draw(SIZE, seed=21)
  exact = logarithms(name, ball, 'float64')(keys, values)
  # Rounding is that of a logarithm near 150, and of the inputs.
  tolerance = 600 * float(jnp.finfo(dtype).eps)
  for scale in scales:
    cast = [jnp.asarray(x, dtype) for x in (keys, values * scale)]
    found = logarithms(name, ball, dtype)(*cast)
    dtypes = [x.dtype for x in found]
    assert dtypes.pop(3) == jnp.float32  # The gap is that of two states.
    assert set(dtypes) == {jnp.dtype(dtype)}
    shifts = np.log(scale) * np.array([1, 0, 1, 1])
    for a, b, shift in zip(found, exact, shifts, strict=True):
      np.testing.assert_allclose(
        np.asarray(a, float), b + shift, atol=tolerance, rtol=0
      )


@pytest.mark.parametrize('name', ['identity', 'linear'])
def test_features_that_cannot_be_squared(name):
  keys, values = (jnp.asarray(x, jnp.float32) for x in draw(SIZE, seed=22))
  scale = {'identity': 1e30, 'linear': 1e17}[name]
  measure = logarithms(name, 'frobenius', 'float32')
  shifts = np.log(scale) * np.array([1, 0, 1, 1])
  for a, b, shift in zip(
    measure(keys * scale, values), measure(keys, values), shifts, strict=True
  ):
    np.testing.assert_allclose(a, np.asarray(b) + shift, rtol=1e-5)


def test_terms_of_opposite_scales_are_both_counted():
  """A tiny label of a long key may outweigh a large one of a short key."""
  keys = jnp.array([[30.0, 0], [0, 1]], jnp.float32)
  values = jnp.array([[1e-37], [1e37]], jnp.float32)
  lengths = np.array([900, 1]) / math.sqrt(2) / 2
  expected = lengths + np.log([1e-37, 1e37])
  for scale in (1.0, 1e-37):  # The first outweighs the second, or not.
    logs = np.array([expected[0], expected[1] + math.log(scale)])
    labels = values * jnp.array([[1.0], [scale]], jnp.float32)
    draws = bounds.rademacher_draws(
      jax.random.key(0),
      KERNELS['exponential'],
      keys,
      labels,
      radius=2.0,
      num_draws=1,
    )
    np.testing.assert_allclose(draws.log_value, [logs.max()], rtol=1e-6)


def test_many_demonstrations_are_counted_in_half_precision():
  size = 70_000  # More than float16 can hold.
  keys = jnp.zeros((size, 1), jnp.float16)
  values = jnp.ones((size, 1), jnp.float16)
  phi = KERNELS['exponential']
  bound = bounds.rademacher_bound(phi, keys, values, radius=1.0)
  np.testing.assert_allclose(
    bound.log_value, -math.log(size) / 2, rtol=IDENTITY['bfloat16']
  )


def test_weights_of_zero_have_no_loss_at_any_scale():
  keys, values = draw(3, seed=23)
  phi = MAPS['positive']
  state = dual.zero_shot(phi, keys, 0 * values)
  population = bounds.mean_embedding(phi, keys, values)
  state, population = (
    x._replace(log_scale=x.log_scale + 500) for x in (state, population)
  )
  assert float(bounds.expected_loss(phi, state, population)) == 0


@pytest.mark.parametrize('name', NAMES)
def test_nothing_of_size_n_squared_or_n_by_features_is_held(name):
  """The compiled program's temporary memory does not grow like N^2 or N R."""
  phi = (
    features.PositiveFeatures(jnp.ones((512, DIM)))
    if name == 'positive'
    else KERNELS[name]
  )

  def measure(keys, values):
    draws = bounds.rademacher_draws(
      jax.random.key(8),
      phi,
      keys,
      values,
      radius=1.0,
      num_draws=2,
    )
    upper = bounds.rademacher_bound(phi, keys, values, radius=1.0)
    return draws.log_value, upper.log_value

  size = 8192
  arguments = [
    jax.ShapeDtypeStruct((size, width), jnp.float64) for width in (DIM, WIDTH)
  ]
  memory = jax.jit(measure).lower(*arguments).compile().memory_analysis()
  # [N, R] would be 33 MB and [N, N] 537 MB.
  assert memory.temp_size_in_bytes < 6e6


@pytest.mark.parametrize('name', NAMES)
def test_jit_vmap_and_grad(name):
  keys, values, many_keys, many_values = measure(name, 'frobenius', seed=1)[0]

  def total(keys, values):
    bound, draws, gap = compiled(name, 'frobenius').__wrapped__(
      keys, values, many_keys, many_values
    )
    return bound.value + jnp.mean(draws.value) + gap.value

  step = np.zeros_like(keys)
  step[1, 2] = 1e-6
  batch = np.stack([keys, keys + step, keys - step])
  program = jax.vmap(jax.value_and_grad(total), (0, None))
  batched, gradients = jax.jit(program)(batch, values)
  for x, found in zip(batch, batched, strict=True):
    bound, draws, gap = compiled(name, 'frobenius')(
      x, values, many_keys, many_values
    )
    expected = bound.value + np.mean(draws.value) + gap.value
    np.testing.assert_allclose(found, expected, rtol=1e-12)
  slope = (batched[1] - batched[2]) / 2e-6
  np.testing.assert_allclose(gradients[0, 1, 2], slope, rtol=1e-6)


def test_dtype_follows_the_inputs(dtype):
  keys, values = (jnp.asarray(x, dtype) for x in draw(5, seed=20))

  def measure(keys, values):
    bound = bounds.generalization_bound(
      KERNELS['exponential'],
      keys,
      values,
      radius=1.0,
      loss_bound=1.0,
      delta=0.1,
    )
    draws = [
      bounds.rademacher_draws(
        jax.random.key(10), phi, keys, values, radius=1.0, num_draws=2
      )
      for phi in (features.EluPlusOneFeatures(), KERNELS['exponential'])
    ]
    return bound, draws

  bound, draws = jax.jit(measure)(keys, values)
  assert {x.dtype for x in jax.tree.leaves((bound, draws))} == {dtype}
  exact = bounds.generalization_bound(
    KERNELS['exponential'],
    *draw(5, seed=20),
    radius=1.0,
    loss_bound=1.0,
    delta=0.1,
  )
  np.testing.assert_allclose(
    bound.total.value, exact.total.value, rtol=IDENTITY[dtype.name]
  )


def test_a_vanishing_kernel_has_complexity_zero():
  keys, values = np.zeros((3, DIM)), draw(3)[1]

  @jax.jit
  def measure(keys, values):
    return [
      bounds.rademacher_draws(
        jax.random.key(11), phi, keys, values, radius=1.0, num_draws=2
      ).value
      for phi in (KERNELS['linear'], MAPS['identity'])
    ] + [
      bounds.rademacher_bound(MAPS['identity'], keys, values, radius=1).value
    ]

  for value in measure(keys, values):
    assert np.all(value == 0)


KEYS, VALUES = draw(3)
GOOD = {'radius': 1.0, 'loss_bound': 1.0, 'delta': 0.1}
KEY, PHI, KERNEL = jax.random.key(0), MAPS['positive'], KERNELS['exponential']


def total(keys=KEYS, values=VALUES, **change):
  return bounds.generalization_bound(PHI, keys, values, **(GOOD | change))


def signs(key=KEY, num_draws=1, ball=bounds.FROBENIUS):
  return bounds.rademacher_draws(
    key, PHI, KEYS, VALUES, radius=1.0, num_draws=num_draws, ball=ball
  )


def gap(phi, population, sample, **options):
  """The gap of means over the demonstrations, of features or of a kernel."""
  states = (
    bounds.mean_embedding(p, KEYS, VALUES) for p in (population, sample)
  )
  return bounds.gap_supremum(phi, *states, radius=1.0, **options)


@pytest.mark.parametrize(
  ('message', 'call'),
  [
    ('radius is 0.0; expected a finite number > 0', lambda: total(radius=0.0)),
    ('radius is -1.0; expected a finite num', lambda: total(radius=-1.0)),
    ('radius is inf; expected a finite number', lambda: total(radius=math.inf)),
    ('loss_bound is 0.0; expected a finite', lambda: total(loss_bound=0.0)),
    ('delta is 0.0; expected a finite number > 0 and < 1',
     lambda: total(delta=0.0)),
    ('delta is 1.0; expected a finite number > 0 and < 1',
     lambda: total(delta=1.0)),
    ('ball is a str; expected a Ball', lambda: total(ball='frobenius')),
    ('keys is empty', lambda: total(KEYS[:0], VALUES[:0])),
    ('num_draws is 0', lambda: signs(num_draws=0)),
    ('key is an int', lambda: signs(key=0)),
    ('ball is a NoneType; expected', lambda: signs(ball=None)),
    ('ball is a float; expected', lambda: gap(PHI, PHI, PHI, ball=2.0)),
    ('population is a DualState; expected a', lambda: gap(KERNEL, PHI, PHI)),
    ('sample is a KernelDualState; expected', lambda: gap(PHI, PHI, KERNEL)),
    ('state is a KernelDualState; expected', lambda: bounds.expected_loss(
      PHI, *(bounds.mean_embedding(p, KEYS, VALUES) for p in (KERNEL, PHI)))),
  ],
)  # fmt: skip
def test_bad_input_is_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
