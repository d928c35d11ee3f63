"""Do other views of keys and values help, beyond the numbers that they train?

GELU of values (g1), of keys (g2), and both; heavy g2 is `GELU(x M1) M2` in
place of the key projection, adapter g2 is added to it. The controls are plain
layers of as many parameters.

References:
  Ren & Liu, arXiv:2310.13220, section 4.2; v1, Fig. 5 centre; v2, Fig. 3c.
"""

import functools

import jax
import jax.numpy as jnp

from experiments import lab
from experiments.lab import Config
from experiments.modifications import comparison
from experiments.modifications.comparison import PLAIN, Results, Statement
from experiments.modifications.training import (
  DIM,
  PROJECTION,
  VALUE,
  Layer,
  draw_matrix,
  measure_panel,
)
from iclcl_jax import modified, projections, types

HIDDEN_DIM = 4 * DIM  # Of the two-layer maps of keys.
G1, G2, BOTH = 'g1 (values)', 'g2 (keys)', 'g1 and g2'
HEAVY, ADAPTER = 'heavy g2', 'adapter g2'
gelu = functools.partial(jax.nn.gelu, approximate=False)


def blend(weight, x):
  """From `x` at weight 0 to its GELU at weight 1."""
  return (1 - weight) * x + weight * gelu(x)


def views(keys: float, values: float) -> modified.Augmented:
  """Attention to blends of keys and values; the weights are leaves."""
  return modified.augmented(
    augment_keys=jax.tree_util.Partial(blend, keys),
    augment_values=jax.tree_util.Partial(blend, values),
  )


@types.dataclass
class TwoLayer(Layer):
  """Keys `linear * x W_K + GELU(x M1) M2`; heavy trains no `W_K`."""

  linear: float

  @property
  def num_params(self):
    projections = PROJECTION * (2 if self.linear else 1)
    return projections + 2 * DIM * HIDDEN_DIM + VALUE

  def init(self, key, run):
    key_hidden, key_out = jax.random.split(jax.random.fold_in(key, 0))
    rows, width = run.params.key.shape
    return super().init(key, run) | {
      'hidden': draw_matrix(key_hidden, rows, HIDDEN_DIM),
      'out': draw_matrix(key_out, HIDDEN_DIM, width),
    }

  def keys(self, params, tokens):
    two_layer = gelu(tokens @ params['hidden']) @ params['out']
    return self.linear * super().keys(params, tokens) + two_layer


@types.dataclass
class Wide(Layer):
  """A plain layer of another `d_k`; columns beyond it are not read."""

  width: float  # Its `d_k`.

  @property
  def num_params(self):
    return 2 * DIM * round(self.width) + VALUE

  def init(self, key, run):
    key_query, key_key, _ = self._split(key)
    params = super().init(key, run)

    def widen(key, matrix):
      shape = matrix.shape[0], MAX_WIDTH - matrix.shape[1]
      return jnp.concatenate([matrix, draw_matrix(key, *shape)], axis=1)

    return params | {
      'query': widen(key_query, params['query']),
      'key': widen(key_key, params['key']),
    }

  def directions(self, key, run):
    narrow = run.phi.projection
    more = projections.gaussian(
      self._split(key)[2], narrow.shape[0], MAX_WIDTH - narrow.shape[1]
    )
    return jnp.concatenate([narrow, more], axis=1)

  def predict(self, params, phi, prompt):
    used = jnp.arange(MAX_WIDTH, dtype=jnp.float32) < self.width
    # Features divide by the fourth root of all columns, not of those in use.
    scale = (MAX_WIDTH / self.width) ** 0.25
    names = 'query', 'key'
    seen = {x: jnp.where(used[None], scale * params[x], 0) for x in names}
    return super().predict(params | seen, phi, prompt)

  @staticmethod
  def _split(key):
    return jax.random.split(jax.random.fold_in(key, 1), 3)


def _wide(layer: Layer) -> Wide:
  """The plain layer of nearest size."""
  width = round((layer.num_params - VALUE) / (2 * DIM))
  return Wide(views(0.0, 0.0), float(width))


MODIFIED = {
  G1: Layer(views(0.0, 1.0)),
  G2: Layer(views(1.0, 0.0)),
  BOTH: Layer(views(1.0, 1.0)),
  HEAVY: TwoLayer(views(0.0, 0.0), 0.0),
  ADAPTER: TwoLayer(views(0.0, 0.0), 1.0),
}
WIDE = {name: _wide(MODIFIED[name]) for name in (HEAVY, ADAPTER)}
MAX_WIDTH = round(max(layer.width for layer in WIDE.values()))


def wide_name(name: str) -> str:
  """Name of the plain layer that is as large as a modified one."""
  return f'plain, d_k={WIDE[name].width:g}'


def layers(config: Config) -> dict[str, Layer]:
  wide = {wide_name(name): layer for name, layer in WIDE.items()}
  return {PLAIN: Layer(views(0.0, 0.0))} | MODIFIED | wide


def published(config: Config) -> list[str]:
  return list(MODIFIED)


def controls(config: Config) -> list[tuple[str, str]]:
  return [(name, wide_name(name)) for name in WIDE]


@lab.once
def measure(config: Config) -> Results:
  return measure_panel(config, 'augmented', layers(config))


def claims(config: Config, results: Results) -> list[lab.Claim]:
  statements = [
    Statement(G1, 'held_out', 'poorer', 'is poorer'),
    Statement(BOTH, 'held_out', 'poorer', 'is poorer'),
    Statement(G2, 'early', 'better', 'converges slightly faster'),
    Statement(HEAVY, 'early', 'poorer', 'starts slower'),
    Statement(HEAVY, 'held_out', 'better', 'ends in a better result'),
  ]
  source = comparison.SOURCE.format('centre', '3c')
  return [
    comparison.claim(config, results, source, rate, statement)
    for rate in comparison.RATES
    for statement in statements
  ]


def figures(config: Config, results: Results) -> list[lab.Figure]:
  title, shown = 'augmented keys and values', published(config)
  return [comparison.curves(config, results, 'augmented', title, shown)]
