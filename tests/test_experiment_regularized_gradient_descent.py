"""The experiment on the regularised layer at tiny size, against plain loops."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab, regularized_gradient_descent as experiment
from experiments.lab.pretraining import LayerParams
from experiments.regularized_gradient_descent import epochs, steps
from iclcl_jax import features
from tests import experiment_battery, oracles

TINY = experiment.Config.tiny()
tiny = experiment_battery.tiny_run(experiment)


@pytest.fixture(scope='module')
def results():
  return epochs.measure(TINY)


def verdicts(results):
  claims = [
    *steps.claims(TINY, results.step),
    *epochs.claims(TINY, results),
  ]
  return {x.id.split('/')[1]: x.verdict for x in claims}


def test_tiny_run_is_complete(tiny):
  summary, folder = tiny
  experiment_battery.check_complete(experiment, summary, folder)
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 3 * 2 * (2 + 5)
  assert len(json.loads(lines[0])['relative_deviation']) == 5
  assert 'memorisation' in summary['pretraining_meaning']
  assert summary['residuals']['printed_ridge'] > 1e-3


def test_identities_hold_and_the_printed_form_is_none(results):
  found = verdicts(results)
  assert found['strict_ridge'] == 'reproduced'
  assert found['printed_pair'] == 'reproduced'
  assert found['closed_form'] == 'reproduced'
  assert found['printed_ridge'] == 'not reproduced'


def test_without_a_ridge_the_deviation_falls_linearly_to_zero(results):
  for curves in results.curves[4].values():
    curve = epochs.deviation(results, curves.measured)[:, 1]
    expected = curve[:, :1] * np.linspace(1, 0, 5)[None]
    np.testing.assert_allclose(curve, expected, atol=1e-12)


def test_a_small_error_is_seen(results):
  def shift(tree, field):
    return tree._replace(**{field: getattr(tree, field) + 1e-6})

  def with_step(field):
    step = results.step
    return results._replace(step=step._replace(steps=shift(step.steps, field)))

  curves = {k: shift(x, 'measured') for k, x in results.curves[4].items()}
  right = verdicts(results)
  for name, broken in {
    'strict_ridge': with_step('ridge'),
    'printed_pair': with_step('pair'),
    'closed_form': results._replace(curves={**results.curves, 4: curves}),
  }.items():
    found = verdicts(broken)
    assert right[name] == 'reproduced'
    assert found[name] == 'not reproduced'


def test_training_equals_plain_gradient_descent():
  """Explicit weights, one demonstration after the other, in NumPy."""
  rng = np.random.default_rng(0)
  projection, num_epochs, alpha = rng.normal(size=(6, 12)), 3, 0.4
  params = LayerParams(*(rng.normal(size=(3, 12, 12)) / 5))
  tokens = rng.normal(size=(5, 12))
  query, keys, values = (
    tokens[-1] @ params.query,
    tokens @ params.key,
    tokens @ params.value[:, -1:],
  )
  phi_keys = np.stack([oracles.positive_features(projection, k) for k in keys])
  phi_query = oracles.positive_features(projection, query)
  normaliser = np.sum(phi_keys @ phi_query)
  weights = values[-1][:, None] * phi_keys[-1][None] / normaliser
  expected = [weights @ phi_query]
  for _ in range(num_epochs):
    for key, value in zip(phi_keys[:-1], values[:-1], strict=True):
      gradient = -value[:, None] * key[None] / normaliser + alpha * weights
      weights = weights - gradient / num_epochs
    expected.append(weights @ phi_query)

  @lab.compile_quickly
  def run(params, projection, tokens, strength):
    phi = features.PositiveFeatures(projection)
    prompt = steps.layer(params, phi, tokens)
    return epochs.train(phi, prompt, strength, num_epochs=num_epochs)

  found = run(params, projection, tokens, jnp.array(alpha))
  np.testing.assert_allclose(found.measured, expected, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(found.predicted, expected, rtol=1e-12, atol=1e-14)


def test_factors_of_both_readings():
  """N = 15, alpha = 0.5: printed in three digits, by hand."""
  config = dataclasses.replace(
    TINY, num_demonstrations=15, dual_epochs=(1, 100), tokens_per_epoch=16
  )
  found = {
    (row['reading'], row['num_epochs']): (
      round(row['initial_factor'], 3),
      round(row['demonstration_factor'], 3),
    )
    for row in epochs.factors(config)
    if row['alpha'] == 0.5
  }
  assert found == {
    ('alpha', 1): (0.0, 0.133),
    ('alpha', 100): (0.001, 0.133),
    ('alpha/N', 1): (0.601, 0.797),
    ('alpha/N', 100): (0.606, 0.787),
  }
