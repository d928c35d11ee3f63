"""Learning processes: a tiny run, and what each must compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab, learning_processes as experiment
from experiments.learning_processes import duals, processes, prompts
from iclcl_jax import dual, features, losses
from tests import experiment_battery

tiny = experiment_battery.tiny_run(experiment)
N, D, R = 6, 3, 14
RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.standard_normal(shape)


def pair():
  return tuple(prompts.normalise(draw(N, R)) for _ in range(2))


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)
  assert len(tiny[0]['claims']) == 48


def test_first_steps_are_attention_and_contrastive_steps_repeat(tiny):
  claims = {row['id']: row['value'] for row in tiny[0]['claims']}
  for data in ('random', 'trained_layer'):
    for name in duals.FIRST_STEPS:
      assert claims[f'{data}:first_step_{name}'] <= 1e-12
    assert claims[f'{data}:schedule'] <= 1e-5
    assert claims[f'{data}:squared_after_10_steps'] > 1
    assert claims[f'{data}:cosine_parts_from_attention'] > 1
  assert 'first steps' in tiny[0]['conclusion']


def test_descent_is_gradient_descent_of_a_fixed_step():
  keys, values, start = draw(N, R), draw(N, D), draw(D, R)
  state = dual.zero_shot(duals.IDENTITY, keys[:1], values[:1])
  state = state._replace(weights=jnp.asarray(start))
  found = lab.compile_quickly(
    lambda: duals.descend(losses.squared, state, keys, values, 0.3, 3)
  )()

  weights, sizes = start, []
  for _ in range(3):
    slope = (keys @ weights.T - values).T @ keys
    sizes.append(0.3 / np.linalg.norm(slope))
    weights = weights - sizes[0] * slope
  np.testing.assert_allclose(found[-1], weights, rtol=1e-10)
  assert sizes[1] != sizes[0]
  np.testing.assert_allclose(np.linalg.norm(found[0] - start), 0.3)


def test_no_gradient_flows_through_a_stopped_target():
  encoder = processes.Encoder(draw(D, R), draw(D, D), draw(D, R))
  first, second = draw(N, R), draw(N, R)

  def slope(name):
    process = processes.PROCESSES[name]
    return jax.grad(lambda e: processes.cosine_loss(process, e, first, second))(
      encoder
    )

  def by_hand(encoder):
    online = [
      x @ encoder.weights.T @ encoder.predictor.T for x in (first, second)
    ]
    # Targets by the original encoder: constants.
    target = [second @ start.weights.T, first @ start.weights.T]
    cosines = [
      jnp.sum(a * b, axis=1)
      / (jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1))
      for a, b in zip(online, target, strict=True)
    ]
    return -(jnp.mean(cosines[0]) + jnp.mean(cosines[1])) / 2

  start = encoder
  expected = jax.grad(by_hand)(encoder)
  np.testing.assert_allclose(slope('SimSiam').weights, expected.weights)
  np.testing.assert_allclose(slope('SimSiam').predictor, expected.predictor)
  leaky = slope('SimSiam without stop-gradient').weights
  assert np.max(np.abs(leaky - expected.weights)) > 1e-3
  assert np.all(slope('BYOL').average == 0)
  assert np.all(slope('SimSiam without both').predictor == 0)


def test_the_average_follows_the_weights():
  encoder = processes.Encoder(draw(D, R), draw(D, D), draw(D, R))
  config = dataclasses.replace(
    experiment.Config.tiny(),
    learning_rate=0.5,
    momentum=0.75,
    num_process_steps=2,
  )
  found = lab.compile_quickly(
    lambda: processes.train(
      config, processes.PROCESSES['BYOL'], encoder, pair(), lambda e: e
    )
  )()
  for step in range(2):
    np.testing.assert_allclose(
      found.average[step + 1],
      0.75 * found.average[step] + 0.25 * found.weights[step + 1],
    )
  assert np.all(found.weights[0] == encoder.weights)


def test_kernel_learning_ends_in_the_lowest_eigenvectors():
  first, second = both = pair()
  problem = processes.kernel_problem(jnp.asarray(draw(D, R)), both)
  weights, loss = lab.compile_quickly(
    lambda: processes.train_kernel(
      problem, both, 3000, lambda w: (w, processes.kernel_loss(w, *both))
    )
  )()
  np.testing.assert_allclose(loss[-1], problem.best, rtol=1e-6)
  form = first.T @ (np.roll(second, -1, axis=0) - second) / N
  lowest = np.linalg.eigvalsh((form + form.T) / 2)[:D]
  np.testing.assert_allclose(problem.best, lowest.sum(), rtol=1e-10)
  for row in (weights[0], weights[1], weights[-1]):
    np.testing.assert_allclose(row @ row.T, np.eye(D), atol=1e-10)


def test_compressed_features_have_the_same_products():
  phi = features.PositiveFeatures(jnp.asarray(draw(40, D)))
  query, keys, values = draw(D), draw(N + 1, D), draw(N + 1, D)
  found = prompts.see(phi, query, keys, values)
  assert found.keys.shape == (N, 2 * N + 2)
  gram = found.keys @ found.keys.T
  np.testing.assert_allclose(np.linalg.eigvalsh(gram)[-1], 1)
  for ours, theirs in (
    ([*found.keys, found.query, found.own_key], [*keys[:-1], query, keys[-1]]),
    (found.values, values[:-1]),
  ):
    rows = np.stack([phi(x) for x in theirs])
    ratio = (rows @ rows.T) / (np.stack(ours) @ np.stack(ours).T)
    np.testing.assert_allclose(
      ratio, np.full(ratio.shape, ratio[0, 0]), rtol=1e-8
    )


def test_measures_of_representations():
  rows = draw(N, D)
  rotation = np.linalg.qr(draw(D, D))[0]
  assert processes.spread(np.ones((N, D))) < 1e-7
  assert processes.spread(np.concatenate([rows, -rows])) == 1
  np.testing.assert_allclose(processes.alignment(rows, 3 * rows @ rotation), 1)
  assert processes.alignment(rows, draw(N, D)) < 0.9
  found = prompts.angle(np.array([1.0, 0.0]), np.array([1.0, 1.0]))
  np.testing.assert_allclose(found, 45)


def test_divergence_is_an_error_that_names_the_flag(monkeypatch):
  found = {'random': {'SimSiam': {'loss': np.array([[1.0, np.nan]])}}}
  monkeypatch.setattr(prompts, 'of_every', lambda config, fn: found)
  with pytest.raises(ValueError, match='learning_rate is 1, too large'):
    processes.measure(experiment.Config.tiny())
