"""Which layers `experiments.modifications` compares: three panels.

Every panel starts with the plain layer. Modifications that the papers name
come first, controls after them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import modifications_augmented as augmented
from experiments import modifications_layers as layers
from experiments import pretraining
from experiments.modifications_layers import Group
from experiments.modifications_training import Panel

PLAIN = 'plain'
_DIM, _LABELS = pretraining.TOKEN_DIM, pretraining.LABEL_DIM
# Trained numbers: queries and keys, and the label column of the values.
_PROJECTION, _VALUE = _DIM * _DIM, _DIM * _LABELS
_TWO_LAYER = 2 * _DIM * augmented.HIDDEN_DIM
_PLAIN_PARAMS = 2 * _PROJECTION + _VALUE
HEAVY_PARAMS = _PROJECTION + _TWO_LAYER + _VALUE
ADAPTER_PARAMS = 2 * _PROJECTION + _TWO_LAYER + _VALUE

G1, G2, BOTH = 'g1 (values)', 'g2 (keys)', 'g1 and g2'
HEAVY, ADAPTER = 'heavy g2', 'adapter g2'


def regularised_name(form: str, alpha: float) -> str:
  """Name of a regularised layer; `form` is printed or strict."""
  return f'{form} alpha={alpha:+g}'


def untied_name(strength: float) -> str:
  """Name of the control with a residual path of its own."""
  return f'untied residual {strength:g}'


def wide_name(num_params: int) -> str:
  """Name of the plain layer with this many parameters, or one as wide."""
  return f'plain, d_k={matched_width(num_params)}'


def negative_name(choice: str, count: int, strength: float) -> str:
  """Name of a layer with negatives; `choice` is a key of `CHOICES`."""
  return f'{choice} k={count} beta={strength:g}'


def matched_width(num_params: int) -> int:
  """Width `d_k` of the plain layer of nearest size."""
  return round((num_params - _VALUE) / (2 * _DIM))


# How negatives are chosen, and settings that say so. All others are controls.
LOWEST = 'lowest'
CHOICES: dict[str, dict[str, float]] = {
  LOWEST: {},
  'random': {'by_score': 0.0, 'by_noise': 1.0},
  'highest': {'by_score': -1.0},
  'lowest unnormalised': {'raise_others': 0.0},
}


def panels(config: Any) -> tuple[Panel, ...]:
  """The panels of a config, in the order of the papers."""
  return _regularised(config), _augmented(), _negative(config)


def _regularised(config: Any) -> Panel:
  settings = {PLAIN: layers.Regularised()}
  alphas = [s * x for x in config.strengths for s in (1.0, -1.0)]
  for alpha in sorted(alphas, reverse=True):
    settings[regularised_name('printed', alpha)] = layers.Regularised(
      printed=alpha
    )
  for alpha in sorted(alphas, reverse=True):
    settings[regularised_name('strict', alpha)] = layers.Regularised(
      strict=alpha
    )
  for strength in sorted(config.strengths, reverse=True):
    settings[untied_name(strength)] = layers.Regularised(untied=strength)
  sizes = dict.fromkeys(settings, _PLAIN_PARAMS)
  sizes |= {untied_name(x): _PLAIN_PARAMS + _VALUE for x in config.strengths}
  group = Group(
    names=tuple(settings),
    settings=_stack(list(settings.values())),
    init=layers.init_regularised,
    predict=layers.predict_regularised,
    num_params=tuple(sizes.values()),
  )
  return Panel(name='regularised', title='regularised', groups=(group,))


def _augmented() -> Panel:
  new, old = augmented.Augmented, _PLAIN_PARAMS
  rows: dict[str, tuple[Any, int]] = {
    PLAIN: (new(), old),
    G1: (new(value_gelu=1.0), old),
    G2: (new(linear=0.0, gelu=1.0), old),
    BOTH: (new(linear=0.0, gelu=1.0, value_gelu=1.0), old),
    HEAVY: (new(linear=0.0, two_layer=1.0), HEAVY_PARAMS),
    ADAPTER: (new(two_layer=1.0), ADAPTER_PARAMS),
  }
  narrow = Group(
    names=tuple(rows),
    settings=_stack([settings for settings, _ in rows.values()]),
    init=augmented.init_augmented,
    predict=augmented.predict_augmented,
    num_params=tuple(size for _, size in rows.values()),
  )
  return Panel(
    name='augmented', title='augmented', groups=(narrow, _wide_group())
  )


def _wide_group() -> Group:
  """Plain layers with as many parameters as the augmented ones."""
  matched = HEAVY_PARAMS, ADAPTER_PARAMS
  widths = [matched_width(size) for size in matched]
  return Group(
    names=tuple(wide_name(size) for size in matched),
    settings=_stack([augmented.Wide(float(width)) for width in widths]),
    init=augmented.init_wide(max(widths)),
    predict=augmented.predict_wide,
    num_params=tuple(2 * _DIM * width + _VALUE for width in widths),
  )


def _negative(config: Any) -> Panel:
  own = float(config.own_token_may_be_negative)
  settings: dict[str, Any] = {PLAIN: layers.Negative()}
  for choice, options in CHOICES.items():
    for count, strength in choice_cells(config, choice):
      settings[negative_name(choice, count, strength)] = layers.Negative(
        num_negatives=float(count), strength=strength, own=own, **options
      )
  group = Group(
    names=tuple(settings),
    settings=_stack(list(settings.values())),
    init=layers.init_plain,
    predict=layers.predict_negative,
    num_params=(_PLAIN_PARAMS,) * len(settings),
  )
  return Panel(name='negatives', title='negative samples', groups=(group,))


def cells(config: Any) -> list[tuple[int, float]]:
  """All pairs of a number of negatives and a strength."""
  return [
    (count, strength)
    for count in config.negative_counts
    for strength in config.negative_strengths
  ]


def choice_cells(config: Any, choice: str) -> list[tuple[int, float]]:
  """Cells in which a choice is tried: weak negatives have all controls."""
  if choice in (LOWEST, 'random'):
    return cells(config)
  return [
    cell for cell in cells(config) if cell[1] == min(config.negative_strengths)
  ]


def published(config: Any) -> Mapping[str, Sequence[str]]:
  """The layers of each panel that the papers name, without controls."""
  signed = [s * x for x in config.strengths for s in (1.0, -1.0)]
  alphas = sorted(signed, reverse=True)
  return {
    'regularised': [regularised_name('printed', a) for a in alphas],
    'augmented': [G1, G2, BOTH, HEAVY, ADAPTER],
    'negatives': [negative_name(LOWEST, *cell) for cell in cells(config)],
  }


def controls(config: Any) -> list[tuple[str, str, str]]:
  """Pairs `(panel, modification, its control)`."""
  pairs = [
    ('regularised', regularised_name('printed', -x), untied_name(x))
    for x in config.strengths
  ]
  pairs += [
    ('augmented', HEAVY, wide_name(HEAVY_PARAMS)),
    ('augmented', ADAPTER, wide_name(ADAPTER_PARAMS)),
  ]
  for choice in CHOICES:
    if choice != LOWEST:
      pairs += [
        (
          'negatives',
          negative_name(LOWEST, *cell),
          negative_name(choice, *cell),
        )
        for cell in choice_cells(config, choice)
      ]
  return pairs


def _stack(settings: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *x: np.asarray(x, np.float32), *settings)
