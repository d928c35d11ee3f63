"""Few-shot prompts of labelled texts, as arrays of one length."""

from typing import Any, NamedTuple

import numpy as np

from experiments.lab import Config
from experiments.lab.texts import Review, Task
from iclcl_jax.pretrained import Tokenizer, attribution

MIN_WORDS, MAX_WORDS = 4, 14
# Reviews that are looked at for each one that is short enough in tokens.
SPARE = 1.5
ROUNDING = 8  # Lengths are padded to a multiple of this.


class Prompts(NamedTuple):
  """Prompts, padded on the right; `P` prompts, `S` demonstrations each."""

  tokens: np.ndarray  # Ids. Shape `[P, N]`.
  mask: np.ndarray  # Tokens that are no padding. Shape `[P, N]`.
  segment_ids: np.ndarray  # Demonstration of each token, or -1, `[P, N]`.
  positive: np.ndarray  # Labels of the demonstrations. Shape `[P, S]`.
  query_positive: np.ndarray  # What the critic of the query thought, `[P]`.
  lengths: np.ndarray  # Tokens of each demonstration. Shape `[P, S]`.


def make(
  config: Config, tokenizer: Tokenizer, task: Task, num_prompts: int, size: int
) -> Prompts:
  """Builds prompts of `size` demonstrations, as many positive as negative.

  With an odd number, one kind is one more, alternating between prompts. Orders
  are random, no text occurs twice.
  """
  kinds = _kinds(config.seed, num_prompts, size)
  stock = _short_reviews(config, tokenizer, task, kinds)
  drawn = [[stock[bool(kind)].pop() for kind in row] for row in kinds]
  return pad([encode(tokenizer, task, row) for row in drawn], kinds)


def _kinds(seed: int, num_prompts: int, size: int) -> np.ndarray:
  """Which reviews are positive, the query last. Shape `[P, S + 1]`."""
  rng = np.random.default_rng(seed)
  number = np.arange(num_prompts)[:, None]
  places = np.arange(size)[None]
  demonstrations = rng.permuted((places + number) % 2 == 0, axis=1)
  return np.concatenate([demonstrations, number // 2 % 2 == 0], axis=1)


def _short_reviews(
  config: Config, tokenizer: Tokenizer, task: Task, kinds: np.ndarray
) -> dict[bool, list[Review]]:
  """Reviews of both kinds that are short enough as demonstrations."""
  needed = max(np.sum(kinds), np.sum(~kinds))
  found = task.draw(
    2 * round(SPARE * needed) + 20,
    seed=config.seed,
    min_words=MIN_WORDS,
    max_words=MAX_WORDS,
  )
  stock: dict[bool, list[Review]] = {True: [], False: []}
  for review in reversed(found):
    text = task.demonstration(review.text, review.positive)
    if len(tokenizer.encode(text)) <= config.max_tokens:
      stock[review.positive].append(review)
  fewest = min(map(len, stock.values()))
  if fewest < needed:
    raise ValueError(
      f'only {fewest} reviews of a kind have at most {config.max_tokens} '
      f'tokens as demonstrations, max_tokens; expected {needed}. Raise '
      'max_tokens, or ask for fewer prompts.'
    )
  return stock


def encode(
  tokenizer: Tokenizer, task: Task, row: list[Review]
) -> tuple[np.ndarray, np.ndarray]:
  """Ids of one prompt and the demonstration that each belongs to."""
  text, spans = task.instruction, []
  *demonstrations, query = row
  for review in demonstrations:
    begin = len(text)
    text += task.demonstration(review.text, review.positive)
    spans.append((begin, len(text)))
  text += task.template.format(query.text)
  segment_ids = attribution.mark_spans(tokenizer, text, spans)
  return tokenizer.encode(text), segment_ids


def pad(encoded: list[tuple[Any, Any]], kinds: np.ndarray) -> Prompts:
  """Stacks prompts of different lengths."""
  sizes = np.array([len(tokens) for tokens, _ in encoded])
  length = -(-sizes.max() // ROUNDING) * ROUNDING

  def stack(rows, fill):
    return np.stack(
      [np.pad(x, (0, length - len(x)), constant_values=fill) for x in rows]
    )

  tokens, segment_ids = zip(*encoded, strict=True)
  segment_ids = stack(segment_ids, -1)
  numbers = np.arange(kinds.shape[1] - 1)
  return Prompts(
    tokens=stack(tokens, 0),
    mask=np.arange(length) < sizes[:, None],
    segment_ids=segment_ids,
    positive=kinds[:, :-1],
    query_positive=kinds[:, -1],
    lengths=(segment_ids[:, None] == numbers[:, None]).sum(axis=2),
  )
