"""Learning processes: a tiny run, and what each must compute."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness, learning_processes
from experiments import learning_processes_dynamics as dynamics
from experiments import learning_processes_measure as measure
from experiments import learning_processes_report as report
from iclcl_jax import losses

TINY = learning_processes.Config(
  num_seeds=10,
  num_prompts=1,
  num_demonstrations=6,
  num_features=16,
  num_training_prompts=4,
  num_dual_steps=12,
  num_process_steps=15,
)
N, D, R = 6, 3, 14
RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.standard_normal(shape)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp('learning_processes')
  return learning_processes.run(TINY, folder), folder


def by_id(summary):
  return {row['id']: row for row in summary['claims']}


def test_the_run_writes_what_it_returns(tiny):
  summary, folder = tiny
  assert json.loads((folder / 'summary.json').read_text()) == summary
  assert (folder / 'config.json').exists()
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  assert {json.loads(line)['data'] for line in lines} == {
    'random',
    'trained layer',
  }
  for figure in summary['figures']:
    for suffix in ('.png', '.svg'):
      assert (folder / figure['file']).with_suffix(suffix).stat().st_size > 0
    assert figure['caption'].endswith('.')


def test_claims_have_the_promised_keys(tiny):
  summary, _ = tiny
  ids = [row['id'] for row in summary['claims']]
  assert len(set(ids)) == len(ids) == 48
  for row in summary['claims']:
    assert set(row) == {
      'id',
      'source',
      'claim',
      'statistic',
      'value',
      'interval',
      'verdict',
      'command',
    }
    assert row['verdict'] in ('reproduced', 'not reproduced', 'undecided')


def test_first_steps_are_attention_and_contrastive_steps_repeat(tiny):
  claims = by_id(tiny[0])
  for data in ('random', 'trained_layer'):
    for name in ('squared', 'InfoNCE', 'cosine', 'frozen_target'):
      assert claims[f'{data}:first_step_{name}']['value'] <= 1e-12
    assert claims[f'{data}:schedule']['value'] <= 1e-5
    assert claims[f'{data}:squared_after_10_steps']['value'] > 1
  assert 'first steps' in tiny[0]['conclusion']


def test_descent_is_gradient_descent():
  features, values, start = draw(N, R), draw(N, D), draw(D, R)
  found = harness.compile_quickly(
    lambda: dynamics.descend(losses.squared, features, values, start, 0.3, 3)
  )()

  weights, sizes = start, []
  for _ in range(3):
    slope = (features @ weights.T - values).T @ features
    sizes.append(0.3 / np.linalg.norm(slope))
    weights = weights - sizes[0] * slope
  np.testing.assert_allclose(found[-1], weights, rtol=1e-10)
  assert sizes[1] != sizes[0]
  np.testing.assert_allclose(np.linalg.norm(found[0] - start), 0.3)


def test_no_gradient_flows_through_a_stopped_target():
  encoder = dynamics.Encoder(draw(D, R), draw(D, D), draw(D, R))
  first, second = draw(N, R), draw(N, R)

  def slope(name):
    process = dynamics.PROCESSES[name]
    return jax.grad(lambda e: dynamics.cosine_loss(process, e, first, second))(
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
  encoder = dynamics.Encoder(draw(D, R), draw(D, D), draw(D, R))
  tokens = dynamics.Views(draw(N, R), draw(N, R), draw(R), draw(R))
  encoders = harness.compile_quickly(
    lambda: dynamics.train_encoder(
      dynamics.PROCESSES['BYOL'],
      encoder,
      tokens,
      learning_rate=0.5,
      momentum=0.75,
      num_steps=2,
      observe=lambda e: e,
    )
  )()
  for step in range(2):
    np.testing.assert_allclose(
      encoders.average[step + 1],
      0.75 * encoders.average[step] + 0.25 * encoders.weights[step + 1],
    )
  assert np.all(encoders.weights[0] == encoder.weights)


def test_kernel_learning_ends_in_the_lowest_eigenvectors():
  tokens = dynamics.Views(draw(N, R), draw(N, R), draw(R), draw(R))
  problem = dynamics.kernel_problem(tokens, draw(D, R))
  arrays = dynamics.triplets(tokens)
  weights, loss = harness.compile_quickly(
    lambda: dynamics.train_kernel_encoder(
      problem.start,
      tokens,
      step_size=problem.step_size,
      num_steps=3000,
      observe=lambda w: (w, dynamics.kernel_loss(w, *arrays)),
    )
  )()
  np.testing.assert_allclose(loss[-1], problem.best, rtol=1e-6)
  assert problem.best < 0
  for row in (weights[0], weights[1], weights[-1]):
    np.testing.assert_allclose(row @ row.T, np.eye(D), atol=1e-10)


def test_compressed_features_have_the_same_products():
  tokens = dynamics.Views(
    *(np.abs(draw(2, N, 40)) for _ in range(2)), draw(2, 40), draw(2, 40)
  )
  found = dynamics.compress(tokens)
  assert found.keys.shape == (2, N, 2 * N + 2)
  gram = found.keys @ np.swapaxes(found.keys, 1, 2)
  np.testing.assert_allclose(np.linalg.eigvalsh(gram)[:, -1], 1)
  for head in range(2):
    before = tokens.keys[head] @ tokens.query[head]
    after = found.keys[head] @ found.query[head]
    ratio = before / after
    np.testing.assert_allclose(ratio, np.full(N, ratio[0]), rtol=1e-10)
    np.testing.assert_allclose(
      tokens.values[head] @ tokens.values[head].T,
      found.values[head] @ found.values[head].T,
      rtol=1e-10,
    )


def test_measures_of_representations():
  rows = draw(N, D)
  rotation = np.linalg.qr(draw(D, D))[0]
  assert dynamics.spread(np.ones((N, D))) < 1e-7
  assert dynamics.spread(np.concatenate([rows, -rows])) == 1
  np.testing.assert_allclose(dynamics.alignment(rows, 3 * rows @ rotation), 1)
  assert dynamics.alignment(rows, draw(N, D)) < 0.9
  np.testing.assert_allclose(
    dynamics.angle(np.array([1.0, 0.0]), np.array([1.0, 1.0])), 45
  )


def test_one_ingredient_at_a_time_starts_from_attention(tiny):
  for data in ('random', 'trained_layer'):
    assert by_id(tiny[0])[f'{data}:cosine_parts_from_attention']['value'] > 1
  assert len(measure.INGREDIENTS) == 5


@pytest.mark.parametrize(
  ('samples', 'verdict'),
  [
    ([0.1, 0.2, 0.15], 'reproduced'),
    ([3.0, 3.1, 3.2], 'not reproduced'),
    ([0.5, 1.5, 1.0], 'undecided'),
  ],
)
def test_the_whole_interval_decides(samples, verdict):
  row = report._judge('x', 's', 'c', 't', np.array(samples), at_most=1)
  assert row['verdict'] == verdict


def test_divergence_is_an_error_that_names_the_flag():
  with pytest.raises(ValueError, match='learning_rate'):
    report._judge('x', 's', 'c', 't', np.array([1.0, np.nan, 2.0]))


@pytest.mark.parametrize(
  ('flag', 'value'),
  [
    ('num_seeds', 9),
    ('num_demonstrations', 1),
    ('num_features', 0),
    ('num_process_steps', 0),
    ('learning_rate', 0.0),
    ('momentum', 1.5),
    ('seed', -1),
  ],
)
def test_bad_flags_are_named(flag, value):
  with pytest.raises(ValueError, match=flag):
    dataclasses.replace(TINY, **{flag: value})
