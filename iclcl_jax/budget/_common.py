"""Families of feature maps, and numbers on the host."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from iclcl_jax import _validate, features, projections
from iclcl_jax.types import Array

Projection: TypeAlias = Callable[..., Array]


class Family(NamedTuple):
  """The map depends on `q + sign * k`; `even` if each row has both signs."""

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
  if projection_fn not in COSINES:
    found = getattr(projection_fn, '__name__', type(projection_fn).__name__)
    expected = ', '.join(f'projections.{fn.__name__}' for fn in COSINES)
    raise ValueError(
      f'projection_fn is {found}, for which no closed form of the variance '
      f'exists; expected one of the functions {expected}. Estimate the '
      'variance from draws instead.'
    )
  minimum = 2 if projection_fn is projections.simplex else 1
  _validate.check_count('dim', dim, minimum=minimum)
  return COSINES[projection_fn](dim)


def host(name: str, array: Any, shape: str) -> np.ndarray:
  if not _validate.is_concrete(array):
    raise ValueError(
      f'{name} is traced; a budget needs concrete values. Call it outside '
      'jit, vmap and grad.'
    )
  _validate.check_array(name, array, shape)
  return np.asarray(array, np.float64)


def host_squares(squared_norms: Any) -> np.ndarray:
  if not _validate.is_concrete(squared_norms):
    raise ValueError(
      'squared_norms is traced; a budget needs concrete values. Call it '
      'outside jit, vmap and grad.'
    )
  squares = np.asarray(squared_norms, np.float64)
  if not np.all(np.isfinite(squares) & (squares >= 0)):
    raise ValueError(
      'squared_norms has a negative or non-finite entry; expected squared '
      'norms |q + k|^2 / sqrt(d_k) of finite queries and keys.'
    )
  return squares


def capped_exp(log: np.ndarray) -> np.ndarray:
  return np.exp(np.minimum(log, 700.0))


def log_sum_exp(x: np.ndarray) -> float:
  shift = float(np.max(x))
  if shift == -math.inf:
    return shift
  return shift + math.log(float(np.sum(np.exp(x - shift))))
