"""Who is better: ratios to the plain layer, verdicts, claims and figures.

The statements are those of the authors about Fig. 5 of v1 and Fig. 3b-d of v2.
The rule: ten or more paired runs; better, poorer or comparable by the 95 %
interval of the ratio to the plain layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing, statistics

PLAIN = 'plain'  # The layer that all others are compared with.
RATES = 'fixed', 'tuned'
MIN_RUNS = 10  # Fewer runs decide nothing.
MARGIN = 0.9, 1.1  # Ratios in between are comparable.
WINDOW = 5  # Epochs of the moving average of curves.
AT_RATE = {
  'fixed': 'at the fixed learning rate {rate:g}',
  'tuned': 'with the learning rate of every layer tuned',
}
SOURCE = 'Ren & Liu, arXiv:2310.13220v1, Fig. 5 {}; v2, Fig. {}'
WORDS = {
  'better': 'below 1, not if it is above 1 or inside [0.9, 1.1] (comparable)',
  'poorer': 'above 1, or the layer diverged; not if it is below 1 or inside '
  '[0.9, 1.1] (comparable)',
  'comparable': 'inside [0.9, 1.1], not if it is otherwise below or above 1',
}
FITS = {
  'better': ('better', 'slightly better'),
  'poorer': ('poorer', 'slightly poorer', 'diverged'),
  'comparable': ('comparable', 'slightly better', 'slightly poorer'),
}


class Entry(NamedTuple):
  """A layer beside another, by one measure."""

  ratio: lab.Estimate  # Of their losses in the same runs.
  verdict: str  # That on the ratio.
  loss: lab.Estimate  # Of the layer, relative to that of predicting 0.

  def __str__(self):
    finite = np.isfinite(self.ratio.low)
    return f'{self.ratio} {self.verdict}' if finite else 'diverged'

  def to_dict(self) -> dict[str, Any]:
    """The ratio and its verdict, as `summary.json` holds them."""
    return plain(self.ratio) | {'verdict': self.verdict}


def plain(value: lab.Estimate) -> dict[str, Any]:
  """As `summary.json` holds an estimate; no interval if a run diverged."""
  interval = [value.low, value.high] if np.isfinite(value.low) else None
  return {'value': value.value, 'interval': interval}


class Results(NamedTuple):
  """A panel's losses relative to that of predicting 0, infinite if diverged."""

  layers: Mapping[str, Any]  # By name; the plain layer first.
  fixed: Mapping[str, np.ndarray]  # By measure, at the fixed rate, `[S, V]`.
  tuned: Mapping[str, np.ndarray]  # The same at the rate chosen for each layer.
  chosen: np.ndarray  # Which rate that is. Shape `[S, V]`.
  curves: np.ndarray  # Training loss, by epoch and rate. Shape `[E, S, V, L]`.
  params: Mapping[str, Any]  # Trained parameters by layer, with axes `[S, L]`.
  directions: Mapping[str, Any]  # Of random features by layer, axis `[S]`.

  def losses(self, rate: str, measure: str, name: str) -> np.ndarray:
    """One number for each run. Shape `[S]`."""
    return getattr(self, rate)[measure][:, list(self.layers).index(name)]

  def loss(self, rate: str, measure: str, name: str) -> lab.Estimate:
    """Its geometric mean; infinite if a run diverged."""
    return statistics.geometric_mean(self.losses(rate, measure, name))

  def compare(
    self,
    rate: str,
    measure: str,
    name: str,
    reference: str = PLAIN,
    num_comparisons: int = 1,
  ) -> Entry:
    """Compares a layer with another; `num_comparisons` is as in Bonferroni."""
    own, base = (self.losses(rate, measure, x) for x in (name, reference))
    ratio = statistics.paired_ratio(own, base, num_comparisons=num_comparisons)
    label = verdict(ratio, len(own))
    return Entry(ratio, label, statistics.geometric_mean(own))


def verdict(value: lab.Estimate, num_runs: int) -> str:
  """Better, poorer, comparable or inconclusive, in this order.

  Of a ratio to another layer's loss: 'better' if the interval lies below 1,
  'poorer' above 1, with 'slightly ' before it if also within the margin; else
  'comparable' within the margin; 'diverged' if a run did; else, or with too few
  runs, 'inconclusive'.
  """
  if not np.isfinite(value.value):
    return 'diverged'
  if num_runs < MIN_RUNS:
    return 'inconclusive'
  close = MARGIN[0] <= value.low and value.high <= MARGIN[1]
  for word, holds in (('better', value.high < 1), ('poorer', value.low > 1)):
    if holds:
      return f'slightly {word}' if close else word
  return 'comparable' if close else 'inconclusive'


class Statement(NamedTuple):
  """What the authors say of a layer's curve, beside that of the plain layer."""

  layer: str
  measure: str  # 'early' or 'held_out'.
  expected: str  # 'better', 'poorer' or 'comparable'.
  text: str


def fits(expected: str, label: str) -> str:
  """The verdict on a statement, from that on the ratio."""
  if label == 'inconclusive':
    return 'undecided'
  return 'reproduced' if label in FITS[expected] else 'not reproduced'


def claim(
  config: Config,
  results: Results,
  source: str,
  rate: str,
  statement: Statement,
  entry: Entry | None = None,
  judged: str = '',
  note: str = '',
) -> lab.Claim:
  """A statement at a rate; undecided if the plain layer learnt nothing."""
  name, measured, expected, text = statement
  entry = entry or results.compare(rate, measured, name)
  judged = judged or fits(expected, entry.verdict)
  slug = '-'.join(f'{name} {text}'.replace('=', '').replace(',', '').split())
  # Where the plain layer has learnt nothing, that others are as good says
  # little.
  learnt = results.loss(rate, 'held_out', PLAIN).high < 1
  statistic = f"""{words(config, measured)} over that of the plain layer,
    geometric mean of {config.num_seeds} paired runs; reproduced if the 95 %
    interval is {WORDS[expected]}{note}"""
  return lab.Claim(
    id=f'modifications-{slug}-{rate}',
    source=source,
    claim=f'{name} {text} ({AT_RATE[rate].format(rate=config.rate)})',
    statistic=lab.one_line(statistic),
    estimate=entry.ratio,
    verdict=judged if learnt else 'undecided',
  )


def words(config: Config, measure: str) -> str:
  return {
    'early': f'mean training loss of epochs 1-{config.early_epochs}',
    'held_out': 'loss on held-out prompts after training',
    'longer': f'loss on prompts of {config.longer_num_demonstrations} '
    'demonstrations',
    'scaled': f'loss with inputs {config.input_scale:g} times as large',
    'other_task': 'loss on prompts of matrices B never seen',
  }[measure]


def memorisation(config: Config, results: Results) -> str:
  """What the curves of a panel measure: stands beside every figure."""
  fixed, tuned = (
    {x: results.loss(rate, x, PLAIN) for x in ('held_out', 'other_task')}
    for rate in RATES
  )
  if config.multi_task:
    return (
      'Every prompt has a matrix B of its own. The held-out loss of the plain '
      f'layer is {fixed["held_out"]} times that of predicting 0 at the fixed '
      f'learning rate and {tuned["held_out"]} times at the tuned one.'
    )
  return (
    'Training and test prompts of a run share one matrix B, so this measures '
    'how well a layer memorises B, not in-context learning: on prompts of '
    f'other matrices the loss of the plain layer is {fixed["other_task"]} '
    'times that of predicting 0 at the fixed learning rate and '
    f'{tuned["other_task"]} times at the tuned one, on held-out prompts of its '
    f'own matrix {fixed["held_out"]} and {tuned["held_out"]} times.'
  )


def setting(config: Config) -> str:
  return (
    f'{config.num_seeds} paired runs, N = {config.num_demonstrations}, '
    f'{config.input_distribution} inputs, fixed learning rate '
    f'{config.rate:g}, {config.num_epochs} epochs of '
    f'{config.tokens_per_epoch} tokens.'
  )


def curves(
  config: Config,
  results: Results,
  name: str,
  title: str,
  shown: list[str],
  prefix: str = '',
) -> lab.Figure:
  """Training curves of the layers shown, whose prefix is left out."""
  figure, axis = drawing.subplots(figsize=(7.5, 4.6))
  fixed = config.rate_factors.index(1.0)
  epochs, ends = np.arange(1, config.num_epochs + 1), []
  for k, layer in enumerate([PLAIN, *shown]):
    curve = results.curves[:, :, list(results.layers).index(layer), fixed]
    means = [statistics.geometric_mean(row) for row in smooth(curve, WINDOW)]
    look = drawing.look(k) | {'lw': 2.2 if layer == PLAIN else 1.5}
    look['markevery'] = k * 2, max(config.num_epochs // 6, 1)
    drawing.band(axis, epochs, means, **look)
    label = pretty(layer.removeprefix(prefix))
    ends.append((means[-1].value, label, look['color']))
  kind = 'fresh B per prompt' if config.multi_task else 'memorising one B'
  axis.set(title=title, xlabel='epoch')
  axis.set_ylabel(f'training loss / loss of predicting 0\n({kind})')
  drawing.ratio_axis(axis, 'y')
  drawing.label_ends(axis, [end for end in ends if np.isfinite(end[0])])
  caption = f"""Training loss of the modified layers at the fixed rate, relative
    to predicting 0: geometric mean over runs with its 95 % interval, moving
    average over the last {WINDOW} epochs. {setting(config)}
    {memorisation(config, results)}"""
  return lab.Figure(f'training_loss_{name}', figure, caption)


def smooth(curves: np.ndarray, width: int) -> np.ndarray:
  """Means over the last `width` epochs (fewer at the start), along axis 0."""
  sums = np.cumsum(curves, axis=0)
  late = sums.copy()
  late[width:] -= sums[:-width]
  counts = np.minimum(np.arange(1, len(curves) + 1), width)
  return late / counts.reshape(-1, *[1] * (curves.ndim - 1))


def pretty(name: str) -> str:
  """A layer's name with Greek letters."""
  for word, symbol in (
    ('alpha=', 'α = '),
    ('beta=', 'β = '),
    ('k=', 'k = '),
    (' β', ', β'),
    ('-0', '−0'),
  ):
    name = name.replace(word, symbol)
  return name
