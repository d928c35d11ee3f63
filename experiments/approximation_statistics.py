"""Statistics of `experiments.approximation`: intervals over draws, verdicts.

A draw (of queries, keys, values and directions) is the unit of resampling. All
intervals are 95 % percentile intervals of one bootstrap over draws, the same
resamples for every number, so that comparisons are paired.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import claims

NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
  """A number and its 95 % interval over draws."""

  value: float
  low: float
  high: float


def bootstrap(
  statistic: Callable[[np.ndarray], np.ndarray], errors: np.ndarray
) -> Estimate:
  """Estimates a statistic of means over draws.

  Args:
    statistic: maps means `[B, ...]` to numbers `[B]`.
    errors: one row for each draw. Shape `[D, ...]`.

  Returns:
    The statistic of the means over all draws, with its interval.
  """
  means = np.tensordot(_resamples(errors.shape[0]), errors, axes=1)
  value = statistic(errors.mean(axis=0)[None])[0]
  low, high = np.percentile(statistic(means), [2.5, 97.5])
  return Estimate(float(value), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _resamples(num_draws: int) -> np.ndarray:
  """Weights of the draws in every resample."""
  generator = np.random.default_rng(0)
  probabilities = np.full(num_draws, 1 / num_draws)
  counts = generator.multinomial(num_draws, probabilities, NUM_RESAMPLES)
  return counts / num_draws


def mean(errors: np.ndarray) -> Estimate:
  """The mean over draws `[D]`, with its interval."""
  return bootstrap(lambda means: means, errors)


def geometric_mean(ratios: np.ndarray) -> Estimate:
  """The geometric mean over draws `[D]`, with its interval."""
  return bootstrap(np.exp, np.log(ratios))


def slope(num_features: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the least-squares slope of log error against log R."""
  x = np.log(np.asarray(num_features, float))
  x = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
  return lambda errors: np.log(errors) @ x


def spearman(errors: np.ndarray) -> np.ndarray:
  """Rank correlation of `[B, R]` errors with the number of features."""
  ranks = np.argsort(np.argsort(errors, axis=1), axis=1)
  size = errors.shape[1]
  difference = ranks - np.arange(size)[None]
  return 1 - 6 * np.sum(difference**2, axis=1) / (size * (size**2 - 1))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Correlation over all but the first axis."""
  a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
  a = a - a.mean(axis=1, keepdims=True)
  b = b - b.mean(axis=1, keepdims=True)
  return np.sum(a * b, 1) / np.sqrt(np.sum(a * a, 1) * np.sum(b * b, 1))


def split_by_size(
  exact: np.ndarray, error: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Mean error of the largest tenth of the entries, and of the rest.

  Args:
    exact: exact entries; they are ranked by absolute value. Shape `[D, ...]`.
    error: an error for each entry. The shape of `exact`.

  Returns:
    Two arrays `[D]`.
  """
  exact, error = exact.reshape(len(exact), -1), error.reshape(len(error), -1)
  order = np.argsort(-np.abs(exact), axis=1)
  ranked = np.take_along_axis(error, order, axis=1)
  size = -(-exact.shape[1] // 10)
  return ranked[:, :size].mean(axis=1), ranked[:, size:].mean(axis=1)


def claim(
  text: str,
  statistic: str,
  estimate: Estimate,
  *,
  at_least: float = -np.inf,
  at_most: float = np.inf,
) -> dict[str, Any]:
  """Judges a claim: the whole interval must lie inside the range.

  Args:
    text: what is claimed.
    statistic: what was measured, and the range that decides.
    estimate: the measured number with its interval.
    at_least: lower end of the range.
    at_most: upper end of the range.

  Returns:
    `{claim, statistic, value, interval, verdict}`; the verdict is 'reproduced'
    if the interval lies in the range, 'not reproduced' if it lies outside,
    else 'undecided'.
  """
  value, low, high = estimate
  verdict = claims.judge(low, high, at_least=at_least, at_most=at_most)
  return {
    'claim': text,
    'statistic': statistic,
    'value': value,
    'interval': [low, high],
    'verdict': verdict,
  }
