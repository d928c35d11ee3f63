"""How does the largest gap fall with N, and does every bound hold?"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.generalization import distribution
from experiments.generalization.distribution import Known
from experiments.lab import Config, figures as drawing, statistics
from iclcl_jax import bounds, kernels
from iclcl_jax.types import Array, Float

RADIUS = 1.0
KINDS = {'features': 'random features', 'softmax': 'exact softmax kernel'}
RATE = -0.6, -0.4  # Slopes that count as -1/2.
THEOREM = 'arXiv:2310.13220v2, Theorem 3.2'


class Gap(NamedTuple):
  """The largest gap and what bounds it, of one sample or of all `[S, D]`."""

  supremum: Float[Array, '']  # Largest gap over the Frobenius ball.
  expected: Float[Array, '']  # Bound of its mean, `w sqrt(E[|v|^2 k] / N)`.
  complexity: Float[Array, '']  # Its term of the bound, explicit constants.
  confidence: Float[Array, '']  # Its confidence term.
  published: Float[Array, '']  # Published complexity, without the factor d.

  @property
  def total(self) -> Float[Array, '']:
    """The bound."""
    return self.complexity + self.confidence


class Results(NamedTuple):
  """By number of demonstrations."""

  gaps: Mapping[int, Mapping[str, Gap]]  # By map or kernel, one of `KINDS`.
  # Estimates of the Rademacher complexity, random features, on the first
  # samples of each seed. Shape `[S, _]`.
  monte_carlo: Mapping[int, np.ndarray]


def measure(config: Config) -> Results:
  return Results(gaps(config), _complexities(config))


@lab.once
@lab.float64_on_host()
def gaps(config: Config) -> Mapping[int, Mapping[str, Gap]]:
  """The largest gaps of all samples, by N and by map or kernel."""

  def of_sample(*sample):
    return {
      'features': feature_gap(*sample, delta=config.delta),
      'softmax': _kernel_gap(*sample, delta=config.delta),
    }

  return distribution.at_all_sizes(config, of_sample)


def feature_gap(
  known: Known, inputs, signs, *, delta: float, ball: Any = bounds.FROBENIUS
) -> Gap:
  """Supremum and bounds for one sample, random features."""
  phi, values = distribution.read(known.setting, inputs, signs)
  sample = bounds.mean_embedding(phi, inputs, values)
  supremum = bounds.gap_supremum(
    phi, known.population, sample, radius=RADIUS, ball=ball
  )
  constants = known.features
  return _gap(phi, inputs, values, constants, supremum.value, delta, ball)


def _kernel_gap(known: Known, inputs, signs, *, delta: float) -> Gap:
  """Supremum and bounds for one sample, exact softmax kernel."""
  kernel = kernels.ExponentialKernel()
  _, values = distribution.read(known.setting, inputs, signs)
  mean_at = functools.partial(distribution.kernel_mean, known.setting.mixing)
  means = jax.vmap(mean_at)(inputs)
  cross = jnp.mean(jnp.sum(values * means, axis=1))
  square = distribution.kernel_mean_square() - 2 * cross
  square = square + kernel_norm(kernel, inputs, values) ** 2
  supremum = RADIUS * jnp.sqrt(square)
  return _gap(kernel, inputs, values, known.softmax, supremum, delta)


def kernel_norm(kernel, inputs, values) -> Float[Array, '']:
  sample = bounds.mean_embedding(kernel, inputs, values)
  nothing = bounds.mean_embedding(kernel, inputs[:1], 0 * values[:1])
  return bounds.gap_supremum(kernel, nothing, sample, radius=1.0).value


def _gap(
  phi, inputs, values, constants, supremum, delta, ball=bounds.FROBENIUS
) -> Gap:
  """The supremum beside all bounds, and the published order of magnitude."""
  options, most = {'radius': RADIUS, 'delta': delta}, constants.loss_bound
  bound = bounds.generalization_bound(
    phi, inputs, values, loss_bound=most, ball=ball, **options
  )
  # The mean supremum, from the moments of the distribution alone.
  known = RADIUS * jnp.sqrt(constants.second_moment / len(inputs))
  # As published, its hidden constants set to 1: to compare growth with.
  log_trace = jax.nn.logsumexp(bounds.log_diagonal(phi, inputs))
  published = RADIUS * constants.value_bound * jnp.exp(log_trace / 2)
  ours = bound.complexity.value, bound.confidence.value
  complexities = known, *ours, published / len(inputs)
  return Gap(supremum, *complexities)


@lab.float64_on_host()
def _complexities(config: Config) -> dict[int, np.ndarray]:
  """Monte-Carlo estimates of the empirical Rademacher complexity."""
  key = jax.random.key(config.seed)

  def complexity(known, inputs, signs):
    phi, values = distribution.read(known.setting, inputs, signs)
    draws = bounds.rademacher_draws(
      key, phi, inputs, values, radius=RADIUS, num_draws=config.num_signs
    )
    return jnp.mean(draws.value)

  few = config.num_sign_samples
  return distribution.at_all_sizes(config, complexity, few)


def curves(found: Mapping[int, Mapping[str, Gap]], kind: str) -> Gap:
  """Means over samples, by seed and N. Shapes `[S, n]`."""
  rows = [x[kind] for x in found.values()]
  return jax.tree.map(lambda *x: np.stack([y.mean(1) for y in x], 1), *rows)


def slope(sizes: Any, rows: Any) -> lab.Estimate:
  """Slope of log rows `[S, n]` against log sizes: mean over seeds."""
  return statistics.mean(statistics.log_slope(sizes)(rows))


def statements(text: str, found: Mapping[str, lab.Found]) -> list[lab.Claim]:
  """Claims about Theorem 3.2, which every text calls `THEOREM`."""
  text = text.replace('THEOREM', THEOREM)
  return lab.statements('generalization/', text, found)


def _shares(results: Results, kind: str) -> dict[str, np.ndarray]:
  """Supremum over bound by N, seed and sample. Shapes `[n, S, D]`."""
  rows = [x[kind] for x in results.gaps.values()]
  return {
    'total': np.stack([x.supremum / x.total for x in rows]),
    'complexity_term': np.stack([x.supremum / x.complexity for x in rows]),
  }


def _tightness(results: Results) -> np.ndarray:
  """Monte-Carlo complexity over its closed form on the same samples `[S]`."""
  shares = []
  for size, found in results.monte_carlo.items():
    closed_form = results.gaps[size]['features'].complexity / 2
    shares.append(np.mean(found / closed_form[:, : found.shape[1]], axis=1))
  return np.mean(shares, axis=0)


def claims(config: Config, results: Results) -> lab.Claims:
  for kind, words in KINDS.items():
    found, shares = curves(results.gaps, kind), _shares(results, kind)
    fall = slope(list(results.gaps), found.supremum)
    exceeds = [statistics.proportion(x > 1) for x in shares.values()]
    ratio = np.mean(found.supremum / found.expected, axis=1)
    yield from statements(
      f"""
      rate_{kind} [THEOREM] the largest gap over the ball falls like N^-1/2:
        {words} | slope of log mean supremum against log N
      holds_{kind} [THEOREM] the bound with explicit constants holds for all
        weights: {words} | share of samples whose largest gap exceeds it
      largest_{kind} [THEOREM] no weights, in any sample, exceed the bound:
        {words} | the largest gap over the bound
      complexity_term_{kind} [THEOREM] the complexity term of the bound alone
        bounds the gap: {words} | share of samples whose largest gap exceeds it
      expected_{kind} [THEOREM] the mean of the largest gap lies below
        w sqrt(E[|v|^2 k(k,k)] / N), without factor 2: {words} | ratio of
        the two, mean over N
      """,
      {
        f'rate_{kind}': lab.within(*RATE, fall),
        f'holds_{kind}': lab.at_most(config.delta, exceeds[0]),
        f'largest_{kind}': lab.at_most(1, np.max(shares['total'])),
        f'complexity_term_{kind}': lab.at_most(config.delta, exceeds[1]),
        f'expected_{kind}': lab.at_most(1, ratio),
      },
    )
  yield from statements(
    """complexity_tight [THEOREM] the closed form of the complexity is tight up
    to sqrt(2), and above it | Monte-Carlo complexity over closed form, mean
    over N""",
    {'complexity_tight': lab.within(2**-0.5, 1, _tightness(results))},
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'num_seeds': config.num_seeds,
    'supremum_over_bound_largest': {
      kind: {name: x.max() for name, x in _shares(results, kind).items()}
      for kind in KINDS
    },
  }


def metrics(config: Config, results: Results) -> lab.Metrics:
  sizes = list(results.gaps)
  for kind in KINDS:
    yield from lab.tidy(
      {'kind': kind},
      {k: x.T for k, x in curves(results.gaps, kind)._asdict().items()},
      num_demonstrations=sizes,
    )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(1, 2, figsize=(11, 5.2), sharey=True)
  sizes = list(results.gaps)
  for axis, (kind, words) in zip(axes, KINDS.items(), strict=True):
    found = curves(results.gaps, kind)
    draw = functools.partial(band, axis, sizes)
    draw(found.total, drawing.GREY, 'D-', 'bound, both terms')
    label = 'published form, with d = d_v'
    draw(config.width * found.published, drawing.ORANGE, '^--', label)
    draw(found.published, drawing.ORANGE, 'v:', 'published form, d = 1')
    draw(found.complexity, drawing.BLUE, 's-', 'bound, complexity term')
    if kind == 'features':
      estimated = [x.mean(axis=1) for x in results.monte_carlo.values()]
      label = '2 x complexity, Monte Carlo'
      draw(2 * np.stack(estimated, axis=1), drawing.BLACK, 'x:', label)
    draw(found.supremum, drawing.BLACK, 'o-', 'largest gap, measured')
    draw(found.expected, drawing.GREEN, '+--', 'bound of the mean gap')
    drawing.log_axes(axis, sizes)
    axis.set_title(f'{words}: slope {slope(sizes, found.supremum):.2f}')
    axis.set_xlabel('number of demonstrations N')
  axes[0].set_ylabel('representation loss, ball of radius 1')
  drawing.legend(axes[0], 3)
  caption = f"""Largest gap between the representation loss and its mean over N
    demonstrations, over all weights of Frobenius norm at most 1, in closed form
    (black), and what bounds it: its expectation by w sqrt(E[|v|^2 k(k,k)]/N)
    (green), the complexity term with explicit constants (blue; black crosses:
    twice the Rademacher complexity by Monte Carlo), with the confidence term
    (grey), and the published complexity term with its constant set to 1
    (orange). Means over {config.num_samples} samples for each of
    {config.num_seeds} seeds with 95 % t-intervals over these. Values have width
    {config.width}, keys are uniform in a cube."""
  return [lab.Figure('gap', figure, caption)]


def band(axis, x: Any, rows: Any, colour: str, line: str, label: str) -> None:
  """Mean over seeds of rows `[S, n]` with its 95 % t-interval."""
  look = {'color': colour, 'marker': line[0], 'ls': line[1:], 'label': label}
  drawing.means(axis, x, rows, **look)
