r"""Speed beside peers, each row measured side by side in one run.

  python -m experiments.benchmark --workdir=out/benchmark

About seven minutes on two CPU cores. Calls that are compared take turns; their
medians are compared, and a matrix product runs between them, so that the
fraction of its rate is one of the same minutes. Peers need
`pip install iclcl_jax[bench]`; without them their rows say so.

Expect, in float32 with 8 heads, 8192 tokens, 64 dimensions, 256 features: the
streamed attention above half of the matrix product's rate, the causal one fifty
times as fast as the peer's, times in proportion to the length, augmented and
printed regularised attention as fast as plain, the strict regularised form as
fast where it is causal and 1.2 to 1.5 times as slow where it is not. Negative
samples read every score: their rows are compared with plain attention whose
scores are written out in the same blocks of queries, one head.

SmolLM2's forward pass is compared with `transformers` on the same weights.

Heads run one after the other (`jax.lax.map`). On CPU that is faster than
`jax.vmap` over them, whose products of batches of matrices are slower; the
times of both are in the table.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
  benchmark_language_model,
  benchmark_modified,
  benchmark_peers,
  benchmark_tools,
  harness,
  pretraining,
)
from experiments.benchmark_tools import Goal, compile_call, measure
from iclcl_jax import attention, dual, features, projections

LEARNING_RATE = 0.003
NUM_DEMONSTRATIONS_OF_PROMPT = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  length: int = harness.option(8192, 'tokens of a sequence')
  growth: int = harness.option(8, 'the longer sequence is so many times longer')
  num_heads: int = harness.option(8, 'heads')
  dim: int = harness.option(64, 'width of keys and values')
  num_features: int = harness.option(256, 'features of the attention')
  num_demonstrations: int = harness.option(1_000_000, 'of the dual state')
  layer_features: int = harness.option(1200, 'features of the trained layer')
  num_steps: int = harness.option(256, 'training steps of a call')
  num_seeds: int = harness.option(16, 'seeds trained together')
  matmul_size: int = harness.option(2048, 'rows and columns of the product')
  prompt_length: int = harness.option(
    512, 'tokens that the language model reads; 0 leaves it out'
  )
  repetitions: int = harness.option(9, 'calls whose median counts')
  seed: int = harness.option(0, 'root of all random numbers')


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Measures everything; writes `summary.json` and `table.md`.

  Args:
    config: sizes and repetitions.
    workdir: folder of the results.

  Returns:
    The summary.

  Raises:
    ValueError: if the workdir cannot be written or holds another config.
  """
  path = harness.open_workdir(config, workdir)
  goals, timings = [], []
  parts = [_attention, _modified, _growth, _dual_state, _training]
  if config.prompt_length:
    parts.append(_language_model)
  for part in parts:
    new_goals, new_timings = part(config)
    goals += [goal.row() for goal in new_goals]
    timings += new_timings
  summary = {
    'machine': benchmark_tools.machine(),
    'goals': goals,
    'timings': timings,
  }
  harness.write_metrics(path, timings)
  _write_tables(path, summary)
  return harness.write_summary(path, summary)


def _heads(config: Config, length: int) -> tuple[jax.Array, ...]:
  """Queries, keys and values `[H, N, d]` of moderate norm."""
  shape = 3, config.num_heads, length, config.dim
  key = jax.random.fold_in(jax.random.key(config.seed), length)
  return tuple(jax.random.normal(key, shape, jnp.float32) / 2)


def _feature_map(config: Config) -> features.PositiveFeatures:
  projection = projections.orthogonal(
    jax.random.key(config.seed), config.num_features, config.dim
  )
  return features.PositiveFeatures(projection.astype(jnp.float32))


def _matmul(config: Config) -> Callable[[], Any]:
  shape = config.matmul_size, config.matmul_size
  matrix = jax.random.normal(jax.random.key(config.seed), shape, jnp.float32)
  return compile_call(jnp.dot, matrix, matrix).call


def _attention(config: Config) -> tuple[list[Goal], list[dict[str, Any]]]:
  """Streamed and causal attention of all heads, and their peers."""
  arrays, phi = _heads(config, config.length), _feature_map(config)
  streamed = functools.partial(attention.stream_kernel_attention, phi)
  causal = functools.partial(attention.causal_kernel_attention, phi)
  queries, keys, values = (np.asarray(array) for array in arrays)
  projection = np.asarray(phi.projection)
  ours: dict[str, Callable[..., Any]] = {
    'streamed, heads by lax.map': _by_map(streamed),
    'streamed, heads by vmap': jax.vmap(streamed),
    'causal, heads by lax.map': _by_map(causal),
    'causal, heads by vmap': jax.vmap(causal),
  }
  calls: dict[str, Callable[[], Any] | None] = {
    name: compile_call(fn, *arrays).call for name, fn in ours.items()
  }
  calls['matmul'] = _matmul(config)
  calls['performer-pytorch'] = benchmark_peers.performer(
    queries, keys, values, projection
  )
  calls['torch exact causal'] = benchmark_peers.causal_softmax(
    queries, keys, values
  )
  seconds = measure(calls, config.repetitions)
  slow = benchmark_peers.causal_performer(queries, keys, values, projection)
  seconds |= measure({'performer-pytorch causal': slow}, 1)

  operations = 8 * config.length * config.num_heads
  operations *= config.num_features * config.dim
  fastest, causal_name = (
    'streamed, heads by lax.map',
    'causal, heads by lax.map',
  )
  goals = [
    _speed_goal(seconds, fastest, 'performer-pytorch', 4),
    _rate_goal(config, seconds, fastest, operations, 0.55),
    _speed_goal(seconds, causal_name, 'performer-pytorch causal', 40),
    _speed_goal(seconds, causal_name, 'torch exact causal', 2),
  ]
  counted = dict.fromkeys(ours, operations)
  return goals, _timings(config, 'attention', seconds, counted)


def _modified(config: Config) -> tuple[list[Goal], list[dict[str, Any]]]:
  """Modified attentions beside the plain ones; see `benchmark_modified`."""
  phi, arrays = _feature_map(config), _heads(config, config.length)
  goals: list[Goal] = []
  seconds: dict[str, float] = {}
  one_head = tuple(array[:1] for array in arrays)
  for rows, heads, repetitions in (
    (benchmark_modified.linear(phi), arrays, config.repetitions),
    (benchmark_modified.quadratic(phi), one_head, -(-config.repetitions // 2)),
  ):
    calls = {
      name: compile_call(_by_map(fn), *heads).call
      for name, fn in rows.calls.items()
    }
    seconds |= measure(calls, repetitions)
    goals += benchmark_modified.goals(rows, seconds)
  seconds |= measure({'matmul': _matmul(config)}, config.repetitions)
  return goals, _timings(config, 'modified attention', seconds, {})


def _growth(config: Config) -> tuple[list[Goal], list[dict[str, Any]]]:
  """One long sequence beside as many tokens in short ones, one by one."""
  phi, times = _feature_map(config), config.growth
  fns = {
    'streamed': attention.stream_kernel_attention,
    'causal': attention.causal_kernel_attention,
  }
  short_arrays = _heads(config, config.length)
  long_arrays = _heads(config, times * config.length)
  added = (times - 1) * short_arrays[2].nbytes / benchmark_tools.MIB
  calls, goals, names = {'matmul': _matmul(config)}, [], {}
  for name, fn in fns.items():
    heads = _by_map(functools.partial(fn, phi))
    short, long = (compile_call(heads, *x) for x in (short_arrays, long_arrays))
    names[name] = f'{name}, N={times * config.length}', f'{name}, {times} x N'
    calls |= dict(
      zip(names[name], (long.call, _repeated(short.call, times)), strict=True)
    )
    memory = (long.temporary_mib - short.temporary_mib) / added
    what = f'{name}: temporary memory added / outputs added'
    goals.append(Goal(what, memory, 1, False))
  seconds = measure(calls, config.repetitions)
  for name, (long_name, short_name) in names.items():
    ratio = times * seconds[long_name] / seconds[short_name]
    what = f'{name}: time of {times} x the length'
    goals.append(Goal(what, ratio, 1.1 * times, False))
  operations = 8 * times * config.length * config.num_heads
  operations *= config.num_features * config.dim
  counted = dict.fromkeys(calls.keys() - {'matmul'}, operations)
  return goals, _timings(config, 'growth', seconds, counted)


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
  def calls():
    for _ in range(times):
      call()

  return calls


def _dual_state(config: Config) -> tuple[list[Goal], list[dict[str, Any]]]:
  """The dual model's weights after one step on very many demonstrations."""
  phi = _feature_map(config)
  shape = 2, config.num_demonstrations, config.dim
  key = jax.random.key(config.seed)
  keys, values = jax.random.normal(key, shape, jnp.float32) / 2

  def step(keys, values):
    state = dual.zero_shot(phi, keys[:0], values[:0])
    return dual.stream_step(phi, state, keys, values, chunk_size=2048)

  compiled = compile_call(step, keys, values)
  name = f'dual state of {config.num_demonstrations} demonstrations'
  calls = {name: compiled.call, 'matmul': _matmul(config)}
  seconds = measure(calls, config.repetitions)
  operations = 4 * config.num_demonstrations * config.num_features * config.dim
  memory = f'{name}: MiB besides the inputs'
  goals = [
    Goal(memory, compiled.temporary_mib, 1024, False),
    _rate_goal(config, seconds, name, operations, 0.5),
  ]
  return goals, _timings(config, 'dual state', seconds, {name: operations})


def _training(config: Config) -> tuple[list[Goal], list[dict[str, Any]]]:
  """Training steps of the papers' layer: one seed, many, and the peer."""

  def draw(key):
    run = pretraining.init_run(key, num_features=config.layer_features)
    prompts = pretraining.draw_prompts(
      key,
      jnp.arange(config.num_steps),
      lambda _: run.task_matrix,
      NUM_DEMONSTRATIONS_OF_PROMPT,
    )
    return run.params, run.phi, prompts

  def train(params, phi, prompts):
    return pretraining.train(params, phi, prompts, LEARNING_RATE)

  keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
  many = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
  one = jax.tree.map(lambda array: array[0], many)
  times = config.num_seeds
  together, apart = f'{times} seeds by vmap', f'one seed, {times} times'
  peer = 'torch, eager loop'
  calls: dict[str, Callable[[], Any] | None] = {
    apart: _repeated(compile_call(train, *one).call, times),
    together: compile_call(jax.vmap(train), *many).call,
    peer: _peer_loop(*one),
    'matmul': _matmul(config),
  }
  seconds = measure(calls, config.repetitions)
  speed = times * seconds[peer] / seconds[apart] if peer in seconds else None
  cost = times * seconds[together] / seconds[apart]
  goals = [
    Goal(f'one seed: speed / speed of {peer}', speed, 15),
    Goal(f'{together}: time / time of one seed', cost, times, False),
  ]
  group = f'{config.num_steps} training steps'
  return goals, _timings(config, group, seconds, {})


def _language_model(config: Config) -> tuple[list[Goal], list[dict[str, Any]]]:
  """SmolLM2's forward pass, its peer, and what its certificate costs."""
  goals, seconds = benchmark_language_model.rows(
    config.prompt_length, -(-config.repetitions // 2), config.seed
  )
  if not seconds:
    return goals, []
  seconds |= measure({'matmul': _matmul(config)}, config.repetitions)
  group = f'language model, {config.prompt_length} tokens'
  return goals, _timings(config, group, seconds, {})


def _peer_loop(params, phi, prompts) -> Callable[[], Any] | None:
  return benchmark_peers.training_loop(
    [np.asarray(array) for array in params],
    np.asarray(phi.projection),
    np.asarray(prompts.tokens),
    np.asarray(prompts.target),
    LEARNING_RATE,
  )


def _by_map(fn: Callable[..., Any]) -> Callable[..., Any]:
  """`fn` of each head, one after the other."""
  return lambda *heads: jax.lax.map(lambda head: fn(*head), heads)


def _speed_goal(
  seconds: Mapping[str, float], ours: str, peer: str, bound: float
) -> Goal:
  value = seconds[peer] / seconds[ours] if peer in seconds else None
  return Goal(f'{ours}: speed / speed of {peer}', value, bound)


def _rate_goal(
  config: Config,
  seconds: Mapping[str, float],
  name: str,
  operations: int,
  bound: float,
) -> Goal:
  fraction = _fraction(config, seconds, name, operations)
  return Goal(f'{name}: rate / rate of matmul', fraction, bound)


def _fraction(
  config: Config, seconds: Mapping[str, float], name: str, operations: int
) -> float:
  rate = 2 * config.matmul_size**3 / seconds['matmul']
  return operations / seconds[name] / rate


def _timings(
  config: Config,
  group: str,
  seconds: Mapping[str, float],
  operations: Mapping[str, int],
) -> list[dict[str, Any]]:
  """One line for each call; `matmul` counts its own operations."""
  operations = {'matmul': 2 * config.matmul_size**3, **operations}
  return [
    {
      'group': group,
      'call': name,
      'seconds': value,
      'of_matmul_rate': _fraction(config, seconds, name, operations[name])
      if name in operations
      else None,
    }
    for name, value in seconds.items()
  ]


def _write_tables(path: harness.Workdir, summary: Mapping[str, Any]) -> None:
  """Prints the tables, and writes them in Markdown."""
  columns = 'what', 'measured', 'goal', 'met'
  goals = [{name: row[name] for name in columns} for row in summary['goals']]
  tables = goals, summary['timings']
  for rows in tables:
    print(harness.table(rows) + '\n')
  print(summary['machine'])
  parts = [summary['machine'] + '.', *map(benchmark_tools.markdown, tables)]
  harness.write_text(path / 'table.md', '\n\n'.join(parts) + '\n')


if __name__ == '__main__':
  harness.run_binary(Config, run)
