"""The modified layers: fast forms, training, statistics, verdicts, files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import equivalence_training as base
from experiments import harness, pretraining
from experiments import modifications as experiment
from experiments import modifications_augmented as augmented
from experiments import modifications_checks as checks
from experiments import modifications_claims as judging
from experiments import modifications_evaluation as evaluation
from experiments import modifications_layers as layers
from experiments import modifications_panels as panels
from experiments import modifications_report as report
from experiments import modifications_statistics as statistics
from experiments import modifications_training as training
from iclcl_jax import attention, features, modified

CLAIM_KEYS = [
  'id',
  'source',
  'claim',
  'statistic',
  'value',
  'interval',
  'verdict',
  'command',
]
TINY = experiment.Config(
  num_seeds=3,
  num_epochs=4,
  early_epochs=1,
  block_epochs=2,
  num_demonstrations=4,
  longer_num_demonstrations=6,
  tokens_per_epoch=10,
  num_features=8,
  num_test_prompts=2,
  rate_factors=(1.0, 3.0),
  learning_rate=0.01,
  strengths=(0.5,),
  negative_counts=(1, 2),
)
DIM, SIZE, NUM_FEATURES = pretraining.TOKEN_DIM, 5, 16
HIDDEN = augmented.HIDDEN_DIM


@pytest.fixture(scope='module')
def start():
  return training.init(TINY)


@pytest.fixture(scope='module')
def initial(start):
  """Layers of the first panel before training, and their directions."""
  return training.init_layers(TINY, start, panels.panels(TINY)[0])


@pytest.fixture(scope='module')
def tests(start):
  return jax.device_get(evaluation.draw_tests(TINY, start))


@pytest.fixture(scope='module')
def tiny(start, initial, tmp_path_factory):
  """One tiny run, whose first panel resumes; `(summary, folder)`."""
  folder = tmp_path_factory.mktemp('modifications')
  killed = dataclasses.replace(TINY, num_epochs=2)
  panel = panels.panels(TINY)[0]
  training.train(killed, start, panel, initial, folder)
  return experiment.run(TINY, folder), folder


def _draw(seed, *shape):
  generator = np.random.default_rng(seed)
  return jnp.asarray(generator.normal(size=shape) / shape[0] ** 0.5)


def _prompt(seed):
  generator = np.random.default_rng(seed)
  tokens = generator.uniform(-1, 1, (SIZE, DIM))
  tokens[-1, -1] = 0
  return layers.Prompt(
    jnp.asarray(tokens), jnp.asarray(generator.uniform(size=SIZE))
  )


def _project(params, prompt):
  tokens = prompt.tokens
  return tokens[-1] @ params.query, tokens @ params.key, tokens @ params.value


@functools.cache
def _compiled(fn):
  """Value and gradient of a layer's label, compiled once for each function."""

  def run(params, prompt, *arguments):
    def label(params):
      return fn(params, prompt, *arguments)[0]

    return jax.value_and_grad(label)(params)

  return harness.compile_quickly(run)


def _assert_same(fast, definition):
  """Two results of `_compiled` agree, and are not trivial."""
  (value, gradient), (right, right_gradient) = fast, definition
  assert abs(right) > 1e-3
  np.testing.assert_allclose(value, right, rtol=1e-12, atol=1e-12)
  for a, b in zip(gradient, right_gradient, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


DIRECTIONS = _draw(1, NUM_FEATURES, DIM) * NUM_FEATURES**0.5
PHI = features.PositiveFeatures(DIRECTIONS)
PLAIN = layers.PlainParams(
  _draw(2, DIM, DIM), _draw(3, DIM, DIM), _draw(4, DIM, 1)
)
REGULARISED = layers.RegularisedParams(*PLAIN, _draw(5, DIM, 1))
AUGMENTED = augmented.AugmentedParams(
  *PLAIN, _draw(6, DIM, HIDDEN), _draw(7, HIDDEN, DIM)
)
WIDE = layers.PlainParams(_draw(8, DIM, 20), _draw(9, DIM, 20), PLAIN.value)
WIDE_DIRECTIONS = _draw(10, NUM_FEATURES, 20) * NUM_FEATURES**0.5


def _regularised(params, prompt, settings):
  return layers.predict_regularised(params, settings, DIRECTIONS, prompt)


def _augmented(params, prompt, settings):
  return augmented.predict_augmented(params, settings, DIRECTIONS, prompt)


def _negative(params, prompt, settings):
  return layers.predict_negative(params, settings, DIRECTIONS, prompt)


def _wide(params, prompt, settings):
  return augmented.predict_wide(params, settings, WIDE_DIRECTIONS, prompt)


def _settings(settings):
  """Settings as arrays: one compilation serves all of a structure."""
  return jax.tree.map(jnp.float64, settings)


def _printed(params, prompt, strength):
  return modified.regularised_as_printed(strength=strength)(
    PHI, *_project(params, prompt)
  )


def _strict(params, prompt, strength):
  return modified.regularised(strength=strength)(PHI, *_project(params, prompt))


@pytest.mark.parametrize('strength', [0.5, -0.1])
@pytest.mark.parametrize('form', ['printed', 'strict'])
def test_regularised_layer_is_that_of_the_library(form, strength):
  definition = {'printed': _printed, 'strict': _strict}[form]
  settings = _settings(layers.Regularised(**{form: strength}))
  arguments = REGULARISED, _prompt(0)
  _assert_same(
    _compiled(_regularised)(*arguments, settings),
    _compiled(definition)(*arguments, jnp.array(strength)),
  )


def test_untied_residual_has_a_matrix_of_its_own():
  def definition(params, prompt, strength):
    path = strength * (prompt.tokens[-1] @ params.residual)
    return attention.kernel_attention(PHI, *_project(params, prompt)) + path

  arguments = REGULARISED, _prompt(1)
  _assert_same(
    _compiled(_regularised)(
      *arguments, _settings(layers.Regularised(untied=0.3))
    ),
    _compiled(definition)(*arguments, jnp.array(0.3)),
  )


def test_negative_alpha_is_a_residual_on_the_own_value():
  def residual(params, prompt, strength):
    return checks.plain_with_residual(params, PHI, prompt.tokens, strength)

  arguments = REGULARISED, _prompt(2)
  _assert_same(
    _compiled(_regularised)(
      *arguments, _settings(layers.Regularised(printed=-0.4))
    ),
    _compiled(residual)(*arguments, jnp.array(0.4)),
  )


def _same(x):
  return x


def _two_layer(params, tokens):
  return augmented.gelu(tokens @ params.hidden) @ params.out


# What becomes of keys and values, by layer.
AUGMENTATIONS = {
  panels.PLAIN: (lambda keys, params, tokens: keys, _same),
  panels.G1: (lambda keys, params, tokens: keys, augmented.gelu),
  panels.G2: (lambda keys, params, tokens: augmented.gelu(keys), _same),
  panels.BOTH: (
    lambda keys, params, tokens: augmented.gelu(keys),
    augmented.gelu,
  ),
  panels.HEAVY: (
    lambda keys, params, tokens: _two_layer(params, tokens),
    _same,
  ),
  panels.ADAPTER: (
    lambda keys, params, tokens: keys + _two_layer(params, tokens),
    _same,
  ),
}


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_augmented_layer_is_that_of_the_library(name):
  group = panels.panels(TINY)[1].groups[0]
  i = group.names.index(name)
  settings = _settings(jax.tree.map(lambda x: x[i], group.settings))
  augment_keys, augment_values = AUGMENTATIONS[name]

  def definition(params, prompt):
    query, keys, values = _project(params, prompt)
    keys = augment_keys(keys, params, prompt.tokens)
    return modified.augmented(augment_values=augment_values)(
      PHI, query, keys, values
    )

  assert group.predict is augmented.predict_augmented
  arguments = AUGMENTED, _prompt(3)
  _assert_same(
    _compiled(_augmented)(*arguments, settings),
    _compiled(definition)(*arguments),
  )


def test_gelu_of_keys_is_an_augmentation_of_keys():
  def definition(params, prompt):
    return modified.augmented(augment_keys=augmented.gelu)(
      PHI, *_project(params, prompt)
    )

  arguments = AUGMENTED, _prompt(4)
  settings = _settings(augmented.Augmented(linear=0.0, gelu=1.0))
  _assert_same(
    _compiled(_augmented)(*arguments, settings),
    _compiled(definition)(*arguments),
  )


@pytest.mark.parametrize('width', [14, 20])
def test_wide_layer_reads_its_width_alone(width):
  def definition(params, prompt):
    query, keys, values = _project(params, prompt)
    phi = features.PositiveFeatures(WIDE_DIRECTIONS[:, :width])
    return attention.kernel_attention(
      phi, query[:width], keys[:, :width], values
    )

  arguments = WIDE, _prompt(5)
  _assert_same(
    _compiled(_wide)(*arguments, _settings(augmented.Wide(float(width)))),
    _compiled(definition)(*arguments),
  )


@functools.cache
def _library_negatives(choice, count):
  """The library's layer as a function of prompt, strength and candidates."""

  def definition(params, prompt, strength, candidates):
    def by_noise(weights, candidates, count):
      return modified.lowest_scores(prompt.noise, candidates, count)

    select = {
      'random': by_noise,
      'highest': modified.highest_scores,
    }.get(choice, modified.lowest_scores)
    normalised = panels.CHOICES[choice].get('raise_others', 1.0)
    return modified.negative(
      num_negatives=count,
      strength=strength,
      select=select,
      renormalise=(
        modified.raise_others if normalised else modified.unnormalised
      ),
      candidates_fn=lambda position, positions: candidates[positions],
    )(PHI, *_project(params, prompt))

  return definition


@pytest.mark.parametrize('own', [0.0, 1.0])
@pytest.mark.parametrize(
  ('choice', 'count'), [*((name, 2) for name in panels.CHOICES), ('lowest', 1)]
)
def test_negative_layer_is_that_of_the_library(choice, count, own):
  settings = layers.Negative(
    num_negatives=float(count), strength=0.3, own=own
  )._replace(**panels.CHOICES[choice])
  candidates = jnp.arange(SIZE) < (SIZE if own else SIZE - 1)
  arguments = PLAIN, _prompt(6)
  _assert_same(
    _compiled(_negative)(*arguments, _settings(settings)),
    _compiled(_library_negatives(choice, count))(
      *arguments, jnp.array(0.3), candidates
    ),
  )


def test_own_token_is_chosen_only_if_it_may_be():
  # The own token is the one of lowest score here, or the setting is idle.
  values = [
    _compiled(_negative)(
      PLAIN, _prompt(seed), _settings(layers.Negative(1, 0.3, own=own))
    )[0]
    for seed in range(20)
    for own in (0.0, 1.0)
  ]
  differ = np.abs(np.diff(np.reshape(values, (20, 2)))) > 1e-6
  assert 0 < np.sum(differ) < 20


@pytest.mark.parametrize(
  ('predict', 'params', 'settings'),
  [
    (_regularised, REGULARISED, layers.Regularised()),
    (_augmented, AUGMENTED, augmented.Augmented()),
    (_negative, PLAIN, layers.Negative()),
  ],
)
def test_neutral_settings_are_the_plain_layer(predict, params, settings):
  def plain(params, prompt):
    layer = pretraining.LayerParams(*params[:3])
    return pretraining.predict(layer, PHI, prompt.tokens)

  prompt = _prompt(7)
  value, _ = _compiled(predict)(params, prompt, _settings(settings))
  expected = harness.compile_quickly(plain)(params, prompt)[0]
  np.testing.assert_allclose(value, expected, rtol=1e-14, atol=0)


def test_ties_go_to_the_lower_index():
  ranks = layers._ranks(jnp.array([2.0, 1.0, 1.0, jnp.inf, 0.0]))
  assert ranks.tolist() == [3, 1, 2, 4, 0]


def test_parameter_counts_are_those_that_get_gradients():
  for panel, params in zip(
    panels.panels(TINY)[:2], [REGULARISED, AUGMENTED], strict=True
  ):
    group = panel.groups[0]

    @harness.compile_quickly
    def gradients(settings, params=params, group=group):
      def one(settings):
        def value(params):
          return group.predict(params, settings, DIRECTIONS, _prompt(8))[0]

        return jax.grad(value)(params)

      return jax.vmap(one)(settings)

    settings = jax.tree.map(lambda x: jnp.float64(x), group.settings)
    trained = gradients(settings)
    for i, (name, size) in enumerate(
      zip(group.names, group.num_params, strict=True)
    ):
      moved = [np.asarray(x[i]) for x in jax.tree.leaves(trained)]
      # A leaf counts if any of it moves: single entries may be zero.
      counted = sum(x.size for x in moved if np.any(x != 0))
      assert counted == size, name


def test_wide_controls_match_the_augmented_layers():
  _, panel, _ = panels.panels(TINY)
  sizes = dict(zip(panel.names, panel.num_params, strict=True))
  for name, size in (
    (panels.HEAVY, panels.HEAVY_PARAMS),
    (panels.ADAPTER, panels.ADAPTER_PARAMS),
  ):
    assert sizes[name] == size == sizes[panels.wide_name(size)]


def test_every_panel_starts_with_the_plain_layer():
  for panel in panels.panels(TINY):
    assert panel.names[0] == panels.PLAIN
    assert len(set(panel.names)) == len(panel.names)
    named = set(panels.published(TINY)[panel.name])
    assert named < set(panel.names)
  for panel_name, name, control in panels.controls(TINY):
    names = next(p for p in panels.panels(TINY) if p.name == panel_name).names
    assert {name, control} <= set(names)


def test_training_is_that_of_pretraining_also_if_resumed(tiny, start, tmp_path):
  _, folder = tiny
  _, curves = base.pretrain(
    TINY, start.seeds, TINY.num_demonstrations, tmp_path
  )
  expected = curves[:, 0] / curves[:, 1]
  rows = [
    row
    for row in map(
      json.loads, (folder / 'metrics.jsonl').read_text().splitlines()
    )
    if row['layer'] == panels.PLAIN and row['learning_rate'] == 0.01
  ]
  for panel in ('regularised', 'augmented', 'negatives'):
    measured = [
      row['training_loss_over_zero_loss_by_seed']
      for row in rows
      if row['panel'] == panel
    ]
    np.testing.assert_allclose(measured, expected, rtol=1e-3)


def test_each_layer_trains_at_its_own_rate(start, initial):
  panel = panels.panels(TINY)[0]
  params, directions = initial
  steps = jnp.arange(1)
  prompts = base.draw_prompts(
    TINY, start.seeds.training, start.seeds.runs.task_matrix, steps, 4
  )
  inputs = training.with_noise(start.noise, 0, prompts), prompts.target
  seed = jax.tree.map(lambda x: x[1], (params, directions, inputs))
  (params, directions, (prompt, target)) = seed
  step = harness.compile_quickly(training._sgd(TINY, panel))
  first = jax.tree.map(lambda x: x[0], (prompt, target))
  (trained,), losses = step(params, directions, *first)
  group, count = panel.groups[0], len(TINY.rate_factors)
  assert losses.shape == (len(group.names) * count,)

  @harness.compile_quickly
  def gradient(settings, params):
    def loss(params):
      label = group.predict(params, settings, directions[0], first[0])
      return jnp.mean((label - first[1]) ** 2)

    return jax.value_and_grad(loss)(params)

  for i in range(len(group.names)):
    settings = jax.tree.map(lambda x, i=i: x[i], group.settings)
    for j, factor in enumerate(TINY.rate_factors):
      k = i * count + j
      before = jax.tree.map(lambda x, k=k: x[k], params[0])
      loss, slope = gradient(settings, before)
      np.testing.assert_allclose(losses[k], loss, rtol=1e-4)
      moved = trained.query[k] - before.query
      expected = -0.01 * factor * slope.query
      assert np.max(np.abs(expected)) > 1e-6
      np.testing.assert_allclose(moved, expected, rtol=0.02, atol=1e-6)


def test_variants_share_initial_layers_and_features(start, initial):
  runs, second = start.seeds.runs, panels.panels(TINY)[1]
  for params, directions in (
    initial,
    training.init_layers(TINY, start, second),
  ):
    for group, width in zip(params, directions, strict=True):
      dim = runs.phi.projection.shape[2]
      np.testing.assert_array_equal(width[..., :dim], runs.phi.projection)
      for i in range(group.query.shape[1]):
        np.testing.assert_array_equal(
          group.query[:, i, :, :dim], runs.params.query
        )
        np.testing.assert_array_equal(
          group.value[:, i, :, 0], runs.params.value[..., -1]
        )


def test_tests_measure_what_they_say(start, tests):
  prompt, target = tests['held_out']
  inputs, labels = prompt.tokens[..., :-1], prompt.tokens[..., -1]
  matrix = np.asarray(start.seeds.runs.task_matrix)
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


def test_evaluation_is_the_mean_squared_error(start, initial, tests):
  panel = panels.panels(TINY)[0]
  tests = {name: tests[name] for name in ('held_out', 'other_task')}
  results = evaluation.evaluate(TINY, panel, initial, tests)
  runs = start.seeds.runs
  layer, phi = jax.tree.map(lambda x: x[1], (runs.params, runs.phi))
  predict = harness.compile_quickly(pretraining.predict)
  for name, (prompt, target) in tests.items():
    errors = [
      predict(layer, phi, tokens)[0] - label[0]
      for tokens, label in zip(prompt.tokens[1], target[1], strict=True)
    ]
    expected = np.mean(np.square(errors))
    assert results[name].shape == (3, len(panel.names), 2)
    np.testing.assert_allclose(results[name][1, 0], expected, rtol=1e-4)


def test_rates_are_chosen_by_the_other_runs():
  losses = np.ones((3, 2, 2))
  losses[:, 0, 1] = [0.5, 0.5, 10.0]
  losses[:, 1, 0] = np.inf
  chosen = statistics.choose_rates(losses)
  # Runs 0 and 1 see the failure of run 2; run 2 sees two successes.
  assert chosen[:, 0].tolist() == [0, 0, 1]
  assert chosen[:, 1].tolist() == [1, 1, 1]


def test_ratio_is_a_t_interval_of_logs():
  generator = np.random.default_rng(0)
  a, b = np.exp(generator.normal(size=(2, 12)))
  for count in (1, 4):
    logs = np.log(a / b)
    low, high = scipy.stats.t.interval(
      1 - 0.05 / count, 11, logs.mean(), scipy.stats.sem(logs)
    )
    value = statistics.ratio(a, b, count)
    np.testing.assert_allclose(
      value, np.exp([logs.mean(), low, high]), rtol=1e-12
    )
  a[3] = np.inf
  assert statistics.verdict(statistics.ratio(a, b), 12) == 'diverged'


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
  value = statistics.Ratio((low * high) ** 0.5, low, high)
  assert statistics.verdict(value, 10) == label
  assert statistics.verdict(value, 9) == 'inconclusive'


def test_smoothing_averages_the_last_epochs():
  curve = np.random.default_rng(0).uniform(size=(9, 2))
  smooth = statistics.smooth(curve, 3)
  for i in range(9):
    np.testing.assert_allclose(
      smooth[i], curve[max(i - 2, 0) : i + 1].mean(axis=0)
    )


def _measured(config, values, level):
  """Data in which named layers have given ratios to the plain layer."""
  generator = np.random.default_rng(0)
  plain = level * np.exp(generator.normal(size=config.num_seeds))
  noise = np.exp(0.01 * generator.normal(size=config.num_seeds))
  data = {}
  for panel in panels.panels(config):
    losses = np.ones((config.num_seeds, len(panel.names))) * plain[:, None]
    fixed = {name: losses.copy() for name in statistics.MEASURES}
    for (name, measure), value in values.items():
      if name in panel.names:
        i = panel.names.index(name)
        fixed[measure][:, i] = value * plain * noise
    data[panel.name] = statistics.Measured(
      fixed,
      {name: losses.copy() for name in statistics.MEASURES},
      np.zeros(losses.shape, int),
      np.ones((3, *losses.shape, len(config.rate_factors))),
    )
  return data


def _claims(values, level=0.05):
  config = dataclasses.replace(TINY, num_seeds=10)
  indices = {
    panel.name: {name: i for i, name in enumerate(panel.names)}
    for panel in panels.panels(config)
  }
  rows = judging.claims(config, indices, _measured(config, values, level))
  return {row['id'].removeprefix('modifications-'): row for row in rows}


def test_claims_follow_the_intervals():
  best = panels.negative_name(panels.LOWEST, 2, 0.1)
  claims = _claims(
    {
      ('printed alpha=+0.5', 'held_out'): 0.7,
      ('printed alpha=-0.5', 'early'): 0.7,
      (panels.G1, 'held_out'): np.inf,
      (panels.G2, 'early'): 1.005,
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
    assert claims[name]['verdict'] == verdict, name
  assert claims['g1-(values)-is-poorer-fixed']['interval'] is None
  row = claims['negatives:-some-setting-converges-faster-fixed']
  assert row['statistic'].endswith(best)
  assert abs(row['value'] - 0.9) < 0.01
  for row in claims.values():
    assert set(row) == set(CLAIM_KEYS)


def test_layers_that_learn_nothing_decide_nothing():
  claims = _claims({('printed alpha=-0.5', 'early'): 0.7}, level=1.0)
  assert {row['verdict'] for row in claims.values()} == {'undecided'}


def test_too_few_runs_decide_nothing(tiny):
  summary, _ = tiny
  assert {claim['verdict'] for claim in summary['claims']} == {'undecided'}
  assert len({claim['id'] for claim in summary['claims']}) == len(
    summary['claims']
  )
  for claim in summary['claims']:
    assert set(claim) == set(CLAIM_KEYS)


def test_command_names_what_differs_from_the_defaults():
  assert judging.command(experiment.Config()) == (
    'python -m experiments.modifications --workdir=DIR'
  )
  config = experiment.Config(
    multi_task=True, input_distribution='normal', strengths=(0.25, 2.0)
  )
  assert judging.command(config) == (
    'python -m experiments.modifications --workdir=DIR '
    '--input_distribution=normal --multi_task=true --strengths=0.25,2'
  )


def test_files_and_figures(tiny):
  summary, folder = tiny
  written = json.loads((folder / 'summary.json').read_text())
  assert written == summary
  assert len(summary['figures']) == 3
  for figure in summary['figures']:
    assert set(figure) == {'file', 'caption'}
    path = folder / figure['file']
    assert path.stat().st_size > 5000
    assert path.with_suffix('.svg').exists()
    # Beside every figure: what it measures.
    assert summary['memorisation'] in figure['caption']
  assert 'not in-context learning' in summary['memorisation']
  assert summary['memorisation'] in summary['conclusion']
  assert summary['residual_identity_relative_error_float64'] < 1e-12
  names = [row['layer'] for row in summary['layers']]
  assert names.count(panels.PLAIN) == 3
  for row in summary['layers']:
    counts = row['tuned_learning_rates'].values()
    assert sum(counts) == TINY.num_seeds
    if row['layer'] == panels.PLAIN:
      assert row['fixed']['early']['value'] == 1
  text = report.text(summary)
  for name in names:
    assert name in text


def test_identity_check_notices_a_wrong_sign(
  start, initial, tests, monkeypatch
):
  all_panels = panels.panels(TINY)
  results = {'regularised': evaluation.Results(0, 0, {}, {}, initial[0])}
  arguments = TINY, start, all_panels, results, tests
  right = checks.plain_with_residual
  monkeypatch.setattr(
    checks, 'plain_with_residual', lambda *x: right(*x[:-1], -x[-1])
  )
  assert checks.residual_identity(*arguments) > 1e-3


def test_multi_task_says_so():
  config = dataclasses.replace(TINY, multi_task=True)
  entry = {'value': 1.0, 'interval': [0.9, 1.1]}
  plain = {
    rate: {'held_out': entry, 'other_task': entry} for rate in report.RATES
  }
  best = {'value': 0.5, 'interval': [0.4, 0.6]}
  layers = [
    {rate: {'held_out': {'relative_loss': x}} for rate in report.RATES}
    for x in (entry, best)
  ]
  text = report.memorisation(config, plain, layers)
  assert 'best of all layers is 0.5 [0.4, 0.6]' in text
  assert 'memorises' not in text
  assert '1 [0.9, 1.1] times' in text


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('num_seeds', 2),
    ('seed', -1),
    ('num_demonstrations', 0),
    ('longer_num_demonstrations', 0),
    ('input_scale', 0.0),
    ('input_distribution', 'cauchy'),
    ('num_epochs', 0),
    ('early_epochs', 0),
    ('early_epochs', 5),
    ('tokens_per_epoch', 4),
    ('learning_rate', -0.1),
    ('rate_factors', ()),
    ('rate_factors', (3.0,)),
    ('rate_factors', (1.0, 1.0)),
    ('rate_factors', (1.0, -1.0)),
    ('num_features', 0),
    ('num_test_prompts', 0),
    ('strengths', ()),
    ('strengths', (-0.5,)),
    ('negative_counts', (0,)),
    ('negative_counts', (4,)),
    ('negative_strengths', (0.1, 0.1)),
    ('block_epochs', 0),
  ],
)
def test_bad_setting_is_named(field, value):
  with pytest.raises(ValueError, match=f'{field} is'):
    dataclasses.replace(TINY, **{field: value})


def test_diverged_plain_layer_is_named(start, initial, tmp_path, monkeypatch):
  panel = panels.panels(TINY)[0]
  losses = np.ones((4, 3, len(panel.names), 2))
  losses[2, 1, 0, 1] = np.nan  # At another rate: no error, another choice.

  def train(*arguments):
    return initial[0], losses, np.ones((4, 3))

  monkeypatch.setattr(training, 'train', train)
  monkeypatch.setattr(training, 'init_layers', lambda *x: initial)
  monkeypatch.setattr(evaluation, 'evaluate', lambda *x: {})
  results = evaluation.measure(TINY, start, panel, {}, tmp_path)
  assert not np.all(np.isfinite(results.losses))
  losses[2, 1, 0, 0] = np.nan
  with pytest.raises(ValueError, match=r'learning_rate is 0.01.*diverged'):
    evaluation.measure(TINY, start, panel, {}, tmp_path)


def test_normal_inputs_have_their_own_rate():
  assert experiment.Config().learning_rate == 0.003
  config = experiment.Config(input_distribution='normal')
  assert config.learning_rate == 0.001
