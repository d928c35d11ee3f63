r"""Which score says what deleting a demonstration does?

Few-shot prompts of real film reviews are read by a pretrained language model.
Each demonstration is deleted, exactly, and what the difference of the two
labels' logits loses is compared with what scores say of it: influence (its
removal from the dual models of all heads at all later tokens, to first order),
direct logit attribution and the closed-form removal at the last position, and
baselines that need no model (order at random, recency, length, label) or no
labels (attention weight, drop of the dual loss). Prompts of 4 and of 8
demonstrations, on two tasks: the sentiment of a review, and whether a sentence
is of a review or of a plot, lengths matched::

  python -m experiments.demonstration_deletion --workdir=out/deletion

It takes about 40 minutes on two idle cores, and resumes when it is run again.
Expect, as mean Spearman correlation with deletion within a prompt and its 95%
interval, over 200 prompts of each size and 60 of the second task::

                               4 reviews          8 reviews         kind, 4; 8
  influence                 .62 [.56, .67]     .76 [.74, .79]        .67; .70
  direct logit attribution  -.29 [-.37, -.22]  .26 [.21, .31]        .42; .33
  closed-form removal       -.28 [-.35, -.21]  .25 [.20, .30]        .41; .30
  label                     -.42 [-.49, -.36]  .19                   .27; .29

Influence has 80, 86, 75 and 82 % of the signs right, and finds the largest
effect of a prompt in 53, 67, 70 and 42 % (chance: 25, 12.5, 25, 12.5 %). Which
score to use: influence to rank single deletions; deletion itself
(`effects_of_removal`) where the answer counts or demonstrations are few; direct
attribution for what the last position read, never for what deletion does. With
4 reviews, without a demonstration of one label this model leans more towards
that label, on average by .25 logits. Hiding a demonstration at unchanged
positions and deleting it agree to .66; influence ranks hiding by .48, its hide
form by .43. In the prompts labels are balanced and the model is small: its
answers agree with the critic in 57 % of the queries. The sum of the parts of
direct attribution is off by 5e-7 of its terms (float32).

The subsets take 10 minutes of one core more: all subsets of 4 demonstrations,
60 prompts of each task. Expect, for the sum of scores against the answers to
subsets that lack two or more (LDS), and for scores against single deletions::

                          sentiment        kind               one deletion
  influence               .19 [.08, .30]   .45 [.34, .57]     .66; .67
  leave one out, exact    .18 [.06, .30]   .43 [.33, .54]
  linear surrogate        .21 [.08, .34]   .80 [.76, .84]
  ridge on hidden states  -.03 [-.18, .12] .94 [.92, .95]     -.28; .50
  label                   -.02 [-.16, .13] .92 [.90, .94]
  direct attribution      .06 [-.08, .19]  .83 [.78, .87]
  Shapley values, exact   .57 [.47, .67]   .93 [.91, .96]

With Shapley values influence has .51 [.40, .63] and .44 [.34, .53], the ridge
-.16 and .90 [.87, .93], the label -.23 and .89, the most that its ties allow.
Where the answer follows the labels (kind), the label itself says what several
deletions do; where it does not (sentiment), not even exact single deletions
add up. Shapley values have seen the answers that they are judged by; the
surrogate has seen single deletions and half of the others.
"""

import dataclasses
import functools

from experiments import lab
from experiments.demonstration_deletion import ranks, subsets
from experiments.lab import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(models.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_prompts: int = lab.option(200, 'prompts, first task', minimum=5, tiny=6)
  num_demonstrations: int = lab.option(
    4, 'demonstrations of a prompt', minimum=3, maximum=16, tiny=3
  )
  more_demonstrations: int = lab.option(
    8,
    'demonstrations of the longer prompts',
    maximum=16,
    more_than='num_demonstrations',
    tiny=4,
  )
  num_other_prompts: int = lab.option(
    60, 'prompts of the second task', minimum=5, tiny=5
  )
  num_subset_prompts: int = lab.option(
    60, 'prompts of a task, all subsets asked', minimum=5, tiny=5
  )
  num_subset_demonstrations: int = lab.option(
    4, 'demonstrations of these prompts', minimum=3, maximum=6, tiny=3
  )
  max_tokens: int = lab.option(26, 'most tokens of a demonstration', minimum=16)
  block_size: int = lab.count(10, 'prompts between checkpoints', tiny=3)


PARTS = lab.parts(ranks, subsets)
run = functools.partial(lab.run, PARTS)
