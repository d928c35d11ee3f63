"""Implicit finetuning: its identities, and its metrics on known answers.

The dual form of attention, the update by finetuned keys and values, the convex
mix of the softmax, and momentum attention are checked to rounding
(`identities`). Then the metrics that compare learning in context with
finetuning are applied to synthetic activations whose relation is known:
unrelated noise, a common loss of the zero-shot output, an update that all
queries share, an update of each query's own (`nulls`)::

  python -m experiments.meta_optimizer --workdir=out/meta_optimizer

It takes about 15 s of CPU time. Expect (10 repetitions) SimAOU .00 on noise and
.74 on a common loss, SimAOU normalised .03 on noise, SimAM .92 and Kendall .74
on unrelated updates, Rec2FTP 82 % for answers that have nothing to do with each
other, and residuals below 1e-15.

No model is trained: this says what the metrics can show, not what a language
model does.

References:
  Dai et al., arXiv:2212.10559; Deutch et al., arXiv:2311.07772.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from experiments import lab
from experiments.meta_optimizer import identities, nulls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(10, 'repetitions', minimum=5)
  num_queries: int = lab.option(32, 'queries of a repetition', minimum=8)
  width: int = lab.option(256, 'width of an attention output', minimum=8)
  num_draws: int = lab.option(8, 'draws of a null', minimum=1)
  noise: float = lab.option(
    0.3, 'size of unrelated noise over that of the baseline', minimum=0.01
  )

  def check(self):
    self.require(
      self.width % nulls.NUM_HEADS == 0,
      'width',
      f'a multiple of {nulls.NUM_HEADS}, the number of heads',
    )

  @classmethod
  def tiny(cls):
    return cls(num_seeds=5, num_queries=8, width=64, num_draws=2)


PARTS = {'identities': identities.PART, 'nulls': nulls.PART}


def conclude(config, results, claims) -> str:
  """What to remember of a run: what the metrics say of known answers."""
  del config, claims
  found = nulls.estimates(results['nulls'])
  recovery = found['Rec2FTP']

  def mean(name, case, kind='observed'):
    return found[name][case][kind].value

  return (
    f'On unrelated updates SimAOU is {mean("SimAOU", "noise"):.3f}, its '
    f'normalised form {mean("SimAOU, normalised", "noise"):.3f}; when both '
    'sides merely forget half of the zero-shot output SimAOU is '
    f'{mean("SimAOU", "forgetting"):.2f}, the partial cosine '
    f'{mean("SimAOU, partial", "forgetting"):.3f}. SimAM is '
    f'{mean("SimAM", "noise"):.2f} on unrelated updates, SimAM-delta '
    f'{mean("SimAM-delta", "noise"):.3f}, Kendall '
    f'{mean("Kendall", "noise"):.2f}. Answers that have nothing to do with '
    f'each other have a Rec2FTP of {recovery["observed"].value:.0f} %, a '
    f'chance level of {recovery["chance"].value:.0f} %. An update that all '
    f'queries share gives SimAOU {mean("SimAOU", "shared"):.2f}, and '
    f'{mean("SimAOU", "shared", "permuted"):.2f} with permuted queries: the '
    'random null does not catch that, the permuted one does. Neither catches '
    'forgetting (SimAOU with permuted queries: '
    f'{mean("SimAOU", "forgetting", "permuted"):.2f}), which only the partial '
    'cosine removes.'
  )


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment, as `lab.run` does."""
  return lab.run(PARTS, config, workdir, conclude=conclude)
