"""A page that shows what a language model's answer was read from.

It needs no other file and no colour, and fits on a phone.
"""

import html as markup
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import language_model_report as report

TEMPLATE = pathlib.Path(__file__).with_name('language_model_page.html')
NUM_NUMBERED = 8  # Tokens that carry their number.
CELL = 14  # Of the map of heads, in its own units.
MARGIN = 2 * CELL
MAX_SCALE = 1.7  # Pixels for each unit, at most.


def html(results: Any, summary: Mapping[str, Any]) -> str:
  """Makes the page.

  Args:
    results: of `experiments.language_model`.
    summary: as `language_model_report.summarise` makes it.

  Returns:
    The page.
  """
  found = summary['attribution']
  first, second = (f'“{_escape(label)}”' for label in found['labels'])
  return string.Template(TEMPLATE.read_text(encoding='utf-8')).substitute(
    title='What a language model’s answer was read from',
    first=first,
    answer=_answer(summary, first, second),
    certificate=_certificate(summary) + _residuals(results),
    tokens=_tokens(results),
    total=_total(found, first, second),
    demonstrations=_demonstrations(found, first),
    largest=f'{np.abs(results.attribution.of_heads).max():.2f}',
    heads=_heads(results.attribution.of_heads),
    features=_features(summary['random_features']),
    figures=_figures(summary['figures']),
    command='Made by <code>python -m experiments.language_model</code>; all '
    'numbers are in <code>summary.json</code>.',
  )


def _answer(summary: Mapping[str, Any], first: str, second: str) -> str:
  chances = summary['attribution']['label_probabilities']
  return (
    f'<p>A language model with {summary["num_heads"]} attention heads in '
    f'{summary["num_layers"]} layers read a prompt of {summary["num_tokens"]} '
    f'tokens. It expects {first} as the next word with probability '
    f'<b>{chances[0]:.2f}</b> and {second} with <b>{chances[1]:.2f}</b>. This '
    'page shows where in the prompt that came from.</p>'
    f'{_paragraph(summary["attribution"]["labels_note"])}'
  )


def _paragraph(text: str) -> str:
  return f'<p>{_escape(text)}</p>' if text else ''


def _certificate(summary: Mapping[str, Any]) -> str:
  rows = []
  for dtype, bound in (('float32', '1e-5'), ('float64', '1e-12')):
    holds = summary[f'verdict_{dtype}']
    rows.append(
      f'<tr><td>{dtype}</td><td class="number">'
      f'{summary[f"max_residual_{dtype}"]:.1e}</td><td class="number">{bound}'
      f'</td><td>{_escape(holds)}</td></tr>'
    )
  distance = summary['next_token_total_variation']
  return (
    '<table><tr><th>arithmetic</th><th class="number">largest difference</th>'
    '<th class="number">rounding allows</th><th>verdict</th></tr>'
    f'{"".join(rows)}</table><p>That is {summary["num_heads"]} heads at '
    f'{summary["num_positions"]} positions each: the '
    f'{report.positions_note(summary)}. Run once more as a chain of such '
    'learners, with no softmax in it, the whole network gives the same '
    'probabilities of the next word up to a total variation of '
    f'{distance:.0e}.</p>'
  )


def _tokens(results: Any) -> str:
  """The prompt in blocks, each token with a line under it."""
  segments, labels = results.segments, results.prompt.demonstration_labels
  found = results.attribution
  pieces, shown = [], _numbered(found.of_tokens)
  largest = max(np.abs(found.of_tokens).max(), 1e-30)
  edges = np.flatnonzero(np.diff(segments)) + 1
  for rows in np.split(np.arange(len(segments)), edges):
    index = segments[rows[0]]
    name = 'rest of the prompt'
    if index >= 0:
      name = (
        f'Demonstration {index + 1}, {labels[index]}: '
        f'{found.of_demonstrations[index]:+.2f}'
      )
    spans = [
      _token(
        _visible(results.token_texts[i], results.tokens[i]),
        found.of_tokens[i],
        float(found.of_tokens[i] / largest),
        i in shown,
        is_first=i == 0,
      )
      for i in rows
    ]
    body = ''.join(spans).removesuffix('<br>').removesuffix('<br>')
    pieces.append(
      f'<div class="block"><b>{_escape(name)}</b>'
      f'<div class="tokens">{body}</div></div>'
    )
  return ''.join(pieces)


def _numbered(values: np.ndarray) -> set[int]:
  """The strongest, without those that would print as zero."""
  order = np.argsort(-np.abs(values))[:NUM_NUMBERED].tolist()
  return {i for i in order if round(abs(values[i]), 2) > 0}


def _visible(text: str, index: int) -> str:
  """The id of a token that has no characters of its own."""
  return text if text and '\ufffd' not in text else f'⟨{index}⟩'


def _token(
  text: str,
  value: float,
  share: float,
  is_numbered: bool,
  *,
  is_first: bool = False,
) -> str:
  """One token: tint and line grow with its part, its kind with the sign."""
  lead, end = (' ' if text[0].isspace() else ''), ''
  if not text.strip():
    end = '<br>' if '\n' in text else ' '
    if not (is_numbered or is_first):
      return end
    lead, text = ' ', '↵' if '\n' in text else '␣'
  size = abs(share)
  rgb = '0,114,178' if value >= 0 else '213,94,0'
  style = (
    f'background:rgba({rgb},{0.45 * size:.2f});'
    f'border-bottom-width:{_pixels(size)}px'
  )
  kind = 't' if value >= 0 else 't against'
  number = f'<sup>{value:+.2f}</sup>' if is_numbered else ''
  mark = '<small>first token:</small> ' if is_first else ''
  return (
    f'{mark}{lead}<span class="{kind}" style="{style}" title="{value:+.3f}">'
    f'{_escape(text.strip())}</span>{number}{end}'
  )


def _pixels(size: float) -> int:
  """Thickness of a line: none below a twentieth of the largest."""
  return 0 if size < 0.05 else 1 + round(4 * size)


def _total(found: Mapping[str, Any], first: str, second: str) -> str:
  rows, taught = found['demonstrations'], ''
  if rows:
    read = sum(row['contribution'] for row in rows)
    taught = f'{read:+.2f} from the demonstrations, '
  other = found['embedding'] + found['biases']
  return (
    f'The logit of {first} is {found["logit_difference"]:.2f} above that of '
    f'{second}: {taught}{found["rest"]:+.2f} from the '
    f'{"rest of the " if rows else ""}prompt, {other:+.2f} from the last '
    'token’s own embedding and the biases. Of this '
    f'{report.first_token_note(found)}. The parts add up to the whole to '
    f'{found["identity_error"]:.0e} of their size.'
  )


def _demonstrations(found: Mapping[str, Any], first: str) -> str:
  """A bar for each demonstration, with the numbers beside it."""
  rows = found['demonstrations']
  if not rows:
    return ''
  largest = max(max(abs(row['contribution']) for row in rows), 1e-30)
  body = ''.join(
    f'<tr><td>{row["number"]}&nbsp;{_escape(row["label"])}</td>'
    f'<td class="bars">{_bar(row["contribution"] / largest)}</td>'
    f'<td class="number">{row["contribution"]:+.2f}</td>'
    f'<td class="number wide">{row["removal_effect"]:+.2f}</td>'
    f'<td class="number">{row["deletion_effect"]:+.2f}</td>'
    f'<td class="number wide">{100 * row["loss_drop_share"]:.0f} %</td></tr>'
    for row in rows
  )
  return (
    '<h2>What was read from each demonstration</h2><p>The same numbers, '
    'summed over the tokens of each demonstration. Bars to the right, filled, '
    f'speak for {first}; bars to the left, hatched, against it. <b>Deleted</b> '
    'is what the difference really loses when the demonstration is cut out of '
    'the prompt. In the columns “read from it”, “forgotten” and “deleted” a '
    f'positive number speaks for {first}.</p><table><tr><th>demonstration</th>'
    '<th></th>'
    '<th class="number">read from it</th><th class="number wide">forgotten by '
    'the heads</th><th class="number">deleted</th><th class="number wide">'
    f'share of the loss drop</th></tr>{body}</table>{_agreement(found)}'
    '<p class="soft wide">'
    'Forgotten by the heads: the demonstration is removed from the training '
    'set of each head at the last position, all else stays, to first order. '
    'Share of the loss drop: of what one gradient step takes from the loss of '
    'a head’s learner, the part due to this demonstration, mean over heads. '
    'These are shares among the demonstrations, which add up to 100 %; the '
    'rest of the prompt is the zero-shot part and has none.</p>'
  )


def _agreement(found: Mapping[str, Any]) -> str:
  rank = found['rank_correlation_with_deletion']['contribution']
  here = ''
  if rank is not None:
    here = (
      f' On this prompt their rank correlation is {rank:.2f} (1 would be the '
      f'same order), over {len(found["demonstrations"])} demonstrations: '
      'one prompt tells little.'
    )
  note = report.first_token_note(found)
  return (
    '<p>In general “read from it” and “deleted” disagree; <code>python -m '
    'experiments.demonstration_deletion</code> measures how much, over many '
    f'prompts.{here} Also, {note}.</p>'
  )


def _bar(share: float) -> str:
  """A bar from the middle, to the right if positive."""
  width = 50 * abs(share)
  left = 50 if share >= 0 else 50 - width
  kind = '' if share >= 0 else ' class="against"'
  return (
    f'<div class="bar"><i{kind} style="left:{left:.1f}%;width:{width:.1f}%">'
    '</i><u style="left:50%"></u></div>'
  )


def _heads(of_heads: np.ndarray) -> str:
  """Layers along the width, heads along the height, a disc for each."""
  largest = max(np.abs(of_heads).max(), 1e-30)
  discs = []
  for (layer, head), value in np.ndenumerate(of_heads):
    radius = CELL * 0.48 * (abs(value) / largest) ** 0.5
    fill = '#0072b2' if value >= 0 else '#fff'
    edge = '#0072b2' if value >= 0 else '#b34700'
    x, y = MARGIN + CELL * (layer + 0.5), CELL * (head + 0.5)
    discs.append(
      f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.2f}" fill="{fill}" '
      f'stroke="{edge}"><title>layer {layer}, head {head}: {value:+.3f}'
      '</title></circle>'
    )
  return _map(discs, of_heads.shape, 'contribution of each head')


def _residuals(results: Any) -> str:
  """A map of the largest residual of each head, drawn like that above."""
  certificate = results.certified['float32'].certificate
  found = certificate.residuals
  values = np.maximum(found.closed_form, found.autodiff).max(axis=2)
  largest = max(values.max(), 1e-300)
  squares = [
    f'<rect x="{MARGIN + CELL * layer}" y="{CELL * head}" width="{CELL}" '
    f'height="{CELL}" fill="#1b1b1b" fill-opacity="{value / largest:.2f}">'
    f'<title>layer {layer}, head {head}: {value:.1e}</title></rect>'
    for (layer, head), value in np.ndenumerate(values)
  ]
  layer, head = np.unravel_index(np.argmax(values), values.shape)
  return (
    '<p>Head by head, in float32: a column for each layer, a row for each '
    'head; white is no difference, black the largest one, '
    f'{largest:.1e} in head {head} of layer {layer}.</p>'
    + _map(squares, values.shape, 'largest difference of each head')
  )


def _map(marks: Sequence[str], shape: tuple[int, int], name: str) -> str:
  """Marks of all heads with axes; cells of small models stay small."""
  num_layers, num_heads = shape
  width = MARGIN + max(CELL * num_layers, 2 * CELL) + 2
  height = CELL * num_heads + MARGIN
  return (
    f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}" '
    f'style="max-width:{MAX_SCALE * width:.0f}px" font-size="8" fill="#333">'
    f'{_axis(num_layers, num_heads, MARGIN)}{"".join(marks)}</svg>'
  )


def _axis(num_layers: int, num_heads: int, margin: int) -> str:
  """Numbers of layers below, of heads on the left."""
  height = CELL * num_heads
  texts = [
    _text(margin + CELL * (layer + 0.5), height + 10, str(layer))
    for layer in _every(num_layers)
  ]
  texts += [
    _text(margin - 6, CELL * (head + 0.5) + 3, str(head))
    for head in range(num_heads)
  ]
  texts.append(_text(margin + CELL * num_layers / 2, height + 22, 'layer'))
  texts.append(_text(10, height + 10, 'head'))
  return ''.join(texts)


def _every(count: int) -> Sequence[int]:
  return range(0, count, max(1, count // 15))


def _text(x: float, y: float, text: str) -> str:
  return f'<text x="{x:g}" y="{y:g}" text-anchor="middle">{text}</text>'


def _features(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return ''
  count = list(found['median_error'])[-1]
  rows = found['median_error'][count]
  needed = found['log10_directions_needed']
  body = ''.join(
    f'<tr><td>{name}</td><td class="number">{rows[f"{name}, orthogonal"]:.2f}'
    f'</td><td class="number">10<sup>{needed[name][1]:.0f}</sup></td></tr>'
    for name in needed
  )
  mean = found['median_error_of_plain_mean']
  verb = 'do' if min(rows.values()) <= 0.1 else 'do not'
  return (
    '<h2>Could random features stand in for the softmax?</h2><p>The learners '
    'above use the exact softmax kernel. Random features approximate it. With '
    f'the queries and keys of this model they {verb}: beside an error of '
    f'{mean:.2f} of a plain mean of all values, {count} random directions err '
    'by</p><table><tr><th>features</th><th class="number">relative error, '
    'median head</th><th class="number">directions for 10 %, predicted</th>'
    f'</tr>{body}</table>'
  )


def _figures(rows: Sequence[Mapping[str, str]]) -> str:
  """Names of the files beside the page."""
  items = ''.join(
    f'<li><code>{_escape(row["file"])}</code>: {_escape(row["caption"])}</li>'
    for row in rows
  )
  return f'<ul class="soft">{items}</ul>'


def _escape(text: str) -> str:
  return markup.escape(text)
