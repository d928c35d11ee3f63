"""The page of all claims: complete, honest about failures, self-contained."""

import dataclasses
import html.parser
import importlib
import json
from concurrent import futures

import pytest

from experiments import claims as judging
from experiments import reproduce, reproduce_diagrams, reproduce_page

CLAIM = {
  'id': 'a',
  'source': 'v1 Fig. <1>',
  'claim': 'errors fall & fall',
  'statistic': 'slope; at most -1',
  'value': -1.25,
  'interval': [-1.5, -1.0],
  'verdict': 'reproduced',
  'command': 'python -m experiments.a --workdir=DIR',
}


@pytest.mark.parametrize(
  ('low', 'high', 'verdict'),
  [
    (0.2, 0.8, 'reproduced'),
    (0.0, 1.0, 'reproduced'),
    (-0.1, 0.5, 'undecided'),
    (0.5, 1.1, 'undecided'),
    (-1.0, 2.0, 'undecided'),
    (1.1, 2.0, 'not reproduced'),
    (-2.0, -0.1, 'not reproduced'),
    (float('nan'), 0.5, 'not reproduced'),
    (0.5, float('nan'), 'not reproduced'),
  ],
)
def test_an_interval_is_judged_as_a_whole(low, high, verdict):
  assert judging.judge(low, high, at_least=0, at_most=1) == verdict


def test_incomplete_claims_are_named():
  judging.check([CLAIM, CLAIM | {'id': 'b'}])
  for claims, message in (
    ([{'id': 'a'}], "claim 'a' lacks source, claim"),
    ([CLAIM | {'verdict': 'true'}], "claim 'a' has the verdict 'true'"),
    ([CLAIM, CLAIM], "claim 'a' occurs twice"),
  ):
    with pytest.raises(ValueError, match=message):
      judging.check(claims)


class _Reader(html.parser.HTMLParser):
  """Collects text and addresses."""

  def __init__(self):
    super().__init__()
    self.words, self.addresses = [], []

  def handle_data(self, data):
    self.words.append(data)

  def handle_starttag(self, tag, attrs):
    self.addresses += [v for k, v in attrs if k in ('src', 'href')]


@pytest.fixture
def section(tmp_path):
  (tmp_path / 'figures').mkdir()
  (tmp_path / 'figures/x.png').write_bytes(b'image')
  failed = CLAIM | {
    'id': 'b',
    'verdict': 'not reproduced',
    'value': None,
    'interval': None,
  }
  summary = {
    'claims': [CLAIM, failed],
    'figures': [{'file': 'figures/x.png', 'caption': 'What <x> shows.'}],
    'conclusion': 'One holds, one does not.',
  }
  return reproduce_page.Section(
    name='a',
    title='Title',
    command='python -m experiments.a --workdir=DIR',
    folder=tmp_path,
    summary=summary,
    seconds=1.0,
  )


def test_the_page_tells_all_and_needs_no_other_file(section, tmp_path):
  figures = section.summary['figures']
  text = reproduce_page.page([section], figures, tmp_path, fast=False)
  reader = _Reader()
  reader.feed(text)
  words = ' '.join(reader.words)
  for part in (
    'errors fall & fall',
    'v1 Fig. <1>',
    'slope; at most -1',
    '-1.25 [-1.5, -1]',
    'not finite',
    '✓ reproduced',
    '✗ not reproduced',
    'One holds, one does not.',
    'What <x> shows.',
    'python -m experiments.a --workdir=DIR',
  ):
    assert part in words, part
  assert 'mean nothing' not in words
  assert len(reader.addresses) == 3
  assert all(a.startswith(('#', 'data:')) for a in reader.addresses)
  fast = reproduce_page.page([section], [], tmp_path, fast=True)
  assert 'verdicts mean nothing' in fast


def test_a_missing_figure_is_named(section, tmp_path):
  (tmp_path / 'figures/x.png').unlink()
  with pytest.raises(ValueError, match=r'x\.png.* is missing'):
    reproduce_page.page([section], [], tmp_path, fast=False)


def test_schemes_are_drawn(tmp_path):
  (tmp_path / 'figures').mkdir()
  for row in reproduce_diagrams.save(tmp_path):
    assert (tmp_path / row['file']).stat().st_size > 10_000
    assert row['caption'].endswith('.')


@pytest.mark.parametrize('job', reproduce.JOBS, ids=lambda job: job.name)
def test_every_job_has_settings_that_its_experiment_accepts(job):
  module = importlib.import_module(f'experiments.{job.module}')
  default, fast = module.Config(**job.options), module.Config(**job.fast)
  assert default != fast
  assert {field.name for field in dataclasses.fields(fast)} >= set(job.fast)


def test_names_of_jobs_are_distinct():
  names = [job.name for job in reproduce.JOBS]
  assert len(set(names)) == len(names)
  assert 'report' not in names


def test_a_second_run_of_an_experiment_has_claims_of_its_own():
  job = reproduce.JOBS[0]._replace(name='other')
  assert reproduce._distinct(job, {'claims': [CLAIM]})['claims'][0]['id'] == (
    'other: a'
  )


@dataclasses.dataclass(frozen=True)
class _Config:
  size: int = 1


class _Experiment:
  """An experiment that counts its runs."""

  Config = _Config
  runs = 0

  @classmethod
  def run(cls, config, folder):
    cls.runs += 1
    (folder / 'figures/x.png').write_bytes(b'image')
    figures = [{'file': 'figures/x.png', 'caption': 'A caption.'}]
    summary = {'claims': [CLAIM], 'figures': figures, 'conclusion': 'Holds.'}
    (folder / 'summary.json').write_text(json.dumps(summary))


def test_finished_experiments_are_not_run_again(tmp_path, monkeypatch):
  job = reproduce.Job('equivalence', 'equivalence', 'Title', {}, {'size': 2})
  monkeypatch.setattr(reproduce, 'JOBS', (job,))
  monkeypatch.setattr(importlib, 'import_module', lambda name: _Experiment)
  monkeypatch.setattr(
    reproduce, '_pool', lambda config: futures.ThreadPoolExecutor(1)
  )
  for _ in range(2):
    summary = reproduce.run(reproduce.Config(), tmp_path)
    assert summary['claims'] == {
      'reproduced': 1,
      'not reproduced': 0,
      'undecided': 0,
    }
  assert _Experiment.runs == 1
  claims = json.loads((tmp_path / 'report/claims.json').read_text())
  assert claims == [CLAIM]
  assert (tmp_path / 'report/index.html').exists()
  with pytest.raises(ValueError, match='workdir holds a run with'):
    reproduce.run(reproduce.Config(fast=True), tmp_path)
  (tmp_path / 'equivalence/summary.json').write_text('{')
  with pytest.raises(ValueError, match=r'unreadable summary\.json'):
    reproduce.run(reproduce.Config(), tmp_path)
  with pytest.raises(ValueError, match='workdir is empty'):
    reproduce.run(reproduce.Config(), '')
