"""The page of the library, with what else this experiment measures."""

import pathlib
from typing import Any, NamedTuple

from experiments.lab import Config, tables
from experiments.language_model import identity, random_features, reading


class Results(NamedTuple):
  identity: identity.Results
  reading: reading.Results
  features: random_features.Results | None


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
  features = random_features.summary(config, results.features)
  more = tables.fill(
    pathlib.Path(__file__).with_name('page.html'),
    conclusions=conclusions(config, results),
    labels_note=reading.labels_note(config, found),
    certified=answer.certified,
    bounds=identity.BOUNDS,
    positions=identity.positions_note(answer),
    distance=identity.next_token_distance(answer),
    features=features['random_features'],
    captions={
      'residuals': identity.caption(answer),
      'attribution': reading.caption(found),
      **random_features.captions(results.features),
    },
  )
  return {'report.html': found.page.to_html(more=more)}
