"""Is the trained layer its dual model after ONE full-batch gradient step?

Also the trained layers that every question starts from.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.lab import Config, pretraining, statistics
from iclcl_jax import equivalence, features, kernels, precision
from iclcl_jax.types import Array, Float

EQUAL = 1e-10  # Relative; a float64 computation is far below.
DTYPES = 'float64', 'float32'
# Residuals in the summary, and their fields of `OneStep`.
KINDS = {'residual': 'residual', 'residual_exact_softmax': 'softmax_residual'}


@lab.once
def trained(config: Config) -> Mapping[int, pretraining.Trained]:
  """Trains all layers, by number of demonstrations, two lengths at a time."""
  seeds = pretraining.init_seeds(
    config.seed, config.num_seeds, num_features=config.num_features
  )
  sizes = config.num_demonstrations
  train = functools.partial(pretraining.trained, config, seeds)
  return dict(zip(sizes, lab.in_threads(train, sizes), strict=True))


def source(size: int) -> str:
  """Where the papers show prompts of so many demonstrations."""
  return 'v1 Fig. 3 left; v2 Fig. 3a' if size == 15 else 'v1 Fig. 8'


def residual_claims(
  residuals: Mapping[int, Mapping[str, float]], texts: Mapping[str, str]
) -> lab.Claims:
  """One claim for each N and kind of residual, named as in the summary."""
  pairs = itertools.product(residuals.items(), texts.items())
  for (size, found), (name, text) in pairs:
    key = f'{name.removesuffix("_float64")}-{size}'
    yield from lab.statements(
      'equivalence-',
      f"""{key} [{source(size)}] {text}, N = {size} | largest residual over all
      seeds and held-out prompts, float64""",
      {key: lab.at_most(EQUAL, found[name])},
    )


def residual_summary(
  residuals: Mapping[int, Mapping[str, float]], tolerances: Mapping[str, float]
) -> dict[str, Any]:
  """The largest residuals, and whether rounding explains all; NaN does not."""
  worst = {
    name: float(np.max([found[name] for found in residuals.values()]))
    for name in tolerances
  }
  return {
    'holds': all(worst[name] <= bound for name, bound in tolerances.items()),
    **worst,
    'tolerances': dict(tolerances),
    'by_num_demonstrations': {str(k): dict(x) for k, x in residuals.items()},
  }


class OneStep(NamedTuple):
  """Attention and ONE gradient step on one prompt, or on all `[S, P, ...]`."""

  attention: Float[Array, ' d_y']  # Predicted label of the layer.
  dual: Float[Array, ' d_y']  # Predicted label of the dual model.
  residual: Float[Array, '']  # That of `equivalence.Residuals`.
  softmax_residual: Float[Array, '']  # The same for the exact softmax.


class Comparison(NamedTuple):
  steps: Mapping[str, OneStep]  # By dtype.
  target: np.ndarray  # True labels. Shape `[S, P, d_y]`.


Results = Mapping[int, Comparison]  # By number of demonstrations.


def one_step(
  params: pretraining.LayerParams,
  phi: features.PositiveFeatures,
  tokens: Float[Array, 'n d_model'],
) -> OneStep:
  """Compares a layer with one full-batch step on one prompt."""
  arguments = pretraining.project(params, tokens)
  result, softmax = (
    equivalence.residuals(x, *arguments, num_query_tokens=1)
    for x in (phi, kernels.ExponentialKernel())
  )
  label = slice(-pretraining.LABEL_DIM, None)
  return OneStep(
    attention=result.attention[label],
    dual=result.autodiff[label],
    residual=result.residual,
    softmax_residual=softmax.residual,
  )


def measure(config: Config) -> Results:
  """Compares all held-out prompts, in float64 and in float32."""
  return {
    size: Comparison(
      {x: pretraining.over_prompts(one_step, found, x) for x in DTYPES},
      found.target,
    )
    for size, found in trained(config).items()
  }


def residuals(results: Results) -> dict[int, dict[str, float]]:
  """The largest residuals, by N and name; NaN if one is not a number."""
  return {
    size: {
      f'{name}_{dtype}': float(np.max(getattr(steps, field)))
      for name, field in KINDS.items()
      for dtype, steps in found.steps.items()
    }
    for size, found in results.items()
  }


def claims(config: Config, results: Results) -> lab.Claims:
  return residual_claims(
    residuals(results),
    {
      'residual_float64': 'one full-batch gradient step predicts what the '
      'layer predicts',
      'residual_exact_softmax_float64': 'one full-batch step in the '
      "kernel's function space predicts what exact softmax attention predicts",
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  tolerances = {
    f'{name}_{dtype}': precision.TOLERANCES[dtype]
    for name in KINDS
    for dtype in DTYPES
  }
  found = residual_summary(residuals(results), tolerances)
  losses = {}
  for size, (steps, target) in results.items():
    loss = np.mean((steps['float64'].dual - target) ** 2, axis=(1, 2))
    losses[size] = {
      'test_mse_dual': np.mean(loss),
      'test_mse_95_percent_interval': {'dual': statistics.mean(loss)},
    }
    found['by_num_demonstrations'][str(size)] |= losses[size]
  return found | losses[config.num_demonstrations[0]]
