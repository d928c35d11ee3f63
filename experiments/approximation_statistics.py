"""The old home of estimates, until their last user has moved."""

from typing import Any, NamedTuple

import numpy as np

from experiments import claims


class Estimate(NamedTuple):
  """A number and its 95 % interval over draws."""

  value: float
  low: float
  high: float


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
