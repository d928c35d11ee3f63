"""`experiments.demonstration_deletion`: a small random model, real reviews."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import demonstration_deletion as experiment
from experiments.demonstration_deletion import prompts as prompting, ranks
from experiments.lab import texts
from iclcl_jax import pretrained
from tests import experiment_battery, families, pretrained_files as files

TASK = texts.TASKS['sentiment']


def make(config, loaded):
  options = config.num_prompts, config.num_demonstrations
  return prompting.make(config, loaded.tokenizer, TASK, *options)


@pytest.fixture(scope='module', autouse=True)
def corpus():
  try:
    return texts.corpus_path()
  except ValueError as error:
    pytest.skip(str(error))


config = experiment_battery.small_config(
  experiment, [*TASK.labels, ' Review', ' Plot']
)
tiny = experiment_battery.small_run(experiment)


@pytest.fixture(scope='module')
def loaded(config):
  return pretrained.load(config.model_path)


@pytest.fixture(scope='module')
def prompts(config, loaded):
  return make(config, loaded)


def rows_of(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_tiny_run_is_complete(tiny, config):
  summary, workdir = tiny
  experiment_battery.check_complete(experiment, *tiny, config=config)
  assert 0 < summary['identity_gap_float32'] < 1e-5
  assert summary['claims'][0]['verdict'] == 'reproduced'
  assert set(summary['mean_rank_correlation']) == {'signed', 'size'}
  assert len(rows_of(workdir)) == 6 * 3
  assert '6 prompts' in summary['conclusion']


def test_effects_are_those_of_prompts_without_the_demonstration(
  tiny, loaded, prompts
):
  """Text after text, without padding and without the code under test."""
  _, workdir = tiny
  ids = [loaded.tokenizer.single_id(label) for label in TASK.labels]
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


def test_prompts_are_balanced_and_segments_are_their_demonstrations(
  prompts, loaded
):
  assert prompts.positive.sum() == prompts.positive.size // 2
  assert prompts.query_positive.sum() == 4
  decode, end = loaded.tokenizer.decode, texts.END
  queries = set()
  for number, row in enumerate(prompts.tokens):
    segments, mask = prompts.segment_ids[number], prompts.mask[number]
    assert not np.any(segments[~mask] >= 0)
    head, *parts, query = decode(row[mask]).split(end)
    queries.update([*parts, query])
    assert head + end == TASK.instruction
    assert query.startswith('Review: ')
    assert query.endswith('Sentiment:')
    for place, positive in enumerate(prompts.positive[number]):
      assert parts[place].endswith(TASK.labels[not positive])
      kept = [part for n, part in enumerate(parts) if n != place]
      expected = end.join([head, *kept, query])
      assert decode(row[mask & (segments != place)]) == expected
      length = len(loaded.tokenizer.encode(parts[place] + end))
      assert prompts.lengths[number, place] == length
  assert len(queries) == 6 * 4  # No review occurs twice.


def made_up(positive, slope, noise, away_from_label=0):
  """Results in which the contribution says `slope` times the effect."""
  config = experiment.Config(num_prompts=len(positive))
  prompts = prompting.Prompts(
    *[np.zeros(0)] * 3,
    positive=positive,
    query_positive=np.zeros(len(positive), bool),
    lengths=np.ones(positive.shape, int),
  )
  rng = np.random.default_rng(8)
  removed = rng.normal(size=positive.shape)
  told = slope * removed + noise * rng.normal(size=positive.shape)
  removed = removed - away_from_label * np.where(positive, 1.0, -1.0)
  effects = ranks.Effects(
    difference=rng.normal(size=len(positive)),
    identity_gap=np.full(len(positive), 1e-7),
    influence=told,
    contribution=told,
    removal_effect=told,
    attention=rng.random(positive.shape),
    loss_drop=rng.random(positive.shape),
    removed=removed,
    hidden=removed,
    influence_hidden=told,
  )
  found = ranks.rank(config, prompts, effects)
  setting = ranks.Setting('sentiment', positive.shape[1], prompts, effects)
  results = ranks.Results([setting] * 4, found)
  verdicts = {c.id: c.verdict for c in ranks.claims(config, results)}
  return config, results, verdicts


@pytest.mark.parametrize(
  ('slope', 'verdict'), [(1, 'reproduced'), (-1, 'not reproduced')]
)
def test_verdicts_follow_the_numbers(slope, verdict):
  positive = np.random.default_rng(1).random((60, 4)) < 0.5
  config, results, verdicts = made_up(positive, slope, 0.3)
  assert verdicts['deletion-attribution-signed'] == verdict
  assert verdicts['deletion-attribution-signed-better'] == verdict
  assert verdicts['deletion-removal-size'] == 'reproduced'
  assert verdicts['deletion-hidden'] == 'reproduced'
  means = ranks.summary(config, results)['mean_rank_correlation']['signed']
  assert abs(means['random']['spearman'].value) < 0.3


def test_a_baseline_that_points_the_wrong_way_is_turned():
  """Effects away from the label: the label, reversed, beats noise."""
  rng = np.random.default_rng(2)
  positive = rng.permuted(np.arange(4)[None] % 2 == np.zeros((60, 1)), axis=1)
  config, results, verdicts = made_up(positive, 0, 1.0, away_from_label=3)
  assert -3.5 < ranks.towards_own_label(results).value < -2.5
  assert verdicts['deletion-attribution-signed-better'] == 'not reproduced'
  claims = [c.claim for c in ranks.claims(config, results)]
  assert any('ranks them better than label ' in claim for claim in claims)


def test_too_few_short_reviews_are_named(config, loaded):
  few = dataclasses.replace(config, max_tokens=16)
  with pytest.raises(ValueError, match='at most 16 tokens'):
    make(few, loaded)


def test_models_that_do_not_fit_leave_nothing_behind(tmp_path):
  added = [' Positive', ' Review', ' Plot']
  path = files.write_model(tmp_path / 'small', added)
  for model_path, message in (
    (path, "' Negative' is 9 tokens"),
    ('/no/such', 'nothing is there'),
  ):
    config = experiment.Config(model_path=model_path)
    with pytest.raises(ValueError, match=message):
      experiment.run(config, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_capped_scores_have_no_loss_that_drops():
  prompt = SimpleNamespace(
    tokens=jnp.arange(9),
    segment_ids=jnp.array([-1, 0, 0, 0, 1, 1, -1, -1, -1]),
    mask=jnp.ones(9, bool),
    positive=jnp.array([True, False]),
  )
  model = families.model_of('gemma2', 'float32')
  found = ranks.one_prompt(model, [3, 4], prompt, 40, is_first=True)
  assert found.loss_drop is None
  assert np.all(np.isfinite(found.hidden))
