"""Malformed files: each loads or is a `ValueError`, soon and in little memory.

Mutants of two small good files: bytes changed, cut, repeated or inserted,
counts made huge, and settings of config.json and of the header replaced.
"""

import json
import resource
import signal
import sys
import time

import numpy as np
import pytest

from iclcl_jax import pretrained
from tests import pretrained_files as files

SECONDS, MEGABYTES = 5, 300
NUMBERS = [
  0,
  1,
  2,
  3,
  8,
  2**15,
  2**31,
  2**32 - 1,
  2**40,
  2**62,
  2**63,
  2**64 - 1,
]
VALUES = [
  *(-1, 0, 1, 3, 2**31, 2**70, 1e-300, 1e300, 0.5, -0.0),
  *(float('nan'), float('inf'), True, None, '', 'x', 'F64', 'gelu', 'gpt2'),
  *([], {}, [[]], [0, 8], [8, 0], [2**62, 2**62], {'a': 1}, {'type': 'yarn'}),
]


def mutate_bytes(rng, content, header):
  """Changes up to three places, mostly in the header."""
  content = bytearray(content)
  for _ in range(rng.integers(1, 4)):
    end = min(header if rng.random() < 0.8 else len(content), len(content))
    place = int(rng.integers(0, max(end, 1)))
    kind = rng.integers(0, 6)
    if kind == 0:
      content[place : place + 1] = bytes(rng.integers(0, 256, 1, np.uint8))
    elif kind == 1:
      size = int(rng.choice([4, 8]))
      number = int(rng.choice(np.array(NUMBERS, object))) % 256**size
      content[place : place + size] = number.to_bytes(size, 'little')
    elif kind == 2:
      content[place:] = b''
    elif kind == 3:
      content[place:place] = content[place : place + int(rng.integers(1, 99))]
    elif kind == 4:
      del content[place : place + int(rng.integers(1, 99))]
    else:
      content[place : place + 8] = bytes(rng.integers(0, 256, 8, np.uint8))
  return bytes(content)


def mutate_json(rng, value):
  """Replaces one value somewhere in a JSON object."""
  value = json.loads(json.dumps(value))
  place = value
  while True:
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = keys[int(rng.integers(len(keys)))]
    inner = place[key]
    if not (isinstance(inner, dict | list) and inner and rng.random() < 0.8):
      break
    place = inner
  new = VALUES[int(rng.integers(len(VALUES)))]
  if isinstance(place, dict) and rng.random() < 0.1:
    del place[key]
  else:
    place[key] = new
  return value


def mutate_header(rng, content):
  """Replaces one value of the JSON header of a safetensors file."""
  size = int.from_bytes(content[:8], 'little')
  header = mutate_json(rng, json.loads(content[8 : 8 + size]))
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text + content[8 + size :]


@pytest.fixture(params=['safetensors', 'gguf'])
def mutant(request, tmp_path):
  """Writes the mutant of a number; returns its path."""
  if request.param == 'gguf':
    path = files.write_gguf(tmp_path / 'model.gguf', files.tensors())
    good = path.read_bytes()

    def write(rng):
      path.write_bytes(mutate_bytes(rng, good, 5_600))
      return path

    return write
  directory = files.write_directory(tmp_path / 'hf', files.tensors())
  weights, config = directory / 'model.safetensors', directory / 'config.json'
  good = weights.read_bytes(), files.CONFIG

  def write_directory(rng):
    kind, content, settings = rng.integers(0, 3), *good
    if kind == 0:
      settings = mutate_json(rng, settings | {'rope_parameters': {'x': 1}})
    elif kind == 1:
      content = mutate_header(rng, content)
    else:
      content = mutate_bytes(rng, content, 4_000)
    config.write_text(json.dumps(settings))
    weights.write_bytes(content)
    return directory

  return write_directory


def hang(*_):
  raise TimeoutError('hangs')


@pytest.mark.parametrize(
  'numbers',
  [range(150), pytest.param(range(150, 2500), marks=pytest.mark.slow)],
)
def test_a_mutant_loads_or_is_a_named_error(mutant, numbers):
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  before = signal.signal(signal.SIGALRM, hang)
  loaded = 0
  try:
    for number in numbers:
      path = mutant(np.random.default_rng(number))
      signal.setitimer(signal.ITIMER_REAL, SECONDS)
      started = time.monotonic()
      try:
        pretrained.load(path)
        loaded += 1
      except ValueError:
        pass
      except BaseException as error:
        raise AssertionError(f'mutant {number}') from error
      assert time.monotonic() - started < SECONDS, number
      signal.setitimer(signal.ITIMER_REAL, 0)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
  assert grown < MEGABYTES * (1000 if sys.platform == 'linux' else 1_000_000)
  assert 0 < loaded < len(numbers)
