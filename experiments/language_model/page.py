"""A page that shows what a language model's answer was read from.

It needs no other file and no colour, and fits on a phone. The template escapes
whatever it is given: prompts are not to be trusted.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.lab import Config, tables
from experiments.language_model import identity, random_features, reading

NUM_NUMBERED = 8  # Tokens that carry their number.
CELL = 14  # Of the map of heads, in its own units.
MARGIN = 2 * CELL
MAX_SCALE = 1.7  # Pixels for each unit, at most.


class Results(NamedTuple):
  identity: identity.Results
  reading: reading.Results
  features: random_features.Results | None


class Token(NamedTuple):
  text: str  # What is shown; empty for blanks.
  value: float  # What was read from it.
  size: float  # The same over the largest, without sign.
  line: int  # Thickness of the line under it, in pixels.
  is_numbered: bool  # Whether its number is shown.
  is_first: bool  # Whether it begins the prompt.
  lead: str  # Blank before it.
  end: str  # What stands behind it, a blank or a line break.


class Map(NamedTuple):
  """A mark for each head: layers along the width, heads along the height."""

  values: np.ndarray  # Of the heads. Shape `[L, H]`.
  largest: float  # Their largest size.

  @property
  def width(self) -> int:
    return MARGIN + CELL * max(self.values.shape[0], 2) + 2

  @property
  def height(self) -> int:
    return CELL * self.values.shape[1] + MARGIN

  @property
  def max_width(self) -> int:
    """In pixels: cells of small models stay small."""
    return round(MAX_SCALE * self.width)

  @property
  def marks(self) -> list[tuple[int, int, float, float]]:
    """Layer, head, value, and share of the largest."""
    return [
      (layer, head, float(value), abs(float(value)) / self.largest)
      for (layer, head), value in np.ndenumerate(self.values)
    ]


def measure(config: Config) -> Results:
  """Waits for the questions; each is measured once."""
  return Results(
    identity.measure(config),
    reading.measure(config),
    random_features.measure(config),
  )


def conclusions(config: Config, results: Results) -> list[str]:
  sentences = (
    identity.sentence(config, results.identity),
    reading.sentence(config, results.reading),
    random_features.sentence(config, results.features),
  )
  return [text for text in sentences if text]


def metrics(config: Config, results: Results) -> list[dict[str, Any]]:
  rows = identity.of_layers(results.identity)
  for layer, row in enumerate(rows):
    row['contribution'] = results.reading.of_heads[layer]
    if results.features is not None:
      row |= random_features.of_layer(results.features, layer)
  return rows


def pages(config: Config, results: Results) -> dict[str, str]:
  found, answer = results.reading, results.identity
  captions = {
    'residuals': identity.caption(answer),
    'attribution': reading.caption(found),
    **random_features.captions(results.features),
  }
  text = tables.fill(
    pathlib.Path(__file__).with_name('page.html'),
    conclusions=conclusions(config, results),
    certified=answer.certified,
    bounds=identity.BOUNDS,
    positions=identity.positions_note(answer),
    residuals=_map(identity.residuals(answer.certified['float32'])),
    num_tokens=len(answer.loaded.tokens),
    distance=identity.next_token_distance(answer),
    found=found,
    heads=_map(found.of_heads),
    rows=reading.demonstrations(found),
    rank=reading.rank_correlation(found, found.influence),
    labels_note=reading.labels_note(config, found),
    first_token=reading.first_token_note(found),
    blocks=_blocks(found),
    features=random_features.summary(config, results.features)[
      'random_features'
    ],
    captions=captions,
    cell=CELL,
    margin=MARGIN,
  )
  return {'report.html': text}


def _map(values: np.ndarray) -> Map:
  return Map(values, max(float(np.abs(values).max()), 1e-300))


def _blocks(found: reading.Results) -> list[tuple[str, list[Token]]]:
  """The prompt in blocks: their names and tokens."""
  segments = found.loaded.segments
  values = found.of_tokens
  order = np.argsort(-np.abs(values))[:NUM_NUMBERED].tolist()
  # Without those that would print as zero.
  numbered = {i for i in order if round(abs(values[i]), 2) > 0}
  largest = max(np.abs(values).max(), 1e-30)
  blocks = []
  edges = np.flatnonzero(np.diff(segments)) + 1
  for rows in np.split(np.arange(len(segments)), edges):
    index = segments[rows[0]]
    name = 'rest of the prompt'
    if index >= 0:
      label = found.loaded.prompt.demonstration_labels[index]
      value = found.of_demonstrations[index]
      name = f'Demonstration {index + 1}, {label}: {value:+.2f}'
    tokens = [
      token(
        visible(found.loaded.token_texts[i], int(found.loaded.tokens[i])),
        float(values[i]),
        float(abs(values[i]) / largest),
        is_numbered=i in numbered,
        is_first=i == 0,
      )
      for i in rows
    ]
    tokens[-2:] = [t._replace(end=t.end.strip()) for t in tokens[-2:]]
    blocks.append((name, tokens))
  return blocks


def visible(text: str, index: int) -> str:
  """The id of a token that has no characters of its own."""
  return text if text and '\ufffd' not in text else f'⟨{index}⟩'


def token(
  text: str, value: float, size: float, *, is_numbered: bool, is_first: bool
) -> Token:
  """How a token is shown: a blank one only if it has something to say."""
  lead, end = (' ' if text[0].isspace() else ''), ''
  if not text.strip():
    end = '\n' if '\n' in text else ' '
    lead, text = ' ', '↵' if '\n' in text else '␣'
    if not (is_numbered or is_first):
      lead, text = '', ''
  # No line below a twentieth of the largest.
  line = 0 if size < 0.05 else 1 + round(4 * size)
  return Token(
    text.strip(), value, size, line, is_numbered, is_first, lead, end
  )
