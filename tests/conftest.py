"""Strict JAX for every test: silent broadcasting is the bug of this field."""

import os

import jax
import pytest

# Tests check numbers, not speed, and their time is compiling: these flags halve
# it. XLA aborts on a flag that it does not know, hence the bound; flags of the
# environment come last and win.
if jax.__version_info__ < (0, 11):
  QUICK_COMPILATION = (
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
  )
  os.environ['XLA_FLAGS'] = ' '.join(
    (*QUICK_COMPILATION, os.environ.get('XLA_FLAGS', ''))
  ).strip()

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_enable_x64', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_debug_key_reuse', True)


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
