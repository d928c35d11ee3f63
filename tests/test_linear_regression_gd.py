"""Constructed linear self-attention descends; one step has a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax.accounts import linear_regression_gd as account
from tests import tolerances

N, D_X, D_Y, STEPS = 7, 5, 3, 4
RATE, CONTRACTION = 0.8, 0.03


def problem(dtype=jnp.float64):
  """Inputs, labels, a query, and weights W_0."""
  rng = np.random.default_rng(0)
  shapes = (N, D_X), (N, D_Y), (D_X,), (D_Y, D_X)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.cache
def stacked_prediction(visible_name='context_only', num_layers=STEPS, zero=0):
  """The constructed layers, every row kept, under a mask."""
  inputs, labels, query, initial = problem()
  initial = initial * (1 - zero)
  tokens = account.make_tokens(inputs, labels, query, initial=initial)
  layer = account.construct(RATE, N, initial=initial)
  column = jnp.arange(N + 1)
  visible = {
    'context_only': None,
    'with_query': jnp.ones((N + 1, N + 1), bool),
    'causal': (column[None] < N) & (column[None] <= column[:, None]),
  }[visible_name]
  step = jax.jit(lambda rows: account.attend(layer, rows, visible=visible))
  for _ in range(num_layers):
    tokens = step(tokens)
  return tokens, initial


def error_of(visible_name, num_layers, zero=0):
  inputs, labels, query, _ = problem()
  tokens, initial = stacked_prediction(visible_name, num_layers, zero)
  rates = jnp.full(num_layers, RATE)
  weights = account.descend(inputs, labels, rates, initial=initial)
  return float(jnp.max(jnp.abs(-tokens[-1, D_X:] - weights @ query)))


@pytest.mark.parametrize('num_layers', [1, STEPS])
@pytest.mark.parametrize('zero', [0, 1])
def test_constructed_layers_are_steps_of_gradient_descent(num_layers, zero):
  bound = tolerances.IDENTITY['float64']
  assert error_of('context_only', num_layers, zero) < bound


def test_every_demonstration_gets_its_residual():
  """The step is a change of targets, for context rows as for the query."""
  inputs, labels, _, _ = problem()
  tokens, initial = stacked_prediction()
  rates = jnp.full(STEPS, RATE)
  weights = account.descend(inputs, labels, rates, initial=initial)
  moved = labels - inputs @ (weights - initial).T
  np.testing.assert_allclose(tokens[:-1, D_X:], moved, atol=1e-12)
  np.testing.assert_array_equal(tokens[:, :D_X], jnp.vstack(problem()[0::2]))


@pytest.mark.parametrize(
  ('visible_name', 'num_layers', 'zero', 'differs'),
  [
    ('with_query', 1, 0, True),
    ('with_query', 1, 1, False),
    ('with_query', 2, 1, True),
    ('causal', 1, 0, False),
    ('causal', 2, 0, True),
  ],
)
def test_other_masks_break_the_construction(
  visible_name, num_layers, zero, differs
):
  error = error_of(visible_name, num_layers, zero)
  assert (error > 1e-2) == differs
  assert differs or error < tolerances.IDENTITY['float64']


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_predict_reads_the_query_alone(dtype):
  inputs, labels, query, initial = problem(dtype)
  tokens = account.make_tokens(inputs, labels, query, initial=initial)
  layer = account.construct(RATE, N, initial=initial)
  layers = account.repeat(layer, STEPS)
  predict = jax.jit(functools.partial(account.predict, d_y=D_Y))
  prediction = predict(layers, tokens)
  assert prediction.dtype == dtype
  expected = -stacked_prediction()[0][-1, D_X:]
  atol = 100 * tolerances.IDENTITY[jnp.dtype(dtype).name]
  np.testing.assert_allclose(prediction, expected, atol=atol)


def construct_plus_plus():
  start = jnp.zeros((D_Y, D_X))
  return account.construct(RATE, N, start, contraction=CONTRACTION)


@pytest.mark.parametrize('num_layers', [1, STEPS])
def test_gd_plus_plus_layers_are_its_recursion(num_layers):
  inputs, labels, query, _ = problem()
  tokens = account.make_tokens(inputs, labels, query)
  layer = construct_plus_plus()
  prediction = jax.jit(functools.partial(account.predict, d_y=D_Y))(
    account.repeat(layer, num_layers), tokens
  )
  ones = jnp.ones(num_layers)
  expected = account.descend_plus_plus(
    inputs, labels, query, RATE * ones, CONTRACTION * ones
  )
  np.testing.assert_allclose(prediction, expected, atol=1e-12)


def test_gd_plus_plus_is_numpy_and_its_last_contraction_is_idle():
  inputs, labels, query, _ = map(np.asarray, problem())
  rates, contractions = np.array([0.5, 0.3, 0.2]), np.array([0.02, 0.05, 0.01])
  x, y, q, answer = inputs, labels, query, np.zeros(D_Y)
  for rate, contraction in zip(rates, contractions, strict=True):
    weights = rate / N * y.T @ x
    answer = answer + weights @ q
    y = y - x @ weights.T
    shift = np.eye(D_X) - contraction * x.T @ x
    x, q = x @ shift, shift @ q
  fn = jax.jit(account.descend_plus_plus)
  arrays = map(jnp.asarray, (inputs, labels, query, rates, contractions))
  inputs, labels, query, rates, contractions = arrays
  result = fn(inputs, labels, query, rates, contractions)
  np.testing.assert_allclose(result, answer, atol=1e-12)
  other = fn(inputs, labels, query, rates, contractions.at[-1].set(9.0))
  np.testing.assert_array_equal(result, other)
  plain = fn(inputs, labels, query, rates, 0 * contractions)
  weights = account.descend(inputs, labels, rates)
  np.testing.assert_allclose(plain, weights @ query, atol=1e-12)
  assert np.max(np.abs(plain - result)) > 1e-2


def test_contraction_moves_eigenvalues():
  inputs, labels, query, _ = problem()
  layer = construct_plus_plus()
  tokens = account.attend(layer, account.make_tokens(inputs, labels, query))
  before = np.linalg.eigvalsh(inputs.T @ inputs)
  after = np.linalg.eigvalsh(tokens[:-1, :D_X].T @ tokens[:-1, :D_X])
  expected = before * (1 - CONTRACTION * before) ** 2
  np.testing.assert_allclose(after, np.sort(expected), atol=1e-12)


def draw(count, seed=0, d_x=10, size=10, noise=0.0, normal=0):
  """Prompts in NumPy: directions `p` after a unit step, and targets."""
  rng = np.random.default_rng(seed)
  shape = count, size + 1, d_x
  uniform = rng.uniform(-0.5, 0.5, shape)
  inputs = rng.normal(size=shape) if normal else uniform
  weights = rng.normal(size=(count, d_x))
  labels = np.einsum('bnd,bd->bn', inputs, weights)
  targets = labels[:, -1:]
  labels = labels[:, :-1] + noise * rng.normal(size=(count, size))
  learnt = np.einsum('bn,bnd->bd', labels, inputs[:, :-1]) / size
  directions = np.einsum('bd,bd->b', learnt, inputs[:, -1])[:, None]
  return directions, targets


@pytest.mark.parametrize(
  ('options', 'normal'),
  [
    ({}, 0),
    ({}, 1),
    ({'noise_variance': 1.0}, 0),
  ],
)
def test_expected_loss_is_the_mean_over_tasks(options, normal):
  count = 40_000
  tasks = account.LinearTasks(
    d_x=10,
    num_demonstrations=10,
    moments=account.Moments(1.0, 3.0)
    if normal
    else account.Moments(1 / 12, 1 / 80),
    **options,
  )
  directions, targets = draw(
    count,
    noise=options.get('noise_variance', 0) ** 0.5,
    normal=normal,
  )
  best = account.optimal_learning_rate(tasks)
  for rate in (best, 0.7 * best):
    losses = 0.5 * (rate * directions - targets) ** 2
    bound = tolerances.SIGMAS * np.std(losses) / count**0.5
    expected = account.expected_loss(tasks, rate)
    assert bound < 0.06 * expected
    assert abs(np.mean(losses) - expected) < bound


@pytest.mark.parametrize(
  ('d_x', 'size', 'half_range', 'rate', 'loss'),
  [
    (10, 10, 0.5, 6.0606, 0.20623),
    (10, 20, 0.5, 8.0537, 0.13702),
    (20, 10, 0.5, 4.0268, 0.55369),
    (2, 10, 0.5, 10.1695, 0.01271),
    (10, 10, 1.0, 1.5152, 0.82492),
  ],
)
def test_closed_form_values(d_x, size, half_range, rate, loss):
  tasks = account.LinearTasks(
    d_x=d_x,
    num_demonstrations=size,
    moments=account.Moments(half_range**2 / 3, half_range**4 / 5),
  )
  best = account.optimal_learning_rate(tasks)
  assert best == pytest.approx(rate, abs=6e-5)
  assert account.expected_loss(tasks, best) == pytest.approx(loss, abs=6e-6)
  slope = jax.grad(lambda eta: account.expected_loss(tasks, eta))(best)
  assert abs(slope) < 1e-12


def test_normal_inputs_have_their_short_forms():
  tasks = account.LinearTasks(
    d_x=10, num_demonstrations=10, moments=account.Moments(1.0, 3.0)
  )
  best = account.optimal_learning_rate(tasks)
  assert best == pytest.approx(10 / 21)
  assert account.expected_loss(tasks, best) == pytest.approx(55 / 21)


def test_fitted_rate_beats_a_grid_and_nears_the_closed_form():
  directions, targets = map(jnp.asarray, draw(20_000))
  best = float(account.fit_learning_rate(directions, targets))

  def loss(rate):
    return float(jnp.mean((rate * directions - targets) ** 2))

  grid = np.arange(best - 1, best + 1, 0.05)
  losses = [loss(rate) for rate in grid]
  assert loss(best) <= min(losses) + 1e-12
  assert abs(grid[np.argmin(losses)] - best) <= 0.05
  assert abs(best - 6.0606) < 0.3


def random_layer(heads=1, seed=1):
  rng = np.random.default_rng(seed)
  d_model, width = D_X + D_Y, 4
  shapes = (d_model, width), (d_model, width), (d_model, width)
  shapes = (*shapes, (width, d_model))
  arrays = [rng.normal(size=(heads, *shape)) * 0.3 for shape in shapes]
  return account.SelfAttention(*map(jnp.asarray, arrays))


def test_only_the_folded_products_matter():
  inputs, labels, query, _ = problem()
  tokens = account.make_tokens(inputs, labels, query)
  layer = random_layer(heads=2)
  once = account.attend(layer, tokens)
  folded = account.fold(layer)
  for other in (
    account.interpolate(folded, folded, 0.0),
    account.interpolate(*[account.normalise(folded, d_x=D_X)] * 2, 0.0),
  ):
    np.testing.assert_allclose(account.attend(other, tokens), once, atol=1e-11)


def test_attention_is_that_of_numpy():
  inputs, labels, query, _ = problem()
  tokens = account.make_tokens(inputs, labels, query)
  layer = random_layer(heads=2)
  rows = np.asarray(tokens)
  linear, softmax = rows.copy(), rows.copy()
  for w_q, w_k, w_v, w_p in zip(*map(np.asarray, layer), strict=True):
    scores = (rows @ w_q) @ (rows[:-1] @ w_k).T
    linear += scores @ (rows[:-1] @ w_v) @ w_p
    weights = np.exp(scores / 2)  # sqrt(4)
    weights /= weights.sum(1, keepdims=True)
    softmax += weights @ (rows[:-1] @ w_v) @ w_p
  for weights_fn, expected in (
    (account.linear_weights, linear),
    (account.softmax_weights, softmax),
  ):
    got = account.attend(layer, tokens, weights_fn=weights_fn)
    np.testing.assert_allclose(got, expected, atol=1e-11)
    last = account.attend_query(layer, tokens, weights_fn=weights_fn)
    np.testing.assert_allclose(last, expected[-1], atol=1e-11)


def test_two_softmax_heads_of_opposite_sign_centre_the_scores():
  """The odd part is linear attention on centred scores, up to cubes."""
  rng = np.random.default_rng(3)
  scores = jnp.asarray(rng.uniform(-0.4, 0.4, N))
  values = jnp.asarray(rng.normal(size=N))
  visible = jnp.ones(N, bool)

  def errors(scores):
    def soft(scores):
      return account.softmax_weights(scores, visible, 1) @ values

    centred = (scores - jnp.mean(scores)) @ values / N
    one = soft(scores) - jnp.mean(values) - centred
    return abs(soft(scores) - soft(-scores) - 2 * centred), abs(one)

  two, one = zip(errors(scores), errors(scores / 2), strict=True)
  assert 7 < two[0] / two[1] < 9
  assert 3.2 < one[0] / one[1] < 4.5


@pytest.mark.parametrize('fraction', [0.0, 0.3, 1.0])
def test_interpolation_between_two_steps_is_a_step_between(fraction):
  inputs, labels, query, _ = problem()
  tokens = account.make_tokens(inputs, labels[:, :1], query)
  ends = [
    account.construct(rate, N, jnp.zeros((1, D_X))) for rate in (0.5, 1.5)
  ]
  folded = [account.normalise(account.fold(end), d_x=D_X) for end in ends]
  layer = account.interpolate(*folded, fraction)
  weights = account.descend(
    inputs, labels[:, :1], jnp.asarray([0.5 + fraction])
  )
  prediction = account.predict(account.repeat(layer, 1), tokens)
  np.testing.assert_allclose(prediction, weights @ query, atol=1e-12)


def test_metrics_are_those_of_numpy():
  rng = np.random.default_rng(5)
  a, b = rng.normal(size=(2, 6, 3))
  norms = np.sqrt(np.sum(a**2, 1) * np.sum(b**2, 1))
  pair = jnp.asarray(a), jnp.asarray(b)
  cosine = np.mean(np.sum(a * b, axis=1) / norms)
  assert account.model_cosine(*pair) == pytest.approx(cosine, abs=1e-6)


def test_layers_compose_with_vmap_and_grad():
  inputs, labels, query, _ = problem()
  tokens = account.make_tokens(inputs, labels, query)
  layers = account.repeat(random_layer(), 2)

  @jax.jit
  def loss(layers, batch):
    answers = jax.vmap(lambda rows: account.predict(layers, rows))(batch)
    return jnp.mean(answers**2)

  gradient = jax.grad(loss)(layers, jnp.stack([tokens, 0.5 * tokens]))
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in gradient)
  assert all(bool(jnp.any(x != 0)) for x in gradient)


def test_bad_input_is_named():
  inputs, labels, query, initial = problem()
  tokens = account.make_tokens(inputs, labels, query)
  layer = account.construct(RATE, N, initial=initial)
  tasks = {
    'd_x': 2,
    'num_demonstrations': 3,
    'moments': account.Moments(1 / 12, 1 / 80),
  }
  zeros = jnp.zeros((2, 1))
  cases = [
    ('inputs and labels disagree in N', account.make_tokens, inputs,
     labels[1:], query),
    ('inputs and query disagree in d_x', account.make_tokens, inputs, labels,
     query[1:]),
    ('dtypes disagree', account.make_tokens, inputs, labels,
     query.astype(jnp.float32)),
    ('disagree in D', account.attend, layer, tokens[:, 1:]),
    ('tokens has 1 rows', account.attend, layer, tokens[:1]),
    ('tokens has shape', account.attend_query, layer, tokens[0]),
    ('num_demonstrations is 0', account.construct, 1.0, 0, initial),
    ('learning_rate is nan', account.construct, np.nan, 2, initial),
    ('num_layers is 0', account.repeat, layer, 0),
    ('disagree in B: 2 and 1', account.model_cosine, zeros, zeros[:1]),
    ('query_key disagree in H', account.interpolate, account.fold(layer),
     account.fold(random_layer(2)), 0.5),
  ]  # fmt: skip
  for message, fn, *arguments in cases:
    with pytest.raises(ValueError, match=message):
      fn(*arguments)
  with pytest.raises(ValueError, match='noise_variance is -1'):
    account.LinearTasks(**tasks, noise_variance=-1.0)
  with pytest.raises(ValueError, match='visible has shape'):
    account.attend(layer, tokens, visible=jnp.ones((2, 2), bool))
  with pytest.raises(ValueError, match='labels and initial disagree in d_y'):
    account.make_tokens(inputs, labels, query, initial=initial.T)
  with pytest.raises(ValueError, match='d_x is 8; expected less'):
    account.normalise(account.fold(layer), d_x=D_X + D_Y)
  with pytest.raises(ValueError, match='contraction is inf'):
    account.construct(1.0, 2, initial, contraction=np.inf)
