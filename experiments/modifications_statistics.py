"""Statistics of `experiments.modifications`: paired ratios, rates, verdicts.

A run (seed) is the unit: within it all layers share B, data, features and
initialisation. Intervals are t-intervals of the mean log ratio over runs.
"""

from typing import Any, NamedTuple

import numpy as np

from experiments.modifications_evaluation import Results

MIN_RUNS = 10  # Fewer runs decide nothing.
MARGIN = 0.9, 1.1  # Ratios in between are comparable.
DIVERGED = 'diverged'
# The measures, and what they are.
MEASURES = {
  'early': 'training loss, first epochs',
  'held_out': 'held-out prompts',
  'longer': 'more demonstrations',
  'scaled': 'larger inputs',
  'other_task': 'another B',
}


class Ratio(NamedTuple):
  """A geometric mean over runs with its interval."""

  value: float
  low: float
  high: float

  def __str__(self):
    return f'{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]'


class Measured(NamedTuple):
  """Losses of a panel relative to that of predicting 0.

  Attributes:
    fixed: by measure, at the fixed rate. Shapes `[S, V]`.
    tuned: the same at the rate chosen for each layer.
    chosen: which rate that is. Shape `[S, V]`.
    curves: training loss, by epoch and rate. Shape `[E, S, V, L]`.
  """

  fixed: dict[str, np.ndarray]
  tuned: dict[str, np.ndarray]
  chosen: np.ndarray
  curves: np.ndarray


def measured(config: Any, results: Results) -> Measured:
  """Divides losses by that of predicting 0 and chooses learning rates.

  Args:
    config: settings of the experiment.
    results: of one panel.

  Returns:
    The relative losses; infinite where training diverged.
  """
  losses, zero = _finite(results.losses), results.zero
  early = slice(config.early_epochs)
  values = {'early': _mean_ratio(losses[early], zero[early])}
  for name, loss in results.tests.items():
    values[name] = _finite(loss) / results.test_zero[name][:, None, None]
  late = slice(-config.early_epochs, None)
  chosen = choose_rates(_mean_ratio(losses[late], zero[late]))
  fixed = config.rate_factors.index(1.0)
  return Measured(
    fixed={name: value[..., fixed] for name, value in values.items()},
    tuned={
      name: np.take_along_axis(value, chosen[..., None], axis=2)[..., 0]
      for name, value in values.items()
    },
    chosen=chosen,
    curves=losses / zero[:, :, None, None],
  )


def _finite(losses: np.ndarray) -> np.ndarray:
  losses = np.asarray(losses, np.float64)
  return np.where(np.isfinite(losses), losses, np.inf)


def _mean_ratio(losses: np.ndarray, zero: np.ndarray) -> np.ndarray:
  return losses.mean(axis=0) / zero.mean(axis=0)[:, None, None]


def choose_rates(losses: np.ndarray) -> np.ndarray:
  """Chooses each layer's rate in each run by the other runs alone.

  Args:
    losses: training losses `[S, V, L]`, infinite where training diverged.

  Returns:
    For each run and layer the rate of lowest geometric mean over the other
    runs. Shape `[S, V]`.
  """
  logs = np.log(losses)
  others = ~np.eye(logs.shape[0], dtype=bool)
  means = [logs[mask].mean(axis=0) for mask in others]
  return np.argmin(np.array(means), axis=2)


def ratio(
  losses: np.ndarray, reference: np.ndarray, num_comparisons: int = 1
) -> Ratio:
  """Geometric mean of paired ratios, with an interval.

  Args:
    losses: one loss for each run. Shape `[S]`.
    reference: those of the layer to compare with. Shape `[S]`.
    num_comparisons: widens the interval (Bonferroni): all of so many hold
      together with 95 %.

  Returns:
    The ratio, infinite without an interval if a run diverged.
  """
  if not np.all(np.isfinite(losses)):
    return Ratio(np.inf, np.nan, np.nan)
  return geometric_mean(losses / reference, num_comparisons)


def geometric_mean(values: np.ndarray, num_comparisons: int = 1) -> Ratio:
  """Geometric mean over runs `[S]`, with a t-interval of the mean log."""
  import scipy.special

  if not np.all(np.isfinite(values)):
    return Ratio(np.inf, np.nan, np.nan)
  logs = np.log(values)
  error = np.std(logs, ddof=1) / logs.size**0.5
  level = 1 - 0.025 / num_comparisons
  half = float(scipy.special.stdtrit(logs.size - 1, level)) * error
  mean = logs.mean()
  return Ratio(*(float(np.exp(x)) for x in (mean, mean - half, mean + half)))


def verdict(value: Ratio, num_runs: int) -> str:
  """Better, poorer, comparable or inconclusive, in this order.

  Args:
    value: ratio to another layer's loss.
    num_runs: how many runs it comes from.

  Returns:
    'better' if the interval lies below 1, 'poorer' above 1, with 'slightly '
    before it if also within the margin; else 'comparable' within the margin;
    'diverged' if a run did; else, or with too few runs, 'inconclusive'.
  """
  if not np.isfinite(value.value):
    return DIVERGED
  if num_runs < MIN_RUNS:
    return 'inconclusive'
  close = MARGIN[0] <= value.low and value.high <= MARGIN[1]
  if value.high < 1:
    return 'slightly better' if close else 'better'
  if value.low > 1:
    return 'slightly poorer' if close else 'poorer'
  return 'comparable' if close else 'inconclusive'


def smooth(curves: np.ndarray, width: int = 5) -> np.ndarray:
  """Means over the last `width` epochs (fewer at the start), along axis 0."""
  sums = np.cumsum(curves, axis=0)
  late = sums.copy()
  late[width:] -= sums[:-width]
  counts = np.minimum(np.arange(1, len(curves) + 1), width)
  return late / counts.reshape(-1, *[1] * (curves.ndim - 1))


def band(curves: np.ndarray) -> np.ndarray:
  """Geometric mean and interval over runs, by epoch: `[E, S] -> [3, E]`."""
  return np.array([geometric_mean(row) for row in curves]).T
