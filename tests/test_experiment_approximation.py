"""`experiments.approximation`: the real thing, tiny."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import approximation, claims
from experiments import approximation_measure as measuring
from experiments import approximation_statistics as statistics
from iclcl_jax import attention
from tests import tolerances

TINY = approximation.Config(
  num_draws=48,
  num_seeds=2,
  num_features=(96, 192, 384),
  heatmap_features=(96, 384),
  reference_features=192,
  standard_deviations=(0.25, 1.0),
  second_num_demonstrations=7,
  num_epochs=1,
)


@pytest.fixture(scope='module')
def result(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('approximation')
  return approximation.run(TINY, str(workdir)), workdir


def _claims(summary, text):
  return [c for c in summary['claims'] if c['claim'].startswith(text)]


def test_kernel_error_at_small_norms_is_the_closed_form(result):
  summary, _ = result
  for name, ratios in summary['measured_over_closed_form'].items():
    quantities = set(ratios['sd 0.25'])
    assert ('kernel_relative_mse' in quantities) == ('simplex+' not in name)
    # The first-order forms of the attention error need independent rows.
    assert ({'attention_mse', 'output_mse'} <= quantities) == (
      'gaussian' in name
    )
    for estimate in ratios['sd 0.25'].values():
      value, low, high = np.log(estimate)
      sigma = (high - low) / (2 * 1.96)
      assert sigma < 0.08
      assert abs(value) < tolerances.SIGMAS * sigma


def test_estimated_weights_are_those_of_the_library():
  generator = np.random.default_rng(0)
  arrays = generator.normal(size=(3, 8, 16, 12)).astype(np.float32) / 2
  condition = measuring.Condition('sd 0.5', *arrays, num_units=8)
  directions = generator.normal(size=(8, 30, 12)).astype(np.float32)
  method = measuring.METHODS[-1]
  record = measuring.compare(method, jnp.asarray(directions), [condition])[0]

  @jax.jit
  def attend(directions, queries, keys, values):
    phi = method.feature_map(directions)
    return jax.vmap(
      lambda query: attention.kernel_attention(phi, query, keys, values)
    )(queries)

  outputs = np.asarray(attend(directions[3], *arrays[:, 3]))
  np.testing.assert_allclose(
    record.weights[3] @ condition.values[3], outputs, atol=1e-4
  )
  exact = condition.exact()[2][3]
  relative = np.linalg.norm(outputs - exact) / np.linalg.norm(exact)
  np.testing.assert_allclose(
    record.errors['output_relative'][3], relative, rtol=1e-3
  )


def test_errors_fall_with_features_and_like_one_over_r(result):
  summary, _ = result
  claims = _claims(summary, 'attention MSE falls with')
  assert [c['value'] for c in claims[:2]] == [-1, -1]
  slopes = summary['slope_of_log_error_per_log_direction']['positive gaussian']
  value, low, high = slopes['sd 0.25']['attention_mse']
  assert low <= value <= high
  assert value == pytest.approx(-1, abs=0.15)
  assert slopes['sd 0.25']['attention_mae'][0] == pytest.approx(-0.5, abs=0.1)
  assert slopes['sd 1']['attention_mse'][0] > -0.7


def test_maps_rank_as_their_variances(result):
  summary, _ = result
  rows = [
    row for row in summary['map_comparisons'] if row['condition'] == 'sd 0.25'
  ]
  ratio, at_equal_directions = (
    {row['map']: row[f'attention_mse_ratio_at_equal_{view}'][0] for row in rows}
    for view in ('features', 'directions')
  )
  for name, value in ratio.items():
    cost = 1 if name.startswith('positive') else 2
    assert value == pytest.approx(cost * at_equal_directions[name], rel=0.2)
  assert ratio['positive gaussian'] == 1
  assert ratio['positive simplex'] < 0.5 < ratio['positive orthogonal'] < 1
  assert (
    ratio['trigonometric orthogonal'] < ratio['hyperbolic orthogonal'] < 0.5
  )


def test_residual_is_rounding_and_the_error_is_not(result):
  summary, _ = result
  assert summary['algebra_residual_float64'] < 1e-12
  assert set(summary['approximation_error']) == {'sd 0.25', 'sd 1', 'trained'}
  for value, low, high in summary['approximation_error'].values():
    assert 1e-3 < low <= value <= high


def test_summary_has_what_decides_each_claim(result):
  summary, workdir = result
  assert json.loads((workdir / 'summary.json').read_text()) == summary
  assert {'claims', 'units', 'interval', 'num_draws', 'trained_layer'} <= set(
    summary
  )
  for claim in summary['claims']:
    assert {'claim', 'statistic', 'value', 'interval', 'verdict'} <= set(claim)
    assert claim['verdict'] in ('reproduced', 'not reproduced', 'undecided')
  assert set(summary['trained_layer']['held_out_loss_ratio']) == {
    'trained_directions',
    'fresh_directions',
    'exact_softmax',
  }


def test_figures_and_metrics_are_written(result):
  _, workdir = result
  names = {path.stem for path in (workdir / 'figures').glob('*.png')}
  assert names == {path.stem for path in (workdir / 'figures').glob('*.svg')}
  assert {'errors', 'heatmaps_attention_8_tokens', 'maps_compared'} <= names
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  maps = {row['map'] for row in rows}
  assert maps == {method.name for method in measuring.METHODS}
  hyperbolic = [r for r in rows if r['map'].startswith('hyperbolic')]
  assert all(r['num_features'] == 2 * r['num_directions'] for r in hyperbolic)


def test_workdir_of_another_config_is_refused(result):
  _, workdir = result
  with pytest.raises(ValueError, match='seed'):
    approximation.run(dataclasses.replace(TINY, seed=1), str(workdir))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_draws': 61}, 'num_draws is 61'),
    ({'num_features': (120, 240)}, 'three or more'),
    ({'num_features': (120, 241, 1200)}, 'even'),
    ({'heatmap_features': (120, 121)}, 'members of num_features'),
    ({'heatmap_features': (120,)}, 'heatmap_features is'),
    ({'num_demonstrations': 31}, 'second_num_demonstrations is 31'),
    ({'standard_deviations': ()}, 'standard_deviations is empty'),
    ({'standard_deviations': (float('nan'),)}, 'standard_deviations'),
    ({'learning_rate': -1.0}, 'learning_rate'),
    ({'num_epochs': 0}, 'num_epochs'),
  ],
)
def test_bad_settings_name_the_flag(changes, message):
  with pytest.raises(ValueError, match=message):
    approximation.Config(**changes)


def test_verdict_needs_the_whole_interval():
  def verdict(low, high, **limits):
    estimate = statistics.Estimate((low + high) / 2, low, high)
    return statistics.claim('', '', estimate, **limits)['verdict']

  assert verdict(0.95, 0.97, at_least=0.9) == 'reproduced'
  assert verdict(0.85, 0.97, at_least=0.9) == 'undecided'
  assert verdict(0.5, 0.6, at_least=0.9) == 'not reproduced'
  assert verdict(0.5, 0.6, at_most=0.4) == 'not reproduced'
  assert verdict(np.nan, np.nan, at_most=0.4) == 'not reproduced'


def test_bootstrap_covers_the_mean_and_pairs_its_resamples():
  draws = np.random.default_rng(1).normal(2.0, 1.0, size=400)
  value, low, high = statistics.mean(draws)
  assert value == pytest.approx(draws.mean())
  assert high - low == pytest.approx(2 * 1.96 * draws.std() / 20, rel=0.1)
  both = np.stack([draws, 3 * draws], axis=1)
  fit = statistics.slope([1, 3])
  np.testing.assert_allclose(statistics.bootstrap(fit, np.abs(both)), 1.0)


def test_claims_and_figures_are_ready_for_the_page(result):
  summary, workdir = result
  claims.check(summary['claims'])
  assert summary['conclusion'].endswith('.')
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn
  assert all(row['caption'].endswith('.') for row in summary['figures'])
