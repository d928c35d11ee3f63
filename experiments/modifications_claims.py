"""The authors' statements about Fig. 5 of v1 and Fig. 3b-d of v2, judged.

The rule: ten or more paired runs; better, poorer or
comparable by the 95 % interval of the ratio to the plain layer, see
`modifications_statistics.verdict`. Where the plain layer is not better than
predicting 0, nothing is decided.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import modifications_panels as panels
from experiments import modifications_statistics as statistics
from experiments.modifications_statistics import Measured, Ratio

SOURCE = 'Ren & Liu, arXiv:2310.13220v1, Fig. 5 {}; v2, Fig. {}'
REGULARISED = SOURCE.format('left', '3b')
AUGMENTED = SOURCE.format('centre', '3c')
NEGATIVE = SOURCE.format('right', '3d')
WORDS = {
  'better': 'below 1, not if it is above 1 or inside [0.9, 1.1] (comparable)',
  'poorer': 'above 1, or the layer diverged; not if it is below 1 or inside '
  '[0.9, 1.1] (comparable)',
  'comparable': 'inside [0.9, 1.1], not if it is otherwise below or above 1',
}


def claims(
  config: Any,
  indices: Mapping[str, Mapping[str, int]],
  data: Mapping[str, Measured],
) -> list[dict[str, Any]]:
  """All statements, at the fixed learning rate and at tuned ones.

  Args:
    config: settings of the experiment.
    indices: by panel, the place of each layer.
    data: by panel, what was measured.

  Returns:
    A list of claims with their verdicts.
  """
  rows = []
  for rate in ('fixed', 'tuned'):

    def ratio(panel, name, measure, num_comparisons=1, rate=rate):
      losses = getattr(data[panel], rate)[measure]
      place = indices[panel]
      return statistics.ratio(
        losses[:, place[name]],
        losses[:, place[panels.PLAIN]],
        num_comparisons,
      )

    judged = []
    for panel, name, measure, expected, source, text in _statements(config):
      value = ratio(panel, name, measure)
      label = statistics.verdict(value, config.num_seeds)
      judged.append(
        _claim(config, rate, source, name, text, measure, expected, value)
        | {'verdict': _judge(expected, label)}
      )
    judged.append(_best_cell(config, rate, ratio))
    losses = getattr(data['regularised'], rate)['held_out'][:, 0]
    if not statistics.geometric_mean(losses).high < 1:
      # The plain layer has learnt nothing: that others are as good says little.
      judged = [row | {'verdict': 'undecided'} for row in judged]
    rows += judged
  return rows


def _statements(config: Any) -> list[tuple[str, str, str, str, str, str]]:
  """`(panel, layer, measure, expected, source, statement)`."""
  rows = []
  for strength in config.strengths:
    positive = panels.regularised_name('printed', strength)
    negative = panels.regularised_name('printed', -strength)
    rows += [
      ('regularised', layer, measure, expected, REGULARISED, text)
      for layer, measure, expected, text in (
        (positive, 'held_out', 'poorer', 'converges to a poorer result'),
        (negative, 'early', 'better', 'converges faster'),
        (negative, 'held_out', 'comparable', 'ends in a comparable result'),
      )
    ]
  rows += [
    ('augmented', layer, measure, expected, AUGMENTED, text)
    for layer, measure, expected, text in (
      (panels.G1, 'held_out', 'poorer', 'is poorer'),
      (panels.BOTH, 'held_out', 'poorer', 'is poorer'),
      (panels.G2, 'early', 'better', 'converges slightly faster'),
      (panels.HEAVY, 'early', 'poorer', 'starts slower'),
      (panels.HEAVY, 'held_out', 'better', 'ends in a better result'),
    )
  ]
  return rows


def _judge(expected: str, label: str) -> str:
  if label == 'inconclusive':
    return 'undecided'
  fits = {
    'better': ('better', 'slightly better'),
    'poorer': ('poorer', 'slightly poorer', statistics.DIVERGED),
    'comparable': ('comparable', 'slightly better', 'slightly poorer'),
  }[expected]
  return 'reproduced' if label in fits else 'not reproduced'


def _claim(config, rate, source, name, text, measure, expected, value):
  """A claim without its verdict."""
  slug = '-'.join(f'{name} {text}'.replace('=', '').replace(',', '').split())
  rates = {
    'fixed': f'at the fixed learning rate {config.learning_rate:g}',
    'tuned': 'with the learning rate of every layer tuned',
  }
  return {
    'id': f'modifications-{slug}-{rate}',
    'source': source,
    'claim': f'{name} {text} ({rates[rate]})',
    'statistic': f'{measure_words(config, measure)} over that of the plain '
    f'layer, geometric mean of {config.num_seeds} paired runs; reproduced if '
    f'the 95 % interval is {WORDS[expected]}',
    'value': value.value,
    'interval': None if np.isnan(value.low) else [value.low, value.high],
    'command': command(config),
  }


def _best_cell(config: Any, rate: str, ratio: Any) -> dict[str, Any]:
  """Some setting of negatives is faster, corrected for their number."""
  cells = panels.cells(config)
  names = [panels.negative_name(panels.LOWEST, *cell) for cell in cells]
  ratios = [ratio('negatives', x, 'early', len(cells)) for x in names]
  labels = [statistics.verdict(x, config.num_seeds) for x in ratios]
  best = _best(ratios, labels)
  judged = [_judge('better', label) for label in labels]
  for result in ('reproduced', 'undecided', 'not reproduced'):
    if result in judged:
      break
  row = _claim(
    config,
    rate,
    NEGATIVE,
    'negatives:',
    'some setting converges faster',
    'early',
    'better',
    ratios[best],
  )
  row['statistic'] = (
    f'{row["statistic"]} in some of {len(cells)} settings, each with the '
    f'Bonferroni level; value and interval are of {names[best]}'
  )
  return row | {'verdict': result}


def _best(ratios: list[Ratio], labels: list[str]) -> int:
  """The lowest significant ratio if there is one, else the lowest ratio."""
  return min(
    range(len(ratios)),
    key=lambda i: ('better' not in labels[i], ratios[i].value),
  )


def measure_words(config: Any, measure: str) -> str:
  """What a measure is, with its numbers."""
  return {
    'early': f'mean training loss of epochs 1-{config.early_epochs}',
    'held_out': 'loss on held-out prompts after training',
    'longer': f'loss on prompts of {config.longer_num_demonstrations} '
    'demonstrations',
    'scaled': f'loss with inputs {config.input_scale:g} times as large',
    'other_task': 'loss on prompts of matrices B never seen',
  }[measure]


def command(config: Any) -> str:
  """The command that gives these numbers."""
  flags = [
    f' --{field.name}={_flag(getattr(config, field.name))}'
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != getattr(type(config)(), field.name)
    and not (
      field.name == 'learning_rate'
      and config.learning_rate == _default_rate(config)
    )
  ]
  return 'python -m experiments.modifications --workdir=DIR' + ''.join(flags)


def _default_rate(config: Any) -> float:
  return dataclasses.replace(config, learning_rate=0.0).learning_rate


def _flag(value: Any) -> str:
  if isinstance(value, tuple):
    return ','.join(f'{x:g}' for x in value)
  return str(value).lower() if isinstance(value, bool) else str(value)
