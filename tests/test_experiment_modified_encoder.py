"""`experiments.modified_encoder`: the real encoder, tiny, and a random one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from experiments import modified_encoder as experiment
from experiments.lab import texts
from iclcl_jax import kernels, pretrained, transformer
from tests import experiment_battery, families

NAMES, GROUPS = experiment.NAMES, [*experiment.GROUPS]
CONFIG = experiment.Config.tiny()
VARIANTS = experiment.VARIANTS.items()
# Adapters of keys, of values, of the network; strengths of both kinds.
TRAINED = {
  'ridges, learnt': (0, 0, 0, 1, 1),
  'value adapter': (0, 1, 0, 0, 0),
  'key adapter': (1, 0, 0, 0, 0),
  'wider network (control)': (0, 0, 1, 0, 0),
  'negatives, learnt': (0, 0, 0, 1, 0),
}

tiny = experiment_battery.tiny_run(experiment)


@pytest.fixture(scope='module', autouse=True)
def installed():
  try:
    for source in (experiment.WEIGHTS, texts.FILMS, texts.SPEECHES):
      texts.corpus_path(source)
  except ValueError as error:
    pytest.skip(str(error))


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)
  rows = [x for x in tiny[0]['encoder'] if x['measure'] == 'surprise']
  for row in rows:
    gaps = [row[f'{x} less plain'] for x in ('low', 'mean', 'high')]
    assert (gaps == [0, 0, 0]) == (row['variant'] == 'plain')


def test_a_run_that_stopped_ends_in_the_same_numbers(tiny, tmp_path, patch):
  # In the middle of the second kind.
  again, num_saved = experiment_battery.stop_and_resume(
    experiment, CONFIG, tmp_path, patch, stop_at=4
  )
  assert num_saved == 6
  for name in ('encoder', 'claims'):
    assert again[name] == tiny[0][name]
  one, other = (x / 'metrics.jsonl' for x in (tmp_path, tiny[1]))
  assert one.read_text() == other.read_text()


@functools.cache
def model_of():
  """A random encoder, its new numbers, a text, and which tokens are valid."""
  model = families.model_of('bert')
  params = experiment.init(model, jax.random.key(0))
  x = np.random.default_rng(0).normal(size=(7, 36))
  return model, params, jnp.asarray(x), jnp.arange(7) < 5


def log_odds(kind, variant, params):
  model, _, x, mask = model_of()
  variant = jax.tree.map(lambda x: jnp.asarray(x, float), variant)
  return experiment.log_odds(model.architecture, kind, variant, params, x, mask)


@pytest.mark.parametrize('kind', ['ridges', 'views', 'negatives'])
@pytest.mark.parametrize('ones', [{}, {'learnt'}, {'keys', 'values', 'units'}])
def test_neutral_variants_are_the_plain_encoder(kind, ones):
  model, params, x, mask = model_of()
  weight, bias = params['head']
  states = transformer.apply_blocks(
    model.architecture, model.blocks, x, mask=mask
  )
  expected = states[:5].mean(axis=0) @ weight + bias
  variant = experiment.Variant(**dict.fromkeys(ones, 1.0))
  found = log_odds(kind, variant, params)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(('name', 'own'), VARIANTS)
def test_gradients_reach_what_a_variant_trains_and_nothing_else(name, own):
  kind, variant = own
  _, params, _, _ = model_of()
  # Where the second matrix is zero, the first has no gradient yet.
  moved = jax.tree.map(lambda x: x + 0.01, params)
  gradient = jax.grad(functools.partial(log_odds, kind, variant))(moved)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
  norms = gradient['blocks'].value.weight, gradient['head'][0]
  assert min(np.abs(x).max() for x in norms) > 0
  rows = [*gradient['adapters'], *np.moveaxis(gradient['strengths'], -1, 0)]
  found = [
    all(np.abs(x).max() > 0 for x in jax.tree.leaves(row)) for row in rows
  ]
  assert tuple(found) == TRAINED.get(name, (0,) * 5)
  nothing = [all(np.all(x == 0) for x in jax.tree.leaves(row)) for row in rows]
  assert nothing == [not x for x in found]


def test_the_control_trains_as_many_numbers_as_an_adapter():
  _, params, _, _ = model_of()
  sizes = [sum(x.size for x in pair) for pair in params['adapters']]
  assert sizes[0] == sizes[1] == sizes[2] == 3 * 36 * 2 * 48


def _plain(queries, keys):
  weights = np.exp(queries @ keys.T / queries.shape[1] ** 0.5)
  return weights / weights.sum(axis=1, keepdims=True)


def _adapted(rows, pair):
  hidden = jax.nn.gelu(rows @ pair[0], approximate=False)
  return rows + np.asarray(hidden @ pair[1])


def _expected(name, queries, keys, values, pairs):
  """The published layers in NumPy: `A` plain attention, `V` values."""
  weights = _plain(queries, keys)
  own = np.diag(np.diag(weights))
  if 'printed' in name:
    return (weights - float(name.split()[-1]) * np.eye(len(keys))) @ values
  if name.startswith('ridge '):
    return (weights - float(name.split()[-1]) * own) @ values
  if name == 'negatives .1':
    others = weights + np.diag(np.full(len(keys), np.inf))
    mixing = np.zeros_like(weights)
    for row, place in enumerate(np.argsort(others)[:, : experiment.NEGATIVES]):
      mixing[row, place] = 0.1 / experiment.NEGATIVES
    return weights @ (values - mixing @ values)
  if name == 'key adapter':
    return _plain(queries, _adapted(keys, pairs[0])) @ values
  if name == 'value adapter':
    return weights @ _adapted(values, pairs[1])
  return weights @ values


@pytest.mark.parametrize(('name', 'own'), VARIANTS)
def test_heads_are_those_of_the_published_layers(name, own):
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(3, 6, 4))
  pairs = [
    [rng.normal(size=(4, 16)), rng.normal(size=(16, 4))] for _ in range(2)
  ]
  attend = experiment.attention(*own, jnp.zeros(2), *map(tuple, pairs))
  kernel = kernels.ExponentialKernel()
  found = attend.stream(kernel, *map(jnp.asarray, rows))
  np.testing.assert_allclose(found, _expected(name, *rows, pairs), rtol=1e-9)


def _results(scores, held_out=None):
  """What is found of `scores [V, R, S, T, n]` on texts of both labels."""
  right = np.broadcast_to(np.arange(scores.shape[-1]) % 2 == 0, scores.shape)
  held_out = scores if held_out is None else held_out
  strengths = np.zeros((*scores.shape[:-1], 3, 4, 2))
  return experiment.evaluate(scores, held_out, scores, right, right, strengths)


def test_held_out_texts_choose_and_test_texts_are_measured():
  rng = np.random.default_rng(0)
  held_out, test = rng.normal(size=(2, len(NAMES), 3, 5, 2, 40))
  right = np.arange(40) % 2 == 0
  held_out[1, 2, :, 0] = held_out[4, 0, :, 1] = 3 * np.where(right, 1, -1)
  held_out[2, 1, 4, 1] = 4 * np.where(right, 1, -1)  # One seed by itself.
  found = _results(test, held_out)
  group = GROUPS.index('regularised')
  assert np.all(found.chosen[group, :, :, 0] == [[1], [2]])
  assert found.chosen[group, :, :, 1].T.tolist() == [[4, 0]] * 4 + [[2, 1]]
  assert np.all(found.chosen[1, :, :, 0] == [[1], [2]])
  values = {kind: x[group, 3, 1] for kind, x in found.values.items()}
  scores = test[4, 0, 3, 1]
  said = 1 / (1 + np.exp(-scores))
  bins = [np.flatnonzero((10 * said).astype(int) == i) for i in range(10)]
  gaps = [
    len(x) * abs(said[x].mean() - right[x].mean()) for x in bins if x.size
  ]
  expected = {
    'accuracy': np.mean((scores > 0) == right),
    'area under the curve': sklearn.metrics.roc_auc_score(right, scores),
    'surprise': sklearn.metrics.log_loss(right, said),
    'calibration error': sum(gaps) / 40,
  }
  assert values == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
  ('change', 'verdict'),
  [(1, 'reproduced'), (0, 'not reproduced'), (-1, 'not reproduced')],
)
def test_claims_follow_the_sign_and_no_change_is_no_gain(change, verdict):
  rng = np.random.default_rng(0)
  right = np.where(np.arange(40) % 2 == 0, 1, -1)
  scores = np.tile(
    right + rng.normal(size=(5, 2, 40)), (len(NAMES), 1, 1, 1, 1)
  )
  scores = scores.reshape(len(NAMES), 1, 5, 2, 40)
  places = [NAMES.index(x) for x in ('printed ridge -.1', 'key adapter')]
  scores[places] += change * right
  found = {x.id: x.verdict for x in experiment.claims(CONFIG, _results(scores))}
  for kind in ('accuracy', 'surprise'):
    assert found[f'encoder-{kind}-keys-not-size'] == verdict
    assert found[f'encoder-{kind}-negative-sign'] == verdict
    assert found[f'encoder-{kind}-values-not-size'] == 'not reproduced'
  # Held-out texts do not choose what makes it worse.
  kept = verdict if change > 0 else 'not reproduced'
  assert found['encoder-augmented-accuracy'] == kept
  assert found['encoder-known-party'] == 'reproduced'


def test_texts_are_different_and_few_are_an_error():
  below, tokenizer = pretrained.load(
    texts.corpus_path(experiment.WEIGHTS).parent
  )
  states, mask, labels = experiment._read(CONFIG, below, tokenizer)
  assert states.shape == (2, CONFIG.num_texts, CONFIG.max_tokens, 384)
  pooled = np.sum(np.where(mask[..., None], states, 0), axis=2)
  for rows, kinds in zip(pooled, np.asarray(labels), strict=True):
    assert len(np.unique(rows.round(3), axis=0)) == CONFIG.num_texts
    assert 0.3 < kinds.mean() < 0.7
  config = dataclasses.replace(CONFIG, max_tokens=8)
  with pytest.raises(ValueError, match='num_texts is 40; expected at most'):
    experiment._read(config, below, tokenizer)
