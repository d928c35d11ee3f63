"""`experiments.generalization`: the real thing, tiny, and its expectations."""

import itertools

import jax
import numpy as np
import pytest

from experiments import generalization as experiment, lab
from experiments.generalization import bound, distribution, trace, width
from tests import experiment_battery, oracles

TINY = experiment.Config.tiny()
tiny = experiment_battery.tiny_run(experiment)


def test_tiny_run_is_complete(tiny):
  experiment_battery.check_complete(experiment, *tiny)


def test_summary_has_what_cannot_fail_at_any_size(tiny):
  summary, folder = tiny
  found = {claim['id']: claim['verdict'] for claim in summary['claims']}
  assert found['generalization/largest_features'] == 'reproduced'
  assert found['generalization/largest_softmax'] == 'reproduced'
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 2 * 3 + 3 * 2


def _verdicts(claims):
  return {claim.id.split('/')[1]: claim.verdict for claim in claims}


@pytest.fixture(scope='module')
def measured():
  return bound.measure(TINY)


def test_a_violation_is_seen(measured):
  """Gaps a thousand times larger break every claim about the bound."""

  def larger(gap):
    return gap._replace(supremum=1e3 * gap.supremum)

  broken = measured._replace(
    gaps={
      size: {kind: larger(gap) for kind, gap in kinds.items()}
      for size, kinds in measured.gaps.items()
    }
  )
  found = _verdicts(bound.claims(TINY, broken))
  for kind in bound.KINDS:
    for name in ('holds', 'largest', 'complexity_term', 'expected'):
      assert found[f'{name}_{kind}'] == 'not reproduced'


def test_bounds_are_their_formulas(measured):
  """From the demonstrations, in NumPy."""
  settings, by_size, _ = distribution.drawn.__wrapped__(TINY)
  known = distribution.known(settings, TINY.width)
  for size, samples in by_size.items():
    signs = samples.signs / TINY.width**0.5
    values = samples.inputs @ np.swapaxes(known.setting.mixing, 1, 2)[:, None]
    squares = np.sum((values + signs) ** 2, axis=-1)
    growth = np.exp(np.sum(samples.inputs**2, axis=-1) / 2)
    gap = measured.gaps[size]['softmax']
    np.testing.assert_allclose(
      gap.complexity, 2 * np.sqrt(np.sum(squares * growth, -1)) / size
    )
    rho = known.softmax.value_bound[:, None]
    np.testing.assert_allclose(
      gap.published, rho * np.sqrt(np.sum(growth, -1)) / size
    )
    loss = known.softmax.loss_bound * 6 * np.sqrt(np.log(40) / (2 * size))
    for confidence in gap.confidence.T:
      np.testing.assert_allclose(confidence, loss)
    moment = known.softmax.second_moment
    for expected in gap.expected.T:
      np.testing.assert_allclose(expected, np.sqrt(moment / size))


def test_balls_differ_as_their_norms():
  for size, found in width.measure(TINY).items():
    frobenius, spectral = found['frobenius'], found['spectral']
    np.testing.assert_allclose(
      spectral.complexity / frobenius.complexity, size**0.5
    )
    ratio = spectral.supremum / frobenius.supremum
    assert np.all(ratio >= 1 - 1e-12)
    assert np.all(ratio <= size**0.5 + 1e-12)


def test_slopes_of_exact_powers():
  sizes = [16, 64, 256]
  rows = np.array([1.0, 2.0, 5.0])[:, None] * np.array(sizes)[None] ** -0.5
  np.testing.assert_allclose(bound.slope(sizes, rows), [-0.5] * 3, atol=1e-12)


# Exact expectations, by a grid over the whole cube.

NUM_GRID = 10


@pytest.fixture(scope='module')
def setting():
  rng = np.random.default_rng(0)
  mixing = rng.normal(size=(1, 3, distribution.KEY_DIM))
  mixing /= np.linalg.norm(mixing)
  return distribution.Setting(
    mixing, rng.normal(size=(1, 5, distribution.KEY_DIM))
  )


def grid():
  nodes, weights = np.polynomial.legendre.leggauss(NUM_GRID)
  points = np.array(list(itertools.product(nodes, repeat=distribution.KEY_DIM)))
  masses = np.array(
    list(itertools.product(weights / 2, repeat=distribution.KEY_DIM))
  )
  return points, np.prod(masses, axis=1)


def test_population_and_constants_of_random_features(setting):
  points, masses = grid()
  mixing, projection = setting.mixing[0], setting.projection[0]
  phi = np.stack([oracles.positive_features(projection, x) for x in points])
  mean = np.einsum('g,gv,gr->vr', masses, points @ mixing.T, phi)
  np.testing.assert_allclose(
    distribution.population(setting).weights[0], mean, rtol=1e-6, atol=1e-9
  )
  squares = np.sum(phi**2, axis=1)
  lengths = np.sum((points @ mixing.T) ** 2, axis=1) + 1
  known = distribution.feature_constants(setting)
  np.testing.assert_allclose(
    known.second_moment[0], masses @ (squares * lengths), rtol=1e-4
  )
  corners = np.array(
    list(itertools.product((-1, 0, 1), repeat=distribution.KEY_DIM))
  )
  reached = max(
    np.linalg.norm(oracles.positive_features(projection, x))
    for x in (*points, *corners.astype(float))
  )
  assert reached <= known.feature_bound[0] <= 3 * reached
  largest = np.max(np.linalg.norm(corners @ mixing.T, axis=1)) + 1
  assert largest <= known.value_bound[0]


def test_expectations_of_the_softmax_kernel(setting):
  """The closed form of the gap against a sum over the grid, in NumPy."""
  points, masses = grid()
  mixing = setting.mixing[0]
  growth = np.exp(np.sum(points**2, axis=1) / 2)
  lengths = np.sum((points @ mixing.T) ** 2, axis=1) + 1
  np.testing.assert_allclose(
    distribution.kernel_constants(setting).second_moment[0],
    masses @ (growth * lengths),
    rtol=1e-9,
  )
  rng = np.random.default_rng(1)
  inputs = rng.uniform(-1, 1, size=(4, distribution.KEY_DIM))
  signs = rng.choice([-1, 1], size=(4, 3)).astype(np.int8)
  values = inputs @ mixing.T + signs / 3**0.5
  means = np.einsum(
    'g,gv,gi->iv', masses, points @ mixing.T, np.exp(points @ inputs.T / 2)
  )
  # E over both arguments: a Gram matrix of 10^8 entries, coordinate-wise.
  nodes, weights = np.polynomial.legendre.leggauss(30)
  one = np.exp(np.outer(nodes, nodes) / 2) * np.outer(weights, weights) / 4
  square = np.sum(one) ** 3 * np.sum(one * np.outer(nodes, nodes))
  square -= 2 * np.mean(np.sum(means * values, axis=1))
  kernel = np.exp(inputs @ inputs.T / 2)
  square += np.sum((values @ values.T) * kernel) / 16
  known = jax.tree.map(
    lambda x: x[0], distribution.known(setting, mixing.shape[0])
  )
  gap = lab.compile_quickly(
    lambda *x: bound._kernel_gap(*x, delta=0.05).supremum
  )
  found = gap(known, inputs, signs)
  np.testing.assert_allclose(found, np.sqrt(square), rtol=1e-9)


def test_running_trace():
  keys = np.random.default_rng(2).normal(size=(8, distribution.KEY_DIM)) * 20
  found = lab.compile_quickly(
    lambda x: trace.running_log_trace(x, np.array([2, 8]))
  )(keys)
  logs = np.sum(keys**2, axis=1) / 2
  for size, value in zip((2, 8), found, strict=True):
    expected = np.logaddexp.reduce(logs[:size]) - np.log(size)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
