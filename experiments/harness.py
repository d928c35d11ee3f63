"""What every experiment shares: flags, workdir, checkpoints, figures, tables.

An experiment is a frozen `Config`, a function `run(config, workdir) -> summary`
and, at the end of its file::

  if __name__ == '__main__':
    harness.run_binary(Config, run)
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.experimental
import numpy as np
from absl import app, flags, logging

from experiments.blocks import scan_blocks as scan_blocks

Workdir = pathlib.Path


def option(default: Any, text: str) -> Any:
  """A field of a config, with the help text of its flag."""
  return dataclasses.field(default=default, metadata={'help': text})


def run_binary(
  config_type: type, run: Callable[[Any, str], Mapping[str, Any]]
) -> None:
  """Runs an experiment as a command: one flag for each field of its config.

  Exits with status 1 on bad input, with the message of its `ValueError`, and
  if the summary says `'holds': False`.

  Args:
    config_type: a frozen dataclass with defaults, whose fields are int, float,
      str, bool or tuples of these.
    run: `run(config, workdir) -> summary`.
  """
  flags.DEFINE_string('workdir', None, 'folder of all results', required=True)
  for field in dataclasses.fields(config_type):
    _define_flag(field)

  def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # The checkpointer is talkative.
    values = flags.FLAGS.flag_values_dict()
    names = [field.name for field in dataclasses.fields(config_type)]
    try:
      summary = run(
        config_type(
          **{
            name: tuple(values[name])
            if isinstance(values[name], list)
            else values[name]
            for name in names
          }
        ),
        values['workdir'],
      )
    except ValueError as error:
      sys.exit(f'error: {error}')
    if summary.get('holds') is False:
      sys.exit(1)

  jax.config.config_with_absl()
  app.run(main)


def _define_flag(field: dataclasses.Field) -> None:
  default, text = field.default, field.metadata.get('help', field.name)
  if isinstance(default, bool):
    flags.DEFINE_bool(field.name, default, text)
  elif isinstance(default, int):
    flags.DEFINE_integer(field.name, default, text)
  elif isinstance(default, float):
    flags.DEFINE_float(field.name, default, text)
  elif isinstance(default, str):
    flags.DEFINE_string(field.name, default, text)
  elif isinstance(default, tuple):
    parser: Any = {
      int: flags.IntegerParser(),
      float: flags.FloatParser(),
      str: flags.ArgumentParser(),
    }[type(default[0])]
    serializer = flags.CsvListSerializer(',')
    flags.DEFINE(
      _ListParser(parser),
      field.name,
      default,
      text,
      serializer=serializer,
    )
  else:
    raise TypeError(f'{field.name}: no flag for {type(default).__name__}')


class _ListParser(flags.ArgumentParser):
  """Parses comma-separated values, each by another parser."""

  def __init__(self, item_parser: flags.ArgumentParser):
    super().__init__()
    self._item_parser = item_parser
    self.syntactic_help = 'comma-separated'

  def parse(self, argument: Any) -> list[Any]:
    if not isinstance(argument, str):
      return list(argument)
    items = [item.strip() for item in argument.split(',') if item.strip()]
    return [self._item_parser.parse(item) for item in items]

  def flag_type(self) -> str:
    return 'comma-separated list'


def open_workdir(config: Any, workdir: str | os.PathLike[str]) -> Workdir:
  """Makes the workdir, or checks that it belongs to the same config.

  Args:
    config: the config of this run, a dataclass.
    workdir: folder of all results.

  Returns:
    The folder.

  Raises:
    ValueError: if it can't be written, or holds results of another config.
  """
  if not os.fspath(workdir):
    raise ValueError('workdir is empty; expected the path of a folder.')
  path = pathlib.Path(workdir)
  try:
    (path / 'figures').mkdir(parents=True, exist_ok=True)
    probe = path / f'.probe-{os.getpid()}'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f'workdir is {str(path)!r}, which cannot be written ({error.strerror});'
      ' expected a folder, or a path where one can be made.'
    ) from error
  ours = json.loads(to_json(dataclasses.asdict(config)))
  file = path / 'config.json'
  if file.exists():
    _check_same_config(file, ours)
  else:
    write_text(file, to_json(ours))
  return path


def _check_same_config(file: pathlib.Path, ours: Mapping[str, Any]) -> None:
  try:
    theirs = json.loads(file.read_text())
    if not isinstance(theirs, dict):
      raise ValueError('it holds no object')
  except (OSError, ValueError) as error:
    raise ValueError(
      f'workdir holds an unreadable config.json ({error}); delete '
      f'{str(file.parent)!r} or choose another --workdir.'
    ) from error
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise ValueError(
        f'workdir holds a run with {name}={theirs.get(name)!r}, this one has '
        f'{name}={ours.get(name)!r}; choose another --workdir, or delete '
        f'{str(file.parent)!r}.'
      )


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file under a temporary name, then renames it."""
  with replacing(path) as temporary:
    temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a temporary path that becomes `path` if the block succeeds."""
  temporary = path.with_name(f'.{os.getpid()}-{path.name}')
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def to_json(tree: Any) -> str:
  """Formats plain data and arrays as JSON; NaN and infinities become null."""

  def plain(node):
    if isinstance(node, Mapping):
      return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
      return [plain(item) for item in node]
    if hasattr(node, 'tolist'):
      return plain(np.asarray(node, copy=None).tolist())
    if isinstance(node, float) and not math.isfinite(node):
      return None
    return node

  return json.dumps(plain(tree), indent=2, allow_nan=False) + '\n'


def write_summary(
  workdir: Workdir, summary: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Writes `summary.json`, and returns it as plain data."""
  text = to_json(summary)
  write_text(workdir / 'summary.json', text)
  return json.loads(text)


def write_metrics(workdir: Workdir, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes `metrics.jsonl`, one JSON object a line."""
  lines = [json.dumps(json.loads(to_json(row))) for row in rows]
  write_text(workdir / 'metrics.jsonl', '\n'.join(lines) + '\n')


def save_figure(workdir: Workdir, name: str, figure: Any) -> None:
  """Writes `figures/<name>.png` and `.svg`, and closes the figure."""
  import matplotlib.pyplot as plt

  figure.draw_without_rendering()  # Find the layout once, not in every file.
  figure.set_layout_engine('none')
  for suffix in ('png', 'svg'):
    path = workdir / 'figures' / f'{name}.{suffix}'
    with replacing(path) as temporary:
      figure.savefig(temporary, format=suffix, dpi=160, bbox_inches='tight')
  plt.close(figure)


def table(
  rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> str:
  """Formats rows as a text table; floats get three significant digits."""
  columns = list(rows[0]) if columns is None else list(columns)

  def cell(value: Any) -> str:
    return f'{value:.3g}' if isinstance(value, float) else str(value)

  cells = [columns] + [[cell(row[name]) for name in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ['  '.join(map(str.ljust, line, widths)).rstrip() for line in cells]
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def mean_interval(samples: Any) -> dict[str, float]:
  """Mean over independent runs with its 95 % t-interval.

  Args:
    samples: one number for each run, at least two.

  Returns:
    `{'mean': ..., 'low': ..., 'high': ...}`.

  Raises:
    ValueError: if there are fewer than two runs.
  """
  samples = np.asarray(samples, np.float64)
  if samples.ndim != 1 or samples.size < 2:
    raise ValueError(
      f'samples has shape {list(samples.shape)}; expected at least two '
      'numbers, one for each run.'
    )
  import scipy.special

  mean = float(np.mean(samples))
  deviation = float(np.std(samples, ddof=1)) / samples.size**0.5
  half = float(scipy.special.stdtrit(samples.size - 1, 0.975)) * deviation
  return {'mean': mean, 'low': mean - half, 'high': mean + half}


@contextlib.contextmanager
def float64_on_host() -> Iterator[None]:
  """Computes in float64 on the CPU: accelerators may have no float64."""
  # Older versions have it in jax.experimental alone, newer ones in jax alone.
  home: Any = jax if hasattr(jax, 'enable_x64') else jax.experimental
  with home.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    yield


def compile_quickly(
  fn: Callable[..., Any], *, static_argnames: str | Sequence[str] = ()
) -> Callable[..., Any]:
  """`jax.jit` for what runs once: less compiling, perhaps slower code.

  Args:
    fn: function to compile.
    static_argnames: as in `jax.jit`.

  Returns:
    The compiled function. The same arithmetic, up to rounding.
  """
  return jax.jit(
    fn,
    static_argnames=static_argnames,
    compiler_options=_quick_options(),
  )


def compile_unoptimised() -> None:
  """Lets this process compile without optimising, for tests and tiny runs.

  To be called before JAX computes anything. XLA aborts on a flag that it does
  not know, so newer versions are left alone; flags of the environment win.
  """
  if jax.__version_info__ >= (0, 11):
    return
  flags = (
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
    os.environ.get('XLA_FLAGS', ''),
  )
  os.environ['XLA_FLAGS'] = ' '.join(flags).strip()


@functools.cache
def _quick_options() -> dict[str, Any]:
  """Options of the CPU compiler, if this version knows them."""
  options = {
    'xla_backend_optimization_level': 1,
    'xla_cpu_use_fusion_emitters': False,
    'xla_cpu_parallel_codegen_split_count': 2,
  }
  taken = os.environ.get('XLA_FLAGS', '')
  options = {k: v for k, v in options.items() if k not in taken}
  try:
    jax.jit(lambda x: x + 1, compiler_options=options)(1)
  except jax.errors.JaxRuntimeError:  # No such option, or another platform.
    return {}
  return options
