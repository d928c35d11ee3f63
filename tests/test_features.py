"""Feature maps: one battery for all, then what is particular to each.

A new map is one line in `MAPS`. Unbiasedness and variance of the random maps
are in `test_projections.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import features, types
from tests import oracles, tolerances

DIM = 5


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  build: Callable[[Any], Any]  # Projection -> map.
  oracle: Callable[[Any, Any], Any]  # Projection, x -> features.
  num_features: int
  random: bool = False
  positive: bool = False


def taylor(order):
  return Case(
    name=f'taylor{order}',
    build=lambda projection: features.TaylorFeatures(order=order),
    oracle=lambda projection, x: oracles.taylor_features(order, x),
    num_features=math.comb(DIM + order, order),
  )


NUM_DIRECTIONS = 7
MAPS = [
  Case(
    'positive',
    features.PositiveFeatures,
    oracles.positive_features,
    NUM_DIRECTIONS,
    random=True,
    positive=True,
  ),
  Case(
    'hyperbolic',
    features.HyperbolicFeatures,
    oracles.hyperbolic_features,
    2 * NUM_DIRECTIONS,
    random=True,
    positive=True,
  ),
  Case(
    'trigonometric',
    features.TrigonometricFeatures,
    oracles.trigonometric_features,
    2 * NUM_DIRECTIONS,
    random=True,
  ),
  Case(
    'elu_plus_one',
    lambda projection: features.EluPlusOneFeatures(),
    lambda projection, x: oracles.elu_plus_one_features(x),
    DIM,
    positive=True,
  ),
  Case(
    'identity',
    lambda projection: features.IdentityFeatures(),
    lambda projection, x: oracles.identity_features(x),
    DIM,
  ),
  *(taylor(order) for order in range(4)),
  Case(
    'of a function',
    lambda projection: features.from_function(jnp.negative),
    lambda projection, x: -x,
    DIM,
  ),
  Case(
    'of a logarithm',
    lambda projection: features.from_log(jnp.negative),
    lambda projection, x: np.exp(-x),
    DIM,
    positive=True,
  ),
]
RANDOM_MAPS = [case for case in MAPS if case.random]
DTYPES = ['float16', 'bfloat16', 'float32', 'float64']

every_map = pytest.mark.parametrize('case', MAPS, ids=lambda case: case.name)
random_maps = pytest.mark.parametrize(
  'case', RANDOM_MAPS, ids=lambda case: case.name
)


def normal(seed, *shape, dtype='float64'):
  """Numbers, not keys: these tests need no particular distribution."""
  array = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(array, dtype)


def projection(dtype='float64'):
  return normal(1, NUM_DIRECTIONS, DIM, dtype=dtype)


ROWS = normal(2, 6, DIM).at[1].multiply(3.0).at[2].set(0.0)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def evaluate(phi, x):
  """`phi(x)`, log-scale and scaled features of rows, compiled once a map."""
  return phi(x), *phi.scaled(x)


# The battery.


@every_map
def test_agrees_with_the_oracle(case):
  result, _, _ = evaluate(case.build(projection()), ROWS)
  expected = [case.oracle(*map(np.asarray, (projection(), x))) for x in ROWS]
  np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


@every_map
def test_agrees_with_the_oracle_in_one_dimension(case):
  directions, x = normal(1, NUM_DIRECTIONS, 1), jnp.array([-0.7])
  result, _, _ = evaluate(case.build(directions), x[None])
  expected = case.oracle(np.asarray(directions), np.asarray(x))
  np.testing.assert_allclose(result[0], expected, rtol=1e-12)


@every_map
def test_jit_and_vmap_change_nothing(case):
  phi = case.build(projection())
  together, _, _ = evaluate(phi, ROWS)
  for i in (0, 1):
    np.testing.assert_allclose(
      phi(ROWS[i]), together[i], rtol=1e-12, atol=1e-14
    )


@every_map
@pytest.mark.parametrize('dtype', DTYPES)
def test_dtype_and_shapes(case, dtype):
  rows = ROWS.astype(dtype)
  result, log_scale, scaled = evaluate(case.build(projection(dtype)), rows)
  assert result.shape == scaled.shape == (len(rows), case.num_features)
  assert log_scale.shape[1] in {1, case.num_features}
  assert result.dtype == log_scale.dtype == scaled.dtype == dtype
  wide = projection(dtype).astype('float64')
  precise, _, _ = evaluate(case.build(wide), rows.astype('float64'))
  error = abs(np.asarray(result, 'float64') - precise).max()
  assert error <= 8 * float(jnp.finfo(dtype).eps) * abs(precise).max()


@random_maps
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_the_input_decides_the_dtype(case, dtype):
  phi = case.build(projection('float64'))
  assert all(x.dtype == dtype for x in evaluate(phi, ROWS.astype(dtype)))


@every_map
def test_features_are_the_scaled_ones_times_their_scale(case):
  result, log_scale, scaled = evaluate(case.build(projection()), ROWS)
  np.testing.assert_allclose(
    result, np.exp(log_scale) * np.asarray(scaled), rtol=1e-13, atol=1e-300
  )
  if case.positive:  # The whole magnitude is in the scale.
    np.testing.assert_array_equal(scaled, 1)


@every_map
def test_positive_maps_are_positive(case):
  result, _, _ = evaluate(case.build(projection()), 3 * ROWS)
  assert jnp.all(result > 0) == (case.positive or case.name == 'taylor0')


@every_map
def test_gradients_are_finite_and_right(case):
  x = normal(7, DIM).at[0].set(0.0)  # Zero: the kink of elu, 0 ** 0.

  @jax.jit
  def total(directions, x):
    weights = jnp.arange(1.0, case.num_features + 1)
    return weights @ case.build(directions)(x)

  gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(projection(), x)
  assert all(jnp.all(jnp.isfinite(g)) for g in gradients)
  assert jnp.any(gradients[0] != 0) == case.random
  assert jnp.any(gradients[1] != 0) == (case.name != 'taylor0')
  step = 1e-6
  for argnum in (0, 1):
    slope = normal(8, *gradients[argnum].shape)
    ahead, behind = ([projection(), x[:]] for _ in range(2))
    ahead[argnum] += step * slope
    behind[argnum] -= step * slope
    finite_difference = (total(*ahead) - total(*behind)) / (2 * step)
    np.testing.assert_allclose(
      jnp.sum(gradients[argnum] * slope), finite_difference, rtol=1e-6
    )


@random_maps
def test_gradient_with_respect_to_the_map_is_a_map(case):
  slope = jax.jit(jax.grad(lambda phi: jnp.sum(phi(ROWS[0]))))(
    case.build(projection())
  )
  assert type(slope) is type(case.build(projection()))
  assert slope.projection.shape == projection().shape
  assert jnp.any(slope.projection != 0)


@every_map
def test_pytree_round_trip(case):
  phi = case.build(projection())
  leaves, structure = jax.tree.flatten(phi)
  assert len(leaves) == case.random
  again = jax.tree.unflatten(structure, leaves)
  assert type(again) is type(phi)
  for copy in (again, jax.tree.map(jnp.array, phi)):
    np.testing.assert_array_equal(
      evaluate(copy, ROWS)[0], evaluate(phi, ROWS)[0]
    )


def test_structures_of_different_maps_differ():
  # Equal ones would let a cache of jit mistake one map for another.
  built = [case.build(projection()) for case in MAPS]
  structures = [jax.tree.structure(phi) for phi in built]
  equal = [[a == b for a in structures] for b in structures]
  np.testing.assert_array_equal(equal, np.eye(len(MAPS), dtype=bool))


@random_maps
def test_paths_of_leaves_are_named(case):
  ((path, _),) = jax.tree.leaves_with_path(case.build(projection()))
  assert jax.tree_util.keystr(path) == '.projection'


@every_map
def test_another_projection_does_not_trace_again(case):
  traces = []

  @jax.jit
  def apply(phi, x):
    traces.append(1)
    return x

  for scale in (1.0, 2.0):
    apply(case.build(scale * projection()), ROWS)
  assert len(traces) == 1


@random_maps
def test_a_stack_of_heads_is_a_vmap(case):
  stack = normal(10, 3, NUM_DIRECTIONS, DIM)
  heads = jax.jit(jax.vmap(lambda phi, x: phi(x)))(case.build(stack), ROWS[:3])
  for h in range(3):
    expected = evaluate(case.build(stack[h]), ROWS)[0][h]
    np.testing.assert_allclose(heads[h], expected, rtol=1e-12, atol=1e-14)


@every_map
def test_follows_the_protocol_and_is_immutable(case):
  phi = case.build(projection())
  assert isinstance(phi, types.FeatureMap)
  assert not hasattr(phi, 'log_kernel')
  with pytest.raises(dataclasses.FrozenInstanceError):
    phi.projection = None


@every_map
def test_kernels_of_maps_are_positive_semidefinite(case):
  result, _, _ = evaluate(case.build(projection()), ROWS)
  eigenvalues = np.linalg.eigvalsh(np.asarray(result @ result.T))
  assert eigenvalues.min() >= -1e-12 * eigenvalues.max()


@every_map
def test_scaled_is_finite_at_any_norm(case):
  phi = case.build(projection('float32'))
  direction = normal(12, DIM)
  direction = direction / jnp.linalg.norm(direction)
  # |y|^2 / 2 with y = x / d ** 0.25.
  half_squares = jnp.array([1e2, 145.0, 1e3, 1e4, 1e5, 1e6])[:, None]
  rows = direction[None] * (2 * half_squares) ** 0.5 * DIM**0.25
  rows = rows.astype('float32')

  _, log_scale, scaled = evaluate(phi, rows)
  assert jnp.all(jnp.isfinite(log_scale))
  assert jnp.all(jnp.isfinite(scaled))
  largest = jnp.max(jnp.abs(scaled), axis=1)
  assert jnp.all((largest > 0.01) & (largest < 1e4))
  slopes = jax.jit(jax.vmap(jax.jacrev(phi.scaled)))(rows)
  assert all(jnp.all(jnp.isfinite(slope)) for slope in slopes)

  wide = case.build(projection('float32').astype('float64'))
  _, expected, _ = evaluate(wide, rows.astype('float64'))
  np.testing.assert_allclose(log_scale, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
  'phi',
  [
    features.PositiveFeatures(jnp.linspace(-2, 2, 35).reshape(7, 5)),
    features.EluPlusOneFeatures(),
  ],
)
def test_the_kernel_of_a_positive_map_is_its_inner_product(phi):
  x, y = jnp.linspace(-1, 1, DIM), jnp.linspace(2, -3, DIM)
  kernel = features.FeatureKernel(phi)
  assert hasattr(kernel, 'log_kernel')
  np.testing.assert_allclose(kernel(x, y), phi(x) @ phi(y), rtol=1e-5)
  assert np.isfinite(kernel.log_kernel(30 * x, 30 * y))
  slope, expected = (
    jax.grad(fn)(x)
    for fn in (lambda x: kernel(x, y), lambda x: phi(x) @ phi(y))
  )
  np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_naive_features_fail_where_scaled_ones_do_not():
  # What the test above is about: 0/0 without scales, infinity for waves.
  direction = np.ones(64) / 8
  x = jnp.asarray(direction * (2 * 145) ** 0.5 * 64**0.25, 'float32')
  omega = normal(13, 256, 64, dtype='float32')
  assert jnp.max(features.PositiveFeatures(omega)(x)) < 1e-30
  assert not jnp.all(jnp.isfinite(features.TrigonometricFeatures(omega)(x)))
  log_scale, _ = features.PositiveFeatures(omega).scaled(x)
  weights = jnp.exp(log_scale - jnp.max(log_scale))
  assert jnp.all(jnp.isfinite(weights))
  assert jnp.max(weights) == 1


# Bad input.


@every_map
@pytest.mark.parametrize(
  ('x', 'message'),
  [
    (np.zeros((2, DIM)), r'x has shape \[2, 5\]; expected \[d_k\]'),
    (np.zeros(()), r'x has shape \[\]; expected \[d_k\]'),
    (np.zeros(DIM, np.int32), 'x has dtype int32; expected a floating-point'),
    (np.zeros(DIM, bool), 'x has dtype bool; expected a floating-point'),
    ([0.0] * DIM, 'x is a list; expected a floating-point array'),
  ],
  ids=['matrix', 'scalar', 'integer', 'bool', 'list'],
)
def test_bad_inputs_are_named(case, x, message):
  phi = case.build(projection())
  with pytest.raises(ValueError, match=message):
    phi(x)
  with pytest.raises(ValueError, match=message):
    phi.scaled(x)


@random_maps
def test_bad_projections_are_named(case):
  with pytest.raises(ValueError, match='x and projection disagree in d_k'):
    case.build(projection())(jnp.zeros(DIM + 1))
  with pytest.raises(ValueError, match=r'projection has shape \[3, 7, 5\]'):
    case.build(normal(0, 3, NUM_DIRECTIONS, DIM))(jnp.zeros(DIM))
  with pytest.raises(ValueError, match='projection has dtype int'):
    case.build(jnp.ones((NUM_DIRECTIONS, DIM), int))(jnp.zeros(DIM))
  with pytest.raises(ValueError, match=r'projection is empty \(R = 0\)'):
    case.build(jnp.ones((0, DIM)))(jnp.zeros(DIM))


@pytest.mark.parametrize('order', [-1, 1.5, True, '2', None])
def test_bad_orders_are_named(order):
  with pytest.raises(
    ValueError, match=r'order is .*; expected an integer >= 0'
  ):
    features.TaylorFeatures(order=order)


def test_numpy_inputs_are_taken():
  x = np.random.default_rng(0).normal(size=DIM)
  for case in MAPS:
    phi = case.build(np.asarray(projection()))
    np.testing.assert_allclose(phi(x), phi(jnp.asarray(x)), rtol=1e-14)


# Taylor features.


@pytest.mark.parametrize(
  ('order', 'dim'), [(0, 3), (1, 4), (2, 4), (3, 4), (4, 2), (5, 3), (8, 1)]
)
def test_taylor_features_are_exact(order, dim):
  pairs = 2 * normal(0, 5, 2, dim)

  @jax.jit
  @jax.vmap
  def product(pair):
    phi = jax.vmap(features.TaylorFeatures(order=order))(pair)
    return phi[0] @ phi[1]

  of_map = product(pairs)
  oracle = functools.partial(oracles.truncated_exponential_kernel, order)
  for i, (x, y) in enumerate(np.asarray(pairs)):
    error = tolerances.IDENTITY['float64'] * oracle(abs(x), abs(y))
    assert abs(float(of_map[i]) - oracle(x, y)) <= error


def test_taylor_features_of_long_vectors_do_not_overflow():
  order = 3
  # Beyond the range of float32 when multiplied out.
  phi = features.TaylorFeatures(order=order)
  x, y = normal(0, 2, 24)
  rows = jnp.stack([1e15 * x, y]).astype('float32')
  scales, scaled = jax.jit(jax.vmap(phi.scaled))(rows)
  log_kernel = jnp.log(jnp.abs(scaled[0] @ scaled[1])) + jnp.sum(scales)
  score = 1e15 * float(x @ y) / 24**0.5
  expected = math.log(abs(score) ** order / math.factorial(order))
  assert abs(float(log_kernel) - expected) < 1e-4


@pytest.mark.parametrize(
  ('order', 'root', 'smallest'),
  [
    (2, -1.0, 0.5),
    (6, -2.181, 0.149),
  ],
)
def test_even_orders_are_positive_and_odd_orders_are_not(order, root, smallest):
  scores = jnp.linspace(-30, 30, 6001)[:, None]

  def kernel(order):
    phi = features.TaylorFeatures(order=order)
    return jax.jit(jax.vmap(lambda t: phi(t) @ phi(jnp.ones(1))))(scores)

  even, odd = kernel(order), kernel(order - 1)
  assert jnp.all(even > 0)
  np.testing.assert_allclose(jnp.min(even), smallest, atol=1e-3)
  np.testing.assert_allclose(scores[jnp.argmin(even)], root, atol=1e-2)
  # One order less: negative exactly below the same point.
  clear = abs(scores[:, 0] - root) > 2e-3
  np.testing.assert_array_equal((odd < 0)[clear], scores[clear, 0] < root)


def test_taylor_feature_counts():
  counts = {
    (dim, order): jax.eval_shape(
      features.TaylorFeatures(order=order), jax.ShapeDtypeStruct((dim,), 'f4')
    ).size
    for dim, order in [(16, 1), (16, 2), (16, 3), (64, 1), (64, 2)]
  }
  assert counts == {
    (16, 1): 17,
    (16, 2): 153,
    (16, 3): 969,
    (64, 1): 65,
    (64, 2): 2145,
  }


# Elu and identity.


def test_elu_plus_one_is_its_definition():
  x = jnp.array([-700.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 1e4])
  expected = np.where(x > 0, np.maximum(x, 0) + 1, np.exp(np.minimum(x, 0)))
  phi = features.EluPlusOneFeatures()
  np.testing.assert_allclose(phi(x), expected, rtol=1e-13)
  np.testing.assert_allclose(phi(x)[1:], 1 + jax.nn.elu(x)[1:], rtol=1e-7)
  slopes = jax.vmap(jax.grad(lambda t: phi(t[None])[0]))(x)
  np.testing.assert_allclose(slopes, np.exp(np.minimum(x, 0)), rtol=1e-12)


def test_identity_is_the_input():
  x = normal(0, DIM)
  np.testing.assert_array_equal(features.IdentityFeatures()(x), x)


# Same projection, or no kernel at all.


@random_maps
def test_queries_and_keys_need_the_same_projection(case):
  x = 2 * normal(0, DIM)
  exact = float(jnp.exp(x @ x / DIM**0.5))
  one, other = (
    case.build(normal(seed, 4000, DIM, dtype='float64')) for seed in (1, 2)
  )
  assert abs(float(one(x) @ one(x)) / exact - 1) < 0.2
  assert abs(float(one(x) @ other(x)) / exact - 1) > 0.5


def test_a_function_may_bring_arrays_and_a_scale():
  def scaled(omega, x):
    return jnp.max(x), omega @ x  # A scale of shape [].

  x = normal(14, DIM)
  phi = features.from_function(jax.tree_util.Partial(scaled, projection()))
  np.testing.assert_allclose(phi(x), np.exp(max(x)) * (projection() @ x))
  slope = jax.grad(lambda phi: jnp.sum(phi(x)))(phi)
  (leaf,) = jax.tree.leaves(slope)
  assert leaf.shape == projection().shape
  assert jnp.any(leaf != 0)
  with pytest.raises(ValueError, match=r'expected a function x \[d_k\]'):
    features.from_log(lambda x, y: x)


@pytest.mark.parametrize('make', [features.from_function, features.from_log])
@pytest.mark.parametrize(
  ('fn', 'message'),
  [
    (lambda x: [x], r'fn\(x\) is a list; expected a floating-point array'),
    (lambda x: 3, r'fn\(x\) is an int; expected a floating-point array'),
    (lambda x: x[0], r'fn\(x\) has shape \[\]; expected \[R\]. Add what'),
    (lambda x: x[None], r'fn\(x\) has shape \[1, 4\]; expected \[R\]'),
    (lambda x: x.astype(int), r'fn\(x\) has dtype int.*fn\(x\).astype'),
    (lambda x: (x, x, x), r'fn\(x\) is a tuple; expected a floating-point'),
  ],
)
def test_what_a_function_returns_is_named(make, fn, message):
  with pytest.raises(ValueError, match=message):
    make(fn)(jnp.ones(4))
