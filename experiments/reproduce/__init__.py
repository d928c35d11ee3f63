"""Everything the papers measured, in one page, claim by claim.

  python -m experiments.reproduce --workdir=out

runs every experiment into a folder of its own (`out/equivalence`, ...), then
writes `out/report/index.html`; `claims.json`, a list of `{id, source, claim,
statistic, value, interval, verdict, command}`; and the same as
`tables/claims.csv` and `.tex`. A finished experiment (its `summary.json` is
there) is not run again; a killed one resumes. Each runs in another process, as
many at a time as there are cores, up to four, and prints to `log.txt` in its
folder. `--fast` takes the tiny settings of every experiment to see that all
works: its verdicts mean nothing, and it needs a workdir of its own. A long one
is on the page if its own command has left its results in its folder.

It takes about 9 minutes on two idle cores, `--fast` two, the long ones
included.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import lab
from experiments.lab import claims as judging, tables, workdir as folders
from experiments.reproduce import page as pages

MAX_WORKERS = 4  # Some experiments need a gigabyte.
BEGIN = 'finetuning', 'modifications', 'linear_regression_gd', 'approximation'


class Job(NamedTuple):
  name: str  # Its module in `experiments`, and its folder.
  title: str  # Its heading.
  options: Mapping[str, Any] = {}  # Of its config, if not the default.
  is_long: bool = False  # Not run here, unless with tiny settings.


JOBS = (
  Job('equivalence', 'Attention is one gradient step'),
  Job('approximation', 'Random features against softmax'),
  Job('modifications', 'Regularised, augmented and negative attention'),
  Job(
    'regularized_gradient_descent',
    'The regularised layer against regularised gradient descent',
  ),
  Job('generalization', 'The generalisation bound'),
  Job('learning_processes', 'Three ways to learn a representation'),
  Job('softmax_regression', 'Softmax regression: shifts of weights and data'),
  Job(
    'training_data_attention',
    'A trained network as attention over its training data',
  ),
  Job('meta_optimizer', 'Implicit finetuning, its metrics and their nulls'),
  Job(
    'linear_regression_gd',
    'Linear self-attention and gradient descent',
    {
      'num_steps': 2000,
      'num_test_tasks': 4000,
      'deep_steps': 1000,
      'parts': ('steps', 'stacks', 'alternating'),
    },
  ),
  Job('accounts', 'All accounts on the same tasks'),
  Job('scaling', 'Demonstrations sharded over devices'),
  Job('momentum_language_model', 'Momentum attention', is_long=True),
  Job('modified_encoder', 'Modified attention in an encoder', is_long=True),
  Job('finetuning', 'Learning in context against finetuning', is_long=True),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(lab.Config):
  fast: bool = lab.option(False, 'tiny settings; verdicts mean nothing')


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs what is not finished, in folders of the workdir, and writes the page.

  Returns the summary: numbers of verdicts and seconds.
  """
  if not os.fspath(workdir):
    raise ValueError('workdir is empty; expected the path of a folder.')
  root = folders.Workdir(workdir).expanduser()
  report = folders.open_workdir(config, root / 'report')
  start = time.perf_counter()
  wanted = [x for x in JOBS if not x.is_long or config.fast or _done(x, root)]
  _run_unfinished(config, wanted, root)
  sections = [_section(config, job, root / job.name) for job in wanted]
  claims = [claim for part in sections for claim in part.summary['claims']]
  judging.check(claims)
  page = pages.page(sections, report, fast=config.fast)
  folders.write_text(report / 'index.html', page)
  folders.write_text(report / 'claims.json', folders.to_json(claims))
  tables.write(report, 'claims', judging.rows(claims))
  counts = judging.counts(claims)
  summary = {
    'claims': counts,
    'seconds': time.perf_counter() - start,
    'seconds_by_experiment': {part.name: part.seconds for part in sections},
  }
  folders.write_text(report / 'summary.json', folders.to_json(summary))
  rows = [
    {'experiment': part.name}
    | judging.counts(part.summary['claims'])
    | {'seconds': round(part.seconds)}
    for part in sections
  ]
  total = ', '.join(f'{count} {verdict}' for verdict, count in counts.items())
  print(f'{tables.text(rows)}\n\nclaims: {total}')
  print(f'report: {report / "index.html"}')
  return summary


def _done(job: Job, root: folders.Workdir) -> bool:
  return (root / job.name / 'summary.json').exists()


def _run_unfinished(config: Config, wanted, root: folders.Workdir) -> None:
  """Runs in processes of their own what no earlier call has finished."""
  import tqdm

  for job in wanted:  # Refuses results of other settings before any work.
    folders.open_workdir(_settings(config, job), root / job.name)
  jobs = sorted(
    (job for job in wanted if not _done(job, root)),
    key=lambda job: job.name not in BEGIN,
  )
  with (
    _pool(config) as pool,
    tqdm.tqdm(total=len(jobs), unit='experiment', disable=None) as bar,
  ):
    running = [
      pool.submit(_run_job, job, _settings(config, job), root / job.name)
      for job in jobs
    ]
    for future in concurrent.futures.as_completed(running):
      if future.exception():
        pool.shutdown(cancel_futures=True)
      bar.set_postfix_str(future.result())
      bar.update()


def _pool(config: Config) -> concurrent.futures.Executor:
  return concurrent.futures.ProcessPoolExecutor(
    min(os.cpu_count() or 1, MAX_WORKERS),
    mp_context=multiprocessing.get_context('spawn'),
    initializer=lab.compile_unoptimised if config.fast else None,
  )


def _settings(config: Config, job: Job) -> Any:
  settings = importlib.import_module(f'experiments.{job.name}').Config
  return settings.tiny() if config.fast else settings(**job.options)


def _run_job(job: Job, settings: Any, folder: folders.Workdir) -> str:
  module = importlib.import_module(f'experiments.{job.name}')
  with (
    open(folder / 'log.txt', 'w', encoding='utf-8') as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    module.run(settings, folder)
  return job.name


def _section(config: Config, job: Job, folder: lab.Workdir) -> pages.Section:
  summary = folders.read_json(folder / 'summary.json')
  return pages.Section(
    name=job.name,
    title=job.title,
    command=lab.command_of(_settings(config, job)),
    folder=folder,
    summary=summary,
    seconds=summary['seconds']['total'],
  )
