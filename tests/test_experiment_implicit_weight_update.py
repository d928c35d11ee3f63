"""`experiments.implicit_weight_update`: a small random model, real texts."""

import pytest

from experiments import implicit_weight_update as experiment
from tests import experiment_battery

pytestmark = pytest.mark.slow


config = experiment_battery.small_config(experiment, [' Positive', ' Negative'])
tiny = experiment_battery.small_run(experiment)


def test_tiny_run_is_complete(tiny, config):
  summary, _ = tiny
  experiment_battery.check_complete(experiment, *tiny, config=config)
  for dtype, bound in experiment.BOUNDS.items():
    assert 0 < summary['residual'][dtype] <= bound
  assert summary['borrowed']['mean'] > 0
