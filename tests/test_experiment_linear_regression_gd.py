"""`experiments.linear_regression_gd`: the real thing, tiny."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import claims
from experiments import linear_regression_gd as experiment
from experiments import linear_regression_gd_data as data
from experiments import linear_regression_gd_step_claims as step_claims
from experiments import linear_regression_gd_steps as steps
from tests import tolerances

TINY = experiment.Config(
  d_x=2,
  num_demonstrations=4,
  batch_size=64,
  num_steps=300,
  softmax_steps=50,
  record_every=50,
  learning_rate=1e-2,
  num_test_tasks=200,
  num_tuning_tasks=500,
  num_yardstick_tasks=600,
  num_steps_of_gd=(2,),
  parts=('softmax', 'steps'),
)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tiny')
  # As users run it; optax promotes dtypes and ranks.
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    return experiment.run(TINY, workdir), workdir


def test_summary_has_the_numbers_that_decide(tiny):
  summary, workdir = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert 0 < summary['construction_residual_float64'] < 1e-12
  assert summary['training_seconds'] > 0
  assert summary['loss_gd'] < 0.8 * summary['loss_zero_predictor']
  assert summary['preds_diff'] > 0
  claims.check(summary['claims'])


def test_a_trained_layer_nears_gradient_descent(tiny):
  """Already after few steps; at the start the loss is that of 0."""
  summary, _ = tiny
  gap = summary['loss_zero_predictor'] - summary['loss_gd']
  assert min(summary['loss_trained_by_seed']) < summary['loss_gd'] + 0.5 * gap
  assert summary['model_cos'] > 0.5
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['linear-regression-gd-construction'] == 'reproduced'


def test_metrics_start_at_the_zero_predictor(tiny):
  _, workdir = tiny
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  first = [row for row in rows if row.get('step') == 0]
  assert len(first) == 3 * TINY.num_seeds
  assert np.ptp([row['loss'] for row in first]) < 1e-3


def test_tuning_finds_the_minimum(tiny):
  summary, _ = tiny
  rows = summary['steps_of_gd']
  assert [row['method'] for row in rows] == ['GD', 'GD', 'GD++', steps.UNTIED]
  assert max(row['tuning_gradient'] for row in rows) < 1e-2
  losses = [row['loss'] for row in rows]
  assert losses == sorted(losses, reverse=True)
  assert rows[2]['minus_gd_loss'] == pytest.approx(losses[2] - losses[1])
  # Not the settings of the yardsticks.
  assert all(row['yardstick'] is None for row in rows)


def test_both_losses_of_descent_agree_with_the_closed_form(tiny):
  """Sampled tasks, and tasks integrated out, share no arithmetic."""
  summary, _ = tiny
  for row in summary['steps_of_gd']:
    gap = abs(row['loss'] - row['sampled_loss'])
    error = np.hypot(row['standard_error'], row['sampled_standard_error'])
    assert gap < tolerances.SIGMAS * error
  first = summary['steps_of_gd'][0]
  # With more steps, rare inputs weigh more than what is integrated out.
  assert first['standard_error'] < first['sampled_standard_error']
  gap = abs(first['loss'] - summary['loss_closed_form'])
  assert gap < tolerances.SIGMAS * first['standard_error']


def test_yardsticks_are_held_against_losses():
  row = {
    'method': 'GD++',
    'num_steps': 5,
    'loss': 0.0520 * 1.01,
    'standard_error': 1e-4,
    'sampled_loss': 0.0520 * 1.03,
    'sampled_standard_error': 1e-4,
  }
  config = experiment.Config(num_yardstick_tasks=60_000)
  judged = step_claims.with_yardstick(config, row)
  assert judged['yardstick'] == 0.0520
  assert judged['deviation'] == pytest.approx(0.5)
  assert judged['sampled_deviation'] == pytest.approx(1.5)
  noisy = {**row, 'sampled_standard_error': 0.00052}
  judged = step_claims.with_yardstick(config, noisy)
  assert judged['sampled_deviation'] == pytest.approx(1.0)
  # Times 2 with the standard error of the yardstick.
  assert judged['sampled_deviation_wide'] == pytest.approx(0.5)
  claims_ = step_claims.of_steps([judged | {
    'minus_gd_loss': -1.0, 'minus_gd_standard_error': 0.1,
  }])  # fmt: skip
  assert [row['verdict'] for row in claims_] == ['reproduced'] * 3


def test_figures_are_those_of_the_summary(tiny):
  summary, workdir = tiny
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn


@pytest.fixture(scope='module')
def drawn():
  """Batches of the training generator, one after the other."""
  config = dataclasses.replace(TINY, d_x=5, batch_size=512)

  source = data.linear_source(config)

  def batch(lanes, _):
    return data.draw_lanes(lanes, source)

  lanes = data.init_lanes(jax.random.key(0), config.batch_size, source)
  _, tasks = jax.jit(lambda x: jax.lax.scan(batch, x, length=40))(lanes)
  return config, jax.tree.map(np.asarray, tasks)


def test_training_data_have_their_moments(drawn):
  config, tasks = drawn
  inputs = tasks.tokens[..., :-1].astype(np.float64)
  half, count = config.half_range, inputs.size
  assert np.max(np.abs(inputs)) <= half
  for power, mean, variance in (
    (1, 0, half**2 / 3),
    (2, half**2 / 3, half**4 * (1 / 5 - 1 / 9)),
    (4, half**4 / 5, half**8 * (1 / 9 - 1 / 25)),
  ):
    bound = tolerances.SIGMAS * (variance / count) ** 0.5
    assert abs(np.mean(inputs**power) - mean) < bound
  scaled = inputs / (half / 3**0.5)  # Variance 1.
  for later in (1, 2, 7):  # The same lane, some batches later.
    pairs = scaled[later:] * scaled[:-later]
    assert abs(np.mean(pairs)) < tolerances.SIGMAS / pairs.size**0.5
  neighbours = scaled[:, 1:] * scaled[:, :-1]
  assert abs(np.mean(neighbours)) < tolerances.SIGMAS / neighbours.size**0.5


def test_training_data_have_the_loss_of_the_closed_form(drawn):
  config, tasks = drawn
  flat = data.Tasks(*(x.reshape(-1, *x.shape[2:]) for x in tasks))
  expected = steps.linear_tasks(config)
  rate = steps.account.optimal_learning_rate(expected)
  factors = jnp.asarray([[rate], [0.0]], jnp.float32)
  losses = jax.jit(steps.losses)(jax.tree.map(jnp.asarray, flat), factors)
  bound = tolerances.SIGMAS * float(np.std(losses)) / losses.size**0.5
  target = steps.account.expected_loss(expected, rate)
  assert bound < 0.1 * target
  assert abs(float(jnp.mean(losses)) - target) < bound


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_seeds', 4, 'num_seeds is 4; expected an integer >= 5'),
    ('num_steps', 301, 'num_steps is 301; expected a multiple of record_every'),
    ('half_range', 0.0, 'half_range is 0; expected a positive number'),
    ('clip', np.nan, 'clip is nan'),
    ('num_steps_of_gd', (1,), 'num_steps_of_gd is 1; expected an integer >= 2'),
    ('num_test_tasks', 1, 'num_test_tasks is 1'),
    ('num_steps_of_gd', (), 'num_steps_of_gd is empty'),
    ('deep_steps', 11, 'deep_steps is 11; expected a multiple of 10'),
    ('sine_width', 0, 'sine_width is 0'),
    ('parts', ('sines',), "parts names 'sines'; expected any of softmax"),
    ('parts', ('stacks',), 'parts has stacks without steps'),
  ],
)
def test_bad_settings_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **{field: value})


def test_another_config_in_the_workdir_is_named(tiny):
  _, workdir = tiny
  other = dataclasses.replace(TINY, clip=0.5)
  with pytest.raises(ValueError, match='workdir holds a run with clip'):
    experiment.run(other, workdir)
