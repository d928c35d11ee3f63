"""Tables of rows: as text, as CSV and as LaTeX."""

import csv
import io
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lab.workdir import Workdir, write_text

_LATEX = str.maketrans(
  {
    '\\': r'\textbackslash{}',
    '&': r'\&',
    '%': r'\%',
    '$': r'\$',
    '#': r'\#',
    '_': r'\_',
    '{': r'\{',
    '}': r'\}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '<': r'\textless{}',
    '>': r'\textgreater{}',
  }
)

Rows = Sequence[Mapping[str, Any]]


def text(rows: Rows, columns: Sequence[str] | None = None) -> str:
  """Formats rows as a text table; floats get three significant digits."""
  cells = _cells(rows, columns)
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ['  '.join(map(str.ljust, line, widths)).rstrip() for line in cells]
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def latex(rows: Rows, columns: Sequence[str] | None = None) -> str:
  """Formats rows as a `tabular` of the package booktabs."""
  cells = [
    [cell.translate(_LATEX) for cell in row] for row in _cells(rows, columns)
  ]
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

  def cell(value: Any) -> str:
    if isinstance(value, numbers.Real) and not isinstance(
      value, numbers.Integral
    ):
      return f'{value:.3g}'
    return str(value)

  return [columns] + [[cell(row[name]) for name in columns] for row in rows]
