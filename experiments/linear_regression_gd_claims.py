"""Claims of `experiments.linear_regression_gd` on single layers."""

from collections.abc import Mapping
from typing import Any

from experiments.claims import judge

COMMAND = 'python -m experiments.linear_regression_gd --workdir=DIR'
SOURCE = 'von Oswald et al., arXiv:2212.07677'
EXACT = 1e-12
CLOSE = 0.002  # Excess of the loss.
ALIGNED = 0.999


def claim(name: str, text: str, statistic: str, row, **limits) -> Any:
  """A claim on a number, or on a mean with its interval."""
  source = limits.pop('source', SOURCE)
  spread = isinstance(row, Mapping)
  low, high = (row['low'], row['high']) if spread else (row, row)
  return {
    'id': f'linear-regression-gd-{name}',
    'source': source,
    'claim': text,
    'statistic': statistic,
    'value': row['mean'] if spread else row,
    'interval': [low, high] if spread else None,
    'verdict': judge(low, high, **limits),
    'command': COMMAND,
  }


def of_layer(result, numbers) -> list[Any]:
  best = numbers['learning_rate_gd']
  return [
    claim(
      'construction',
      'constructed layers do gradient descent, and GD++, from any W_0',
      'largest relative error over 1 and 4 layers and random problems, '
      f'float64; at most {EXACT:g}',
      result['residuals']['layers'],
      at_most=EXACT,
      source=f'{SOURCE}, proposition 1',
    ),
    claim(
      'loss',
      'a trained layer of linear self-attention reaches the loss of one step',
      'loss minus that of one step with the best step size on the same tasks, '
      f'mean over seeds; at most {CLOSE}',
      numbers['loss_trained_minus_gd'],
      at_most=CLOSE,
      source=f'{SOURCE}, figure 2',
    ),
    claim(
      'model-cos',
      'it learns the model that one step learns',
      'Model cos, mean over seeds; at least .999',
      numbers['model_cos'],
      at_least=ALIGNED,
      source=f'{SOURCE}, figure 2',
    ),
    claim(
      'step-size',
      'its step size is the best one',
      'learnt step size, mean over seeds; within 5 % of the best on the test '
      f'tasks, {best:.3f}',
      numbers['learning_rate_learnt'],
      at_least=0.95 * best,
      at_most=1.05 * best,
    ),
    claim(
      'interpolation',
      'the average of trained and constructed weights does as well as both',
      'loss halfway minus the larger loss of the two ends, mean over seeds; at '
      f'most {CLOSE}',
      numbers['loss_halfway_minus_larger_end'],
      at_most=CLOSE,
      source=f'{SOURCE}, figure 2',
    ),
    claim(
      'input-scale',
      'it generalises over the scale of inputs as gradient descent does',
      'largest relative deviation of its loss from that of one step, inputs '
      'scaled by .5 to 2, mean over seeds; at most .1',
      numbers['scale_deviation'],
      at_most=0.1,
      source=f'{SOURCE}, figure 3',
    ),
  ]


def of_softmax(numbers) -> list[Any]:
  if 'softmax_2_minus_gd' not in numbers:
    return []
  source = f'{SOURCE}, appendix A.9'
  return [
    claim(
      'softmax-heads',
      'softmax needs two heads',
      'loss with one head minus loss with two, mean over seeds; above .05',
      numbers['softmax_1_minus_2'],
      at_least=0.05,
      source=source,
    ),
    claim(
      'softmax-near',
      'softmax with two heads comes near gradient descent',
      'loss minus that of one step, mean over seeds; at most .03',
      numbers['softmax_2_minus_gd'],
      at_most=0.03,
      source=source,
    ),
    claim(
      'softmax-equal',
      'softmax with two heads is one step of gradient descent',
      'Model cos, mean over seeds; at least .999 as for the linear layer',
      numbers['model_cos_softmax_2'],
      at_least=ALIGNED,
      source='control',
    ),
  ]
