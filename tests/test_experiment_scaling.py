"""`experiments.scaling`: the real thing, tiny."""

from experiments import scaling as experiment
from tests import experiment_battery

tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_all_but_the_time_is_exact(tiny):
  summary, _ = tiny
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  del verdicts['scaling-overhead']  # Whatever else the cores do.
  assert set(verdicts.values()) == {'reproduced'}
