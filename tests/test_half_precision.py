"""Sums over tokens do not stall in half precision, nor do scores overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iclcl_jax import attention, dual, features, kernels, losses, modified
from iclcl_jax.accounts import meta_optimizer, online_learners

# In bfloat16 a running sum of ones stops at 256, in float16 at 2048.
NUM_TERMS = 100_000
HALVES = ['bfloat16', 'float16']
PHI = features.EluPlusOneFeatures()

every_half = pytest.mark.parametrize('half', HALVES)


def tokens(half):
  """Keys of moderate size, and values whose mean is not that of a prefix."""
  keys, values = np.random.default_rng(0).uniform(size=(2, NUM_TERMS, 2))
  values += np.linspace(-1, 1, NUM_TERMS)[:, None]
  return jnp.asarray(keys, half), jnp.asarray(values, half)


def predicted(state, keys):
  return dual.predict(PHI, state, keys[0])


def absorb_in_turn(keys, values):
  def step(state, row):
    return dual.one_step(PHI, state, *(x[None] for x in row)), None

  state = dual.empty(PHI, keys, values)
  return predicted(jax.lax.scan(step, state, (keys, values))[0], keys)


def merge_in_turn(keys, values):
  def step(state, row):
    return dual.merge(state, dual.zero_shot(PHI, *(x[None] for x in row))), None

  state = dual.empty(PHI, keys, values)
  return predicted(jax.lax.scan(step, state, (keys, values))[0], keys)


def stream_step(keys, values):
  state = dual.empty(PHI, keys, values)
  return predicted(dual.one_step(PHI, state, keys, values, chunk_size=4), keys)


def train(keys, values):
  state = dual.train(
    PHI,
    dual.empty(PHI, keys, values),
    keys,
    values,
    optimizer=optax.sgd(1.0),
    num_epochs=1,
    batch_size=1,
  )
  return predicted(state, keys)


def causal(attend):
  return lambda keys, values: attend.causal(PHI, keys, keys, values)[-1]


def many(attend):
  return lambda keys, values: attend.stream(PHI, keys[:1], keys, values)


def learn(learner, **settings):
  """The answers are sums here, of up to the range of float16."""

  def last(keys, values):
    stream = online_learners.Stream(keys / 64, keys / 64, values)
    return learner(stream, **settings)[-1]

  return last


SUMS = {
  'softmax': lambda keys, values: attention.softmax_attention(
    keys[0], keys, values
  ),
  'kernel': lambda keys, values: attention.kernel_attention(
    PHI, keys[0], keys, values
  ),
  'exact kernel': lambda keys, values: attention.stream_kernel_attention(
    kernels.ExponentialKernel(), keys[:1], keys, values
  ),
  'stream': lambda keys, values: attention.stream_kernel_attention(
    PHI, keys[:2], keys, values
  ),
  'causal': lambda keys, values: attention.causal_kernel_attention(
    PHI, keys, keys, values
  )[-1],
  'regularised': causal(modified.regularised(strength=0.5)),
  'augmented': causal(modified.augmented(augment_values=jnp.square)),
  'squared loss': causal(modified.attention_from_loss(losses.squared)),
  'contrastive loss': many(modified.attention_from_loss(losses.contrastive)),
  'stream_step': stream_step,
  'steps in turn': absorb_in_turn,
  'merges in turn': merge_in_turn,
  'train': train,
  'linear recurrence': learn(online_learners.linear_recurrence),
  'linear in chunks': learn(
    functools.partial(online_learners.linear_recurrence, chunk_size=64)
  ),
  'descend': learn(online_learners.descend),
  'momentum values': lambda keys, values: meta_optimizer.momentum_values(
    values, decay=0.999
  )[-1],
}


@every_half
@pytest.mark.parametrize('name', SUMS)
def test_sums_of_many_terms_are_those_of_float32(name, half):
  found = jax.jit(SUMS[name])(*tokens(half))
  wide = [x.astype(jnp.float32) for x in tokens(half)]
  expected = jax.jit(SUMS[name])(*wide)
  assert found.dtype == half
  np.testing.assert_allclose(
    found.astype(jnp.float32), expected, rtol=1e-2, atol=2e-3
  )


@every_half
def test_gradients_are_sums_too(half):
  keys, values = tokens(half)
  projection = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)), half)

  def total(projection, keys, values):
    phi = features.PositiveFeatures(projection)
    streamed = attention.stream_kernel_attention(phi, keys[:8], keys, values)
    causal = attention.causal_kernel_attention(phi, keys, keys, values)
    return jnp.sum(streamed.astype(jnp.float32)) + jnp.mean(
      causal.astype(jnp.float32)
    )

  slope = jax.jit(jax.grad(total))
  found = slope(projection, keys, values)
  expected = slope(*(x.astype(jnp.float32) for x in (projection, keys, values)))
  assert found.dtype == half
  # Contributions cancel; a sum that stalls is wrong by a factor.
  scale = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(
    found.astype(jnp.float32), expected, atol=5e-2 * scale
  )


@every_half
def test_states_are_kept_in_float32(half):
  keys, values = (x[:8] for x in tokens(half))
  for phi in (PHI, kernels.ExponentialKernel()):
    state = dual.one_step(phi, dual.empty(phi, keys, values), keys, values)
    sums = state if phi is PHI else state[1:3]
    assert {x.dtype for x in sums} == {jnp.dtype('float32')}
    again = dual.one_step_autodiff(phi, state, keys, values)
    assert dual.predict(phi, again, keys[0]).dtype == half


@every_half
@pytest.mark.parametrize(
  'attend',
  [
    attention.softmax_attention,
    functools.partial(attention.kernel_attention, kernels.ExponentialKernel()),
    functools.partial(attention.kernel_attention, kernels.LinearKernel()),
  ],
)
def test_scores_beyond_the_range_of_float16(attend, half):
  row = jnp.full((64,), 33, half)  # The product 69696 is above 65504.
  np.testing.assert_array_equal(attend(row, row[None], row[None]), row)


def distance(predictions, values):
  return jnp.sum(jnp.sqrt(jnp.sum((predictions - values) ** 2, axis=1)))


@pytest.mark.parametrize('phi', [PHI, kernels.ExponentialKernel()])
@pytest.mark.parametrize('loss', [losses.cosine, distance])
def test_masked_rows_take_no_part_in_a_gradient(phi, loss):
  # Their slope is infinite at zero predictions, or at equal ones.
  loss = losses.sum_over_demonstrations(loss)
  keys, values = np.random.default_rng(2).normal(size=(2, 5, 3))
  keys, values = jnp.asarray(keys), jnp.asarray(values).at[4].set(0)
  mask = jnp.arange(5) < 4
  start = dual.zero_shot(phi, keys[:1], values[:1])
  masked = dual.one_step_autodiff(
    phi, start, keys, values, loss=loss, mask=mask
  )
  alone = dual.one_step_autodiff(phi, start, keys[:4], values[:4], loss=loss)
  found, expected = (dual.predict(phi, s, keys[0]) for s in (masked, alone))
  np.testing.assert_allclose(found, expected, rtol=1e-12)

  @jax.jit
  @jax.value_and_grad
  def trained(values):
    state = dual.train(
      phi,
      start,
      keys,
      values,
      optimizer=optax.sgd(0.1),
      num_epochs=1,
      batch_size=2,  # The last batch has one demonstration.
      loss=loss,
    )
    return jnp.sum(dual.predict(phi, state, keys[0]))

  total, slopes = trained(values.at[4].set(1))
  assert np.isfinite(total)
  assert np.all(np.isfinite(slopes))
