"""`experiments.training_data_attention`: the real thing, tiny."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from experiments import claims
from experiments import training_data_attention as experiment

TINY = experiment.Config(
  hidden_widths=(8,),
  num_steps=60,
  batch_size=16,
  num_recalled=4,
  num_test=50,
)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tiny')
  return experiment.run(TINY, workdir), workdir


def test_summary_has_the_numbers_that_decide(tiny):
  summary, workdir = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert 0 < summary['residual_float64'] < 1e-12
  assert 0.3 < summary['test_accuracy'] < 0.99
  assert len(summary['vote_agrees_by_layer']) == 2
  claims.check(summary['claims'])
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['training-data-identity'] == 'reproduced'
  # Too few steps for a network worth explaining, and the summary says so.
  assert verdicts['training-data-accuracy'] == 'not reproduced'


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_intervals_of_shares_stay_within_them(share):
  found = experiment.share_interval([share] * 5, 10)
  wilson = scipy.stats.binomtest(round(10 * share), 10).proportion_ci(
    method='wilson'
  )
  assert found['mean'] == pytest.approx(share)
  assert found['low'] == pytest.approx(wilson.low, abs=1e-6)
  assert found['high'] == pytest.approx(wilson.high, abs=1e-6)
  assert 0 <= found['low'] <= found['high'] <= 1


def test_figures_are_those_of_the_summary(tiny):
  summary, workdir = tiny
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn


def test_a_second_run_ends_in_the_same_numbers(tiny, tmp_path):
  summary, _ = tiny
  again = experiment.run(TINY, tmp_path)
  assert again['residual_float64'] == summary['residual_float64']
  assert again['claims'] == summary['claims']


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_seeds', 4, 'num_seeds is 4; expected an integer >= 5'),
    ('momentum', 1.0, 'momentum is 1; expected a number below 1'),
    ('learning_rate', np.nan, 'learning_rate is nan'),
    ('hidden_widths', (0,), 'hidden_widths is 0'),
    ('num_recalled', 51, 'num_recalled is 51; expected at most num_test, 50'),
  ],
)
def test_bad_settings_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **{field: value})


def test_more_test_images_than_images_are_named(tmp_path):
  with pytest.raises(ValueError, match='num_test is 5000; expected fewer'):
    experiment.run(dataclasses.replace(TINY, num_test=5000), tmp_path)
