"""`experiments.meta_optimizer`: the real thing, tiny."""

from experiments import meta_optimizer as experiment
from tests import experiment_battery

tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_summary_has_the_numbers_that_decide(tiny):
  summary, _ = tiny
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['meta-optimizer-recovery'] == 'not reproduced'


def test_what_no_paper_claims_is_a_control(tiny):
  rows = [row for row in tiny[0]['claims'] if row['claim'].startswith('null')]
  assert len(rows) == 13
  assert {row['source'] for row in rows} == {'control'}


def test_metrics_find_what_was_put_in(tiny):
  found = tiny[0]['nulls']['SimAOU']
  means = {case: row['observed']['mean'] for case, row in found.items()}
  assert abs(means['noise']) < 0.05 < 0.7 < means['forgetting']
  assert means['own'] > 0.85
  assert abs(found['own']['permuted']['mean']) < 0.1
  assert found['shared']['permuted']['mean'] > 0.8
