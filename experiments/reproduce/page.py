"""The page of `experiments.reproduce`: one file, readable on a phone."""

import base64
import concurrent.futures
import io
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.lab import claims as judging, tables

MARKS = dict(zip(judging.VERDICTS, '✓✗?', strict=True))
LONG_TABLE = 24  # More claims are folded away.
WIDTH = 1100  # Pixels of a figure on the page; a click leads to the large one.
QUALITY = 75


class Line(NamedTuple):
  """One conclusion, as long as its claims are judged as it says."""

  section: str  # Experiment that shows it.
  lead: str  # What to remember.
  text: str  # What it rests on, with `{}` for the values of its claims.
  verdicts: Mapping[str, str]  # That the text supposes, by id of claim.


# Paragraphs: experiment, lead, and text, where `{id verdict}` is the value of a
# claim; the verdicts are `yes` and `no` for (not) reproduced, and `undecided`.
TEXT = """
equivalence | An attention head is one gradient step. | It agrees with its dual
  model to {equivalence-residual_exact_softmax-31 yes} with the exact softmax
  and to {equivalence-residual-31 yes} with random features, in float64.
accounts | So it is with the neighbouring accounts: | linear attention and
  gradient descent ({accounts-identities-von-Oswald-et-al. yes}), delta rules
  and their inner learners ({accounts-identities-online-learners yes}), a
  trained network and attention over its training data
  ({training-data-identity yes}).
equivalence | The identity says how a layer computes, not how well it learns. |
  Trained on one task matrix, the layer has a loss on another one of
  {equivalence-in-context-31 no} times that of predicting 0.
linear_regression_gd | Where the tasks vary, layers do learn gradient descent. |
  Linear self-attention ends in the model of one step (cosine
  {linear-regression-gd-model-cos yes}). One softmax head does not: its loss is
  {accounts-one-head-is-not-gd yes} times that of the step.
approximation | Random features stand in for the softmax at small norms only. |
  With 4800 of them, outputs are off by
  {approximation-output-error-falls-to-a-low-level-sd-0-25 yes} at standard
  deviation 1/4, but by
  {approximation-output-error-falls-to-a-low-level-trained no} in a trained
  layer, where more hardly help (slope
  {approximation-output-mse-falls-like-1-r-trained no}, not -1).
generalization | The generalisation bound holds, and is loose. | The gap falls
  with the right power of the number of demonstrations
  ({generalization/rate_softmax yes}); the largest of any weights in the ball is
  {generalization/largest_features yes} of the bound.
modifications | Half of what is said of modified attention survives a tuned
  learning rate for every layer. | Regularised with alpha = -0.5, the first 20
  epochs have
  {modifications-printed-alpha-0.5-converges-faster-tuned yes} of the plain
  layer's loss. With 0.5, said to end poorer, the final loss is
  {modifications-printed-alpha+0.5-converges-to-a-poorer-result-tuned no} of
  it, and no negatives are shown to be faster
  ({modifications-negatives:-some-setting-converges-faster-tuned undecided}).
regularized_gradient_descent | The regularised layer as printed is not a step
  with weight decay. | That step equals a stricter layer to
  {regularized_gradient_descent/strict_ridge yes}, and misses the printed one by
  {regularized_gradient_descent/printed_ridge no} of its scale. The printed one
  is a step that un-learns the query's own label, to
  {regularized_gradient_descent/printed_pair yes}.
learning_processes | More steps, or another loss, are not attention. | The
  first step on the squared loss is attention, to
  {trained_layer:first_step_squared yes}, but 200 steps turn the answer by
  {trained_layer:squared_after_200_steps no} degrees. With SimSiam's cosine for
  a loss, the first step is turned by
  {trained_layer:cosine_parts_from_attention yes} already.
meta_optimizer | Published measures of implicit finetuning do not test it. | On
  updates that have nothing to do with each other, SimAM is
  {meta-optimizer-simam-noise no} and Kendall {meta-optimizer-kendall-noise no}
  instead of 0. A partial cosine stays at
  {meta-optimizer-simaou-partial-forgetting yes} even if both sides merely
  forget.
"""


def _read(paragraph: str) -> Line:
  section, lead, text = judging.one_line(paragraph).split(' | ')
  found = re.findall(r'{(\S+) (\w+)}', text)
  words = {'yes': judging.REPRODUCED, 'no': judging.FAILED}
  verdicts = {name: words.get(word, word) for name, word in found}
  return Line(section, lead, re.sub(r'{\S+ \w+}', '{}', text), verdicts)


LINES = tuple(map(_read, re.split(r'\n(?! )', TEXT.strip())))


class Conclusion(NamedTuple):
  section: str  # Experiment that shows it.
  lead: str  # What to remember.
  text: str  # What it rests on.
  dissent: list[str]  # Claims judged otherwise; empty if the line holds.


def lines(claims: Sequence[Mapping[str, Any]]) -> list[Conclusion]:
  """The conclusions with the numbers of a run, or what is judged otherwise."""
  known = {claim['id']: claim for claim in claims}

  def value(name):
    number = known.get(name, {}).get('value')
    if number is None:
      return 'no number'
    return f'{number:.0e}' if 0 < abs(number) < 1e-6 else f'{number:.3g}'

  return [
    Conclusion(
      line.section,
      line.lead,
      line.text.format(*map(value, line.verdicts)),
      [
        f'{name}: {known[name]["verdict"] if name in known else "not measured"}'
        for name, expected in line.verdicts.items()
        if name not in known or known[name]['verdict'] != expected
      ],
    )
    for line in LINES
  ]


class Section(NamedTuple):
  name: str  # Short name, used as anchor.
  title: str  # Heading.
  command: str  # What runs it.
  folder: pathlib.Path  # Its results.
  summary: Mapping[str, Any]  # With `claims`, `figures` and `conclusion`.
  seconds: float  # How long it took.


class Image(NamedTuple):
  data: str  # Address that holds the image itself.
  link: str  # Of the file in full size, relative to the page.
  caption: str  # Full sentences.


def page(
  sections: Sequence[Section], report: pathlib.Path, *, fast: bool
) -> str:
  """Builds the page of the folder `report`: HTML with every image inside."""
  claims = [claim for part in sections for claim in part.summary['claims']]
  wanted = [
    (part.folder, row) for part in sections for row in part.summary['figures']
  ]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    images = list(pool.map(lambda pair: _image(report, *pair), wanted))
  filters = {'counts': judging.counts, 'next': next, 'number': number}
  return tables.fill(
    pathlib.Path(__file__).with_name('page.html'),
    filters,
    sections=sections,
    claims=claims,
    conclusions=[] if fast else lines(claims),
    images=iter(images),
    scheme=scheme,
    marks=MARKS,
    long_table=LONG_TABLE,
    fast=fast,
  )


def scheme(name: str) -> Any:
  """A drawing of the papers, redrawn, as it stands in a page."""
  import markupsafe

  drawn = pathlib.Path(__file__).with_name(f'{name}.svg').read_text('utf-8')
  return markupsafe.Markup(drawn)


def number(claim: Mapping[str, Any]) -> str:
  """A value with its interval; null is what JSON makes of NaN."""
  if claim['interval'] is None:
    return tables.number(claim['value'])
  value, low, high = map(tables.number, (claim['value'], *claim['interval']))
  return f'{value} [{low}, {high}]'


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
