"""`experiments.changed_learning`: a small random model, real texts."""

import dataclasses

import numpy as np
import pytest
import sklearn.metrics

from experiments import changed_learning as experiment
from experiments.demonstration_deletion import prompts
from tests import experiment_battery, pretrained_files as files

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  try:
    prompts.corpus_path()
  except ValueError as error:
    pytest.skip(str(error))
  path = tmp_path_factory.mktemp('model') / 'small'
  labels = [' Positive', ' Negative', ' A', ' B']
  model = files.write_model(path, labels)
  return dataclasses.replace(experiment.Config.tiny(), model_path=model)


@pytest.fixture(scope='module')
def tiny(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('out')
  return experiment.run(config, workdir), workdir


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
