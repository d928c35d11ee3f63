"""The experiment on the regularised layer at tiny size, against plain loops."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments import regularized_gradient_descent as experiment
from experiments import regularized_gradient_descent_measure as measure
from experiments import regularized_gradient_descent_summary as summary_of
from experiments.pretraining import LayerParams
from iclcl_jax import features
from tests import oracles

TINY = experiment.Config(
  num_seeds=5,
  num_demonstrations=3,
  alphas=(-0.5, 0.0, 0.5),
  dual_epochs=(1, 4),
  num_epochs=2,
  tokens_per_epoch=16,
  num_features=8,
  num_test_prompts=2,
  block_epochs=1,
)
CLAIM = {
  'id',
  'source',
  'claim',
  'statistic',
  'value',
  'interval',
  'verdict',
  'command',
}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """Summary, folder, and the measurements behind the summary."""
  workdir = tmp_path_factory.mktemp('tiny')
  seen = []
  summarise = summary_of.summarise
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      summary_of,
      'summarise',
      lambda config, results: (
        seen.append(results) or summarise(config, results)
      ),
    )
    summary = experiment.run(TINY, workdir)
  return summary, workdir, seen[0]


def verdicts(summary):
  return {x['id'].split('/')[1]: x['verdict'] for x in summary['claims']}


def test_claims_are_complete(tiny):
  summary, workdir, _ = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert all(set(claim) == CLAIM for claim in summary['claims'])
  names = [claim['id'] for claim in summary['claims']]
  assert len(set(names)) == len(names)
  assert set(verdicts(summary).values()) <= {
    'reproduced',
    'not reproduced',
    'undecided',
  }


def test_identities_hold_and_the_printed_form_is_none(tiny):
  found = verdicts(tiny[0])
  assert found['strict_ridge'] == 'reproduced'
  assert found['printed_pair'] == 'reproduced'
  assert found['closed_form'] == 'reproduced'
  assert found['printed_ridge'] == 'not reproduced'
  assert tiny[0]['residuals']['printed_ridge'] > 1e-3


def test_outputs_are_complete(tiny):
  summary, workdir, _ = tiny
  names = sorted(x.name for x in (workdir / 'figures').glob('*'))
  assert names == sorted(
    f'{name}.{suffix}'
    for name in ('epochs', 'exact', 'predictions')
    for suffix in ('png', 'svg')
  )
  for figure in summary['figures']:
    assert (workdir / figure['file']).exists()
    assert figure['caption'].endswith('.')
  rows = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  assert len(rows) == 3 * 2 * (2 + 5)
  assert len(rows[0]['relative_deviation']) == 5
  assert 'memorisation' in summary['pretraining_meaning']


def test_without_a_ridge_the_deviation_falls_linearly_to_zero(tiny):
  results = tiny[2]
  for reading in summary_of.divisors(TINY):
    curve = summary_of.deviation(results, 4, reading)[:, 1]
    expected = curve[:, :1] * np.linspace(1, 0, 5)[None]
    np.testing.assert_allclose(curve, expected, atol=1e-12)


def test_a_small_error_is_seen(tiny):
  results = tiny[2]
  step, epochs = results.full_batch, results.epochs
  one_reading = {k: _shift(x, 'measured') for k, x in epochs[4].items()}
  for name, broken in {
    'strict_ridge': results._replace(full_batch=_shift(step, 'ridge')),
    'printed_pair': results._replace(full_batch=_shift(step, 'pair')),
    'closed_form': results._replace(epochs={**epochs, 4: one_reading}),
  }.items():
    found = verdicts(summary_of.summarise(TINY, broken))
    lost = {k for k, v in found.items() if v != verdicts(tiny[0])[k]}
    assert name in lost
    assert found[name] == 'not reproduced'


def _shift(tree, field):
  return tree._replace(**{field: getattr(tree, field) + 1e-6})


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

  @harness.compile_quickly
  def run(params, projection, tokens, strength):
    phi = features.PositiveFeatures(projection)
    prompt = measure.layer(params, phi, tokens)
    return measure.train(phi, prompt, strength, num_epochs=num_epochs)

  found = run(params, projection, tokens, jnp.array(alpha))
  np.testing.assert_allclose(found.measured, expected, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(found.predicted, expected, rtol=1e-12, atol=1e-14)


def test_factors_of_both_readings():
  """N = 15, alpha = 0.5: printed in three digits, by hand."""
  config = dataclasses.replace(
    TINY, num_demonstrations=15, dual_epochs=(1, 100)
  )
  found = {
    (row['reading'], row['num_epochs']): (
      round(row['initial_factor'], 3),
      round(row['demonstration_factor'], 3),
    )
    for row in summary_of.factors(config)
    if row['alpha'] == 0.5
  }
  assert found == {
    ('alpha', 1): (0.0, 0.133),
    ('alpha', 100): (0.001, 0.133),
    ('alpha/N', 1): (0.601, 0.797),
    ('alpha/N', 100): (0.606, 0.787),
  }


def test_another_config_in_the_same_folder_is_refused(tiny):
  other = dataclasses.replace(TINY, seed=1)
  with pytest.raises(ValueError, match='holds a run with seed=0'):
    experiment.run(other, tiny[1])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_seeds': 4}, 'num_seeds is 4; expected an integer >= 5'),
    ({'num_demonstrations': 0}, 'num_demonstrations is 0'),
    ({'alphas': (0.0, 0.5)}, 'alphas is 0.0,0.5; expected increasing'),
    ({'alphas': (-0.5, 0.5)}, 'alphas is -0.5,0.5; expected increasing'),
    ({'alphas': ()}, 'alphas is ; expected increasing'),
    ({'alphas': (-2.0, 0.0, 0.5)}, 'alphas is -2.0; expected a finite number'),
    ({'dual_epochs': ()}, 'dual_epochs is ; expected increasing'),
    ({'dual_epochs': (10, 1)}, 'dual_epochs is 10,1; expected increasing'),
    ({'dual_epochs': (0, 1)}, 'dual_epochs is 0; expected an integer >= 1'),
    ({'tokens_per_epoch': 3}, 'tokens_per_epoch is 3; expected an integer'),
    ({'learning_rate': -1.0}, 'learning_rate is -1'),
    ({'input_distribution': 'cauchy'}, "input_distribution is 'cauchy'"),
  ],
)
def test_bad_flags_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **change)
