"""`experiments.demonstration_deletion`: a small random model, real reviews."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import claims, review_text
from experiments import demonstration_deletion as experiment
from experiments import demonstration_deletion_data as data
from experiments import demonstration_deletion_report as report
from iclcl_jax import pretrained
from tests import pretrained_files as files

TINY = experiment.Config(
  num_prompts=6, num_demonstrations=3, max_tokens=110, block_size=3
)


@pytest.fixture(scope='module', autouse=True)
def corpus():
  try:
    return review_text.corpus_path()
  except ValueError as error:
    pytest.skip(str(error))


def write_model(path, added):
  """A random model whose tokenizer has some words more."""
  size = len(files.TOKENS) + len(added)
  rng = np.random.default_rng(0)
  arrays = files.tensors()
  for name in ('model.embed_tokens.weight', 'lm_head.weight'):
    arrays[name] = rng.normal(size=(size, files.D_MODEL)).astype(np.float32)
  changes = {'vocab_size': size, 'max_position_embeddings': 1024}
  files.write_directory(path, arrays, files.CONFIG | changes)
  backend = files.backend()
  backend.add_tokens(added)
  backend.save(str(path / 'tokenizer.json'))
  return str(path)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('model') / 'small'
  return dataclasses.replace(
    TINY, model_path=write_model(path, list(data.LABELS))
  )


@pytest.fixture(scope='module')
def tiny(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('out')
  return experiment.run(config, workdir), workdir


@pytest.fixture(scope='module')
def loaded(config):
  return pretrained.load(config.model_path)


@pytest.fixture(scope='module')
def prompts(config, loaded):
  return data.make(config, loaded.tokenizer)


def rows_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_summary_has_the_numbers_that_decide(tiny):
  summary, workdir = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  claims.check(summary['claims'])
  assert 0 < summary['identity_gap_float32'] < 1e-5
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['deletion-identity'] == 'reproduced'
  assert set(summary['mean_rank_correlation']) == {'signed', 'size'}
  assert len(rows_of(workdir)) == 6 * 3
  assert '6 prompts' in summary['conclusion']


def test_figures_are_those_of_the_summary(tiny):
  summary, workdir = tiny
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn


def test_effects_are_those_of_prompts_without_the_demonstration(
  tiny, loaded, prompts
):
  """Text after text, without padding and without the code under test."""
  _, workdir = tiny
  ids = [loaded.tokenizer.single_id(label) for label in data.LABELS]
  scores = jax.jit(pretrained.next_token_logits)

  def difference(tokens):
    size = prompts.tokens.shape[1]
    padded = np.concatenate([np.zeros(size - len(tokens), np.int32), tokens])
    mask = np.arange(size) >= size - len(tokens)
    logits = scores(loaded.model, jnp.asarray(padded), mask=mask)
    return float(logits[ids[0]] - logits[ids[1]])

  number, place = 2, 1
  row = rows_of(workdir)[3 * number + place]
  assert (row['prompt'], row['demonstration']) == (number, place)
  tokens = prompts.tokens[number][prompts.mask[number]]
  kept = prompts.segment_ids[number][prompts.mask[number]] != place
  whole, shortened = difference(tokens), difference(tokens[kept])
  np.testing.assert_allclose(row['logit_difference'], whole, atol=1e-4)
  np.testing.assert_allclose(row['removed'], whole - shortened, atol=1e-4)
  assert abs(row['removed']) > 1e-3
  assert abs(row['hidden'] - row['removed']) > 1e-4


def test_a_run_that_was_stopped_ends_in_the_same_numbers(tiny, config):
  summary, workdir = tiny
  (workdir / 'summary.json').unlink()
  again = experiment.run(config, workdir)
  assert again['claims'] == summary['claims']


def test_prompts_are_balanced_and_shortened_ones_are_their_texts(
  prompts, loaded
):
  assert prompts.positive.sum() == prompts.positive.size // 2
  assert prompts.query_positive.sum() == 4
  decode, end = loaded.tokenizer.decode, data.END
  queries = set()
  for number, row in enumerate(prompts.tokens):
    text = decode(row[prompts.mask[number]])
    head, *parts, query = text.split(end)
    queries.update([*parts, query])
    assert head + end == data.INSTRUCTION
    assert query.startswith('Review: ')
    assert query.endswith('Sentiment:')
    for place, positive in enumerate(prompts.positive[number]):
      assert parts[place].endswith(data.LABELS[not positive])
      short = prompts.shortened[number, place]
      kept = [part for n, part in enumerate(parts) if n != place]
      expected = end.join([head, *kept, query])
      assert decode(short[prompts.shortened_mask[number, place]]) == expected
      length = len(loaded.tokenizer.encode(parts[place] + end))
      assert prompts.lengths[number, place] == length
  assert len(queries) == 6 * 4  # No review occurs twice.


def test_rank_correlations_are_those_of_scipy():
  rng = np.random.default_rng(4)
  a, b = rng.normal(size=(2, 20, 5)).round(0)
  a[0] = 1.0
  for ours, theirs in (
    (report.spearman, scipy.stats.spearmanr),
    (report.kendall, scipy.stats.kendalltau),
  ):
    found = ours(a, b)
    expected = [theirs(x, y).statistic for x, y in zip(a[1:], b[1:])]  # noqa: B905
    np.testing.assert_allclose(found[1:], expected, atol=1e-12)
    assert found[0] == 0


def made_up(prompts, slope, noise):
  """Results in which the contribution says `slope` times the effect."""
  rng = np.random.default_rng(8)
  shape = prompts.positive.shape
  removed = rng.normal(size=shape)
  told = slope * removed + noise * rng.normal(size=shape)
  return {
    'difference': rng.normal(size=shape[0]),
    'identity_gap': np.full(shape[0], 1e-7),
    'contribution': told,
    'removal_effect': told,
    'attention': rng.random(shape),
    'loss_drop': rng.random(shape),
    'removed': removed,
    'hidden': removed,
  }


@pytest.mark.parametrize(
  ('slope', 'verdict'), [(1, 'reproduced'), (-1, 'not reproduced')]
)
def test_verdicts_follow_the_numbers(slope, verdict):
  many = data.Prompts(
    *[np.zeros(0)] * 5,
    np.random.default_rng(1).random((60, 4)) < 0.5,
    np.zeros(60, bool),
    np.ones((60, 4), int),
  )
  config = experiment.Config(num_prompts=60)
  summary, _ = report.summarise(config, many, made_up(many, slope, 0.3))
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['deletion-attribution-signed'] == verdict
  assert verdicts['deletion-attribution-signed-better'] == verdict
  assert verdicts['deletion-removal-size'] == 'reproduced'
  assert verdicts['deletion-hidden'] == 'reproduced'
  means = summary['mean_rank_correlation']['signed']
  assert abs(means['random']['spearman']['mean']) < 0.3


def test_a_baseline_that_points_the_wrong_way_is_turned():
  """Effects away from the label: the label, reversed, beats noise."""
  rng = np.random.default_rng(2)
  positive = rng.permuted(np.arange(4)[None] % 2 == np.zeros((60, 1)), axis=1)
  many = data.Prompts(
    *[np.zeros(0)] * 5, positive, np.zeros(60, bool), np.ones((60, 4), int)
  )
  results = made_up(many, 0, 1.0)
  results['removed'] -= 3 * np.where(positive, 1.0, -1.0)
  config = experiment.Config(num_prompts=60)
  summary, _ = report.summarise(config, many, results)
  assert -3.5 < summary['effect_towards_own_label']['mean'] < -2.5
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['deletion-attribution-signed-better'] == 'not reproduced'
  assert 'that of label' in summary['conclusion']


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('seed', -1, 'seed is -1'),
    ('num_prompts', 4, 'num_prompts is 4; expected an integer >= 5'),
    ('num_demonstrations', 2, 'num_demonstrations is 2'),
    ('num_demonstrations', 17, 'num_demonstrations is 17; expected at most 16'),
    ('max_tokens', 15, 'max_tokens is 15'),
    ('block_size', 0, 'block_size is 0'),
  ],
)
def test_bad_settings_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **{field: value})


def test_too_few_short_reviews_are_named(config, loaded):
  few = dataclasses.replace(config, max_tokens=16)
  with pytest.raises(ValueError, match='at most 16 tokens'):
    data.make(few, loaded.tokenizer)


def test_a_label_of_several_tokens_is_named(tmp_path):
  path = write_model(tmp_path / 'small', [' Positive'])
  with pytest.raises(ValueError, match="' Negative' is 9 tokens"):
    experiment.run(dataclasses.replace(TINY, model_path=path), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_missing_model_is_named(tmp_path):
  with pytest.raises(ValueError, match='nothing is there'):
    experiment.run(
      dataclasses.replace(TINY, model_path='/no/such'), tmp_path / 'out'
    )
  assert not (tmp_path / 'out').exists()
