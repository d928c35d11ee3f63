"""Timing, verdicts and tables of the benchmark."""

import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

NOT_MEASURED = 'not measured: install iclcl_jax[bench]'
MIB = 2**20


class Compiled(NamedTuple):
  """A compiled call without arguments, and the memory it needs.

  Attributes:
    call: computes once and waits.
    temporary_mib: memory besides arguments and results, in MiB.
  """

  call: Callable[[], Any]
  temporary_mib: float


class Goal(NamedTuple):
  """A ratio that decides a claim.

  Attributes:
    what: the ratio.
    value: what was measured; None where the peer is missing.
    bound: the least or the largest value that is good enough.
    at_least: whether `bound` is the least.
  """

  what: str
  value: float | None
  bound: float
  at_least: bool = True

  def row(self) -> dict[str, Any]:
    """Returns the line of the table."""
    sign = '>=' if self.at_least else '<='
    line = {'what': self.what, 'goal': f'{sign} {self.bound:g}'}
    if self.value is None:
      return line | {'measured': NOT_MEASURED, 'met': None}
    better = self.value >= self.bound
    equal = self.value == self.bound
    met = equal or better == self.at_least
    return line | {'measured': float(self.value), 'met': met}


def compile_call(fn: Callable[..., Any], *arrays: Any) -> Compiled:
  """Compiles `fn(*arrays)` and calls it once.

  Args:
    fn: a JAX function.
    *arrays: its arguments.

  Returns:
    A `Compiled`.
  """
  executable = jax.jit(fn).lower(*arrays).compile()
  memory = executable.memory_analysis()
  temporary = math.nan if memory is None else memory.temp_size_in_bytes / MIB

  def call():
    return jax.block_until_ready(executable(*arrays))

  call()
  return Compiled(call, temporary)


def measure(
  calls: Mapping[str, Callable[[], Any] | None], repetitions: int
) -> dict[str, float]:
  """Returns the median seconds of calls that take turns.

  Before it is timed a call is made once untimed, so that it finds caches and
  threads as it leaves them itself, not as its neighbour does.

  Args:
    calls: what to call; None is left out.
    repetitions: how often.

  Returns:
    Seconds of each call.
  """
  present = {name: call for name, call in calls.items() if call is not None}
  times: dict[str, list[float]] = {name: [] for name in present}
  for _ in range(repetitions):
    for name, call in present.items():
      call()
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  return {name: statistics.median(samples) for name, samples in times.items()}


def machine() -> str:
  """Describes cores, vector instructions and versions."""
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
  names = {'avx512f': 'AVX-512', 'avx2': 'AVX2', 'asimd': 'NEON'}
  vectors = [text for flag, text in names.items() if flag in words]
  return (
    f'{os.cpu_count()} cores, {platform.machine()} '
    f'{vectors[0] if vectors else ""}, {jax.default_backend()}, '
    f'jax {jax.__version__}'
  )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """Formats rows as a Markdown table; floats get three digits."""

  def cell(value):
    if value is None:
      return ''
    if isinstance(value, bool):
      return 'yes' if value else 'no'
    return f'{value:.3g}' if isinstance(value, float) else str(value)

  lines = [list(rows[0]), ['---'] * len(rows[0])]
  lines += [[cell(value) for value in row.values()] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
