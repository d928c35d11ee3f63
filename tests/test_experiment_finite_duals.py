"""`experiments.finite_duals`: a small random model, real texts."""

import dataclasses

import numpy as np
import pytest

from experiments import finite_duals as experiment
from experiments.finite_duals import chain, heads, texts
from tests import experiment_battery

pytestmark = pytest.mark.slow


config = experiment_battery.small_config(experiment, [' Positive', ' Negative'])
tiny = experiment_battery.small_run(experiment)


def test_tiny_run_is_complete(tiny, config):
  summary, _ = tiny
  experiment_battery.check_complete(experiment, *tiny, config=config)
  for name in ('median_error_r8_sink4', 'mean_tv_r8', 'mean_tv_r8_other_text'):
    assert 0 < summary[name] < 2
  assert summary['perplexity_ratio_r8'] > 0
  assert summary['median_error_window_only'] > summary['median_error_r8_sink4']


def test_no_text_is_calibrated_on(config):
  config = dataclasses.replace(config, num_tokens=128)
  loaded = texts.load(config)
  rows = [loaded.calibration, *loaded.reviews, *loaded.plots]
  assert len({row.tobytes() for row in rows}) == len(rows)
  assert all(row.shape == (config.num_tokens,) for row in rows)


def test_a_map_of_nothing_leaves_the_window():
  rng = np.random.default_rng(0)
  queries, keys, values = rng.normal(size=(3, 9, 4)).astype(np.float32)
  learner = texts.learner(experiment.Config.tiny())
  phi = texts.nothing(width=4)
  found = learner.causal(phi, queries, keys, values)
  distance = np.arange(9)[:, None] - np.arange(9)[None]
  seen = (distance >= 0) & ((distance < 4) | (np.arange(9)[None] == 0))
  weights = np.where(seen, np.exp(queries @ keys.T / 2), 0)
  expected = weights @ values / weights.sum(1, keepdims=True)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_chain_is_judged_by_what_changes():
  number = np.array([0.1, 0.3])
  measures = {'tv': number, 'perplexity_ratio': number + 1, 'agreement': number}
  found = {kind: {heads.JUDGED: measures} for kind in chain.KINDS}
  results = chain.Results(found, 8, {})
  claims = {x.id: x for x in chain.claims(experiment.Config.tiny(), results)}
  claim = claims['finite-duals-plots-perplexity-ratio']
  assert claim.estimate.value == pytest.approx((1.1 * 1.3) ** 0.5)
  assert claim.at_most == 1.2
