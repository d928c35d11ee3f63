"""Strict JAX for every test: silent broadcasting is the bug of this field."""

import jax
import pytest

from experiments.lab import compiling

# Tests check numbers, not speed, and their time is compiling: this halves it.
compiling.compile_unoptimised()
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_enable_x64', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_debug_key_reuse', True)


@pytest.fixture(autouse=True, scope='module')
def _forget_compiled_functions():
  """Files share few compiled functions; those of all of them take gigabytes."""
  yield
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
