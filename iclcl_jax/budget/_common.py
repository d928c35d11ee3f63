"""Families of feature maps, and numbers on the host."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax import _validate, features, projections
from iclcl_jax.types import Projection


class Family(NamedTuple):
  """What the variance of a feature map depends on.

  Attributes:
    sign: the map's kernel error is a function of `q + sign * k`.
    even: whether each direction is used with both signs.
  """

  sign: int
  even: bool


FAMILIES: dict[type, Family] = {
  features.PositiveFeatures: Family(sign=1, even=False),
  features.HyperbolicFeatures: Family(sign=1, even=True),
  features.TrigonometricFeatures: Family(sign=-1, even=True),
}

# Inner product of two unit directions of one block; None: independent rows.
COSINES: dict[Projection, Callable[[int], float | None]] = {
  projections.gaussian: lambda dim: None,
  projections.orthogonal: lambda dim: 0.0,
  projections.simplex: lambda dim: -1 / (dim - 1),
}


def family_of(feature_map: type) -> Family:
  """Returns the family of a class of random features."""
  if feature_map not in FAMILIES:
    found = getattr(feature_map, '__name__', type(feature_map).__name__)
    expected = ', '.join(f'features.{cls.__name__}' for cls in FAMILIES)
    raise ValueError(
      f'feature_map is {found}; expected one of the classes {expected} (not '
      'an instance). Other maps are not random and have no variance; the '
      'error of features.TaylorFeatures is bounded by '
      'kernels.TruncatedExponentialKernel.remainder_bound.'
    )
  return FAMILIES[feature_map]


def cosine_of(projection_fn: Projection, dim: int) -> float | None:
  """Returns the inner product of unit directions of one block, if dependent."""
  if projection_fn not in COSINES:
    found = getattr(projection_fn, '__name__', type(projection_fn).__name__)
    expected = ', '.join(f'projections.{fn.__name__}' for fn in COSINES)
    raise ValueError(
      f'projection_fn is {found}, for which no closed form of the variance '
      f'exists; expected one of the functions {expected}. Estimate the '
      'variance from draws instead.'
    )
  _validate.at_least(2 if projection_fn is projections.simplex else 1, dim=dim)
  return COSINES[projection_fn](dim)


def host_squares(squared_norms: Any) -> np.ndarray:
  """Returns squared norms as float64 on the host, checked."""
  if not _validate.is_concrete(squared_norms):
    raise ValueError(
      'squared_norms is traced; expected concrete numbers, which are read on '
      'the host. Call it outside jit, vmap and grad.'
    )
  squares = np.asarray(squared_norms, np.float64)
  if not np.all(np.isfinite(squares) & (squares >= 0)):
    raise ValueError(
      'squared_norms has a negative or non-finite entry; expected squared '
      'norms |q + k|^2 / sqrt(d_k) of finite queries and keys.'
    )
  return squares


def capped_exp(log: np.ndarray) -> np.ndarray:
  """Returns the exponential, at most `exp(700)`."""
  return np.exp(np.minimum(log, 700.0))


def log_sum_exp(x: np.ndarray) -> float:
  """Returns the logarithm of a sum of exponentials."""
  shift = float(np.max(x))
  if shift == -math.inf:
    return shift
  return shift + math.log(float(np.sum(np.exp(x - shift))))
