"""What do modified attentions cost beside the plain ones?

Regularised and augmented attention are linear in the length with a feature map,
as plain attention is. Negative samples are chosen by score, so that every score
of a row must be computed, with a feature map too: they are compared with plain
attention whose scores are written out, in the same blocks of queries. Negatives
of each query need one pass over the scores. Those of each token need a pass
that chooses, then plain attention with the labels that follow: with a kernel
that is a second pass.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmark import timing
from experiments.benchmark.timing import Goal, by_map, compile_call
from iclcl_jax import attention, features, kernels, modified

BLOCK = 128  # Queries whose scores are held at a time.
STRENGTH = 0.1
NEGATIVES: dict[str, Any] = {
  'num_negatives': 3,
  'strength': STRENGTH,
}


class Comparison(NamedTuple):
  """Calls, and what each modified one is compared with.

  Attributes:
    calls: functions of queries, keys and values of one head, by name.
    plain: name of the plain call, by name of the modified one.
    bound: the largest ratio of times that is good enough.
  """

  calls: Mapping[str, Callable[..., Any]]
  plain: Mapping[str, str]
  bound: float


def measure(config: Any) -> timing.Rows:
  """Linear forms of all heads, quadratic ones of one head."""
  phi = timing.feature_map(config)
  arrays = timing.heads(config, config.length)
  one_head = tuple(array[:1] for array in arrays)
  found: list[Goal] = []
  seconds: dict[str, float] = {}
  for compared, heads, repetitions in (
    (linear(phi), arrays, config.repetitions),
    (quadratic(phi), one_head, -(-config.repetitions // 2)),
  ):
    calls = {
      name: compile_call(by_map(fn), *heads).call
      for name, fn in compared.calls.items()
    }
    seconds |= timing.measure(calls, repetitions)
    found += goals(compared, seconds)
  product = {'matmul': timing.matmul(config)}
  seconds |= timing.measure(product, config.repetitions)
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
  """Ratios of times, modified to plain."""
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
