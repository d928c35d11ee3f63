"""Speed beside peers, each row measured side by side in one run.

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
from collections.abc import Mapping
from typing import Any

from experiments import lab
from experiments.benchmark import groups as measured, language_model, timing
from experiments.lab import tables as tabulating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  length: int = lab.count(8192, 'tokens of a sequence', tiny=64)
  growth: int = lab.option(8, 'factor of the longer length', minimum=2, tiny=2)
  num_heads: int = lab.count(8, 'heads', tiny=2)
  dim: int = lab.count(64, 'width of keys and values', tiny=8)
  num_features: int = lab.count(256, 'features of the attention', tiny=16)
  num_demonstrations: int = lab.count(
    1_000_000, 'demonstrations of the dual state', tiny=300
  )
  layer_features: int = lab.count(1200, 'features of the layer', tiny=32)
  num_steps: int = lab.count(256, 'training steps of a call', tiny=4)
  num_seeds: int = lab.count(16, 'seeds trained together', tiny=2)
  matmul_size: int = lab.count(2048, 'rows and columns of the product', tiny=32)
  prompt_length: int = lab.option(
    512, 'tokens of the language model; 0 leaves it out', minimum=0, tiny=0
  )
  repetitions: int = lab.count(9, 'calls whose median counts', tiny=2)
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)


def measure(config: Config) -> list[timing.Rows]:
  """Measures one group after the other: nothing else may run beside a call."""
  groups = [
    measured.forward,
    measured.modifications,
    measured.growth,
    measured.state,
    measured.training,
  ]
  if config.prompt_length:
    groups.append(language_model.measure)
  return [group(config) for group in groups]


def summary(config: Config, results: list[timing.Rows]) -> dict[str, Any]:
  return {'machine': timing.machine()} | tables(config, results)


def tables(config: Config, results: list[timing.Rows]) -> dict[str, Any]:
  goals = [goal.row() for rows in results for goal in rows.goals]
  columns = 'what', 'measured', 'goal', 'met'
  return {
    'goals': [{name: row[name] for name in columns} for row in goals],
    'timings': [row for rows in results for row in rows.timings(config)],
  }


def pages(config: Config, results: list[timing.Rows]) -> dict[str, str]:
  """The same in Markdown."""
  found = map(timing.markdown, tables(config, results).values())
  return {'table.md': '\n\n'.join([f'{timing.machine()}.', *found]) + '\n'}


PARTS = {
  'speed': lab.Part(measure, summary=summary, tables=tables, pages=pages)
}


def conclude(config, results, claims) -> str:
  goals = tables(config, results['speed'])['goals']
  missed = [goal['what'] for goal in goals if goal['met'] is False]
  met = sum(goal['met'] is True for goal in goals)
  text = f'{met} of {len(goals)} goals are met.'
  return f'{text} Missed: {"; ".join(missed)}.' if missed else text


def closing(found: Mapping[str, Any]) -> str:
  parts = [tabulating.text(found[name]) for name in ('goals', 'timings')]
  return '\n\n'.join([*parts, found['machine']])


run = functools.partial(lab.run, PARTS, conclude=conclude, closing=closing)
