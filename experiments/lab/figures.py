"""One style for all figures, and the pieces that they share.

Colours are those of Okabe and Ito, told apart with any colour vision; a series
differs in marker or line style as well, and is named where it is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.lab.statistics import Estimate, mean
from experiments.lab.workdir import Workdir, replacing

BLACK, BLUE, GREEN, ORANGE = '#000000', '#0072B2', '#009E73', '#D55E00'
PINK, SKY, YELLOW, GREY = '#CC79A7', '#56B4E9', '#E69F00', '#8C8C8C'
COLOURS = BLACK, BLUE, GREEN, ORANGE, PINK, SKY, YELLOW, GREY
MARKERS = 'osD^vPX*'
LINES = '-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))


class Figure(NamedTuple):
  """A drawing and what it shows."""

  name: str  # Of its files, `figures/<name>.png` and `.svg`.
  drawing: Any  # A figure of matplotlib.
  caption: str  # Full sentences; line breaks do not count.


def style() -> Any:
  """Settings under which all figures are drawn, as a context manager."""
  import matplotlib

  matplotlib.use('Agg')
  return matplotlib.rc_context(
    {
      'font.size': 11,
      'axes.titlesize': 11.5,
      'axes.titlelocation': 'left',
      'axes.spines.top': False,
      'axes.spines.right': False,
      'figure.titlesize': 11,
      'figure.constrained_layout.use': True,
      'figure.constrained_layout.h_pad': 0.1,
      'legend.frameon': False,
      'legend.fontsize': 10,
      'svg.fonttype': 'none',
      'svg.hashsalt': 'iclcl_jax',
    }
  )


def save(workdir: Workdir, figure: Figure) -> dict[str, str]:
  """Writes `.png` and `.svg`, closes the drawing; returns file and caption."""
  import matplotlib.pyplot as plt

  drawing = figure.drawing
  drawing.draw_without_rendering()  # Find the layout once, not in every file.
  drawing.set_layout_engine('none')
  edges = drawing.get_tightbbox().padded(0.1)  # In inches.
  for suffix in ('png', 'svg'):
    path = workdir / 'figures' / f'{figure.name}.{suffix}'
    with replacing(path) as temporary:
      drawing.savefig(temporary, format=suffix, dpi=160, bbox_inches=edges)
  plt.close(drawing)
  caption = ' '.join(figure.caption.split())
  return {'file': f'figures/{figure.name}.png', 'caption': caption}


def subplots(*shape: int, **options: Any) -> tuple[Any, Any]:
  """`matplotlib.pyplot.subplots`, which is imported when something is drawn."""
  import matplotlib.pyplot as plt

  return plt.subplots(*shape, **options)


def legend(
  axis: Any, ncols: int, loc: str = 'outside lower center', **options: Any
) -> None:
  """Names the series of one axis outside all axes of its figure."""
  labels = axis.get_legend_handles_labels()
  axis.figure.legend(*labels, loc=loc, ncols=ncols, **options)


def look(index: int) -> dict[str, Any]:
  """Colour, line and marker of the series of that number."""
  return {
    'color': COLOURS[index % len(COLOURS)],
    'linestyle': LINES[index % len(LINES)],
    'marker': MARKERS[index % len(MARKERS)],
  }


def band(axis: Any, x: Any, estimates: Sequence[Estimate], **look: Any) -> None:
  """Draws estimates at places `[n]` as a line with the band of intervals."""
  value, low, high = np.array(estimates).T
  (line,) = axis.plot(x, value, **look)
  axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)


def bars(axis: Any, x: Any, estimates: Sequence[Estimate], **look: Any) -> None:
  """Draws estimates with bars for their intervals; arguments as of `band`."""
  value, low, high = np.array(estimates).T
  axis.errorbar(x, value, yerr=[value - low, high - value], **look)


def size_axis(axis: Any, sizes: Any, **look: Any) -> None:
  """Makes `x` a log axis with a tick at every size, and no other."""
  axis.set_xscale('log')
  axis.set_xticks(sizes, [f'{size:g}' for size in sizes], **look)
  axis.minorticks_off()


def log_axes(axis: Any, sizes: Any, **look: Any) -> None:
  """Makes both axes logarithmic, `x` with a tick at every size."""
  size_axis(axis, sizes, **look)
  axis.set_yscale('log')
  axis.minorticks_off()
  axis.grid(alpha=0.25, lw=0.5)
  plain_ticks(axis.yaxis)


def means(axis: Any, x: Any, samples: Any, **look: Any) -> None:
  """Draws means over runs `[S, n]` as `band` does."""
  band(axis, x, [mean(column) for column in np.transpose(samples)], **look)


def runs(axis: Any, x: Any, samples: Any, index: int, **more: Any) -> None:
  """Draws a thin line for each run `[S, n]` and a marked one for the median."""
  own = look(index) | {'mfc': 'white'}
  axis.plot(x, np.transpose(samples), color=own['color'], lw=0.6, alpha=0.6)
  axis.plot(x, np.median(samples, axis=0), **own | more)


def strip(axis: Any, rows: Mapping[str, Any], num_cases: int = 20) -> None:
  """Draws labels of a few prompts of every seed, in the order of the first.

  Rows are true and predicted labels `[S, P, d_y]` by name.
  """
  first = next(iter(rows.values()))
  few = max(1, num_cases // len(first))
  order = np.argsort(first[:, :few, 0].ravel())
  looks = zip('_oxD^', (14, 10, 6, 6, 8), strict=True)
  pairs = zip(rows.items(), looks, strict=False)
  for index, ((name, row), look) in enumerate(pairs):
    mark, size = look
    own = {'color': COLOURS[index], 'mfc': 'none', 'ms': size, 'mew': 1.8}
    axis.plot(row[:, :few, 0].ravel()[order], mark, label=name, **own)
  axis.axhline(0, color=GREY, linewidth=0.6, zorder=0)
  axis.set(xticks=[], ylabel='label of the query')
  axis.set_xlabel('held-out prompts of all seeds, by true label')


def forest(
  axis: Any,
  rows: Mapping[str, Estimate],
  *,
  offset: float = 0.0,
  reference: float | None = None,
  **look: Any,
) -> None:
  """Draws estimates by name as rows with their intervals, the first on top.

  `offset` moves the rows down, for a second series; `reference` is where to
  draw a vertical line, such as 1 for ratios.
  """
  places = np.arange(len(rows)) + offset
  value, low, high = np.array(list(rows.values())).T
  axis.errorbar(
    value,
    places,
    xerr=[value - low, high - value],
    **{'fmt': 'o', 'capsize': 2, 'color': BLUE} | look,
  )
  axis.set_yticks(range(len(rows)), list(rows))
  axis.set_ylim(len(rows) - 0.5, -0.5)
  if reference is not None:
    axis.axvline(reference, color=BLACK, linewidth=0.8)


def label_ends(
  axis: Any, labels: Sequence[tuple[float, str, str]], *, gap: float = 0.062
) -> None:
  """Writes names beside the right edge of a log axis, without overlap.

  Labels are `(y, text, colour)` at the right end of each line, `gap` the least
  distance of two as a share of the height; limits must not change any more.
  """
  low, high = np.log(axis.get_ylim())
  ends = sorted((np.log(y) - low) / (high - low) for y, _, _ in labels)
  order = sorted(labels)
  places = np.clip(ends, 0.0, 1.0)
  for _ in range(200):  # Push neighbours apart until all keep the gap.
    for i in range(len(places) - 1):
      overlap = max(gap - (places[i + 1] - places[i]), 0)
      places[i] -= overlap / 2
      places[i + 1] += overlap / 2
    places = np.clip(places, 0.0, 1.0)
  for place, end, (_, text, colour) in zip(places, ends, order, strict=True):
    frame = {'transform': axis.transAxes, 'color': colour, 'clip_on': False}
    axis.plot([1.0, 1.05], [min(max(end, 0), 1), place], lw=0.6, **frame)
    axis.text(1.06, place, text, va='center', fontsize=9, **frame)


def plain_ticks(axis: Any) -> None:
  """Labels 1, 2, 5 of each decade where a log axis spans few decades."""
  from matplotlib import ticker

  low, high = axis.get_view_interval()
  if high / low < 200:
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:g}'))
    axis.set_minor_formatter(ticker.NullFormatter())


def ratio_axis(axis: Any, which: str) -> None:
  """Makes `x` or `y` a log axis on which a factor of 2 looks like what it is.

  To be called when all data is drawn: it sees to limits, grid and ticks.
  """
  axis.set(**{f'{which}scale': 'log'})
  low, high = getattr(axis, f'get_{which}lim')()
  axis.set(**{f'{which}lim': (min(low, 0.5), max(high, 2.0))})
  plain_ticks(getattr(axis, f'{which}axis'))
  axis.grid(alpha=0.25, lw=0.5, axis=which)
