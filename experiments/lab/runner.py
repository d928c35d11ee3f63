"""Parts of an experiment, and the one way to run them."""

import concurrent.futures
import contextvars
import dataclasses
import functools
import os
import shlex
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

from experiments.lab import (
  claims as judging,
  compiling,
  config as options,
  figures as drawing,
  loops,
  tables as tabulating,
  workdir,
)
from experiments.lab.claims import Claim, Claims

Metrics = Iterable[Mapping[str, Any]]


def _nothing(config: Any, results: Any) -> Any:
  """What a question adds that has nothing to say: an empty mapping or list."""
  del config, results
  return {}


class Part(NamedTuple):
  """One question: what is measured, what is claimed, what is drawn.

  All but `measure` are functions of the config and of what it returned.

  Attributes:
    measure: `(config) -> results`, a NamedTuple declared beside it.
    claims: `(config, results)` -> `Claim`s, a list or a generator.
    figures: `(config, results) -> [Figure, ...]`, called under `lab.style`.
    summary: `(config, results) -> {key: value}`, what this question adds to
      `summary.json`. Mappings of several parts under one key become one, and a
      run holds (`holds`) if it does for each of them.
    tables: `(config, results) -> {name: rows}`; each becomes
      `tables/<name>.csv` and `.tex`.
    metrics: `(config, results) -> rows` of `metrics.jsonl`, likewise.
    pages: `(config, results) -> {file name: text}`, further files.
    sentence: `(config, results) -> text`, what to remember of this question;
      the conclusion is made of these unless the experiment has its own.
  """

  measure: Callable[[Any], Any]
  claims: Callable[[Any, Any], Claims] = _nothing
  figures: Callable[[Any, Any], Sequence[drawing.Figure]] = _nothing
  summary: Callable[[Any, Any], Mapping[str, Any]] = _nothing
  tables: Callable[[Any, Any], Mapping[str, tabulating.Rows]] = _nothing
  metrics: Callable[[Any, Any], Metrics] = _nothing
  pages: Callable[[Any, Any], Mapping[str, str]] = _nothing
  sentence: Callable[[Any, Any], str] = _nothing


def parts(*questions: types.ModuleType) -> dict[str, Part]:
  """Reads parts off modules whose functions are named like its attributes."""

  def part(module):
    found = {x: getattr(module, x, None) for x in Part._fields}
    return Part(**{k: x for k, x in found.items() if callable(x)})

  return {x.__name__.split('.')[-1]: part(x) for x in questions}


Conclude = Callable[[Any, Mapping[str, Any], Mapping[str, Claim]], str]

_ONCE: list[dict[Any, Any]] = []


def in_threads(
  fn: Callable[[Any], Any], items: Iterable[Any], *, workers: int = 2
) -> list[Any]:
  """Maps items in threads, in order, since compiling leaves cores idle.

  Settings of JAX belong to a thread: a function in float64 must say so itself.
  """
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    tasks = [pool.submit(contextvars.copy_context().run, fn, x) for x in items]
    return [future.result() for future in tasks]


def once(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Lets parts share a measurement `(config) -> results`, made once a run."""
  known: dict[Any, Any] = {}
  lock = threading.Lock()
  _ONCE.append(known)

  @functools.wraps(fn)
  def remembered(config):
    with lock:
      if config not in known:
        known[config] = fn(config)
      return known[config]

  return remembered


def run(
  parts: Mapping[str, Part],
  config: Any,
  folder: str | os.PathLike[str],
  *,
  conclude: Conclude | None = None,
  closing: Callable[[Mapping[str, Any]], str] = lambda summary: '',
  workers: int = 1,
) -> Mapping[str, Any]:
  """Runs the parts of an experiment, and writes all that they say.

  Writes `config.json`, `metrics.jsonl`, `summary.json`, `figures/` and
  `tables/`. A finished run is not run again: its results are read. A killed one
  resumes its loops (`lab.scan_blocks`).

  The conclusion, one paragraph whose first sentence stands alone, is that of
  `conclude(config, results by part, claims by id)`, else the sentences of the
  parts; `closing(summary)` is printed last. So many `workers` are threads that
  measure parts. Returns the summary.

  Raises:
    ValueError: if the workdir cannot be used, or a part refuses the config;
      then nothing is left in a workdir that was empty.
  """
  path = workdir.open_workdir(config, folder)
  finished = path / 'summary.json'
  if finished.exists():
    found = workdir.read_json(finished)
    print(report(found, closing))
    return found
  start = time.perf_counter()
  seconds: dict[str, float] = {}
  try:
    results = _measure(parts, config, path, workers, seconds)
  except ValueError:
    workdir.leave_nothing(path)
    raise
  finally:
    for known in _ONCE:
      known.clear()
  answered = [(part, results[name]) for name, part in parts.items()]
  claims = [claim for part, x in answered for claim in part.claims(config, x)]
  summary: dict[str, Any] = {}
  for part, result in answered:
    summary = _merged(summary, part.summary(config, result))
  command = command_of(config)
  summary['claims'] = [claim.to_dict(command) for claim in claims]
  judging.check(summary['claims'])
  by_id = {claim.id: claim for claim in claims}
  if conclude is None:
    said = (part.sentence(config, x) or '' for part, x in answered)
    conclusion = ' '.join(said)
  else:
    conclusion = conclude(config, results, by_id)
  summary['conclusion'] = judging.one_line(conclusion)
  summary |= _write_files(config, answered, summary['claims'], path, seconds)
  summary['seconds'] = seconds | {'total': time.perf_counter() - start}
  workdir.write_text(finished, workdir.to_json(summary))
  found = workdir.read_json(finished)
  print(report(found, closing))
  return found


def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """Both summaries in one."""
  merged = {**a, **b}
  for name in a.keys() & b.keys():
    if isinstance(a[name], Mapping) and isinstance(b[name], Mapping):
      merged[name] = _merged(a[name], b[name])
    elif name == 'holds':
      merged[name] = a[name] and b[name]
  return merged


def _write_files(config, answered, claims, path, seconds) -> dict[str, Any]:
  """Writes what the parts draw and tabulate; returns what there is."""
  begin = time.perf_counter()
  with drawing.style():
    drawn = [
      drawing.save(path, figure)
      for part, result in answered
      for figure in part.figures(config, result)
    ]
  seconds['figures'] = time.perf_counter() - begin
  tabulated = {'claims': judging.rows(claims)} if claims else {}
  metrics: list[Mapping[str, Any]] = []
  for part, result in answered:
    tabulated |= part.tables(config, result)
    metrics += part.metrics(config, result)
    for file, text in part.pages(config, result).items():
      workdir.write_text(path / file, text)
  for name, rows in tabulated.items():
    tabulating.write(path, name, rows)
  workdir.write_metrics(path, metrics)
  return {'figures': drawn, 'tables': [f'tables/{x}.csv' for x in tabulated]}


def _measure(parts, config, path, workers, seconds) -> dict[str, Any]:
  """Measures all parts; each thread resumes from the checkpoints of the run."""

  def measure(name):
    begin = time.perf_counter()
    result = parts[name].measure(config)
    seconds[name] = time.perf_counter() - begin
    return result

  with loops.checkpoints_in(path / 'checkpoints'):
    if workers == 1:
      return {name: measure(name) for name in parts}
    found = in_threads(measure, parts, workers=workers)
    return dict(zip(parts, found, strict=True))


def command_of(config: Any) -> str:
  """The command that runs a config: a flag for what is not the default."""
  module = type(config).__module__
  if module == '__main__':  # An experiment of one file, run as a command.
    spec = sys.modules['__main__'].__spec__
    module = module if spec is None else spec.name
  words = ['python', '-m', '.'.join(module.split('.')[:2]), '--workdir=DIR']
  if config == type(config).tiny() != type(config)():
    return ' '.join([*words, '--tiny'])
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value != field.default:
      text = ','.join(map(str, value)) if isinstance(value, tuple) else value
      words.append(shlex.quote(f'--{field.name}={text}'))
  return ' '.join(words)


def report(
  summary: Mapping[str, Any],
  closing: Callable[[Mapping[str, Any]], str] = lambda summary: '',
) -> str:
  """What a person reads at the end: the conclusion, the claims, the rest."""
  parts = summary['conclusion'], _claims_text(summary), closing(summary)
  return '\n\n'.join(filter(None, parts))


def _claims_text(summary: Mapping[str, Any]) -> str:
  if not summary.get('claims'):
    return ''
  rows = [
    {
      'claim': row['claim'],
      'value': tabulating.number(row['value']),
      '95 % interval': '-'
      if row['interval'] is None
      else f'[{", ".join(map(tabulating.number, row["interval"]))}]',
      'verdict': row['verdict'],
    }
    for row in summary['claims']
  ]
  counts = judging.counts(summary['claims'])
  total = ', '.join(f'{count} {name}' for name, count in counts.items())
  return f'{tabulating.text(rows)}\n\nclaims: {total}'


def main(experiment: Any) -> None:
  """Runs an experiment as a command: one flag for each field of its config.

  Exits with status 1 on bad input, with the message of its `ValueError`, and if
  the summary says `'holds': False`. A module with a docstring, a `Config` and
  `run(config, workdir) -> summary`.
  """
  if {'--help', '-help', '-h', '--h'} & set(sys.argv[1:]):
    print(usage(experiment))
    return
  flags.DEFINE_string('workdir', '', 'folder of all results')
  options.define_flags(experiment.Config)

  def parse(argv: Sequence[str]) -> Sequence[str]:
    try:
      rest = flags.FLAGS(argv)
    except flags.Error as error:
      sys.exit(f'error: {error}\n--help lists the flags.')
    if len(rest) > 1:
      sys.exit(f'error: unknown arguments: {" ".join(rest[1:])}')
    return rest

  def start(argv: Sequence[str]) -> None:
    del argv
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # The checkpointer is talkative.
    if flags.FLAGS.tiny:
      compiling.compile_unoptimised()
    try:
      config = options.from_flags(experiment.Config)
      summary = experiment.run(config, flags.FLAGS.workdir)
    except ValueError as error:
      sys.exit(f'error: {error}')
    if summary.get('holds') is False:
      sys.exit(1)

  jax.config.config_with_absl()
  app.run(start, flags_parser=parse)


def usage(experiment: Any) -> str:
  """The text of `--help`: the flags of the experiment, then what it does."""
  lines = [f'{command_of(experiment.Config())} [flags]', '']
  texts = {'workdir': 'folder of all results (required)', 'tiny': options.TINY}
  for field in dataclasses.fields(experiment.Config):
    texts[field.name] = options.describe(field)
  for name, text in texts.items():
    lines.append(f'  --{name}')
    lines.append(textwrap.indent(textwrap.fill(text, 72), ' ' * 6))
  text = (experiment.__doc__ or '').strip()
  lines += ['', text, '', '--helpfull lists the flags of JAX.']
  return '\n'.join(lines)
