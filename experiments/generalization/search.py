"""Does a search of the ball find weights that violate the bound?"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.generalization import bound, distribution
from experiments.generalization.distribution import Known
from experiments.lab import Config, figures as drawing
from iclcl_jax import bounds
from iclcl_jax.types import Array, DualState, Float


class Tried(NamedTuple):
  """Largest gap of the weights tried on one sample, or on all `[S, D]`."""

  gaussian: Float[Array, '']  # Best of Gaussian directions.
  rank_one: Float[Array, '']  # Best of directions `u phi(x)^T`.
  one_step: Float[Array, '']  # Of one gradient step on the demonstrations.
  worst: Float[Array, '']  # The worst weights, in closed form.


class Results(NamedTuple):
  """By number of demonstrations, random features."""

  tried: Mapping[int, Tried]  # Gaps that were found.
  gaps: Mapping[int, bound.Gap]  # The largest in closed form, and bounds.


@lab.float64_on_host()
def measure(config: Config) -> Results:
  try_weights = functools.partial(
    search, key=jax.random.key(config.seed), num_weights=config.num_weights
  )
  gaps = {size: x['features'] for size, x in bound.gaps(config).items()}
  return Results(distribution.at_all_sizes(config, try_weights), gaps)


def search(
  known: Known,
  inputs: Float[Array, 'N d_k'],
  signs: Float[Array, 'N d_v'],
  *,
  key: Array,
  num_weights: int,
) -> Tried:
  """Searches the ball for weights whose gap is large.

  One step and the worst weights go through both losses, not the supremum.
  """
  # Fresh weights for each sample, from its own bits.
  bits = jax.lax.bitcast_convert_type(inputs[0, 0], np.uint32)[0]
  key = jax.random.fold_in(key, bits)
  phi, values = distribution.read(known.setting, inputs, signs)
  sample: Any = bounds.mean_embedding(phi, inputs, values)
  mean = sample.weights * jnp.exp(sample.log_scale)[None]
  difference = mean - known.population.weights
  key_normal, key_values, key_inputs = jax.random.split(key, 3)
  count = num_weights // 2
  gaussian = jax.random.normal(key_normal, (count, *mean.shape), mean.dtype)
  left = jax.random.normal(key_values, (count, mean.shape[0]), mean.dtype)
  right = jax.random.uniform(
    key_inputs, (count, inputs.shape[1]), mean.dtype, -1.0, 1.0
  )
  rank_one = left[:, :, None] * jax.vmap(phi)(right)[:, None, :]

  def gaps(directions):
    norms = jnp.sqrt(jnp.sum(directions**2, axis=(1, 2)))
    products = jnp.sum(directions * difference[None], axis=(1, 2))
    return bound.RADIUS * jnp.max(products / norms)

  def through_losses(direction):
    weights = bound.RADIUS * direction / jnp.linalg.norm(direction)
    zeros = jnp.zeros(weights.shape[1], weights.dtype)
    state = DualState(weights, zeros, zeros)
    sample = bounds.mean_embedding(phi, inputs, values)
    return bounds.expected_loss(
      phi, state, known.population
    ) - bounds.expected_loss(phi, state, sample)

  searched = gaps(gaussian), gaps(rank_one)
  return Tried(*searched, through_losses(mean), through_losses(difference))


def _over(results: Results, name: str) -> Tried:
  """Gaps that were found, over a field of `bound.Gap`. Shapes `[n, S, D]`."""
  whole = np.stack([getattr(x, name) for x in results.gaps.values()])
  stacked = zip(*results.tried.values(), strict=True)
  return Tried(*(np.stack(x) / whole for x in stacked))


def claims(config: Config, results: Results) -> list[lab.Claim]:
  over = _over(results, 'supremum')
  excess = max(float(np.max(x)) for x in over) - 1
  off = float(np.max(np.abs(over.worst - 1)))
  return bound.statements(
    """
    search [THEOREM] a search of the ball finds no weights that violate the
      bound | largest gap of all weights tried over the bound
    supremum [THEOREM] no weights tried exceed the supremum in closed form, and
      the worst ones attain it | largest relative excess, or distance of the
      worst
    """,
    {
      'search': lab.at_most(1, np.max(_over(results, 'total'))),
      'supremum': lab.at_most(1e-9, np.maximum(excess, off)),
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  num_samples = config.num_seeds * config.num_samples * len(results.tried)
  largest = _over(results, 'total')._asdict()
  return {
    'search': {
      'num_samples': num_samples,
      'num_weights': num_samples * (config.num_weights + 2),
      'largest_gap_over_bound': {k: float(x.max()) for k, x in largest.items()},
    }
  }


def figures(config: Config, results: Results) -> list[lab.Figure]:
  looks = {
    'worst': ('worst weights, closed form', drawing.BLACK, 'o'),
    'one_step': ('weights of one gradient step', drawing.BLUE, 's'),
    'rank_one': ('best of random rank one', drawing.ORANGE, '^'),
    'gaussian': ('best of Gaussian', drawing.GREEN, 'v'),
  }
  panels = (
    ('total', 'bound, both terms', 'violation above here'),
    ('complexity', 'complexity term alone', 'equal to the term'),
  )
  figure, axes = drawing.subplots(1, 2, figsize=(11, 5), sharey=True)
  sizes = list(results.tried)
  for axis, (field, title, words) in zip(axes, panels, strict=True):
    over = _over(results, field)
    for name, (label, colour, marker) in looks.items():
      largest = getattr(over, name).max(axis=(1, 2))
      axis.plot(sizes, largest, f'{marker}-', color=colour, label=label)
    axis.axhline(1, color=drawing.GREY, linestyle='--')
    axis.text(sizes[-1], 1.12, words, color='#555555', ha='right')
    drawing.log_axes(axis, sizes)
    axis.set(ylim=(None, 2), xlabel='number of demonstrations N')
    axis.set_title(f'relative to the {title}')
  axes[0].set_ylabel('largest gap found / bound')
  drawing.legend(axes[0], 4)
  tried = summary(config, results)['search']
  caption = f"""Search for a violation of the bound: largest ratio of gap to
    bound over all {config.num_seeds * config.num_samples} samples at each N,
    random features. On each sample: the worst weights in closed form, those of
    one gradient step on its demonstrations, and the best of
    {config.num_weights} random ones, half of them of rank one;
    {tried['num_weights']} weights in all. Right: relative to the complexity
    term alone, which bounds the gap only together with the confidence term."""
  return [lab.Figure('search', figure, caption)]
