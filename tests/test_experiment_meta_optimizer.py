"""`experiments.meta_optimizer`: the real thing, tiny."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import claims
from experiments import meta_optimizer as experiment

TINY = experiment.Config(num_seeds=5, num_queries=8, width=64, num_draws=2)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tiny')
  return experiment.run(TINY, workdir), workdir


def test_summary_has_the_numbers_that_decide(tiny):
  summary, workdir = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  for name in ('dual_form', 'momentum_recurrence', 'finetuning', 'mix'):
    assert 0 < summary[f'{name}_residual_float64'] < 1e-12
  assert summary['naive_sum_error'] > 0.1
  claims.check(summary['claims'])
  verdicts = {row['id']: row['verdict'] for row in summary['claims']}
  assert verdicts['meta-optimizer-dual-form'] == 'reproduced'
  assert verdicts['meta-optimizer-sum'] == 'not reproduced'
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


def test_figures_are_those_of_the_summary(tiny):
  summary, workdir = tiny
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_seeds', 4, 'num_seeds is 4; expected an integer >= 5'),
    ('width', 66, 'width is 66; expected a multiple of 4'),
    ('noise', np.nan, 'noise is nan'),
  ],
)
def test_bad_settings_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **{field: value})
