"""Statistics and text of `experiments.generalization`.

A seed (a distribution and a feature map) is the unit: intervals are 95 %
t-intervals over seeds of means over samples, slopes are fitted for each seed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from experiments import approximation_statistics as statistics
from experiments import generalization_data as data
from experiments import harness
from experiments.approximation_statistics import Estimate

LIGHT_SCALE = 0.5
KINDS = {'features': 'random features', 'softmax': 'exact softmax kernel'}


class Results(NamedTuple):
  """All measurements, NumPy arrays.

  Attributes:
    settings: the settings at the largest width. Axes `[S, ...]`.
    by_size: by N, what `measure_size` returns.
    by_width: by d_v, what `feature_gap` returns, `[S, D]`.
    traces: what `unsettled` returns, `[S, ...]`.
  """

  settings: data.Setting
  by_size: Mapping[int, Any]
  by_width: Mapping[int, Any]
  traces: Mapping[str, Any]


def scales(config: Any) -> dict[str, float]:
  """Standard deviations of keys by regime; 0 for uniform in the cube."""
  return {'bounded': 0.0, 'light': LIGHT_SCALE, 'heavy': config.heavy_scale}


def trace_sizes(config: Any) -> np.ndarray:
  """Numbers of keys of the running trace: powers of two."""
  top = int(np.log2(config.trace_demonstrations))
  return np.append(2 ** np.arange(4, top), config.trace_demonstrations)


class Curves(NamedTuple):
  """Means over samples by seed and N, `[S, n]`, of one map or kernel.

  Attributes:
    supremum: largest gap over the Frobenius ball.
    expected: bound of its expectation, `w sqrt(E[|v|^2 k] / N)`.
    complexity: complexity term of the bound with explicit constants.
    confidence: its confidence term.
    published: the published complexity term, without the factor d.
  """

  supremum: np.ndarray
  expected: np.ndarray
  complexity: np.ndarray
  confidence: np.ndarray
  published: np.ndarray


def constants(config: Any, results: Results, kind: str) -> data.Constants:
  """Constants of the settings at the width of the sweep over N."""
  settings = data.narrower(results.settings, config.width)
  constants_of = {
    'features': data.feature_constants,
    'softmax': data.kernel_constants,
  }[kind]
  return constants_of(settings)


def curves(config: Any, results: Results, kind: str) -> Curves:
  """All curves over N."""
  known = constants(config, results, kind)
  sizes = np.array(list(results.by_size), float)[None]

  def mean(name):
    rows = [x[kind][name].mean(axis=1) for x in results.by_size.values()]
    return np.stack(rows, axis=1)

  loss_bound = (known.value_bound * known.feature_bound)[:, None]
  rate = np.sqrt(np.log(2 / config.delta) / (2 * sizes))
  return Curves(
    supremum=mean('supremum'),
    expected=np.sqrt(known.second_moment[:, None] / sizes),
    complexity=2 * mean('bound'),
    confidence=6 * loss_bound * rate,
    published=known.value_bound[:, None] * mean('trace_term'),
  )


def complexity(results: Results) -> np.ndarray:
  """Monte-Carlo complexities by seed and N, `[S, n]`, random features."""
  rows = [x['complexity'].mean(axis=1) for x in results.by_size.values()]
  return np.stack(rows, axis=1)


def ratios(config: Any, results: Results, kind: str) -> dict[str, np.ndarray]:
  """Supremum over bound by N, seed and sample, `[n, S, D]`."""
  confidence = curves(config, results, kind).confidence.T[:, :, None]
  rows = [x[kind] for x in results.by_size.values()]
  supremum = np.stack([row['supremum'] for row in rows])
  bound = 2 * np.stack([row['bound'] for row in rows])
  return {
    'total': supremum / (bound + confidence),
    'complexity_term': supremum / bound,
  }


def tried(config: Any, results: Results) -> dict[str, np.ndarray]:
  """Largest gap of the weights tried, over the bound, `[n, S, D]` by kind."""
  confidence = curves(config, results, 'features').confidence.T[:, :, None]
  rows = results.by_size.values()
  total = confidence + 2 * np.stack([x['features']['bound'] for x in rows])
  names = next(iter(rows))['search']
  return {
    name: np.stack([x['search'][name] for x in rows]) / total for name in names
  }


def slope(sizes: Any, rows: np.ndarray) -> Estimate:
  """Slope of log rows `[S, n]` against log sizes: mean over seeds."""
  return interval(statistics.slope(sizes)(rows))


def interval(samples: np.ndarray) -> Estimate:
  """Mean over seeds with its t-interval."""
  return Estimate(*harness.mean_interval(samples).values())


def proportion(failures: np.ndarray) -> Estimate:
  """Share of failures, with the interval of Clopper and Pearson."""
  count, size = int(np.sum(failures)), failures.size
  low = scipy.special.betaincinv(count, size - count + 1, 0.025)
  high = scipy.special.betaincinv(count + 1, size - count, 0.975)
  return Estimate(
    count / size,
    float(low) if count else 0.0,
    float(high) if count < size else 1.0,
  )


def summarise(
  config: Any, results: Results, claims: list[dict[str, Any]]
) -> dict[str, Any]:
  """All numbers that decide, with the claims."""
  gaps = tried(config, results)
  num_samples = config.num_seeds * config.num_samples * len(results.by_size)
  summary: dict[str, Any] = {
    'num_seeds': config.num_seeds,
    'claims': claims,
    'search': {
      'num_samples': num_samples,
      'num_weights': num_samples * (config.num_weights + 2),
      'largest_gap_over_bound': {k: float(x.max()) for k, x in gaps.items()},
    },
    'supremum_over_bound_largest': {
      kind: {
        k: float(x.max()) for k, x in ratios(config, results, kind).items()
      }
      for kind in KINDS
    },
  }
  summary['conclusion'] = _conclusion(config, summary)
  return summary


def metrics(config: Any, results: Results) -> list[dict[str, Any]]:
  """One row for each map or kernel and N, and for each width."""
  rows: list[dict[str, Any]] = []
  for kind in KINDS:
    found = curves(config, results, kind)
    for i, size in enumerate(results.by_size):
      row: dict[str, Any] = {'kind': kind, 'num_demonstrations': size}
      row |= {name: x[:, i] for name, x in found._asdict().items()}
      rows.append(row)
  for width, found in results.by_width.items():
    row = {'kind': 'features', 'd_v': width}
    row |= {name: x.mean(axis=1) for name, x in found.items()}
    rows.append(row)
  return rows


def _conclusion(config: Any, summary: Mapping[str, Any]) -> str:
  by_name = {x['id'].split('/')[1]: x for x in summary['claims']}

  def number(name):
    claim = by_name[name]
    low, high = claim['interval']
    return f'{claim["value"]:.2f} [{low:.2f}, {high:.2f}]'

  search = summary['search']
  return (
    'The largest gap between the representation loss and its mean over N '
    'bounded demonstrations scales with N to the power '
    f'{number("rate_features")} for random features and '
    f'{number("rate_softmax")} for the exact softmax kernel. Among '
    f'{search["num_weights"]} weights on {search["num_samples"]} '
    'samples, the worst of each sample included, the largest gap was '
    f'{max(search["largest_gap_over_bound"].values()):.3f} of the bound with '
    'explicit constants. With the output width d_v it scales to the power '
    f'{number("width_frobenius")} in the Frobenius ball and '
    f'{number("width_spectral")} in the spectral ball, where a factor d would '
    'be a power of 1. For normal keys of standard deviation '
    f'{config.heavy_scale:g}, whose k(k, k) has an infinite mean, Tr K / N '
    f'scales to the power {number("trace_heavy")} instead of 0, and the gap to '
    f'the power {number("rate_heavy")}. The bound is about the representation '
    'loss, not about the error of a label.'
  )


def text(summary: Mapping[str, Any]) -> str:
  """The claims as a table, and the conclusion."""
  rows = [
    {
      'claim': x['claim'],
      'value': float(x['value']),
      '95 % interval': ''
      if x['interval'] is None
      else '[{:.3g}, {:.3g}]'.format(*x['interval']),
      'verdict': x['verdict'],
    }
    for x in summary['claims']
  ]
  return f'{harness.table(rows)}\n\n{summary["conclusion"]}'
