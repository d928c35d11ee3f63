"""Rotary positions as configs state them, with all their rescalings.

Each kind maps the plain frequencies to others, and may scale the rotated
coordinates. Settings stand in `rope_parameters` (transformers 5), or in
`rope_scaling` beside `rope_theta` (transformers 4), or in both.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax.pretrained._config import Config, check_number
from iclcl_jax.transformer import Rotary, rotary_frequencies

_COMMON = ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor')

# Coordinates of a head; more are a fault of the file.
_WIDEST = 2**16


class _Settings(NamedTuple):
  """The settings of one rotation, and the lengths that it was made for."""

  fields: Mapping[str, Any]
  original: int  # Of the first training.
  context: int

  def number(self, name: str, default: float | None = None) -> float:
    value = self.fields.get(name)
    value = default if value is None else value
    expected = 'a finite positive number'
    label = f'the rotary setting {name!r}'
    return float(check_number(label, value, int | float, expected))

  def numbers(self, name: str, size: int) -> np.ndarray:
    values = self.fields.get(name)
    if not isinstance(values, list) or len(values) != size:
      raise ValueError(
        f'the rotary setting {name!r} is {values!r}; expected {size} numbers, '
        'one for each rotated pair.'
      )
    label, expected = f'an entry of {name!r}', 'a finite positive number'
    kind = int | float
    return np.array([check_number(label, x, kind, expected) for x in values])


def read_rotary(
  decoder: Any,
  *,
  base: float = 1e4,
  settings: Mapping[str, Any] | None = None,
  **options: Any,
) -> Rotary:
  """Reads the rotation that all layers of a decoder share.

  The number `base`, the rotated part of a head and the rescaling stand in for
  a config that does not say; `partial` is None where all is always rotated.
  """
  config = decoder.config
  new = _object(config, 'rope_parameters')
  old = _object(config, 'rope_scaling')
  if {**new, **old} != {**old, **new}:
    raise ValueError(
      f"config['rope_parameters'] is {new!r}, config['rope_scaling'] {old!r}; "
      'expected the same settings. Remove the wrong ones from config.json.'
    )
  stated = {**new, **old} or settings or {}
  return rotary_of(config, stated, decoder.d_k, base=base, **options)


def rotary_of(
  config: Config,
  settings: Mapping[str, Any],
  width: int,
  *,
  base: float,
  partial: float | None = None,
  base_name: str = 'rope_theta',
) -> Rotary:
  """Makes a rotation of its settings; others are read from the config."""
  if not isinstance(settings, Mapping):
    raise ValueError(
      f'the settings of rotary positions are {settings!r}; expected a JSON '
      'object or null. Copy config.json again.'
    )
  stated = [settings.get('rope_theta'), config.get(base_name)]
  for number in [base, *(x for x in stated if x is not None)]:
    label = 'the base of the rotary positions'
    base = check_number(label, number, int | float, 'b >= 1')
  if None not in stated and stated[0] != stated[1]:
    raise ValueError(
      f'the base of the rotary positions is {stated[0]} in one place and '
      f'config[{base_name!r}] is {stated[1]}; expected one. Remove the wrong '
      'one from config.json.'
    )
  name = 'partial_rotary_factor'
  if partial is None:
    config.require(name, 1.0)
    Config(settings).require(name, 1.0)
  part = settings.get(name, partial) or 1.0
  check_number(name, part, int | float, 'a part of a head')
  rotated = int(width * part)
  if rotated % 2 or not 2 <= rotated <= min(width, _WIDEST):
    raise ValueError(
      f'{rotated} of the {width} coordinates of a head are rotated; expected '
      f'an even number of them up to {_WIDEST}, because rotary positions turn '
      'pairs. Check the sizes in config.json.'
    )
  old = settings.get('type', 'default')
  kind = settings.get('rope_type', old)
  if not isinstance(kind, str) or kind not in _KINDS:
    raise ValueError(
      f'the rotary positions have the scaling {kind!r}; expected one of '
      f'{", ".join(_KINDS)}. Others are not supported.'
    )
  if old != 'default' and _KINDS[kind] != _KINDS.get(str(old)):
    raise ValueError(
      f'the rotary positions have the scalings {kind!r} and {old!r}; expected '
      'one. Remove the wrong one from config.json.'
    )
  rescale, names = _KINDS[kind]
  known = {*_COMMON, *names, 'original_max_position_embeddings'}
  rest = {k: v for k, v in settings.items() if v is not None}
  unknown = sorted(set(rest) - known)
  if unknown:
    raise ValueError(
      f'the rotary setting {unknown[0]!r} is {rest[unknown[0]]!r}, which the '
      f'scaling {kind!r} does not know; expected none but {sorted(known)}.'
    )
  context = config.count('max_position_embeddings', 2048)
  original = config.get('original_max_position_embeddings')
  if original is None:
    original = rest.get('original_max_position_embeddings', context)
  original = check_number(
    'original_max_position_embeddings', original, int, 'a positive integer'
  )
  plain = np.array(rotary_frequencies(rotated, base))
  try:
    return rescale(plain, _Settings(rest, original, context))
  except (ArithmeticError, TypeError) as error:
    raise ValueError(
      f'the rotary settings {rest} give no frequencies ({error}) for the base '
      f'{base}; expected numbers that do. Copy config.json again.'
    ) from error


def _object(config: Config, name: str) -> Mapping[str, Any]:
  found = config.get(name, {})
  if not isinstance(found, Mapping):
    raise ValueError(
      f'config[{name!r}], the settings of the rotary positions, is {found!r}; '
      'expected a JSON object or null. Copy config.json again.'
    )
  return found


def _rotary(frequencies: np.ndarray, scale: float = 1.0, **options) -> Rotary:
  return Rotary(frequencies=tuple(frequencies.tolist()), scale=scale, **options)


def _plain(frequencies, settings):
  """As they are; `dynamic` changes nothing within the context."""
  return _rotary(frequencies)


def _linear(frequencies, settings):
  """Positions divided by a factor (Chen et al., arXiv:2306.15595)."""
  return _rotary(frequencies / settings.number('factor'))


def _llama3(frequencies, settings):
  """Only long waves are stretched (Llama team, arXiv:2407.21783)."""
  factor = settings.number('factor')
  low = settings.number('low_freq_factor')
  high = settings.number('high_freq_factor')
  turns = settings.original * frequencies / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return _rotary(frequencies * (kept + (1 - kept) / factor))


def _yarn(frequencies, settings):
  """A ramp between both, and larger scores (Peng et al., arXiv:2309.00071)."""
  fields = settings.fields
  factor = settings.number('factor', settings.context / settings.original)
  scale = fields.get('attention_factor')
  if scale is None:
    scale = _growth(factor)
    if fields.get('mscale') and fields.get('mscale_all_dim'):
      scale = _growth(factor, settings.number('mscale'))
      scale /= _growth(factor, settings.number('mscale_all_dim'))
  size = len(frequencies)
  step = -math.log(frequencies[1]) if size > 1 else math.inf

  def pair_with(turns):  # Of the first so many positions.
    return math.log(settings.original / (turns * 2 * math.pi)) / step

  low = pair_with(settings.number('beta_fast', 32.0))
  high = pair_with(settings.number('beta_slow', 1.0))
  if fields.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * size - 1)
  high = high + 0.001 if low == high else high
  ramp = np.clip((np.arange(size) - low) / (high - low), 0, 1)
  return _rotary(frequencies * (1 - ramp + ramp / factor), float(scale))


def _growth(factor: float, weight: float = 1.0) -> float:
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def _longrope(frequencies, settings):
  """A factor for each pair, others far out (Ding et al., arXiv:2402.13753)."""
  factor = settings.number('factor', settings.context / settings.original)
  scale = settings.fields.get('attention_factor')
  if scale is None:
    growth = math.log(max(factor, 1)) / math.log(settings.original)
    scale = math.sqrt(1 + growth)
  near, far = (
    frequencies / settings.numbers(name, len(frequencies))
    for name in ('short_factor', 'long_factor')
  )
  beyond = settings.original, _rotary(far, float(scale))
  return _rotary(near, float(scale), beyond=beyond)


_LONG = (
  _longrope,
  ('factor', 'attention_factor', 'short_factor', 'long_factor'),
)
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
  'default': (_plain, ()),
  'linear': (_linear, ('factor',)),
  'dynamic': (_plain, ('factor',)),
  'llama3': (_llama3, ('factor', 'low_freq_factor', 'high_freq_factor')),
  'yarn': (
    _yarn,
    (
      *('factor', 'attention_factor', 'beta_fast', 'beta_slow', 'mscale'),
      *('mscale_all_dim', 'truncate'),
    ),
  ),
  'longrope': _LONG,
  'su': _LONG,
}
