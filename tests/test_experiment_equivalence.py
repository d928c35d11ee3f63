"""`experiments.equivalence`, the main job: the real thing, tiny."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import equivalence as experiment, lab
from experiments.equivalence import certificates, descent, learning, one_step
from experiments.lab import loops, pretraining
from iclcl_jax import equivalence, features, tasks
from tests import experiment_battery

TINY = experiment.Config.tiny()
tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_summary_has_the_numbers_that_decide(tiny):
  summary, _ = tiny
  for name in ('', 'exact_softmax_', 'multi_epoch_'):
    assert 0 < summary[f'residual_{name}float64'] <= 1e-12
    assert 1e-9 < summary[f'residual_{name}float32'] <= 1e-5
  assert summary['c14_curve_residual_float64'] <= 1e-12
  assert len(summary['tolerances']) == 7
  part = summary['by_num_demonstrations']['3']
  for name in ('attention', 'dual', 'zero_predictor', 'unseen_task'):
    interval = part['test_mse_95_percent_interval'][name]
    assert interval['mean'] == pytest.approx(summary[f'test_mse_{name}'])
    assert interval['low'] < interval['mean'] < interval['high']
  assert summary['test_mse_dual'] == pytest.approx(
    summary['test_mse_attention'], rel=1e-12
  )
  assert summary['num_seeds'] == 5
  assert summary['holds'] is True
  assert 'memorises' in summary['test_mse_meaning']


def test_every_map_has_certificates_in_both_precisions(tiny):
  rows = tiny[0]['certificates']
  assert len({row['name'] for row in rows}) == 10
  assert len(rows) == 10 * 2 * 2
  for row in rows:
    assert row['passed']
    assert row['tolerance'] == {'float64': 1e-12, 'float32': 1e-5}[row['dtype']]
    assert row['holds'] or row['data'] != 'small norms', row


def test_rerun_restores_the_trained_layers(tiny, monkeypatch):
  """Shapes of the outputs are worked out by tracing, with nothing computed."""
  _, folder = tiny

  def fail(*args, **kwargs):
    raise AssertionError('trained again')

  monkeypatch.setattr(pretraining, 'squared_error', fail)
  monkeypatch.setattr(
    pretraining, 'train', lambda p, phi, x, learning_rate: (p, x.target[:, 0])
  )
  with loops.checkpoints_in(folder / 'checkpoints'):
    losses = one_step.trained.__wrapped__(TINY)[3].losses
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  expected = [json.loads(line)['loss'] for line in lines]
  assert len(lines) == TINY.num_epochs
  np.testing.assert_array_equal(losses[:, 0], np.float32(expected))


def test_text_ends_in_the_verdict(tiny):
  summary, _ = tiny
  last = experiment.closing(summary).splitlines()[-1]
  assert last.startswith('equivalence: HOLDS  residual ')
  assert last.endswith('(float32)')
  lost = dict(summary) | {'holds': False, 'residual_float64': None}
  last = experiment.closing(lost).splitlines()[-1]
  assert last.startswith('equivalence: FAILS  residual nan (float64)')


def _holds(name='', field='', value=0.0):
  """Whether a run holds whose second length has one bad prompt, or none."""
  small, label, curve = 1e-16 * np.ones((5, 2)), np.ones((5, 2, 1)), np.ones(4)
  bad = small.copy()
  bad[2, 1] = value
  step = one_step.OneStep(label, label, small, small)
  walk = descent.Descent(label, label, small, curve, curve, small)

  def records(good, *names):
    return {
      x: good._replace(**{field: bad}) if x == name else good for x in names
    }

  steps = records(step, 'step_float64', 'step_float32')
  walks = records(walk, 'once', 'walk_float64', 'walk_float32')
  steps = {x.removeprefix('step_'): y for x, y in steps.items()}
  good_steps = dict.fromkeys(steps, step)
  one = {
    3: one_step.Comparison(good_steps, label),
    2: one_step.Comparison(steps, label),
  }
  many = {
    3: descent.Descents(walk, walk, walk, label),
    2: descent.Descents(*walks.values(), label),
  }
  return (
    one_step.summary(TINY, one)['holds']
    and descent.summary(TINY, many)['holds']
  )


def test_tiny_residuals_hold():
  assert _holds() is True


@pytest.mark.parametrize('value', [1e-3, np.nan])
@pytest.mark.parametrize(
  ('name', 'field'),
  [
    ('step_float64', 'residual'),
    ('step_float64', 'softmax_residual'),
    ('step_float32', 'residual'),
    ('step_float32', 'softmax_residual'),
    ('walk_float64', 'residual'),
    ('walk_float32', 'residual'),
    ('walk_float64', 'curve_residual'),
    ('once', 'curve_residual'),
  ],
)
def test_one_bad_prompt_breaks_the_verdict(name, field, value):
  assert _holds(name, field, value) is False


def test_one_failed_certificate_breaks_the_verdict():
  x = jax.random.normal(jax.random.key(0), (4, 3))
  good = equivalence.verify(features.EluPlusOneFeatures(), x[-1], x, x)
  bad = dataclasses.replace(good, verdict='fails')
  rows = [certificates.Row('elu + 1', 'trained', c) for c in (good, bad)]
  assert certificates.summary(TINY, rows[:1])['holds'] is True
  assert certificates.summary(TINY, rows)['holds'] is False


@pytest.fixture(scope='module')
def layer():
  """A layer, its features and a prompt, in float64, and by plain NumPy its
  attention weights, values and output."""

  def draw(key):
    key_run, key_prompt = jax.random.split(key)
    run = pretraining.init_run(key_run, num_features=16)
    prompt = tasks.linear_regression(key_prompt, 4, run.task_matrix)
    return run.params, run.phi, prompt.tokens

  drawn = lab.compile_quickly(draw)(jax.random.key(3))
  drawn = jax.tree.map(lambda x: np.asarray(x, np.float64), drawn)
  params, phi, tokens = drawn
  query, keys, values = (
    tokens[-1] @ params.query,
    tokens @ params.key,
    tokens @ params.value,
  )

  def phi_rows(x):
    y = x / x.shape[-1] ** 0.25
    squares = np.sum(y * y, -1, keepdims=True)
    return np.exp(y @ phi.projection.T - squares / 2)

  scores = phi_rows(keys) @ phi_rows(query)
  weights = scores / np.sum(scores)
  return drawn, (weights, values, weights @ values)


@pytest.mark.parametrize('num_epochs', [1, 3])
def test_descent_follows_the_closed_form(layer, num_epochs):
  arguments, (weights, values, output) = layer
  descend = lab.compile_quickly(descent.descend, static_argnames='num_epochs')
  result = descend(*arguments, num_epochs=num_epochs)
  parts = weights[:-1, None] * values[:-1]
  size = parts.shape[0]
  assert result.distances.shape == (num_epochs * size + 1,)
  np.testing.assert_allclose(result.dual, output[-1:], rtol=1e-12)
  np.testing.assert_allclose(result.attention, output[-1:], rtol=1e-12)
  # At the end of each epoch: linear decay.
  start = np.linalg.norm(parts.sum(axis=0))
  for epoch in range(num_epochs + 1):
    expected = (1 - epoch / num_epochs) * start
    np.testing.assert_allclose(
      result.distances[epoch * size], expected, atol=1e-12
    )
  # Within the first epoch: what has not been visited, and a part of the rest.
  for visit in range(size + 1):
    rest = np.ones(size)
    rest[:visit] -= 1 / num_epochs
    expected = np.linalg.norm(rest @ parts)
    np.testing.assert_allclose(result.distances[visit], expected, atol=1e-12)
    np.testing.assert_allclose(result.predicted[visit], expected, atol=1e-12)
  assert result.residual <= 1e-12
  assert result.curve_residual <= 1e-12


def test_descent_notices_a_wrong_rate(layer, monkeypatch):
  right = descent.optax.sgd
  monkeypatch.setattr(descent.optax, 'sgd', lambda rate: right(1.01 * rate))
  descend = lab.compile_quickly(
    lambda *arguments: descent.descend(*arguments, num_epochs=2)
  )
  result = descend(*layer[0])
  assert result.residual > 1e-4
  assert result.curve_residual > 1e-4


def test_one_step_reports_both_sides(layer):
  arguments, (_, _, output) = layer
  result = lab.compile_quickly(one_step.one_step)(*arguments)
  np.testing.assert_allclose(result.attention, output[-1:], rtol=1e-12)
  np.testing.assert_allclose(result.dual, output[-1:], rtol=1e-12)
  assert result.residual <= 1e-12
  assert result.softmax_residual <= 1e-12


def test_verdicts_follow_the_numbers():
  residuals = {
    3: {'residual_float64': 1e-9},
    4: {'residual_float64': float('nan')},
    5: {'residual_float64': 1e-12},
  }
  texts = {'residual_float64': 'text'}
  judged = [*one_step.residual_claims(residuals, texts)]
  spread = np.linspace(0.5, 1.5, 5)
  zero = np.ones(5)
  training = np.ones((1, 2, 5))
  losses = learning.Losses(0.2 * spread, zero, 2 * zero, zero, training, 4)
  judged += learning.claims(TINY, {3: losses})
  assert {claim.id: claim.verdict for claim in judged} == {
    'equivalence-residual-3': 'not reproduced',
    'equivalence-residual-4': 'not reproduced',
    'equivalence-residual-5': 'reproduced',
    'equivalence-near-truth-3': 'undecided',
    'equivalence-in-context-3': 'not reproduced',
  }


def test_losses_are_of_the_own_task_and_of_the_next_seeds():
  params, phi, _, prompts = one_step.trained(TINY)[3]
  losses = learning.measure(TINY)[3]
  evaluate = lab.compile_quickly(pretraining.evaluate)
  for name, other in (('attention', 1), ('unseen_task', 2)):
    layer, shown = (
      jax.tree.map(lambda x, i=i: x[i], tree)
      for tree, i in (((params, phi), 1), (prompts, other))
    )
    np.testing.assert_allclose(
      getattr(losses, name)[1], evaluate(*layer, shown), rtol=1e-4
    )
  zero = np.mean(prompts.target**2, axis=(1, 2))
  np.testing.assert_allclose(losses.zero_predictor, zero, rtol=1e-6)
  np.testing.assert_allclose(losses.zero_unseen, np.roll(zero, -1), rtol=1e-6)


def test_command_names_bad_flags(tmp_path):
  def command(flag):
    return subprocess.run(
      [
        *(sys.executable, '-m', 'experiments.equivalence'),
        *(f'--workdir={tmp_path / "out"}', flag),
      ],
      cwd=pathlib.Path(__file__).parents[1],
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )

  for flag, message in (
    ('--num_seeds=2', 'error: num_seeds is 2; expected an integer >= 5'),
    ('--num_sedes=9', "Unknown command line flag 'num_sedes'"),
  ):
    result = command(flag)
    assert result.returncode == 1
    assert message in result.stderr
  assert not (tmp_path / 'out').exists()
