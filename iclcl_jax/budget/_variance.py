"""Closed-form variances of estimated kernels."""

import math
from typing import Any

import numpy as np

from iclcl_jax import _pair_series, _validate
from iclcl_jax._door import host_door
from iclcl_jax.budget._common import (
  capped_exp,
  cosine_of,
  family_of,
  host_squares,
)
from iclcl_jax.types import Array, Float, Projection


@host_door
def relative_variance(
  feature_map: type,
  projection_fn: Projection,
  query: Float[Array, ' d_k'],
  key: Float[Array, ' d_k'],
  *,
  num_directions: int,
) -> float:
  r"""Returns the variance of `phi(q) . phi(k)` over its squared mean.

  For independent rows :math:`(e^v - 1)/R`, :math:`(\cosh v - 1)/R` and
  :math:`(\cosh u - 1)/R`; rows of one block add their covariance.

  Args:
    feature_map: the class `features.PositiveFeatures`, `HyperbolicFeatures` or
      `TrigonometricFeatures`.
    projection_fn: the function `projections.gaussian`, `orthogonal` or
      `simplex`.
    query: one query. Shape `[d_k]`.
    key: one key. Shape `[d_k]`.
    num_directions: rows `R` of the projection.

  Returns:
    The relative variance, at most `exp(700)`.

  Raises:
    ValueError: if the map is not random, the projection has no closed form
      (`simplex_plus`), shapes disagree, or values are traced.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> x = np.full(4, 0.5)
    >>> round(budget.relative_variance(
    ...     features.PositiveFeatures, projections.gaussian, x, x,
    ...     num_directions=64), 4)  # (e^2 - 1) / 64
    0.0998

  References:
    Choromanski et al., arXiv:2009.14794, lemma 2 (independent rows); Yu et
    al., arXiv:1610.09072 (orthogonal); Reid et al., arXiv:2301.13856 (simplex).
  """
  x, y = np.asarray(query, np.float64), np.asarray(key, np.float64)
  square = np.sum((x + family_of(feature_map).sign * y) ** 2) / x.size**0.5
  log_variance = log_relative_variance_at(
    feature_map,
    projection_fn,
    square,
    dim=x.size,
    num_directions=num_directions,
  )
  return float(capped_exp(log_variance))


def log_relative_variance_at(
  feature_map: type,
  projection_fn: Projection,
  squared_norms: Any,
  *,
  dim: int,
  num_directions: int,
) -> np.ndarray:
  r"""Returns logarithms of `relative_variance` for many pairs, from `v` or `u`.

  Args:
    feature_map: see `relative_variance`.
    projection_fn: see `relative_variance`.
    squared_norms: `|q + k|^2 / sqrt(d_k)`, or for trigonometric features
      `|q - k|^2 / sqrt(d_k)`. Any shape.
    dim: width `d_k`.
    num_directions: rows `R` of the projection.

  Returns:
    The logarithms, minus infinity where the estimate is exact. The shape of
    `squared_norms`.

  Raises:
    ValueError: as `relative_variance`, or if a squared norm is negative.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> v = np.array([0.0, 1.0])
    >>> np.exp(budget.log_relative_variance_at(
    ...     features.PositiveFeatures, projections.gaussian, v, dim=4,
    ...     num_directions=1)).round(3).tolist()
    [0.0, 1.718]
  """
  family = family_of(feature_map)
  cosine = cosine_of(projection_fn, dim)
  _validate.at_least(1, num_directions=num_directions)
  v = host_squares(squared_norms)
  scaled = -np.expm1(-v) if not family.even else np.expm1(-v) ** 2 / 2
  partners = _pair_series.mean_partners(num_directions, dim)
  if cosine is not None and partners > 0:
    both = [cosine, -cosine] if family.even else [cosine]
    pairs = [
      _pair_series.scaled_covariance(family.sign * v, dim, c) for c in both
    ]
    scaled = scaled + partners * sum(pairs) / len(pairs)
  with np.errstate(divide='ignore'):
    return v + np.log(np.maximum(scaled, 0)) - math.log(num_directions)
