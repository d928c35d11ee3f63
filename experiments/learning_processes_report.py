"""Claims, conclusion and tables of `experiments.learning_processes`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import claims as judging
from experiments import harness
from experiments.learning_processes_measure import INGREDIENTS

COMMAND = 'python -m experiments.learning_processes'
COMPARISON = 'Ren & Liu, arXiv:2310.13220v2, section 3 and Fig. 2'
SIMSIAM = 'Chen & He, arXiv:2011.10566, Fig. 2, in this small setting'
KERNELS = 'Esser et al., arXiv:2309.02028'
EXACT = 1e-12
CLOSE = 10.0  # Degrees within which attention counts as a prediction.
KEPT, COLLAPSED = 0.9, 0.1  # Shares of the spread at the start.

Results = Mapping[str, Mapping[str, Any]]

_FIRST_STEPS = {
  'squared': (
    'the first step on the squared loss from W_0 = 0 is attention',
    'Ren & Liu, arXiv:2310.13220, Theorem 3.1 (any loss of that first step)',
  ),
  'InfoNCE': (
    'the first step on InfoNCE from W_0 = 0 is attention with centred values',
    'van den Oord et al., arXiv:1807.03748, eq. 4',
  ),
  'cosine': (
    'the first step on the cosine from the query token is attention with the '
    "labels of that loss's gradient",
    'Ren & Liu, arXiv:2310.13220, section 4 (normalised similarity)',
  ),
  'frozen_target': (
    "BYOL's first step with the values as frozen target, inner products and "
    'no predictor is attention',
    COMPARISON,
  ),
  'frozen_kernel': (
    "contrastive kernel learning's first step with values as frozen branches "
    'and no constraint is attention with negatives',
    COMPARISON,
  ),
}


def by_seed(array: Any) -> np.ndarray:
  """Means over the prompts of each seed. Shape `[S, ...]`."""
  return np.mean(np.asarray(array, np.float64), axis=1)


def shown_steps(num_steps: int) -> np.ndarray:
  """Indices of at most 40 steps, evenly apart on a logarithmic axis."""
  return np.unique(np.geomspace(1, num_steps, 40).round().astype(int)) - 1


def claims(config: Any, results: Results) -> list[dict[str, Any]]:
  """Judges where the processes agree, and where they part.

  Args:
    config: settings.
    results: measurements by data.

  Returns:
    The claims.

  Raises:
    ValueError: if a measurement is not finite.
  """
  rows = []
  for data, result in results.items():
    where = data.replace(' ', '_')
    rows += [
      {'id': f'{where}:{row.pop("name")}'} | row
      for row in [
        *_exact_claims(data, result),
        *_later_claims(config, data, result),
        *_process_claims(data, result),
      ]
    ]
  return rows


def _exact_claims(data, result) -> list[dict[str, Any]]:
  rows = []
  for name, (text, source) in _FIRST_STEPS.items():
    rows.append(
      _limit(
        f'first_step_{name}',
        source,
        f'{data}: {text}',
        f'largest relative error of the answer; at most {EXACT:g}',
        result['exact'][name],
        EXACT,
      )
    )
  duals = result['duals']['contrastive']
  rows.append(
    _limit(
      'schedule',
      'Ren & Liu, arXiv:2310.13220v1, section 5',
      f'{data}: on the contrastive loss every later step repeats the first',
      'largest angle of weights and attention, degrees; at most 1e-5',
      np.maximum(duals['weights_angle'], duals['answer_angle']),
      1e-5,
    )
  )
  return rows


def _later_claims(config, data, result) -> list[dict[str, Any]]:
  rows = []
  for name in ('squared', 'InfoNCE', 'cosine'):
    for step in sorted({min(10, config.num_dual_steps), config.num_dual_steps}):
      angles = result['duals'][name]['first_answer_angle'][..., step - 1]
      rows.append(
        _judge(
          f'{name}_after_{step}_steps',
          COMPARISON,
          f'{data}: after {step} steps on the {name} loss the answer still '
          'points where the attention of the first step points',
          f'angle in degrees; at most {CLOSE:g}',
          by_seed(angles),
          at_most=CLOSE,
        )
      )
  return rows


def _process_claims(data, result) -> list[dict[str, Any]]:
  processes, rows = result['processes'], []
  kept = {
    name: by_seed(
      look['output_spread'][..., -1] / look['output_spread'][..., 0]
    )
    for name, look in processes.items()
    if name != 'dual model'
  }
  for name in ('SimSiam', 'BYOL'):
    rows.append(
      _judge(
        f'{name}_keeps_its_spread',
        SIMSIAM
        if name == 'SimSiam'
        else 'Grill et al., arXiv:2006.07733, in this small setting',
        f'{data}: {name} does not collapse',
        f'spread of outputs, end / start; at least {KEPT:g}',
        kept[name],
        at_least=KEPT,
      )
    )
  for missing in ('predictor', 'stop-gradient', 'both'):
    name = f'SimSiam without {missing}'
    rows.append(
      _judge(
        f'{name}_collapses'.replace(' ', '_'),
        SIMSIAM,
        f'{data}: {name} collapses',
        f'spread of outputs, end / start; at most {COLLAPSED:g}',
        kept[name],
        at_most=COLLAPSED,
      )
    )
    rows.append(
      _judge(
        f'{name}_loses_spread'.replace(' ', '_'),
        SIMSIAM,
        f'{data}: {name} loses more spread than SimSiam',
        'difference of spreads of outputs, end / start; below 0',
        kept[name] - kept['SimSiam'],
        at_most=0,
      )
    )
  return rows + _parting_claims(data, result)


def _parting_claims(data, result) -> list[dict[str, Any]]:
  dual = result['processes']['dual model']
  kernel = result['processes']['kernel learning']
  angles = dict(
    zip(INGREDIENTS, np.moveaxis(result['ingredients'], -1, 0), strict=True)
  )
  return [
    _judge(
      'dual_keeps_the_spread_of_its_targets',
      COMPARISON,
      f'{data}: one step of the dual model does not collapse',
      'spread of its predictions / of the values; at least 0.5',
      by_seed(dual['output_spread'] / dual['target_spread']),
      at_least=0.5,
    ),
    _judge(
      'cosine_parts_from_attention',
      COMPARISON,
      f"{data}: the normalised cosine alone changes attention's first step",
      f'angle in degrees; at least {CLOSE:g}',
      by_seed(angles['cosine instead of inner product']),
      at_least=CLOSE,
    ),
    _judge(
      'SimSiam_parts_from_attention',
      COMPARISON,
      f"{data}: SimSiam's first step has nothing of attention's",
      'angle in degrees; at least 80',
      by_seed(angles['all three: SimSiam']),
      at_least=80,
    ),
    _judge(
      'kernel_learning_finds_its_optimum',
      KERNELS,
      f'{data}: contrastive kernel learning ends in the lowest eigenvectors',
      'loss / least loss; at least 0.99',
      by_seed(kernel['loss'][..., -1]),
      at_least=0.99,
    ),
  ]


def _judge(
  name,
  source,
  text,
  statistic,
  samples,
  *,
  at_least=-math.inf,
  at_most=math.inf,
) -> dict[str, Any]:
  """A claim holds if the whole interval over seeds lies in the range."""
  estimate = harness.mean_interval(samples)
  low, high = estimate['low'], estimate['high']
  if not np.all(np.isfinite(samples)):
    raise ValueError(
      f'learning_rate is too large: {statistic} is not finite ({text}). Lower '
      'it.'
    )
  verdict = judging.judge(low, high, at_least=at_least, at_most=at_most)
  return _row(
    name, source, text, statistic, estimate['mean'], [low, high], verdict
  )


def _limit(name, source, text, statistic, samples, bound) -> dict[str, Any]:
  """A claim about every prompt: the largest number decides."""
  value = float(np.max(samples))
  verdict = 'reproduced' if value <= bound else 'not reproduced'
  return _row(name, source, text, statistic, value, None, verdict)


def _row(name, source, text, statistic, value, interval, verdict):
  return {
    'name': name,
    'source': source,
    'claim': text,
    'statistic': statistic,
    'value': value,
    'interval': interval,
    'verdict': verdict,
    'command': COMMAND,
  }


def step_sizes(results: Results) -> dict[str, Any]:
  """How often attention's own step size is stable for the squared loss."""
  return {
    data: {
      'share_of_prompts': float(
        np.mean(result['duals']['relative_step_size'] > 0.5)
      ),
      'note': 'Share of prompts whose normaliser D is more than half the '
      "largest eigenvalue of the demonstrations' kernel matrix: a step of "
      '1 / D is then stable for the squared loss.',
    }
    for data, result in results.items()
  }


def conclusion(
  config: Any, results: Results, rows: Sequence[Mapping[str, Any]]
) -> str:
  """One paragraph, computed from the numbers."""
  values = {row['id']: row for row in rows}
  exact = max(
    row['value'] for name, row in values.items() if ':first_step_' in name
  )
  parts = [
    f'All {len(_FIRST_STEPS)} first steps that should be attention are, to a '
    f'relative error of at most {exact:.0e}.'
    if exact <= EXACT
    else f'A first step differs from attention by {exact:.0e}.'
  ]
  for data in results:
    numbers = {
      name.split(':')[1]: row['value']
      for name, row in values.items()
      if name.startswith(data.replace(' ', '_'))
    }
    parts.append(_sentence(data, config.num_dual_steps, numbers))
  counts = {
    verdict: sum(row['verdict'] == verdict for row in rows)
    for verdict in ('reproduced', 'not reproduced', 'undecided')
  }
  parts.append(
    'Claims: ' + ', '.join(f'{n} {name}' for name, n in counts.items()) + '.'
  )
  return ' '.join(parts)


def _sentence(data: str, steps: int, numbers: Mapping[str, float]) -> str:
  angles = ', '.join(
    f'{numbers[f"{name}_after_{steps}_steps"]:.0f} ({name})'
    for name in ('squared', 'InfoNCE', 'cosine')
  )
  cosine = numbers['cosine_parts_from_attention']
  simsiam = numbers['SimSiam_parts_from_attention']
  kept = numbers['SimSiam_keeps_its_spread']
  bare = numbers['SimSiam_without_both_collapses']
  dual = numbers['dual_keeps_the_spread_of_its_targets']
  return (
    f'Demonstrations "{data}": {steps} steps turn the answer away from that of '
    f'the first step by {angles} degrees on average. The cosine instead of the '
    f"inner product turns attention's step by {cosine:.0f} degrees, all of "
    f"SimSiam's ingredients by {simsiam:.0f}. SimSiam keeps {kept:.0%} of the "
    f'spread of its outputs, without predictor and stop-gradient {bare:.0%}; '
    'the dual model, whose targets do not move, has after its step '
    f'{dual:.0%} of the spread of the values.'
  )


def metrics(results: Results) -> list[dict[str, Any]]:
  """Means over seeds, by data and process, of steps evenly apart in log."""
  rows = []
  for data, result in results.items():
    for group in ('duals', 'processes'):
      for name, look in result[group].items():
        if not isinstance(look, Mapping):
          continue
        curves = {
          key: np.atleast_1d(by_seed(array).mean(axis=0))
          for key, array in look.items()
        }
        for step in shown_steps(len(next(iter(curves.values())))):
          rows.append(
            {'data': data, 'group': group, 'process': name, 'step': int(step)}
            | {key: float(curve[step]) for key, curve in curves.items()}
          )
  return rows


def text(summary: Mapping[str, Any]) -> str:
  """What a person reads at the end of a run."""
  lines = [
    {
      'claim': row['id'],
      'value': row['value'],
      'interval': '-'
      if row['interval'] is None
      else '[{:.3g}, {:.3g}]'.format(*row['interval']),
      'verdict': row['verdict'],
    }
    for row in summary['claims']
  ]
  return f'{harness.table(lines)}\n\n{summary["conclusion"]}'
