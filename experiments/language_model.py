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

It takes about 40 s on two idle cores, and 2.0 GiB of memory; the short run of
`make demo` (`--num_demonstrations=4 --greedy_tokens=4 --num_features=0`) takes
25 s. `seconds` in `summary.json` says where time went. Expect, over 270 heads
and 256 positions (249 of the prompt, 7 of its continuation)::

  largest residual                2.1e-06 in float32, 2.0e-15 in float64
  total variation, next token     2.2e-07 between the model and the chain
  next token                      ' Positive' .877, ' Negative' .042
  logit difference                3.04, 1.67 of it read from demonstrations
  rank correlation with deletion  .01 (contribution), .24 (removal)
  error with 256 directions       1.03 in the median head; .94 for a plain mean
  directions for 10 %, predicted  10^37 in the median head

The identity is exact for real heads, and random features are useless there:
their queries and keys are far too large. What a demonstration contributes to
the answer does not say what deleting it does: it is `deletion_effect` in
`summary.json`, a forward pass each.

References:
  Ren & Liu, arXiv:2310.13220, Theorem 3.1 and sections on multiple heads,
  Transformer layers and several layers.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import language_model_attribution as attributing
from experiments import language_model_features as random_features
from experiments import language_model_figures as figures
from experiments import language_model_measure as measure
from experiments import language_model_page as page
from experiments import language_model_prompt as prompts
from experiments import language_model_report as report
from iclcl_jax import _validate, pretrained
from iclcl_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of the experiment.

  Raises:
    ValueError: if a value is out of range; the message names the flag.
  """

  prompt: str = harness.option('', 'text that the model reads')
  prompt_file: str = harness.option('', 'file that holds the text')
  model_path: str = harness.option(
    '', 'GGUF file or Hugging Face directory; empty for packaged SmolLM2'
  )
  labels: str = harness.option(
    '', 'two words to compare, A,B; empty for those of the demonstrations'
  )
  separator: str = harness.option('\n\n', 'what stands between blocks')
  num_demonstrations: int = harness.option(
    0, 'keep only the first so many; 0 for all'
  )
  top_tokens: int = harness.option(10, 'likeliest next tokens to write')
  greedy_tokens: int = harness.option(8, 'tokens to continue the prompt by')
  num_features: tuple[int, ...] = harness.option(
    (16, 64, 256), 'random directions R to try on the heads; 0 for none'
  )
  feature_heads: int = harness.option(3, 'heads of a layer that are tried')
  feature_draws: int = harness.option(2, 'draws of the random directions')
  seed: int = harness.option(0, 'of the random directions')
  optional: bool = harness.option(
    False, 'without the packaged weights say so and end well'
  )

  def __post_init__(self):
    _validate.check_count('top_tokens', self.top_tokens)
    for name in ('num_demonstrations', 'greedy_tokens', 'seed'):
      _validate.check_count(name, getattr(self, name), minimum=0)
    for name in ('feature_heads', 'feature_draws'):
      _validate.check_count(name, getattr(self, name))
    counts = self.num_features
    for count in counts:
      _validate.check_count('num_features', count, minimum=0)
    repeats = len(set(counts)) < len(counts)
    if not counts or repeats or (0 in counts and counts != (0,)):
      raise ValueError(
        f'num_features is {counts}; expected different counts, such as '
        '16,64,256, or only 0 for none.'
      )
    if not self.separator:
      raise ValueError(
        'separator is empty; expected what stands between blocks. Leave the '
        'flag out for a blank line.'
      )


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs the experiment.

  Args:
    config: settings.
    workdir: folder of all results.

  Returns:
    The summary, as written to `summary.json`; `{'skipped': ...}` if the run is
    optional and the packaged weights are not installed.

  Raises:
    ValueError: if a file is missing or truncated, the prompt is empty or too
      long, a label is not one token, or the workdir cannot be used.
  """
  start = time.perf_counter()
  prompt = prompts.parse(
    prompts.read(config.prompt, config.prompt_file),
    separator=config.separator,
    num_demonstrations=config.num_demonstrations,
  )
  if config.optional and not config.model_path:
    try:
      pretrained.smollm2.weights_path()
    except ValueError as error:
      print(f'The language model is left out: {error}')
      return {'skipped': str(error)}
  seconds: dict[str, float] = {}
  with stopwatch(seconds, 'load'):
    loaded = _load(config, prompt)
  folder = harness.open_workdir(config, workdir)
  results = _measure(config, prompt, loaded, seconds)
  summary = report.summarise(config, results)
  harness.write_metrics(folder, report.metrics(results))
  with stopwatch(seconds, 'figures'):
    figures.draw_figures(results, folder)
  harness.write_text(folder / 'report.html', page.html(results, summary))
  seconds['total'] = time.perf_counter() - start
  summary['seconds'] = seconds
  summary['seconds_note'] = (
    'The float64 certificate runs beside attribution and random_features.'
  )
  summary['peak_memory_bytes'] = measure.peak_memory_bytes()
  summary = dict(harness.write_summary(folder, summary))
  print(report.text(summary))
  return summary


class Loaded(NamedTuple):
  """A model, and a prompt in its tokens.

  Attributes:
    model: its parameters.
    tokenizer: its words.
    tokens: ids of the prompt. Shape `[N]`.
    labels: ids of the two labels, or None.
  """

  model: pretrained.LanguageModel
  tokenizer: pretrained.Tokenizer
  tokens: Array
  labels: tuple[int, int] | None


def _load(config: Config, prompt: prompts.Prompt) -> Loaded:
  """Loads the model and checks the prompt, before anything is written."""
  if config.model_path:
    path = config.model_path
    model, tokenizer = pretrained.load(path, dtype=jnp.float32)
  else:
    model, tokenizer = pretrained.smollm2.load(dtype=jnp.float32)
  tokens = jnp.asarray(tokenizer.encode(prompt.text))
  length = len(tokens) + max(config.greedy_tokens - 1, 0)
  if length > model.context_length:
    raise ValueError(
      f'prompt has {len(tokens)} tokens and greedy_tokens is '
      f'{config.greedy_tokens}; expected at most {model.context_length} '
      'together, the context of the model. Shorten one of them.'
    )
  labels = prompts.labels(prompt, config.labels, tokenizer)
  return Loaded(model, tokenizer, tokens, labels)


def _measure(
  config: Config,
  prompt: prompts.Prompt,
  loaded: Loaded,
  seconds: dict[str, float],
) -> report.Results:
  """Everything that needs the model."""
  model, tokenizer, tokens, labels = loaded
  with stopwatch(seconds, 'forward'):
    forward = measure.run_forward(model, tokens, config.greedy_tokens)
  spans = tokenizer.spans(prompt.text)
  segments = prompts.segments(prompt, spans)
  pair = prompts.likelier_first(labels, forward.log_probs)

  def explain():
    with stopwatch(seconds, 'attribution'):
      found = attributing.attribute(model, tokens, segments, pair)
    if config.num_features == (0,):
      return found, None
    with stopwatch(seconds, 'random_features'):
      return found, random_features.study(config, model, tokens)

  certified, (found, study) = _certify(
    config, model, tokens, forward, seconds, explain
  )
  return report.Results(
    prompt=prompt,
    tokens=np.asarray(tokens),
    token_texts=[prompt.text[begin:end] for begin, end in spans],
    segments=segments,
    label_ids=pair,
    token_text=tokenizer.token,
    forward=forward,
    certified=certified,
    attribution=found,
    study=study,
    seconds=seconds,
  )


def _certify(
  config, model, tokens, forward, seconds, meanwhile
) -> tuple[dict[str, measure.Certified], Any]:
  """Certificates of the prompt and its continuation, in both precisions.

  The first one runs alone, as its time counts, the second one beside
  `meanwhile`, whose result comes last.
  """
  continued = jnp.concatenate([tokens, forward.continuation[:-1]])
  num_answers = max(config.greedy_tokens, 1)
  result = {}
  with stopwatch(seconds, 'certificate_float32'):
    result['float32'] = measure.certify(model, continued, num_answers)
  with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
    other = pool.submit(meanwhile)
    with stopwatch(seconds, 'certificate_float64'), harness.float64_on_host():
      wide = measure.widened(model)
      result['float64'] = measure.certify(wide, continued, num_answers)
  return result, other.result()


@contextlib.contextmanager
def stopwatch(seconds: dict[str, float], stage: str) -> Iterator[None]:
  """Notes how long the block takes."""
  start = time.perf_counter()
  yield
  seconds[stage] = time.perf_counter() - start


if __name__ == '__main__':
  harness.run_binary(Config, run)
