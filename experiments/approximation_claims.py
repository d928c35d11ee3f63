"""The papers' claims about `experiments.approximation`, and their verdicts."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import approximation_statistics as statistics
from experiments.approximation_measure import Method
from experiments.approximation_statistics import Estimate
from experiments.approximation_summary import Measurements, words

LOW_LEVEL = 0.1  # Relative error that counts as low.
LARGEST_JUDGED_NORM = 2.0  # Mean |q + k|^2 / sqrt(d_k) of visible variances.


def falling_claims(
  data: Measurements, method: Method, num_features: Sequence[int]
) -> list[dict[str, Any]]:
  """Do the errors fall with R, how fast, and how low?"""
  claims = []
  for condition in data.conditions.values():
    for quantity in (
      'attention_mse',
      'attention_mae',
      'output_mse',
      'output_mae',
    ):
      errors = data.curve(method, condition, quantity, num_features)
      rank = statistics.bootstrap(statistics.spearman, errors)
      claims.append(
        _claim(
          f'{words(quantity)} falls with the number of features',
          'Spearman correlation of mean error and R; at most -0.9',
          condition,
          rank,
          at_most=-0.9,
        )
      )
      if quantity.endswith('mse'):
        fit = statistics.bootstrap(statistics.slope(num_features), errors)
        claims.append(
          _claim(
            f'{words(quantity)} falls like 1/R',
            'slope of log mean error against log R; in [-1.15, -0.85]',
            condition,
            fit,
            at_least=-1.15,
            at_most=-0.85,
          )
        )
    for name in ('attention', 'output'):
      errors = data.curve(method, condition, f'{name}_relative', num_features)
      claims.append(
        _claim(
          f'{name} error falls to a low level',
          f'relative Frobenius error at {num_features[-1]} features; at most '
          f'{LOW_LEVEL:g}',
          condition,
          statistics.mean(errors[:, -1]),
          at_most=LOW_LEVEL,
        )
      )
  return claims


def heatmap_claims(
  data: Measurements, method: Method, size: int, num_features: Sequence[int]
) -> list[dict[str, Any]]:
  """Do estimated matrices look like the exact ones, better with more R?"""
  claims = []
  for condition in data.conditions.values():
    tokens = condition.keys.shape[1]
    one = functools.partial(_one, data, method, condition, size)

    for name in ('attention', 'output'):
      claims.append(
        _claim(
          f'{name} entries fit, {tokens} tokens',
          f'Pearson correlation of exact and estimated entries at R = {size}; '
          'at least 0.9',
          condition,
          statistics.mean(one(f'{name}_pearson')),
          at_least=0.9,
        )
      )
      for kind, word in (('relative', 'relative'), ('mae', 'absolute')):
        if (name, kind) == ('output', 'relative'):
          continue  # Outputs pass through zero.
        excess = one(f'{name}_largest_tenth_{kind}') - one(
          f'{name}_rest_{kind}'
        )
        claims.append(
          _claim(
            f'large {name} entries fit less well ({word}), {tokens} tokens',
            f'mean {word} error of the largest tenth minus that of the rest '
            f'at R = {size}; above 0',
            condition,
            statistics.mean(excess),
            at_least=0,
          )
        )
      errors = data.curve(method, condition, f'{name}_frobenius', num_features)
      claims.append(
        _claim(
          f'{name} heatmap gets better with R, {tokens} tokens',
          'largest ratio of successive mean Frobenius errors, R = '
          f'{", ".join(map(str, num_features))}; below 1',
          condition,
          statistics.bootstrap(_largest_ratio, errors),
          at_most=1,
        )
      )
  return claims


def closed_form_claims(
  ratios: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
  data: Measurements,
) -> list[dict[str, Any]]:
  """Does the closed form predict what is measured, where that can be seen?

  At larger norms the variance is carried by draws rarer than one in the number
  of draws: the ratio is reported, and decides nothing.
  """
  claims = []
  for method, by_condition in ratios.items():
    for name, quantities in by_condition.items():
      condition = data.conditions[name]
      if condition.squared_norms().mean() > LARGEST_JUDGED_NORM:
        continue
      claims += [
        _claim(
          f'{words(quantity)} equals its closed form, {method}',
          'measured over predicted, geometric mean over R; in [0.85, 1.15]',
          condition,
          estimate,
          at_least=0.85,
          at_most=1.15,
        )
        for quantity, estimate in quantities.items()
      ]
  return claims


def trained_claims(losses: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
  """Is the trained layer softmax attention in disguise?"""
  return [
    statistics.claim(
      f'trained layer works as well with {name.replace("_", " ")}: trained',
      'held-out loss over that with the trained directions, geometric mean '
      'over layers; at most 1.1',
      statistics.geometric_mean(losses[name] / losses['trained_directions']),
      at_most=1.1,
    )
    | {'condition': 'trained'}
    for name in ('fresh_directions', 'exact_softmax')
  ]


def identified(claim: Mapping[str, Any], source: str) -> dict[str, Any]:
  """Adds what `experiments.claims` asks for: id, source and command."""
  slug = re.sub('[^a-z0-9]+', '-', str(claim['claim']).lower()).strip('-')
  return {
    'id': f'approximation-{slug}',
    'source': source,
    **claim,
    'command': 'python -m experiments.approximation --workdir=DIR',
  }


def _one(data, method, condition, size, quantity) -> np.ndarray:
  return data.curve(method, condition, quantity, [size])[:, 0]


def _claim(text, statistic, condition, estimate, **limits):
  result = statistics.claim(
    f'{text}: {condition.name}', statistic, estimate, **limits
  )
  return result | {'condition': condition.name}


def _largest_ratio(errors: np.ndarray) -> np.ndarray:
  return np.max(errors[:, 1:] / errors[:, :-1], axis=1)
