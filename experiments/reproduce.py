"""Everything the papers measured, in one page, claim by claim.

  python -m experiments.reproduce --workdir=out

runs every experiment into a folder of its own (`out/equivalence`, ...), then
writes `out/report/index.html`, self-contained, and `out/report/claims.json`: a
list of `{id, source, claim, statistic, value, interval, verdict, command}`. A
finished experiment is not run again; a killed one resumes. Each runs in a
process of its own, as many at a time as there are cores, up to four, and
prints its table and its progress to `log.txt` in its folder. `--fast` takes
tiny settings to see that all works: its verdicts mean nothing, and it needs a
workdir of its own.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from experiments import claims as judging
from experiments import harness, reproduce_diagrams, reproduce_page
from experiments.reproduce_jobs import JOBS, Job

FINISHED = 'finished.json'
MAX_WORKERS = 4  # Some experiments need a gigabyte.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  fast: bool = harness.option(False, 'tiny settings; verdicts mean nothing')


def run(config: Config, workdir: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Runs what is not finished, and writes the page.

  Args:
    config: settings.
    workdir: folder of the folders of all experiments.

  Returns:
    The summary: numbers of verdicts and seconds.

  Raises:
    ValueError: if the workdir cannot be used, or an experiment cannot run.
  """
  if not os.fspath(workdir):
    raise ValueError('workdir is empty; expected the path of a folder.')
  root = pathlib.Path(workdir)
  report = harness.open_workdir(config, root / 'report')
  start = time.perf_counter()
  _run_unfinished(config, root)
  sections = [_section(config, job, root / job.name) for job in JOBS]
  all_claims = [claim for part in sections for claim in part.summary['claims']]
  judging.check(all_claims)
  diagrams = reproduce_diagrams.save(report)
  page = reproduce_page.page(sections, diagrams, report, fast=config.fast)
  harness.write_text(report / 'index.html', page)
  harness.write_text(report / 'claims.json', harness.to_json(all_claims))
  counts = {
    verdict: sum(claim['verdict'] == verdict for claim in all_claims)
    for verdict in judging.VERDICTS
  }
  print(_text(sections, counts))
  print(f'report: {report / "index.html"}')
  summary = {
    'claims': counts,
    'seconds': time.perf_counter() - start,
    'seconds_by_experiment': {part.name: part.seconds for part in sections},
  }
  return harness.write_summary(report, summary)


def _run_unfinished(config: Config, root: pathlib.Path) -> None:
  """Runs in processes of their own what no earlier call has finished."""
  import tqdm

  for job in JOBS:  # Refuses results of other settings before any work.
    harness.open_workdir(_settings(config, job), root / job.name)
  jobs = [job for job in JOBS if not (root / job.name / FINISHED).exists()]
  with (
    _pool(config) as pool,
    tqdm.tqdm(total=len(jobs), unit='experiment') as bar,
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
    initializer=harness.compile_unoptimised if config.fast else None,
  )


def _settings(config: Config, job: Job) -> Any:
  module = importlib.import_module(f'experiments.{job.module}')
  return module.Config(**(job.fast if config.fast else job.options))


def _run_job(job: Job, settings: Any, folder: pathlib.Path) -> str:
  """Runs one experiment; what it prints goes to a file."""
  module = importlib.import_module(f'experiments.{job.module}')
  start = time.perf_counter()
  with (
    open(folder / 'log.txt', 'w', encoding='utf-8') as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    module.run(settings, folder)
  seconds = {'seconds': time.perf_counter() - start}
  harness.write_text(folder / FINISHED, harness.to_json(seconds))
  return job.name


def _section(
  config: Config, job: Job, folder: pathlib.Path
) -> reproduce_page.Section:
  """Reads what a finished run left."""
  options = job.fast if config.fast else job.options
  flags = [f'--{name}={_flag(value)}' for name, value in options.items()]
  command = ['python', '-m', f'experiments.{job.module}', '--workdir=DIR']
  return reproduce_page.Section(
    name=job.name,
    title=job.title,
    command=' '.join(command + flags),
    folder=folder,
    summary=_distinct(job, _read(folder / 'summary.json')),
    seconds=_read(folder / FINISHED)['seconds'],
  )


def _distinct(job: Job, summary: dict[str, Any]) -> dict[str, Any]:
  """Marks the claims of a second run of the same experiment."""
  if job.name == job.module:
    return summary
  claims = [
    claim | {'id': f'{job.name}: {claim["id"]}'} for claim in summary['claims']
  ]
  return summary | {'claims': claims}


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f'workdir holds an unreadable {path.name} ({error}); delete '
      f'{str(path.parent)!r} to run that experiment again.'
    ) from error


def _flag(value: Any) -> str:
  if isinstance(value, bool):
    return str(value).lower()
  return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _text(sections, counts: Mapping[str, int]) -> str:
  rows = [
    {
      'experiment': part.name,
      **{
        verdict: sum(
          claim['verdict'] == verdict for claim in part.summary['claims']
        )
        for verdict in judging.VERDICTS
      },
      'seconds': round(part.seconds),
    }
    for part in sections
  ]
  total = ', '.join(f'{count} {verdict}' for verdict, count in counts.items())
  return f'{harness.table(rows)}\n\nclaims: {total}'


if __name__ == '__main__':
  harness.run_binary(Config, run)
