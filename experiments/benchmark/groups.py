"""How fast are attention, modified attention, the dual model and training?

Regularised and augmented attention are linear in the length with a feature map,
as plain attention is. Negative samples need every score of a row: they are
compared with plain attention whose scores are written out, in the same blocks
of queries. Negatives of each query take one pass over the scores, those of each
token, with a kernel, a second one.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import peers, products, timing
from experiments.benchmark.timing import (
  Goal,
  Rows,
  by_map,
  compile_call,
  rate_goal,
  speed_goal,
)
from experiments.lab import Config, pretraining
from iclcl_jax import attention, dual, features, kernels, modified

CHUNK = 2048  # Demonstrations whose features are held at a time.
LEARNING_RATE = 0.003
NUM_DEMONSTRATIONS_OF_PROMPT = 15
BLOCK = 128  # Queries whose scores are held at a time.
STRENGTH = 0.1
NEGATIVES: dict[str, Any] = {'num_negatives': 3, 'strength': STRENGTH}


BARE = {x: f'{x}, bare products' for x in ('streamed', 'causal', 'dual state')}
EXPONENTIALS = 'bare exponentials'


def forward(config: Config) -> Rows:
  """Streamed and causal attention of all heads, and their peers."""
  arrays = timing.heads(config, config.length)
  phi = timing.feature_map(config)
  streamed = functools.partial(attention.stream_kernel_attention, phi)
  causal = functools.partial(attention.causal_kernel_attention, phi)
  q, k, v = (np.asarray(array) for array in arrays)
  projection = np.asarray(phi.projection)
  fastest = 'streamed, heads by lax.map'
  causal_name = 'causal, heads by lax.map'
  ours: dict[str, Callable[..., Any]] = {
    fastest: by_map(streamed),
    'streamed, heads by vmap': jax.vmap(streamed),
    causal_name: by_map(causal),
    'causal, heads by vmap': jax.vmap(causal),
    BARE['streamed']: by_map(
      functools.partial(products.streamed, phi.projection)
    ),
    BARE['causal']: by_map(functools.partial(products.causal, phi.projection)),
    EXPONENTIALS: by_map(
      lambda q, k, _: products.exponentials(phi.projection, q, k)
    ),
  }
  calls: timing.Calls = {
    name: compile_call(fn, *arrays).call for name, fn in ours.items()
  }
  calls['performer-pytorch'] = peers.performer(q, k, v, projection)
  calls['torch exact causal'] = peers.causal_softmax(q, k, v)
  seconds = timing.beside_matmul(config, calls)
  slow = peers.performer(q, k, v, projection, causal=True)
  seconds |= timing.measure({'performer-pytorch causal': slow}, 1)
  operations = _operations(config, config.length)
  goals = [
    speed_goal(seconds, fastest, 'performer-pytorch', 4),
    rate_goal(config, seconds, fastest, operations, 0.55),
    speed_goal(seconds, causal_name, 'performer-pytorch causal', 40),
    speed_goal(seconds, causal_name, 'torch exact causal', 2),
    *_skeleton_goals(seconds, fastest, BARE['streamed']),
    *_skeleton_goals(seconds, causal_name, BARE['causal']),
  ]
  counted = dict.fromkeys(set(ours) - {EXPONENTIALS}, operations)
  return Rows('attention', goals, seconds, counted)


def _skeleton_goals(seconds: timing.Seconds, ours: str, bare: str):
  """What of a form's time its products are, and these and its exponentials."""
  both = (seconds[bare] + seconds[EXPONENTIALS]) / seconds[ours]
  what = f'{ours}: {bare} and exponentials / time'
  return speed_goal(seconds, ours, bare, 0.9), Goal(what, both, 0.9)


def _operations(config: Config, length: int) -> int:
  return 8 * length * config.num_heads * config.num_features * config.dim


def growth(config: Config) -> Rows:
  """One long sequence beside as many tokens in short ones, one by one."""
  phi, times = timing.feature_map(config), config.growth
  long = times * config.length
  arrays = timing.heads(config, config.length), timing.heads(config, long)
  added = (times - 1) * arrays[0][2].nbytes / timing.MIB
  calls: dict[str, Any] = {}
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
  seconds = timing.beside_matmul(config, calls)
  for what, pair in ratios.items():
    value = times * seconds[pair[0]] / seconds[pair[1]]
    goals.append(Goal(what, value, 1.1 * times, False))
  operations = dict.fromkeys(calls, _operations(config, long))
  return Rows('growth', goals, seconds, operations)


def state(config: Config) -> Rows:
  """The dual model's weights after one step on very many demonstrations."""
  phi = timing.feature_map(config)
  shape = 2, config.num_demonstrations, config.dim
  key = jax.random.key(config.seed)
  keys, values = jax.random.normal(key, shape, jnp.float32) / 2

  def step(keys, values):
    state = dual.empty(phi, keys, values)
    return dual.one_step(phi, state, keys, values, chunk_size=CHUNK)

  bare = functools.partial(products.summed, phi.projection, chunk_size=CHUNK)
  compiled = compile_call(step, keys, values)
  name = f'dual state of {config.num_demonstrations} demonstrations'
  calls = {
    name: compiled.call,
    BARE['dual state']: compile_call(bare, keys, values).call,
    EXPONENTIALS: compile_call(
      lambda keys: products.exponentials(
        phi.projection, keys, chunk_size=CHUNK
      ),
      keys,
    ).call,
  }
  seconds = timing.beside_matmul(config, calls)
  operations = 4 * config.num_demonstrations * config.num_features * config.dim
  memory = f'{name}: MiB besides the inputs'
  goals = [
    Goal(memory, compiled.temporary_mib, 1024, False),
    timing.rate_goal(config, seconds, name, operations, 0.5),
    *_skeleton_goals(seconds, name, BARE['dual state']),
  ]
  counted = dict.fromkeys((name, BARE['dual state']), operations)
  return Rows('dual state', goals, seconds, counted)


# Peers of the training, whether they are compiled, and the least speed.
LOOPS = {'torch, eager loop': (False, 15), 'torch.compile': (True, 2)}


def training(config: Config) -> Rows:
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
  calls: timing.Calls = {
    apart: timing.repeated(compile_call(train, *one).call, times),
    together: compile_call(jax.vmap(train), *many).call,
    **{peer: peer_loop(*one, is_compiled=x) for peer, (x, _) in LOOPS.items()},
  }
  seconds = timing.beside_matmul(config, calls)
  cost = times * seconds[together] / seconds[apart]
  goals = [Goal(f'{together}: time / time of one seed', cost, times, False)]
  for peer, (_, least) in LOOPS.items():
    speed = timing.ratio(seconds, peer, apart)
    speed = None if speed is None else times * speed
    goals.append(Goal(f'one seed: speed / speed of {peer}', speed, least))
  return Rows(f'{config.num_steps} training steps', goals, seconds, {})


def peer_loop(params, phi, prompts, *, is_compiled=False) -> timing.Call | None:
  return peers.training_loop(
    [np.asarray(array) for array in params],
    np.asarray(phi.projection),
    np.asarray(prompts.tokens),
    np.asarray(prompts.target),
    LEARNING_RATE,
    is_compiled=is_compiled,
  )


class Comparison(NamedTuple):
  """Calls, and what each modified one is compared with."""

  calls: Mapping[str, Callable[..., Any]]  # Of queries, keys and values.
  plain: Mapping[str, str]  # The plain call, by name of the modified one.
  bound: float  # The largest ratio of times that is good enough.


def modifications(config: Config) -> timing.Rows:
  phi = timing.feature_map(config)
  arrays = timing.heads(config, config.length)
  one_head = tuple(array[:1] for array in arrays)
  found: list[Goal] = []
  seconds: dict[str, float] = {}
  for compared, heads, repetitions in (
    (linear(phi), arrays, config.repetitions),
    (quadratic(phi), one_head, -(-config.repetitions // 2)),
  ):
    fns = {k: by_map(fn) for k, fn in compared.calls.items()}
    calls = {k: compile_call(fn, *heads).call for k, fn in fns.items()}
    seconds |= timing.measure(calls, repetitions)
    found += goals(compared, seconds)
  seconds |= timing.beside_matmul(config, {})
  return timing.Rows('modified attention', found, seconds, {})


def linear(phi: features.PositiveFeatures) -> Comparison:
  """Regularised and augmented attention, streamed and causal."""
  streamed, causal = 'streamed, plain', 'causal, plain'
  ridge = modified.regularised(strength=STRENGTH)
  printed = modified.regularised_as_printed(strength=STRENGTH)
  views = modified.augmented(
    augment_keys=jax.nn.gelu, augment_values=jax.nn.gelu
  )
  rows: dict[str, tuple[Callable[..., Any], str]] = {
    'streamed, regularised': (ridge.stream, streamed),
    'streamed, regularised as printed': (printed.stream, streamed),
    'streamed, augmented by GELU': (views.stream, streamed),
    'causal, regularised': (ridge.causal, causal),
    'causal, augmented by GELU': (views.causal, causal),
  }
  calls: dict[str, Callable[..., Any]] = {
    streamed: functools.partial(attention.stream_kernel_attention, phi),
    causal: functools.partial(attention.causal_kernel_attention, phi),
  }
  calls |= {name: functools.partial(fn, phi) for name, (fn, _) in rows.items()}
  plain = {name: base for name, (_, base) in rows.items()}
  return Comparison(calls, plain, 1.3)


def quadratic(phi: features.PositiveFeatures) -> Comparison:
  """Negative samples, beside plain attention with written-out scores."""
  softmax = kernels.ExponentialKernel()
  exact, written = 'softmax, scores in blocks', 'feature map, scores in blocks'
  fns = {
    'negatives of each query': modified.negative(**NEGATIVES).stream,
    'negatives of each token': modified.token_negative(**NEGATIVES).stream,
  }
  calls: dict[str, Callable[..., Any]] = {
    exact: softmax_in_blocks,
    written: functools.partial(features_in_blocks, phi),
  }
  plain = {}
  for kind, base in ((softmax, exact), (phi, written)):
    for name, fn in fns.items():
      row = f'{base.split(",")[0]}, {name}'
      calls[row] = functools.partial(fn, kind, chunk_size=BLOCK)
      plain[row] = base
  return Comparison(calls, plain, 2)


def goals(compared: Comparison, seconds: timing.Seconds) -> list[Goal]:
  return [
    Goal(
      f'{name}: time / time of {plain}',
      seconds[name] / seconds[plain],
      compared.bound,
      False,
    )
    for name, plain in compared.plain.items()
  ]


def softmax_in_blocks(queries, keys, values) -> jax.Array:
  """Exact softmax attention, the scores of one block of queries at a time."""
  return _in_blocks(
    lambda query: attention.softmax_attention(query, keys, values), queries
  )


def features_in_blocks(phi, queries, keys, values) -> jax.Array:
  """Kernel attention by products of features, for moderate norms."""
  key_features = jax.vmap(phi)(keys)

  def answer(query):
    scores = key_features @ phi(query)
    return scores @ values / jnp.sum(scores)

  return _in_blocks(answer, queries)


def _in_blocks(fn, queries):
  return jax.lax.map(fn, queries, batch_size=BLOCK)
