"""`experiments.implicit_weight_update`: a small random model, real texts."""

import dataclasses

import pytest

from experiments import implicit_weight_update as experiment
from experiments.demonstration_deletion import prompts
from tests import experiment_battery, pretrained_files as files

pytestmark = pytest.mark.slow


def test_tiny_run_is_complete(tmp_path):
  try:
    prompts.corpus_path()
  except ValueError as error:
    pytest.skip(str(error))
  labels = [' Positive', ' Negative']
  config = dataclasses.replace(
    experiment.Config.tiny(),
    model_path=files.write_model(tmp_path / 'small', labels),
  )
  summary = experiment.run(config, tmp_path / 'out')
  experiment_battery.check_complete(
    experiment, summary, tmp_path / 'out', config=config
  )
  for dtype, bound in experiment.BOUNDS.items():
    assert 0 < summary['residual'][dtype] <= bound
  assert summary['borrowed']['mean'] > 0
