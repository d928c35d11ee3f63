"""Does a layer that forgets learn faster, or end better, than the plain one?

The printed form `(A - alpha I) V`, the strict one `(A - alpha diag(A)) V` that
the loss implies, and, as a control of negative `alpha`, a residual path with a
matrix of its own. With `alpha < 0` the printed form *is* a residual connection
on the token's value, which is checked at the trained layers.

References:
  Ren & Liu, arXiv:2310.13220, section 4.1; v1, Fig. 5 left; v2, Fig. 3b.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, pretraining
from experiments.modifications import comparison
from experiments.modifications.comparison import PLAIN, Results, Statement
from experiments.modifications.training import (
  LABELS,
  VALUE,
  Layer,
  draw_matrix,
  measure_panel,
  tests_of,
)
from iclcl_jax import features, modified, types

NUM_IDENTITY_PROMPTS = 4  # Of each run.


@types.dataclass
class Untied(Layer):
  """The plain layer and a linear path from the query with its own matrix."""

  strength: float

  @property
  def num_params(self):
    return Layer.num_params + VALUE

  def init(self, key, run):
    rows = run.params.value.shape[0]
    matrix = draw_matrix(jax.random.fold_in(key, 0), rows, LABELS)
    return super().init(key, run) | {'residual': matrix}

  def predict(self, params, phi, prompt):
    path = prompt.tokens[-1] @ params['residual']
    return super().predict(params, phi, prompt) + self.strength * path


class Measured(NamedTuple):
  panel: Results  # Losses of all layers.
  identity: float  # Largest difference over the largest prediction.


def name_of(form: str, alpha: float) -> str:
  return f'{form} alpha={alpha:+g}'


def untied_name(strength: float) -> str:
  return f'untied residual {strength:g}'


def alphas(config: Config) -> list[float]:
  """Both signs of all strengths, from the largest."""
  both = [s * x for x in config.strengths for s in (1.0, -1.0)]
  return sorted(both, reverse=True)


def layers(config: Config) -> dict[str, Layer]:
  printed = modified.regularised_as_printed
  forms = {'printed': printed, 'strict': modified.regularised}
  return (
    {PLAIN: Layer(modified.regularised(strength=0.0))}
    | {
      name_of(form, alpha): Layer(make(strength=alpha))
      for form, make in forms.items()
      for alpha in alphas(config)
    }
    | {
      untied_name(x): Untied(modified.regularised(strength=0.0), x)
      for x in sorted(config.strengths, reverse=True)
    }
  )


def published(config: Config) -> list[str]:
  return [name_of('printed', alpha) for alpha in alphas(config)]


def controls(config: Config) -> list[tuple[str, str]]:
  return [(name_of('printed', -x), untied_name(x)) for x in config.strengths]


@lab.once
def measure(config: Config) -> Measured:
  panel = measure_panel(config, 'regularised', layers(config))
  return Measured(panel, residual_identity(config, panel))


def residual_identity(config: Config, panel: Results) -> float:
  """The printed form with `alpha < 0` beside a residual connection.

  A plain layer plus `-alpha` times the value of the query's token, in float64.
  """
  alpha = -max(config.strengths)
  name = name_of('printed', alpha)
  tokens = tests_of(config)['held_out'][0].tokens[:, :NUM_IDENTITY_PROMPTS]
  arrays = panel.params[name], panel.directions[name], tokens
  arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
  attend = modified.regularised_as_printed(strength=alpha)

  def both(params, directions, tokens):
    plain = pretraining.LayerParams(**params)
    phi = features.PositiveFeatures(directions)
    label = pretraining.predict(plain, phi, tokens)
    query, keys, values = pretraining.project(plain, tokens)
    return attend(phi, query, keys, values), label - alpha * values[-1]

  over_prompts = jax.vmap(both, (None, None, 0))
  over_rates = jax.vmap(over_prompts, (0, None, None))
  with lab.float64_on_host():
    run = lab.compile_quickly(jax.vmap(over_rates))
    first, second = run(*jax.tree.map(jnp.asarray, arrays))
  finite = np.isfinite(first) & np.isfinite(second)
  gap = np.where(finite, np.abs(first - second), 0)
  return float(np.max(gap) / np.max(np.where(finite, np.abs(first), 0)))


def claims(config: Config, results: Measured) -> list[lab.Claim]:
  statements = [
    Statement(name_of('printed', sign * x), *said)
    for x in config.strengths
    for sign, *said in (
      (1, 'held_out', 'poorer', 'converges to a poorer result'),
      (-1, 'early', 'better', 'converges faster'),
      (-1, 'held_out', 'comparable', 'ends in a comparable result'),
    )
  ]
  source = comparison.SOURCE.format('left', '3b')
  return [
    comparison.claim(config, results.panel, source, rate, statement)
    for rate in comparison.RATES
    for statement in statements
  ]


def figures(config: Config, results: Measured) -> list[lab.Figure]:
  own = 'regularised', 'regularised, printed form (A − αI)V', published(config)
  return [comparison.curves(config, results.panel, *own, 'printed ')]


def summary(config: Config, results: Measured) -> dict[str, Any]:
  return {'residual_identity_relative_error_float64': results.identity}
