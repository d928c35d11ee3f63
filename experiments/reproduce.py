"""Everything the papers measured, in one page, claim by claim.

  python -m experiments.reproduce --workdir=out

runs every experiment into a folder of its own (`out/equivalence`, ...), then
writes `out/report/index.html`, self-contained, and `out/report/claims.json`: a
list of `{id, source, claim, statistic, value, interval, verdict, command}`. A
finished experiment is not run again; a killed one resumes. `--fast` takes tiny
settings to see that all works: its verdicts mean nothing, and it needs a
workdir of its own.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from experiments import claims as judging
from experiments import harness, reproduce_diagrams, reproduce_page
from experiments.reproduce_jobs import JOBS, Job


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
  import tqdm

  if not os.fspath(workdir):
    raise ValueError('workdir is empty; expected the path of a folder.')
  root = pathlib.Path(workdir)
  report = harness.open_workdir(config, root / 'report')
  start, sections = time.perf_counter(), []
  bar = tqdm.tqdm(JOBS, desc='experiments', unit='experiment')
  for job in bar:
    bar.set_postfix_str(job.name)
    sections.append(_section(config, job, root / job.name))
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


def _section(
  config: Config, job: Job, folder: pathlib.Path
) -> reproduce_page.Section:
  """Runs one experiment, or reads what a finished run left."""
  options = job.fast if config.fast else job.options
  module = importlib.import_module(f'experiments.{job.module}')
  settings = module.Config(**options)
  harness.open_workdir(settings, folder)  # Refuses results of other settings.
  finished = folder / 'finished.json'
  if not finished.exists():
    start = time.perf_counter()
    module.run(settings, folder)
    seconds = {'seconds': time.perf_counter() - start}
    harness.write_text(finished, harness.to_json(seconds))
  flags = [f'--{name}={_flag(value)}' for name, value in options.items()]
  command = ['python', '-m', f'experiments.{job.module}', '--workdir=DIR']
  return reproduce_page.Section(
    name=job.name,
    title=job.title,
    command=' '.join(command + flags),
    folder=folder,
    summary=_distinct(job, _read(folder / 'summary.json')),
    seconds=_read(finished)['seconds'],
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
