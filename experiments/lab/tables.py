"""Tables of rows: as text, as CSV and as LaTeX."""

import csv
import io
import numbers
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lab.workdir import Workdir, write_text

NAMES = 'backslash', 'asciitilde', 'asciicircum', 'less', 'greater'
_LATEX = str.maketrans(
  {x: f'\\{x}' for x in '&%$#_{}'}
  | {x: rf'\text{name}{{}}' for x, name in zip('\\~^<>', NAMES, strict=True)}
)

Rows = Sequence[Mapping[str, Any]]


def tidy(
  where: Mapping[str, Any], values: Mapping[str, Any], **axes: Any
) -> list[dict[str, Any]]:
  """Arrays with the same first axes as rows, one for each place.

  Args:
    where: what every row says, such as the name of a layer.
    values: the arrays by name; what lies behind the first axes stays together.
    **axes: what the places of each axis are, in order.

  Example:
    >>> tidy({'layer': 'a'}, {'loss': [0.5, 0.25]}, step=[0, 10])[1]['loss']
    np.float64(0.25)
  """
  return [
    {
      **where,
      **{k: axis[i] for i, (k, axis) in zip(place, axes.items(), strict=True)},
      **{name: np.asarray(array)[place] for name, array in values.items()},
    }
    for place in np.ndindex(*map(len, axes.values()))
  ]


def text(rows: Rows, columns: Sequence[str] | None = None) -> str:
  """Formats rows as a text table; floats get three significant digits."""
  cells = _cells(rows, columns)
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ['  '.join(map(str.ljust, line, widths)).rstrip() for line in cells]
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def number(value: float | None) -> str:
  """A number; null is what JSON makes of one that is not finite."""
  return 'not finite' if value is None else f'{value:.3g}'


def fill(template: pathlib.Path, filters: Any = (), **values: Any) -> str:
  """Fills a template of jinja, which escapes whatever it is given."""
  import jinja2

  environment = jinja2.Environment(
    autoescape=True,
    loader=jinja2.FileSystemLoader(template.parent),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= dict(filters)
  return environment.get_template(template.name).render(**values)


def latex(rows: Rows, columns: Sequence[str] | None = None) -> str:
  """Formats rows as a `tabular` of the package booktabs."""
  cells = [[x.translate(_LATEX) for x in row] for row in _cells(rows, columns)]
  head, *body = (f'{" & ".join(row)} \\\\' for row in cells)
  return '\n'.join(
    [
      f'\\begin{{tabular}}{{{"l" * len(cells[0])}}}',
      '\\toprule',
      head,
      '\\midrule',
      *body,
      '\\bottomrule',
      '\\end{tabular}',
      '',
    ]
  )


def write(workdir: Workdir, name: str, rows: Rows) -> None:
  """Writes `tables/<name>.csv`, in full precision, and `.tex`."""
  folder = workdir / 'tables'
  folder.mkdir(exist_ok=True)
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  write_text(folder / f'{name}.csv', buffer.getvalue())
  write_text(folder / f'{name}.tex', latex(rows))


def _cells(rows: Rows, columns: Sequence[str] | None) -> list[list[str]]:
  columns = list(rows[0]) if columns is None else list(columns)

  def cell(x: Any) -> str:
    if isinstance(x, numbers.Real) and not isinstance(x, numbers.Integral):
      return f'{x:.3g}'
    return str(x)

  return [columns] + [[cell(row[name]) for name in columns] for row in rows]
