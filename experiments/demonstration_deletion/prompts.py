"""Few-shot prompts of real reviews."""

from typing import Any, NamedTuple

import numpy as np

from experiments.demonstration_deletion import reviews
from iclcl_jax.pretrained import Tokenizer, attribution

# The first token of a prompt draws much attention whatever it is: it must not
# belong to a demonstration.
INSTRUCTION = 'Film reviews and their sentiment.\n\n'
TEMPLATE = 'Review: {}\nSentiment:'
LABELS = ' Positive', ' Negative'
END = '\n\n'
MIN_WORDS, MAX_WORDS = 4, 14
# Reviews that are looked at for each one that is short enough in tokens.
SPARE = 1.5
ROUNDING = 8  # Lengths are padded to a multiple of this.


class Prompts(NamedTuple):
  """Prompts, padded on the right; `P` prompts, `S` demonstrations each.

  Attributes:
    tokens: ids. Shape `[P, N]`.
    mask: tokens that are no padding. Shape `[P, N]`.
    segment_ids: demonstration of each token, -1 for the rest. Shape `[P, N]`.
    positive: labels of the demonstrations. Shape `[P, S]`.
    query_positive: what the critic of the query thought. Shape `[P]`.
    lengths: tokens of each demonstration. Shape `[P, S]`.
  """

  tokens: np.ndarray
  mask: np.ndarray
  segment_ids: np.ndarray
  positive: np.ndarray
  query_positive: np.ndarray
  lengths: np.ndarray


def make(config: Any, tokenizer: Tokenizer) -> Prompts:
  """Builds the prompts: as many positive demonstrations as negative ones.

  With an odd number, one kind is one more, alternating between prompts. Orders
  are random, no review occurs twice.

  Args:
    config: settings of the experiment.
    tokenizer: of the model.

  Returns:
    The `Prompts`.

  Raises:
    ValueError: if there are not as many short reviews.
  """
  kinds = _kinds(config)
  stock = _short_reviews(config, tokenizer, kinds)
  drawn = [[stock[bool(kind)].pop() for kind in row] for row in kinds]
  return _pad([_encode(tokenizer, row) for row in drawn], kinds)


def _kinds(config: Any) -> np.ndarray:
  """Which reviews are positive, the query last. Shape `[P, S + 1]`."""
  rng = np.random.default_rng(config.seed)
  number = np.arange(config.num_prompts)[:, None]
  places = np.arange(config.num_demonstrations)[None]
  demonstrations = rng.permuted((places + number) % 2 == 0, axis=1)
  return np.concatenate([demonstrations, number // 2 % 2 == 0], axis=1)


def _short_reviews(
  config: Any, tokenizer: Tokenizer, kinds: np.ndarray
) -> dict[bool, list[reviews.Review]]:
  """Reviews of both kinds that are short enough as demonstrations."""
  needed = max(np.sum(kinds), np.sum(~kinds))
  found = reviews.draw(
    2 * round(SPARE * needed) + 20,
    seed=config.seed,
    min_words=MIN_WORDS,
    max_words=MAX_WORDS,
  )
  stock: dict[bool, list[reviews.Review]] = {True: [], False: []}
  for review in reversed(found):
    text = _demonstration(review.text, review.positive)
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


def _demonstration(text: str, positive: bool) -> str:
  return TEMPLATE.format(text) + LABELS[not positive] + END


def _encode(
  tokenizer: Tokenizer, row: list[reviews.Review]
) -> tuple[np.ndarray, np.ndarray]:
  """Ids of one prompt and the demonstration that each belongs to."""
  text, spans = INSTRUCTION, []
  *demonstrations, query = row
  for review in demonstrations:
    begin = len(text)
    text += _demonstration(review.text, review.positive)
    spans.append((begin, len(text)))
  text += TEMPLATE.format(query.text)
  tokens = tokenizer.encode(text)
  spans = attribution.token_spans(tokenizer, text, spans)
  return tokens, attribution.mark_spans(spans, len(tokens))


def _pad(
  encoded: list[tuple[np.ndarray, np.ndarray]], kinds: np.ndarray
) -> Prompts:
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
