r"""The distribution of demonstrations, with exact expectations.

A token is `x = [s ; z]`: keys read `s`, uniform in a cube, values read
`B s + z`, with `z` a vector of independent random signs of length 1, so that
fluctuations have full rank. Everything factorises over coordinates of `s`:
expectations are products of one-dimensional Gauss-Legendre quadratures, exact
to rounding.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config
from iclcl_jax import features, projections
from iclcl_jax.types import Array, DualState, Float

KEY_DIM = 4
NUM_NODES = 48
MAX_SIZE = 4096


class Setting(NamedTuple):
  """One seed: a distribution of demonstrations, and a feature map."""

  mixing: Float[Array, 'd_v d_k']  # The matrix B, of Frobenius norm 1.
  projection: Float[Array, 'R d_k']  # Directions of positive random features.


class Constants(NamedTuple):
  second_moment: np.ndarray  # `E[|v|^2 k(k, k)]`.
  value_bound: np.ndarray  # Largest norm `rho` of a value.
  feature_bound: np.ndarray  # Largest `sqrt(k(k, k))`, or a number above it.

  @property
  def loss_bound(self) -> Any:
    """Largest `|v . W phi(k)|` of all weights of norm 1."""
    return self.value_bound * self.feature_bound


class Known(NamedTuple):
  """A setting and all that is known exactly of it; leaves `[S, ...]`."""

  setting: Setting  # The distribution and the feature map.
  population: DualState  # The exact mean embedding, random features.
  features: Constants  # Constants of the random features.
  softmax: Constants  # Constants of the exact softmax kernel.


class Samples(NamedTuple):
  """Demonstrations of several samples, with leading axes `[S, D]`."""

  inputs: Float[Array, 'N d_k']  # The keys.
  signs: Float[Array, 'N d_v']  # The noise of the values, not yet of length 1.


class Drawn(NamedTuple):
  settings: Setting  # Of all seeds, at the largest width.
  by_size: Mapping[int, Samples]  # Samples by number of demonstrations.
  wide: Samples  # Samples of the largest width.


@lab.once
@lab.float64_on_host()
def drawn(config: Config) -> Drawn:
  """Draws all settings and samples: each from its own key."""
  root = jax.random.key(config.seed)

  def setting(seed):
    key = jax.random.fold_in(jax.random.fold_in(root, seed), 0)
    key_mixing, key_features = jax.random.split(key)
    width = max(config.width, *config.widths)
    mixing = jax.random.normal(key_mixing, (width, KEY_DIM), jnp.float64)
    projection = projections.gaussian(
      key_features, config.num_features, KEY_DIM, dtype=jnp.float64
    )
    return Setting(mixing / jnp.linalg.norm(mixing), projection)

  def draws(folds, size, width):
    numbers = np.stack(np.meshgrid(seeds, folds), axis=-1)
    shape = config.num_samples, size

    def draw(number):
      key = jax.random.fold_in(jax.random.fold_in(root, number[0]), number[1])
      key_inputs, key_signs = jax.random.split(key)
      inputs = jax.random.uniform(
        key_inputs, (*shape, KEY_DIM), jnp.float64, -1.0, 1.0
      )
      bits = jax.random.bits(key_signs, (*shape, width), jnp.uint8)
      signs = 1 - 2 * (bits & jnp.uint8(1)).astype(jnp.int8)
      return Samples(inputs, signs)

    found = lab.compute_each(draw, numbers.reshape(-1, 2))
    outer = numbers.shape[:2]
    return jax.tree.map(lambda x: x.reshape(*outer, *x.shape[1:]), found)

  seeds, sizes = np.arange(config.num_seeds), config.num_demonstrations
  settings = lab.compute_each(setting, seeds)
  narrow = draws(sizes, max(sizes), config.width)
  wide = draws((MAX_SIZE + 1,), config.width_demonstrations, max(config.widths))
  return Drawn(
    settings,
    {
      size: jax.tree.map(lambda x, i=i, size=size: x[i, :, :, :size], narrow)
      for i, size in enumerate(sizes)
    },
    jax.tree.map(lambda x: x[0], wide),
  )


def known(setting: Setting, width: int) -> Known:
  """All about settings `[S, ...]` cut to some width; B has norm 1 again."""
  mixing = setting.mixing[..., :width, :]
  norm = np.linalg.norm(mixing, axis=(-2, -1), keepdims=True)
  setting = setting._replace(mixing=mixing / norm)
  return Known(
    setting,
    population(setting),
    feature_constants(setting),
    kernel_constants(setting),
  )


def over_samples(fn: Callable[..., Any]) -> Callable[..., Any]:
  """`fn(known, inputs, signs)` of all samples `[S, D]`, one at a time."""

  def seed(arguments):
    known, samples = arguments
    return jax.lax.map(lambda x: fn(known, *x), samples)

  mapped = lab.compile_quickly(lambda *x: jax.lax.map(seed, x))
  return lambda known, samples: jax.device_get(mapped(known, samples))


def at_all_sizes(
  config: Config, fn: Callable[..., Any], num_samples: int | None = None
) -> dict[int, Any]:
  """`fn(known, inputs, signs)` of all samples, or of the first, by N."""
  settings, by_size, _ = drawn(config)
  constants, mapped = known(settings, config.width), over_samples(fn)
  return {
    size: mapped(constants, Samples(*(x[:, :num_samples] for x in samples)))
    for size, samples in by_size.items()
  }


def read(
  setting: Setting, inputs: Float[Array, 'N d_k'], signs: Float[Array, 'N d_v']
) -> tuple[features.PositiveFeatures, Float[Array, 'N d_v']]:
  """The feature map of a setting, and the values `B s + z` of one sample."""
  noise = signs.astype(inputs.dtype) / signs.shape[1] ** 0.5
  values = inputs @ setting.mixing.T + noise
  return features.PositiveFeatures(setting.projection), values


def _quadrature() -> tuple[np.ndarray, np.ndarray]:
  nodes, weights = np.polynomial.legendre.leggauss(NUM_NODES)
  return nodes, weights / 2


def _factors(projection: np.ndarray) -> np.ndarray:
  """One coordinate's factor of each feature at the nodes `[S, R, d_k, G]`."""
  nodes, _ = _quadrature()
  scaled = nodes / KEY_DIM**0.25
  return np.exp(projection[..., None] * scaled - scaled**2 / 2)


def population(setting: Setting) -> DualState:
  r"""The exact :math:`E[v\,\phi(k)^\top]` of settings `[S, ...]`."""
  nodes, weights = _quadrature()
  factors = _factors(np.asarray(setting.projection))
  mass = factors @ weights
  first = factors @ (weights * nodes)
  num_features = mass.shape[1]
  mean = np.prod(mass, axis=2, keepdims=True) * first / mass
  mean = np.asarray(setting.mixing) @ np.swapaxes(mean, 1, 2)
  zeros: Any = np.zeros(mass.shape[:2])
  return DualState(mean / num_features**0.5, zeros, zeros)


def feature_constants(setting: Setting) -> Constants:
  """Constants of the random features of settings `[S, ...]`."""
  nodes, weights = _quadrature()
  mixing, projection = map(np.asarray, setting)
  squares = _factors(projection) ** 2
  mass, first, second = (squares @ (weights * nodes**p) for p in range(3))
  num_features = mass.shape[1]
  products = np.prod(mass, axis=2) / num_features
  ratio = first / mass
  gram = np.swapaxes(mixing, 1, 2) @ mixing
  outer = np.einsum('srj,srk,sjk->sr', ratio, ratio, gram)
  diagonal = np.einsum('srj,sjj->sr', second / mass - ratio**2, gram)
  moment = np.sum(products * (outer + diagonal + 1), axis=1)
  # Each factor at the point of the interval where it is largest.
  scaled = np.clip(projection * KEY_DIM**0.25, -1, 1) / KEY_DIM**0.25
  largest = np.exp(2 * projection * scaled - scaled**2)
  top = np.sum(np.prod(largest, axis=2), axis=1) / num_features
  return Constants(moment, _value_bound(mixing), np.sqrt(top))


def kernel_constants(setting: Setting) -> Constants:
  """Constants of the exact softmax kernel for settings `[S, ...]`."""
  nodes, weights = _quadrature()
  growth = np.exp(nodes**2 / KEY_DIM**0.5)
  mass, second = weights @ growth, weights @ (nodes**2 * growth)
  mixing = np.asarray(setting.mixing)
  moment = mass ** (KEY_DIM - 1) * (second + mass)
  ones = np.ones(mixing.shape[0])
  top = np.exp(KEY_DIM**0.5 / 2)
  return Constants(moment * ones, _value_bound(mixing), top * ones)


def _value_bound(mixing: np.ndarray) -> np.ndarray:
  return np.linalg.norm(mixing, 2, axis=(1, 2)) * KEY_DIM**0.5 + 1


def kernel_mean(
  mixing: Float[Array, 'd_v d_k'], key: Float[Array, ' d_k']
) -> Float[Array, ' d_v']:
  r"""The exact :math:`E[v\,k(k, x)]` at `x = key`, for the softmax kernel."""
  nodes, weights = _quadrature()
  growth = jnp.exp(key[:, None] * nodes[None] / KEY_DIM**0.5)
  mass, first = growth @ weights, growth @ (weights * nodes)
  return mixing @ (jnp.prod(mass) * first / mass)


def kernel_mean_square() -> float:
  r"""The exact :math:`|E[v\,\phi(k)^\top]|^2` for the softmax kernel."""
  nodes, weights = _quadrature()
  growth = np.exp(np.outer(nodes, nodes) / KEY_DIM**0.5)
  mass = weights @ growth @ weights
  first = (weights * nodes) @ growth @ (weights * nodes)
  return float(mass ** (KEY_DIM - 1) * first)  # Times |B|_F^2 = 1.
