"""Claims of `experiments.accounts`, with their statistics and verdicts.

Losses are mean squared errors over that of predicting 0 on the same prompts.
Ratios are geometric means over seeds, whose prompts both sides share.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments.accounts_memories import MEMORIES
from experiments.claims import judge

COMMAND = 'python -m experiments.accounts --workdir=DIR'
EXACT = 1e-12
CLOSE = {'at_least': 0.95, 'at_most': 1.05}  # Ratios that count as the same.
ALIGNED = 0.99
TUNED, TRAINED = 0, 1
OSWALD = 'von Oswald et al., arXiv:2212.07677'
LAYERS = tuple(name for name, memory in MEMORIES.items() if memory.is_layer)
# Better, worse, where the claim is from, and its words.
ORDERS = (
  (
    'two-head softmax',
    'softmax',
    f'{OSWALD}, appendix (softmax self-attention)',
    'two softmax heads learn better than one',
  ),
  (
    'delta rule',
    'linear attention',
    'Schlag et al., arXiv:2102.11174, section 4',
    'the delta rule learns better than linear attention',
  ),
  (
    'gated delta rule',
    'delta rule',
    'Yang et al., arXiv:2412.06464 (on language), carried over to this task',
    'a gate improves the delta rule',
  ),
  (
    'delta rule (momentum)',
    'delta rule',
    'Behrouz et al., arXiv:2501.00663 (on language), carried over to this task',
    'momentum improves the delta rule',
  ),
  (
    'momentum attention',
    'softmax',
    'Dai et al., arXiv:2212.10559, Table 6 (on language), carried over to this '
    'task',
    'momentum attention learns better than softmax attention',
  ),
)


def ratio(above, below) -> dict[str, float]:
  """Geometric mean over seeds with its 95 % interval."""
  logs = harness.mean_interval(np.log(above) - np.log(below))
  return {key: float(np.exp(value)) for key, value in logs.items()}


def within(values, at_least: float = -np.inf, at_most: float = np.inf) -> int:
  """How many seeds lie in a range."""
  values = np.asarray(values)
  return int(np.sum((at_least <= values) & (values <= at_most)))


def _seeds(values, **allowed) -> str:
  """The seeds one by one, beside a mean that one of them can move."""
  return (
    f'; median {np.median(values):.3g}, {within(values, **allowed)} of '
    f'{len(values)} seeds in that range'
  )


def _compare(name, source, words, statistic, above, below=1.0, **allowed):
  """A claim about a ratio, with its geometric mean and its seeds."""
  ratios = np.asarray(above) / below
  statistic = f'{statistic}; geometric mean{_seeds(ratios, **allowed)}'
  return _claim(name, source, words, statistic, ratio(ratios, 1.0), **allowed)


def claims(config: Any, tables: Mapping[str, Any], result) -> list[Any]:
  """All claims.

  Args:
    config: settings of the experiment.
    tables: what `accounts_identities.measure` returns.
    result: what `accounts_measure.measure` returns, by memory.

  Returns:
    The claims, in the form of `experiments.claims`.
  """
  at = config.lengths.index(config.num_demonstrations)
  return [
    *_identities(tables),
    *_trained_is_tuned(config, result),
    *_orders(result, at),
    *_of_tuned(result, at),
    *_elsewhere(config, result, at),
  ]


def layers(result) -> tuple[str, ...]:
  """The learners around which layers were trained."""
  return tuple(name for name in result if name in LAYERS)


def identifier(name: str) -> str:
  """The id of a claim."""
  return f'accounts-{name.replace(" ", "-").replace(",", "")}'


def _claim(name, source, words, statistic, estimate, **allowed):
  low, high = estimate['low'], estimate['high']
  return {
    'id': identifier(name),
    'source': source,
    'claim': words,
    'statistic': statistic,
    'value': estimate['mean'],
    'interval': [low, high],
    'verdict': judge(low, high, **allowed),
    'command': COMMAND,
  }


def _identities(tables):
  for name in dict.fromkeys(row['account'] for row in tables['identities']):
    rows = [row for row in tables['identities'] if row['account'] == name]
    worst = max(row['difference'] for row in rows)
    estimate = {'mean': worst, 'low': worst, 'high': worst}
    row = _claim(
      f'identities-{name}',
      name,
      '; '.join(row['statement'] for row in rows),
      'largest difference of both sides over the largest answer, float64; at '
      f'most {EXACT:g}',
      estimate,
      at_most=EXACT,
    )
    yield row | {'interval': None}


def _trained_is_tuned(config, result):
  for name in layers(result):
    yield _compare(
      f'trained-{name}',
      MEMORIES[name].account,
      f'{name}: a trained layer learns as well as its predicted inner step, '
      'and no better',
      f'loss of trained over that of tuned (or its mirror image) at '
      f'{config.num_demonstrations} '
      f'demonstrations, within {CLOSE["at_least"]} to {CLOSE["at_most"]}',
      result[name]['ratio'],
      **CLOSE,
    )
    yield _claim(
      f'aligned-{name}',
      MEMORIES[name].account,
      f'{name}: a trained layer depends on the query as its predicted inner '
      'step does',
      'cosine of the derivatives of both answers in the query (Model cos), at '
      f'least {ALIGNED}; mean'
      f'{_seeds(result[name]["cosine"], at_least=ALIGNED)}',
      harness.mean_interval(result[name]['cosine']),
      at_least=ALIGNED,
    )


def _orders(result, at):
  for better, worse, source, words in ORDERS:
    if not {better, worse} <= result.keys():
      continue
    yield _compare(
      f'{better}-beats-{worse}',
      source,
      words,
      'ratio of losses of trained layers at the training length, below 1',
      result[better]['loss'][TRAINED, :, at],
      result[worse]['loss'][TRAINED, :, at],
      at_most=1.0,
    )


def _of_tuned(result, at):
  tuned = {name: row['loss'][TUNED, :, at] for name, row in result.items()}
  if {'softmax', 'linear attention'} <= result.keys():
    trained = result['softmax']['loss'][TRAINED, :, at]
    yield _compare(
      'one-head-is-not-gd',
      OSWALD,
      'one softmax head falls short of one step of gradient descent',
      'ratio of losses of the trained head and the tuned step, above 1',
      trained,
      tuned['linear attention'],
      at_least=1.0,
    )
  if {'GD (2 steps)', 'GD++ (2 steps)'} <= result.keys():
    yield _compare(
      'gd-plus-plus-beats-gd',
      f'{OSWALD}, section 4',
      'two steps of GD++ learn better than two of gradient descent',
      'ratio of losses, tuned, below 1',
      tuned['GD++ (2 steps)'],
      tuned['GD (2 steps)'],
      at_most=1.0,
    )
  if 'least squares (mesa)' in result and len(result) > 1:
    best = _next_best(tuned)
    yield _claim(
      'least-squares-is-best',
      'von Oswald et al., arXiv:2309.05858',
      'ridge regression in the context learns best of all',
      f'loss of the next best, {best["name"]}, over its loss, tuned, above 1',
      best,
      at_least=1.0,
    )


def _next_best(tuned) -> dict[str, Any]:
  mesa = tuned['least squares (mesa)']
  others = [
    ratio(loss, mesa) | {'name': name}
    for name, loss in tuned.items()
    if loss is not mesa
  ]
  return min(others, key=lambda row: row['mean'])


def _elsewhere(config, result, at):
  largest, longest = config.scales[-1], config.lengths[-1]
  if 'linear attention' in result:
    scaled = result['linear attention']['scaled'][..., -1]
    yield _compare(
      'linear-scale',
      f'{OSWALD}, Fig. 2 (out of distribution)',
      'trained linear self-attention follows one step of gradient descent to '
      'other input scales',
      f'loss of trained over that of tuned with inputs times {largest:g}, '
      f'within {CLOSE["at_least"]} to {CLOSE["at_most"]}',
      scaled[TRAINED],
      scaled[TUNED],
      **CLOSE,
    )
  if 'delta rule' in result:
    yield _compare(
      'delta-scale',
      'stability of the delta rule, step size times |k|^2 <= 2 (Yang et al., '
      'arXiv:2406.06484)',
      'a trained delta rule does not carry over to larger inputs',
      f'its loss over that of predicting 0, inputs times {largest:g}, above 1',
      result['delta rule']['scaled'][TRAINED, :, -1],
      at_least=1.0,
    )
  for name in layers(result):
    loss = result[name]['loss'][TRAINED]
    yield _compare(
      f'length-{name}',
      'length generalisation, a question of this comparison',
      f'{name}: a trained layer gains from more demonstrations than in '
      'training',
      f'loss at {longest} over that at {config.num_demonstrations} '
      'demonstrations, below 1',
      loss[:, -1],
      loss[:, at],
      at_most=1.0,
    )
