"""Figures of `experiments.generalization`.

Colours are those of Okabe and Ito; every series differs in marker or line style
as well.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special

from experiments import generalization_summary as summary_of
from experiments import harness
from experiments.equivalence_figures import (
  BLACK,
  BLUE,
  GREEN,
  GREY,
  ORANGE,
  style,
)

SEARCHED = {
  'worst': ('worst weights, closed form', BLACK, 'o'),
  'one_step': ('weights of one gradient step', BLUE, 's'),
  'rank_one': ('best of random rank one', ORANGE, '^'),
  'gaussian': ('best of Gaussian', GREEN, 'v'),
}


def draw(
  config: Any,
  results: summary_of.Results,
  summary: Mapping[str, Any],
  workdir: harness.Workdir,
) -> list[dict[str, str]]:
  """Writes all figures; returns `[{'file', 'caption'}]`."""
  listed = []
  makers = {'gap': gap, 'width': width, 'search': search, 'trace': trace}
  for name, make in makers.items():
    with style():
      figure, caption = make(config, results, summary)
      harness.save_figure(workdir, name, figure)
    listed.append({'file': f'figures/{name}.png', 'caption': caption})
  return listed


def _band(axis, x, rows, color, line, label) -> None:
  """Mean over seeds of rows `[S, n]` with its 95 % t-interval."""
  rows = np.asarray(rows)
  mean = rows.mean(axis=0)
  quantile = scipy.special.stdtrit(rows.shape[0] - 1, 0.975)
  half = quantile * rows.std(axis=0, ddof=1) / rows.shape[0] ** 0.5
  axis.plot(x, mean, line, color=color, label=label, markersize=9)
  axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, lw=0)


def _powers(summary: Mapping[str, Any]) -> dict[str, str]:
  """Values of the claims by name, for captions."""
  return {x['id'].split('/')[1]: f'{x["value"]:.2f}' for x in summary['claims']}


def _log_axes(axis, x) -> None:
  axis.set_xscale('log', base=2)
  axis.set_yscale('log')
  axis.set_xticks(list(x), [str(t) for t in x])
  axis.minorticks_off()


def gap(config: Any, results: summary_of.Results, summary: Mapping[str, Any]):
  """Largest gap against N, with every bound."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.6), sharey=True)
  sizes = list(results.by_size)
  verdicts = {x['id'].split('/')[1]: x for x in summary['claims']}
  for axis, (kind, words) in zip(axes, summary_of.KINDS.items(), strict=True):
    found = summary_of.curves(config, results, kind)
    total = found.complexity + found.confidence
    published = config.width * found.published
    _band(axis, sizes, total, GREY, 'D-', 'bound, both terms')
    _band(axis, sizes, published, ORANGE, '^--', 'published form, with d = d_v')
    _band(axis, sizes, found.published, ORANGE, 'v:', 'published form, d = 1')
    _band(axis, sizes, found.complexity, BLUE, 's-', 'bound, complexity term')
    if kind == 'features':
      monte_carlo = 2 * summary_of.complexity(results)
      label = '2 x complexity, Monte Carlo'
      _band(axis, sizes, monte_carlo, BLACK, 'x:', label)
    _band(axis, sizes, found.supremum, BLACK, 'o-', 'largest gap, measured')
    _band(axis, sizes, found.expected, GREEN, '+--', 'bound of the mean gap')
    _log_axes(axis, sizes)
    value, (low, high) = (
      verdicts[f'rate_{kind}'][name] for name in ('value', 'interval')
    )
    axis.set_title(
      f'{words}: slope {value:.2f} [{low:.2f}, {high:.2f}]', fontsize=13
    )
    axis.set_xlabel('number of demonstrations N')
  axes[0].set_ylabel('representation loss, ball of radius 1')
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3
  )
  return figure, (
    'Largest gap between the representation loss and its mean over N '
    'demonstrations, over all weights of Frobenius norm at most 1, in closed '
    'form with exact expectations (black), and what bounds it: its expectation '
    'by w sqrt(E[|v|^2 k(k,k)]/N) (green), the complexity term of the bound '
    'with explicit constants (blue; black crosses: twice the Rademacher '
    'complexity by Monte Carlo), both terms together (grey), '
    'and the published complexity term with its constant set to 1 (orange). '
    f'Means over {config.num_samples} samples for each of {config.num_seeds} '
    'distributions and feature maps; bands are 95 % t-intervals over these. '
    f'Values have width {config.width}, keys are uniform in a cube.'
  )


def width(config: Any, results: summary_of.Results, summary: Mapping[str, Any]):
  """Largest gap against the output width, for both balls."""
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(8.2, 6))
  widths = list(results.by_width)
  power = _powers(summary)

  def mean(name):
    rows = [x[name].mean(axis=1) for x in results.by_width.values()]
    return np.stack(rows, axis=1)

  rank = np.sqrt(np.minimum(widths, config.width_demonstrations))
  bound = 2 * mean('bound')
  _band(
    axis,
    widths,
    bound[:, :1] * np.asarray(widths)[None],
    ORANGE,
    '^--',
    'bound with a factor d = d_v',
  )
  label = 'bound, spectral ball: factor sqrt(d_v)'
  _band(axis, widths, bound * rank[None], GREEN, 'v--', label)
  label = 'largest gap, spectral ball'
  _band(axis, widths, mean('spectral'), GREEN, 'D-', label)
  _band(axis, widths, bound, BLUE, 's--', 'bound, Frobenius ball: no factor')
  label = 'largest gap, Frobenius ball'
  _band(axis, widths, mean('supremum'), BLACK, 'o-', label)
  _log_axes(axis, widths)
  axis.set_xlabel('output width d_v')
  axis.set_ylabel('representation loss, ball of radius 1')
  axis.set_title(f'N = {config.width_demonstrations} demonstrations')
  figure.legend(loc='outside lower center', ncols=2)
  return figure, (
    f'Largest gap at N = {config.width_demonstrations} against the width of '
    'the values, whose mean square norm stays the same: in the Frobenius ball '
    f'(black) it scales with d_v to the power {power["width_frobenius"]}, in '
    f'the ball of the spectral norm (green) {power["width_spectral"]}. Their '
    'bounds scale with 0 (blue) and 1/2 (green); the published factor d, here '
    'times the bound of the Frobenius ball, with 1 (orange). '
    'Bounds are complexity terms with explicit constants, random features. '
    f'Means over {config.num_samples} samples for each of {config.num_seeds} '
    'seeds, with 95 % t-intervals.'
  )


def search(
  config: Any, results: summary_of.Results, summary: Mapping[str, Any]
):
  """Every gap that was found, relative to the bound."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.4), sharey=True)
  sizes = list(results.by_size)
  rows = results.by_size.values()
  complexity_term = 2 * np.stack([x['features']['bound'] for x in rows])
  total = summary_of.tried(config, results)
  for axis, title in zip(
    axes, ('bound, both terms', 'complexity term alone'), strict=True
  ):
    for name, (label, color, marker) in SEARCHED.items():
      found = total[name]
      if axis is axes[1]:
        found = np.stack([x['search'][name] for x in rows]) / complexity_term
      found = found.reshape(len(sizes), -1)
      axis.plot(
        sizes, found.max(axis=1), f'{marker}-', color=color, label=label
      )
    axis.axhline(1, color=GREY, linestyle='--')
    words = 'equal to the term' if axis is axes[1] else 'violation above here'
    axis.text(sizes[-1], 1.12, words, color='#555555', ha='right')
    _log_axes(axis, sizes)
    axis.set_ylim(top=2)
    axis.set_xlabel('number of demonstrations N')
    axis.set_title(f'relative to the {title}')
  axes[0].set_ylabel('largest gap found / bound')
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4
  )
  tried = summary['search']
  return figure, (
    'Search for a violation of the bound: largest ratio of gap to bound over '
    f'all {config.num_seeds * config.num_samples} samples at each N, random '
    'features. On each sample: the worst weights of the ball in closed form, '
    'the weights that one gradient step on its demonstrations finds, and the '
    f'best of {config.num_weights} random weights, half of them of rank one. '
    f'{tried["num_weights"]} weights in all. Right: the same relative to the '
    'complexity term alone, which bounds the gap only together with the '
    'confidence term.'
  )


def trace(config: Any, results: summary_of.Results, summary: Mapping[str, Any]):
  """Running trace and gap where the mean of the kernel is infinite."""
  import matplotlib.pyplot as plt

  power = _powers(summary)
  figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.4))
  names = {
    'bounded': ('uniform in a cube', BLUE, '-', 's'),
    'light': (f'normal, s = {summary_of.LIGHT_SCALE:g}', GREEN, '--', 'D'),
    'heavy': (f'normal, s = {config.heavy_scale:g}', ORANGE, ':', 'o'),
  }
  sizes = summary_of.trace_sizes(config)
  for name, (label, color, line, marker) in names.items():
    logs = results.traces[name]['log_trace'] / np.log(10)
    axes[0].plot(sizes, logs.T, line, color=color, linewidth=0.8, alpha=0.5)
    middle = np.median(logs, axis=0)
    axes[0].plot(sizes, middle, marker, ls=line, color=color, label=label)
    gaps = results.traces[name]['gap']
    axes[1].plot(
      config.num_demonstrations, gaps.T, line, color=color, lw=0.8, alpha=0.5
    )
    axes[1].plot(
      config.num_demonstrations,
      np.median(gaps, axis=0),
      marker,
      ls=line,
      color=color,
    )
  axes[0].set_xscale('log', base=2)
  axes[0].set_xlabel('number of demonstrations N')
  axes[0].set_ylabel('log10 of Tr K / N')
  axes[0].set_title('mean of k(k, k) over the demonstrations')
  _log_axes(axes[1], config.num_demonstrations)
  axes[1].set_xlabel('number of demonstrations N')
  axes[1].set_ylabel('largest gap, Frobenius ball of radius 1')
  axes[1].set_title('largest gap')
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3
  )
  return figure, (
    'Exact softmax kernel, '
    f'{config.num_traces} runs (thin) and their median (markers). For bounded '
    'keys, and for normal keys of small standard deviation s, k(k, k) has a '
    'finite mean. For normal keys with 2 s^2 >= sqrt(d_k) its mean is infinite '
    'and the bound says nothing: Tr K / N scales with N to the power '
    f'{power["trace_heavy"]}, and the largest gap (right; values are '
    f'independent signs) {power["rate_heavy"]}, in jumps made by single keys.'
  )
