"""`experiments.approximation`: the real thing, tiny."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import approximation as experiment
from experiments.approximation import (
  closed_form,
  estimates,
  falling,
  inputs,
  maps,
)
from experiments.approximation.inputs import Condition
from experiments.lab import pretraining, statistics
from iclcl_jax import attention, features, projections
from tests import experiment_battery, tolerances

tiny = experiment_battery.tiny_run(experiment)
SMALL_NORMS = dataclasses.replace(
  experiment.Config.tiny(),
  num_draws=48,
  num_seeds=2,
  num_features=(96, 192, 384),
  heatmap_features=(96, 384),
  reference_features=192,
  standard_deviations=(0.25, 1.0),
)


@pytest.fixture(scope='module')
def small():
  """Estimates of the parts at small norms, by name of the part."""
  parts = {'closed_form': closed_form, 'falling': falling, 'maps': maps}
  return {
    name: part.summary(SMALL_NORMS, part.measure(SMALL_NORMS))
    for name, part in parts.items()
  }


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_tiny_run_has_what_decides(tiny):
  summary, folder = tiny
  names = {path.stem for path in (folder / 'figures').glob('*.png')}
  assert {'errors', 'heatmaps_attention_8_tokens', 'maps_compared'} <= names
  assert set(summary['trained_layer']['held_out_loss_ratio']) == {
    'trained_directions',
    'fresh_directions',
    'exact_softmax',
  }
  assert {claim['condition'] for claim in summary['claims']} == {
    'sd 1',
    'trained',
  }
  assert {'tables/papers_map.csv', 'tables/maps.csv'} <= set(summary['tables'])


def test_residual_is_rounding_and_the_error_is_not(tiny):
  summary, _ = tiny
  assert summary['algebra_residual_float64'] < 1e-12
  for error in summary['approximation_error'].values():
    assert 1e-3 < error['low'] <= error['mean'] <= error['high']


def test_kernel_error_at_small_norms_is_the_closed_form(small):
  ratios_of_maps = small['closed_form']['measured_over_closed_form']
  for name, ratios in ratios_of_maps.items():
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


def test_errors_fall_with_features_and_like_one_over_r(small):
  results = falling.measure(SMALL_NORMS)
  ranks = [
    claim.estimate.value
    for claim in falling.claims(SMALL_NORMS, results)
    if claim.claim.startswith('attention MSE falls with')
  ]
  assert ranks[:2] == [-1, -1]
  slopes = small['maps']['slope_of_log_error_per_log_direction']
  slopes = slopes['positive gaussian']
  value, low, high = slopes['sd 0.25']['attention_mse']
  assert low <= value <= high
  assert value == pytest.approx(-1, abs=0.15)
  assert slopes['sd 0.25']['attention_mae'].value == pytest.approx(
    -0.5, abs=0.1
  )
  assert slopes['sd 1']['attention_mse'].value > -0.7


def test_maps_rank_as_their_variances(small):
  rows = [
    row
    for row in small['maps']['map_comparisons']
    if row['condition'] == 'sd 0.25'
  ]
  ratio, at_equal_directions = (
    {
      row['map']: row[f'attention_mse_ratio_at_equal_{view}'].value
      for row in rows
    }
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


def test_metrics_have_all_maps_and_count_their_features():
  rows = list(maps.metrics(SMALL_NORMS, maps.measure(SMALL_NORMS)))
  assert {row['map'] for row in rows} == {m.name for m in estimates.METHODS}
  for row in rows:
    cost = 1 if row['map'].startswith('positive') else 2
    assert row['num_features'] == cost * row['num_directions']


def test_estimated_weights_are_those_of_the_library():
  generator = np.random.default_rng(0)
  arrays = generator.normal(size=(3, 8, 16, 12)).astype(np.float32) / 2
  condition = Condition('sd 0.5', *arrays, num_units=8)
  directions = generator.normal(size=(8, 30, 12)).astype(np.float32)
  method = estimates.METHODS[-1]
  (record,) = estimates.compare(method, jnp.asarray(directions), [condition])

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


def test_losses_of_trained_layers_are_told_by_their_kernel():
  seeds = pretraining.init_seeds(0, 2, num_features=8)
  own, fresh = (jax.tree.map(lambda x, i=i: x[i], seeds.runs) for i in (0, 1))
  prompts = pretraining.draw_prompts(
    seeds.testing[0], jnp.arange(4), lambda _: own.task_matrix, 3
  )
  losses = inputs._losses(own.params, own.phi, fresh.phi, prompts)
  zero = jnp.mean(prompts.target**2)
  for name, phi in (('trained', own.phi), ('fresh', fresh.phi)):
    expected = pretraining.evaluate(own.params, phi, prompts) / zero
    np.testing.assert_allclose(losses[f'{name}_directions'], expected)
  many = features.PositiveFeatures(
    projections.gaussian(
      jax.random.key(1), 20000, pretraining.TOKEN_DIM, dtype=jnp.float32
    )
  )
  small = jax.tree.map(lambda x: x / 4, own.params)
  losses = inputs._losses(small, many, fresh.phi, prompts)
  np.testing.assert_allclose(
    losses['exact_softmax'], losses['trained_directions'], rtol=0.02
  )


def test_entries_are_split_by_their_size():
  exact = np.array([[-20.0, *range(1, 11)]])
  error = np.arange(11.0)[None]
  largest, rest = estimates.split_by_size(exact, error)
  assert largest == [5.0]  # Two of eleven: -20 and 10.
  assert rest == [5.0]


def test_identity_sees_another_output(monkeypatch):
  equivalence = maps.equivalence
  right = equivalence.residuals

  def wrong(phi, query, keys, values, **options):
    found = right(phi, query, keys, values, **options)
    return found._replace(residual=found.residual + 1e-3)

  maps._residuals.clear_cache()
  monkeypatch.setattr(equivalence, 'residuals', wrong)
  found = maps.summary(SMALL_NORMS, maps.measure(SMALL_NORMS))
  maps._residuals.clear_cache()
  assert found['algebra_residual_float64'] >= 1e-3


def test_bootstrap_covers_the_mean_and_pairs_its_resamples():
  draws = np.random.default_rng(1).normal(2.0, 1.0, size=400)
  value, low, high = estimates.mean(draws)
  assert value == pytest.approx(draws.mean())
  assert high - low == pytest.approx(2 * 1.96 * draws.std() / 20, rel=0.1)
  both = np.stack([draws, 3 * draws], axis=1)
  fit = statistics.log_slope([1, 3])
  np.testing.assert_allclose(statistics.bootstrap(fit, np.abs(both)), 1.0)
