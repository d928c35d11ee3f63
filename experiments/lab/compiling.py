"""How an experiment computes: in float64, or with less compiling."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.experimental


@contextlib.contextmanager
def float64_on_host() -> Iterator[None]:
  """Computes in float64 on the CPU: accelerators may have no float64.

  A context, or a decorator: `@lab.float64_on_host()`. Products are as precise
  as they can be.
  """
  # Older versions have it in jax.experimental alone, newer ones in jax alone.
  home: Any = jax if hasattr(jax, 'enable_x64') else jax.experimental
  host = jax.default_device(jax.devices('cpu')[0])
  with home.enable_x64(True), host, jax.default_matmul_precision('highest'):
    yield


def compile_quickly(
  fn: Callable[..., Any], *, static_argnames: str | Sequence[str] = ()
) -> Callable[..., Any]:
  """`jax.jit` for what runs once: less compiling, perhaps slower code."""

  @functools.cache
  def compiled():  # At the first call: an import must not start JAX.
    options = _quick_options()
    return jax.jit(
      fn, static_argnames=static_argnames, compiler_options=options
    )

  call: Any = functools.wraps(fn)(lambda *x, **more: compiled()(*x, **more))
  call.lower = lambda *x, **more: compiled().lower(*x, **more)
  return call


def compute(fn: Callable[..., Any], *arguments: Any) -> Any:
  """What `fn` returns, as NumPy arrays: one program that runs once."""
  return jax.device_get(compile_quickly(fn)(*arguments))


def compute_each(fn: Callable[..., Any], *arrays: Any) -> Any:
  """Computes `fn` row by row in one program; returns NumPy arrays."""
  return compute(lambda *x: jax.lax.map(lambda row: fn(*row), x), *arrays)


def compile_unoptimised() -> None:
  """Lets this process compile without optimising, for tests and tiny runs.

  To be called before JAX computes anything. XLA aborts on a flag that it does
  not know, so newer versions are left alone; flags of the environment win.
  """
  if jax.__version_info__ >= (0, 13):
    return
  flags = [
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
  ]
  if jax.__version_info__ >= (0, 11):  # At 0, equal terms round differently.
    flags += ['--xla_backend_optimization_level=1']
  else:
    flags += [
      '--xla_backend_optimization_level=0',
      '--xla_cpu_use_fusion_emitters=false',
    ]
  flags.append(os.environ.get('XLA_FLAGS', ''))
  os.environ['XLA_FLAGS'] = ' '.join(flags).strip()


@functools.cache
def _quick_options() -> dict[str, Any]:
  """Options of the CPU compiler, if this version knows them.

  The environment wins. The split is set even so, or tests would not see a
  program inside another, which may have no options.
  """
  options = {
    'xla_backend_optimization_level': 1,
    'xla_cpu_use_fusion_emitters': False,
  }
  taken = os.environ.get('XLA_FLAGS', '')
  options = {k: v for k, v in options.items() if k not in taken}
  options['xla_cpu_parallel_codegen_split_count'] = 2
  try:
    jax.jit(lambda x: x + 1, compiler_options=options)(1)
  except jax.errors.JaxRuntimeError:  # No such option, or another platform.
    return {}
  return options
