r"""Demonstrations sharded over devices: what is sent, what is exact, how fast.

One gradient step on a million demonstrations, softmax readings and a causal
pass, on 1, 2, 4 and 8 devices::

  python -m experiments.scaling --workdir=out/scaling

Bytes are read off the compiled programs. The devices share the cores of one
machine: their time says what sharding costs, not what more chips bring. It
takes two minutes of CPU time. Expect bytes that do not depend on the number of
demonstrations, a residual of the certificate across devices below 1e-15
(float64), and on 8 devices about the time of one.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import figures as drawing, statistics
from iclcl_jax import attention, dual, features, kernels, projections

SOURCE = 'Ren & Liu, arXiv:2310.13220, Theorem 3.1'
EXACT = 1e-12
AXIS, WIDTH, LESS, CHUNK_SIZE = 'devices', 16, 16, 1024
SPLIT, WHOLE = jax.P(AXIS), jax.P()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_demonstrations: int = lab.option(
    2**20, 'demonstrations of the timed step', minimum=64, tiny=4096
  )
  devices: tuple[int, ...] = lab.count(
    (1, 2, 4, 8), 'numbers of devices', increasing=True, tiny=(1, 2)
  )
  num_features: int = lab.count(64, 'features', tiny=16)
  num_queries: int = lab.count(16, 'queries')
  num_runs: int = lab.option(5, 'timed runs', minimum=2)

  def check(self):
    compared = self.devices[0] == 1 < len(self.devices)
    self.require(compared, 'devices', '1, and more to compare it with')
    self.require(
      all(self.num_demonstrations % (LESS * n) == 0 for n in self.devices),
      'num_demonstrations',
      f'a multiple of {LESS} times every number of devices',
    )


class Results(NamedTuple):
  """What was found, by number of devices."""

  less_bytes: np.ndarray  # As below, of a sixteenth of the demonstrations.
  bytes: np.ndarray  # Sent in a step, for readings, causally, `[n, 3]`.
  seconds: np.ndarray  # Of the step. Shape `[n, runs]`.
  residuals: np.ndarray  # With features, with the exact softmax, `[n, 2]`.


def measure(config: Config) -> Results:
  """Asks a process of its own for every number of devices."""
  options = {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_X64': '1'}
  found = []
  for count in config.devices:
    result = subprocess.run(
      [sys.executable, '-c', 'from experiments.scaling import *; answer()'],
      input=json.dumps(dataclasses.asdict(config)),
      env=os.environ | options | {'JAX_NUM_CPU_DEVICES': str(count)},
      capture_output=True,
      text=True,
      check=False,
    )
    if result.returncode:
      raise RuntimeError(f'on {count} devices: {result.stderr}')
    found.append(json.loads(result.stdout.splitlines()[-1]))
  return Results(*(np.array(column) for column in zip(*found, strict=True)))


def answer() -> None:
  """Prints the `Results` of this process's devices; reads the config."""
  config = Config(**json.load(sys.stdin))
  size = config.num_demonstrations
  fewer, all_of_them = (_compile(config, n) for n in (size // LESS, size))
  sent = [
    [collective_bytes(program.as_text()) for program, _ in programs]
    for programs in (fewer, all_of_them)
  ]
  step, rows = all_of_them[0]
  seconds = []
  for _ in range(config.num_runs + 1):
    start = time.perf_counter()
    jax.block_until_ready(step(*rows))
    seconds.append(time.perf_counter() - start)
  print(json.dumps([*sent, seconds[1:], _residuals(config, size // LESS)]))


def collective_bytes(program: str) -> int:
  """Returns the bytes that the collectives of a compiled program produce.

  Example:
    >>> collective_bytes('x = f32[2,3]{1,0} all-reduce(y), channel_id=1')
    24
  """
  kinds = 'all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter'
  total = 0
  for result in re.findall(rf'= (.*?) (?:{kinds})(?:-start)?\(', program):
    for bits, shape in re.findall(r'[a-z](\d+)\[([\d,]*)\]', result):
      axes = [int(axis) for axis in shape.split(',') if axis]
      total += int(bits) // 8 * int(np.prod(axes, dtype=int))
  return total


def learn(phi, keys, values):
  """One gradient step on the demonstrations of all devices."""
  state = dual.empty(phi, keys, values)
  state = dual.one_step(phi, state, keys, values, chunk_size=CHUNK_SIZE)
  return dual.all_merge(state, AXIS)


def attend(queries, keys, values):
  """Softmax attention of all queries to the keys of all devices."""
  kernel = kernels.ExponentialKernel()
  state = dual.zero_shot(kernel, keys, values)
  readings = jax.lax.map(lambda q: dual.read(kernel, state, q), queries)
  merged = jax.vmap(lambda reading: dual.all_merge(reading, AXIS))(readings)
  return merged.numerator / merged.denominator[:, None]


def causal(phi, keys, values):
  """Causal attention of a sequence whose parts the devices hold."""
  state = dual.empty(phi, keys, values)
  state = dual.one_step(phi, state, keys, values, chunk_size=CHUNK_SIZE)
  past = dual.prefix_merge(state, AXIS)
  return attention.causal_kernel_attention(phi, keys, keys, values, start=past)


def _draw(config: Config, size: int, dtype: Any):
  first, *keys = jax.random.split(jax.random.key(config.seed), 4)
  counts = config.num_queries, size, size
  arrays = (
    jax.random.normal(key, (count, WIDTH), dtype)
    for key, count in zip(keys, counts, strict=True)
  )
  shape = config.num_features, WIDTH
  directions = projections.orthogonal(first, *shape, dtype=dtype)
  return features.PositiveFeatures(directions), *arrays


def _spread(fn, in_specs, out_specs, mesh):
  spread = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
  return jax.jit(spread)


def _mesh():
  kinds = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=kinds)


def _compile(config: Config, size: int):
  """The three programs, each with its arguments."""
  mesh = _mesh()
  phi, queries, *rows = _draw(config, size, jnp.float32)
  rows = jax.device_put(rows, jax.sharding.NamedSharding(mesh, SPLIT))
  both = SPLIT, SPLIT
  programs = (
    (functools.partial(learn, phi), both, WHOLE, rows),
    (attend, (WHOLE, *both), WHOLE, [queries, *rows]),
    (functools.partial(causal, phi), both, SPLIT, rows),
  )
  return [
    (_spread(fn, ins, out, mesh).lower(*arguments).compile(), arguments)
    for fn, ins, out, arguments in programs
  ]


def _residuals(config: Config, size: int) -> list[float]:
  """The certificate across devices, in float64.

  Attention on one device beside a descent by `jax.grad` on every device, whose
  readings are merged; relative to the sum of what was added.
  """
  phi, queries, *rows = _draw(config, size, jnp.float64)
  query = queries[0]

  def learnt(phi, keys, values):
    state = dual.empty(phi, keys, values)
    state = dual.one_step_autodiff(phi, state, keys, values)
    reading = dual.all_merge(dual.read(phi, state, query), AXIS)
    return reading.numerator / reading.denominator

  residuals = []
  for form in (phi, kernels.ExponentialKernel()):
    learnt_form = functools.partial(learnt, form)
    found = _spread(learnt_form, (SPLIT, SPLIT), WHOLE, _mesh())(*rows)
    expected = attention.kernel_attention(form, query, *rows)
    weights = attention.weights(form, query, rows[0])
    added = weights @ (jnp.abs(rows[1]) + jnp.abs(expected)[None])
    residuals.append(float(jnp.max(jnp.abs(found - expected)) / added.max()))
  return residuals


def claims(config: Config, results: Results) -> list[lab.Claim]:
  most = config.devices[-1]
  numbers = 4 * (WIDTH + 2) * config.num_features
  growth = np.max(results.bytes[1:] / results.less_bytes[1:])
  times = np.sort(results.seconds)
  slower = statistics.paired_ratio(times[-1], times[0])
  return lab.statements(
    'scaling-',
    f"""
    bytes [{SOURCE}] a gradient step on sharded demonstrations sends the
      gradient alone, (d_v + 2) R numbers a head | bytes of the collectives of
      the compiled step over those of so many float32, {most} devices
    growth [ours] what a step, readings and a causal pass send does not depend
      on the number of demonstrations | largest ratio of bytes with {LESS} times
      as many
    certificate [{SOURCE}] attention is the gradient step that devices take
      together | largest residual over numbers of devices, random features and
      the exact softmax, float64
    overhead [ours] sharding costs little: devices that share the cores of one
      device take its time | seconds of a step on {most} devices over one, in
      the order of their size, {config.num_runs} runs
    """,
    {
      'bytes': lab.within(1, 1, results.bytes[-1, 0] / numbers),
      'growth': lab.at_most(1, growth),
      'certificate': lab.at_most(EXACT, np.max(results.residuals)),
      'overhead': lab.at_most(1.5, slower),
    },
  )


def tables(config: Config, results: Results) -> dict[str, Any]:
  names = 'bytes_step', 'bytes_readings', 'bytes_causal'
  found = dict(zip(names, results.bytes.T, strict=True))
  found['seconds'] = np.median(results.seconds, axis=1)
  found['residual'] = np.max(results.residuals, axis=1)
  return {'devices': lab.tidy({}, found, devices=config.devices)}


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axis = drawing.subplots(figsize=(5, 3.4))
  times = [statistics.geometric_mean(row) for row in results.seconds]
  drawing.band(axis, config.devices, times, **drawing.look(0))
  axis.set(xlabel='devices on the same cores', ylabel='seconds', ylim=0)
  caption = f"""One step on {config.num_demonstrations} demonstrations, measured
    on devices that share the cores of one machine."""
  return [lab.Figure('scaling', figure, caption)]


PARTS = {'scaling': lab.Part(measure, claims, figures, tables=tables)}


def conclude(config: Config, results, claims) -> str:
  found = results['scaling']
  return f"""A step on {config.num_demonstrations} demonstrations over
    {config.devices[-1]} devices sends {found.bytes[-1, 0]} bytes, as one on a
    {LESS}th of them. Devices agree with one to {np.max(found.residuals):.1e}
    (float64), and on its cores take {claims['scaling-overhead'].estimate:.2f}
    times as long."""


run = functools.partial(lab.run, PARTS, conclude=conclude)

if __name__ == '__main__':
  lab.main(sys.modules[__name__])
