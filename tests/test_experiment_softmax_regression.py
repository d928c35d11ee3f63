"""`experiments.softmax_regression`: the real thing, tiny."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import claims, harness
from experiments import softmax_regression as experiment
from experiments import softmax_regression_report as report
from experiments import softmax_regression_training as training
from iclcl_jax.accounts import softmax_regression as account

TINY = experiment.Config(
  num_seeds=5,
  num_words=(6, 8),
  widths=(2, 3),
  num_tasks=20,
  num_steps=4,
  num_records=2,
  words_per_batch=24,
  num_test=3,
)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tiny')
  # Optax raises a float to an integer power.
  with jax.numpy_dtype_promotion('standard'):
    return experiment.run(TINY, workdir), workdir


def test_summary_has_the_numbers_that_decide(tiny):
  summary, workdir = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert 0 < summary['gradient_residual_float64'] < 1e-11
  assert 0 < summary['hessian_residual_float64'] < 1e-11
  observed = summary['lipschitz_observed']
  assert 0 < observed <= summary['lipschitz_true_bound']
  assert summary['log_published_bound'] == pytest.approx(26.99, abs=0.01)
  claims.check(summary['claims'])
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['softmax-regression-bound-holds'] == 'reproduced'
  assert verdicts['softmax-regression-bound-informs'] == 'not reproduced'
  assert verdicts['softmax-regression-true-constant'] == 'reproduced'
  for row in summary['claims']:
    assert tuple(row) == claims.KEYS


def test_figures_are_those_of_the_summary(tiny):
  summary, workdir = tiny
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn


def test_metrics_have_every_record(tiny):
  summary, workdir = tiny
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  runs = len(summary['trained_layers'])
  assert len(rows) == runs * TINY.num_seeds * (TINY.num_records + 1)
  assert {row['step'] for row in rows} == {0, 2, 4}


def constructed(sign, scale):
  """A softmax layer of two opposite heads: linear attention for small m."""
  eye = jnp.eye(3) * scale**0.5
  return {
    'queries': jnp.stack([eye, -eye]),
    'keys': jnp.stack([eye, eye]),
    'outputs': jnp.array([sign, -sign]) / (2 * scale),
  }


def test_metrics_know_a_layer_that_takes_the_step():
  layer = training.LAYERS['softmax, two heads']
  rate = training.unit_rate(8, 3)

  @harness.compile_quickly
  def compare(params):
    keys = jax.random.split(jax.random.key(0), 4)
    tests = jax.vmap(lambda key: training.draw(key, 8, 3, 1))(keys)
    return training.compare(layer, params, tests, rate)

  same = compare(constructed(1.0, 1e-4))
  opposite = compare(constructed(-1.0, 1e-4))
  assert same['model_cos'] > 0.999
  assert same['logit_cos'] > 0.999
  assert same['preds_diff'] < 0.01 * same['preds_move']
  assert same['model_diff'] < 0.01 * same['model_size']
  assert same['loss'] == pytest.approx(float(same['loss_gd']), rel=0.01)
  assert opposite['model_cos'] < -0.999


def test_frames_differ_in_what_is_asked():
  draw = harness.compile_quickly(
    lambda frame: training.draw(jax.random.key(0), 8, 3, frame)
  )
  place, held = draw(0), draw(1)
  np.testing.assert_array_equal(place.queries, place.posed.document)
  np.testing.assert_array_equal(place.answer, place.posed.target)
  assert jnp.max(jnp.abs(held.queries - held.posed.document)) > 0.1
  for task in (place, held):
    account.problem(*task.posed)  # The target is in the simplex.
    np.testing.assert_allclose(jnp.sum(task.answer), 1, rtol=1e-6)


def test_claims_are_judged_by_their_numbers():
  row = report._judged({}, [1.0, 1.01, 0.99, 1.0], at_least=0.95, at_most=1.05)
  assert row['verdict'] == 'reproduced'
  row = report._judged({}, [1.0, 1.2, 0.8, 1.0], at_least=0.95, at_most=1.05)
  assert row['verdict'] == 'undecided'


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_seeds', 4, 'num_seeds is 4; expected an integer >= 5'),
    ('num_records', 3, 'num_steps is 4; expected a multiple of num_records, 3'),
    ('learning_rate', np.nan, 'learning_rate is nan'),
    ('num_words', (8, 6), r'num_words is \(8, 6\); expected at least two'),
    ('widths', (1, 3), 'widths is 1'),
  ],
)
def test_bad_settings_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **{field: value})
