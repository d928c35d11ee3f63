"""Does the identity hold for every feature map and the exact softmax?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.equivalence import one_step
from experiments.lab import Config, pretraining
from iclcl_jax import equivalence, features, kernels, projections
from iclcl_jax.types import Array, FeatureMap, Kernel

# Standard deviation of the entries of queries, keys and values.
CONTROLLED_NORM = 0.5
# Their normaliser may vanish: its condition decides whether they can hold.
SIGNED_MAPS = ('trigonometric, orthogonal', 'Taylor, order 2', 'identity')
# Projections whose rows are coupled.
COUPLED = {
  'orthogonal': projections.orthogonal,
  'simplex': projections.simplex,
  'simplex_plus': projections.simplex_plus,
}


class Row(NamedTuple):
  name: str  # Of the map.
  data: str  # 'trained' layer, or the same rows at 'small norms'.
  certificate: equivalence.Certificate  # What `equivalence.verify` says.

  @property
  def passed(self) -> bool:
    """It holds, or a signed map's normaliser is too ill-conditioned to say."""
    excused = 'normaliser' in self.certificate.verdict
    return self.certificate.holds or (self.name in SIGNED_MAPS and excused)


def measure(config: Config) -> list[Row]:
  found = one_step.trained(config)[config.num_demonstrations[0]]
  params, phi = jax.tree.map(lambda x: x[0], (found.params, found.phi))
  key = jax.random.fold_in(jax.random.key(config.seed), config.num_seeds)

  def draw(key):
    # In float32, of one key: they are compared, never combined.
    return {
      x: fn(jax.random.clone(key), config.num_features, pretraining.TOKEN_DIM)
      for x, fn in COUPLED.items()
    }

  drawn = {'gaussian': np.asarray(phi.projection)}
  drawn |= lab.compute(draw, key)
  tokens = jnp.asarray(found.prompts.tokens[0, 0])
  trained = tuple(map(np.asarray, pretraining.project(params, tokens)))
  # The same rows, shrunk to a norm at which random features imitate softmax.
  small = tuple(x / np.std(x) * CONTROLLED_NORM for x in trained)
  everything = (drawn, {'trained': trained, 'small norms': small})
  rows = []
  for dtype in (np.float64, np.float32):
    with lab.float64_on_host():
      matrices, data = jax.tree.map(
        lambda x, dtype=dtype: jnp.asarray(x, dtype), everything
      )
      rows += [
        # The last key is that of the query.
        Row(name, which, equivalence.verify(phi, *arrays, num_query_tokens=1))
        for name, phi in certified_maps(matrices).items()
        for which, arrays in data.items()
      ]
  return rows


def certified_maps(drawn: dict[str, Array]) -> dict[str, FeatureMap | Kernel]:
  maps: dict[str, FeatureMap | Kernel] = {
    f'positive, {name}': features.PositiveFeatures(projection)
    for name, projection in drawn.items()
  }
  orthogonal = drawn['orthogonal']
  return maps | {
    'hyperbolic, orthogonal': features.HyperbolicFeatures(orthogonal),
    'trigonometric, orthogonal': features.TrigonometricFeatures(orthogonal),
    'elu + 1': features.EluPlusOneFeatures(),
    'Taylor, order 2': features.TaylorFeatures(order=2),
    'identity': features.IdentityFeatures(),
    'exact softmax': kernels.ExponentialKernel(),
  }


def summary(config: Config, rows: list[Row]) -> dict[str, Any]:
  return {
    'holds': all(row.passed for row in rows),
    'certificates': [
      {'name': row.name, 'data': row.data, 'passed': row.passed}
      | row.certificate.to_dict()
      for row in rows
    ],
  }


def tables(config: Config, rows: list[Row]) -> dict[str, Any]:
  return {'certificates': summary(config, rows)['certificates']}
