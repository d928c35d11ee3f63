"""The page of the library, with what else this experiment measures."""

import pathlib
from typing import Any

from experiments import lab
from experiments.lab import Config, tables
from experiments.language_model import identity, random_features, reading

ASKED: Any = identity, reading, random_features


def measure(config: Config) -> list[Any]:
  """Waits for the questions; each is measured once."""
  return [question.measure(config) for question in ASKED]


def metrics(config: Config, results: list[Any]) -> lab.Metrics:
  answer, read, features = results
  for layer, row in enumerate(identity.of_layers(answer)):
    row['contribution'] = read.of_heads[layer]
    if features is not None:
      row |= random_features.of_layer(features, layer)
    yield row


def pages(config: Config, results: list[Any]) -> dict[str, str]:
  answer, found, features = results
  said = (x.sentence(config, y) for x, y in zip(ASKED, results, strict=True))
  more = tables.fill(
    pathlib.Path(__file__).with_name('page.html'),
    conclusions=list(filter(None, said)),
    labels_note=reading.labels_note(config, found),
    certified=answer.certified,
    bounds=identity.BOUNDS,
    positions=identity.positions_note(answer),
    distance=identity.next_token_distance(answer),
    features=random_features.summary(config, features)['random_features'],
    captions={
      'residuals': identity.caption(answer),
      'attribution': reading.caption(found),
      **random_features.captions(features),
    },
  )
  return {'report.html': found.page.to_html(more=more)}
