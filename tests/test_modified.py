"""Every modification is one loss through one door, and one closed form."""

import functools

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
  features,
  kernels,
  losses,
  modified,
)
from tests import tolerances

SHAPES = [(2, 1, 1, 1), (12, 4, 3, 32)]
MAPS = {
  'positive': features.PositiveFeatures,
  'elu': lambda projection: features.EluPlusOneFeatures(),
  'softmax': lambda projection: kernels.ExponentialKernel(),
  'gaussian': lambda projection: kernels.GaussianKernel(),
}


def _problem(seed, shape, dtype, name='positive', scale=0.7):
  """Draws by NumPy: compiling a draw for each shape would take the time."""
  size, d_k, d_v, num_features = shape
  rng = np.random.default_rng(seed)
  projection = rng.normal(size=(num_features, d_k))
  query, keys = rng.normal(size=d_k), rng.normal(size=(size, d_k))
  arrays = projection, scale * query, scale * keys, rng.normal(size=(size, d_v))
  projection, *tokens = (jnp.asarray(array, dtype) for array in arrays)
  return MAPS[name](projection), *tokens


def _trained(phi, query, keys, values, num_query_tokens, **options):
  """The definition: train the dual model by `jax.grad`, then predict."""
  size = keys.shape[0] - num_query_tokens
  state = dual.zero_shot(phi, keys[size:], values[size:])
  state = dual.one_step_autodiff(
    phi, state, keys[:size], values[:size], **options
  )
  return dual.predict(phi, state, query)


def _close(a, b, dtype, amount=1.0):
  bound = tolerances.IDENTITY[jnp.dtype(dtype).name]
  scale = amount * max(1.0, float(jnp.max(jnp.abs(b))))
  np.testing.assert_allclose(a, b, rtol=0, atol=10 * bound * scale)


@functools.cache
def _compiled(sides):
  """Compiles `sides(problem, strength)`, which returns what must agree."""
  return jax.jit(sides)


configurations = hypothesis.given(
  seed=strategies.integers(0, 2**20),
  strength=strategies.floats(-2, 2),
  shape=strategies.sampled_from(SHAPES),
)
SETTINGS = hypothesis.settings(
  max_examples=25, deadline=None, derandomize=True, database=None
)


def _check_sides(sides, name, seed, shape, strength, amount=3.0):
  problem = _problem(seed, shape, jnp.float64, name)
  outputs = _compiled(sides)(problem, strength)
  for output in outputs[1:]:
    _close(output, outputs[0], jnp.float64, amount)


LOSSES = {
  'contrastive': losses.contrastive,
  'squared': losses.squared,
  'info_nce': losses.info_nce(0.7),
}


def _loss_sides(loss, num_query_tokens, problem, rate):
  rate = jnp.abs(rate)
  attend = modified.attention_from_loss(loss, learning_rate=rate)
  return (
    _trained(*problem, num_query_tokens, loss=loss, learning_rate=rate),
    attend(*problem, num_query_tokens=num_query_tokens),
  )


LOSS_SIDES = {
  (loss, count): functools.partial(_loss_sides, LOSSES[loss], count)
  for loss in LOSSES
  for count in (0, 1)
}


@pytest.mark.parametrize('name', ['positive', 'softmax'])
@pytest.mark.parametrize('case', LOSS_SIDES)
@SETTINGS
@configurations
def test_losses_through_the_door_equal_training(name, case, **draws):
  _check_sides(LOSS_SIDES[case], name, **draws)


def _ridge_sides(problem, strength):
  # The contrastive part with step 1, the ridge with step 1/2.
  penalty = losses.ridge(0.5 * strength)
  attend = modified.attention_from_loss(losses.contrastive, penalty=penalty)
  return (
    modified.regularised(strength=0.5 * strength)(*problem),
    attend(*problem, num_query_tokens=1),
    _trained(*problem, 1, penalty=penalty),
  )


def _decay_sides(problem, strength):
  # An optimizer is fixed when attention is built; the strength is not.
  optimizer = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(1.0))
  attend = modified.attention_from_loss(losses.contrastive, optimizer=optimizer)
  del strength
  return (
    modified.regularised(strength=0.3)(*problem),
    attend(*problem, num_query_tokens=1),
    _trained(*problem, 1, optimizer=optimizer),
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['elu', 'gaussian'])
@pytest.mark.parametrize('sides', [_ridge_sides, _decay_sides])
@SETTINGS
@configurations
def test_regularised_is_ridge_and_weight_decay(name, sides, **draws):
  _check_sides(sides, name, **draws)


RULES = [
  modified.unnormalised,
  modified.raise_others,
  modified.scale_others,
]


def _negative_sides(rule, count, problem, strength):
  phi, query, keys, values = problem
  attend = modified.negative(
    num_negatives=count, strength=0.4 * strength, renormalise=rule
  )
  loss = losses.negatives(attend.change(phi, query, keys))
  return (
    attend(phi, query, keys, values),
    modified.attention_from_loss(loss)(phi, query, keys, values),
    _trained(phi, query, keys, values, 0, loss=loss),
  )


NEGATIVE_SIDES = {
  rule.__name__: functools.partial(_negative_sides, rule, 2) for rule in RULES
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['positive', 'softmax'])
@pytest.mark.parametrize('case', NEGATIVE_SIDES)
@SETTINGS
@configurations
def test_negatives_are_their_loss(name, case, **draws):
  # A rule may divide by what little the others have: allow for its size.
  _check_sides(NEGATIVE_SIDES[case], name, amount=30.0, **draws)


@pytest.mark.parametrize('rule', RULES)
def test_renormalised_weights_sum_as_promised(rule):
  problem = _problem(0, (9, 3, 2, 16), jnp.float64)
  phi, query, keys, _ = problem
  attend = modified.negative(num_negatives=3, strength=0.3, renormalise=rule)
  total = attend(phi, query, keys, jnp.ones((9, 1)))
  expected = 0.7 if rule is modified.unnormalised else 1.0
  np.testing.assert_allclose(total, [expected], rtol=1e-12)


def test_random_choice_has_the_right_size_and_depends_on_the_key():
  candidates = jnp.arange(20) != 3
  weights = jnp.full(20, 0.05)
  chosen = [
    modified.random_choice(jax.random.key(seed))(weights, candidates, 5)
    for seed in range(4)
  ]
  assert all(int(jnp.sum(c)) == 5 and not c[3] for c in chosen)
  assert any((chosen[0] != c).any() for c in chosen[1:])


def test_token_negatives_match_the_matrix_form():
  phi, _, keys, values = _problem(1, (8, 3, 2, 16), jnp.float64)
  attend = modified.token_negative(num_negatives=2, strength=0.4)
  weights = jax.vmap(
    lambda q: attention.kernel_attention(phi, q, keys, jnp.eye(8))
  )(keys)
  matrix = np.zeros((8, 8))
  for i, row in enumerate(np.asarray(weights)):
    order = [j for j in np.argsort(row, kind='stable') if j != i]
    matrix[i, order[:2]] = 0.2
  labels = jnp.asarray((np.eye(8) - matrix) @ np.asarray(values))
  found = attend.stream(phi, keys, keys, values)
  _close(found, weights @ labels, jnp.float64)
  attend = modified.attention_from_loss(losses.negatives(jnp.asarray(matrix)))
  expected = attention.kernel_attention(phi, keys[0], keys, labels)
  _close(attend(phi, keys[0], keys, values), expected, jnp.float64)


def test_augmented_attention_is_contrastive_on_augmented_pairs():
  phi, query, keys, values = _problem(2, (8, 3, 2, 16), jnp.float64)
  closed = modified.augmented(
    augment_keys=jax.nn.gelu, augment_values=jnp.tanh
  )(phi, query, keys, values)

  def loss(predictions, values):
    return -jnp.sum(predictions * jnp.tanh(values))

  attend = modified.attention_from_loss(loss)
  keys = jax.nn.gelu(keys)
  _close(attend(phi, query, keys, values), closed, jnp.float64)
  _close(_trained(phi, query, keys, values, 0, loss=loss), closed, jnp.float64)


def test_info_nce_from_zero_is_attention_with_centred_values(dtype):
  phi, query, keys, values = _problem(3, (9, 3, 2, 16), dtype)
  attend = modified.attention_from_loss(losses.info_nce(0.5), learning_rate=0.5)
  centred = values - jnp.mean(values, axis=0)[None]
  expected = attention.kernel_attention(phi, query, keys, centred)
  _close(attend(phi, query, keys, values), expected, dtype)


def test_info_nce_is_the_negative_variant_with_all_as_negatives():
  phi, query, keys, values = _problem(3, (9, 3, 2, 16), jnp.float64)
  nce = modified.attention_from_loss(losses.info_nce())
  all_negatives = losses.negatives(jnp.full(9, 1 / 9))
  negative = modified.attention_from_loss(all_negatives)
  _close(
    nce(phi, query, keys, values),
    negative(phi, query, keys, values),
    jnp.float64,
  )


@pytest.mark.parametrize('name', sorted(MAPS))
def test_neutral_settings_are_plain_attention(name, dtype):
  problem = _problem(4, (9, 3, 2, 16), dtype, name)
  plain = attention.kernel_attention(*problem)
  for attend in (
    modified.regularised(strength=0.0),
    modified.regularised_as_printed(strength=0.0),
    modified.augmented(augment_keys=lambda x: x, augment_values=lambda x: x),
    modified.negative(num_negatives=3, strength=0.0),
    modified.negative(num_negatives=0, strength=0.7),
    modified.attention_from_loss(losses.contrastive),
  ):
    output = attend(*problem)
    assert output.dtype == dtype
    _close(output, plain, dtype, 0.1)


def test_a_second_step_is_the_gradient_of_its_loss():
  """Two steps along `jax.grad` on weights, the loss written out."""
  generator = np.random.default_rng(3)
  phi = features.PositiveFeatures(jnp.asarray(generator.normal(size=(8, 4))))
  query = jnp.asarray(generator.normal(size=4))
  keys = jnp.asarray(generator.normal(size=(6, 4)))
  values = jnp.asarray(generator.normal(size=(6, 2)))
  rows = jax.vmap(phi)(keys)
  normalisers = rows @ jnp.sum(rows, axis=0)

  def loss(weights):
    left = values - rows @ weights.T / normalisers[:, None]
    return jnp.sum(normalisers[:, None] * left**2) / 2

  zero = jnp.zeros((2, 8))
  first = zero - jax.grad(loss)(zero)
  second = first - 0.7 * jax.grad(loss)(first) + 0.2 * (first - zero)
  expected = second @ phi(query) / (jnp.sum(rows, axis=0) @ phi(query))
  attend = modified.second_step(learning_rate=0.7, momentum=0.2)
  np.testing.assert_allclose(attend(phi, query, keys, values), expected, 1e-12)
  with pytest.raises(ValueError, match='num_query_tokens is 1; expected 0'):
    attend(phi, query, keys, values, num_query_tokens=1)


def test_the_query_side_of_regularised_attention():
  phi, query, keys, values = _problem(0, (3, 4, 2, 8), jnp.float64)
  strict, printed = (
    make(strength=0.5)
    for make in (modified.regularised, modified.regularised_as_printed)
  )
  weights = attention.weights(phi, query, keys)
  plain = weights @ values
  for count in range(4):
    is_query_side = jnp.arange(3) >= 3 - count
    forgotten = jnp.where(is_query_side, 0.5 * weights, 0) @ values
    found = strict(phi, query, keys, values, num_query_tokens=count)
    _close(found, plain - forgotten, jnp.float64)
    own = 0.5 * values[-1] if count else 0 * values[-1]
    found = printed(phi, query, keys, values, num_query_tokens=count)
    _close(found, plain - own, jnp.float64)
  # The two forms differ, also by default.
  gap = strict(phi, query, keys, values) - printed(phi, query, keys, values)
  assert float(jnp.max(jnp.abs(gap))) > 0.01
  seen = jnp.array([True, True, False])
  hidden = printed(phi, query, keys, values.at[2].set(jnp.nan), mask=seen)
  expected = attention.kernel_attention(phi, query, keys[:2], values[:2])
  _close(hidden, expected, jnp.float64)
  _close(strict(phi, query, keys[:1], values[:1]), values[0] / 2, jnp.float64)
  for count, message in (
    (4, r'num_query_tokens is 4 of 3 tokens; expec'),
    (-1, r'num_query_tokens is -1; expected an integer >= 0'),
  ):
    with pytest.raises(ValueError, match=message):
      strict(phi, query, keys, values, num_query_tokens=count)


def test_a_query_that_is_a_token_is_not_its_own_negative():
  phi, _, keys, _ = _problem(6, (5, 3, 2, 16), jnp.float64, 'gaussian')
  attend = modified.negative(
    num_negatives=1, strength=0.5, select=modified.highest_scores
  )
  for count, is_negative in ((0, True), (1, False), (2, False)):
    change = attend.change(phi, keys[-1], keys, num_query_tokens=count)
    assert bool(change[-1] > 0) is is_negative


def test_printed_form_is_exact_for_un_learning_the_own_pair():
  phi, query, keys, values = _problem(5, (9, 3, 2, 16), jnp.float64)
  normaliser = dual.normaliser(phi, keys, query)
  test_input = phi(query)
  square = jnp.sum(test_input**2)

  def penalty(weights):
    return 0.3 * normaliser * values[-1] @ (weights @ test_input) / square

  trained = _trained(phi, query, keys, values, 1, penalty=penalty)
  attend = modified.regularised_as_printed(strength=0.3)
  printed = attend(phi, query, keys, values)
  _close(trained, printed, jnp.float64)


@pytest.mark.parametrize('name', ['positive', 'softmax'])
@pytest.mark.parametrize('num_query_tokens', [0, 1])
def test_a_penalty_with_a_slope_at_zero_counts(name, num_query_tokens):
  phi, *arrays = _problem(5, (5, 3, 2, 16), jnp.float64, name)
  target = 0.3 * jnp.ones(())

  def penalty(weights):
    return (
      jnp.sum((weights - target) ** 2)
      if name == 'positive'
      else (jnp.sum((weights[0] - weights[1] - target) ** 2))
    )

  attend = modified.attention_from_loss(losses.contrastive, penalty=penalty)
  found = attend(phi, *arrays, num_query_tokens=num_query_tokens)
  trained = _trained(phi, *arrays, num_query_tokens, penalty=penalty)
  _close(found, trained, jnp.float64)
  plain = attention.kernel_attention(phi, *arrays)
  assert jnp.max(jnp.abs(found - plain)) > 1e-3
  if name == 'positive':
    query, keys, values = arrays
    with pytest.raises(ValueError, match='penalty has a slope at W_0 = 0'):
      attend.stream(phi, query[None], keys, values)
    with pytest.raises(ValueError, match='penalty has no finite gradient'):
      modified.attention_from_loss(losses.contrastive, penalty=jnp.linalg.norm)(
        phi, *arrays
      )


def test_false_declarations_are_found_out():
  phi, query, keys, values = _problem(5, (5, 3, 2, 16), jnp.float64)

  def mean(predictions, values):
    return jnp.mean((predictions - values) ** 2)

  for honest in (mean, losses.info_nce()):
    declared = losses.sum_over_demonstrations(
      lambda p, v, honest=honest: honest(p, v)
    )
    attend = modified.attention_from_loss(declared)
    with pytest.raises(ValueError, match='slope of one row depends on another'):
      attend.causal(phi, keys, keys, values)
    with pytest.raises(ValueError, match='slope of one row depends on another'):
      attend(phi, query, keys, values, mask=jnp.arange(5) < 3)


@pytest.mark.parametrize(
  'loss',
  [
    lambda p, v: -jnp.sum(p * v) + jnp.sum(p[2:] * v[:-2]),
    lambda p, v: (
      -jnp.sum(0.5 ** jnp.arange(float(len(p))) * jnp.sum(p * v, axis=1))
    ),
    lambda p, v: -jnp.sum(p * v) * (2 if len(p) >= 4 else 1),
    lambda p, v: -jnp.sum(p * v) + jnp.sum(p[:1] * p[-1:]) / 2,
  ],
)
def test_sums_of_more_than_pairs_and_of_positions_are_found_out(loss):
  phi, _, keys, values = _problem(5, (5, 3, 2, 16), jnp.float64)
  attend = modified.attention_from_loss(losses.sum_over_demonstrations(loss))
  with pytest.raises(ValueError, match='row depends on another or on its pos'):
    attend.causal(phi, keys, keys, values)


@pytest.mark.parametrize('rule', RULES)
def test_padding_changes_no_negatives(rule):
  phi, query, keys, values = _problem(6, (6, 3, 2, 16), jnp.float64)
  attend = functools.partial(
    modified.negative(num_negatives=4, strength=0.5, renormalise=rule),
    phi,
    query,
  )
  seen, alone = jnp.arange(6) < 3, jnp.arange(6) == 2

  @jax.jit
  def run(keys, values):
    slope = jax.grad(lambda keys: jnp.sum(attend(keys, values, mask=alone)))
    padded = attend(keys, values, mask=seen)
    return padded, attend(keys[:3], values[:3]), slope(keys)

  padded, short, gradient = run(keys, values)
  _close(padded, short, jnp.float64)
  assert jnp.all(jnp.isfinite(gradient))


def test_what_is_no_loss_or_no_constant_optimizer_is_named():
  arrays = _problem(0, (3, 4, 2, 8), jnp.float64)
  for loss, message in (
    (lambda predictions, values: predictions * values, r'returns \w+ \[3, 2\]'),
    (lambda predictions, values: None, 'loss returns a NoneType'),
  ):
    attend = modified.attention_from_loss(loss)
    with pytest.raises(ValueError, match=message):
      attend(*arrays)

  def traced(rate):
    return modified.attention_from_loss(
      losses.contrastive, optimizer=optax.sgd(rate)
    )(*arrays)

  with pytest.raises(ValueError, match='optimizer holds traced values'):
    jax.jit(traced)(0.5)


def test_doors_that_do_not_fit_are_errors():
  phi, query, keys, values = _problem(9, (6, 3, 2, 16), jnp.float64)
  cosine = modified.attention_from_loss(losses.cosine)
  for call in (
    lambda: cosine(phi, query, keys, values),
    lambda: cosine.stream(phi, keys, keys, values),
    lambda: cosine.causal(phi, keys, keys, values),
    lambda: jax.jit(lambda q: cosine(phi, q, keys, values))(query),
  ):
    with pytest.raises(ValueError, match='W_0 = 0'):
      call()
  assert jnp.all(
    jnp.isfinite(cosine(phi, query, keys, values, num_query_tokens=1))
  )
  for optimizer in (
    optax.adam(0.1),
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    optax.sign_sgd(0.1),
  ):
    # Adam itself mixes dtypes, which the strict mode of the tests refuses.
    with (
      jax.numpy_dtype_promotion('standard'),
      pytest.raises(ValueError, match='proportional'),
    ):
      modified.attention_from_loss(losses.contrastive, optimizer=optimizer)
  with pytest.raises(ValueError, match='loss is a str'):
    modified.attention_from_loss('contrastive')
  with pytest.raises(ValueError, match='learning_rate'):
    modified.attention_from_loss(losses.contrastive, learning_rate=-1.0)
  with pytest.raises(ValueError, match='num_query_tokens'):
    modified.attention_from_loss(losses.contrastive)(
      phi, query, keys, values, num_query_tokens=6
    )


def test_cosine_with_query_side_equals_training():
  problem = _problem(10, (6, 3, 2, 16), jnp.float64)
  attend = modified.attention_from_loss(losses.cosine)
  trained = _trained(*problem, 2, loss=losses.cosine)
  _close(attend(*problem, num_query_tokens=2), trained, jnp.float64, 10)


def test_masked_rows_leave_no_trace():
  phi, query, keys, values = _problem(11, (8, 3, 2, 16), jnp.float64)
  mask = jnp.arange(8) < 5
  hidden_keys = jnp.where(mask[:, None], keys, jnp.nan)
  hidden_values = jnp.where(mask[:, None], values, jnp.nan)
  squared = modified.attention_from_loss(losses.squared)
  for fn in (squared, modified.negative(num_negatives=2, strength=0.3)):

    @jax.jit
    def run(hidden_keys, hidden_values, fn=fn):
      def hidden(keys):
        return fn(phi, query, keys, hidden_values, mask=mask)

      gradient = jax.grad(lambda keys: jnp.sum(hidden(keys)))(hidden_keys)
      short = fn(phi, query, keys[:5], values[:5])
      return short, hidden(hidden_keys), gradient

    short, masked, gradient = run(hidden_keys, hidden_values)
    np.testing.assert_allclose(masked, short, atol=1e-13)
    assert jnp.all(jnp.isfinite(gradient))


def test_a_loss_without_a_sum_composes_with_jit_vmap_and_grad():
  phi, query, keys, values = _problem(12, (6, 3, 2, 16), jnp.float64, 'softmax')
  attend = modified.attention_from_loss(
    losses.info_nce(), penalty=losses.ridge(0.2)
  )

  def fn(query):
    return attend(phi, query, keys, values, num_query_tokens=1)

  @jax.jit
  def run(query, keys):
    slope = jax.grad(lambda query: jnp.sum(fn(query) ** 2))
    return fn(query), jax.vmap(fn)(keys), slope(query)

  output, rows, gradient = run(query, keys)
  np.testing.assert_allclose(output, fn(query), atol=1e-13)
  assert rows.shape == (6, 2)
  assert jnp.all(jnp.isfinite(gradient))
  assert jnp.any(gradient != 0)


def test_a_layer_of_an_invented_loss_trains():
  key_x, key_p = jax.random.split(jax.random.key(13))
  tokens = jax.random.normal(key_x, (8, 3), jnp.float32)

  @losses.sum_over_demonstrations
  def huber(predictions, values):
    return jnp.sum(optax.huber_loss(predictions, values))

  attend = modified.attention_from_loss(huber)
  phi = features.EluPlusOneFeatures()

  @jax.jit
  def objective(weights):
    hidden = tokens @ weights
    output = attend.causal(phi, hidden, hidden, hidden)
    return jnp.mean((output[1:] - tokens[:-1]) ** 2)

  weights = jax.random.normal(key_p, (3, 3), jnp.float32)
  optimizer = optax.sgd(0.5)
  state, before = optimizer.init(weights), objective(weights)
  step = jax.jit(lambda w, s: optimizer.update(jax.grad(objective)(w), s, w))
  for _ in range(30):
    updates, state = step(weights, state)
    weights = weights + updates
  assert objective(weights) < 0.8 * before
