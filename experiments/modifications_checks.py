"""A negative alpha is a residual connection: checked at trained layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness, pretraining
from experiments import modifications_layers as layers
from experiments import modifications_panels as panels
from experiments.modifications_evaluation import Results
from experiments.modifications_layers import Prompt
from experiments.modifications_training import Panel, Start
from iclcl_jax import features

NUM_PROMPTS = 4  # Of each run.


def plain_with_residual(
  params: layers.RegularisedParams, phi: Any, tokens: jax.Array, strength: float
) -> jax.Array:
  """A plain layer plus `strength` times the value of the query's token."""
  plain = pretraining.LayerParams(params.query, params.key, params.value)
  label = pretraining.predict(plain, phi, tokens)
  return label + strength * (tokens[-1] @ params.value)


def residual_identity(
  config: Any,
  start: Start,
  all_panels: Sequence[Panel],
  results: Mapping[str, Results],
  tests: Any,
) -> float:
  """The printed form with `alpha < 0` against the plain layer with a residual.

  Args:
    config: settings of the experiment.
    start: what training started from.
    all_panels: the panels; the first is the regularised one.
    results: of each panel.
    tests: what `draw_tests` returns.

  Returns:
    The largest difference of predictions over the largest prediction, at
    trained layers of all runs and rates, in float64.
  """
  panel, alpha = all_panels[0], -max(config.strengths)
  layer = panel.names.index(panels.regularised_name('printed', alpha))
  rates = len(config.rate_factors)
  chosen = slice(layer * rates, (layer + 1) * rates)
  params = jax.tree.map(lambda x: x[:, chosen], results[panel.name].params[0])
  tokens = tests['held_out'][0].tokens[:, :NUM_PROMPTS]
  arrays = params, start.seeds.runs.phi.projection, tokens
  arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)

  def both(params, directions, tokens):
    prompt = Prompt(tokens, tokens[:, 0])
    settings = layers.Regularised(printed=alpha)
    phi = features.PositiveFeatures(directions)
    return (
      layers.predict_regularised(params, settings, directions, prompt),
      plain_with_residual(params, phi, tokens, -alpha),
    )

  over_prompts = jax.vmap(both, (None, None, 0))
  over_rates = jax.vmap(over_prompts, (0, None, None))
  with harness.float64_on_host():
    run = harness.compile_quickly(jax.vmap(over_rates))
    first, second = run(*jax.tree.map(jnp.asarray, arrays))
    finite = np.isfinite(first) & np.isfinite(second)
    gap = np.where(finite, np.abs(first - second), 0)
    return float(np.max(gap) / np.max(np.where(finite, np.abs(first), 0)))
