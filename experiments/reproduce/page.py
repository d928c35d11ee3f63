"""The page of `experiments.reproduce`: one file, readable on a phone."""

import base64
import concurrent.futures
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.lab import claims as judging
from experiments.reproduce import conclusions

MARKS = dict(zip(judging.VERDICTS, '✓✗?', strict=True))
LONG_TABLE = 24  # More claims are folded away.
WIDTH = 1100  # Pixels of a figure on the page; a click leads to the large one.
QUALITY = 75


class Section(NamedTuple):
  """One experiment on the page.

  Attributes:
    name: short name, used as anchor.
    title: heading.
    command: what runs it.
    folder: its results.
    summary: with `claims`, `figures` and `conclusion`.
    seconds: how long it took.
  """

  name: str
  title: str
  command: str
  folder: pathlib.Path
  summary: Mapping[str, Any]
  seconds: float


class Image(NamedTuple):
  """A figure on the page.

  Attributes:
    data: address that holds the image itself.
    link: of the file in full size, relative to the page.
    caption: full sentences.
  """

  data: str
  link: str
  caption: str


def page(
  sections: Sequence[Section],
  diagrams: Sequence[Mapping[str, str]],
  report: pathlib.Path,
  *,
  fast: bool,
) -> str:
  """Builds the page.

  Args:
    sections: all experiments.
    diagrams: `{file, caption}` of the drawings, relative to `report`.
    report: folder of the page.
    fast: whether the settings are tiny, which the page then says on top.

  Returns:
    HTML with every image inside.

  Raises:
    ValueError: if a figure is missing.
  """
  import jinja2

  environment = jinja2.Environment(
    autoescape=True,
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {
    'counts': judging.counts,
    'next': next,
    'number': number,
  }
  claims = [claim for part in sections for claim in part.summary['claims']]
  wanted = [(report, row) for row in diagrams] + [
    (part.folder, row) for part in sections for row in part.summary['figures']
  ]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    images = list(pool.map(lambda pair: _image(report, *pair), wanted))
  return environment.get_template('page.html').render(
    sections=sections,
    claims=claims,
    conclusions=[] if fast else conclusions.lines(claims),
    images=iter(images),
    num_diagrams=len(diagrams),
    marks=MARKS,
    long_table=LONG_TABLE,
    fast=fast,
  )


def number(claim: Mapping[str, Any]) -> str:
  """A value with its interval; null is what JSON makes of NaN."""

  def text(value):
    return 'not finite' if value is None else f'{value:.3g}'

  if claim['interval'] is None:
    return text(claim['value'])
  low, high = map(text, claim['interval'])
  return f'{text(claim["value"])} [{low}, {high}]'


def _image(
  report: pathlib.Path, folder: pathlib.Path, row: Mapping[str, str]
) -> Image:
  """A figure, made small enough for a page of many."""
  import PIL.Image

  path = folder / row['file']
  if not path.is_file():
    raise ValueError(
      f'{str(path)!r} is missing; delete {str(folder)!r} to draw it again.'
    )
  image = PIL.Image.open(path).convert('RGB')
  image.thumbnail((WIDTH, 10 * WIDTH), PIL.Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  image.save(buffer, 'WEBP', quality=QUALITY)
  data = base64.b64encode(buffer.getvalue()).decode()
  link = pathlib.Path(os.path.relpath(path, report)).as_posix()
  return Image(f'data:image/webp;base64,{data}', link, row['caption'])
