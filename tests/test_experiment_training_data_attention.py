"""`experiments.training_data_attention`: the real thing, tiny."""

import dataclasses

import pytest
import scipy.stats

from experiments import training_data_attention as experiment
from tests import experiment_battery

tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_summary_has_the_numbers_that_decide(tiny):
  summary, _ = tiny
  assert 0 < summary['residual_float64'] < 1e-12
  assert 0.3 < summary['test_accuracy'] < 0.99
  assert len(summary['vote_agrees_by_layer']) == 2
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['training-data-identity'] == 'reproduced'
  # Too few steps for a network worth explaining, and the summary says so.
  assert verdicts['training-data-accuracy'] == 'not reproduced'


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_intervals_of_shares_stay_within_them(share):
  mean, low, high = experiment.share([share] * 5, 10)
  wilson = scipy.stats.binomtest(round(10 * share), 10).proportion_ci(
    method='wilson'
  )
  assert mean == pytest.approx(share)
  assert low == pytest.approx(wilson.low, abs=1e-6)
  assert high == pytest.approx(wilson.high, abs=1e-6)
  assert 0 <= low <= high <= 1


def test_a_second_run_ends_in_the_same_numbers(tiny, tmp_path):
  summary, _ = tiny
  again = experiment.run(experiment.Config.tiny(), tmp_path)
  assert again['residual_float64'] == summary['residual_float64']
  assert again['claims'] == summary['claims']


def test_more_test_images_than_images_are_named(tmp_path):
  config = dataclasses.replace(experiment.Config.tiny(), num_test=5000)
  with pytest.raises(ValueError, match='num_test is 5000; expected fewer'):
    experiment.run(config, tmp_path)
