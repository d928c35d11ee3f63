"""One estimate with its interval, and the few ways to get one.

The unit of every interval is an independent run (a seed, a draw, a prompt): a
row of samples holds one number for each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
  """A number and its 95 % interval; without one, both ends are the number."""

  value: float
  low: float
  high: float

  @property
  def interval(self) -> list[float] | None:
    """Both ends, or None for a number without an interval."""
    exact = self.low == self.value == self.high
    return None if exact else [self.low, self.high]

  def to_dict(self) -> dict[str, float]:
    """As `summary.json` holds it: `mean`, `low` and `high`."""
    return {'mean': self.value, 'low': self.low, 'high': self.high}

  def __format__(self, spec: str) -> str:
    """All numbers in one format, such as `{estimate:.2f}`."""
    spec = spec or '.3g'
    if self.interval is None:
      return format(self.value, spec)
    low, high = format(self.low, spec), format(self.high, spec)
    return f'{format(self.value, spec)} [{low}, {high}]'

  def __str__(self) -> str:
    return format(self)


def exactly(value: Any) -> Estimate:
  """A number that has no interval, such as a largest residual."""
  return Estimate(*[float(value)] * 3)


def mean(samples: Any, *, num_comparisons: int = 1) -> Estimate:
  """The mean over independent runs with its 95 % t-interval.

  `num_comparisons` widens the interval (Bonferroni), so that so many hold
  together with 95 %.
  """
  samples = np.asarray(samples, np.float64)
  if samples.ndim != 1 or samples.size < 2:
    raise ValueError(
      f'samples has shape {list(samples.shape)}; expected at least two '
      'numbers, one for each run.'
    )
  centre = float(np.mean(samples))
  error = float(np.std(samples, ddof=1)) / samples.size**0.5
  level = 1 - 0.025 / num_comparisons
  half = float(scipy.special.stdtrit(samples.size - 1, level)) * error
  return Estimate(centre, centre - half, centre + half)


def geometric_mean(samples: Any, *, num_comparisons: int = 1) -> Estimate:
  """The geometric mean over runs, with the t-interval of the mean log.

  As `mean`; infinite, with ends that are no numbers, if a run diverged.
  """
  samples = np.asarray(samples, np.float64)
  if not np.all(np.isfinite(samples)):
    return Estimate(np.inf, np.nan, np.nan)
  logs = mean(np.log(samples), num_comparisons=num_comparisons)
  return Estimate(*(float(np.exp(x)) for x in logs))


def paired_ratio(
  samples: Any, reference: Any, *, num_comparisons: int = 1
) -> Estimate:
  """The geometric mean of `samples / reference`, paired by run."""
  ratios = np.asarray(samples, np.float64) / np.asarray(reference, np.float64)
  return geometric_mean(ratios, num_comparisons=num_comparisons)


def proportion(successes: Any) -> Estimate:
  """The share of true entries, with the interval of Clopper and Pearson."""
  successes = np.asarray(successes)
  k, n = int(np.sum(successes)), successes.size
  low = float(scipy.special.betaincinv(k, n - k + 1, 0.025))
  high = float(scipy.special.betaincinv(k + 1, n - k, 0.975))
  return Estimate(k / n, low if k else 0.0, high if k < n else 1.0)


def median(samples: Any) -> Estimate:
  """The median of samples `[S]`, with a percentile interval of resamples."""
  samples = np.ravel(samples)
  return resampled(lambda rows: np.median(samples[rows], axis=-1), samples.size)


def resampled(
  statistic: Callable[[np.ndarray], Any],
  num_runs: int,
  *,
  num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
  """A statistic of runs, with a percentile interval of resampled ones.

  Args:
    statistic: maps numbers of runs `[..., S]` to values `[...]`.
    num_runs: how many there are, `S`.
    num_resamples: how often they are drawn.
  """
  shape = num_resamples, num_runs
  draws = np.random.default_rng(0).integers(num_runs, size=shape)
  low, high = np.quantile(statistic(draws), [0.025, 0.975])
  value = statistic(np.arange(num_runs))
  return Estimate(float(value), float(low), float(high))


def bootstrap(
  statistic: Callable[[np.ndarray], np.ndarray], samples: np.ndarray
) -> Estimate:
  """A statistic of means over runs, with a percentile interval.

  It maps means `[B, ...]` to numbers `[B]`; samples `[D, ...]` are a row for
  each run. All calls use the same resamples: comparisons are paired.
  """
  means = np.tensordot(_resamples(samples.shape[0]), samples, axes=1)
  value = statistic(samples.mean(axis=0)[None])[0]
  low, high = np.percentile(statistic(means), [2.5, 97.5])
  return Estimate(float(value), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _resamples(num_runs: int) -> np.ndarray:
  """Weights of the runs in every resample."""
  generator = np.random.default_rng(0)
  probabilities = np.full(num_runs, 1 / num_runs)
  counts = generator.multinomial(num_runs, probabilities, NUM_RESAMPLES)
  return counts / num_runs


def log_slope(sizes: Sequence[float]) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the least-squares slope of log rows `[..., n]` on log sizes."""
  x = np.log(np.asarray(sizes, float))
  x = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
  return lambda rows: np.log(rows) @ x


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Pearson's correlation of each row; 0 if one of the two is constant."""
  a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
  size = np.sqrt(np.sum(a * a, axis=-1) * np.sum(b * b, axis=-1))
  return np.sum(a * b, axis=-1) / np.where(size > 0, size, 1)


def rank_correlation(a: Any, b: Any) -> np.ndarray:
  """Spearman's correlation of rows `[..., n]`, ties shared; 0 if constant."""
  a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
  a, b = (scipy.stats.rankdata(x, axis=-1) for x in (a, b))
  return correlation(a, b)
