"""Is the trained layer its dual model after ONE full-batch gradient step?

Also the trained layers that every question starts from.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import lab
from experiments.lab import Config, pretraining, statistics
from iclcl_jax import equivalence, features, kernels, precision, tasks
from iclcl_jax.types import Array, Float

EQUAL = 1e-10  # Relative; a float64 computation is far below.
DTYPES = 'float64', 'float32'
# Residuals in the summary, and their fields of `OneStep`.
KINDS = {'residual': 'residual', 'residual_exact_softmax': 'softmax_residual'}


class Trained(NamedTuple):
  """The layers of all seeds after training on prompts of one length."""

  params: pretraining.LayerParams  # The layers, NumPy arrays `[S, ...]`.
  phi: features.PositiveFeatures
  losses: np.ndarray  # By epoch, of training and of predicting 0, `[E, 2, S]`.
  prompts: tasks.RegressionPrompt  # Held-out ones, NumPy arrays `[S, P, ...]`.

  @property
  def target(self) -> np.ndarray:
    """True labels of the held-out prompts. Shape `[S, P, d_y]`."""
    return np.asarray(self.prompts.target, np.float64)

  def cast(self, dtype: Any) -> tuple[Any, Any, np.ndarray]:
    """Layers, feature maps and tokens of the held-out prompts, in a dtype."""
    arrays = self.params, self.phi, self.prompts.tokens
    return jax.tree.map(lambda x: np.asarray(x, dtype), arrays)


@lab.once
def trained(config: Config) -> Mapping[int, Trained]:
  """Trains all layers, by number of demonstrations, two lengths at a time."""
  seeds = pretraining.init_seeds(
    config.seed, config.num_seeds, num_features=config.num_features
  )
  _, usual_rate = pretraining.INPUTS[config.input_distribution]

  def train(size):
    prompts = pretraining.Prompts(
      num_demonstrations=size,
      input_distribution=config.input_distribution,
      multi_task=config.multi_task,
    )
    params, losses = pretraining.pretrain(
      seeds,
      prompts,
      num_epochs=config.num_epochs,
      learning_rate=config.learning_rate or usual_rate,
      tokens_per_epoch=config.tokens_per_epoch,
      block_epochs=config.block_epochs,
    )
    layers = jax.device_get((params, seeds.runs.phi))
    held_out = prompts.held_out(seeds, config.num_test_prompts)
    return Trained(*layers, losses, held_out)

  sizes = config.num_demonstrations
  return dict(zip(sizes, lab.in_threads(train, sizes), strict=True))


@lab.float64_on_host()
def over_prompts(
  fn: Callable[..., Any],
  layers: Trained,
  dtype: Any,
  num_prompts: int | None = None,
) -> Any:
  """Calls `fn(params, phi, tokens)` for all layers and held-out prompts.

  In a dtype, and if so wanted for a few prompts of a seed alone. NumPy arrays
  with leading axes `[S, P]`.
  """
  params, phi, tokens = layers.cast(dtype)
  compiled = lab.compile_quickly(pretraining.for_all(fn))
  return jax.device_get(compiled(params, phi, tokens[:, :num_prompts]))


def source(size: int) -> str:
  """Where the papers show prompts of so many demonstrations."""
  return 'v1 Fig. 3 left; v2 Fig. 3a' if size == 15 else 'v1 Fig. 8'


def residual_claims(
  residuals: Mapping[int, Mapping[str, float]], texts: Mapping[str, str]
) -> list[lab.Claim]:
  """One claim for each N and kind of residual, named as in the summary."""
  rows = []
  for (size, found), (name, text) in itertools.product(
    residuals.items(), texts.items()
  ):
    key = f'{name.removesuffix("_float64")}-{size}'
    rows += lab.statements(
      'equivalence-',
      f"""{key} [{source(size)}] {text}, N = {size} | largest residual over all
      seeds and held-out prompts, float64""",
      {key: lab.at_most(EQUAL, found[name])},
    )
  return rows


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
    'by_num_demonstrations': {
      str(size): dict(found) for size, found in residuals.items()
    },
  }


class OneStep(NamedTuple):
  """Attention and ONE gradient step on one prompt, or on all `[S, P, ...]`."""

  attention: Float[Array, ' d_y']  # Predicted label of the layer.
  dual: Float[Array, ' d_y']  # Predicted label of the dual model.
  # Largest distance between attention, closed form and autodiff, see
  # `equivalence.Residuals`.
  residual: Float[Array, '']
  # The same for the exact softmax kernel with the same queries, keys and
  # values.
  softmax_residual: Float[Array, '']


class Comparison(NamedTuple):
  """All held-out prompts of one length."""

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
      {x: over_prompts(one_step, found, x) for x in DTYPES}, found.target
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


def claims(config: Config, results: Results) -> list[lab.Claim]:
  return residual_claims(
    residuals(results),
    {
      'residual_float64': 'one full-batch gradient step predicts what the '
      'layer predicts',
      'residual_exact_softmax_float64': 'the same holds for exact softmax '
      'attention, by the kernel',
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
