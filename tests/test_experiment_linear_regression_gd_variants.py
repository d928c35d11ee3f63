"""Stacks, sine waves and separate tokens: the real thing, tiny."""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import claims
from experiments import linear_regression_gd as experiment
from experiments import linear_regression_gd_data as data
from experiments import linear_regression_gd_deep as deep
from experiments import linear_regression_gd_measure as measure
from experiments import linear_regression_gd_models as models
from experiments import linear_regression_gd_step_claims as step_claims
from experiments import linear_regression_gd_steps as steps
from experiments import linear_regression_gd_variant_claims as variant_claims
from experiments import linear_regression_gd_variant_figures as figures
from experiments import linear_regression_gd_variants as variants
from iclcl_jax.accounts import linear_regression_gd as account

TINY = experiment.Config(
  d_x=2,
  num_demonstrations=4,
  num_steps_of_gd=(2,),
  num_test_tasks=400,
  deep_steps=300,
  deep_batch_size=32,
  sine_steps=60,
  sine_batch_size=16,
  sine_width=6,
  alternating_steps=20,
  alternating_batch_size=8,
  alternating_size=2,
)
# Step sizes and contractions near the best of two steps.
FACTORS = {
  'GD': ([8.3, 8.3], [0.0, 0.0]),
  'GD++': ([17.0, 17.0], [0.58, 0.58]),
  steps.UNTIED: ([24.0, 15.0], [0.52, 0.52]),
}


@pytest.fixture(scope='module')
def tiny():
  rows = [
    {
      'method': name,
      'num_steps': 2,
      'learning_rates': np.asarray(rates),
      'contractions': np.asarray(contractions),
    }
    for name, (rates, contractions) in FACTORS.items()
  ]
  # As users run it; optax promotes dtypes and ranks.
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    tasks = measure.test_tasks(TINY)
    single = models.Stack(account.linear_weights, 1, 1, 1, init_scale=3.0)
    layers = jax.vmap(lambda k: models.init_stack(k, single, TINY.d_x + 1))(
      jax.random.split(jax.random.key(0), TINY.num_seeds)
    )
    return {
      'stacks': deep.measure_all(TINY, tasks, rows, layers),
      'sine': variants.sine(TINY),
      'alternating': variants.alternating(TINY),
      'residuals': measure.construction_residuals(TINY),
    }


def test_constructions_are_exact(tiny):
  assert set(tiny['residuals']) == {'layers', 'copy', 'kernel'}
  assert all(0 < x < 1e-12 for x in tiny['residuals'].values())


def test_stacks_start_at_zero_and_learn(tiny):
  looped, untied = tiny['stacks']
  assert (looped['kind'], untied['kind']) == ('looped', 'untied')
  assert untied['loss_peer'] < looped['loss_peer'] < looped['loss_gd']
  for row in (looped, untied):
    assert row['loss'].shape == (TINY.num_seeds, 11)
    assert np.ptp(row['loss'][:, 0]) < 1e-3
    assert np.median(row['loss'][:, -1]) < 0.8 * row['loss'][0, 0]
    assert 0 < row['model_cos_of_peers'] < 1


def test_the_way_from_gd_to_its_peer():
  row = {'loss_gd': 0.4, 'loss_peer': 0.2, 'loss': np.array([[1, 0.25]])}
  assert deep.reached(row) == pytest.approx([0.75])


def test_networks_learn_sine_waves(tiny):
  row = tiny['sine']
  for name in ('attention', 'descent'):
    losses = row[f'loss_{name}']
    assert np.all(losses[:, -1] < losses[:, 0])
  assert row['along_descent'].shape == (TINY.num_seeds, len(row['grid']))


def test_separate_tokens_read_each_other(tiny):
  row = tiny['alternating']
  np.testing.assert_allclose(row['copied'].sum(axis=2), 1, atol=1e-5)
  assert row['loss_gd'] < row['loss_zero']
  assert abs(row['loss_gd'] - row['loss_closed_form']) < 0.03


def test_claims_and_figures_speak_of_all_parts(tiny):
  rows = step_claims.of_stacks(tiny['stacks'])
  rows += variant_claims.of_identities(tiny['residuals'])
  rows += variant_claims.of_parts(tiny)
  claims.check(rows)
  assert len(rows) == 6 + 2 + 5
  assert variant_claims.of_parts({}) == []
  assert 'sine waves' in variant_claims.text(tiny)
  assert set(variant_claims.summary(tiny)) > {'sine', 'alternating'}
  for name in ('stacks', 'sine', 'alternating'):
    figure = getattr(figures, name)(tiny[name])
    assert len(figure.axes) > 1
    plt.close(figure)


@pytest.mark.parametrize(('lane', 'tied'), [(-1, False), (-2, True)])
def test_phase_and_amplitude_of_sine_waves(lane, tied):
  source = data.sine_source(10, lane)
  rng = np.random.default_rng(0)
  uniform = jnp.asarray(rng.uniform(-1, 1, (2000, 13)), jnp.float32)
  # Two inputs at which a wave shows its sine and its cosine part.
  uniform = uniform.at[:, 0].set(0).at[:, 1].set(np.pi / 10)
  with jax.numpy_rank_promotion('allow'):
    tasks = source.make(uniform)
  sine, cosine = np.asarray(tasks.tokens[:, :2, 1], np.float64).T
  amplitude, phase = np.hypot(sine, cosine), np.arctan2(sine, cosine)
  assert np.all((amplitude > 0.1 - 1e-5) & (amplitude < 0.5 + 1e-5))
  assert np.all((phase > -1e-5) & (phase < np.pi + 1e-5))
  correlation = np.corrcoef(amplitude, phase)[0, 1]
  assert (correlation > 0.999) == tied
  assert tied or abs(correlation) < 5 / 2000**0.5
  assert not tasks.tokens[:, -1, 1].any()


def test_a_stack_is_the_layers_of_the_account():
  """Both the short way and that with bounded activations."""
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
  for num_layers in (2, 4):
    stack = models.Stack(account.linear_weights, 1, num_layers, 1, 5.0)
    layer = models.init_stack(jax.random.key(0), stack, 3)
    one = jax.tree.map(lambda w: w[0], layer)
    layers = account.repeat(one, num_layers)
    expected = jax.jit(account.predict)(layers, rows)
    answer = jax.jit(models.stack_answer, static_argnums=0)(stack, layer, rows)
    np.testing.assert_allclose(answer, expected, rtol=1e-5)


def test_a_step_on_the_last_layer_is_gradient_descent():
  model = models.descent_on_network(4)
  with jax.numpy_rank_promotion('allow'):
    network, head, log_rate = model.init(jax.random.key(0))
    head = 10 * head
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32).at[-1, 1].set(0)
    answer = jax.jit(model.answer)((network, head, log_rate), rows)
    moved = models._network(network, rows[:, :-1])
  rates = jnp.exp(log_rate)[None]
  weights = account.descend(moved[:-1], rows[:-1, 1:], rates, initial=head)
  np.testing.assert_allclose(answer, weights @ moved[-1], rtol=1e-4)


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match='alternating_size is 0'):
    dataclasses.replace(TINY, alternating_size=0)
  with pytest.raises(ValueError, match='factors of descent are given'):
    models.DESCENT.init(jax.random.key(0))
