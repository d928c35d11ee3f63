"""Rotary positions as configs state them, with all their rescalings.

Each kind maps the plain frequencies to others, and may scale the rotated
coordinates. Settings stand in `rope_parameters` (transformers 5), or in
`rope_scaling` beside `rope_theta` (transformers 4), or in both.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from iclcl_jax.pretrained._config import Config
from iclcl_jax.transformer import Rotary, rotary_frequencies

# Coordinates of a head; more are a fault of the file.
_WIDEST = 2**16
_LENGTH = 'original_max_position_embeddings'


def rotary_of(
  config: Config,
  settings: Mapping[str, Any],
  width: int,
  *,
  base: float,
  partial: float | None = None,
  base_name: str = 'rope_theta',
) -> Rotary:
  """Makes a rotation of settings and config; `partial` None: of whole heads."""
  rope = Config(settings, label='the rotary setting {!r}'.format)
  stated = config.number(base_name, rope.number('rope_theta', base))
  base = rope.number('rope_theta', stated)
  if base != stated:
    raise ValueError(
      f'the base of the rotary positions is {base} in one place and '
      f'config[{base_name!r}] is {stated}; expected one. Remove the wrong one '
      'from config.json.'
    )
  if partial is None:
    for place in (config, rope):
      place.require('partial_rotary_factor', 1.0)
  part = rope.number('partial_rotary_factor', partial or 1.0)
  rotated = int(min(width * part, 2 * _WIDEST))
  if rotated % 2 or not 2 <= rotated <= min(width, _WIDEST):
    raise ValueError(
      f'{rotated} of the {width} coordinates of a head are rotated; expected '
      f'an even number of them up to {_WIDEST}, because rotary positions turn '
      'pairs. Check the sizes in config.json.'
    )
  old = rope.choice('type', _KINDS, 'default')
  kind = rope.choice('rope_type', _KINDS, rope.get('type', 'default'))
  if old not in (kind, _plain):
    raise ValueError(
      f'the rotary positions have the scalings {settings["rope_type"]!r} and '
      f'{settings["type"]!r}; expected one. Remove the wrong one from '
      'config.json.'
    )
  context = config.count('max_position_embeddings', 2048)
  original = config.count(_LENGTH, rope.count(_LENGTH, context))
  plain = np.array(rotary_frequencies(rotated, base))
  try:
    rotary = kind(plain, rope, original, context)
  except (ArithmeticError, TypeError) as error:
    raise ValueError(
      f'the rotary settings {dict(settings)} give no frequencies ({error}) for '
      f'the base {base}; expected numbers that do. Copy config.json again.'
    ) from error
  rope.check_all_read()
  return rotary


def _rotary(frequencies: np.ndarray, scale: float = 1.0, **options) -> Rotary:
  return Rotary(frequencies=tuple(frequencies.tolist()), scale=scale, **options)


def _plain(frequencies, rope, original, context):
  """Leaves the frequencies as they are."""
  return _rotary(frequencies)


def _dynamic(frequencies, rope, original, context):
  """Leaves them as they are: they change beyond the context alone."""
  rope.get('factor')
  return _rotary(frequencies)


def _linear(frequencies, rope, original, context):
  """Divides positions by a factor (Chen et al., arXiv:2306.15595)."""
  return _rotary(frequencies / rope.number('factor'))


def _llama3(frequencies, rope, original, context):
  """Stretches long waves alone (Llama team, arXiv:2407.21783)."""
  low, high = (rope.number(f'{x}_freq_factor') for x in ('low', 'high'))
  turns = original * frequencies / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return _rotary(frequencies * (kept + (1 - kept) / rope.number('factor')))


def _yarn(frequencies, rope, original, context):
  """Blends both by a ramp, raises scores (Peng et al., arXiv:2309.00071)."""
  factor = rope.number('factor', context / original)
  weights = [rope.get(name) for name in ('mscale', 'mscale_all_dim')]
  above, below = weights if all(weights) else (1.0, 0.0)
  scale = _growth(factor, above) / _growth(factor, below)
  scale = rope.number('attention_factor', scale)
  size = len(frequencies)
  step = -math.log(frequencies[1]) if size > 1 else math.inf

  def pair_with(turns):  # Of the first so many positions.
    return math.log(original / (turns * 2 * math.pi)) / step

  low = pair_with(rope.number('beta_fast', 32.0))
  high = pair_with(rope.number('beta_slow', 1.0))
  if rope.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * size - 1)
  high = high + 0.001 if low == high else high
  ramp = np.clip((np.arange(size) - low) / (high - low), 0, 1)
  return _rotary(frequencies * (1 - ramp + ramp / factor), scale)


def _growth(factor: float, weight: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def _longrope(frequencies, rope, original, context):
  """Divides each by one of two factors (Ding et al., arXiv:2402.13753)."""
  factor = rope.number('factor', context / original)
  scale = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
  scale = rope.number('attention_factor', scale)
  near, far = (
    frequencies / rope.numbers(f'{x}_factor', len(frequencies))
    for x in ('short', 'long')
  )
  return _rotary(near, scale, beyond=(original, _rotary(far, scale)))


_KINDS: dict[str, Callable[..., Rotary]] = {
  'default': _plain,
  'dynamic': _dynamic,
  'linear': _linear,
  'llama3': _llama3,
  'longrope': _longrope,
  'su': _longrope,
  'yarn': _yarn,
}
