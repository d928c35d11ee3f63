"""The page of all claims: complete, honest about failures, self-contained."""

import dataclasses
import html.parser
import importlib
import json
import os
from concurrent import futures

import numpy as np
import PIL.Image
import pytest

from experiments import lab, reproduce
from experiments.lab import claims as judging
from experiments.reproduce import page

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
FAILED = CLAIM | {
  'id': 'b',
  'verdict': 'not reproduced',
  'value': None,
  'interval': None,
}
SUMMARY = {
  'claims': [CLAIM, FAILED],
  'figures': [{'file': 'figures/x.png', 'caption': 'What <x> shows.'}],
  'conclusion': 'One holds, one does not.',
  'seconds': {'total': 1.0},
}


@pytest.mark.parametrize(
  ('claims', 'message'),
  [
    ([{'id': 'a'}], "claim 'a' lacks source, claim"),
    ([CLAIM | {'verdict': 'true'}], "claim 'a' has the verdict 'true'"),
    ([CLAIM, CLAIM], "claim 'a' occurs twice"),
  ],
)
def test_incomplete_claims_are_named(claims, message):
  judging.check([CLAIM, FAILED])
  with pytest.raises(ValueError, match=message):
    judging.check(claims)


class _Reader(html.parser.HTMLParser):
  """Collects text and addresses."""

  def __init__(self, text):
    super().__init__()
    self.words, self.addresses = '', []
    self.feed(text)

  def handle_data(self, data):
    self.words += f' {" ".join(data.split())}'

  def handle_starttag(self, tag, attrs):
    self.addresses += [v for k, v in attrs if k in ('src', 'href')]


def _draw(folder):
  (folder / 'figures').mkdir(exist_ok=True)
  noise = np.random.default_rng(0).integers(0, 255, (900, 1600, 3), np.uint8)
  PIL.Image.fromarray(noise).save(folder / 'figures/x.png')


@pytest.fixture
def section(tmp_path):
  _draw(tmp_path)
  command = 'python -m experiments.a --workdir=DIR'
  return page.Section('a', 'Title', command, tmp_path, SUMMARY, seconds=1.0)


def test_the_page_tells_all_and_needs_no_other_file(section, tmp_path):
  text = page.page([section], tmp_path, fast=False)
  reader = _Reader(text)
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
    assert part in reader.words, part
  assert 'mean nothing' not in reader.words
  images = [a for a in reader.addresses if a.startswith('data:image/webp')]
  assert len(images) == 1
  assert reader.addresses.count('figures/x.png') == 1  # In full size.
  assert text.count('<svg') == 3  # The schemes.
  assert 'test input φ(q)' in reader.words
  fast = _Reader(page.page([section], tmp_path, fast=True)).words
  assert 'verdicts mean nothing' in fast
  assert 'What to conclude' not in fast


def test_a_missing_figure_is_named(section, tmp_path):
  (tmp_path / 'figures/x.png').unlink()
  with pytest.raises(ValueError, match=r'x\.png.* is missing'):
    page.page([section], tmp_path, fast=False)


def test_ten_conclusions_rest_on_claims_or_say_that_they_do_not():
  lines = page.LINES
  assert len(lines) == 10
  assert {line.section for line in lines} <= {
    job.name for job in reproduce.JOBS
  }
  borne_out = [
    CLAIM | {'id': name, 'verdict': verdict, 'value': 0.125}
    for name, verdict in {
      k: v for x in lines for k, v in x.verdicts.items()
    }.items()
  ]
  found = page.lines(borne_out)
  assert not any(line.dissent for line in found)
  assert all('0.125' in line.text and '{' not in line.text for line in found)
  otherwise = [claim | {'verdict': 'undecided'} for claim in borne_out[:1]]
  first, second = page.lines(otherwise)[:2]
  assert first.dissent[0].endswith(': undecided')
  assert all(x.endswith(': not measured') for x in second.dissent)
  assert 'no number' in second.text


def test_every_job_has_settings_that_its_experiment_accepts():
  names = [job.name for job in reproduce.JOBS]
  assert len(set(names) - {'report'}) == len(names)
  for job in reproduce.JOBS:
    slow, fast = (
      reproduce._settings(reproduce.Config(fast=fast), job)
      for fast in (False, True)
    )
    assert slow != fast
    assert fast == dataclasses.replace(fast)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config(lab.Config):
  size: int = 1

  @classmethod
  def tiny(cls):
    return cls(size=2)


class _Experiment:
  """An experiment that counts its runs."""

  Config = _Config
  runs = 0

  @classmethod
  def run(cls, config, folder):
    cls.runs += 1
    print('what a run says')
    _draw(folder)
    (folder / 'summary.json').write_text(json.dumps(SUMMARY))


def test_finished_experiments_are_not_run_again(tmp_path, monkeypatch):
  job = reproduce.Job('equivalence', 'Title', {'size': 3})
  long = reproduce.Job('scaling', 'Not run, and no results', is_long=True)
  monkeypatch.setattr(reproduce, 'JOBS', (job, long))
  imported = importlib.import_module

  def load(name, *package):
    ours = name.startswith('experiments.')
    return _Experiment if ours else imported(name, *package)

  monkeypatch.setattr(importlib, 'import_module', load)
  monkeypatch.setattr(
    reproduce, '_pool', lambda config: futures.ThreadPoolExecutor(1)
  )
  for _ in range(2):
    summary = reproduce.run(reproduce.Config(), tmp_path)
    assert summary['claims'] == judging.counts(SUMMARY['claims'])
  assert _Experiment.runs == 1
  assert 'what a run' in (tmp_path / 'equivalence/log.txt').read_text()
  report = tmp_path / 'report'
  assert json.loads((report / 'claims.json').read_text()) == SUMMARY['claims']
  assert len((report / 'tables/claims.csv').read_text().splitlines()) == 3
  addresses = _Reader((report / 'index.html').read_text()).addresses
  files = {a for a in addresses if not a.startswith(('#', 'data:'))}
  assert '../equivalence/figures/x.png' in files
  assert all(os.path.exists(report / file) for file in files)
  with pytest.raises(ValueError, match='workdir holds a run with'):
    reproduce.run(reproduce.Config(fast=True), tmp_path)
  (tmp_path / 'equivalence/summary.json').write_text('{')
  with pytest.raises(ValueError, match=r'unreadable summary\.json'):
    reproduce.run(reproduce.Config(), tmp_path)
  with pytest.raises(ValueError, match='workdir is empty'):
    reproduce.run(reproduce.Config(), '')
