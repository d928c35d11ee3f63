"""Can the factor d of the output width be removed?"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import lab
from experiments.generalization import bound, distribution
from experiments.lab import Config, figures as drawing
from iclcl_jax import bounds

BALLS = {'frobenius': bounds.FROBENIUS, 'spectral': bounds.SPECTRAL}


# By width, then by ball, random features.
Results = Mapping[int, Mapping[str, bound.Gap]]


@lab.float64_on_host()
def measure(config: Config) -> Results:
  """The same seeds at every width: the first rows of B, the first signs."""
  settings, _, samples = distribution.drawn(config)

  def both(*sample):
    return {
      name: bound.feature_gap(*sample, delta=config.delta, ball=ball)
      for name, ball in BALLS.items()
    }

  return {
    width: distribution.over_samples(both)(
      distribution.known(settings, width),
      samples._replace(signs=samples.signs[..., :width]),
    )
    for width in config.widths
  }


def _rows(results: Results, ball: str, field: str) -> np.ndarray:
  """Means over samples by seed and width. Shape `[S, n]`."""
  found = [getattr(x[ball], field).mean(axis=1) for x in results.values()]
  return np.stack(found, axis=1)


def _growth(results: Results, ball: str) -> lab.Estimate:
  return bound.slope(list(results), _rows(results, ball, 'supremum'))


def claims(config: Config, results: Results) -> list[lab.Claim]:
  frobenius, spectral = (_growth(results, ball) for ball in BALLS)
  slope = f"""slope of log mean supremum against log d_v at N =
      {config.width_demonstrations}"""
  return bound.statements(
    f"""
    width_frobenius [THEOREM] the factor d of the output width can be removed:
      Frobenius ball | {slope}
    width_spectral [THEOREM] the factor d of the output width can be removed:
      spectral ball | {slope}
    width_spectral_root [THEOREM] in the spectral ball a factor sqrt(d_v)
      suffices in place of d | {slope}
    """,
    {
      'width_frobenius': lab.within(-0.1, 0.1, frobenius),
      'width_spectral': lab.within(-0.1, 0.1, spectral),
      'width_spectral_root': lab.at_most(0.5, spectral),
    },
  )


def metrics(config: Config, results: Results) -> list[dict[str, Any]]:
  return [
    {'kind': 'features', 'd_v': width, 'ball': ball}
    | {x: getattr(found, x).mean(axis=1) for x in ('supremum', 'complexity')}
    for width, balls in results.items()
    for ball, found in balls.items()
  ]


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axis = drawing.subplots(figsize=(8, 5.6))
  widths = list(results)
  draw = functools.partial(bound.band, axis, widths)
  limit = _rows(results, 'frobenius', 'complexity')
  factor = limit[:, :1] * np.asarray(widths)[None]
  draw(factor, drawing.ORANGE, '^--', 'bound with a factor d = d_v')
  for ball, colour, lines, text in (
    ('spectral', drawing.GREEN, ('v--', 'D-'), 'factor sqrt(d_v)'),
    ('frobenius', drawing.BLUE, ('s--', 'o-'), 'no factor'),
  ):
    label = f'bound, {ball} ball: {text}'
    draw(_rows(results, ball, 'complexity'), colour, lines[0], label)
    colour = drawing.BLACK if ball == 'frobenius' else colour
    label = f'largest gap, {ball} ball'
    draw(_rows(results, ball, 'supremum'), colour, lines[1], label)
  drawing.log_axes(axis, widths)
  axis.set_xlabel('output width d_v')
  axis.set_ylabel('representation loss, ball of radius 1')
  axis.set_title(f'N = {config.width_demonstrations} demonstrations')
  figure.legend(loc='outside lower center', ncols=2)
  frobenius, spectral = (f'{_growth(results, x).value:.2f}' for x in BALLS)
  caption = f"""Largest gap at N = {config.width_demonstrations} against the
    width of the values, whose mean square norm stays the same: in the Frobenius
    ball (black) it scales with d_v to the power {frobenius}, in the spectral
    ball (green) {spectral}; their bounds with 0 (blue) and 1/2 (green), the
    published factor d, here times the Frobenius bound, with 1 (orange).
    Complexity terms with explicit constants, random features. Means over
    {config.num_samples} samples for each of {config.num_seeds} seeds, with 95 %
    t-intervals."""
  return [lab.Figure('width', figure, caption)]
