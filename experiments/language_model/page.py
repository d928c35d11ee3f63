"""The page of the library, with what else this experiment measures."""

import pathlib

from experiments import lab
from experiments.lab import Config, tables
from experiments.language_model import identity, reading

Results = tuple[identity.Results, reading.Results]


def measure(config: Config) -> Results:
  """Waits for the questions; each is measured once."""
  return identity.measure(config), reading.measure(config)


def metrics(config: Config, results: Results) -> lab.Metrics:
  answer, read = results
  for layer, row in enumerate(identity.of_layers(answer)):
    yield row | {'contribution': read.of_heads[layer]}


def pages(config: Config, results: Results) -> dict[str, str]:
  answer, found = results
  said = identity.sentence(config, answer), reading.sentence(config, found)
  more = tables.fill(
    pathlib.Path(__file__).with_name('page.html'),
    conclusions=list(filter(None, said)),
    labels_note=reading.labels_note(config, found),
    certified=answer.certified,
    bounds=identity.BOUNDS,
    positions=identity.positions_note(answer),
    distance=identity.next_token_distance(answer),
    caption=identity.caption(answer),
  )
  return {'report.html': found.page.to_html(more=more)}
