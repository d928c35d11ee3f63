"""Attention equals one gradient step: certificates that pass, fail, and say."""

import functools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies

from iclcl_jax import (
  attention,
  dual,
  equivalence,
  features,
  kernels,
  losses,
  modified,
  precision,
  projections,
)
from tests import oracles, tolerances

# Every shape compiles anew, so they come from a small set:
# (tokens, query tokens, width, value width, features).
SMALLEST = (1, 0, 1, 1, 1)
NARROW = (5, 1, 1, 2, 1)
LARGEST = (9, 3, 4, 3, 8)
SETTINGS = hypothesis.settings(
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
PROJECTIONS = (
  projections.gaussian,
  projections.orthogonal,
  projections.simplex,
  projections.simplex_plus,
)
RANDOM_MAPS = {
  'positive': features.PositiveFeatures,
  'hyperbolic': features.HyperbolicFeatures,
  'trigonometric': features.TrigonometricFeatures,
}
FIXED = {
  'elu_plus_one': features.EluPlusOneFeatures(),
  'taylor_2': features.TaylorFeatures(order=2),
  'taylor_3': features.TaylorFeatures(order=3),
  'identity': features.IdentityFeatures(),
  'exponential': kernels.ExponentialKernel(),
  'gaussian': kernels.GaussianKernel(),
  'linear': kernels.LinearKernel(),
  **{
    name: oracles.truncated_exponential(order)
    for name, order in (
      ('truncated_exponential_3', 3),
      ('truncated_exponential', 2),
    )
  },
}
# Sums of both signs: D may vanish, and then it is the verdict that counts.
SIGNED = {
  'trigonometric',
  'taylor_3',
  'identity',
  'linear',
  'truncated_exponential_3',
}


def make_phi(name, projection_index, seed, num_features, dim, dtype):
  if name in FIXED:
    return FIXED[name]
  draw = PROJECTIONS[projection_index if dim > 1 else projection_index % 2]
  draw = _compiled_projection(draw, num_features, dim, dtype)
  return RANDOM_MAPS[name](draw(jax.random.key(seed)))


@functools.cache
def _compiled_projection(draw, num_features, dim, dtype):
  return jax.jit(lambda key: draw(key, num_features, dim, dtype=dtype))


def make_tokens(seed, shape, scale, num_duplicates, dtype):
  num_tokens, _, d_k, d_v, _ = shape
  rng = np.random.default_rng(seed)
  keys = scale * rng.normal(size=(num_tokens, d_k))
  keys[: min(num_duplicates, num_tokens)] = keys[0]
  query = scale * rng.normal(size=d_k)
  values = rng.normal(size=(num_tokens, d_v))
  return tuple(jnp.asarray(x, dtype) for x in (query, keys, values))


OBJECTIVE = 'loss', 'penalty', 'optimizer', 'learning_rate', 'attention_fn'
_residuals = jax.jit(
  equivalence.residuals, static_argnames=('num_query_tokens', *OBJECTIVE)
)


@pytest.fixture
def tokens():
  return make_tokens(0, LARGEST, 1.0, 1, jnp.float32)


@pytest.fixture
def phi():
  return make_phi('positive', 1, 0, 8, 4, jnp.float32)


def certify(phi, query, keys, values, mask=None):
  """`verify` in the one form that these tests compile."""
  mask = jnp.ones(keys.shape[0], bool) if mask is None else mask
  return equivalence.verify(
    phi, query, keys, values, num_query_tokens=LARGEST[1], mask=mask
  )


CONFIGURATION = {
  'projection_index': strategies.integers(0, 3),
  'scale': strategies.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0, 40.0]),
  'num_duplicates': strategies.integers(1, 9),
  'hidden': strategies.sets(strategies.integers(0, 7), max_size=8),
  'seed': strategies.integers(0, 2**31 - 1),
}


def check_configuration(
  name, dtype, shape, projection_index, scale, num_duplicates, hidden, seed
):
  num_tokens, num_query_tokens, d_k, _, num_features = shape
  phi = make_phi(name, projection_index, seed, num_features, d_k, dtype)
  query, keys, values = make_tokens(seed, shape, scale, num_duplicates, dtype)
  mask = None
  if shape == LARGEST:  # The last token stays visible.
    mask = jnp.asarray([i not in hidden for i in range(num_tokens)])
  certificate = equivalence.verify(
    phi, query, keys, values, num_query_tokens=num_query_tokens, mask=mask
  )
  if name in SIGNED and certificate.verdict != 'holds':
    assert certificate.verdict.endswith('normaliser'), str(certificate)
    assert not certificate.condition < 1e3  # The verdict is earned.
    return
  assert certificate.verdict == 'holds', str(certificate)
  assert certificate.residual <= tolerances.IDENTITY[dtype.name]
  assert certificate.tolerance == tolerances.IDENTITY[dtype.name]


@pytest.mark.parametrize('name', [*RANDOM_MAPS, *FIXED])
@hypothesis.settings(SETTINGS, max_examples=25)
@hypothesis.given(
  shape=strategies.sampled_from([SMALLEST, LARGEST]), **CONFIGURATION
)
def test_attention_equals_one_gradient_step(name, dtype, **draws):
  check_configuration(name, dtype, **draws)


@pytest.mark.parametrize('name', ['positive', 'trigonometric', 'exponential'])
@hypothesis.settings(SETTINGS, max_examples=15)
@hypothesis.given(**CONFIGURATION)
def test_identity_holds_in_width_one(name, **draws):
  check_configuration(name, jnp.dtype('float64'), NARROW, **draws)


@pytest.mark.parametrize(
  'name', ['positive', 'hyperbolic', 'elu_plus_one', 'exponential', 'gaussian']
)
def test_positive_kernels_are_perfectly_conditioned(tokens, name):
  phi = make_phi(name, 0, 0, 8, 4, jnp.dtype('float32'))
  certificate = certify(phi, *tokens)
  assert certificate.condition == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize('name', ['query', 'keys', 'values'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_named(phi, tokens, name, bad):
  arrays = dict(zip(('query', 'keys', 'values'), tokens, strict=True))
  arrays[name] = arrays[name].at[0].set(bad)
  certificate = certify(phi, *arrays.values())
  assert certificate.verdict == f'not finite: {name}'
  assert not certificate.holds


def test_an_overflow_on_the_way_is_no_pass(tokens):
  query, keys, values = tokens
  huge = float(jnp.finfo(jnp.float32).max)
  certificate = certify(
    kernels.LinearKernel(), query * huge**0.5, keys * huge**0.6, values
  )
  assert not certificate.holds


def test_masked_tokens_may_hold_anything(phi, tokens):
  query, keys, values = tokens
  mask = jnp.arange(9) != 4
  clean = certify(phi, query, keys, values, mask)
  keys, values = keys.at[4].set(jnp.nan), values.at[4].set(jnp.inf)
  dirty = certify(phi, query, keys, values, mask)
  assert dirty.holds
  np.testing.assert_array_equal(clean.attention, dirty.attention)


@pytest.mark.parametrize('name', ['identity', 'linear'])
def test_lost_normalisers_are_verdicts(name):
  query, values = jnp.asarray([1.0, 2.0]), jnp.ones((2, 1))
  keys = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
  certificate = equivalence.verify(FIXED[name], query, keys, values)
  assert certificate.verdict == 'zero normaliser'
  eps = float(jnp.finfo(keys.dtype).eps)
  almost = keys.at[1, 0].add(-4 * eps)
  certificate = equivalence.verify(FIXED[name], query, almost, values)
  assert certificate.verdict == 'ill-conditioned normaliser'
  assert certificate.condition > eps**-0.5


def test_an_overflowing_normaliser_is_a_verdict():
  x = jnp.full((2, 4), 1e200)
  certificate = equivalence.verify(kernels.LinearKernel(), x[0], x, x[:, :1])
  assert certificate.verdict.startswith('not finite: normaliser')


@pytest.mark.parametrize('name', ['positive', 'trigonometric', 'exponential'])
def test_nothing_visible_is_a_verdict(tokens, name):
  phi = make_phi(name, 0, 0, 8, 4, jnp.float32)
  certificate = certify(phi, *tokens, mask=jnp.zeros(9, bool))
  assert certificate.verdict == 'no visible token'
  assert not certificate.holds


def test_reduced_precision_explains_a_small_residual_alone(patch, tokens):
  check = functools.partial(equivalence.verify, FIXED['exponential'], *tokens)
  for factor, verdict in ((1.001, 'precision-limited'), (2.0, 'fails')):
    patch(dual, 'one_step', functools.partial(_scale_mass, factor))
    assert check().verdict == 'fails'
    certificate = check(arithmetic=precision.PLATFORM_DEFAULT)
    assert certificate.verdict == verdict
    assert not certificate.holds
    assert certificate.precision == 'platform default'


_one_step = dual.one_step
_one_step_autodiff = dual.one_step_autodiff


def _scale_mass(factor, *args, **options):
  state = _one_step(*args, **options)
  return state._replace(mass=factor * state.mass)


_double_mass = functools.partial(_scale_mass, 2)


def _forget_start(phi, state, keys, values, **options):
  empty = dual.zero_shot(phi, keys[:0], values[:0])
  return _one_step(phi, empty, keys, values, **options)


def _halve_rate(*args, **options):
  return _one_step(*args, **options | {'learning_rate': 0.5})


def _shift_values(phi, state, keys, values, **options):
  return _one_step(phi, state, keys, jnp.roll(values, 1, axis=0), **options)


def _ascend(*args, **options):
  return _one_step_autodiff(*args, **options | {'learning_rate': 0.999})


@pytest.mark.parametrize(
  ('name', 'target', 'broken'),
  [
    ('positive', 'one_step', _double_mass),
    ('exponential', 'one_step', _double_mass),
    ('exponential', 'one_step', _forget_start),
    ('positive', 'one_step', _forget_start),
    ('exponential', 'one_step', _halve_rate),
    ('exponential', 'one_step', _shift_values),
    ('exponential', 'one_step_autodiff', _ascend),
  ],
)
def test_a_broken_dual_fails(patch, tokens, name, target, broken):
  phi = make_phi(name, 0, 0, 8, 4, jnp.float32)
  patch(dual, target, broken)
  certificate = equivalence.verify(phi, *tokens, num_query_tokens=3)
  assert certificate.verdict == 'fails'
  assert certificate.residual > 10 * certificate.tolerance


@pytest.mark.parametrize('size', [1e-6, 1.0, 1e6])
def test_the_residual_is_relative_to_what_was_added(size):
  """Three equal keys of values 1, 2, 3: `S` is `2 + 2` times their size."""
  x = jnp.ones((3, 2))
  values = size * jnp.asarray([[1.0], [2.0], [3.0]])

  def double(*args):
    return 2 * attention.kernel_attention(*args)

  result = equivalence.residuals(
    kernels.ExponentialKernel(), x[0], x, values, attention_fn=double
  )
  # Twice the attention is off by 2, and `S` holds its output of 4.
  np.testing.assert_allclose(result.residual, 2 / (2 + 4), rtol=1e-12)
  np.testing.assert_allclose(result.relative_error, 2 / 4, rtol=1e-12)


def test_another_projection_on_one_side_fails(patch, tokens, phi):
  other = make_phi('positive', 1, 1, 8, 4, jnp.float32)
  query, keys, values = tokens

  @jax.jit
  def differ(phi, other):
    state = dual.zero_shot(other, keys[:0], values[:0])
    state = dual.one_step(other, state, keys, values)
    output = attention.kernel_attention(phi, query, keys, values)
    return jnp.max(jnp.abs(output - dual.predict(other, state, query)))

  assert differ(phi, phi) < 1e-5
  assert differ(phi, other) > 1e-3  # By hand: no rounding is that large.

  honest = attention.kernel_attention
  patch(
    attention,
    'kernel_attention',
    lambda _, *args, **options: honest(other, *args, **options),
  )
  certificate = equivalence.verify(phi, *tokens)
  assert certificate.verdict == 'fails'
  assert certificate.residual > 10 * certificate.tolerance


def test_half_precision_limits_the_verdict(tokens):
  dtype = jnp.dtype('bfloat16')
  arrays = [x.astype(dtype) for x in tokens]
  certificate = certify(FIXED['exponential'], *arrays)
  assert certificate.verdict == 'precision-limited', str(certificate)
  assert not certificate.holds
  assert certificate.tolerance == tolerances.IDENTITY['bfloat16']
  assert certificate.residual <= certificate.tolerance
  assert certificate.attention.dtype == dtype


def test_certificate_is_plain_data_and_readable(phi, tokens):
  certificate = certify(phi, *tokens)
  plain = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
  assert plain['verdict'] == 'holds'
  assert plain['holds'] is True
  assert plain['phi'] == 'PositiveFeatures'
  assert plain['attention'] == np.asarray(certificate.attention).tolist()
  assert (plain['num_demonstrations'], plain['num_query_tokens']) == (6, 3)
  text = str(certificate)
  assert text.startswith('attention = one gradient step: PositiveFeatures')
  for word in ('6 + 3', certificate.dtype, 'residual', 'holds', 'highest'):
    assert word in text
  assert max(map(len, text.splitlines())) <= 80


def test_verify_refuses_tracers(phi, tokens):
  with pytest.raises(ValueError, match=r'residuals inside jit'):
    jax.jit(lambda *args: equivalence.verify(phi, *args).residual)(*tokens)
  with pytest.raises(ValueError, match=r'residuals inside jit'):
    jax.jit(lambda phi: equivalence.verify(phi, *tokens).residual)(phi)


def test_residuals_work_under_jit_and_vmap(phi, tokens):
  query, keys, values = tokens
  queries = jnp.stack([query, 2 * query, -query])
  options = {'num_query_tokens': 3, 'mask': jnp.ones(9, bool)}
  rows = functools.partial(equivalence.residuals, phi, **options)
  batched = jax.jit(jax.vmap(rows, in_axes=(0, None, None)))(
    queries, keys, values
  )
  assert batched.residual.shape == (3,)
  assert jnp.all(batched.residual <= tolerances.IDENTITY['float32'])
  for i, one in enumerate(queries):
    single = _residuals(phi, one, keys, values, **options)
    np.testing.assert_allclose(
      batched.attention[i], single.attention, rtol=1e-5
    )


def test_own_feature_maps_and_kernels_are_welcome(tokens):
  class Squares:
    def __call__(self, x):
      return x**2

    def scaled(self, x):
      return jnp.zeros(1, x.dtype), x**2

  def student(x, y):
    return 1 / (1 + jnp.sum((x - y) ** 2))

  for phi, name in ((Squares(), 'Squares'), (student, 'student')):
    certificate = equivalence.verify(phi, *tokens)
    assert certificate.holds
    assert certificate.phi == name
    assert certificate.residual <= tolerances.IDENTITY['float32']


def test_a_query_side_that_is_not_stated_is_told(tokens):
  query, keys, values = tokens
  check = functools.partial(
    equivalence.verify,
    kernels.ExponentialKernel(),
    *(query, keys, values),
    attention_fn=modified.regularised(strength=0.5),
    penalty=losses.ridge(0.5),
  )
  verdict = check().verdict
  assert verdict.startswith('fails: attention_fn has 1 row on the query side')
  assert verdict.endswith('state num_query_tokens=1')
  assert check(num_query_tokens=1).holds


def test_features_that_are_not_finite_are_told(tokens):
  phi = features.from_function(lambda x: x * jnp.nan)
  verdict = equivalence.verify(phi, *tokens).verdict
  assert verdict.startswith('not finite: normaliser, made of features')


def _decayed(strength):
  return {
    'optimizer': optax.chain(
      optax.add_decayed_weights(strength), optax.sgd(1.0)
    )
  }


# What the dual model descends, and the attention that is said to follow.
OBJECTIVES = {
  'squared': ({'loss': losses.squared}, None),
  'info_nce': ({'loss': losses.info_nce(0.5)}, None),
  'cosine': ({'loss': losses.cosine}, None),
  'ridge': (
    {'penalty': losses.ridge(0.5)},
    functools.partial(
      modified.regularised(strength=0.5), num_query_tokens=LARGEST[1]
    ),
  ),
  'weight decay': (
    _decayed(-0.5),
    functools.partial(
      modified.regularised(strength=-0.5), num_query_tokens=LARGEST[1]
    ),
  ),
  'learning rate': ({'learning_rate': 0.25}, None),
}


@pytest.mark.parametrize('name', ['positive', 'exponential'])
@pytest.mark.parametrize('objective', OBJECTIVES)
def test_other_objectives_have_certificates_too(objective, name):
  dtype = jnp.float32 if objective == 'squared' else jnp.float64
  options, attention_fn = OBJECTIVES[objective]
  phi = make_phi(name, 1, 0, 8, 4, dtype)
  arrays = make_tokens(1, LARGEST, 0.5, 2, dtype)
  check = functools.partial(
    equivalence.verify, phi, *arrays, num_query_tokens=LARGEST[1]
  )
  certificate = check(**options, attention_fn=attention_fn)
  assert certificate.holds, str(certificate)
  assert certificate.residual <= tolerances.IDENTITY[jnp.dtype(dtype).name]
  # The plain layer is not the attention of this objective.
  plain = check(**options, attention_fn=attention.kernel_attention)
  assert plain.verdict == 'fails'
