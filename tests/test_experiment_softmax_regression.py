"""`experiments.softmax_regression`: the real thing, tiny."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab, softmax_regression as experiment
from experiments.softmax_regression import layers, one_step
from tests import experiment_battery

tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_summary_has_the_numbers_that_decide(tiny):
  summary, _ = tiny
  observed = summary['lipschitz_observed']
  assert 0 < observed <= summary['lipschitz_true_bound']
  assert summary['log_published_bound'] == pytest.approx(26.99, abs=0.01)
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['softmax-regression-bound-holds'] == 'reproduced'
  assert verdicts['softmax-regression-bound-informs'] == 'not reproduced'
  assert verdicts['softmax-regression-true-constant'] == 'reproduced'


def test_metrics_have_every_record(tiny):
  summary, workdir = tiny
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  runs, config = len(summary['trained_layers']), experiment.Config.tiny()
  assert len(rows) == runs * config.num_seeds * (config.num_records + 1)
  assert {row['step'] for row in rows} == {0, 2, 4}


def test_layers_trained_together_are_those_trained_alone():
  config, rates = experiment.Config.tiny(), jnp.array([1.0, 2.0])

  def train(*names):
    return lab.compile_quickly(
      lambda: layers.train(config, names, (4, 3), rates)
    )()

  together, alone = train(*layers.LAYERS), train(layers.PUBLISHED)
  for ours, theirs in zip(
    together[layers.PUBLISHED], alone[layers.PUBLISHED], strict=True
  ):
    assert ours.shape == (2, config.num_seeds, config.num_records + 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  assert not np.allclose(
    together['linear'].loss_ratio, alone[layers.PUBLISHED].loss_ratio
  )


def constructed(sign, scale):
  """A softmax layer of two opposite heads: linear attention for small m."""
  eye = jnp.eye(3) * scale**0.5
  return {
    'queries': jnp.stack([eye, -eye]),
    'keys': jnp.stack([eye, eye]),
    'outputs': jnp.array([sign, -sign]) / (2 * scale),
  }


def test_metrics_know_a_layer_that_takes_the_step():
  layer = layers.LAYERS['softmax, two heads']
  rate = one_step.unit_rate((8, 3))

  @lab.compile_quickly
  def compare(params):
    keys = jax.random.split(jax.random.key(0), 4)
    tests = jax.vmap(lambda key: one_step.draw(key, (8, 3), 1))(keys)
    return layers.compare(layer, params, tests, rate)

  same = compare(constructed(1.0, 1e-4))
  opposite = compare(constructed(-1.0, 1e-4))
  assert same.model_cos > 0.999
  assert same.logit_cos > 0.999
  assert same.preds_diff < 0.01
  assert same.model_diff < 0.01
  assert same.loss_over_gd == pytest.approx(1, rel=0.01)
  assert opposite.model_cos < -0.999


def test_frames_differ_in_what_is_asked():
  draw = lab.compile_quickly(
    lambda frame: one_step.draw(jax.random.key(0), (8, 3), frame)
  )
  place, held = draw(0), draw(1)
  np.testing.assert_array_equal(place.queries, place.posed.document)
  np.testing.assert_array_equal(place.answer, place.posed.target)
  assert jnp.max(jnp.abs(held.queries - held.posed.document)) > 0.1
  for task in (place, held):
    target = task.posed.target  # It is in the simplex.
    assert jnp.min(target) >= 0
    np.testing.assert_allclose(jnp.sum(target), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(task.answer), 1, rtol=1e-6)
