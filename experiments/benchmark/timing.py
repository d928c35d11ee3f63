"""Timing, verdicts and tables of the benchmark, and what is timed."""

import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.lab import Config
from iclcl_jax import features, projections

NOT_MEASURED = 'not measured: install iclcl_jax[bench]'
MIB = 2**20
Call = Callable[[], Any]
Calls = dict[str, Call | None]  # None: the peer is not installed.
Seconds = dict[str, float]  # By call; absent peers are left out.


class Compiled(NamedTuple):
  call: Call  # Computes once and waits.
  temporary_mib: float  # Memory besides arguments and results, in MiB.


class Goal(NamedTuple):
  what: str  # The ratio.
  value: float | None  # What was measured; None where the peer is missing.
  bound: float  # The least or the largest value that is good enough.
  at_least: bool = True  # Whether `bound` is the least.

  def row(self) -> dict[str, Any]:
    sign = '>=' if self.at_least else '<='
    line = {'what': self.what, 'goal': f'{sign} {self.bound:g}'}
    if self.value is None:
      return line | {'measured': NOT_MEASURED, 'met': None}
    better = self.value >= self.bound
    equal = self.value == self.bound
    met = equal or better == self.at_least
    return line | {'measured': float(self.value), 'met': met}


class Rows(NamedTuple):
  group: str  # What was called.
  goals: Sequence[Goal]  # Ratios with their bounds.
  seconds: Seconds  # Of each call, and of the matrix product.
  operations: Mapping[str, int]  # Of calls that the product is compared with.

  def timings(self, config: Config) -> list[dict[str, Any]]:
    """One line for each call; `matmul` counts its own operations."""
    counted = {'matmul': 2 * config.matmul_size**3, **self.operations}
    return [
      {
        'group': self.group,
        'call': name,
        'seconds': value,
        'of_matmul_rate': fraction(config, self.seconds, name, counted[name])
        if name in counted
        else None,
      }
      for name, value in self.seconds.items()
    ]


def speed_goal(seconds: Seconds, ours: str, peer: str, bound: float) -> Goal:
  value = ratio(seconds, peer, ours)
  return Goal(f'{ours}: speed / speed of {peer}', value, bound)


def ratio(seconds: Seconds, first: str, second: str) -> float | None:
  if first not in seconds or second not in seconds:
    return None
  return seconds[first] / seconds[second]


def rate_goal(
  config: Config, seconds: Seconds, name: str, operations: int, bound: float
) -> Goal:
  """That fraction of the rate of the matrix product."""
  value = fraction(config, seconds, name, operations)
  return Goal(f'{name}: rate / rate of matmul', value, bound)


def fraction(config: Config, seconds: Seconds, name: str, operations: int):
  rate = 2 * config.matmul_size**3 / seconds['matmul']
  return operations / seconds[name] / rate


def compile_call(fn: Callable[..., Any], *arrays: Any) -> Compiled:
  executable = jax.jit(fn).lower(*arrays).compile()
  memory = executable.memory_analysis()
  temporary = math.nan if memory is None else memory.temp_size_in_bytes / MIB

  def call():
    return jax.block_until_ready(executable(*arrays))

  call()
  return Compiled(call, temporary)


def repeated(call: Call, times: int) -> Call:
  def calls():
    for _ in range(times):
      call()

  return calls


def measure(calls: Mapping[str, Call | None], repetitions: int) -> Seconds:
  """Median seconds of calls that take turns; None is left out.

  Each follows an untimed call of its own, which leaves it caches and threads.
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


def heads(config: Config, length: int) -> tuple[jax.Array, ...]:
  """Queries, keys and values `[H, N, d]` of moderate norm."""
  shape = 3, config.num_heads, length, config.dim
  key = jax.random.fold_in(jax.random.key(config.seed), length)
  return tuple(jax.random.normal(key, shape, jnp.float32) / 2)


def by_map(fn: Callable[..., Any]) -> Callable[..., Any]:
  return lambda *heads: jax.lax.map(lambda head: fn(*head), heads)


def feature_map(config: Config) -> features.PositiveFeatures:
  projection = projections.orthogonal(
    jax.random.key(config.seed), config.num_features, config.dim
  )
  return features.PositiveFeatures(projection.astype(jnp.float32))


def matmul(config: Config) -> Call:
  shape = config.matmul_size, config.matmul_size
  matrix = jax.random.normal(jax.random.key(config.seed), shape, jnp.float32)
  return compile_call(jnp.dot, matrix, matrix).call


def beside_matmul(config: Any, calls: Mapping[str, Call | None]) -> Seconds:
  """Median seconds of calls that take turns with the matrix product."""
  return measure({**calls, 'matmul': matmul(config)}, config.repetitions)


def machine() -> str:
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
