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


def test_bad_input_is_named():
  params, inputs, labels, batches = problem()
  _, histories = trained('sgd')
  left = account.remains(NUM_STEPS, learning_rate=0.1)
  row = jnp.ones(WIDTHS[0] + 1)
  train = functools.partial(account.train, params)
  key = jax.random.key(0)
  for call, message in (
    (lambda: account.init_network(key, (3,)), 'widths is'),
    (lambda: account.init_network(key, (3, 0)), 'widths is 0'),
    (lambda: account.init_network(0, (3, 2)), 'typed random key'),
    (
      lambda: train(inputs, labels, batches, learning_rate=-1.0),
      r'learning_rate is -1\.0',
    ),
    (
      lambda: train(inputs, labels, batches, learning_rate=1.0, momentum=1.0),
      'momentum is 1; expected',
    ),
    (
      lambda: train(inputs, labels.astype(float), batches, learning_rate=1.0),
      'labels has dtype float64; expected an integer dtype',
    ),
    (
      lambda: train(inputs, labels, batches[0], learning_rate=1.0),
      'batches has shape .4.; expected .T, B.',
    ),
    (
      lambda: train(inputs[:, 1:], labels, batches, learning_rate=1.0),
      'inputs and params disagree in d',
    ),
    (
      lambda: account.recall(params[1], histories[0], left, row),
      'initial and history.* disagree in d_(in|out)',
    ),
    (
      lambda: account.recall(params[0], histories[1], left, row),
      'initial and history.inputs disagree in d_in',
    ),
    (
      lambda: account.recall(
        params[0], histories[0], account.remains(3, learning_rate=0.1), row
      ),
      'left and history disagree in T: 3 and 30',
    ),
    (
      lambda: account.attribute(histories[0], left, row, jnp.ones(2)),
      'history.signals and direction disagree in d_out',
    ),
    (lambda: account.remains(0, learning_rate=0.1), 'num_steps is 0'),
  ):
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.parametrize(
  ('message', 'change'),
  [
    (
      'labels ranges from 0 to 3',
      {'labels': lambda x: x.at[0].set(3).at[1].set(0)},
    ),
    ('labels ranges from -1', {'labels': lambda x: x.at[0].set(-1)}),
    (
      'batches ranges from',
      {'batches': lambda x: x.at[0, 0].set(NUM_EXAMPLES)},
    ),
    ('batches has shape \\[0, 4\\]', {'batches': lambda x: x[:0]}),
    ('batches has shape \\[30, 0\\]', {'batches': lambda x: x[:, :0]}),
    ('dtypes disagree', {'inputs': lambda x: x.astype(jnp.float32)}),
    ('params has no layer', {'params': lambda x: x[:0]}),
    ('disagree in width', {'params': lambda x: (x[0], x[2])}),
  ],
)
def test_what_cannot_be_trained_on_is_named(message, change):
  names = 'params', 'inputs', 'labels', 'batches'
  arguments = dict(zip(names, problem(), strict=True))
  for name, fn in change.items():
    arguments[name] = fn(arguments[name])
  with pytest.raises(ValueError, match=message):
    account.train(**arguments, learning_rate=0.1)


def test_a_list_of_layers_is_trained_too():
  params, *data = problem()
  train = jax.jit(functools.partial(account.train, **OPTIMIZERS['sgd']))
  found, _ = train(list(params), *data)
  for ours, theirs in zip(found, trained('sgd')[0], strict=True):
    np.testing.assert_array_equal(ours, theirs)
