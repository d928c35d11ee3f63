"""`experiments.momentum_language_model`: the real thing, tiny."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import momentum_language_model as experiment
from experiments.lab import texts
from tests import experiment_battery

tiny = experiment_battery.tiny_run(experiment)
CONFIG = experiment.Config.tiny()
TOKENS = np.random.default_rng(1).integers(12, size=(2, 9))


@pytest.fixture(scope='module', autouse=True)
def installed():
  try:
    texts.corpus_path()
  except ValueError as error:
    pytest.skip(str(error))


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)
  gaps = [row['mean less plain'] for row in tiny[0]['perplexity']]
  assert [x == 0 for x in gaps] == [True] * 5 + [False] * 30


def _by_loops(queries, keys, values, decay, slope, current):
  """Momentum attention with a recency bias, token by token in NumPy."""
  rows = []
  for t, query in enumerate(queries):
    ages = t - np.arange(t + 1)
    weights = np.exp(keys[: t + 1] @ query / len(query) ** 0.5 - slope * ages)
    past = sum(decay ** (t - i) * values[i] for i in range(t))
    read = weights / weights.sum() @ values[: t + 1]
    rows.append(read + past + current * values[t])
  return np.array(rows)


@pytest.mark.parametrize(
  'numbers', [(0, 0, 0), (0.5, 0, 0), (0.9, 0.25, 1), (0, 0.25, 0)]
)
def test_heads_are_those_of_loops_over_tokens(numbers):
  rows = np.random.default_rng(0).normal(size=(3, 7, 4))
  decay, slope, current = (jnp.asarray(x, float) for x in numbers)
  head = experiment.Variant(decay=decay, slope=slope, current=current)
  found = experiment.attend(*map(jnp.asarray, rows), head)
  np.testing.assert_allclose(found, _by_loops(*rows, *numbers), rtol=1e-12)


def test_decay_zero_is_the_attention_of_jax():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 4)))
  heads = experiment.heads_of(experiment.VARIANTS['plain'], jnp.ones(4))
  found = experiment.attend(*rows, jax.tree.map(lambda x: x[0], heads))
  with jax.numpy_dtype_promotion('standard'):  # JAX's own needs it.
    plain = jax.nn.dot_product_attention(*rows[:, :, None], is_causal=True)
  np.testing.assert_allclose(found, plain[:, 0], atol=1e-6)


@pytest.mark.parametrize('name', experiment.VARIANTS)
def test_only_what_is_learnt_has_gradients_and_no_token_sees_a_later(name):
  variant = experiment.VARIANTS[name]
  model = experiment.init(12, jax.random.key(1))
  model = jax.tree.map(lambda x: x.astype(float), model)
  gradient = jax.grad(experiment.surprise)(model, variant, TOKENS, 1)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
  rates = np.stack([block[-1] for block in gradient[1]])
  assert np.all((rates != 0) == ('learnt' in name))
  changed = np.where(np.arange(9) < 6, TOKENS[0], 11 - TOKENS[0])
  one = experiment.logits(model, variant, TOKENS[0])
  two = experiment.logits(model, variant, changed)
  np.testing.assert_array_equal(one[:6], two[:6])
  assert np.all(one[8] != two[8])


def test_a_run_that_stopped_ends_in_the_same_numbers(tiny, tmp_path, patch):
  # In the middle of the second training.
  again, num_saved = experiment_battery.stop_and_resume(
    experiment, CONFIG, tmp_path, patch, stop_at=3
  )
  assert num_saved == 4
  for name in ('perplexity', 'accuracy', 'claims', 'decays'):
    assert again[name] == tiny[0][name]


def test_no_film_is_trained_on_and_tested_on():
  reviews = texts.draw_reviews(2000, seed=0)
  train, test = experiment.split_films(reviews)
  assert min(len(train), len(test)) > 50
  assert len(train) + len(test) == len(reviews)
  assert not {x.film for x in train} & {x.film for x in test}


def test_text_is_of_known_characters():
  train, test = experiment.read_text(experiment.Config())
  assert 0 == min(train.min(), test.min())
  assert max(train.max(), test.max()) < experiment.CHARACTERS


def test_a_prompt_keeps_its_labels_and_another_has_others():
  tokens = experiment.draw_prompts(jax.random.key(0), 50, 30)
  pairs = np.reshape(tokens, (50, 31, 2)).tolist()
  tables = [{*map(tuple, x)} for x in pairs]
  assert all(len(dict(x)) == len(x) for x in tables)
  assert len(set.union(*tables)) == experiment.WORDS * experiment.LABELS


@pytest.mark.parametrize(
  ('gap', 'verdict'),
  [(-0.1, 'reproduced'), (0.0, 'undecided'), (0.1, 'not reproduced')],
)
def test_claims_follow_the_sign_and_ties_stay_undecided(gap, verdict):
  shape = len(experiment.VARIANTS), CONFIG.num_seeds
  seeds = 1e-3 * np.arange(-2.0, 3.0)[:, None]
  values = {'perplexity': np.full((*shape, 5), 5.0)}
  values['accuracy'] = np.full((*shape, 9), 0.5)
  values['perplexity'][1:] += gap + seeds
  values['accuracy'][1:] -= gap + seeds
  losses = {name: np.ones((*shape, CONFIG.num_steps)) for name in values}
  results = experiment.Results(values, losses, np.zeros(7), 20.0)
  found = {x.id: x.verdict for x in experiment.claims(CONFIG, results)}
  for name in ('fixed', 'strong', 'each-head', 'longer', 'recency'):
    assert found[f'momentum-perplexity-{name}'] == verdict
    assert found[f'momentum-accuracy-{name}'] == verdict
  assert found['momentum-task-known'] == 'not reproduced'


def test_claims_compare_whom_they_name():
  shape = len(experiment.VARIANTS), CONFIG.num_seeds
  noise = 1e-3 * np.random.default_rng(0).normal(size=(2, *shape, 1))
  values = {'perplexity': 5 + noise[0].repeat(5, 2)}
  values['accuracy'] = 0.5 + noise[1].repeat(9, 2)
  losses = {name: noise[0].repeat(CONFIG.num_steps, 2) for name in values}
  values['perplexity'][experiment.NAMES.index(experiment.LEARNT)] -= 1
  losses['perplexity'][experiment.NAMES.index(experiment.MOMENTUM)] -= 1
  results = experiment.Results(values, losses, np.zeros(7), 20.0)
  found = {x.id: x.verdict for x in experiment.claims(CONFIG, results)}
  for name, (_, one, _) in experiment.PAIRS.items():
    if one == experiment.LEARNT:
      assert found[f'momentum-perplexity-{name}'] == 'reproduced'
  assert found['momentum-perplexity-strong-not-recency'] != 'reproduced'
  assert found['momentum-training'] == 'reproduced'
  assert found['momentum-text-known'] == 'reproduced'
