"""Malformed files: each loads or is a `ValueError`, soon and in little memory.

Mutants of two small good files: bytes changed, cut, repeated or inserted,
counts made huge, and settings of config.json and of the header replaced.
"""

import contextlib
import json
import resource
import signal
import sys

import numpy as np
import pytest

from iclcl_jax import pretrained
from iclcl_jax.pretrained import Checkpoint
from tests import gguf_families as families, pretrained_files as files

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


@pytest.fixture(params=families.FAMILIES)
def settings(request):
  """Loads a family with one of its settings replaced."""
  tensors = families.tensors_of(families.FAMILIES[request.param])
  config = families.FAMILIES[request.param].config

  def load(rng):
    scaled = config | {'rope_scaling': {'type': 'linear', 'factor': 2.0}}
    changed = mutate_json(rng, scaled if rng.random() < 0.2 else config)
    pretrained.from_checkpoint(Checkpoint(changed, tensors))

  return load


def hang(*_):
  raise TimeoutError('hangs')


@contextlib.contextmanager
def limits():
  """Bounds the growth of memory; yields a call that bounds the time of one."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  before = signal.signal(signal.SIGALRM, hang)

  def loads(call, number):
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
      call(np.random.default_rng(number))
    except ValueError:
      return False
    except BaseException as error:
      raise AssertionError(f'mutant {number}') from error
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
    return True

  try:
    yield loads
  finally:
    signal.signal(signal.SIGALRM, before)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
  assert grown < MEGABYTES * (1000 if sys.platform == 'linux' else 1_000_000)


def numbers(few, many):
  slow = pytest.param(range(few, many), marks=pytest.mark.slow)
  return pytest.mark.parametrize('numbers', [range(few), slow])


@numbers(150, 2500)
def test_a_mutant_loads_or_is_a_named_error(mutant, numbers):
  with limits() as loads:
    loaded = sum(
      loads(lambda rng: pretrained.load(mutant(rng)), n) for n in numbers
    )
  assert 0 < loaded < len(numbers)


@numbers(30, 400)
def test_a_changed_setting_is_read_or_a_named_error(settings, numbers):
  with limits() as loads:
    loaded = sum(loads(settings, number) for number in numbers)
  assert loaded < len(numbers)
