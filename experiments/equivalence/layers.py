"""The trained layers that every question starts from, and their residuals."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from experiments import lab
from experiments.lab import pretraining
from iclcl_jax import features, tasks

if TYPE_CHECKING:
  from experiments.equivalence import Config

EQUAL = 1e-10  # Relative; a float64 computation is far below.


class Trained(NamedTuple):
  """The layers of all seeds after training on prompts of one length.

  Attributes:
    params: the layers, NumPy arrays `[S, ...]`.
    phi: their feature maps.
    losses: by epoch, of training and of predicting 0. Shape `[E, 2, S]`.
    prompts: held-out prompts, NumPy arrays `[S, P, ...]`.
  """

  params: pretraining.LayerParams
  phi: features.PositiveFeatures
  losses: np.ndarray
  prompts: tasks.RegressionPrompt

  @property
  def target(self) -> np.ndarray:
    """True labels of the held-out prompts. Shape `[S, P, d_y]`."""
    return np.asarray(self.prompts.target, np.float64)

  def cast(self, dtype: Any) -> tuple[Any, Any, np.ndarray]:
    """Layers, feature maps and tokens of the held-out prompts, in a dtype."""
    arrays = self.params, self.phi, self.prompts.tokens
    return jax.tree.map(lambda x: np.asarray(x, dtype), arrays)


@lab.once
def trained(config: 'Config') -> Mapping[int, Trained]:
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
@jax.default_matmul_precision('highest')
def over_prompts(
  fn: Callable[..., Any],
  layers: Trained,
  dtype: Any,
  num_prompts: int | None = None,
) -> Any:
  """Calls `fn(params, phi, tokens)` for all layers and held-out prompts.

  Args:
    fn: a function of one prompt.
    layers: the layers of all seeds.
    dtype: what is computed in.
    num_prompts: how many prompts of a seed; all by default.

  Returns:
    Its results as NumPy arrays, with leading axes `[S, P]`.
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
  return [
    lab.Claim(
      id=f'equivalence-{name.removesuffix("_float64")}-{size}',
      source=source(size),
      claim=f'{text}, N = {size}',
      statistic='largest residual over all seeds and held-out prompts, '
      f'float64; at most {EQUAL:g}',
      estimate=lab.exactly(found[name]),
      at_most=EQUAL,
    )
    for size, found in residuals.items()
    for name, text in texts.items()
  ]


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
