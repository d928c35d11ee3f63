"""Do negative samples help, and does it matter which tokens they are?

The `k` tokens of lowest score lose `beta`, which goes to all others in equal
parts. The controls choose at random, the highest scores, or let the weights
sum to `1 - beta`.

References:
  Ren & Liu, arXiv:2310.13220, section 4.3; v1, Fig. 5 right; v2, Fig. 3d.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import lab
from experiments.lab import Config
from experiments.modifications import comparison
from experiments.modifications.comparison import (
  PLAIN,
  RATES,
  Results,
  Statement,
)
from experiments.modifications.training import Layer, measure_panel
from iclcl_jax import modified, types

LOWEST, RANDOM, HIGHEST = 'lowest', 'random', 'highest'
UNNORMALISED = 'lowest unnormalised'


def anyone(position, positions):
  """Candidates where the query's own token is one."""
  return positions >= 0 * position


def _by_noise(noise, weights, candidates, count):
  del weights
  return modified.lowest_scores(noise, candidates, count)


@types.dataclass
class ByNoise(Layer):
  """Negatives are chosen by the prompt's noise instead of by score."""

  def predict(self, params, phi, prompt):
    select = jax.tree_util.Partial(_by_noise, prompt.noise)
    choice = dataclasses.replace(self.attend.choice, select=select)
    attend = dataclasses.replace(self.attend, choice=choice)
    return Layer(attend).predict(params, phi, prompt)


# How negatives are chosen. All but the lowest are controls.
CHOICES: dict[str, tuple[Callable[..., Layer], dict[str, Any]]] = {
  LOWEST: (Layer, {}),
  RANDOM: (ByNoise, {}),
  HIGHEST: (Layer, {'select': modified.highest_scores}),
  UNNORMALISED: (Layer, {'renormalise': modified.unnormalised}),
}


def name_of(choice: str, count: int, strength: float) -> str:
  """Name of a layer with negatives; `choice` is a key of `CHOICES`."""
  return f'{choice} k={count} beta={strength:g}'


def cells(config: Config, choice: str = LOWEST) -> list[tuple[int, float]]:
  """Numbers of negatives and strengths: weak negatives have all controls."""
  weak = min(config.negative_strengths)
  return [
    (count, strength)
    for count in config.negative_counts
    for strength in config.negative_strengths
    if choice in (LOWEST, RANDOM) or strength == weak
  ]


def layers(config: Config) -> dict[str, Layer]:
  own = config.own_token_may_be_negative
  candidates_fn = anyone if own else operator.ne

  def layer(choice, count, strength):
    make, options = CHOICES[choice]
    return make(
      modified.negative(
        num_negatives=count,
        strength=strength,
        candidates_fn=candidates_fn,
        **options,
      )
    )

  return {PLAIN: layer(LOWEST, 1, 0.0)} | {
    name_of(choice, *cell): layer(choice, *cell)
    for choice in CHOICES
    for cell in cells(config, choice)
  }


def published(config: Config) -> list[str]:
  return [name_of(LOWEST, *cell) for cell in cells(config)]


def controls(config: Config) -> list[tuple[str, str]]:
  return [
    (name_of(LOWEST, *cell), name_of(choice, *cell))
    for choice in CHOICES
    if choice != LOWEST
    for cell in cells(config, choice)
  ]


@lab.once
def measure(config: Config) -> Results:
  return measure_panel(config, 'negatives', layers(config))


def claims(config: Config, results: Results) -> lab.Claims:
  """Some setting of negatives is faster, corrected for their number."""
  names = published(config)
  source = comparison.SOURCE.format('right', '3d')
  text = 'some setting converges faster'
  statement = Statement('negatives:', 'early', 'better', text)
  for rate in RATES:
    entries = [
      results.compare(rate, 'early', name, num_comparisons=len(names))
      for name in names
    ]
    # The lowest significant ratio if there is one, else the lowest ratio.
    rank = np.argsort([x.ratio.value for x in entries]).tolist()
    better = (i for i in rank if 'better' in entries[i].verdict)
    best = next(better, rank[0])
    judged = [comparison.fits('better', x.verdict) for x in entries]
    order = 'reproduced', 'undecided', 'not reproduced'
    first = min(judged, key=order.index)
    note = f""" in some of {len(names)} settings, each with the Bonferroni
      level; value and interval are of {names[best]}"""
    entry = entries[best]
    yield comparison.claim(
      config, results, source, rate, statement, entry, first, note
    )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  own = 'negatives', 'negatives: k lowest scores lose β', published(config)
  return [comparison.curves(config, results, *own, 'lowest ')]
