r"""Attention is one gradient step: a trained layer against its dual model.

Trains the papers' layer on in-context linear regression, several seeds at
once. Then, for held-out prompts, trains the dual model by gradient descent on
the contrastive loss - one full-batch step, and E epochs of batch 1 - and
compares its prediction with the layer's. Ends in a table of certificates for
every feature map and the exact softmax::

  python -m experiments.equivalence --workdir=out/demo

It takes 55 s of CPU time, most of it compilation, spread over two cores, and
0.65 GiB of memory; `seconds` in `summary.json` says where time went.
Numbers to expect (10 seeds, losses relative to that of predicting 0, with 95 %
intervals)::

  residual, one step             1e-15 in float64, 5e-07 in float32
  residual, exact softmax        5e-16 in float64, 2e-07 in float32
  residual, 100 epochs           3e-15 in float64, 3e-06 in float32
  distance curve, closed form    5e-15 in float64
  held-out loss                  .12 [.10, .14] (N = 15), .09 [.07, .11] (31)
  the same for another B         1.6 [1.1, 2.2] (N = 15), 1.7 [1.4, 2.0] (31)

Single-task training (the default, as in the paper) measures how well the layer
memorises the one matrix B, not in-context learning: on prompts of another B it
is worse than predicting 0, and `summary.json` says so beside every loss.

`--multi_task=true` draws a fresh B for every prompt instead: nothing is learnt,
the held-out loss is 1.01 [.99, 1.03] (N = 15) and .99 [.98, 1.00] (31).
`--input_distribution=normal` draws inputs from N(0, 1): .14 [.12, .17] and
.10 [.08, .12]. The identity holds in all of them, to the same residuals: it
does not ask what was learnt.

References:
  Ren & Liu, arXiv:2310.13220v1, Fig. 3 left and Fig. 8; v2, Fig. 3a.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from experiments import lab
from experiments.equivalence import certificates, descent, learning, one_step
from experiments.lab import pretraining, tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pretraining.Config):
  num_seeds: int = lab.option(10, 'independent runs', minimum=5, tiny=5)
  num_demonstrations: tuple[int, ...] = lab.count(
    (15, 31), 'demonstrations N, a run each', distinct=True, tiny=(3,)
  )
  num_test_prompts: int = lab.count(64, 'held-out prompts of a seed', tiny=4)
  num_dual_prompts: int = lab.count(
    4, 'prompts of many dual epochs', at_most='num_test_prompts', tiny=2
  )
  dual_epochs: int = lab.count(100, 'epochs E of the dual model', tiny=3)
  block_epochs: int = lab.count(25, 'epochs between checkpoints', tiny=1)


PARTS = lab.parts(certificates, descent, one_step, learning)


def conclude(config, results, claims) -> str:
  steps = one_step.summary(config, results['one_step'])
  holds = all(
    PARTS[name].summary(config, results[name])['holds']
    for name in ('certificates', 'descent', 'one_step')
  )
  verb = 'holds' if holds else 'does NOT hold'
  losses = results['learning']
  sizes = ', '.join(map(str, losses))
  seen, unseen = (
    ', '.join(f'{found.ratios[kind]:.2f}' for found in losses.values())
    for kind in ('attention', 'unseen_task')
  )
  return f"""The identity {verb}: over all seeds and prompts the largest
    residual is {steps['residual_float64']:.1e} in float64 and
    {steps['residual_float32']:.1e} in float32,
    {steps['residual_exact_softmax_float64']:.1e} for the exact softmax. It does
    not say what the layer has learnt: the held-out loss over that of predicting
    0 is {seen} on the task matrix of training (N = {sizes}), and {unseen} on
    another task matrix."""


def closing(summary: Mapping[str, Any]) -> str:
  """The certificates, and the verdict in the last line."""
  columns = 'data', 'name', 'dtype', 'residual', 'tolerance', 'condition'
  double, single = (
    summary[f'residual_{dtype}'] or math.nan for dtype in ('float64', 'float32')
  )
  return (
    'Certificates: attention = one gradient step of the dual model, at the '
    'trained layer and at small norms\n\n'
    f'{tables.text(summary["certificates"], (*columns, "verdict"))}\n\n'
    f'{summary["test_mse_meaning"]}\n\n'
    f'equivalence: {"HOLDS" if summary["holds"] else "FAILS"}  residual '
    f'{double:.1e} (float64), {single:.1e} (float32)'
  )


run = functools.partial(
  lab.run, PARTS, conclude=conclude, closing=closing, workers=2
)
