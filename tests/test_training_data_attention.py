"""A trained network is attention over what it saw while it was trained."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iclcl_jax.accounts import training_data_attention as account
from tests import tolerances

WIDTHS = 6, 5, 4, 3
NUM_EXAMPLES, NUM_STEPS, BATCH = 20, 30, 4
OPTIMIZERS = {
  'sgd': {'learning_rate': 0.1},
  'momentum': {'learning_rate': 0.1, 'momentum': 0.8},
  'decay': {'learning_rate': 0.1, 'weight_decay': 0.3},
  'both': {'learning_rate': 0.05, 'momentum': 0.6, 'weight_decay': 0.2},
}


def problem(dtype=jnp.float64):
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.normal(size=(NUM_EXAMPLES, WIDTHS[0])), dtype)
  labels = jnp.asarray(rng.integers(WIDTHS[-1], size=NUM_EXAMPLES))
  batches = jnp.asarray(rng.integers(NUM_EXAMPLES, size=(NUM_STEPS, BATCH)))
  params = tuple(
    jnp.asarray(rng.normal(size=(after, before + 1)) / before**0.5, dtype)
    for before, after in itertools.pairwise(WIDTHS)
  )
  return params, inputs, labels, batches


@functools.cache
def trained(name, dtype=jnp.float64):
  fn = functools.partial(account.train, **OPTIMIZERS[name])
  return jax.jit(fn)(*problem(dtype))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_layer_is_attention_over_its_history(name, dtype):
  params, inputs, *_ = problem(dtype)
  after, histories = trained(name, dtype)
  left = account.remains(NUM_STEPS, **OPTIMIZERS[name])
  moved = jax.tree.map(lambda w, v: jnp.max(jnp.abs(w - v)), after, params)
  assert min(moved) > 0.05
  for x in inputs[:3]:
    seen, _ = account.layer_inputs(after, x)
    for before, matrix, history, row in zip(
      params, after, histories, seen, strict=True
    ):
      output = account.recall(before, history, left, row)
      assert output.dtype == dtype
      bound = 20 * tolerances.IDENTITY[jnp.dtype(dtype).name]
      np.testing.assert_allclose(output, matrix @ row, atol=bound)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_training_is_that_of_optax(name):
  """An independent loop: autodiff in the weights, optax for the steps."""
  params, inputs, labels, batches = problem()
  options = OPTIMIZERS[name]
  optimizer = optax.chain(
    optax.add_decayed_weights(options.get('weight_decay', 0.0)),
    optax.sgd(options['learning_rate'], momentum=options.get('momentum')),
  )

  def loss(params, rows):
    x = inputs[rows]
    for depth, matrix in enumerate(params):
      x = x @ matrix[:, :-1].T + matrix[None, :, -1]
      x = jax.nn.relu(x) if depth < len(params) - 1 else x
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(x, labels[rows])
    )

  @jax.jit
  def step(params, state, rows):
    updates, state = optimizer.update(
      jax.grad(loss)(params, rows), state, params
    )
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for rows in batches:
    params, state = step(params, state, rows)
  for ours, theirs in zip(trained(name)[0], params, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_remains_have_the_published_closed_forms():
  steps = np.arange(NUM_STEPS)
  momentum = account.remains(NUM_STEPS, learning_rate=0.1, momentum=0.8)
  expected = -0.1 * (1 - 0.8 ** (NUM_STEPS - steps)) / (1 - 0.8)
  np.testing.assert_allclose(momentum.steps, expected, atol=1e-14)
  assert momentum.initial == 1
  decay = account.remains(NUM_STEPS, learning_rate=0.1, weight_decay=0.3)
  expected = -0.1 * 0.97 ** (NUM_STEPS - 1 - steps)
  np.testing.assert_allclose(decay.steps, expected, atol=1e-14)
  np.testing.assert_allclose(decay.initial, 0.97**NUM_STEPS, atol=1e-14)


def test_attributions_sum_to_the_output():
  params, inputs, *_ = problem()
  after, histories = trained('both')
  left = account.remains(NUM_STEPS, **OPTIMIZERS['both'])
  seen, output = account.layer_inputs(after, inputs[0])
  direction = jnp.array([1.0, -0.5, 2.0])
  scores = account.attribute(histories[-1], left, seen[-1], direction)
  assert scores.shape == (NUM_STEPS, BATCH)
  assert jnp.min(scores) < 0 < jnp.max(scores)
  start = left.initial * (params[-1] @ seen[-1])
  np.testing.assert_allclose(
    jnp.sum(scores), direction @ (output - start), atol=1e-12
  )


def test_signals_are_those_of_the_mean_loss():
  """Each row is its own pair, divided by the batch size: batches may split."""
  _, histories = trained('sgd')
  totals = jnp.sum(histories[-1].signals, axis=2)
  np.testing.assert_allclose(totals, jnp.zeros_like(totals), atol=1e-15)
  assert jnp.max(jnp.abs(histories[-1].signals)) < 1 / BATCH


def test_everything_batches_and_differentiates():
  params, inputs, *_ = problem()
  after, histories = trained('both')
  left = account.remains(NUM_STEPS, **OPTIMIZERS['both'])
  rows = jnp.stack([account.layer_inputs(after, x)[0][0] for x in inputs[:3]])
  recall = functools.partial(account.recall, params[0], histories[0], left)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(recall))(rows), rows @ after[0].T, atol=1e-11
  )
  np.testing.assert_allclose(jax.jacrev(recall)(rows[0]), after[0], atol=1e-11)


NAMES = 'params', 'inputs', 'labels', 'batches'
DATA = dict(zip(NAMES, problem(), strict=True))
PARAMS, INPUTS, LABELS, BATCHES = DATA.values()


@pytest.mark.parametrize(
  ('message', 'change'),
  [
    (r'learning_rate is -1\.0', {'learning_rate': -1.0}),
    ('momentum is 1.0; expected', {'momentum': 1.0}),
    ('labels has dtype float64; expected an array of integers',
     {'labels': LABELS.astype(float)}),
    (r'batches has shape \[4\]; expected \[T, B\]', {'batches': BATCHES[0]}),
    (r'batches has shape \[0, 4\]', {'batches': BATCHES[:0]}),
    (r'batches has shape \[30, 0\]', {'batches': BATCHES[:, :0]}),
    ('inputs and params disagree in d', {'inputs': INPUTS[:, 1:]}),
    ('labels holds 3; expected', {'labels': LABELS.at[0].set(3).at[1].set(0)}),
    ('labels holds -1', {'labels': LABELS.at[0].set(-1)}),
    ('batches holds', {'batches': BATCHES.at[0, 0].set(NUM_EXAMPLES)}),
    ('dtypes disagree', {'inputs': INPUTS.astype(jnp.float32)}),
    ('params has no layer', {'params': ()}),
    ('disagree in width', {'params': (PARAMS[0], PARAMS[2])}),
  ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_named(message, change):
  with pytest.raises(ValueError, match=message):
    account.train(**(DATA | {'learning_rate': 0.1} | change))


def test_bad_input_is_named():
  _, histories = trained('sgd')
  left = account.remains(NUM_STEPS, learning_rate=0.1)
  few = account.remains(3, learning_rate=0.1)
  row, key = jnp.ones(WIDTHS[0] + 1), jax.random.key(0)
  for message, function, *arguments in (
    ('widths is', account.init_network, key, (3,)),
    ('widths is 0', account.init_network, key, (3, 0)),
    ('typed random key', account.init_network, 0, (3, 2)),
    ('initial and history.* disagree in d_(in|out)', account.recall, PARAMS[1],
     histories[0], left, row),
    ('initial and history.inputs disagree in d_in', account.recall, PARAMS[0],
     histories[1], left, row),
    ('left and history disagree in T: 3 and 30', account.recall, PARAMS[0],
     histories[0], few, row),
    ('history.signals and direction disagree in d_out', account.attribute,
     histories[0], left, row, jnp.ones(2)),
    ('num_steps is 0', functools.partial(account.remains, learning_rate=1.0),
     0),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      function(*arguments)


def test_a_list_of_layers_is_trained_too():
  params, *data = problem()
  train = jax.jit(functools.partial(account.train, **OPTIMIZERS['sgd']))
  found, _ = train(list(params), *data)
  for ours, theirs in zip(found, trained('sgd')[0], strict=True):
    np.testing.assert_array_equal(ours, theirs)
