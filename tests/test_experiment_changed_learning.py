"""`experiments.changed_learning`: a small random model, real texts."""

import numpy as np
import pytest
import sklearn.metrics

from experiments import changed_learning as experiment
from tests import experiment_battery

pytestmark = pytest.mark.slow


config = experiment_battery.small_config(
  experiment, [' Positive', ' Negative', ' A', ' B']
)
tiny = experiment_battery.small_run(experiment)


def test_tiny_run_is_complete(tiny, config):
  summary, _ = tiny
  experiment_battery.check_complete(experiment, *tiny, config=config)
  for task in experiment.TASKS:
    merged = summary[task][experiment.ALONE]
    assert merged['largest_deviation'] < 1e-3
    assert set(summary[task]) == set(experiment.ARMS)


def test_area_is_that_of_scikit_learn():
  rng = np.random.default_rng(0)
  answers, right = rng.normal(size=(3, 9)), rng.random((3, 9)) < 0.5
  expected = [
    sklearn.metrics.roc_auc_score(*row)
    for row in zip(right, answers, strict=True)
  ]
  np.testing.assert_allclose(experiment.area(answers, right), expected)


def test_more_predictions_than_prompts_are_refused():
  experiment_battery.check_refused(
    experiment, {'num_predicted': 99}, 'num_predicted'
  )
