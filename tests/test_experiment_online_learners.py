"""`experiments.online_learners`: the real thing, tiny."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import claims
from experiments import online_learners as experiment
from iclcl_jax import attention
from iclcl_jax.accounts import online_learners as learners

TINY = experiment.Config(
  dim=3,
  num_groups=5,
  tasks_per_group=40,
  tuning_length=4,
  max_length=8,
  scales=(1.0, 2.0),
)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tiny')
  return experiment.run(TINY, workdir), workdir


def test_summary_has_the_numbers_that_decide(tiny):
  summary, workdir = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert all(x <= 1e-14 for x in summary['residuals_float64'].values())
  claims.check(summary['claims'])
  drawn = {f'figures/{path.name}' for path in workdir.glob('figures/*.png')}
  assert {row['file'] for row in summary['figures']} == drawn
  curves = summary['loss_by_num_demonstrations']
  assert curves['least squares (mesa)'][7] < curves['delta rule'][7] < 0.6
  # Scale 1 at the tuning length is a point of the curve.
  for name, curve in curves.items():
    assert summary['loss_by_scale'][name][0] == pytest.approx(curve[3])


def test_one_step_is_the_optimal_step_of_the_closed_form():
  """d, N and U(-1/2, 1/2): eta* = d m2 / T2, loss* / zero as published."""
  config = dataclasses.replace(
    TINY, dim=10, tuning_length=10, max_length=10, tasks_per_group=400
  )
  with experiment.harness.float64_on_host():
    rate, curves, _ = experiment._compare(config)['linear attention']
  assert rate == pytest.approx(6.06, rel=0.2)  # The grid has steps of 1.33.
  assert np.mean(curves[:, 9]) == pytest.approx(0.495, abs=0.03)


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


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_groups', 4, 'num_groups is 4; expected an integer >= 5'),
    ('tuning_length', 9, 'tuning_length is 9; expected at most max_length'),
    ('half_range', 0.0, r'half_range is 0\.0; expected a finite number >='),
    ('scales', (0.0,), r'scales is 0\.0; expected a finite number >='),
  ],
)
def test_bad_settings_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **{field: value})
