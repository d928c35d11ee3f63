"""Is the trained layer its dual model after ONE full-batch gradient step?"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.equivalence import layers
from experiments.lab import pretraining, statistics
from iclcl_jax import equivalence, features, kernels, precision
from iclcl_jax.types import Array, Float

if TYPE_CHECKING:
  from experiments.equivalence import Config


DTYPES = 'float64', 'float32'
# Residuals in the summary, and their fields of `OneStep`.
KINDS = {'residual': 'residual', 'residual_exact_softmax': 'softmax_residual'}


class OneStep(NamedTuple):
  """Attention and ONE gradient step on one prompt, or on all `[S, P, ...]`.

  Attributes:
    attention: predicted label of the layer. Shape `[d_y]`.
    dual: predicted label of the dual model. Shape `[d_y]`.
    residual: largest distance between attention, closed form and autodiff, see
      `equivalence.Residuals`. Shape `[]`.
    softmax_residual: the same for the exact softmax kernel with the same
      queries, keys and values. Shape `[]`.
  """

  attention: Float[Array, ' d_y']
  dual: Float[Array, ' d_y']
  residual: Float[Array, '']
  softmax_residual: Float[Array, '']


class Comparison(NamedTuple):
  """All held-out prompts of one length.

  Attributes:
    steps: by dtype.
    target: true labels. Shape `[S, P, d_y]`.
  """

  steps: Mapping[str, OneStep]
  target: np.ndarray


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


def measure(config: 'Config') -> Results:
  """Compares all held-out prompts, in float64 and in float32."""
  return {
    size: Comparison(
      {x: layers.over_prompts(one_step, found, x) for x in DTYPES},
      found.target,
    )
    for size, found in layers.trained(config).items()
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


def claims(config: 'Config', results: Results) -> list[lab.Claim]:
  del config
  return layers.residual_claims(
    residuals(results),
    {
      'residual_float64': 'one full-batch gradient step predicts what the '
      'layer predicts',
      'residual_exact_softmax_float64': 'the same holds for exact softmax '
      'attention, by the kernel',
    },
  )


def summary(config: 'Config', results: Results) -> dict[str, Any]:
  tolerances = {
    f'{name}_{dtype}': precision.TOLERANCES[dtype]
    for name in KINDS
    for dtype in DTYPES
  }
  found = layers.residual_summary(residuals(results), tolerances)
  losses = {}
  for size, (steps, target) in results.items():
    loss = np.mean((steps['float64'].dual - target) ** 2, axis=(1, 2))
    losses[size] = {
      'test_mse_dual': np.mean(loss),
      'test_mse_95_percent_interval': {'dual': statistics.mean(loss)},
    }
    found['by_num_demonstrations'][str(size)] |= losses[size]
  return found | losses[config.num_demonstrations[0]]


PART = lab.Part(measure, claims, summary=summary)
