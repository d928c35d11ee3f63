"""Softmax regression: closed forms against autodiff, shifts, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax.accounts import softmax_regression as account
from iclcl_jax.accounts import softmax_regression_bounds as bounds
from tests import tolerances

SHAPES = (12, 5), (7, 7)
CALLS = 200


def draw(shape=SHAPES[0], dtype=jnp.float64, seed=0):
  """A problem whose words share a large mean, and two weight vectors."""
  rng = np.random.default_rng(seed)
  num_words, width = shape
  document = rng.normal(size=shape) + 30 * rng.normal(size=(1, width))
  target = rng.dirichlet(np.full(num_words, 0.3))
  weights = rng.normal(size=(2, width))
  arrays = (jnp.asarray(x, dtype) for x in (document, target))
  return account.Problem(*arrays), *jnp.asarray(weights, dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@pytest.mark.parametrize('shape', SHAPES)
def test_derivatives_are_those_of_autodiff(shape, dtype):
  posed, weights, _ = draw(shape, dtype)
  posed = posed._replace(document=account.centre(posed.document))
  ours = jax.jit(account.gradients)(posed, weights)
  theirs, slope = jax.jit(jax.grad(account.loss, argnums=(0, 1)))(
    posed, weights
  )
  curvature = jax.jit(jax.hessian(account.loss, argnums=1))(posed, weights)
  atol = tolerances.IDENTITY[jnp.dtype(dtype).name]
  for mine, auto in (
    (ours.weights, slope),
    (ours.document, theirs.document),
    (ours.target, theirs.target),
    (jax.jit(account.hessian)(posed, weights), curvature),
  ):
    assert mine.dtype == dtype
    assert jnp.max(jnp.abs(auto)) > 1e-3
    np.testing.assert_allclose(mine, auto, atol=atol)


def test_loss_is_that_of_numpy():
  posed, weights, _ = draw()
  logits = np.asarray(posed.document) @ np.asarray(weights)
  powers = np.exp(logits - logits.max())
  error = powers / powers.sum() - np.asarray(posed.target)
  np.testing.assert_allclose(account.loss(posed, weights), error @ error / 2)


def test_hessian_in_the_document_is_a_kronecker_product():
  posed, weights, _ = draw()
  prediction = account.predict(posed.document, weights)
  curvature = account.logit_hessian(prediction, posed.target)
  size = posed.document.size

  def loss(document):
    return account.loss(posed._replace(document=document), weights)

  expected = jax.jit(jax.hessian(loss))(posed.document).reshape(size, size)
  outer = weights[:, None] * weights[None]
  np.testing.assert_allclose(jnp.kron(curvature, outer), expected, atol=1e-12)
  np.testing.assert_allclose(jnp.sum(curvature, 1), jnp.zeros(12), atol=1e-15)


def test_curvature_stays_between_the_extremes_of_two_words():
  rng = np.random.default_rng(0)
  # Corners matter: small concentrations, and the extreme case itself.
  small = [rng.dirichlet(np.full(4, a), CALLS) for a in (0.1, 0.5, 1, 3)]
  f = np.concatenate(small)
  b = np.concatenate([rng.dirichlet(np.full(4, 0.05), CALLS) for _ in range(4)])
  matrices = jax.jit(jax.vmap(account.logit_hessian))(f, b)
  eigenvalues = np.linalg.eigvalsh(matrices)
  low, high = account.SMALLEST_CURVATURE, account.LARGEST_CURVATURE
  np.testing.assert_allclose([low, high], [-0.2404088, 0.3081171], atol=1e-6)
  assert low - 1e-6 <= eigenvalues.min() < -0.1
  assert 0.25 < eigenvalues.max() <= high + 1e-6
  for p, extreme in ((0.614357, high), (0.135643, low)):
    two = account.logit_hessian(jnp.array([p, 1 - p]), jnp.array([1.0, 0]))
    np.testing.assert_allclose(
      np.abs(np.linalg.eigvalsh(two)).max(), abs(extreme), atol=1e-6
    )


def test_target_moves_as_the_prediction_does():
  posed, old, new = draw()
  other, *_ = draw(seed=1)
  before = account.predict(posed.document, old)
  for after in (
    account.predict(posed.document, new),
    account.predict(other.document, old),
  ):
    target = account.shifted_target(posed.target, before, after)
    np.testing.assert_allclose(
      jnp.linalg.norm(after - posed.target),
      jnp.linalg.norm(before - target),
      atol=1e-15,
    )
    np.testing.assert_allclose(jnp.sum(target), 1, atol=1e-14)
    assert jnp.min(target) < 0  # It may leave the simplex.


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_smallest_data_shift_does_what_the_weight_shift_did(dtype):
  posed, old, new = draw(dtype=dtype)
  posed = posed._replace(document=account.centre(posed.document))
  moved = account.smallest_data_shift(posed.document, old, new)
  np.testing.assert_allclose(
    account.predict(moved, old),
    account.predict(posed.document, new),
    atol=10 * tolerances.IDENTITY[jnp.dtype(dtype).name],
  )
  size = jnp.linalg.norm(moved - posed.document)
  # Others with that property: a constant in all logits, or any move across x.
  rng = np.random.default_rng(0)
  for _ in range(5):
    across = jnp.asarray(rng.normal(size=posed.document.shape), dtype)
    across = across - (across @ old)[:, None] * (old / (old @ old))[None]
    mean = jnp.asarray(rng.normal(size=(1, 5)), dtype)
    other = moved + 0.1 * across + 0.1 * mean
    assert jnp.linalg.norm(other - posed.document) > size


def test_first_step_is_linear_attention_over_words():
  posed, weights, _ = draw()
  zero = jnp.zeros_like(weights)
  new = account.weight_shift(posed, zero, learning_rate=0.7)
  attend = jax.jit(functools.partial(account.attend, posed, learning_rate=0.7))
  np.testing.assert_allclose(
    attend(posed.document), posed.document @ new, atol=1e-11
  )
  others = draw(seed=3)[0].document[:4]
  np.testing.assert_allclose(attend(others), others @ new, atol=1e-11)
  slopes = jax.grad(lambda q: jnp.sum(attend(q)))(others)
  expected = np.broadcast_to(new, (4, 5))
  np.testing.assert_allclose(slopes, expected, atol=1e-12)


def test_descent_needs_no_weights():
  posed, weights, _ = draw()
  posed = posed._replace(document=account.centre(posed.document))
  logits = account.descend_logits(
    posed, posed.document @ weights, num_steps=6, learning_rate=0.3
  )
  for _ in range(6):
    weights = account.weight_shift(posed, weights, learning_rate=0.3)
  np.testing.assert_allclose(logits, posed.document @ weights, atol=1e-12)


def test_a_data_step_moves_logits_along_the_error_signal():
  posed, weights, _ = draw()
  document = account.data_shift(posed, weights, learning_rate=2.0)
  prediction = account.predict(posed.document, weights)
  signal = account.apply_jacobian(prediction, prediction - posed.target)
  expected = posed.document @ weights - 2 * (weights @ weights) * signal
  np.testing.assert_allclose(document @ weights, expected, atol=1e-12)


def test_true_constants_hold_and_are_sharp():
  rng = np.random.default_rng(0)
  ratios = jax.jit(jax.vmap(_ratios))(
    rng.normal(size=(CALLS, 6, 3)) + 50 * rng.normal(size=(CALLS, 1, 3)),
    rng.normal(size=(CALLS, 6, 3)),
    *rng.normal(size=(2, CALLS, 3)),
  )
  assert max(map(jnp.max, ratios)) <= 1 + 1e-9
  # Two words that tie: the constant is attained.
  document = jnp.array([[1.0], [-1.0]])
  y = jnp.array([1e-4])
  pair = _ratios(document, 1e-4 * document, y, -y)
  assert pair[0] > 0.9999
  wide = jnp.array([[1.0], [-1.0]])
  assert _ratios(1e-4 * wide, 2e-4 * wide, y, y)[1] > 0.9999


def _ratios(document, change, x, y):
  """Change of the prediction over what the true constants allow."""
  f = account.predict(document, x)
  other = account.predict(document, y)
  moved = account.predict(document + change, x)
  allowed = bounds.lipschitz_in_weights(document) * jnp.linalg.norm(x - y)
  data = bounds.lipschitz_in_document(x)
  data = data * jnp.linalg.norm(account.centre(change), 2)
  return (
    jnp.linalg.norm(f - other) / jnp.where(allowed == 0, 1, allowed),
    jnp.linalg.norm(f - moved) / data,
  )


def test_published_bound_is_far_above_and_never_overflows():
  assert float(bounds.log_published_bound(20, 1.5)) == pytest.approx(
    26.99, abs=0.01
  )
  assert float(bounds.log_chained_bound(20, 1.5)) == pytest.approx(
    15.29, abs=0.01
  )
  for radius in (0.1, 0.2887, 1.0, 50.0):
    radius = jnp.float32(radius)
    published = bounds.log_published_bound(200, radius)
    assert jnp.isfinite(published)
    assert bounds.log_chained_bound(200, radius) < published


def test_gradients_and_safe_steps_keep_their_bounds():
  rng = np.random.default_rng(0)

  def one(document, target, weights):
    posed = account.Problem(document, target)
    rate = bounds.safe_learning_rate(document)
    new = account.weight_shift(posed, weights, learning_rate=rate)
    size = jnp.linalg.norm(account.gradients(posed, weights).weights)
    gain = account.loss(posed, weights) - account.loss(posed, new)
    return size / bounds.gradient_bound(document), gain

  ratio, gain = jax.jit(jax.vmap(one))(
    rng.normal(size=(CALLS, 6, 3)),
    rng.dirichlet(np.full(6, 0.1), CALLS),
    2 * rng.normal(size=(CALLS, 3)),
  )
  assert 0.3 < jnp.max(ratio) <= 1
  assert jnp.min(gain) >= -1e-12


def test_matched_shifts_come_apart_no_further_than_the_bound():
  rng = np.random.default_rng(0)

  def one(document, target, weights):
    posed = account.Problem(document, target)
    bound, rate = bounds.one_step_distance(posed, weights, learning_rate=0.5)
    shifted = account.weight_shift(posed, weights, learning_rate=0.5)
    rewritten = account.data_shift(posed, weights, learning_rate=rate)
    gap = account.predict(document, shifted) - account.predict(
      rewritten, weights
    )
    return jnp.linalg.norm(gap) / bound

  for width in (3, 7):  # Fewer than n - 1 (lo = 0), and more.
    ratios = jax.jit(jax.vmap(one))(
      rng.normal(size=(CALLS, 5, width)),
      rng.dirichlet(np.full(5, 0.3), CALLS),
      rng.normal(size=(CALLS, width)),
    )
    assert 0.5 < jnp.max(ratios) <= 1


def test_newton_goes_uphill_where_the_loss_is_concave():
  posed = account.problem(jnp.array([[1.0], [0]]), jnp.array([0, 1.0]))
  start, no_penalty = jnp.array([2.0]), jnp.zeros(2)
  newton = functools.partial(account.newton, posed, start, num_steps=1)
  trace = newton(no_penalty)
  np.testing.assert_allclose(trace.weights[:, 0], [2, 3.557], atol=1e-3)
  np.testing.assert_allclose(trace.losses, [0.776, 0.945], atol=1e-3)
  assert account.hessian(posed, start)[0, 0] < 0
  damped = newton(no_penalty, damping=0.2405)
  assert damped.losses[1] < damped.losses[0]


def test_regularised_newton_converges_in_a_few_steps():
  posed, weights, _ = draw()
  posed = posed._replace(document=account.centre(posed.document))
  smallest = bounds.convexity_penalty(posed.document, 0.5)
  curvature = account.hessian(posed, weights)
  penalised = posed.document * smallest
  eigenvalues = np.linalg.eigvalsh(curvature + penalised.T @ penalised)
  assert eigenvalues.min() >= 0.5
  penalties = jnp.full(12, 10.0)
  trace = account.newton(posed, weights, penalties, num_steps=4)
  assert trace.gradient_norms[0] > 100
  assert trace.gradient_norms[-1] < 1e-10

  def objective(x):
    penalty = jnp.sum((penalties * (posed.document @ x)) ** 2)
    return account.loss(posed, x) + penalty / 2

  np.testing.assert_allclose(trace.losses[0], objective(weights))
  slope = jnp.linalg.norm(jax.grad(objective)(weights))
  np.testing.assert_allclose(trace.gradient_norms[0], slope)


def test_everything_batches():
  posed, weights, new = draw()
  pair = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), posed)
  rows = jnp.stack([weights, new])
  batched = jax.jit(jax.vmap(account.gradients))(pair, rows)
  single = account.gradients(posed, weights)
  np.testing.assert_allclose(batched.weights[0], single.weights, atol=1e-14)


def test_bad_input_is_named():
  posed, weights, new = draw()
  document, target = posed
  zero = jnp.zeros_like(weights)
  few = account.Problem(document[:3], target[:3])
  newton = functools.partial(account.newton, num_steps=1)
  for call, message in (
    (lambda: account.problem(document, 2 * target), 'target has sum 2'),
    (lambda: account.problem(document, target[1:]), 'disagree in n: 11 and 12'),
    (
      lambda: account.problem(document.at[0, 0].set(jnp.nan), target),
      'document has entries that are not finite',
    ),
    (
      lambda: account.problem(document, target.astype(jnp.float32)),
      'dtypes disagree',
    ),
    (lambda: account.loss(posed, weights[1:]), 'disagree in d: 4 and 5'),
    (
      lambda: account.problem(document[:0], target[:0]),
      r'document has shape \[0, 5\]',
    ),
    (lambda: newton(few, weights, target[:3]), '3 words of width 5'),
    (lambda: newton(posed, weights, target[1:]), 'penalties and document'),
    (
      lambda: newton(posed, weights, target, damping=-1.0),
      r'damping is -1\.0',
    ),
    (
      lambda: account.smallest_data_shift(document, zero, new),
      'weights are all 0',
    ),
    (
      lambda: account.weight_shift(posed, weights, learning_rate=np.inf),
      'learning_rate is inf',
    ),
    (
      lambda: account.descend_logits(
        posed, target, num_steps=0, learning_rate=1.0
      ),
      'num_steps is 0',
    ),
    (lambda: bounds.log_published_bound(0, 1.0), 'num_words is 0'),
    (lambda: bounds.log_published_bound(3, -1.0), r'radius is -1\.0'),
    (lambda: bounds.convexity_penalty(few.document, 1.0), 'of width 5'),
    (
      lambda: bounds.one_step_distance(posed, zero, learning_rate=1.0),
      'at 0 a data step moves nothing',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def test_the_distance_of_a_step_uphill_is_that_of_a_step_downhill():
  posed, weights, _ = draw()
  up = bounds.one_step_distance(posed, weights, learning_rate=-0.5)
  down = bounds.one_step_distance(posed, weights, learning_rate=0.5)
  assert up[0] == down[0] > 0
  assert up[1] == -down[1]


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_half_precision_is_solved_in_float32(dtype):
  posed, weights, _ = draw(dtype=dtype)
  posed = posed._replace(document=account.centre(posed.document))
  constant = bounds.lipschitz_in_weights(posed.document)
  penalty = bounds.convexity_penalty(posed.document, 0.1)
  trace = account.newton(
    posed, 0 * weights, jnp.full_like(posed.target, penalty), num_steps=2
  )
  assert constant.dtype == penalty.dtype == trace.weights.dtype == dtype
  assert trace.losses[-1] < trace.losses[0]


def two(*shape):
  return jnp.ones(shape or 2)


@pytest.mark.parametrize(
  ('message', 'call'),
  [
    (
      'before has shape',
      lambda: account.shifted_target(two(), two(2, 1), two()),
    ),
    (
      'target and prediction disagree in n',
      lambda: account.apply_logit_hessian(two(), two(1), two()),
    ),
    (
      'target and prediction disagree in n',
      lambda: account.logit_hessian(two(), two(1)),
    ),
    (
      'vector and prediction disagree in n',
      lambda: account.apply_jacobian(two(), two(3)),
    ),
    (
      'target and logits disagree in n',
      lambda: account.descend_logits(
        account.Problem(two(2, 3), two()),
        two(3),
        num_steps=1,
        learning_rate=1.0,
      ),
    ),
    (
      'queries and document disagree in d',
      lambda: account.attend(
        account.Problem(two(2, 3), two()), two(2, 2), learning_rate=1.0
      ),
    ),
    (
      'document has rank 1',
      lambda: account.newton(
        account.Problem(two(3, 2), two(3)), two(), two(3), num_steps=1
      ),
    ),
    (
      'singular Newton system',
      lambda: account.newton(
        account.Problem(jnp.eye(2), two() / 2), 0 * two(), 0 * two(),
        num_steps=1,
      ),
    ),
    (
      'document has rank 1',
      lambda: bounds.convexity_penalty(two(3, 2), 0.1),
    ),
  ],
)  # fmt: skip
def test_what_has_no_answer_is_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
