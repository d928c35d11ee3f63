"""The papers' layer, and the training of many seeds that experiments share."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab
from experiments.lab import pretraining
from iclcl_jax import tasks

FEW = pretraining.Prompts(num_demonstrations=3)


@pytest.fixture(scope='module')
def seeds():
  return pretraining.init_seeds(0, 5, num_features=8)


def test_examples_run():
  results = doctest.testmod(pretraining)
  assert results.attempted > 0
  assert results.failed == 0


def _layer(key):
  def draw(key):
    key_run, key_prompt = jax.random.split(key)
    run = pretraining.init_run(key_run, num_features=16)
    prompt = tasks.linear_regression(key_prompt, 4, run.task_matrix)
    return run.params, run.phi, prompt

  layer = lab.compile_quickly(draw)(key)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), layer)


def test_fast_prediction_is_the_layer_in_value_and_gradient():
  params, phi, prompt = _layer(jax.random.key(7))

  def definition(params):
    output = pretraining.attend(params, phi, prompt.tokens)
    return jnp.mean((output[-1:] - prompt.target) ** 2)

  def fast(params):
    return pretraining.squared_error(params, phi, prompt)

  slow_value, slow_gradient = jax.jit(jax.value_and_grad(definition))(params)
  value, gradient = jax.jit(jax.value_and_grad(fast))(params)
  np.testing.assert_allclose(value, slow_value, rtol=1e-12)
  for a, b in zip(gradient, slow_gradient, strict=True):
    assert np.max(np.abs(b)) > 1e-6
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_training_descends_the_squared_error():
  params, phi, prompt = _layer(jax.random.key(9))
  prompts = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 40), prompt)
  train = jax.jit(pretraining.train, static_argnames='learning_rate')
  trained, losses = train(params, phi, prompts, learning_rate=0.01)
  assert losses[-1] < 0.1 * losses[0]
  # One step is plain SGD.
  one = jax.tree.map(lambda x: x[:1], prompts)
  stepped, _ = train(params, phi, one, learning_rate=0.01)
  gradient = jax.jit(jax.grad(pretraining.squared_error))(params, phi, prompt)
  np.testing.assert_allclose(
    stepped.value, params.value - 0.01 * gradient.value, rtol=1e-12
  )
  np.testing.assert_allclose(
    jax.jit(pretraining.evaluate)(trained, phi, prompts),
    jax.jit(pretraining.squared_error)(trained, phi, prompt),
    rtol=1e-12,
  )


def test_prompts_depend_on_their_step_alone():
  draw = lab.compile_quickly(
    functools.partial(
      pretraining.draw_prompts,
      task_fn=pretraining.draw_task,
      num_demonstrations=3,
    )
  )
  key = jax.random.key(0)
  whole, part = draw(key, jnp.arange(6)), draw(key, jnp.arange(4, 6))
  np.testing.assert_array_equal(whole.tokens[4:], part.tokens)
  np.testing.assert_array_equal(whole.target[4:], part.target)
  flat = np.asarray(whole.tokens[:, :, :-1]).reshape(6, -1)
  assert len(np.unique(flat, axis=0)) == 6


@pytest.mark.parametrize('multi_task', [False, True])
@pytest.mark.parametrize('inputs', ['uniform', 'normal'])
def test_prompts_are_of_their_distribution_and_task(seeds, multi_task, inputs):
  prompts = pretraining.Prompts(
    num_demonstrations=9, input_distribution=inputs, multi_task=multi_task
  ).held_out(seeds, 3)
  inputs_of_prompts = prompts.tokens[..., :-1, :-1]
  assert (np.max(np.abs(inputs_of_prompts)) <= 1) == (inputs == 'uniform')
  labels = np.einsum(
    'spnx,sx->spn', inputs_of_prompts, seeds.runs.task_matrix[:, 0]
  )
  same = np.allclose(labels, prompts.tokens[..., :-1, -1], atol=1e-5)
  assert same is not multi_task


def test_training_seeds_together_is_training_them_alone(seeds):
  together, losses = pretraining.pretrain(
    seeds, FEW, num_epochs=2, learning_rate=0.01, tokens_per_epoch=12
  )
  one = jax.tree.map(lambda x: x[1], seeds.runs)
  prompts = pretraining.draw_prompts(
    seeds.training[1], jnp.arange(6), lambda _: one.task_matrix, 3
  )
  alone, losses_alone = jax.jit(pretraining.train)(
    one.params, one.phi, prompts, 0.01
  )
  assert together.query.dtype == jnp.float32
  assert losses.shape == (2, 2, 5)
  np.testing.assert_allclose(
    losses[:, 0, 1], losses_alone.reshape(2, 3).mean(axis=1), rtol=1e-4
  )
  np.testing.assert_allclose(
    losses[:, 1, 1], (prompts.target**2).reshape(2, 3).mean(axis=1), rtol=1e-4
  )
  for a, b, start in zip(together, alone, one.params, strict=True):
    assert np.max(np.abs(b - start)) > 1e-6
    np.testing.assert_allclose(a[1], b, atol=1e-5)


def test_seeds_depend_on_their_number_alone(seeds):
  fewer = pretraining.init_seeds(0, 2, num_features=8)
  for a, b in zip(*map(jax.tree.leaves, (seeds, fewer)), strict=True):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a[:2], b)


def test_diverged_training_is_named(seeds):
  with pytest.raises(ValueError, match=r'learning_rate is 1e\+30.*diverged'):
    pretraining.pretrain(
      seeds, FEW, num_epochs=1, learning_rate=1e30, tokens_per_epoch=16
    )
