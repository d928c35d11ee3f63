"""The modified layers: their training, statistics, verdicts and files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab, modifications as experiment
from experiments.lab import pretraining, statistics
from experiments.modifications import (
  augmented,
  comparison,
  negatives,
  overview,
  regularised,
  training,
)
from experiments.modifications.comparison import PLAIN
from iclcl_jax import attention, features, modified
from tests import experiment_battery
from tests.tolerances import IDENTITY

TINY = experiment.Config.tiny()
tiny = experiment_battery.tiny_run(experiment)
QUESTIONS = regularised, augmented, negatives
DIM, SIZE = training.DIM, 5
DIRECTIONS = np.random.default_rng(1).normal(size=(16, 20))
PHI = features.PositiveFeatures(jnp.asarray(DIRECTIONS[:, :DIM]))


def draw(key, *shape):
  generator = np.random.default_rng(key)
  return jnp.asarray(generator.normal(size=shape) / shape[0] ** 0.5)


def prompt_of(seed):
  generator = np.random.default_rng(seed)
  tokens = generator.uniform(-1, 1, (SIZE, DIM))
  tokens[-1, -1] = 0
  noise = jnp.asarray(generator.uniform(size=SIZE))
  return training.Prompt(jnp.asarray(tokens), noise)


PARAMS = {
  'query': draw(2, DIM, 20)[:, :DIM],
  'key': draw(3, DIM, 20)[:, :DIM],
  'value': draw(4, DIM, 1),
  'residual': draw(5, DIM, 1),
  'hidden': draw(6, DIM, augmented.HIDDEN_DIM),
  'out': draw(7, augmented.HIDDEN_DIM, DIM),
}


def label_of(layer, params, prompt, directions=DIRECTIONS[:, :DIM]):
  phi = training.kernel(jnp.asarray(directions))
  return jax.jit(lambda p, x: layer.predict(p, phi, x)[0])(params, prompt)


def by_definition(attend, prompt, keys=None, values=None):
  tokens = prompt.tokens
  query = tokens[-1] @ PARAMS['query']
  keys = tokens @ PARAMS['key'] if keys is None else keys
  values = tokens @ PARAMS['value'] if values is None else values
  return attend(PHI, query, keys, values)[0]


def plain_attention(prompt, **changes):
  return by_definition(attention.kernel_attention, prompt, **changes)


def test_tiny_run_is_complete(tiny):
  summary, folder = tiny
  experiment_battery.check_complete(experiment, summary, folder)
  assert {claim['verdict'] for claim in summary['claims']} == {'undecided'}
  for figure in summary['figures']:  # Beside every figure: what it measures.
    assert summary['memorisation'] in figure['caption']
  assert 'not in-context learning' in summary['memorisation']
  assert summary['memorisation'] in summary['conclusion']
  assert summary['residual_identity_relative_error_float64'] < 1e-12
  names = [row['layer'] for row in summary['layers']]
  assert names.count(PLAIN) == 3
  for row in summary['layers']:
    assert sum(row['tuned_learning_rates'].values()) == TINY.num_seeds
    if row['layer'] == PLAIN:
      assert row['fixed']['early']['value'] == 1


# The layers.


@pytest.mark.parametrize('question', QUESTIONS)
def test_a_panel_starts_with_the_plain_layer(question):
  layers = question.layers(TINY)
  assert next(iter(layers)) == PLAIN
  assert set(question.published(TINY)) < set(layers)
  for name, control in question.controls(TINY):
    assert {name, control} <= set(layers)
  prompt = prompt_of(7)
  np.testing.assert_allclose(
    label_of(layers[PLAIN], PARAMS, prompt), plain_attention(prompt), rtol=1e-12
  )


@pytest.mark.parametrize('question', QUESTIONS)
def test_parameter_counts_are_those_that_get_gradients(question):
  for name, layer in question.layers(TINY).items():
    is_wide = isinstance(layer, augmented.Wide)
    width = augmented.MAX_WIDTH if is_wide else DIM
    params = PARAMS | {'query': draw(2, DIM, width), 'key': draw(3, DIM, width)}
    phi = training.kernel(jnp.asarray(draw(9, 16, width)))

    def label(params, layer=layer, phi=phi):
      return layer.predict(params, phi, prompt_of(8))[0]

    slopes = lab.compile_quickly(jax.grad(label))(params)
    if is_wide:
      seen = slice(round(layer.width))
      for matrix in ('query', 'key'):
        assert not np.any(slopes[matrix][:, round(layer.width) :])
        slopes[matrix] = slopes[matrix][:, seen]
    # A leaf counts if any of it moves: single entries may be zero.
    counted = sum(x.size for x in slopes.values() if np.any(x != 0))
    assert counted == layer.num_params, name


def test_layers_beyond_the_library_are_their_definitions():
  prompt, gelu = prompt_of(3), augmented.gelu
  tokens = prompt.tokens
  linear = tokens @ PARAMS['key']
  two_layer = gelu(tokens @ PARAMS['hidden']) @ PARAMS['out']
  values = tokens @ PARAMS['value']
  layers = regularised.layers(TINY) | augmented.layers(TINY)
  path = (tokens[-1] @ PARAMS['residual'])[0]
  for name, expected in (
    (regularised.untied_name(0.5), plain_attention(prompt) + 0.5 * path),
    (augmented.G1, plain_attention(prompt, values=gelu(values))),
    (augmented.G2, plain_attention(prompt, keys=gelu(linear))),
    (
      augmented.BOTH,
      plain_attention(prompt, keys=gelu(linear), values=gelu(values)),
    ),
    (augmented.HEAVY, plain_attention(prompt, keys=two_layer)),
    (augmented.ADAPTER, plain_attention(prompt, keys=linear + two_layer)),
  ):
    found = label_of(layers[name], PARAMS, prompt)
    np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=name)


def test_a_wide_layer_reads_its_width_alone():
  prompt, width = prompt_of(5), 20
  rows, most = augmented.wide_name(augmented.HEAVY), augmented.MAX_WIDTH
  params = PARAMS | {'query': draw(2, DIM, most), 'key': draw(3, DIM, most)}
  directions = draw(9, 16, most)
  layer = dataclasses.replace(augmented.layers(TINY)[rows], width=float(width))
  tokens = prompt.tokens
  expected = attention.kernel_attention(
    features.PositiveFeatures(directions[:, :width]),
    tokens[-1] @ params['query'][:, :width],
    tokens @ params['key'][:, :width],
    tokens @ params['value'],
  )[0]
  found = label_of(layer, params, prompt, directions)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_negatives_are_chosen_as_their_names_say():
  """Row by row by sorting; the own token may be one if the config says so."""
  for seed, own in ((0, False), (1, True), (2, True)):
    config = dataclasses.replace(TINY, own_token_may_be_negative=own)
    prompt = prompt_of(seed)
    weights = np.asarray(
      attention.weights(
        PHI,
        prompt.tokens[-1] @ PARAMS['query'],
        prompt.tokens @ PARAMS['key'],
      )
    )
    values = np.asarray(prompt.tokens @ PARAMS['value'])[:, 0]
    size = SIZE if own else SIZE - 1
    orders = {
      negatives.LOWEST: weights,
      negatives.RANDOM: np.asarray(prompt.noise),
      negatives.HIGHEST: -weights,
      negatives.UNNORMALISED: weights,
    }
    for choice, criterion in orders.items():
      layer = negatives.layers(config)[negatives.name_of(choice, 3, 0.1)]
      chosen = np.zeros(SIZE, bool)
      chosen[np.argsort(criterion[:size])[:3]] = True
      is_raised = choice != negatives.UNNORMALISED
      change = np.where(chosen, -0.1 / 3, is_raised * 0.1 / (SIZE - 3))
      found = label_of(layer, PARAMS, prompt)
      changed = weights + change  # They cancel: judge by what was added.
      scale = np.abs(changed) @ np.abs(values)
      assert abs(found - changed @ values) <= IDENTITY['float64'] * scale


# Training and tests.


def test_training_is_that_of_pretraining(tiny):
  _, folder = tiny
  seeds = pretraining.init_seeds(0, 3, num_features=TINY.num_features)
  _, losses = pretraining.pretrain(
    seeds,
    pretraining.Prompts(num_demonstrations=TINY.num_demonstrations),
    num_epochs=TINY.num_epochs,
    learning_rate=TINY.rate,
    tokens_per_epoch=TINY.tokens_per_epoch,
  )
  rows = (folder / 'metrics.jsonl').read_text().splitlines()
  for panel in overview.PANELS:
    measured = [
      row['training_loss_over_zero_loss_by_seed']
      for row in map(json.loads, rows)
      if (row['panel'], row['layer']) == (panel, PLAIN)
      and row['learning_rate'] == TINY.rate
    ]
    expected = losses[:, 0] / losses[:, 1]
    np.testing.assert_allclose(measured, expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('question', QUESTIONS)
def test_a_layer_learns_in_a_panel_what_it_learns_alone(question):
  layers = question.layers(TINY)
  panel = training.measure_panel(TINY, 'together', layers)
  for name in (*question.published(TINY)[-2:], list(layers)[-1]):
    pair = {PLAIN: layers[PLAIN], name: layers[name]}
    alone = training.measure_panel(TINY, 'alone', pair)
    i = list(layers).index(name)
    for together, single in (
      (panel.curves[:, :, i], alone.curves[:, :, 1]),
      (panel.fixed['longer'][:, i], alone.fixed['longer'][:, 1]),
    ):
      np.testing.assert_allclose(together, single, rtol=1e-3, err_msg=name)
    for a, b in zip(
      panel.params[name].values(), alone.params[name].values(), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    # Every rate has moved its layer by another amount.
    moved = np.abs(np.diff(panel.params[name]['value'][0], axis=0))
    assert np.all(np.max(moved, axis=(1, 2)) > 0)


def test_variants_share_initial_layers_and_features():
  runs = training.start_of(TINY).seeds.runs
  for question in QUESTIONS:
    groups = training._groups(TINY, question.layers(TINY))
    start = training.start_of(TINY)
    params, directions = training._init(start, groups)
    for tree, random in zip(params, directions, strict=True):
      np.testing.assert_array_equal(random[..., :DIM], runs.phi.projection)
      for i in range(tree['query'].shape[1]):
        first = tree['query'][:, i, :, :DIM]
        np.testing.assert_array_equal(first, runs.params.query)
        values = runs.params.value[..., -1:]
        np.testing.assert_array_equal(tree['value'][:, i], values)


def test_tests_measure_what_they_say():
  tests = jax.device_get(training.tests_of(TINY))
  prompt, target = tests['held_out']
  inputs, labels = prompt.tokens[..., :-1], prompt.tokens[..., -1]
  matrix = np.asarray(training.start_of(TINY).seeds.runs.task_matrix)
  right = np.einsum('spni,sdi->spn', inputs, matrix)
  np.testing.assert_allclose(labels[..., :-1], right[..., :-1], atol=1e-5)
  np.testing.assert_allclose(target[..., 0], right[..., -1], atol=1e-5)
  scaled, scaled_target = tests['scaled']
  np.testing.assert_allclose(scaled.tokens, 1.5 * prompt.tokens, rtol=1e-6)
  np.testing.assert_allclose(scaled_target, 1.5 * target, rtol=1e-6)
  assert tests['longer'][0].tokens.shape == (3, 2, 7, DIM)
  assert tests['longer'][0].noise.shape == (3, 2, 7)
  other = tests['other_task'][0].tokens
  wrong = np.einsum('spni,sdi->spn', other[..., :-1], matrix)
  assert np.max(np.abs(other[..., :-1, -1] - wrong[..., :-1])) > 0.1
  assert len(np.unique(prompt.noise)) == prompt.noise.size


def test_losses_of_tests_are_mean_squared_errors():
  seeds = training.start_of(TINY).seeds
  groups = training._groups(TINY, {PLAIN: regularised.layers(TINY)[PLAIN]})
  params, directions = training._init(training.start_of(TINY), groups)
  tests = training.tests_of(TINY)
  found = training._test(groups, params, directions, tests)
  layer, phi = jax.tree.map(lambda x: x[1], (seeds.runs.params, seeds.runs.phi))
  for name, (prompt, target) in tests.items():
    errors = [
      pretraining.predict(layer, phi, tokens)[0] - label[0]
      for tokens, label in zip(prompt.tokens[1], target[1], strict=True)
    ]
    expected = np.mean(np.square(errors))
    np.testing.assert_allclose(found[name][1, 0], expected, rtol=1e-4)


def test_a_diverged_plain_layer_is_named():
  config = dataclasses.replace(TINY, learning_rate=1e30, rate_factors=(1.0,))
  with pytest.raises(ValueError, match=r'learning_rate is 1e\+30.*diverged'):
    training.measure_panel(config, 'x', {PLAIN: negatives.layers(TINY)[PLAIN]})


def test_the_identity_check_notices_a_wrong_sign(monkeypatch):
  start, name = training.start_of(TINY), regularised.name_of('printed', -0.5)
  layer = regularised.layers(TINY)[name]
  groups = training._groups(TINY, {name: layer})
  params, directions = training._init(start, groups)
  panel = comparison.Results(
    *[None] * 5, {name: params[0]}, {name: directions[0]}
  )
  assert regularised.residual_identity(TINY, panel) < 1e-12
  monkeypatch.setattr(
    modified,
    'regularised_as_printed',
    lambda strength: modified.Regularised(residual=-strength),
  )
  assert regularised.residual_identity(TINY, panel) > 1e-3


# Statistics and verdicts.


def test_rates_are_chosen_by_the_other_runs():
  losses = np.ones((3, 2, 2))
  losses[:, 0, 1] = [0.5, 0.5, 10.0]
  losses[:, 1, 0] = np.inf
  chosen = training.choose_rates(losses)
  # Runs 0 and 1 see the failure of run 2; run 2 sees two successes.
  assert chosen[:, 0].tolist() == [0, 0, 1]
  assert chosen[:, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
  ('low', 'high', 'label'),
  [
    (0.5, 0.99, 'better'),
    (0.91, 0.99, 'slightly better'),
    (1.01, 1.09, 'slightly poorer'),
    (1.01, 3.0, 'poorer'),
    (0.91, 1.09, 'comparable'),
    (0.89, 1.05, 'inconclusive'),
    (0.95, 1.11, 'inconclusive'),
  ],
)
def test_verdicts(low, high, label):
  value = lab.Estimate((low * high) ** 0.5, low, high)
  assert comparison.verdict(value, 10) == label
  assert comparison.verdict(value, 9) == 'inconclusive'
  diverged = statistics.paired_ratio([1.0, np.inf], [1.0, 1.0])
  assert comparison.verdict(diverged, 10) == 'diverged'


def test_smoothing_averages_the_last_epochs():
  curve = np.random.default_rng(0).uniform(size=(9, 2))
  smooth = comparison.smooth(curve, 3)
  for i in range(9):
    np.testing.assert_allclose(
      smooth[i], curve[max(i - 2, 0) : i + 1].mean(axis=0)
    )


def claims_of(values, level=0.05):
  """Claims if named layers have given ratios to the plain layer."""
  config = dataclasses.replace(TINY, num_seeds=10)
  generator, claims = np.random.default_rng(0), []
  plain = level * np.exp(generator.normal(size=10))
  noise = np.exp(0.01 * generator.normal(size=10))
  for question in QUESTIONS:
    layers = question.layers(config)
    fixed, tuned = (
      {
        measure: np.repeat(plain[:, None], len(layers), axis=1)
        for measure in overview.MEASURES
      }
      for _ in range(2)
    )
    for (name, measure), value in values.items():
      if name in layers:
        fixed[measure][:, list(layers).index(name)] = value * plain * noise
    results = comparison.Results(layers, fixed, tuned, *[None] * 4)
    if question is regularised:
      results = regularised.Measured(results, 0.0)
    claims += question.claims(config, results)
  return {row.id.removeprefix('modifications-'): row for row in claims}


def test_claims_follow_the_intervals():
  best = negatives.name_of(negatives.LOWEST, 3, 0.1)
  claims = claims_of(
    {
      ('printed alpha=+0.5', 'held_out'): 0.7,
      ('printed alpha=-0.5', 'early'): 0.7,
      (augmented.G1, 'held_out'): np.inf,
      (augmented.G2, 'early'): 1.005,
      (best, 'early'): 0.9,
    }
  )
  expected = {
    'printed-alpha+0.5-converges-to-a-poorer-result-fixed': 'not reproduced',
    'printed-alpha-0.5-converges-faster-fixed': 'reproduced',
    'printed-alpha-0.5-ends-in-a-comparable-result-fixed': 'reproduced',
    'printed-alpha-0.5-ends-in-a-comparable-result-tuned': 'reproduced',
    'g1-(values)-is-poorer-fixed': 'reproduced',
    'heavy-g2-starts-slower-fixed': 'not reproduced',
    'negatives:-some-setting-converges-faster-fixed': 'reproduced',
    'negatives:-some-setting-converges-faster-tuned': 'not reproduced',
  }
  for name, verdict in expected.items():
    assert claims[name].verdict == verdict, name
  row = claims['negatives:-some-setting-converges-faster-fixed']
  assert row.statistic.endswith(best)
  assert abs(row.estimate.value - 0.9) < 0.01


def test_layers_that_learn_nothing_decide_nothing():
  claims = claims_of({('printed alpha=-0.5', 'early'): 0.7}, level=1.0)
  assert {row.verdict for row in claims.values()} == {'undecided'}


def test_normal_inputs_have_their_own_rate():
  assert experiment.Config().rate == 0.003
  assert experiment.Config(input_distribution='normal').rate == 0.001


def test_fresh_matrices_are_told_from_memorisation():
  config = dataclasses.replace(TINY, multi_task=True)
  losses = {'held_out': np.full((3, 2), 1.0), 'other_task': np.full((3, 2), 1)}
  losses['held_out'][:, 1] = 0.5
  layers = dict(list(negatives.layers(TINY).items())[:2])
  results = comparison.Results(layers, losses, losses, *[None] * 4)
  text = overview.memorisation(config, {'regularised': results})
  assert 'matrix B of its own' in text
  assert 'memorises' not in text
  assert 'best of all layers: 0.5' in text
