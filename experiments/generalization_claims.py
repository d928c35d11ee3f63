"""The claims of `experiments.generalization`, and their verdicts."""

from typing import Any

import numpy as np

from experiments import approximation_statistics as statistics
from experiments.generalization_summary import (
  KINDS,
  Results,
  curves,
  interval,
  proportion,
  ratios,
  slope,
  trace_sizes,
  tried,
)

COMMAND = 'python -m experiments.generalization --workdir=out/generalization'
THEOREM = 'arXiv:2310.13220v2, Theorem 3.2'


def judge(config: Any, results: Results) -> list[dict[str, Any]]:
  """Judges every claim: a list of dicts, see `summary.json`."""
  claims = [
    *_rates(config, results),
    *_bound_claims(config, results),
    *_search_claims(config, results),
    *_width_claims(config, results),
    *_trace_claims(config, results),
  ]
  return [claim | {'command': COMMAND} for claim in claims]


def _claim(name, text, statistic, estimate, *, source=THEOREM, **limits):
  claim = statistics.claim(text, statistic, estimate, **limits)
  return {'id': f'generalization/{name}', 'source': source} | claim


def _rates(config: Any, results: Results) -> list[dict[str, Any]]:
  claims = []
  for kind, words in KINDS.items():
    supremum = curves(config, results, kind).supremum
    claims.append(
      _claim(
        f'rate_{kind}',
        f'the largest gap over the ball falls like N^-1/2: {words}',
        'slope of log mean supremum against log N; in [-0.6, -0.4]',
        slope(list(results.by_size), supremum),
        at_least=-0.6,
        at_most=-0.4,
      )
    )
  return claims


def _bound_claims(config: Any, results: Results) -> list[dict[str, Any]]:
  claims = []
  for kind, words in KINDS.items():
    found = curves(config, results, kind)
    share = np.mean(found.supremum / found.expected, axis=1)
    claims += [
      _claim(
        f'holds_{kind}',
        f'the bound with explicit constants holds for all weights: {words}',
        'share of samples whose largest gap exceeds it; at most '
        f'{config.delta:g}',
        proportion(ratios(config, results, kind)['total'] > 1),
        at_most=config.delta,
      ),
      _claim(
        f'complexity_term_{kind}',
        f'already its complexity term alone bounds the gap: {words}',
        'share of samples whose largest gap exceeds it; at most '
        f'{config.delta:g}',
        proportion(ratios(config, results, kind)['complexity_term'] > 1),
        at_most=config.delta,
      ),
      _claim(
        f'expected_{kind}',
        'the mean of the largest gap lies below w sqrt(E[|v|^2 k(k,k)] / N), '
        f'without factor 2: {words}',
        'their ratio, mean over N; at most 1',
        interval(share),
        at_most=1,
      ),
    ]
  claims.append(
    _claim(
      'complexity_tight',
      'the closed form of the complexity is tight up to sqrt(2), and above it',
      'Monte-Carlo complexity over closed form, mean over N; in [0.707, 1]',
      interval(_tightness(results)),
      at_least=2**-0.5,
      at_most=1,
    )
  )
  return claims


def _search_claims(config: Any, results: Results) -> list[dict[str, Any]]:
  gaps = tried(config, results)
  largest = max(float(x.max()) for x in gaps.values())
  rows = results.by_size.values()
  suprema = np.stack([x['features']['supremum'] for x in rows])
  searches = [np.stack([x['search'][name] for x in rows]) for name in gaps]
  excess = max(float(np.max(x / suprema)) for x in searches) - 1
  worst = searches[list(gaps).index('worst')]
  off = float(np.max(np.abs(worst / suprema - 1)))
  return [
    _fact(
      'search',
      'a search of the ball finds no weights that violate the bound',
      'largest gap of all weights tried over the bound; below 1',
      largest,
      largest < 1,
    ),
    _fact(
      'supremum',
      'no weights tried exceed the supremum in closed form, and the worst ones '
      'attain it',
      'largest relative excess, or distance of the worst; at most 1e-9',
      max(excess, off),
      max(excess, off) <= 1e-9,
    ),
  ]


def _tightness(results: Results) -> np.ndarray:
  """Monte-Carlo complexity over its closed form on the same samples `[S]`."""
  shares = []
  for found in results.by_size.values():
    bound = found['features']['bound'][:, : found['complexity'].shape[1]]
    shares.append(np.mean(found['complexity'] / bound, axis=1))
  return np.mean(shares, axis=0)


def _fact(name: str, text: str, statistic: str, value: float, holds: bool):
  return {
    'id': f'generalization/{name}',
    'source': THEOREM,
    'claim': text,
    'statistic': statistic,
    'value': value,
    'interval': None,
    'verdict': 'reproduced' if holds else 'not reproduced',
  }


def _width_claims(config: Any, results: Results) -> list[dict[str, Any]]:
  def growth(name):
    rows = [x[name].mean(axis=1) for x in results.by_width.values()]
    return slope(list(results.by_width), np.stack(rows, axis=1))

  at = f'at N = {config.width_demonstrations}'
  return [
    _claim(
      'width_frobenius',
      'the factor d of the output width can be removed: Frobenius ball',
      f'slope of log mean supremum against log d_v {at}; in [-0.1, 0.1]',
      growth('supremum'),
      at_least=-0.1,
      at_most=0.1,
    ),
    _claim(
      'width_spectral',
      'the factor d of the output width can be removed: spectral ball',
      f'slope of log mean supremum against log d_v {at}; in [-0.1, 0.1]',
      growth('spectral'),
      at_least=-0.1,
      at_most=0.1,
    ),
    _claim(
      'width_spectral_root',
      'in the spectral ball a factor sqrt(d_v) suffices in place of d',
      f'slope of log mean supremum against log d_v {at}; at most 0.5',
      growth('spectral'),
      at_most=0.5,
    ),
  ]


def _trace_claims(config: Any, results: Results) -> list[dict[str, Any]]:
  sizes = trace_sizes(config)

  def settles(name):
    return slope(sizes, np.exp(results.traces[name]['log_trace']))

  def falls(name):
    return slope(config.num_demonstrations, results.traces[name]['gap'])

  heavy = (
    f'normal keys of standard deviation {config.heavy_scale:g}, unbounded and '
    'so outside the assumptions'
  )
  statistic = 'slope of log(Tr K / N) against log N; in [-0.02, 0.02]'
  limits = {'at_least': -0.02, 'at_most': 0.02}
  return [
    _claim(
      'trace_bounded',
      'the trace grows like N: bounded keys',
      statistic,
      settles('bounded'),
      **limits,
    ),
    _claim(
      'trace_heavy',
      f'the trace grows like N: {heavy}',
      statistic,
      settles('heavy'),
      **limits,
    ),
    _claim(
      'rate_heavy',
      f'the largest gap falls like N^-1/2: {heavy}',
      'slope of log supremum against log N; in [-0.6, -0.4]',
      falls('heavy'),
      at_least=-0.6,
      at_most=-0.4,
    ),
  ]
