"""The page of `experiments.reproduce`: one file, readable on a phone."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import claims as judging

MARKS = {'reproduced': '✓', 'not reproduced': '✗', 'undecided': '?'}
LONG_TABLE = 24  # More claims are folded away.
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto;
  max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { margin-top: 2.6rem; border-top: 2px solid #1a1a1a; padding-top: .6rem; }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; height: auto; border: 1px solid #ddd; }
figcaption { font-size: .92rem; color: #333; }
code { background: #f2f2f2; padding: .1em .3em; overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem;
  border-bottom: 1px solid #ccc; }
td.number { white-space: nowrap; }
td.verdict { white-space: nowrap; font-weight: 600; }
.reproduced { background: #e3f1e8; }
.not { background: #fbe6da; }
.undecided { background: #f3f0dc; }
.warning { border: 2px solid #b30000; padding: .6rem; }
summary { cursor: pointer; font-weight: 600; margin: .8rem 0; }
"""
READING = (
  'Each claim of the two versions of the paper and of the neighbouring ones is '
  'turned into a statistic with a range fixed before the run; what they do not '
  'claim and is judged here all the same says so in its source, such as '
  '"control" or "derived here". "Reproduced" means that the whole 95 % '
  'interval over independent runs or draws lies in the range, "not reproduced" '
  'that it lies outside, "undecided" that it straddles the edge. Where a claim '
  'compares layers, its statistic names the rule: that one layer is better or '
  'poorer than another fails, too, if they are comparable, and that they are '
  'comparable fails if the interval lies on one side of 1 and leaves the '
  'margin. A claim that fails stays in its table. Where a layer is trained on '
  'one fixed task matrix, its loss measures how well it memorises that matrix, '
  'not learning in context; the captions say so.'
)


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
  warning = (
    '<p class="warning">Tiny settings (<code>--fast</code>): this page shows '
    'that everything runs. Its numbers and verdicts mean nothing.</p>'
    if fast
    else ''
  )
  body = [
    '<h1>In-context learning as one gradient step: what reproduces</h1>',
    '<p>Ren &amp; Liu, arXiv:2310.13220: v1 (2023) and v2 (NeurIPS 2024). '
    'Made by <code>make reproduce</code>.</p>',
    warning,
    f'<p>{html.escape(READING)}</p>',
    _overview(sections),
    '' if fast else _conclusions(sections),
    '<h2 id="diagrams">The statements, drawn</h2>',
    *(_figure(report, row) for row in diagrams),
    *(_section(part) for part in sections),
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<title>In-context learning as one gradient step</title>'
    f'<style>{STYLE}</style></head>\n<body>\n'
    + '\n'.join(filter(None, body))
    + '\n</body></html>\n'
  )


def _conclusions(sections: Sequence[Section]) -> str:
  """First sentences; the paragraphs stand with their experiments."""
  paragraphs = [
    f'<p><b>{html.escape(part.title)}.</b> '
    f'{html.escape(part.summary["conclusion"].split(". ")[0].rstrip("."))}.</p>'
    for part in sections
  ]
  return '\n'.join(['<h2 id="conclusions">What to conclude</h2>', *paragraphs])


def _overview(sections: Sequence[Section]) -> str:
  """Verdicts counted by source, under the experiment that judged them."""
  rows = []
  for part in sections:
    rows.append(
      f'<tr><th colspan="4"><a href="#{part.name}">{html.escape(part.title)}'
      '</a></th></tr>'
    )
    sources = dict.fromkeys(row['source'] for row in part.summary['claims'])
    for source in sources:
      found = [
        row['verdict']
        for row in part.summary['claims']
        if row['source'] == source
      ]
      counts = ''.join(
        f'<td class="number">{found.count(verdict) or "–"}</td>'
        for verdict in judging.VERDICTS
      )
      rows.append(f'<tr><td>{html.escape(source)}</td>{counts}</tr>')
  marks = ''.join(f'<th>{MARKS[name]}</th>' for name in judging.VERDICTS)
  legend = ', '.join(f'{MARKS[name]} {name}' for name in judging.VERDICTS)
  return (
    f'<h2 id="verdicts">Verdicts</h2><p>Number of claims: {legend}.</p>'
    f'<div class="table"><table><tr><th>source</th>{marks}</tr>'
    f'{"".join(rows)}</table></div>'
  )


def _section(part: Section) -> str:
  figures = [_figure(part.folder, row) for row in part.summary['figures']]
  claims = part.summary['claims']
  table = _claims(claims)
  if len(claims) > LONG_TABLE:
    table = (
      f'<details><summary>All {len(claims)} claims of this experiment'
      f'</summary>{table}</details>'
    )
  return '\n'.join(
    [
      f'<h2 id="{part.name}">{html.escape(part.title)}</h2>',
      f'<p><code>{html.escape(part.command)}</code> ({part.seconds:.0f} s)</p>',
      f'<p>{html.escape(part.summary["conclusion"])}</p>',
      *figures,
      table,
    ]
  )


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
  """One row for each claim: statistic, this run, verdict."""
  rows = [
    f'<tr><td>{html.escape(row["claim"])}<br><small>'
    f'{html.escape(row["source"])}</small></td>'
    f'<td>{html.escape(row["statistic"])}</td>'
    f'<td class="number">{_number(row)}</td>'
    f'<td class="verdict {row["verdict"].split()[0]}">'
    f'{MARKS[row["verdict"]]} {row["verdict"]}</td></tr>'
    for row in claims
  ]
  return (
    '<div class="table"><table><tr><th>claim</th><th>statistic</th>'
    f'<th>this run</th><th>verdict</th></tr>{"".join(rows)}</table></div>'
  )


def _number(row: Mapping[str, Any]) -> str:
  """A value with its interval; null is what JSON makes of NaN."""

  def text(value):
    return 'not finite' if value is None else f'{value:.3g}'

  if row['interval'] is None:
    return text(row['value'])
  low, high = map(text, row['interval'])
  return f'{text(row["value"])} [{low}, {high}]'


def _figure(folder: pathlib.Path, row: Mapping[str, str]) -> str:
  path = folder / row['file']
  if not path.is_file():
    raise ValueError(
      f'{str(path)!r} is missing; delete {str(folder)!r} to draw it again.'
    )
  data = base64.b64encode(path.read_bytes()).decode()
  caption = html.escape(row['caption'])
  return (
    f'<figure><img alt="{caption}" loading="lazy" '
    f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption>'
    '</figure>'
  )
