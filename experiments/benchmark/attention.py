"""How fast is attention, and do its time and memory grow with the length?"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark import peers, timing
from experiments.benchmark.timing import (
  Goal,
  Rows,
  by_map,
  compile_call,
  rate_goal,
  speed_goal,
)
from iclcl_jax import attention


def forward(config: Any) -> Rows:
  """Streamed and causal attention of all heads, and their peers."""
  arrays = timing.heads(config, config.length)
  phi = timing.feature_map(config)
  streamed = functools.partial(attention.stream_kernel_attention, phi)
  causal = functools.partial(attention.causal_kernel_attention, phi)
  queries, keys, values = (np.asarray(array) for array in arrays)
  projection = np.asarray(phi.projection)
  fastest = 'streamed, heads by lax.map'
  causal_name = 'causal, heads by lax.map'
  ours: dict[str, Callable[..., Any]] = {
    fastest: by_map(streamed),
    'streamed, heads by vmap': jax.vmap(streamed),
    causal_name: by_map(causal),
    'causal, heads by vmap': jax.vmap(causal),
  }
  calls: timing.Calls = {
    name: compile_call(fn, *arrays).call for name, fn in ours.items()
  }
  calls['matmul'] = timing.matmul(config)
  calls['performer-pytorch'] = peers.performer(
    queries, keys, values, projection
  )
  calls['torch exact causal'] = peers.causal_softmax(queries, keys, values)
  seconds = timing.measure(calls, config.repetitions)
  slow = peers.performer(queries, keys, values, projection, causal=True)
  seconds |= timing.measure({'performer-pytorch causal': slow}, 1)
  operations = _operations(config, config.length)
  goals = [
    speed_goal(seconds, fastest, 'performer-pytorch', 4),
    rate_goal(config, seconds, fastest, operations, 0.55),
    speed_goal(seconds, causal_name, 'performer-pytorch causal', 40),
    speed_goal(seconds, causal_name, 'torch exact causal', 2),
  ]
  return Rows('attention', goals, seconds, dict.fromkeys(ours, operations))


def _operations(config: Any, length: int) -> int:
  return 8 * length * config.num_heads * config.num_features * config.dim


def growth(config: Any) -> Rows:
  """One long sequence beside as many tokens in short ones, one by one."""
  phi, times = timing.feature_map(config), config.growth
  long = times * config.length
  arrays = timing.heads(config, config.length), timing.heads(config, long)
  added = (times - 1) * arrays[0][2].nbytes / timing.MIB
  calls = {'matmul': timing.matmul(config)}
  goals, ratios = [], {}
  for name, fn in (
    ('streamed', attention.stream_kernel_attention),
    ('causal', attention.causal_kernel_attention),
  ):
    every = by_map(functools.partial(fn, phi))
    few, many = (compile_call(every, *x) for x in arrays)
    pair = f'{name}, N={long}', f'{name}, {times} x N'
    calls |= {pair[0]: many.call, pair[1]: timing.repeated(few.call, times)}
    memory = (many.temporary_mib - few.temporary_mib) / added
    what = f'{name}: temporary memory added / outputs added'
    goals.append(Goal(what, memory, 1, False))
    ratios[f'{name}: time of {times} x the length'] = pair
  seconds = timing.measure(calls, config.repetitions)
  for what, pair in ratios.items():
    value = times * seconds[pair[0]] / seconds[pair[1]]
    goals.append(Goal(what, value, 1.1 * times, False))
  counted = calls.keys() - {'matmul'}
  operations = dict.fromkeys(counted, _operations(config, long))
  return Rows('growth', goals, seconds, operations)
