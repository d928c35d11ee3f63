"""Separate tokens, kernels, and losses given the inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import attention
from iclcl_jax.accounts import linear_regression_gd as account
from tests import tolerances

N, D_X, D_Y, STEPS = 4, 3, 2, 3
RATE = 0.7
LENGTH = 2 * N + 1


def problem():
  rng = np.random.default_rng(0)
  shapes = (N, D_X), (N, D_Y), (D_X,)
  return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


@functools.cache
def copied(sharpness=1e3):
  """Rows on separate tokens, before and after the copy layer."""
  rows = account.make_alternating_tokens(*problem(), jnp.eye(LENGTH))
  layer = account.construct_copy(N, d_x=D_X, d_y=D_Y, sharpness=sharpness)
  attend = functools.partial(account.attend, weights_fn=account.softmax_weights)
  visible = jnp.ones((LENGTH, LENGTH), bool)
  return rows, jax.jit(attend)(layer, rows, visible=visible)


def test_separate_tokens_alternate():
  inputs, labels, query = problem()
  rows, _ = copied()
  content = rows[:, LENGTH:]
  np.testing.assert_array_equal(rows[:, :LENGTH], np.eye(LENGTH))
  np.testing.assert_array_equal(content[0:-1:2, :D_X], inputs)
  np.testing.assert_array_equal(content[1::2, D_X:], labels)
  np.testing.assert_array_equal(content[-1, :D_X], query)
  assert not content[0::2, D_X:].any()
  assert not content[1::2, :D_X].any()


def test_the_copy_layer_writes_labels_next_to_inputs_and_nothing_else():
  _, labels, _ = problem()
  before, after = copied()
  np.testing.assert_array_equal(after[0:-1:2, LENGTH + D_X :], labels)
  change = np.array(after - before)
  change[0:-1:2, LENGTH + D_X :] = 0
  assert np.max(np.abs(change)) < 1e-100


@pytest.mark.parametrize(('sharpness', 'exact'), [(1e3, True), (12.0, False)])
@pytest.mark.parametrize('num_layers', [1, STEPS])
def test_copied_tokens_descend(sharpness, exact, num_layers):
  inputs, labels, query = problem()
  layer = account.construct(RATE, N, initial=jnp.zeros((D_Y, D_X)))
  layers = account.repeat(account.widen(layer, LENGTH), num_layers)
  rows = copied(sharpness)[1]
  prediction = jax.jit(functools.partial(account.predict, d_y=D_Y))(
    layers, rows
  )
  weights = account.descend(inputs, labels, jnp.full(num_layers, RATE))
  error = np.max(np.abs(prediction - weights @ query))
  assert (error < tolerances.IDENTITY['float64']) == exact
  assert exact or error > 1e-2


def test_a_layer_on_features_is_a_kernel_step_and_a_step_on_the_last_layer():
  inputs, labels, query = problem()

  def feature_map(x):
    return jnp.concatenate([jnp.sin(x), x**2])

  def kernel(a, b):
    return feature_map(a) @ feature_map(b)

  moved = jax.vmap(feature_map)(inputs)
  rows = account.make_tokens(moved, labels, feature_map(query))
  start = jnp.zeros((D_Y, moved.shape[1]))
  layer = account.construct(RATE, N, initial=start)
  answer = account.predict(account.repeat(layer, 1), rows, d_y=D_Y)
  step = RATE / N * attention.linear_attention(kernel, query, inputs, labels)
  weights = account.descend(moved, labels, jnp.full(1, RATE))
  np.testing.assert_allclose(step, answer, atol=1e-12)
  np.testing.assert_allclose(step, weights @ feature_map(query), atol=1e-12)


def test_bad_input_is_named():
  inputs, labels, query = problem()
  layer = account.construct(RATE, N, jnp.zeros((1, D_X)))
  cases = [
    ('positions has 3 rows; expected 9', account.make_alternating_tokens,
     inputs, labels, query, jnp.eye(3)),
    ('positions has shape', account.make_alternating_tokens, inputs, labels,
     query, jnp.ones(LENGTH)),
    ('num_demonstrations is 0', functools.partial(
      account.construct_copy, d_x=2), 0),
    ('sharpness is nan', functools.partial(
      account.construct_copy, d_x=2, sharpness=np.nan), 2),
    ('width is -1', account.widen, layer, -1),
  ]  # fmt: skip
  for message, fn, *arguments in cases:
    with pytest.raises(ValueError, match=message):
      fn(*arguments)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float16])
@pytest.mark.parametrize('size', [1e-25, 1e-7, 1.0, 1e20, 1e30])
def test_cosine_does_not_depend_on_the_size(size, dtype):
  size = min(max(size, 1e-4), 3e4) if dtype == jnp.float16 else size
  rows = jnp.asarray(np.full((2, 3), size), dtype)
  cosine = jax.jit(account.model_cosine)
  assert cosine(rows, rows).dtype == dtype
  np.testing.assert_allclose(cosine(rows, rows), 1, atol=1e-3)
  np.testing.assert_allclose(cosine(rows, -rows), -1, atol=1e-3)


def test_cosine_with_nothing_is_undefined_and_has_no_slope():
  zeros, ones = jnp.zeros((2, 3)), jnp.ones((2, 3))
  value, slope = jax.value_and_grad(account.model_cosine)(zeros, ones)
  assert jnp.isnan(value)
  np.testing.assert_array_equal(slope, zeros)


def test_slope_of_the_cosine_is_that_of_its_formula():
  rng = np.random.default_rng(0)
  a, b = jnp.asarray(rng.normal(size=(2, 1, 3)))

  def formula(a):
    return a @ b[0] / jnp.sqrt((a @ a) * (b[0] @ b[0]))

  np.testing.assert_allclose(
    jax.grad(account.model_cosine)(a, b)[0], jax.grad(formula)(a[0]), rtol=1e-12
  )


@pytest.mark.parametrize('size', [1e-25, 1.0, 1e25])
def test_rate_is_fitted_to_directions_of_any_size(size):
  directions = jnp.full((3, 1), size, jnp.float32)
  rate = account.fit_learning_rate(directions, 2 * directions)
  np.testing.assert_allclose(rate, 2, rtol=1e-6)


def layers_of(copies=1):
  return account.repeat(account.construct(1.0, 2, jnp.zeros((1, 3))), copies)


@pytest.mark.parametrize(
  ('message', 'call'),
  [
    (r'inputs is empty \(N = 0\)', lambda: account.descend(
      jnp.ones((0, 3)), jnp.ones((0, 1)), jnp.ones(1))),
    (r'inputs is empty \(N = 0\)', lambda: account.descend_plus_plus(
      jnp.ones((0, 3)), jnp.ones((0, 1)), jnp.ones(3), jnp.ones(1),
      jnp.ones(1))),
    (r'inputs is empty \(N = 0\)', lambda: account.make_tokens(
      jnp.ones((0, 3)), jnp.ones((0, 1)), jnp.ones(3))),
    ('weights_fn is a str', lambda: account.predict(
      layers_of(), jnp.ones((3, 4)), weights_fn='softmax')),
    ('weights_fn returned', lambda: account.attend(
      account.construct(1.0, 2, jnp.zeros((1, 3))), jnp.ones((3, 4)),
      weights_fn=lambda scores, visible, d_k: scores[:1])),
    ('d_y is 9', lambda: account.predict(
      layers_of(), jnp.ones((3, 4)), d_y=9)),
    ('dtypes disagree', lambda: account.predict(
      layers_of(2), jnp.ones((3, 4), jnp.bfloat16))),
    ('layers.queries has shape', lambda: account.predict(
      account.construct(1.0, 2, jnp.zeros((1, 3))), jnp.ones((3, 4)))),
    ('visible has dtype float', lambda: account.attend(
      account.construct(1.0, 2, jnp.zeros((1, 3))), jnp.ones((3, 4)),
      visible=jnp.ones((3, 3)))),
    ('layer.queries has shape', lambda: account.fold(layers_of())),
    ('layer.queries has shape', lambda: account.widen(layers_of(), 1)),
    ('start is a SelfAttention', lambda: account.interpolate(
      *[account.construct(1.0, 2, jnp.zeros((1, 3)))] * 2, 0.5)),
    ('initial has dtype int', lambda: account.construct(
      1.0, 2, jnp.zeros((1, 3), int))),
    ('sharpness is 1.0', lambda: account.construct_copy(
      5, d_x=3, sharpness=1.0)),
    ('sharpness is 1000000.0', lambda: account.construct_copy(
      5, d_x=3, sharpness=1e6, dtype=jnp.float16)),
    ('moments is a float', lambda: account.LinearTasks(
      d_x=2, num_demonstrations=2, moments=0.5)),
  ],
)  # fmt: skip
def test_what_cannot_be_answered_is_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
