r"""The regularised layer against gradient descent on the regularised loss.

A ridge of strength alpha on the dual weights changes the attention layer that
one gradient step implies. Pretrained layers are read in both forms - derived
strictly, `(A - alpha diag A) V`, and as printed, `(A - alpha I) V` - and
compared with dual models trained on their own prompts: one full batch, and E
epochs of batch 1, for alpha of either sign, with alpha or alpha / N in each
visit::

  python -m experiments.regularized_gradient_descent --workdir=out/ridge

The layers are pretrained without the ridge (single-task, so they memorise one
task matrix); the identities do not depend on how they were trained.

It takes 17 s of CPU time. Numbers to expect (10 seeds, 4 held-out prompts of
each, 95 % intervals over seeds)::

  residual, strict form, one full batch              2e-15
  residual, printed form, one full batch             .28
  the same, loss with one more pair                  2e-15
  residual of the closed form over all epochs        4e-13
  deviation after 100 epochs, alpha / N in a visit
    alpha = -.5 / -.1                                .29 [.29, .30] / .051
    alpha = .1 / .5                                  .048 / .21 [.21, .22]
  the same, alpha in a visit
    alpha = -.5 / -.1                                270 [230, 310] / 1.35
    alpha = .1 / .5                                  .48 / .87 [.87, .87]

So "a slight deviation" (here: at most 10 % of the output) needs alpha / N in a
visit and a small alpha; an alpha of .5 deviates by a fifth or more.

References:
  Ren & Liu, arXiv:2310.13220v1, Fig. 10.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments import lab
from experiments.lab import pretraining
from experiments.regularized_gradient_descent import epochs, steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(pretraining.Config):
  num_seeds: int = lab.option(10, 'independent runs', minimum=5, tiny=5)
  num_demonstrations: int = lab.count(15, 'demonstrations N', tiny=3)
  alphas: tuple[float, ...] = lab.option(
    (-0.5, -0.1, 0.0, 0.1, 0.5),
    'strengths alpha of both signs, 0 among them',
    minimum=-1,
    maximum=1,
    increasing=True,
    tiny=(-0.5, 0.0, 0.5),
  )
  dual_epochs: tuple[int, ...] = lab.count(
    (1, 10, 100), 'epochs E of the dual model', increasing=True, tiny=(1, 4)
  )
  num_epochs: int = lab.count(20, 'epochs of pretraining', tiny=2)
  num_test_prompts: int = lab.count(4, 'held-out prompts of a seed', tiny=2)
  block_epochs: int = lab.count(20, 'epochs between checkpoints', tiny=1)

  def check(self) -> None:
    signs = self.alphas[0] < 0 < self.alphas[-1] and 0.0 in self.alphas
    self.require(
      signs, 'alphas', 'strengths of both signs and 0, such as -0.5,0,0.5'
    )


PARTS = lab.parts(steps, epochs)


def conclude(config: Config, results: Mapping[str, Any], claims: Any) -> str:
  values = {k.split('/')[1]: x.estimate.value for k, x in claims.items()}
  count = config.dual_epochs[-1]
  ends = {
    reading: ', '.join(
      f'{100 * x.value:.3g} % at alpha = {alpha:g}'
      for alpha, x in found.items()
    )
    for reading, found in epochs.ends(config, results['epochs'], count).items()
  }
  return f"""One full-batch step on the contrastive loss with a ridge gives the
    strict regularised layer to {values['strict_ridge']:.1g} of its scale, and
    misses the printed one by up to {values['printed_ridge']:.2g}; the printed
    layer is one step on a loss with one more pair, to
    {values['printed_pair']:.1g}. Many epochs of batch 1 end elsewhere, and the
    closed form says where, to {values['closed_form']:.1g}: after {count} epochs
    the relative deviation from the strict layer is {ends[epochs.PER_EPOCH]} if
    a visit decays by alpha / N, and {ends[epochs.PER_VISIT]} if it decays by
    alpha."""


run = functools.partial(lab.run, PARTS, conclude=conclude)
