"""Claims of `experiments.linear_regression_gd` on its two other tasks."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments.linear_regression_gd_claims import CLOSE, EXACT, SOURCE, claim


def of_identities(residuals: Mapping[str, float]) -> list[Any]:
  """Constructions beyond the layer itself."""
  return [
    claim(
      'copy-construction',
      'a constructed copy layer, then constructed layers, do gradient descent '
      'on inputs and labels that come as separate tokens',
      f'largest relative error, float64; at most {EXACT:g}',
      residuals['copy'],
      at_most=EXACT,
      source=f'{SOURCE}, section 5',
    ),
    claim(
      'kernel-construction',
      'the constructed layer on features of a network is one step of kernel '
      'regression',
      f'largest relative error, float64; at most {EXACT:g}',
      residuals['kernel'],
      at_most=EXACT,
      source=f'{SOURCE}, proposition 2',
    ),
  ]


def of_parts(result: Mapping[str, Any]) -> list[Any]:
  """Claims of the parts that were run."""
  rows = []
  if 'sine' in result:
    rows += of_sine(result['sine'])
  if 'alternating' in result:
    rows += of_alternating(result['alternating'])
  return rows


def of_sine(row: Mapping[str, Any]) -> list[Any]:
  """A network with attention against a step on its last layer."""
  source = f'{SOURCE}, figure 5'
  ends = {k: row[f'loss_{k}'][:, -1] for k in ('attention', 'descent')}
  return [
    claim(
      'sine-loss',
      'attention on a network does as well on sine waves as one step on the '
      'last layer of a network',
      'loss minus that of the step, each with its own trained network, mean '
      f'over seeds; at most {CLOSE}',
      harness.mean_interval(ends['attention'] - ends['descent']),
      at_most=CLOSE,
      source=source,
    ),
    claim(
      'sine-learns',
      'attention on a network learns sine waves in context',
      'loss over that of predicting 0, mean over seeds; at most .2',
      harness.mean_interval(ends['attention'] / row['loss_zero']),
      at_most=0.2,
      source=source,
    ),
    claim(
      'sine-predictions',
      'both predict the same',
      'mean absolute difference of their predictions minus that of steps of '
      'two seeds, mean over seeds; at most 0',
      harness.mean_interval(row['preds_diff'] - row['preds_diff_of_seeds']),
      at_most=0.0,
      source=source,
    ),
  ]


def of_alternating(row: Mapping[str, Any]) -> list[Any]:
  """Separate tokens: a softmax layer, then a linear one."""
  source = f'{SOURCE}, section 5'
  return [
    claim(
      'alternating-loss',
      'two trained layers on separate tokens reach the loss of one step',
      'loss minus that of one step with the best step size on the same tasks, '
      f'mean over seeds; at most {CLOSE}',
      harness.mean_interval(row['loss'][:, -1] - row['loss_gd']),
      at_most=CLOSE,
      source=source,
    ),
    claim(
      'alternating-copy',
      'the first of them joins inputs and their labels',
      'mean attention of an input to its own label, or of a label to its own '
      'input, whichever is larger; mean over seeds; at least .5',
      harness.mean_interval(_own(row)),
      at_least=0.5,
      source=source,
    ),
  ]


def _own(row: Mapping[str, Any]) -> np.ndarray:
  """Attention of inputs to their labels or of labels to theirs: the larger."""
  index = 2 * np.arange(row['copied'].shape[1] // 2)
  forward = np.mean(row['copied'][:, index, index + 1], axis=1)
  backward = np.mean(row['copied'][:, index + 1, index], axis=1)
  return np.maximum(forward, backward)


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
  """What a summary keeps of these parts."""
  residuals = result['residuals']
  found: dict[str, Any] = {
    'copy_residual_float64': residuals['copy'],
    'kernel_residual_float64': residuals['kernel'],
  }
  if 'sine' in result:
    sine = result['sine']
    numbers = {
      'loss_attention': sine['loss_attention'][:, -1],
      'loss_descent': sine['loss_descent'][:, -1],
      'preds_diff': sine['preds_diff'],
      'preds_diff_of_seeds': sine['preds_diff_of_seeds'],
      'mean_prediction': sine['mean_prediction'],
    }
    found['sine'] = {k: harness.mean_interval(v) for k, v in numbers.items()}
    found['sine']['loss_zero_predictor'] = sine['loss_zero']
  if 'alternating' in result:
    tokens = result['alternating']
    found['alternating'] = {
      'loss': harness.mean_interval(tokens['loss'][:, -1]),
      'attention_within_pairs': harness.mean_interval(_own(tokens)),
      'loss_by_seed': tokens['loss'][:, -1],
      'loss_gd': tokens['loss_gd'],
      'loss_closed_form': tokens['loss_closed_form'],
      'loss_zero_predictor': tokens['loss_zero'],
    }
  return found


def text(result: Mapping[str, Any]) -> str:
  """Sentences on the parts that were run."""
  found = []
  if 'sine' in result:
    sine = result['sine']
    found.append(
      'On sine waves attention on a network ends at '
      f'{np.mean(sine["loss_attention"][:, -1]):.4f}, one step on the last '
      f'layer of a network at {np.mean(sine["loss_descent"][:, -1]):.4f} '
      f'(predicting 0: {sine["loss_zero"]:.4f}).'
    )
  if 'alternating' in result:
    tokens = result['alternating']
    found.append(
      'On separate tokens a softmax layer and a linear one end at '
      f'{np.mean(tokens["loss"][:, -1]):.4f}, one step at '
      f'{tokens["loss_gd"]:.4f}; one token of a pair '
      f'gives {np.mean(_own(tokens)):.2f} of its attention in the '
      'first layer to the other.'
    )
  return ' '.join(found)
