"""What the runs say: each published statement, and what fair controls say.

Rows are ZSL (zero-shot), ICL (in context), FT (finetuned), and controls of FT.
"""

import collections
import re
from typing import Any

import numpy as np

from experiments import lab
from experiments.changed_learning import area
from experiments.finetuning.study import SHOWN, TAUGHT, Results
from experiments.lab import claims as judging, figures as drawing, statistics

NULLS = 'permuted', 'random', 'neutral', 'recency', 'frequency', 'labels'
# Examples with tokens of their own, and what needs those of the demonstrations.
UNPAIRED = 'another task', 'other text', 'second order', 'third order'
TOKENWISE = 'Kendall', 'recall', 'coefficients'
CONTROLS = 'FT, permuted', 'flipped labels', *UNPAIRED[:2], 'ascent'
BETTER = 1e-6  # No difference at all is none.
SOURCES = {
  'Dai': 'Dai et al., arXiv:2212.10559',
  'Deutch': 'Deutch et al., arXiv:2311.07772',
  'Shen': 'Shen et al., arXiv:2310.08540',
}
# A claim of ours or of a paper, with its numbers (means over tasks, models of
# 1.3B and 2.7B): the first row exceeds the second. Controls extend its name.
CLAIMS = """
icl [Dai: 76, 77 against 55, 54] demonstrations improve answers | accuracy of
  ICL less ZSL
icl-area [control] and so without a bias to one label | area of ICL less ZSL
icl-labels [control] by their labels | area of ICL less ICL, flipped labels
ft [Dai: 64, 67 against 55, 54] finetuning improves answers | accuracy of FT
  less ZSL
ft-area [control] finetuning, without a bias to one label | area of FT less ZSL
better [Dai: 76, 77 against 64, 67] demonstrations are better than finetuning |
  accuracy of ICL less FT
better-area [control] better without a bias to one label | area of ICL less FT
recovery [Dai: 86, 89] most of what finetuning gets right is right in context,
  in percent | Rec2FTP of FT less 50
recovery-lift [control] more than of all that is wrong zero-shot | Rec2FTP of FT
  less FT, chance
output [Dai: .19, .23] finetuning changes attention outputs as demonstrations
  do, more than at random | SimAOU, normalised of FT less FT, random
output-plain [control] without normalising | SimAOU of FT less FT, random
output-partial [control] across the zero-shot output, of this query alone |
  SimAOU, partial of FT less FT, permuted
output-neutral [control] and so behind a neutral prefix, more than ascent |
  SimAOU, partial of FT, neutral less ascent, neutral
output-untrained [control] more than of an untrained model, across that output |
  SimAOU, partial of FT less untrained
output-small [control] a small step downhill more than one uphill | SimAOU of
  small step less small step uphill
attention [Dai: .44, .43 against .34, .36] finetuning makes attention maps more
  like those in context | SimAM, after of FT less FT, before
order [Dai: .19, .21] finetuned queries order training tokens as attention does,
  more than at random | Kendall of FT less FT, random
order-untuned [control] more than untuned | Kendall of FT less rate 0
order-recency [control] more than recency | Kendall of FT less FT, recency
order-frequency [control] more than frequency | Kendall of FT less FT, frequency
projections [Dai] both act through keys and values: finetuning all parameters is
  less alike | SimAOU of FT less all
projections-size [control] all parameters, with updates nearest in size | SimAOU
  of FT less all, same size
gradients [Dai] values are what slopes would be (meta-gradients): labels of both
  dual models of a head are alike | coefficients of FT less FT, permuted
dual [ours] dual weights change alike | dual weights of FT less FT, permuted
heads [ours] the dual model of a head changes its answer alike, for this query
  alone | heads of FT less FT, permuted
bias [Deutch: .19 against .10] normalising first makes updates more alike |
  SimAOU of FT, normalised less FT
layers [Deutch: .17 against .10] blocks that learn alone are more like learning
  in context | SimAOU of layers less FT
layers-size [control] blocks alone, with updates nearest in size | SimAOU of
  layers, same size less FT
layers-maps [Deutch: .34 against .27] so are their maps | SimAM-delta of layers
  less FT
layers-maps-size [control] maps of blocks alone, with updates nearest in size |
  SimAM-delta of layers, same size less FT
untrained [Deutch] an untrained model is more alike | SimAOU of untrained less
  FT
embeddings [Deutch] so is one with trained embeddings | SimAOU of embeddings
  less FT
trained [Deutch] maps of a trained model are more alike | SimAM-delta of FT less
  untrained
sensitivity [Shen] the order of demonstrations matters more in context | spread
  of ICL less FT
overlap [ours] finetuning brings the likeliest tokens closer to those in context
  | overlap of FT less ZSL
"""
# Controls that several claims share: their metric, and the rows to exceed.
FAIR = {
  'ft': ('area', 'flipped labels'),
  'output': ('SimAOU', *CONTROLS),
  'attention': ('SimAM-delta', *CONTROLS),
  'gradients': ('coefficients', 'flipped labels'),
  'dual': ('dual weights', 'flipped labels', 'other text'),
  'heads': ('heads', 'flipped labels', 'other text'),
  'overlap': ('overlap', 'flipped labels', 'other text'),
}
# Figures: `name: metrics | caption`; the values that mean nothing, if not 0.
FIGURES = """
answers: area; accuracy at the median; accuracy | Area under the curve; accuracy
  with the median as threshold, and without one, as published.
recovery: Rec2FTP; loss; size | Percent right in context of what finetuning
  gains, and (chance) of all that is wrong zero-shot; loss, last quarter of the
  examples; size of changes of attention outputs, over that in context.
outputs: SimAOU, normalised; SimAOU; SimAOU, partial | Cosine of both changes of
  attention outputs: as published, not normalised, and across the zero-shot
  output. FT must exceed its controls.
attention: SimAM, after; SimAM, softmax; SimAM-delta | Cosine of attention
  logits, of weights, and of what changes in logits.
order: Kendall; Kendall, examples; recall less chance | Order of training tokens
  and examples by attention in context and by finetuned queries; recall of the
  first third of the examples.
duals: coefficients; dual weights; heads | Cosines, head by head, of labels of
  both dual models (values; slopes by them, negated), of what changes in their
  weights, and in their answers.
reactions: spread; overlap; first label | Deviation of log-odds over orders,
  over that over queries; share of the ten likeliest tokens that are those in
  context; share of first labels.
"""
NOTHING = {'SimAM, after': 1.0, 'SimAM, softmax': 1.0, 'Rec2FTP': 50.0}
NOTHING |= {'area': 0.5, 'accuracy': 0.5, 'accuracy at the median': 0.5}
NOTHING |= {'first label': 0.5, 'size': 1.0}
Quantities = dict[str, dict[str, np.ndarray]]  # By row, `[tasks, seeds]`.


def quantities(config, results: Results) -> Quantities:
  """All that is compared, by metric and by what was finetuned or shown."""
  found: Quantities = collections.defaultdict(dict)
  few = slice(-config.num_queries, None)

  def answers(row, stage, odds):
    odds, right = odds[..., few], stage.right[..., few]
    middle = np.median(odds, axis=-1, keepdims=True)
    found['area'][row] = area(odds, right)
    found['accuracy'][row] = ((odds > 0) == right).mean(-1)
    found['accuracy at the median'][row] = ((odds > middle) == right).mean(-1)
    found['first label'][row] = (odds > 0).mean(-1)

  def taught(row, stage, which):
    for name, values in stage.found.items():
      if row in UNPAIRED and name.startswith(TOKENWISE):
        continue
      values = np.stack([x[:, i] for x, i in zip(values, which, strict=True)])
      metric, _, null = name.rpartition(', ')
      if name == 'odds':
        answers(row, stage, values)
      elif name == 'loss':
        some = max(1, values.shape[-1] // 4)
        found['loss'][row] = values[..., -some:].mean(-1)
      elif null.startswith('shown'):
        found[metric][f'{row}, {[*SHOWN][int(null[6:])]} shown'] = values
      elif null in NULLS and metric:
        found[metric][f'{row}, {null}'] = values
      else:
        found[name][row] = values

  rates = [f'rate {x:g}' for x in config.rates[1:]]
  rows = {'controls': TAUGHT, 'longer': ('longer', 'longer, flipped labels')}
  rows['rates'] = ('rate 0', 'small step uphill', 'small step', *rates)
  first = {'controls': results.stages['controls']}
  for name, stage in (first | results.stages).items():
    if name in results.rates and name != 'rates':
      grid = [rate for _, rate in stage.names]
      taught(name, stage, [grid.index(x) for x in results.rates[name]])
      sizes = stage.found['size'].mean(axis=1), found['size']['FT'].mean(axis=1)
      gap = np.abs(np.log(sizes[0] / sizes[1][:, None]))
      nearest = np.argmin(np.nan_to_num(gap, nan=np.inf), axis=1)
      taught(f'{name}, same size', stage, nearest)
      continue
    for i, row in enumerate(rows.get(name, (name,))):
      taught(row, stage, [i] * len(config.tasks))
    if name in ('controls', 'longer'):
      start = '' if name == 'controls' else 'longer, '
      found['overlap'][f'{start}ZSL'] = stage.overlap
      for i, shown in enumerate(['ZSL', *SHOWN][: stage.odds.shape[2]]):
        row = {0: 'ZSL', 1: 'ICL'}.get(i, f'ICL, {shown}')
        answers(start + row, stage, stage.odds[:, :, i])
  found['SimAM, after']['FT, before'] = found['SimAM, before']['FT']
  found['SimAOU']['FT, normalised'] = found['SimAOU, normalised']['FT']
  stage = results.stages['controls']
  seen, tuned = stage.odds[..., few], stage.found['odds'][..., few]
  positive = (x > 0 for x in (seen[:, :, 0], seen[:, :, 1], tuned[:, :, 0]))
  zsl, icl, ft = (x == stage.right[..., few] for x in positive)
  for row, of in (('FT', ft & ~zsl), ('FT, chance', ~zsl)):
    with np.errstate(invalid='ignore'):  # Of none nothing is recovered.
      found['Rec2FTP'][row] = 100 * (of & icl).sum(-1) / of.sum(-1)
    found['gained'][row] = of.sum(-1)
  orders = [0, *([*SHOWN].index(x) for x in UNPAIRED[2:])]  # So in `TAUGHT`.
  for row, odds in (('FT', tuned), ('ICL', seen[:, :, 1:])):
    deviation = odds[:, :, orders].std(axis=2, ddof=1).mean(-1)
    found['spread'][row] = deviation / odds[:, :, 0].std(-1, ddof=1)
  return found


def defined(metric: str, x: np.ndarray) -> np.ndarray:
  """Runs in a row; where finetuning gains nothing, none of it is recovered."""
  some = np.isfinite(x) | (metric != 'Rec2FTP')
  return x[some] if some.sum() > 1 else x.ravel()


def mean(metric: str, x: np.ndarray) -> lab.Estimate:
  return statistics.mean(defined(metric, x))


def claims(config, results: Results) -> lab.Claims:
  found, judged, text = quantities(config, results), {}, CLAIMS
  for name, (metric, *rows) in FAIR.items():
    for row in rows:
      text += f"""{name}-{row.replace(' ', '-').replace(',', '')} [control] more
  {metric} than {row} | {metric} of FT less {row}
"""
  for source, cited in SOURCES.items():
    text = text.replace(f'[{source}', f'[{cited}')
  for claim in re.split(r'\n(?! )', text.strip()):
    words = lab.one_line(claim).rpartition(' | ')[2]
    metric, one, two = re.split(' of | less ', words)
    less = float(two) if two.isdigit() else found[metric][two]
    gap = defined(metric, found[metric][one] - less)
    judged[claim.split()[0]] = lab.at_least(BETTER, gap)
  runs = f'seeds of these {len(config.tasks)} tasks'
  yield from lab.statements('finetuning-', text, judged, runs=runs)


def figures(config, results: Results) -> list[lab.Figure]:
  found, drawn, seeds = quantities(config, results), [], config.num_seeds
  number = len(config.tasks)
  runs = f"""ICL: in context, ZSL: zero-shot, FT: finetuned, others: controls
    of FT. Means over {number} tasks of {seeds} seeds with 95 % intervals; a dot
    is a seed. Line: nothing, or the same."""
  for text in re.split(r'\n(?! )', FIGURES.strip()):
    name, panels, caption = re.split(': | [|] ', lab.one_line(text), maxsplit=2)
    kinds = panels.split('; ')
    shown = [{k: x for k, x in found[y].items() if _is_shown(k)} for y in kinds]
    size = 5 * len(kinds), 1.8 + 0.2 * max(map(len, shown))
    figure, axes = drawing.subplots(1, len(kinds), figsize=size)
    for axis, rows, metric in zip(axes, shown, kinds, strict=True):
      for i, task in enumerate(config.tasks):
        dots = np.array([x[i] for x in rows.values()])
        places = np.repeat(np.arange(len(dots)), seeds)
        look: Any = {'color': drawing.COLOURS[i + 1], 'label': task, 'ms': 4}
        axis.plot(dots.ravel(), places, '.', **look)
      look = {'color': drawing.BLACK, 'ms': 4}
      look |= {'reference': NOTHING.get(metric, 0)}
      values = {k: mean(metric, x) for k, x in rows.items()}
      drawing.forest(axis, values, **look)
      axis.set_xlabel(metric)
      if metric in ('loss', 'size'):
        axis.set_xscale('log')
      else:
        axis.locator_params('x', nbins=5)
    drawing.legend(axes[0], number)
    drawn.append(lab.Figure(name, figure, f'{caption} {runs}'))
  return drawn


KEPT = 'ZSL', 'ICL', 'flipped labels', 'same size'


def _is_shown(row: str) -> bool:
  """Whether figures have a row: of nulls and other prompts those of FT."""
  first, _, rest = row.partition(', ')
  return first in ('FT', 'ICL') or rest in ('', *KEPT)


def tables(config, results: Results) -> dict[str, Any]:
  """Claims beside their fair controls."""
  every = claims(config, results)
  judged = {x.id.removeprefix('finetuning-'): x for x in every}
  fair: dict[str, list[lab.Claim]] = {
    k: [] for k, x in judged.items() if x.source != 'control'
  }
  for name, claim in judged.items():
    if name not in fair:  # Of the claim whose name its own extends.
      fair[max((x for x in fair if name.startswith(x)), key=len)].append(claim)
  rows = []
  for name, controls in fair.items():
    fails = sum(x.verdict != judging.REPRODUCED for x in controls)
    claim, verdict = judged[name], judged[name].verdict
    if verdict == judging.REPRODUCED and fails:
      verdict = f'reproduced, but {fails} of {len(controls)} controls are not'
    row = {'claim': claim.claim, 'published': claim.source.partition(': ')[2]}
    row |= {'statistic': claim.statistic, 'this model': f'{claim.estimate:.2g}'}
    found = [f'{x.claim}: {x.estimate:.2g}' for x in controls]
    rows.append(row | {'fair controls': '; '.join(found), 'verdict': verdict})
  return {'verdicts': rows}


def summary(config, results: Results) -> dict[str, Any]:
  """Each metric by row and task, with intervals; the rates chosen, by task."""

  def by_task(metric, x):
    rows = zip((*config.tasks, 'all'), (*x, x), strict=True)
    return {task: mean(metric, y) for task, y in rows}

  return {
    metric: {row: by_task(metric, x) for row, x in of.items()}
    for metric, of in quantities(config, results).items()
  } | {'rates': {k: [*map(float, x)] for k, x in results.rates.items()}}


def sentence(config, results: Results) -> str:
  found = quantities(config, results)

  def of(metric, *rows):
    return ', '.join(f'{found[metric][x].mean():.2f}' for x in rows)

  rows = 'FT', 'FT, permuted', 'flipped labels', 'other text'
  return f"""Areas under the curve are {of('area', 'ZSL', 'ICL', 'FT')}
    zero-shot, in context and finetuned. Updates of attention outputs have a
    cosine of {of('SimAOU', *rows)} (same query, another, flipped labels, other
    text), labels of the dual models one of {of('coefficients', *rows[:3])}."""
