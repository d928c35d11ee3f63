"""The folder of a run: what belongs to it, and files that are never half."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Workdir = pathlib.Path


def open_workdir(config: Any, workdir: str | os.PathLike[str]) -> Workdir:
  """Makes the workdir, or checks that it belongs to the same config."""
  if not os.fspath(workdir):
    raise ValueError('workdir is empty; expected a folder, --workdir=DIR.')
  path = pathlib.Path(workdir).expanduser()
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
  if not file.exists():
    write_text(file, to_json(ours))
  theirs = read_json(file)
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise ValueError(
        f'workdir holds a run with {name}={theirs.get(name)!r}, this one has '
        f'{name}={ours.get(name)!r}; choose another --workdir, or delete '
        f'{str(path)!r}.'
      )
  return path


def leave_nothing(folder: Workdir) -> None:
  """Removes a folder in which a run has produced nothing yet."""
  left = {path.name for path in folder.iterdir()}
  if left <= {'config.json', 'figures'}:
    with contextlib.suppress(OSError):  # Somebody else's files stay.
      (folder / 'figures').rmdir()
      (folder / 'config.json').unlink()
      folder.rmdir()


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads an object that a run has left."""
  try:
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
      raise ValueError('it holds no object')
  except (OSError, ValueError) as error:
    raise ValueError(
      f'workdir holds an unreadable {file.name} ({error}); delete '
      f'{str(file.parent)!r} or choose another --workdir.'
    ) from error
  return found


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
    if hasattr(node, 'to_dict'):
      return plain(node.to_dict())
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


def write_metrics(workdir: Workdir, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes `metrics.jsonl`, one JSON object a line."""
  lines = [json.dumps(json.loads(to_json(row))) + '\n' for row in rows]
  write_text(workdir / 'metrics.jsonl', ''.join(lines))
