"""The main job at tiny size, and the pretraining it stands on."""

import dataclasses
import doctest
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import claims, harness, pretraining
from experiments import equivalence as experiment
from experiments import equivalence_checks as checks
from experiments import equivalence_claims as judging
from experiments import equivalence_report as report
from experiments import equivalence_training as training
from iclcl_jax import dual, equivalence, features, tasks

ROOT = pathlib.Path(__file__).parents[1]
TINY = experiment.Config(
  num_seeds=5,
  num_demonstrations=(3,),
  num_epochs=2,
  tokens_per_epoch=16,
  num_features=8,
  num_test_prompts=3,
  num_dual_prompts=2,
  dual_epochs=3,
  block_epochs=1,
)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tiny')
  summary = experiment.run(TINY, workdir)
  return summary, workdir


def test_summary_has_the_numbers_that_decide(tiny):
  summary, workdir = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  for name in ('', 'exact_softmax_', 'multi_epoch_'):
    assert 0 < summary[f'residual_{name}float64'] <= 1e-12
    assert 1e-9 < summary[f'residual_{name}float32'] <= 1e-5
  assert summary['c14_curve_residual_float64'] <= 1e-12
  for name in ('attention', 'dual', 'zero_predictor', 'unseen_task'):
    interval = summary['by_num_demonstrations']['3'][
      'test_mse_95_percent_interval'
    ][name]
    assert interval['mean'] == pytest.approx(summary[f'test_mse_{name}'])
    assert interval['low'] < interval['mean'] < interval['high']
  assert summary['test_mse_dual'] == pytest.approx(
    summary['test_mse_attention'], rel=1e-12
  )
  assert summary['num_seeds'] == 5
  assert summary['holds'] is True
  assert 'memorises' in summary['test_mse_meaning']
  assert set(summary['by_num_demonstrations']) == {'3'}
  assert {'pretraining_3', 'certificates', 'total'} <= set(summary['seconds'])


def test_every_map_has_certificates_in_both_precisions(tiny):
  rows = tiny[0]['certificates']
  names = {row['name'] for row in rows}
  assert len(names) == 10
  assert len(rows) == 10 * 2 * 2
  for row in rows:
    assert row['passed']
    assert row['tolerance'] == {'float64': 1e-12, 'float32': 1e-5}[row['dtype']]
    if row['data'] == 'small norms':
      assert row['holds'], row


def test_outputs_are_complete(tiny):
  _, workdir = tiny
  figures = sorted(path.name for path in (workdir / 'figures').glob('*.png'))
  assert figures == [
    'descent_3.png',
    'predictions.png',
    'pretraining.png',
  ]
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == TINY.num_epochs
  assert len(json.loads(lines[0])['loss']) == 5


def test_rerun_restores_the_trained_layers(tiny, monkeypatch):
  summary, workdir = tiny
  seeds = training.init_seeds(TINY)

  def fail(*args, **kwargs):
    raise AssertionError('trained again')

  monkeypatch.setattr(pretraining, 'squared_error', fail)
  # Shapes of the outputs are worked out by tracing, with nothing computed.
  monkeypatch.setattr(
    pretraining, 'train', lambda p, phi, x, learning_rate: (p, x.target[:, 0])
  )
  _, losses = training.pretrain(TINY, seeds, 3, workdir)
  rows = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  expected = [row['loss'] for row in rows if row['num_demonstrations'] == 3]
  np.testing.assert_array_equal(losses[:, 0], np.float32(expected))
  assert summary['num_seeds'] == losses.shape[2]


def test_text_ends_in_the_verdict(tiny):
  summary, _ = tiny
  last = report.text(summary).splitlines()[-1]
  assert last.startswith('equivalence: HOLDS  residual ')
  assert last.endswith('(float32)')
  lost = dict(summary) | {'holds': False, 'residual_float64': None}
  last = report.text(lost).splitlines()[-1]
  assert last.startswith('equivalence: FAILS  residual nan (float64)')


def _results(**replacements):
  """Results as `experiment.evaluate` returns them, all residuals tiny."""

  def arrays(num_prompts, *shape):
    return np.ones((TINY.num_seeds, num_prompts, *shape))

  tests, duals = TINY.num_test_prompts, TINY.num_dual_prompts
  label, small = arrays(tests, 1), 1e-16 * arrays(tests)
  one_step = checks.OneStep(label, label, small, small)
  curve, small = arrays(duals, 4), 1e-16 * arrays(duals)
  descent = checks.Descent(arrays(duals, 1), small, curve, curve, small)
  results = {
    'target': label,
    'one_step_float64': one_step,
    'one_step_float32': one_step,
    'unseen': one_step,
    'descent_float64': descent,
    'descent_float32': descent,
    'descent_1_epoch': descent,
  }
  for name, (field, value) in replacements.items():
    bad = getattr(results[name], field).copy()
    bad[2, 1] = value
    results[name] = results[name]._replace(**{field: bad})
  return results


def _summary(results, certificates=()):
  config = dataclasses.replace(TINY, num_demonstrations=(3, 2))
  curves = {3: np.ones((2, 2, 5)), 2: np.ones((2, 2, 5))}
  results = {3: _results(), 2: results}
  return report.summarise(config, curves, results, certificates)


def test_tiny_residuals_hold():
  assert _summary(_results())['holds'] is True


@pytest.mark.parametrize('value', [1e-3, np.nan])
@pytest.mark.parametrize(
  ('name', 'field'),
  [
    ('one_step_float64', 'residual'),
    ('one_step_float64', 'softmax_residual'),
    ('one_step_float32', 'residual'),
    ('one_step_float32', 'softmax_residual'),
    ('descent_float64', 'residual'),
    ('descent_float32', 'residual'),
    ('descent_float64', 'curve_residual'),
    ('descent_1_epoch', 'curve_residual'),
  ],
)
def test_one_bad_prompt_breaks_the_verdict(name, field, value):
  assert _summary(_results(**{name: (field, value)}))['holds'] is False


def test_one_failed_certificate_breaks_the_verdict():
  rows = [{'passed': True}, {'passed': False}]
  assert _summary(_results(), rows)['holds'] is False


def test_certificate_notices_a_wrong_step(monkeypatch):
  x = jax.random.normal(jax.random.key(0), (4, 3))
  phi = features.EluPlusOneFeatures()
  assert checks.certify(phi, x[-1], x, x).holds
  right = dual.one_step

  def wrong(phi, state, keys, values, **options):
    return right(phi, state, keys, 1.001 * values, **options)

  monkeypatch.setattr(dual, 'one_step', wrong)
  fresh = jax.jit(
    lambda *arrays, num_query_tokens: equivalence.residuals(
      *arrays, num_query_tokens=num_query_tokens
    ),
    static_argnames='num_query_tokens',
  )
  monkeypatch.setattr(checks, '_residuals', lambda: fresh)
  certificate = checks.certify(phi, x[-1], x, x)
  assert certificate.verdict == 'fails'
  assert certificate.precision == 'highest'


def _layer(key, num_demonstrations=4, num_features=16):
  def draw(key):
    key_run, key_prompt = jax.random.split(key)
    run = pretraining.init_run(key_run, num_features=num_features)
    prompt = tasks.linear_regression(
      key_prompt, num_demonstrations, run.task_matrix
    )
    return run.params, run.phi, prompt

  layer = harness.compile_quickly(draw)(key)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), layer)


def _attention_terms(params, phi, tokens):
  """Attention weights, values and output, by plain NumPy."""
  tokens, omega = np.asarray(tokens), np.asarray(phi.projection)
  query, keys, values = (
    tokens[-1] @ np.asarray(params.query),
    tokens @ np.asarray(params.key),
    tokens @ np.asarray(params.value),
  )

  def phi_rows(x):
    y = x / x.shape[-1] ** 0.25
    return np.exp(y @ omega.T - np.sum(y * y, -1, keepdims=True) / 2)

  scores = phi_rows(keys) @ phi_rows(query)
  weights = scores / np.sum(scores)
  return weights, values, weights @ values


@pytest.mark.parametrize('num_epochs', [1, 3])
def test_descent_follows_the_closed_form(num_epochs):
  params, phi, prompt = _layer(jax.random.key(3))
  descend = harness.compile_quickly(
    checks.descend, static_argnames='num_epochs'
  )
  result = descend(params, phi, prompt.tokens, num_epochs=num_epochs)
  weights, values, output = _attention_terms(params, phi, prompt.tokens)
  parts = weights[:-1, None] * values[:-1]
  size = parts.shape[0]
  assert result.distances.shape == (num_epochs * size + 1,)
  np.testing.assert_allclose(result.dual, output[-1:], rtol=1e-12)
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


def test_descent_notices_a_wrong_rate(monkeypatch):
  params, phi, prompt = _layer(jax.random.key(3))
  right = checks.optax.sgd
  monkeypatch.setattr(checks.optax, 'sgd', lambda rate: right(1.01 * rate))
  descend = harness.compile_quickly(
    functools.partial(checks.descend, num_epochs=2)
  )
  result = descend(params, phi, prompt.tokens)
  assert result.residual > 1e-4
  assert result.curve_residual > 1e-4


def test_one_step_reports_both_sides():
  params, phi, prompt = _layer(jax.random.key(5))
  one_step = harness.compile_quickly(checks.one_step)
  result = one_step(params, phi, prompt.tokens)
  _, _, output = _attention_terms(params, phi, prompt.tokens)
  np.testing.assert_allclose(result.attention, output[-1:], rtol=1e-12)
  np.testing.assert_allclose(result.dual, output[-1:], rtol=1e-12)
  assert result.residual <= 1e-12
  assert result.softmax_residual <= 1e-12


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


def test_prompts_depend_on_their_step_alone():
  key = jax.random.key(0)
  draw = harness.compile_quickly(
    functools.partial(
      pretraining.draw_prompts,
      task_fn=pretraining.draw_task,
      num_demonstrations=3,
    )
  )
  whole = draw(key, jnp.arange(6))
  part = draw(key, jnp.arange(4, 6))
  np.testing.assert_array_equal(whole.tokens[4:], part.tokens)
  np.testing.assert_array_equal(whole.target[4:], part.target)
  flat = np.asarray(whole.tokens[:, :, :-1]).reshape(6, -1)
  assert len(np.unique(flat, axis=0)) == 6


def test_training_seeds_together_is_training_them_alone():
  seeds = training.init_seeds(TINY)
  runs, matrices = seeds.runs, seeds.runs.task_matrix
  draw = harness.compile_quickly(
    lambda keys: training.draw_prompts(TINY, keys, matrices, jnp.arange(5), 4)
  )
  prompts = draw(seeds.training)
  train = functools.partial(pretraining.train, learning_rate=0.01)
  arguments = runs.params, runs.phi, prompts
  together, losses = jax.jit(jax.vmap(train))(*arguments)
  alone, losses_alone = jax.jit(train)(*jax.tree.map(lambda x: x[1], arguments))
  assert together.query.dtype == jnp.float32
  np.testing.assert_allclose(losses[1], losses_alone, rtol=1e-4)
  for a, b, start in zip(together, alone, runs.params, strict=True):
    assert np.max(np.abs(b - start[1])) > 1e-6
    np.testing.assert_allclose(a[1], b, atol=1e-5)


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


@pytest.mark.parametrize('multi_task', [False, True])
def test_multi_task_draws_a_fresh_matrix(multi_task):
  config = dataclasses.replace(TINY, multi_task=multi_task)
  keys = jax.random.split(jax.random.key(0), 2)
  matrices = jnp.ones((2, 1, pretraining.INPUT_DIM), jnp.float32)
  draw = harness.compile_quickly(
    lambda keys: training.draw_prompts(config, keys, matrices, jnp.arange(3), 4)
  )
  prompts = draw(keys)
  sums = jnp.sum(prompts.tokens[..., :-1, :-1], axis=-1)
  labels = prompts.tokens[..., :-1, -1]
  assert np.allclose(sums, labels, atol=1e-5) is not multi_task


def test_input_distributions_differ():
  def draw(name):
    config = dataclasses.replace(TINY, input_distribution=name, learning_rate=0)
    keys = jax.random.split(jax.random.key(0), 2)
    matrices = jnp.ones((2, 1, pretraining.INPUT_DIM), jnp.float32)
    draw = harness.compile_quickly(
      lambda keys: training.draw_prompts(
        config, keys, matrices, jnp.arange(3), 9
      )
    )
    prompts = draw(keys)
    return config, np.asarray(prompts.tokens[..., :-1])

  config, uniform = draw('uniform')
  assert config.learning_rate == 0.003
  assert np.max(np.abs(uniform)) <= 1
  config, normal = draw('normal')
  assert config.learning_rate == 0.001
  assert np.max(np.abs(normal)) > 2


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('num_seeds', 4),
    ('num_epochs', 0),
    ('num_features', 0),
    ('dual_epochs', 0),
    ('block_epochs', 0),
    ('seed', -1),
    ('learning_rate', -0.1),
    ('learning_rate', float('nan')),
    ('input_distribution', 'cauchy'),
    ('num_demonstrations', ()),
    ('num_demonstrations', (0,)),
    ('num_demonstrations', (3, 3)),
    ('tokens_per_epoch', 3),
    ('num_test_prompts', 0),
    ('num_dual_prompts', 4),
  ],
)
def test_bad_setting_is_named(field, value):
  with pytest.raises(ValueError, match=f'{field} is'):
    dataclasses.replace(TINY, **{field: value})


def test_diverged_training_is_named(tmp_path):
  config = dataclasses.replace(TINY, learning_rate=1e30)
  seeds = training.init_seeds(config)
  with pytest.raises(ValueError, match=r'learning_rate is 1e\+30.*diverged'):
    training.pretrain(config, seeds, 3, tmp_path)


def test_command_names_bad_flags(tmp_path):
  def command(flag):
    return subprocess.run(
      [
        *(sys.executable, '-m', 'experiments.equivalence'),
        *(f'--workdir={tmp_path / "out"}', flag),
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )

  result = command('--num_seeds=2')
  assert result.returncode == 1
  assert 'error: num_seeds is 2; expected an integer >= 5' in result.stderr
  result = command('--num_sedes=9')
  assert result.returncode == 1
  assert "Unknown command line flag 'num_sedes'" in result.stderr
  assert not (tmp_path / 'out').exists()


def test_examples_of_pretraining_run():
  results = doctest.testmod(pretraining)
  assert results.attempted > 0
  assert results.failed == 0


def test_claims_and_figures_are_ready_for_the_page(tiny):
  summary, workdir = tiny
  claims.check(summary['claims'])
  assert summary['conclusion'].endswith('.')
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn
  assert all(row['caption'].endswith('.') for row in summary['figures'])


def test_verdicts_follow_the_numbers(tiny):
  summary, _ = tiny
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['equivalence-residual-3'] == 'reproduced'
  part = summary['by_num_demonstrations']['3']
  broken = part | {
    'residual_float64': 1e-9,
    'residual_multi_epoch_float64': float('nan'),
    'loss_over_zero_predictor': {
      'attention': {'mean': 0.15, 'low': 0.1, 'high': 0.21},
      'unseen_task': {'mean': 2.0, 'low': 1.5, 'high': 2.5},
    },
  }
  claims_of_broken = judging.claims({'by_num_demonstrations': {'3': broken}})
  verdicts = {row['id']: row['verdict'] for row in claims_of_broken}
  assert verdicts['equivalence-residual-3'] == 'not reproduced'
  assert verdicts['equivalence-residual_multi_epoch-3'] == 'not reproduced'
  assert verdicts['equivalence-near-truth-3'] == 'undecided'
  assert verdicts['equivalence-in-context-3'] == 'not reproduced'
