"""Softmax regression: closed forms against autodiff, shifts, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax.accounts import softmax_regression as account
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


def logit_hessian(target, logits):
  """The Hessian of words that are the unit vectors."""
  return account.hessian(account.Problem(jnp.eye(len(target)), target), logits)


def test_hessian_in_the_document_is_a_kronecker_product():
  posed, weights, _ = draw()
  curvature = logit_hessian(posed.target, posed.document @ weights)
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
  logits = np.log(np.maximum(f, np.finfo(float).tiny))
  matrices = jax.jit(jax.vmap(logit_hessian))(b, logits)
  eigenvalues = np.linalg.eigvalsh(matrices)
  low, high = -0.2404088, 0.3081171
  assert low - 1e-6 <= eigenvalues.min() < -0.1
  assert 0.25 < eigenvalues.max() <= high + 1e-6
  for p, extreme in ((0.614357, high), (0.135643, low)):
    two = logit_hessian(jnp.array([1.0, 0]), jnp.log(jnp.array([p, 1 - p])))
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


def test_a_data_step_moves_logits_along_the_error_signal():
  posed, weights, _ = draw()
  document = posed.document - 2 * account.gradients(posed, weights).document
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
  allowed = account.lipschitz_in_weights(document) * jnp.linalg.norm(x - y)
  data = jnp.linalg.norm(x) / 2
  data = data * jnp.linalg.norm(account.centre(change), 2)
  return (
    jnp.linalg.norm(f - other) / jnp.where(allowed == 0, 1, allowed),
    jnp.linalg.norm(f - moved) / data,
  )


def test_published_bound_is_far_above_and_never_overflows():
  assert float(account.log_published_bound(20, 1.5)) == pytest.approx(
    26.99, abs=0.01
  )
  for radius in (0.1, 0.2887, 1.0, 50.0):
    radius = jnp.float32(radius)
    published = account.log_published_bound(200, radius)
    assert jnp.isfinite(published)


def test_everything_batches():
  posed, weights, new = draw()
  pair = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), posed)
  rows = jnp.stack([weights, new])
  batched = jax.jit(jax.vmap(account.gradients))(pair, rows)
  single = account.gradients(posed, weights)
  np.testing.assert_allclose(batched.weights[0], single.weights, atol=1e-14)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_constants_of_half_precision_are_those_of_float32(dtype):
  document = account.centre(draw(dtype=dtype)[0].document)
  constant = account.lipschitz_in_weights(document)
  assert constant.dtype == dtype
  expected = account.lipschitz_in_weights(document.astype(jnp.float32))
  np.testing.assert_allclose(constant.astype(jnp.float32), expected, rtol=1e-2)


def two(*shape):
  return jnp.ones(shape or 2)


POSED, OLD, NEW = draw()
DOCUMENT, TARGET = POSED


@pytest.mark.parametrize(
  ('message', 'function', 'arguments'),
  [
    ('disagree in d: 5 and 4', account.loss, (POSED, OLD[1:])),
    ('learning_rate is inf',
     functools.partial(account.weight_shift, learning_rate=np.inf),
     (POSED, OLD)),
    ('num_words is 0', account.log_published_bound, (0, 1.0)),
    (r'radius is -1\.0', account.log_published_bound, (3, -1.0)),
    ('before has shape .2, 1.; expected .n.', account.shifted_target,
     (two(), two(2, 1), two())),
    ('prediction and vector disagree in n: 2 and 3', account.apply_jacobian,
     (two(), two(3))),
    ('posed.document and queries disagree in d: 3 and 2',
     functools.partial(account.attend, learning_rate=1.0),
     (account.Problem(two(2, 3), two()), two(2, 2))),
  ],
)  # fmt: skip
def test_bad_input_is_named(message, function, arguments):
  with pytest.raises(ValueError, match=message):
    function(*arguments)
