"""Claims, captions and conclusion of `experiments.softmax_regression`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments import softmax_regression_training as training
from experiments.claims import judge

COMMAND = 'python -m experiments.softmax_regression --workdir=DIR'
SOURCE = 'Li et al., arXiv:2304.13276'
PUBLISHED = 'softmax, two heads'
EXACT = 1e-11
CLOSE_COSINE, CLOSE_LOSS = 0.9, 0.05
LARGEST_DISTANCE = math.sqrt(2)  # Of two points of the simplex.


class Results(NamedTuple):
  """All measurements; see `experiments.softmax_regression_measure`."""

  exact: Mapping[str, Any]
  constants: Mapping[str, Any]
  radii: tuple[float, ...]
  steps: Mapping[tuple[int, int], Any]
  runs: Mapping[tuple[str, tuple[int, int]], Any]
  published: str = PUBLISHED

  def trained(self, layer: str, size: tuple[int, int]) -> dict[str, Any]:
    """Metrics `[frames, seeds, records]`; differences relative to the step."""
    runs = self.runs[layer, size]
    return {
      'loss_ratio': runs['loss'] / runs['loss_start'],
      'gd_ratio': runs['loss_gd'] / runs['loss_start'],
      'loss_over_gd': runs['loss'] / runs['loss_gd'],
      'preds_diff': runs['preds_diff'] / runs['preds_move'],
      'model_diff': runs['model_diff'] / runs['model_size'],
      'model_cos': runs['model_cos'],
      'logit_cos': runs['logit_cos'],
      'preds_diff_absolute': runs['preds_diff'],
      'model_diff_absolute': runs['model_diff'],
    }


def claims(config: Any, results: Results) -> list[dict[str, Any]]:
  """Judges every statement.

  Args:
    config: of the experiment.
    results: its measurements.

  Returns:
    The claims.
  """
  return [
    *_identities(results.exact),
    *_bounds(results.constants),
    *_one_step(config, results),
    *_trained(config, results),
  ]


def _row(
  name: str, source: str, text: str, statistic: str, value: float, verdict: str
) -> dict[str, Any]:
  return {
    'id': f'softmax-regression-{name}',
    'source': source,
    'claim': text,
    'statistic': statistic,
    'value': float(value),
    'interval': None,
    'verdict': verdict,
    'command': COMMAND,
  }


def _judged(
  row: dict[str, Any],
  samples: Any,
  *,
  at_least: float = -1e300,
  at_most: float = 1e300,
) -> dict[str, Any]:
  """Adds the interval over repetitions, and judges it."""
  found = harness.mean_interval(samples)
  low, high = found['low'], found['high']
  verdict = judge(low, high, at_least=at_least, at_most=at_most)
  return row | {
    'value': found['mean'],
    'interval': [low, high],
    'verdict': verdict,
  }


def _identities(exact: Mapping[str, Any]) -> list[dict[str, Any]]:
  texts = {
    'gradient': ('derived here', 'the closed forms are the three gradients'),
    'hessian': ('derived here', 'the closed form is the Hessian'),
    'target_shift': (
      f'{SOURCE}, main theorem',
      'a shift of the weights is a shift of the target',
    ),
    'data_shift': (
      'derived here',
      'a rank-one shift of the document does exactly what a shift of the '
      'weights does',
    ),
    'linear_attention': (
      'derived here',
      'the first gradient step from 0 is linear attention over the words',
    ),
  }
  return [
    _row(
      name.replace('_', '-'),
      source,
      text,
      f'largest relative error, float64; at most {EXACT:g}',
      exact[name],
      judge(exact[name], exact[name], at_most=EXACT),
    )
    for name, (source, text) in texts.items()
  ]


def _bounds(found: Mapping[str, Any]) -> list[dict[str, Any]]:
  gap = (found['log_published'] - np.log(found['observed'])) / math.log(10)
  share = float(np.max(found['share']))
  return [
    _row(
      'bound-holds',
      f'{SOURCE}, main theorem',
      'the target moves by at most M times the move of the weights',
      'log10 of M over the largest observed ratio, smallest over radii; at '
      'least 0',
      np.min(gap),
      judge(np.min(gap), np.min(gap), at_least=0),
    ),
    _row(
      'bound-informs',
      f'{SOURCE}, reading of the main theorem',
      'M says how far the target moves, to a factor of 10',
      'log10 of M over the largest observed ratio, smallest over radii; at '
      'most 1',
      np.min(gap),
      judge(np.min(gap), np.min(gap), at_most=1),
    ),
    _row(
      'true-constant',
      'derived here',
      'the target moves by at most |PA| / 2 times the move of the weights',
      'largest observed share of that; at most 1',
      share,
      judge(share, share, at_most=1 + 1e-6),
    ),
  ]


def _one_step(config: Any, results: Results) -> list[dict[str, Any]]:
  middle = config.widths[len(config.widths) // 2]
  size = config.num_words[-1], middle
  found = results.steps[size]
  where = f'n = {size[0]}, d = {middle}, mean over repetitions'
  gains = [
    float((1 - x['ratio_weights'][0]).mean() * (n + d) / d)
    for (n, d), x in results.steps.items()
  ]
  inside = judge(min(gains), max(gains), at_least=0.95, at_most=1.25)
  closed = _row(
    'closed-form',
    'derived here',
    'in place, the best step removes the share d / (n + d) of the loss',
    'measured share over d / (n + d), mean and range over all sizes; '
    'within [.95, 1.25] (the closed form is linearised)',
    float(np.mean(gains)),
    inside,
  )
  return [
    _judged(
      _row(
        'shifts-agree',
        f'{SOURCE}, title ("closeness")',
        'a step on the weights and one on the document move the logits alike',
        f'cosine of the two moves, in place; {where}; at least {CLOSE_COSINE}',
        0,
        '',
      ),
      found['cosine'][0],
      at_least=CLOSE_COSINE,
    ),
    closed | {'interval': [min(gains), max(gains)]},
    _judged(
      _row(
        'memory',
        'control',
        'in place, a gradient step gains nothing but what each word keeps of '
        'its own target',
        "loss ratio of the best step without a word's own target; "
        f'{where}; at least .998',
        0,
        '',
      ),
      found['ratio_without_self'][0],
      at_least=0.998,
    ),
    _judged(
      _row(
        'generalises',
        'control',
        'held out, a gradient step answers words that it has not seen',
        f'loss ratio of the best step; {where}; at most .95',
        0,
        '',
      ),
      found['ratio_weights'][1],
      at_most=0.95,
    ),
  ]


def _trained(config: Any, results: Results) -> list[dict[str, Any]]:
  few, middle = config.num_words[0], config.widths[len(config.widths) // 2]
  found = results.trained(PUBLISHED, (few, middle))
  rows = []
  for frame, name in enumerate(training.FRAMES):
    where = f'n = {few}, d = {middle}, {name}, mean over repetitions'
    slug = name.replace(' ', '-')
    ends = {key: value[frame][:, [0, -1]] for key, value in found.items()}
    texts = (
      (
        'loss',
        'the trained layer reaches the loss of one gradient step',
        f'loss of the layer over that of the step; {where}; within '
        f'{CLOSE_LOSS:.0%} of 1',
        ends['loss_over_gd'][:, 1],
        1 - CLOSE_LOSS,
        1 + CLOSE_LOSS,
      ),
      (
        'cosine-rises',
        'Model cos rises with training',
        f'Model cos at the end less that at the start; {where}; above 0',
        ends['model_cos'][:, 1] - ends['model_cos'][:, 0],
        1e-9,
        1e300,
      ),
      (
        'cosine',
        'the trained layer is sensitive to its queries as the step is',
        f'Model cos at the end; {where}; at least {CLOSE_COSINE}',
        ends['model_cos'][:, 1],
        CLOSE_COSINE,
        1e300,
      ),
      (
        'predictions',
        'predictions come closer with training',
        f'Preds diff at the end over that at the start; {where}; below 1',
        ends['preds_diff'][:, 1] / ends['preds_diff'][:, 0],
        -1e300,
        1 - 1e-9,
      ),
    )
    rows += [
      _judged(
        _row(f'{slug}-{key}', f'{SOURCE}, figures', text, statistic, 0, ''),
        samples,
        at_least=low,
        at_most=high,
      )
      for key, text, statistic, samples, low, high in texts
    ]
  return rows


def summarise(config: Any, results: Results) -> dict[str, Any]:
  """Puts together what `summary.json` holds.

  Args:
    config: of the experiment.
    results: its measurements.

  Returns:
    The summary.
  """
  found = results.constants
  index = int(np.argmin(np.abs(np.asarray(results.radii) - 1.5)))
  judged = claims(config, results)
  return {
    'gradient_residual_float64': float(results.exact['gradient']),
    'hessian_residual_float64': float(results.exact['hessian']),
    'lipschitz_radius': results.radii[index],
    'lipschitz_observed': float(found['observed'][index]),
    'lipschitz_true_bound': float(found['true'][index]),
    'log_published_bound': float(found['log_published'][index]),
    'one_gradient_step': [
      {
        'num_words': n,
        'width': d,
        'frame': name,
        'rate_over_closed_form': float(x['rate_weights'][frame].mean()),
        'closed_form_ratio': n / (n + d) if frame == 0 else None,
      }
      | {
        key: harness.mean_interval(x[key][frame])
        for key in ('ratio_weights', 'ratio_without_self', 'cosine')
      }
      | {
        'ratio_data': harness.mean_interval(x['ratio_data'][frame])
        if frame == 0
        else None
      }
      for (n, d), x in results.steps.items()
      for frame, name in enumerate(training.FRAMES)
    ],
    'trained_layers': [
      {'layer': layer, 'num_words': n, 'width': d, 'frame': name}
      | {
        key: harness.mean_interval(value[frame][:, -1])
        for key, value in results.trained(layer, (n, d)).items()
      }
      for layer, (n, d) in results.runs
      for frame, name in enumerate(training.FRAMES)
    ],
    'claims': judged,
    'figures': captions(config, results),
    'conclusion': conclusion(config, results),
  }


def captions(config: Any, results: Results) -> list[dict[str, str]]:
  few, middle = config.num_words[0], config.widths[len(config.widths) // 2]
  runs = f'means over {config.num_seeds} repetitions with 95 % intervals'
  observed = float(np.max(results.constants['share']))
  return [
    {
      'file': 'figures/training.png',
      'caption': 'Self-attention layers during training, against one gradient '
      f'step on softmax regression with the best common rate (n = {few} words '
      f'of width {middle}): {runs}. Left: target independent of the document, '
      'predicted for the same words. Right: the words of a new document. '
      'Preds diff and Model diff are divided by the size of what the step '
      'does, so 1 means as far away as no step at all. Curves that leave a '
      'panel start above it.',
    },
    {
      'file': 'figures/sizes.png',
      'caption': f'Loss after one gradient step, relative to the start: {runs}.'
      ' Dotted: the linearised closed form for the frame in place. Diamonds '
      f'and crosses: the layer with {PUBLISHED.split(", ")[1]}, trained '
      f'{config.num_steps} steps.',
    },
    {
      'file': 'figures/bound.png',
      'caption': 'How far a prediction moves for a move of the weights of size '
      'one: the published bound, the constant to which its lemmas lead, the '
      'true constant, and the largest ratio that was observed (n = 20, '
      f'd = 5, at most {observed:.2f} of the constant of the same document). '
      'The vertical axis is linear between -2 and 2, logarithmic beyond.',
    },
  ]


def conclusion(config: Any, results: Results) -> str:
  few, middle = config.num_words[0], config.widths[len(config.widths) // 2]
  most = config.num_words[-1]
  step = results.steps[most, middle]
  trained = results.trained(PUBLISHED, (few, middle))
  losses, cosines = (
    [float(trained[name][frame][:, -1].mean()) for frame in (0, 1)]
    for name in ('loss_over_gd', 'model_cos')
  )
  gap = results.constants['log_published'] - np.log(
    results.constants['observed']
  )
  cosine, alone, copied, whole, unseen = (
    float(step[name][frame].mean())
    for name, frame in (
      ('cosine', 0),
      ('ratio_without_self', 0),
      ('ratio_data', 0),
      ('ratio_weights', 0),
      ('ratio_weights', 1),
    )
  )
  return (
    'A shift of the weights or of the document is exactly a shift of the '
    'target. The published bound on its size is correct, and at least '
    f'10^{np.min(gap) / math.log(10):.0f} times what is observed; it bounds '
    'each shift alone and says nothing of the distance between the two. With '
    f'n = {most} and d = {middle} the moves of the logits by the two shifts '
    f'have a cosine of {cosine:.2f}. In place, one gradient step leaves '
    f"{whole:.1%} of the loss, copying each word's own target "
    f'{copied:.1%}, and the step without it {alone:.1%}: what is gained '
    f'there is memory. Held out, the step leaves {unseen:.1%}. With n = {few} '
    f'and d = {middle}, the trained softmax layer ends at {losses[0]:.2f} '
    f'times the loss of the step in place, with Model cos {cosines[0]:.2f}, '
    f'and at {losses[1]:.2f} times held out, with Model cos {cosines[1]:.2f}.'
  )


def metrics(config: Any, results: Results) -> list[dict[str, Any]]:
  """One row for each layer, size, frame, repetition and record."""
  every = config.num_steps // config.num_records
  rows = []
  for layer, size in results.runs:
    found = results.trained(layer, size)
    for frame, name in enumerate(training.FRAMES):
      for seed in range(config.num_seeds):
        for record in range(config.num_records + 1):
          place = frame, seed, record
          rows.append(
            {
              'layer': layer,
              'num_words': size[0],
              'width': size[1],
              'frame': name,
              'repetition': seed,
              'step': every * record,
            }
            | {key: float(value[place]) for key, value in found.items()}
          )
  return rows


def text(summary: Mapping[str, Any]) -> str:
  """Formats the summary for a person."""
  steps = [
    {
      'n': row['num_words'],
      'd': row['width'],
      'frame': row['frame'],
      'loss ratio': row['ratio_weights']['mean'],
      'closed form': row['closed_form_ratio'] or '',
      'rate': row['rate_over_closed_form'],
      'cosine of shifts': row['cosine']['mean'],
    }
    for row in summary['one_gradient_step']
  ]
  layers = [
    {key: row[key] for key in ('layer', 'num_words', 'width', 'frame')}
    | {
      key: row[key]['mean']
      for key in ('loss_over_gd', 'preds_diff', 'model_diff', 'model_cos')
    }
    for row in summary['trained_layers']
  ]
  judged = [
    {
      'claim': row['claim'],
      'value': f'{row["value"]:.3g}',
      'verdict': row['verdict'],
    }
    for row in summary['claims']
  ]
  tables = '\n\n'.join(harness.table(x) for x in (steps, layers, judged))
  return f'{tables}\n\n{summary["conclusion"]}'
