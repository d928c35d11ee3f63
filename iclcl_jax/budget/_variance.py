"""Closed-form variances of estimated kernels."""

import math
from typing import Any

import numpy as np

from iclcl_jax import _pair_series, _validate
from iclcl_jax.budget._common import (
  Projection,
  capped_exp,
  cosine_of,
  family_of,
  host,
  host_squares,
)
from iclcl_jax.types import Array, Float


def relative_variance(
  feature_map: type,
  projection_fn: Projection,
  query: Float[Array, ' d_k'],
  key: Float[Array, ' d_k'],
  *,
  num_directions: int,
) -> float:
  r"""The variance of `phi(q) . phi(k)` over the square of its mean.

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
  log_variance = log_relative_variance(
    feature_map, projection_fn, query, key, num_directions=num_directions
  )
  return float(capped_exp(np.asarray(log_variance)))


def log_relative_variance(
  feature_map: type,
  projection_fn: Projection,
  query: Float[Array, ' d_k'],
  key: Float[Array, ' d_k'],
  *,
  num_directions: int,
) -> float:
  """The logarithm of `relative_variance`, for pairs of any size.

  Args:
    feature_map: see `relative_variance`.
    projection_fn: see `relative_variance`.
    query: one query. Shape `[d_k]`.
    key: one key. Shape `[d_k]`.
    num_directions: rows `R` of the projection.

  Returns:
    The logarithm; minus infinity where the estimate is exact.

  Raises:
    ValueError: as `relative_variance`.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> x = np.full(4, 50.0)
    >>> round(budget.log_relative_variance(
    ...     features.PositiveFeatures, projections.gaussian, x, x,
    ...     num_directions=1))
    20000
  """
  family = family_of(feature_map)
  x, y = host('query', query, 'd_k'), host('key', key, 'd_k')
  _validate.check_same('d_k', 'query', x.size, 'key', y.size)
  square = np.sum((x + family.sign * y) ** 2) / x.size**0.5
  log_variance = log_relative_variance_at(
    feature_map,
    projection_fn,
    square,
    dim=x.size,
    num_directions=num_directions,
  )
  return float(log_variance)


def log_relative_variance_at(
  feature_map: type,
  projection_fn: Projection,
  squared_norms: Any,
  *,
  dim: int,
  num_directions: int,
) -> np.ndarray:
  r"""`log_relative_variance` of many pairs, given `v` (or `u`) of each.

  Args:
    feature_map: see `relative_variance`.
    projection_fn: see `relative_variance`.
    squared_norms: `|q + k|^2 / sqrt(d_k)`, or for trigonometric features
      `|q - k|^2 / sqrt(d_k)`. Any shape.
    dim: width `d_k`.
    num_directions: rows `R` of the projection.

  Returns:
    The logarithms. The shape of `squared_norms`.

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
  _validate.check_count('num_directions', num_directions)
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


def relative_covariance(
  feature_map: type,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  *,
  num_directions: int,
) -> np.ndarray:
  r"""Covariances of the estimates of one query, for independent rows.

  .. math:: \mathrm{Cov}(\hat K_j, \hat K_l)/(K_j K_l) =
     (e^{z_j^\top z_l} - 1)/R, \quad z_j = (q + k_j)/d_k^{1/4}

  for positive features; with `cosh` for hyperbolic ones, and with `cosh` and
  `q - k_j` for trigonometric ones.

  Args:
    feature_map: see `relative_variance`.
    query: one query. Shape `[d_k]`.
    keys: keys seen through the same directions. Shape `[N, d_k]`.
    num_directions: rows `R` of a `projections.gaussian`.

  Returns:
    The relative covariances. Shape `[N, N]`; entries are capped.

  Raises:
    ValueError: as `relative_variance`.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> budget.relative_covariance(features.PositiveFeatures, np.zeros(4),
    ...                     np.zeros((2, 4)), num_directions=8).tolist()
    [[0.0, 0.0], [0.0, 0.0]]

  References:
    The diagonal is lemma 2 of Choromanski et al., arXiv:2009.14794.
  """
  family = family_of(feature_map)
  _validate.check_count('num_directions', num_directions)
  x, y = host('query', query, 'd_k'), host('keys', keys, 'N d_k')
  _validate.check_same('d_k', 'query', x.size, 'keys', y.shape[1])
  z = x + family.sign * y
  products = np.minimum(z @ z.T / x.size**0.5, 700)
  growth = np.cosh(products) - 1 if family.even else np.expm1(products)
  return growth / num_directions
