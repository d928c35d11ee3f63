"""A few-shot prompt on its way to the model: text, demonstrations, tokens.

A prompt is blocks with blank lines between them; the last one is the query. A
block is a demonstration if its last word but one is the query's last word, such
as `Sentiment:`; its last word is then its label. All other blocks instruct.
"""

import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, models
from iclcl_jax import pretrained
from iclcl_jax.pretrained import attribution
from iclcl_jax.types import Array

Label: TypeAlias = int | tuple[int, ...]  # Its id, or those of several tokens.
Pair: TypeAlias = tuple[Label, Label]
DEFAULT = pathlib.Path(__file__).with_name('prompt.txt')


class Prompt(NamedTuple):
  text: str  # What the model reads.
  spans: np.ndarray  # Of demonstrations and the blank line behind, `[S, 2]`.
  demonstration_labels: list[str]  # Last word of each.
  query_begin: int  # Where the query begins, in characters.


class Loaded(NamedTuple):
  """A model and a prompt in its tokens, what every question starts from."""

  model: pretrained.LanguageModel  # The model, in float32.
  tokenizer: pretrained.Tokenizer  # Its words.
  prompt: Prompt  # The prompt, taken apart.
  tokens: Array  # Its ids. Shape `[N]`.
  segments: np.ndarray  # Demonstration of each token, -1 for the rest, `[N]`.
  labels: Pair | None  # The two labels; None if not two.


@lab.once
def load(config: Config) -> Loaded:
  """Reads prompt and model, and checks that they fit."""
  prompt = parse(
    read(config.prompt, config.prompt_file),
    separator=config.separator,
    num_demonstrations=config.num_demonstrations,
  )
  model, tokenizer = models.load(config)
  tokens = tokenizer.encode(prompt.text)
  length = len(tokens) + config.greedy_tokens
  if length > model.context_length:
    raise ValueError(
      f'prompt has {len(tokens)} tokens and greedy_tokens is '
      f'{config.greedy_tokens}; expected at most {model.context_length} '
      'together, the context of the model. Shorten one of them.'
    )
  segments = np.full(len(tokens), -1, np.int32)
  if len(prompt.spans):
    spans = prompt.spans.tolist()
    segments = attribution.mark_spans(tokenizer, prompt.text, spans)
  return Loaded(
    model,
    tokenizer,
    prompt,
    jnp.asarray(tokens),
    segments,
    labels(prompt, config.labels, tokenizer),
  )


def read(prompt: str, prompt_file: str) -> str:
  """Returns the text of a prompt, or of a file; else that of this package.

  One line break at the end of a file is dropped, as editors add it.
  """
  if prompt and prompt_file:
    raise ValueError('prompt and prompt_file are both given; expected one.')
  path = pathlib.Path(prompt_file or DEFAULT)
  try:
    text = prompt or path.read_text(encoding='utf-8').removesuffix('\n')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise ValueError(
      f'prompt_file is {str(path)!r}, which cannot be read ({reason}); '
      'expected a text file in UTF-8.'
    ) from error
  if not text.strip():
    raise ValueError(
      'prompt is empty; expected some text. Without --prompt and --prompt_file '
      'a prompt of this package is read.'
    )
  return text


def parse(
  text: str, *, separator: str = '\n\n', num_demonstrations: int = 0
) -> Prompt:
  r"""Finds the demonstrations of a prompt; keeps the first so many (0: all).

  Example:
    >>> prompt = parse('Sun: day\n\nMoon: night\n\nStar:')
    >>> prompt.demonstration_labels, prompt.query_begin
    ([], 23)
    >>> parse('A is: b\n\nC is: d\n\nE is:').demonstration_labels
    ['b', 'd']
  """
  blocks = _blocks(text, separator)
  cue = text[blocks[-1][0] :].split()[-1:]
  found = []
  for begin, end in blocks[:-1]:
    words = text[begin:end].split()
    if words[-2:-1] == cue and cue:
      found.append((begin, end, words[-1]))
  if num_demonstrations > len(found):
    raise ValueError(
      f'num_demonstrations is {num_demonstrations}, but the prompt has '
      f'{len(found)}; expected no more. A demonstration is a block whose last '
      "word but one is the query's last word, and blocks are separated by "
      f'{separator!r} (--separator).'
    )
  kept = found[:num_demonstrations] if num_demonstrations else found
  return _without(text, found[len(kept) :], kept, blocks[-1][0])


def _without(text: str, left_out: Sequence[Any], kept, query_begin) -> Prompt:
  """Cuts demonstrations out of a prompt."""
  begins = np.array([row[:2] for row in kept], np.int64).reshape(-1, 2)
  shifted, cut = begins.copy(), 0
  for begin, end, _ in reversed(left_out):
    text = text[:begin] + text[end:]
    shifted -= np.where(begins > begin, end - begin, 0)
    cut += end - begin if begin < query_begin else 0
  labels = [row[2] for row in kept]
  return Prompt(text, shifted, labels, query_begin - cut)


def _blocks(text: str, separator: str) -> list[tuple[int, int]]:
  """Begins and ends of blocks, each with the separator behind it."""
  ends = [x.end() for x in re.finditer(f'(?:{re.escape(separator)})+', text)]
  edges = [0, *ends, len(text)]
  pairs = itertools.pairwise(edges)
  return [(a, b) for a, b in pairs if text[a:b].strip()]


def labels(prompt: Prompt, chosen: str, tokenizer: Any) -> Pair | None:
  """Chooses the two texts whose logits are compared.

  Those of `chosen`, two texts with a comma between them, else the two different
  labels of the demonstrations; None if these have not two.
  """
  words = [word.strip() for word in chosen.split(',')] if chosen else []
  if chosen and (len(set(words)) != 2 or not all(words)):
    raise ValueError(
      f'labels is {chosen!r}; expected two different texts with a comma '
      'between them, such as Positive,Negative.'
    )
  words = words or list(dict.fromkeys(prompt.demonstration_labels))
  if len(words) != 2:
    return None
  space = '' if prompt.text[-1:].isspace() else ' '
  first, second = (
    tokenizer.encode(space + word, add_special_tokens=False).tolist()
    for word in words
  )
  if len(first) == len(second) == 1:
    return first[0], second[0]
  return tuple(first), tuple(second)


def likelier_first(pair: Pair | None, log_probs: Any) -> Pair:
  """Orders two labels by probability; the two likeliest tokens for None.

  Example:
    >>> log_probs = np.array([-3.0, -1.0, -9.0, -2.0])
    >>> likelier_first((0, 3), log_probs), likelier_first(None, log_probs)
    ((3, 0), (1, 3))
  """
  if pair is None:
    pair = tuple(np.argsort(-log_probs, kind='stable')[:2].tolist())
  first, second = sorted(pair, key=lambda index: -log_probs[index])
  return first, second
