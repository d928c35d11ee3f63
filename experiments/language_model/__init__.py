r"""A real language model, read as gradient descent.

Loads SmolLM2-135M (or another causal model), reads a few-shot prompt, and
checks that every attention head of every layer, at every position, is one
gradient step on its exact-softmax dual model; runs the whole network once more
as a chain of dual models and compares the next tokens::

  python -m experiments.language_model --workdir=out/language_model
  python -m experiments.language_model --workdir=out/mine --prompt_file=mine.txt

A prompt is blocks with blank lines between them, the last one the query. Blocks
that end like it, with one more word, are demonstrations, and that word is their
label. Without a prompt, one of this package is read: ten reviews with their
sentiment. `report.html` in the workdir shows what the answer was read from.

It takes about 40 s on two idle cores, and 2.2 GiB of memory; the short run of
`make demo` (`--num_demonstrations=4 --greedy_tokens=4`) takes
25 s. `seconds` in `summary.json` says where time went. Expect, over 270 heads
and 256 positions (249 of the prompt, 7 of its continuation)::

  largest residual                2.1e-06 in float32, 2.0e-15 in float64
  total variation, next token     2.2e-07 between the model and the chain
  next token                      ' Positive' .877, ' Negative' .042
  logit difference                3.04, 1.67 of it read from demonstrations
  rank correlation with deletion  .75 (influence), .12 (contribution)

The identity is exact for real heads; whether a finite map can stand in for
their softmax is asked by `experiments.finite_duals`. Which demonstration
matters is said by its influence, first of all numbers in the report: what the
answer would lose if it were deleted, to first order, beside what it does lose.
It says nothing of a demonstration that holds the first token, where idle heads
rest: begin a prompt with a line of its own.

References:
  Ren & Liu, arXiv:2310.13220, Theorem 3.1 and sections on multiple heads,
  Transformer layers and several layers.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from experiments import lab
from experiments.lab import models, tables
from experiments.language_model import identity, page, reading
from iclcl_jax import pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(models.Config):
  prompt: str = lab.option('', 'text that the model reads')
  prompt_file: str = lab.option('', 'file that holds the text')
  labels: str = lab.option('', 'two texts, A,B; empty: labels of the prompt')
  separator: str = lab.option('\n\n', 'what stands between blocks')
  num_demonstrations: int = lab.option(0, 'how many to keep; 0: all', minimum=0)
  top_tokens: int = lab.count(10, 'likeliest next tokens to write', tiny=3)
  greedy_tokens: int = lab.option(8, 'tokens to continue by', minimum=0, tiny=3)
  optional: bool = lab.option(False, 'without packaged weights, exit with 0')

  def check(self):
    self.require(
      self.separator != '',
      'separator',
      'what stands between blocks; leave the flag out for a blank line',
    )


PARTS = lab.parts(identity, reading, page)


def closing(summary: Mapping[str, Any]) -> str:
  """What the command prints last: next tokens, demonstrations, costs."""
  likeliest = ', '.join(
    f'{row["text"]!r} {math.exp(row["log_probability"]):.3f}'
    for row in summary['top_tokens'][:5]
  )
  rows = summary['attribution']['demonstrations']
  return '\n'.join(
    [
      f'likeliest tokens  {likeliest}',
      f'continuation      {summary["greedy_text"]!r}',
      f'forward pass      {summary["forward_seconds"]:.2f} s, certificate '
      f'{summary["certificate_seconds"]:.2f} s',
      f'in all            {summary["seconds"]["total"]:.0f} s, '
      f'{summary["peak_memory_bytes"] / 2**30:.1f} GiB',
      *([tables.text(rows)] if rows else []),
    ]
  )


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment, as `lab.run` does, two parts at a time.

  Returns `{'skipped': ...}` if the run is optional and the packaged weights are
  not installed.
  """
  if config.optional and not config.model_path:
    try:
      pretrained.smollm2.weights_path()
    except ValueError as error:
      print(f'The language model is left out: {error}')
      return {'skipped': str(error)}
  return lab.run(PARTS, config, workdir, closing=closing, workers=2)
