"""Sequence layers as online learners: identities, and what each one learns.

Two questions. Is each published recurrence, and its parallel form, the inner
gradient step (or exact solve) that it is said to be? A residual says so
(`identities`). And how well does each of them, untrained, learn a linear
regression in context (`comparison`)? The same tasks for all, one number tuned
for each layer at one length, then other lengths and input scales::

  python -m experiments.online_learners --workdir=out/online_learners

It takes about 20 s of CPU time. Expect residuals of at most 1e-15 and, after 20
demonstrations of width 10, losses over that of predicting 0 of .55 (softmax),
.39 (linear attention), .15 (delta rule) and 1e-5 or less (least squares).

Tasks: `y = w . x` with `w` from N(0, I), inputs from U(-a, a), no noise; the
loss is relative to that of predicting 0. A group of tasks is the unit of the
intervals (95 %, t).

References:
  iclcl_jax.accounts.online_learners, whose table names the papers.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from experiments import lab
from experiments.online_learners import comparison, identities


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  dim: int = lab.option(10, 'width d of the inputs', minimum=1)
  num_groups: int = lab.option(10, 'groups of tasks', minimum=5)
  tasks_per_group: int = lab.option(500, 'tasks of a group', minimum=1)
  half_range: float = lab.option(0.5, 'inputs are from U(-a, a)', minimum=1e-3)
  tuning_length: int = lab.option(
    10, 'demonstrations at which is tuned', minimum=1
  )
  max_length: int = lab.option(40, 'most demonstrations', minimum=1)
  scales: tuple[float, ...] = lab.option(
    (0.5, 0.75, 1.0, 1.5, 2.0),
    'input scales, at the tuning length',
    minimum=1e-3,
  )

  def check(self):
    self.require(
      self.tuning_length <= self.max_length,
      'tuning_length',
      f'at most max_length, {self.max_length}',
    )

  @classmethod
  def tiny(cls):
    return cls(
      dim=3,
      num_groups=5,
      tasks_per_group=20,
      tuning_length=4,
      max_length=8,
      scales=(1.0, 2.0),
    )


PARTS = {'identities': identities.PART, 'comparison': comparison.PART}


def conclude(config, results, claims) -> str:
  """What to remember of a run."""
  del claims
  at = comparison.judged_length(config)
  losses = ', '.join(
    f'{name} {loss:.2g}'
    for name, loss in comparison.losses_at(results['comparison'], at).items()
  )
  worst = max(results['identities'].residuals.values())
  return (
    'Every recurrence, and every parallel form, is its inner learner, up to '
    f'{worst:.0e} in float64. As learners of a linear regression with '
    f'{config.dim} inputs they differ: after {at} demonstrations the loss over '
    f'that of predicting 0 is {losses}.'
  )


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment, as `lab.run` does."""
  return lab.run(PARTS, config, workdir, conclude=conclude)
