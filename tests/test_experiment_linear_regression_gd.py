"""`experiments.linear_regression_gd`: the real thing, tiny."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab, linear_regression_gd as experiment
from experiments.linear_regression_gd import sine, steps, training
from iclcl_jax.accounts import linear_regression_gd as account
from tests import experiment_battery, tolerances

ALL = dataclasses.replace(
  experiment.Config.tiny(),
  parts=experiment.OPTIONAL,
  num_tuning_tasks=500,
  num_yardstick_tasks=600,
  num_steps_of_gd=(2,),
  deep_steps=300,
  deep_batch_size=32,
  sine_steps=60,
  sine_batch_size=16,
  sine_width=6,
  alternating_steps=20,
  alternating_batch_size=8,
  alternating_size=2,
)
SEEDS = ALL.num_seeds

tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)
  drawn = {row['file'] for row in tiny[0]['figures']}
  assert drawn == {
    f'figures/{name}.png' for name in ('training', 'generalisation', 'products')
  }


@pytest.fixture(scope='module')
def everything(tmp_path_factory):
  """All questions: the summary, the typed results, the rows of metrics."""
  folder, results = tmp_path_factory.mktemp('all'), {}

  def keep(name, part):
    def measure(config):
      results[name] = part.measure(config)
      return results[name]

    return part._replace(measure=measure)

  parts = {name: keep(name, part) for name, part in experiment.PARTS.items()}
  summary = lab.run(parts, ALL, folder)
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return summary, results, [json.loads(line) for line in lines]


def test_every_question_claims_draws_and_concludes(everything):
  summary, _, _ = everything
  names = [row['id'] for row in summary['claims']]
  counts = {'looped': 3, 'untied-2': 3 + 1, 'gdpp': 2}
  counts |= {'sine': 3, 'alternating': 2}
  for part, count in counts.items():
    assert sum(part in name for name in names) == count
  assert len(summary['figures']) == 7
  assert 'sine waves' in summary['conclusion']
  assert summary['sine'].keys() > {'loss_attention', 'loss_zero_predictor'}


def test_a_trained_layer_nears_gradient_descent(everything):
  """Already after few steps; at the start the loss is that of 0."""
  summary, _, rows = everything
  gap = summary['loss_zero_predictor'] - summary['loss_gd']
  assert gap > 0.2 * summary['loss_zero_predictor']
  assert min(summary['loss_trained_by_seed']) < summary['loss_gd'] + 0.5 * gap
  assert summary['model_cos'] > 0.5
  assert summary['preds_diff'] > 0
  assert summary['training_seconds'] > 0
  first = [row for row in rows if row.get('step') == 0 and 'model_cos' in row]
  assert len(first) == SEEDS
  assert np.ptp([row['loss'] for row in first]) < 1e-3


def test_tuning_finds_the_minimum(everything):
  rows = everything[0]['steps_of_gd']
  assert [row['method'] for row in rows] == ['GD', 'GD', 'GD++', steps.UNTIED]
  assert max(row['tuning_gradient'] for row in rows) < 1e-2
  losses = [row['loss'] for row in rows]
  assert losses == sorted(losses, reverse=True)
  assert rows[2]['minus_gd_loss'] == pytest.approx(losses[2] - losses[1])
  # Not the settings of the yardsticks.
  assert all(row['yardstick'] is None for row in rows)


def test_both_losses_of_descent_agree_with_the_closed_form(everything):
  """Sampled tasks, and tasks integrated out, share no arithmetic."""
  summary, results, _ = everything
  for row in results['steps']:
    gap = abs(row.loss - row.sampled_loss)
    error = np.hypot(row.standard_error, row.sampled_standard_error)
    assert gap < tolerances.SIGMAS * error
  first = results['steps'][0]
  # With more steps, rare inputs weigh more than what is integrated out.
  assert first.standard_error < first.sampled_standard_error
  gap = abs(first.loss - summary['loss_closed_form'])
  assert gap < tolerances.SIGMAS * first.standard_error


def test_yardsticks_are_held_against_losses():
  row = steps.Tuned(
    method='GD++',
    num_steps=5,
    learning_rates=np.ones(5),
    contractions=np.ones(5),
    tuning_gradient=0.0,
    loss=0.0520 * 1.01,
    standard_error=1e-4,
    minus_gd_loss=-1.0,
    minus_gd_standard_error=0.1,
    sampled_loss=0.0520 * 1.03,
    sampled_standard_error=1e-4,
  )
  config = experiment.Config(num_yardstick_tasks=60_000)
  found = steps.gap(config, row)
  assert found['yardstick'] == 0.0520
  assert found['deviation'] == pytest.approx(0.5)
  assert found['sampled_deviation'] == pytest.approx(1.5)
  noisy = row._replace(sampled_standard_error=0.00052)
  found = steps.gap(config, noisy)
  assert found['sampled_deviation'] == pytest.approx(1.0)
  # Times 2 with the standard error of the yardstick.
  assert found['sampled_deviation_wide'] == pytest.approx(0.5)
  claims = steps.claims(config, [noisy])
  assert [claim.verdict for claim in claims] == ['reproduced'] * 3


def test_stacks_start_as_the_trained_layer_and_learn(everything):
  looped, untied = everything[1]['stacks']
  assert (looped.kind, untied.kind) == ('looped', 'untied')
  assert looped.loss_gd > looped.loss_peer > untied.loss_peer
  np.testing.assert_allclose(looped.loss[:, 0], untied.loss[:, 0], rtol=1e-5)
  for row in (looped, untied):
    assert row.loss.shape == (SEEDS, 11)
    # In even widths, single layers and loops of them may be stuck.
    assert np.min(row.loss[:, -1]) < 0.9 * np.min(row.loss[:, 0])
    assert 0 < row.model_cos_of_peers < 1


def test_the_way_from_gd_to_its_peer(everything):
  row = everything[1]['stacks'][0]
  loss = np.array([[1, 0.25]])
  row = row._replace(loss_gd=0.4, loss_peer=0.2, loss=loss)
  assert row.reached == pytest.approx([0.75])


def test_networks_learn_sine_waves(everything):
  found = everything[1]['sine']
  for learnt in (found.attention, found.descent):
    assert np.all(learnt.loss[:, -1] < learnt.loss[:, 0])
  assert found.descent.along.shape == (SEEDS, len(found.grid))


def test_separate_tokens_read_each_other(everything):
  found = everything[1]['alternating']
  np.testing.assert_allclose(found.copied.sum(axis=2), 1, atol=1e-5)
  assert found.loss_gd < found.loss_zero
  assert abs(found.loss_gd - found.loss_closed_form) < 0.03


@pytest.fixture(scope='module')
def drawn():
  """Batches of the training generator, one after the other."""
  config = dataclasses.replace(ALL, d_x=5)
  source = training.linear_source(config)

  def batch(lanes, _):
    return training.draw_lanes(lanes, source)

  lanes = training.init_lanes(jax.random.key(0), 512, source)
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
  flat = training.Tasks(*(x.reshape(-1, *x.shape[2:]) for x in tasks))
  expected = training.linear_tasks(config)
  rate = account.optimal_learning_rate(expected)
  factors = jnp.asarray([[rate], [0.0]], jnp.float32)
  losses = jax.jit(steps.sampled_losses)(
    jax.tree.map(jnp.asarray, flat), factors
  )
  bound = tolerances.SIGMAS * float(np.std(losses)) / losses.size**0.5
  target = account.expected_loss(expected, rate)
  assert bound < 0.1 * target
  assert abs(float(jnp.mean(losses)) - target) < bound


@pytest.mark.parametrize(('lane', 'tied'), [(-1, False), (-2, True)])
def test_phase_and_amplitude_of_sine_waves(lane, tied):
  rng = np.random.default_rng(0)
  uniform = jnp.asarray(rng.uniform(-1, 1, (2000, 13)), jnp.float32)
  # Two inputs at which a wave shows its sine and its cosine part.
  uniform = uniform.at[:, 0].set(0).at[:, 1].set(np.pi / 10)
  tasks = sine.source(10, phase_lane=lane).make(uniform)
  parts = np.asarray(tasks.tokens[:, :2, 1], np.float64).T
  amplitude, phase = np.hypot(*parts), np.arctan2(*parts)
  assert np.all((amplitude > 0.1 - 1e-5) & (amplitude < 0.5 + 1e-5))
  assert np.all((phase > -1e-5) & (phase < np.pi + 1e-5))
  correlation = np.corrcoef(amplitude, phase)[0, 1]
  assert (correlation > 0.999) == tied
  assert tied or abs(correlation) < 5 / 2000**0.5
  assert not tasks.tokens[:, -1, 1].any()


@pytest.mark.parametrize('num_layers', [2, 4])
def test_a_stack_is_the_layers_of_the_account(num_layers):
  """Both the short way and that with bounded activations."""
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
  model = training.stack_model(3, num_layers=num_layers, init_scale=5.0)
  layer = model.init(jax.random.key(0))
  layers = account.repeat(jax.tree.map(lambda w: w[0], layer), num_layers)
  expected = jax.jit(account.predict)(layers, rows)
  answer = jax.jit(model.answer)(layer, rows)
  np.testing.assert_allclose(answer, expected, rtol=1e-5)


def test_a_step_on_the_last_layer_is_gradient_descent():
  model = sine.descent_on_network(4)
  body, head, log_rate = model.init(jax.random.key(0))
  head = 10 * head
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32).at[-1, 1].set(0)
  answer = jax.jit(model.answer)((body, head, log_rate), rows)
  moved = sine.network(body, rows[:, :-1])
  rates = jnp.exp(log_rate)[None]
  weights = account.descend(moved[:-1], rows[:-1, 1:], rates, initial=head)
  np.testing.assert_allclose(answer, weights @ moved[-1], rtol=1e-4)
