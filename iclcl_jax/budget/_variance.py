"""Variances of estimated kernels in closed form, and errors that they imply."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax import _pair_series, _validate, features, projections
from iclcl_jax._door import host_door
from iclcl_jax.types import Array, Float, Projection


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
    squared_norms: `|q + k|^2 / sqrt(d_k)`, or for trigonometric features
      `|q - k|^2 / sqrt(d_k)`. Any shape.

  Returns:
    The logarithms, minus infinity where the estimate is exact. The shape of
    `squared_norms`.

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


# Above this predicted relative output error the prediction itself is invalid.
LARGEST_VALID_ERROR = 0.2


@host_door
def predicted_output_error(
  feature_map: type,
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_directions: int,
) -> float:
  r"""Predicts the error of the attention output, for independent rows.

  With softmax weights :math:`a` and output :math:`h` of a query,

  .. math:: E|\hat h - h|^2 \approx \tfrac1R \sum_{jl} a_j a_l
     (v_j - h)^\top (v_l - h)\, G_{jl},

  where for positive features :math:`G_{jl} = e^{z_j^\top z_l}` with
  :math:`z_j = (q + k_j)/d_k^{1/4}`; for hyperbolic ones it is `cosh`, for
  trigonometric ones `cosh` with `q - k_j`. That is the first order: trust it up
  to `LARGEST_VALID_ERROR`. Beyond, one key takes all the weight, and the true
  error of positive maps saturates at order 1.

  Args:
    queries: the queries. Shape `[M, d_k]`.
    keys: the keys. Shape `[N, d_k]`.
    values: their values. Shape `[N, d_v]`.

  Returns:
    The root mean square of the error over the one of the output.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> round(budget.predicted_output_error(
    ...     features.PositiveFeatures, np.zeros((1, 4)), np.zeros((2, 4)),
    ...     np.array([[1.0], [3.0]]), num_directions=64), 3)
    0.0
  """
  family = family_of(feature_map)
  _validate.at_least(1, num_directions=num_directions)
  x, y, v = (np.asarray(a, np.float64) for a in (queries, keys, values))
  if not len(x):
    raise ValueError('queries is empty (M = 0); expected at least one query.')
  pairs = [_log_output_error(family, query, y, v) for query in x]
  log_errors, log_outputs = np.array(pairs).T
  log_mean = np.logaddexp.reduce(log_errors) - math.log(num_directions)
  with np.errstate(invalid='ignore'):
    log_ratio = np.nan_to_num(
      log_mean - np.logaddexp.reduce(log_outputs), nan=-np.inf
    )
  return float(capped_exp(log_ratio / 2))


def _log_output_error(family, query, keys, values) -> tuple[float, float]:
  """Log of `R E|error|^2`, and of `|h|^2`, of one query."""
  scores = keys @ query / query.size**0.5
  log_weights = scores - np.logaddexp.reduce(scores)
  output = np.exp(log_weights) @ values
  centred = values - output
  z = (query + family.sign * keys) / query.size**0.25
  exponents = np.sum(z * z, axis=1) / 2 + log_weights
  # G_jl = exp(z_j . z_l), and the largest exponent is on the diagonal.
  shift = exponents.max()
  total = 0.0
  for start in range(0, len(keys), 512):
    rows = slice(start, start + 512)
    products, logs = z[rows] @ z.T, log_weights[rows, None] + log_weights
    growth = np.exp(products + logs - 2 * shift)
    if family.even:
      growth = (growth + np.exp(-products + logs - 2 * shift)) / 2
    total += float(np.sum(growth * (centred[rows] @ centred.T)))
  with np.errstate(divide='ignore'):
    log_error = np.log(max(total, 0.0)) + 2 * shift
    return float(log_error), float(np.log(output @ output))


def verdict(squared_norm: float, output_error: float | None) -> str:
  level = sum(squared_norm > limit for limit in (1, 4, 8))
  if output_error is not None and output_error > LARGEST_VALID_ERROR:
    level = max(level, 2)
  return ('fine', 'caution', 'warn', 'hopeless')[level]
