"""Claims, figure and conclusion of `experiments.meta_optimizer`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness, meta_optimizer_measure
from experiments.claims import judge
from experiments.equivalence_figures import BLACK, BLUE, ORANGE

COMMAND = 'python -m experiments.meta_optimizer --workdir=DIR'
DAI = 'Dai et al., arXiv:2212.10559'
CONTROL = 'control'  # Of a metric: no paper claims it.
CASES = meta_optimizer_measure.CASES
NULL_CASES = {
  'noise': 'unrelated updates (noise)',
  'forgetting': 'a common loss of the zero-shot output (forgetting)',
}
METRICS = tuple(meta_optimizer_measure.METRICS)
EXACT, NEGLIGIBLE = 1e-12, 0.02


def _row(name, source, text, statistic, samples, at_least, at_most) -> Any:
  """A claim about one number, or about the mean of several."""
  samples = np.atleast_1d(samples)
  found = {'mean': float(samples[0])}
  interval = None
  low = high = found['mean']
  if samples.size > 1:
    found = harness.mean_interval(samples)
    low, high = found['low'], found['high']
    interval = [low, high]
  return {
    'id': f'meta-optimizer-{name}',
    'source': source,
    'claim': text,
    'statistic': statistic,
    'value': found['mean'],
    'interval': interval,
    'verdict': judge(low, high, at_least=at_least, at_most=at_most),
    'command': COMMAND,
  }


def claims(exact: Any, scores: Any) -> list[dict[str, Any]]:
  """Judges the identities, and each metric where it should be near 0.

  Args:
    exact: errors of the identities.
    scores: metrics by name, kind and case.

  Returns:
    The claims.
  """
  error = f'largest relative error, float64; at most {EXACT:g}'
  identities = (
    ('dual-form', DAI, 'demonstrations add to the weights of linear attention'),
    ('finetuning', DAI, 'finetuned keys and values add to those weights'),
    ('mix', 'derived here', 'softmax attention is a convex mix of two parts'),
    ('momentum', DAI, 'momentum attention is a recurrence'),
  )
  rows = [
    _row(n, source, text, error, exact[n.replace('-', '_')], -1e300, EXACT)
    for n, source, text in identities
  ]
  naive = exact['naive_sum']
  rows.append(
    _row(
      'sum',
      f'{DAI}, with the softmax',
      'softmax attention is the SUM of zero-shot part and demonstrations',
      f'{error} (largest over random problems)',
      naive,
      -1e300,
      EXACT,
    )
  )
  for name in METRICS:
    for index, (case, words) in enumerate(NULL_CASES.items()):
      text = f'null is 0: {name} of {words}'
      statistic = (
        f'mean over queries and repetitions; within {NEGLIGIBLE:g} of 0'
      )
      slug = f'{name} {case}'.lower().replace(',', '').replace(' ', '-')
      found = scores[name]['observed'][:, index]
      rows.append(
        _row(slug, CONTROL, text, statistic, found, -NEGLIGIBLE, NEGLIGIBLE)
      )
  found = scores['Rec2FTP']
  rows.append(
    _row(
      'recovery',
      CONTROL,
      'null is 0: Rec2FTP of answers that have nothing to do with each other',
      'percent, mean over repetitions; at most 5',
      found['observed'],
      -1e300,
      5,
    )
  )
  return rows


def nulls(scores: Any) -> dict[str, Any]:
  """Means and intervals by metric, case and kind."""
  result: dict[str, Any] = {
    name: {
      case: {
        kind: harness.mean_interval(values[:, index])
        for kind, values in scores[name].items()
      }
      for index, case in enumerate(CASES)
    }
    for name in METRICS
  }
  result['Rec2FTP'] = {
    kind: harness.mean_interval(values)
    for kind, values in scores['Rec2FTP'].items()
  }
  return result


def summarise(config: Any, exact: Any, scores: Any) -> dict[str, Any]:
  """Puts together what `summary.json` holds."""
  found = nulls(scores)
  mean = {
    name: [found[name][case]['observed']['mean'] for case in CASES]
    for name in METRICS
  }
  recovery = found['Rec2FTP']
  return {
    'dual_form_residual_float64': float(exact['dual_form']),
    'momentum_recurrence_residual_float64': float(exact['momentum']),
    'finetuning_residual_float64': float(exact['finetuning']),
    'mix_residual_float64': float(exact['mix']),
    'naive_sum_error': float(exact['naive_sum']),
    'nulls': found,
    'claims': claims(exact, scores),
    'figures': [
      {
        'file': 'figures/metrics.png',
        'caption': 'Six metrics on synthetic activations of '
        f'{config.num_queries} queries, means over {config.num_seeds} '
        'repetitions with 95 % intervals (mostly smaller than the marks), '
        'next to the same metric with norm-matched random updates and with '
        'updates of other queries. Noise: unrelated updates. Forgetting: both '
        'halve the zero-shot output. Shared: one update for all queries. Own: '
        'an update of each query. Only the last is evidence about a query. For '
        'SimAM and Kendall random updates keep the zero-shot part.',
      }
    ],
    'conclusion': (
      f'On unrelated updates SimAOU is {mean["SimAOU"][0]:.3f}, its '
      f'normalised form {mean["SimAOU, normalised"][0]:.3f}; when both sides '
      f'merely forget half of the zero-shot output SimAOU is '
      f'{mean["SimAOU"][1]:.2f}, the partial cosine '
      f'{mean["SimAOU, partial"][1]:.3f}. SimAM is {mean["SimAM"][0]:.2f} on '
      f'unrelated updates, SimAM-delta {mean["SimAM-delta"][0]:.3f}, Kendall '
      f'{mean["Kendall"][0]:.2f}. Answers that have nothing to do with each '
      f'other have a Rec2FTP of {recovery["observed"]["mean"]:.0f} %, a chance '
      f'level of {recovery["chance"]["mean"]:.0f} %. An update that all '
      f'queries share gives SimAOU {mean["SimAOU"][2]:.2f}, and '
      f'{found["SimAOU"]["shared"]["permuted"]["mean"]:.2f} with permuted '
      'queries: the random null does not catch that, the permuted one does. '
      'Neither catches forgetting (SimAOU with permuted queries: '
      f'{found["SimAOU"]["forgetting"]["permuted"]["mean"]:.2f}), which only '
      'the partial cosine removes.'
    ),
  }


def metrics(scores: Any) -> list[dict[str, Any]]:
  """One row for each metric, case and repetition."""
  return [
    {'metric': name, 'case': case, 'repetition': seed}
    | {kind: float(x[seed, index]) for kind, x in scores[name].items()}
    for name in METRICS
    for index, case in enumerate(CASES)
    for seed in range(len(scores[name]['observed']))
  ]


def figure(scores: Any) -> Any:
  """Observed values and their nulls, one panel for each metric."""
  import matplotlib.pyplot as plt

  found = nulls(scores)
  kinds = (
    ('observed', 'o', BLACK, -0.2),
    ('random', '^', BLUE, 0),
    ('permuted', 's', ORANGE, 0.2),
  )
  result, axes = plt.subplots(2, 3, figsize=(12, 6.6), sharex=True, sharey=True)
  for axis, name in zip(axes.flat, METRICS, strict=True):
    for kind, marker, color, shift in kinds:
      rows = [found[name][case][kind] for case in CASES]
      mean = np.array([row['mean'] for row in rows])
      half = np.array([row['high'] for row in rows]) - mean
      axis.errorbar(
        np.arange(len(CASES)) + shift,
        mean,
        half,
        fmt=marker,
        color=color,
        mfc='white',
        ms=8,
        capsize=3,
        label=kind,
      )
    axis.axhline(0, color='grey', lw=0.8)
    axis.set_title(name)
    axis.set_xticks(range(len(CASES)), CASES, rotation=20)
  for axis in axes[:, 0]:
    axis.set_ylabel('mean over queries')
  handles = axes[0, 0].get_legend_handles_labels()
  result.legend(*handles, loc='outside upper center', ncols=3)
  return result


def text(summary: Mapping[str, Any]) -> str:
  """Formats the summary for a person."""
  rows = [
    {'claim': x['claim'], 'value': f'{x["value"]:.3g}', 'verdict': x['verdict']}
    for x in summary['claims']
  ]
  return f'{harness.table(rows)}\n\n{summary["conclusion"]}'
