"""`experiments.demonstration_deletion`: a small random model, real reviews."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import demonstration_deletion as experiment
from experiments.demonstration_deletion import (
  prompts as prompting,
  ranks,
  subsets,
)
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
  assert summary['spearman_hide'].keys() == summary['spearman_delete'].keys()
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


def test_subsets_are_asked_as_texts_without_the_others(loaded, prompts, config):
  ids = [loaded.tokenizer.single_id(label) for label in TASK.labels]
  prompt = jax.tree.map(lambda rows: jnp.asarray(rows[1]), prompts)
  places = subsets.predicting(prompts, ids)
  kept = subsets.subsets(3)
  found = jax.jit(
    lambda model, *x: subsets._one_prompt(model, ids, *x, jnp.asarray(kept))
  )(loaded.model, prompt, jnp.asarray(places[1]))
  for row in (0, 5):
    own = prompts.mask[1] & np.isin(
      prompts.segment_ids[1], [-1, *np.flatnonzero(kept[row])]
    )
    logits = pretrained.next_token_logits(
      loaded.model, jnp.asarray(prompts.tokens[1][own])
    )
    expected = logits[ids[0]] - logits[ids[1]]
    np.testing.assert_allclose(found['answers'][row], expected, atol=1e-4)
  following = prompts.tokens[1][places[1][:-1] + 1]
  np.testing.assert_array_equal(following == ids[0], prompts.positive[1])
  assert prompts.mask[1].sum() == places[1][-1] + 1


def test_rivals_of_an_additive_answer_are_right():
  """Then deletion, Shapley values and the surrogate are the same numbers."""
  rng = np.random.default_rng(0)
  effects, positive = rng.normal(size=(40, 4)), rng.random((40, 4)) < 0.5
  states = rng.normal(size=(40, 5, 3))
  answers = 1 + effects @ subsets.subsets(4).T
  found = subsets.judge(
    experiment.Config(),
    positive,
    answers=answers,
    states=states,
    **{ranks.INFLUENCE: -effects},
  )
  for name in (subsets.ALONE, subsets.SHAPLEY, subsets.SURROGATE):
    np.testing.assert_allclose(found.scores[name], effects, atol=1e-12)
    assert np.mean(found.judged[name]['lds']) == 1
  assert np.mean(found.judged[ranks.INFLUENCE]['shapley']) == -1
  assert abs(np.mean(found.judged[subsets.RIDGE]['deletion'])) < 0.3

  # The ridge by its normal equations, for one deletion of one prompt.
  sign = np.where(positive[7], 1.0, -1.0)
  own = states[7] / np.sqrt(np.mean(np.sum(states[7] ** 2, axis=1)))

  def predict(rows):
    x = own[rows]
    weights = np.linalg.solve(x.T @ x + np.eye(3), x.T @ sign[rows])
    return own[-1] @ weights

  lost = predict([0, 1, 2, 3]) - predict([0, 1, 3])
  np.testing.assert_allclose(found.scores[subsets.RIDGE][7, 2], lost)


def test_subsets_judge_what_has_not_seen_them():
  """Answers at random: only exact Shapley values, of all of them, correlate."""
  rng = np.random.default_rng(3)
  found = subsets.judge(
    experiment.Config(),
    rng.random((400, 4)) < 0.5,
    answers=rng.normal(size=(400, 16)),
    states=rng.normal(size=(400, 5, 3)),
    **{ranks.INFLUENCE: rng.normal(size=(400, 4))},
  )
  means = {name: np.mean(x['lds']) for name, x in found.judged.items()}
  assert means.pop(subsets.SHAPLEY) > 0.3
  assert max(map(abs, means.values())) < 0.1, means
  np.testing.assert_allclose(
    subsets.surrogate(subsets.subsets(3), subsets.subsets(3) @ [1.0, 2, 3] + 4),
    [1, 2, 3],
  )


def test_a_game_that_does_not_add_up_is_shared_by_shapley():
  """Three demonstrations that count only together."""
  answers = np.zeros((1, 8))
  answers[0, -1] = 6
  np.testing.assert_allclose(subsets.shapley_values(answers), [[2, 2, 2]])


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
  results = [
    ranks.Setting('sentiment', positive.shape[1], prompts, effects)
  ] * 4
  verdicts = {c.id: c.verdict for c in ranks.claims(config, results)}
  return config, results, verdicts


@pytest.mark.parametrize(
  ('slope', 'verdict'), [(1, 'reproduced'), (-1, 'not reproduced')]
)
def test_verdicts_follow_the_numbers(slope, verdict):
  positive = np.random.default_rng(1).random((60, 4)) < 0.5
  config, results, verdicts = made_up(positive, slope, 0.3)
  assert verdicts['deletion-attribution'] == verdict
  assert verdicts['deletion-attribution-better'] == verdict
  assert verdicts['deletion-hidden'] == 'reproduced'
  means = ranks.summary(config, results)['spearman_delete']
  assert abs(means['random']['4'].value) < 0.3


def test_a_baseline_that_points_the_wrong_way_is_turned():
  """Effects away from the label: the label, reversed, beats noise."""
  rng = np.random.default_rng(2)
  positive = rng.permuted(np.arange(4)[None] % 2 == np.zeros((60, 1)), axis=1)
  config, results, verdicts = made_up(positive, 0, 1.0, away_from_label=3)
  assert -3.5 < ranks.towards_own_label(results).value < -2.5
  assert verdicts['deletion-attribution-better'] == 'not reproduced'
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
