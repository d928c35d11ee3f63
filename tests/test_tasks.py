"""Synthetic in-context tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import tasks


@pytest.mark.parametrize('input_fn', [tasks.uniform, jax.random.normal])
@pytest.mark.parametrize('num_demonstrations', [0, 1, 7])
def test_labels_are_the_task_applied_to_the_inputs(
  dtype, input_fn, num_demonstrations
):
  matrix = jnp.asarray([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype)
  prompt = tasks.linear_regression(
    jax.random.key(0), num_demonstrations, matrix, input_fn=input_fn
  )
  tokens, target = np.asarray(prompt.tokens), np.asarray(prompt.target)
  assert tokens.shape == (num_demonstrations + 1, 5)
  assert tokens.dtype == target.dtype == dtype
  inputs, labels = tokens[:, :3], tokens[:, 3:]
  expected = np.einsum('ij,nj->ni', matrix, inputs)
  np.testing.assert_allclose(labels[:-1], expected[:-1], rtol=1e-5)
  np.testing.assert_array_equal(labels[-1], 0)
  np.testing.assert_allclose(target, expected[-1], rtol=1e-5)
  assert np.any(target != 0)


def test_inputs_have_the_distribution_that_was_asked_for():
  matrix = jnp.ones((1, 2))
  draws = [
    tasks.linear_regression(
      jax.random.key(1), 4000, matrix, input_fn=input_fn
    ).tokens[:, :2]
    for input_fn in (tasks.uniform, jax.random.normal)
  ]
  # 5 sigma of the mean and of the mean square over 8002 draws.
  for inputs, variance, fourth in zip(
    draws, (1 / 3, 1.0), (1 / 5, 3.0), strict=True
  ):
    deviation = np.sqrt((fourth - variance**2) / inputs.size)
    assert abs(float(jnp.mean(inputs**2)) - variance) < 5 * deviation
    assert abs(float(jnp.mean(inputs))) < 5 * np.sqrt(variance / inputs.size)
  assert float(jnp.max(jnp.abs(draws[0]))) <= 1


def test_prompts_of_a_batch_differ_and_repeat_by_key():
  matrix = jnp.ones((1, 2))

  def keys():
    return jax.random.split(jax.random.key(0), 3)

  batch = jax.jit(
    jax.vmap(lambda key: tasks.linear_regression(key, 4, matrix))
  )(keys())
  assert batch.tokens.shape == (3, 5, 3)
  again = tasks.linear_regression(keys()[1], 4, matrix)
  np.testing.assert_array_equal(batch.tokens[1], again.tokens)
  assert jnp.any(batch.tokens[0] != batch.tokens[1])
