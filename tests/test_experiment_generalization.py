"""The experiment on the bound at tiny size, and its exact expectations."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from experiments import approximation_statistics as statistics
from experiments import generalization as experiment
from experiments import generalization_claims as claims_of
from experiments import generalization_data as data
from experiments import generalization_measure as measure
from experiments import generalization_summary as summary_of
from experiments import harness
from tests import oracles

TINY = experiment.Config(
  num_seeds=5,
  num_samples=3,
  num_demonstrations=(2, 4, 8),
  width=2,
  widths=(1, 2, 4),
  width_demonstrations=8,
  num_features=6,
  num_signs=4,
  num_sign_samples=2,
  num_weights=4,
  num_traces=5,
  trace_demonstrations=64,
)
CLAIM = {
  'id',
  'source',
  'claim',
  'statistic',
  'value',
  'interval',
  'verdict',
  'command',
}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """Summary, folder, and the measurements behind the summary."""
  workdir = tmp_path_factory.mktemp('tiny')
  seen = []
  judge = claims_of.judge
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      claims_of,
      'judge',
      lambda config, results: seen.append(results) or judge(config, results),
    )
    summary = experiment.run(TINY, workdir)
  return summary, workdir, seen[0]


def verdicts(summary):
  return by_name(summary['claims'])


def by_name(claims):
  return {x['id'].split('/')[1]: x['verdict'] for x in claims}


def test_claims_are_complete(tiny):
  summary, workdir, _ = tiny
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert all(set(claim) == CLAIM for claim in summary['claims'])
  names = [claim['id'] for claim in summary['claims']]
  assert len(set(names)) == len(names)
  assert set(verdicts(summary).values()) <= {
    'reproduced',
    'not reproduced',
    'undecided',
  }
  assert summary['search']['num_samples'] == 5 * 3 * 3
  assert summary['search']['num_weights'] == 5 * 3 * 3 * (4 + 2)


def test_what_cannot_fail_at_any_size(tiny):
  found = verdicts(tiny[0])
  assert found['supremum'] == 'reproduced'
  assert found['search'] == 'reproduced'


def test_outputs_are_complete(tiny):
  summary, workdir, _ = tiny
  names = sorted(x.name for x in (workdir / 'figures').glob('*'))
  assert names == sorted(
    f'{name}.{suffix}'
    for name in ('gap', 'width', 'search', 'trace')
    for suffix in ('png', 'svg')
  )
  for figure in summary['figures']:
    assert (workdir / figure['file']).exists()
    assert figure['caption'].endswith('.')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 2 * 3 + 3
  assert len(json.loads(lines[0])['supremum']) == 5


def test_a_violation_is_seen(tiny):
  """Gaps a thousand times larger break every claim about the bound."""
  results = tiny[2]

  def larger(found):
    gaps = {
      kind: found[kind] | {'supremum': 1e3 * found[kind]['supremum']}
      for kind in summary_of.KINDS
    }
    tried = {name: 1e3 * x for name, x in found['search'].items()}
    return found | gaps | {'search': tried}

  broken = results._replace(
    by_size={size: larger(x) for size, x in results.by_size.items()}
  )
  found = by_name(claims_of.judge(TINY, broken))
  for kind in summary_of.KINDS:
    for name in ('holds', 'complexity_term', 'expected'):
      assert found[f'{name}_{kind}'] == 'not reproduced'
  assert found['search'] == 'not reproduced'


def test_weights_beyond_the_supremum_are_seen(tiny):
  results = tiny[2]

  def larger(found):
    search = found['search']
    return found | {'search': search | {'gaussian': 1e3 * search['gaussian']}}

  broken = results._replace(
    by_size={size: larger(x) for size, x in results.by_size.items()}
  )
  found = by_name(claims_of.judge(TINY, broken))
  assert found['supremum'] == 'not reproduced'


def test_slopes_of_exact_powers():
  sizes = [16, 64, 256]
  rows = np.array([1.0, 2.0, 5.0])[:, None] * np.array(sizes)[None] ** -0.5
  estimate = summary_of.slope(sizes, rows)
  np.testing.assert_allclose(estimate, [-0.5] * 3, atol=1e-12)
  for width, verdict in ((0.05, 'reproduced'), (0.5, 'undecided')):
    claim = statistics.claim(
      '',
      '',
      statistics.Estimate(-0.5, -0.5 - width, -0.5 + width),
      at_least=-0.6,
      at_most=-0.4,
    )
    assert claim['verdict'] == verdict


def test_proportions_have_the_interval_of_clopper_and_pearson():
  none = summary_of.proportion(np.zeros(100, bool))
  np.testing.assert_allclose(none, [0, 0, 1 - 0.025**0.01], rtol=1e-9)
  every = summary_of.proportion(np.ones(100, bool))
  np.testing.assert_allclose(every, [1, 0.025**0.01, 1], rtol=1e-9)


# Exact expectations, by a grid over the whole cube.

NUM_GRID = 10


@pytest.fixture(scope='module')
def setting():
  rng = np.random.default_rng(0)
  mixing = rng.normal(size=(1, 3, data.KEY_DIM))
  mixing /= np.linalg.norm(mixing)
  return data.Setting(mixing, rng.normal(size=(1, 5, data.KEY_DIM)))


def grid():
  nodes, weights = np.polynomial.legendre.leggauss(NUM_GRID)
  points = np.array(list(itertools.product(nodes, repeat=data.KEY_DIM)))
  masses = np.array(list(itertools.product(weights / 2, repeat=data.KEY_DIM)))
  return points, np.prod(masses, axis=1)


def test_population_and_constants_of_random_features(setting):
  points, masses = grid()
  mixing, projection = setting.mixing[0], setting.projection[0]
  phi = np.stack([oracles.positive_features(projection, x) for x in points])
  mean = np.einsum('g,gv,gr->vr', masses, points @ mixing.T, phi)
  np.testing.assert_allclose(
    data.population(setting).weights[0], mean, rtol=1e-6, atol=1e-9
  )
  squares = np.sum(phi**2, axis=1)
  lengths = np.sum((points @ mixing.T) ** 2, axis=1) + 1
  known = data.feature_constants(setting)
  np.testing.assert_allclose(
    known.second_moment[0], masses @ (squares * lengths), rtol=1e-4
  )
  corners = np.array(list(itertools.product((-1, 0, 1), repeat=data.KEY_DIM)))
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
    data.kernel_constants(setting).second_moment[0],
    masses @ (growth * lengths),
    rtol=1e-9,
  )
  rng = np.random.default_rng(1)
  inputs = rng.uniform(-1, 1, size=(4, data.KEY_DIM))
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
  gap = harness.compile_quickly(lambda *x: measure.kernel_gap(*x)['supremum'])
  one_setting = jax.tree.map(lambda x: x[0], setting)
  found = gap(one_setting, data.population(setting), inputs, signs)
  np.testing.assert_allclose(found, np.sqrt(square), rtol=1e-9)


def test_running_trace():
  keys = np.random.default_rng(2).normal(size=(8, data.KEY_DIM)) * 20
  found = harness.compile_quickly(
    lambda x: measure.running_log_trace(x, np.array([2, 8]))
  )(keys)
  logs = np.sum(keys**2, axis=1) / 2
  for size, value in zip((2, 8), found, strict=True):
    expected = np.logaddexp.reduce(logs[:size]) - np.log(size)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_another_config_in_the_same_folder_is_refused(tiny):
  other = dataclasses.replace(TINY, seed=1)
  with pytest.raises(ValueError, match='holds a run with seed=0'):
    experiment.run(other, tiny[1])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_seeds': 4}, 'num_seeds is 4; expected an integer >= 5'),
    ({'num_traces': 4}, 'num_traces is 4; expected an integer >= 5'),
    ({'num_samples': 1}, 'num_samples is 1; expected an integer >= 2'),
    ({'num_demonstrations': (4, 8)}, 'num_demonstrations is 4,8; expected'),
    ({'num_demonstrations': (8, 4, 2)}, 'num_demonstrations is 8,4,2'),
    ({'num_demonstrations': (1, 2, 9999)}, 'num_demonstrations reaches 9999'),
    ({'widths': (1, 1, 2)}, 'widths is 1,1,2; expected at least three'),
    ({'widths': (0, 1, 2)}, 'widths is 0; expected an integer >= 1'),
    ({'delta': 0.0}, r'delta is 0; expected a probability in \(0, 1\)'),
    ({'delta': 1.0}, r'delta is 1; expected a probability in \(0, 1\)'),
    ({'heavy_scale': 0.9}, 'heavy_scale is 0.9; expected a finite number >= 1'),
    ({'trace_demonstrations': 9}, 'trace_demonstrations is 9; expected'),
  ],
)
def test_bad_flags_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **change)
