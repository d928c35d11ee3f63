"""Softmax regression: does a trained attention layer take a gradient step?

Three parts. The published bound on the shift of the target next to what is
observed and to the true constant (`bound`); one gradient step with the best
common rate, against the number of words `n` and their width `d` (`one_step`);
self-attention layers, trained on the same tasks, against that step (`layers`).
The identities are among those of `experiments.accounts`::

  python -m experiments.softmax_regression --workdir=out/softmax_regression

It takes about 60 s of CPU time, half of it compilation. Expect (10
repetitions, two softmax heads, n = 25, d = 20, after 320 steps) 1.08 times the
loss of the step in place and .94 times held out, Model cos .90 in both; at
n = 200, d = 20 a cosine of .30 between the two shifts, and loss ratios of one
step of .90 in place and .73 held out.

Two frames. `in place`: the target is drawn uniformly from the simplex, has
nothing to do with its document, and is predicted for the same words. `held
out`: a hidden vector makes the targets of two documents; one is given, the
other is asked for. Only the second rewards learning.

References:
  Li, Song, Xia, Yu & Zhou, arXiv:2304.13276.
"""

import dataclasses
import functools

from experiments import lab
from experiments.softmax_regression import bound, layers, one_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(10, 'repetitions', minimum=5, tiny=5)
  num_words: tuple[int, ...] = lab.option(
    (25, 100, 200),
    'words n, at the middle width',
    minimum=2,
    min_items=2,
    increasing=True,
    tiny=(4, 6),
  )
  widths: tuple[int, ...] = lab.option(
    (5, 20, 50),
    'widths d, at the largest number of words',
    minimum=2,
    min_items=2,
    increasing=True,
    tiny=(2, 3),
  )
  num_tasks: int = lab.count(
    100, 'tasks that choose the rate, and as many that judge it', tiny=4
  )
  num_steps: int = lab.count(
    320, 'training steps', multiple_of='num_records', tiny=4
  )
  num_records: int = lab.count(16, 'records during training', tiny=2)
  learning_rate: float = lab.option(0.03, 'rate of Adam, falls to 0', minimum=0)
  words_per_batch: int = lab.count(800, 'tasks of a batch, times n', tiny=24)
  num_test: int = lab.count(16, 'test tasks of a trained layer', tiny=2)

  @property
  def middle(self) -> int:
    """The width at which the number of words is varied."""
    return self.widths[len(self.widths) // 2]


PARTS = lab.parts(bound, one_step, layers)


def conclude(config, results, claims) -> str:
  """What to remember: the two shifts, the bound, the step, the layer."""
  few, most, middle = config.num_words[0], config.num_words[-1], config.middle
  step = results['one_step'][most, middle]
  layer = results['layers'].runs[layers.PUBLISHED, (few, middle)]
  losses, cosines = layer.loss_over_gd, layer.model_cos
  place, held = (
    f'{losses[frame, :, -1].mean():.2f} times the loss of the step {name}, '
    f'with Model cos {cosines[frame, :, -1].mean():.2f}'
    for frame, name in enumerate(('in place', 'held out'))
  )
  return f"""A shift of the weights or of the document is exactly a shift of the
    target. The published bound on its size is correct, and at least
    10^{bound.gap(results['bound']):.0f} times what is observed; it bounds each
    shift alone and says nothing of the distance between the two. With n =
    {most} and d = {middle} the moves of the logits by the two shifts have a
    cosine of {step.cosine[0].mean():.2f}. In place, one gradient step leaves
    {step.ratio_weights[0].mean():.1%} of the loss, copying each word's own
    target {step.ratio_data[0].mean():.1%}, and the step without it
    {step.ratio_without_self[0].mean():.1%}: what is gained there is memory.
    Held out, the step leaves {step.ratio_weights[1].mean():.1%}. With n = {few}
    and d = {middle}, the trained softmax layer ends at {place}, and at
    {held}."""


run = functools.partial(lab.run, PARTS, conclude=conclude, workers=2)
