"""`experiments.online_learners`: the real thing, tiny."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab, online_learners as experiment
from iclcl_jax import attention
from iclcl_jax.accounts import online_learners as learners
from tests import experiment_battery

tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_summary_has_the_numbers_that_decide(tiny):
  summary, _ = tiny
  assert all(x <= 1e-14 for x in summary['residuals_float64'].values())
  curves = summary['loss_by_num_demonstrations']
  assert curves['least squares (mesa)'][7] < curves['delta rule'][7] < 0.6
  # Scale 1 at the tuning length is a point of the curve.
  for name, curve in curves.items():
    assert summary['loss_by_scale'][name][0] == pytest.approx(curve[3])


def test_one_step_is_the_optimal_step_of_the_closed_form():
  """d, N and U(-1/2, 1/2): eta* = d m2 / T2, loss* / zero as published."""
  config = dataclasses.replace(
    experiment.Config.tiny(),
    dim=10,
    tuning_length=10,
    max_length=10,
    tasks_per_group=400,
  )
  with lab.float64_on_host():
    found = experiment.measure(config)['linear attention']
  assert found.tuned == pytest.approx(
    6.06, rel=0.2
  )  # The grid has steps of 1.33.
  assert np.mean(found.by_length[:, 9]) == pytest.approx(0.495, abs=0.03)


def test_softmax_over_prefixes_is_softmax_attention():
  rng = np.random.default_rng(0)
  query, keys, values = (
    jnp.asarray(rng.normal(size=shape)) for shape in ((4,), (6, 4), (6, 1))
  )
  tokens = learners.Stream(jnp.broadcast_to(query, keys.shape), keys, values)
  outputs = experiment._softmax(tokens, 0.5)  # 1 / sqrt(4)
  for t in range(6):
    np.testing.assert_allclose(
      outputs[t],
      attention.softmax_attention(query, keys[: t + 1], values[: t + 1]),
      atol=1e-14,
    )
