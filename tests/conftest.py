"""Strict JAX for every test: silent broadcasting is the bug of this field."""

import collections
import ctypes
import os
import pathlib
import sys
import zlib

import jax
import pytest

from experiments.lab import compiling

# Tests check numbers, not speed, and their time is compiling: this halves it.
compiling.compile_unoptimised()
if 'JAX_PLATFORMS' not in os.environ:  # JAX's own option chooses another.
  jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_enable_x64', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_debug_key_reuse', True)


collect_ignore = ['on_devices.py']  # It needs a process of its own.
MAX_MEMORY = 5 * 2**28  # Bytes of a worker beyond which it forgets.


def pytest_runtest_teardown():
  """Forgets compiled functions: those of all tests would take gigabytes."""
  if sys.platform != 'linux':
    return
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  if pages * os.sysconf('SC_PAGESIZE') > MAX_MEMORY:
    jax.clear_caches()
    # The allocator of glibc keeps what is freed.
    getattr(ctypes.CDLL(None), 'malloc_trim', lambda _: None)(0)


@pytest.fixture
def patch(monkeypatch):
  """Replaces a part of the library, and forgets what was compiled with it."""

  def replace(*target):
    monkeypatch.setattr(*target)
    jax.clear_caches()

  yield replace
  jax.clear_caches()


@pytest.fixture(params=['float32', 'float64'])
def dtype(request):
  """The dtype of the inputs; results follow it."""
  return jax.numpy.dtype(request.param)


# Whole experiments, tiny: seconds of compilation each. `make test` runs that of
# the demo, `-m slow` the others.
QUICK_EXPERIMENTS = ('test_experiment_equivalence',)


def pytest_addoption(parser):
  parser.addoption(
    '--one-of-each',
    action='store_true',
    help='run each test with one of its sets of parameters, the same each time',
  )


def pytest_collection_modifyitems(config, items):
  for item in items:
    name = item.path.stem
    if name.startswith('test_experiment') and name not in QUICK_EXPERIMENTS:
      item.add_marker(pytest.mark.slow)
  if config.getoption('one_of_each'):
    chosen = _one_of_each(items)
    left_out = [item for item in items if item not in chosen]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item in chosen]


def _one_of_each(items):
  """One case of each test, and all notebooks."""
  cases = collections.defaultdict(list)
  for item in items:
    name = item.nodeid.partition('[')[0]
    whole = item.get_closest_marker('slow') or 'notebook' in name
    cases[item.nodeid if whole else name].append(item)
  # By its name: which one it is does not change as tests come and go.
  return {x[zlib.crc32(name.encode()) % len(x)] for name, x in cases.items()}
