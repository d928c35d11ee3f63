"""Strict JAX for every test: silent broadcasting is the bug of this field."""

import ctypes
import os
import pathlib
import sys

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


def pytest_collection_modifyitems(items):
  for item in items:
    name = item.path.stem
    if name.startswith('test_experiment') and name not in QUICK_EXPERIMENTS:
      item.add_marker(pytest.mark.slow)
