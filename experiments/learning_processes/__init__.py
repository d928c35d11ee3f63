"""Attention's learning process beside those that it is compared with.

On the same demonstrations, through the same features: the dual model's step on
the contrastive loss; the same model descending on the squared, InfoNCE and
cosine losses for many steps; SimSiam and BYOL, with and without their
safeguards; contrastive kernel learning. Where do they agree, and when do they
part? ::

  python -m experiments.learning_processes --workdir=out/learning_processes

It takes 32 s of CPU time, most of it compilation, over two cores. Numbers to
expect (16 seeds; random demonstrations, then those of a trained layer)::

  first steps that are attention   relative error 8e-15 or less
  answer after 10 steps, degrees from that after one
    squared                        28 [25, 32]     26 [19, 34]
    InfoNCE                        14 [11, 17]     29 [20, 38]
    cosine                         21 [16, 27]     15 [6, 24]
  the same after 200 steps
    squared                        50 [46, 55]     44 [33, 55]
    InfoNCE                        47 [41, 54]     56 [46, 67]
    cosine                         44 [35, 52]     31 [21, 42]
  spread of outputs, end / start
    SimSiam                        1.01            1.02
    without predictor              .58 [.55, .61]  .53 [.46, .60]
    without stop-gradient          .56 [.50, .62]  .54 [.42, .65]

So attention predicts the duals of other losses for one step, not for ten. Only
the contrastive loss repeats its step for ever. SimSiam without its safeguards
loses spread but does not collapse: with 15 tokens and a linear encoder both
views of all tokens can be aligned without becoming one point.

The demonstrations are random (N(0, 1) entries) and those of the papers' layer
after a short training. A seed is a layer, a feature map and a few prompts; all
intervals are 95 % t-intervals over seeds.

References:
  Ren & Liu, arXiv:2310.13220v2, section 3 and Fig. 2 (the comparison in words).
"""

import dataclasses
import functools

from experiments import lab
from experiments.learning_processes import (
  duals,
  ingredients,
  processes,
  prompts,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(16, 'independent runs', minimum=10, tiny=10)
  num_prompts: int = lab.count(2, 'prompts of a seed', tiny=1)
  # Orthonormal rows, one for each of 12 outputs, need as many columns.
  num_demonstrations: int = lab.option(15, 'N of a prompt', minimum=5, tiny=6)
  num_features: int = lab.option(256, 'random features R', minimum=12, tiny=16)
  num_training_prompts: int = lab.count(1280, 'training prompts', tiny=4)
  num_dual_steps: int = lab.count(200, 'steps of the dual models', tiny=12)
  num_process_steps: int = lab.count(1000, 'self-supervised steps', tiny=15)
  learning_rate: float = lab.option(1.0, 'step of SimSiam and BYOL', above=0)
  momentum: float = lab.option(
    0.99, "momentum of BYOL's moving average", minimum=0, maximum=1
  )


PARTS = lab.parts(prompts, duals, ingredients, processes)


def conclude(config, results, claims) -> str:
  values = {name: claim.estimate.value for name, claim in claims.items()}
  worst = max(x for name, x in values.items() if ':first_step_' in name)
  parts = [
    f'All {len(duals.FIRST_STEPS)} first steps that should be attention are, '
    f'to a relative error of at most {worst:.0e}.'
    if worst <= duals.EXACT
    else f'A first step differs from attention by {worst:.0e}.'
  ]
  for data in prompts.DATA:
    found = {
      name: values[f'{data.replace(" ", "_")}:{name}']
      for name in (
        'cosine_parts_from_attention',
        'SimSiam_parts_from_attention',
        'SimSiam_keeps_its_spread',
        'SimSiam_without_both_collapses',
        'dual_keeps_the_spread_of_its_targets',
        *(f'{x}_after_{config.num_dual_steps}_steps' for x in duals.OTHERS),
      )
    }
    cosine, simsiam, kept, bare, dual, *turned = found.values()
    angles = ', '.join(
      f'{angle:.0f} ({name})'
      for name, angle in zip(duals.OTHERS, turned, strict=True)
    )
    parts.append(f"""Demonstrations "{data}": {config.num_dual_steps} steps turn
      the answer away from that of the first step by {angles} degrees on
      average. The cosine instead of the inner product turns attention's step by
      {cosine:.0f} degrees, all of SimSiam's ingredients by {simsiam:.0f}.
      SimSiam keeps {kept:.0%} of the spread of its outputs, without predictor
      and stop-gradient {bare:.0%}; the dual model, whose targets do not move,
      has after its step {dual:.0%} of the spread of the values.""")
  return ' '.join(parts)


run = functools.partial(lab.run, PARTS, conclude=conclude, workers=2)
