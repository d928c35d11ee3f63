r"""How many random directions an attention needs, before it is run.

A random feature map estimates the softmax kernel without bias; how well is a
closed form of

.. math:: v = |q + k|^2 / \sqrt{d_k} \quad\text{(positive, hyperbolic)},
   \qquad u = |q - k|^2 / \sqrt{d_k} \quad\text{(trigonometric)},

and grows like its exponential. `log_relative_variance_at` is that form,
`feature_budget` reads it for given queries and keys, and says whether random
features can work there at all.

Everything is computed on the host, in float64 and in log space: a diagnosis of
concrete numbers, not a layer. Results are capped at `exp(700)`.

Throughout, `feature_map` and `projection_fn` are those of
`log_relative_variance_at`, `num_directions` is the number of rows `R` of the
projection and `dim` the width `d_k`. All functions raise `ValueError` if the
map is not random, the projection has no closed form (`simplex_plus`), shapes
disagree, or numbers are traced, negative or none.

References:
  Choromanski et al., arXiv:2009.14794, lemma 2 (independent rows); Yu et al.,
  arXiv:1610.09072 (orthogonal); Reid et al., arXiv:2301.13856 (simplex).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax import _pair_series, _validate, features, projections
from iclcl_jax._door import host_door
from iclcl_jax.types import Array, Float, Projection


class _Family(NamedTuple):
  """What the variance of a feature map depends on."""

  sign: int  # The kernel error is a function of `q + sign * k`.
  even: bool  # Whether each direction is used with both signs.


_FAMILIES: dict[type, _Family] = {
  features.PositiveFeatures: _Family(sign=1, even=False),
  features.HyperbolicFeatures: _Family(sign=1, even=True),
  features.TrigonometricFeatures: _Family(sign=-1, even=True),
}

# Inner product of two unit directions of one block; None: independent rows.
_COSINES: dict[Projection, Callable[[int], float | None]] = {
  projections.gaussian: lambda dim: None,
  projections.orthogonal: lambda dim: 0.0,
  projections.simplex: lambda dim: -1 / (dim - 1),
}


def _family_of(feature_map: type) -> _Family:
  if feature_map not in _FAMILIES:
    found = getattr(feature_map, '__name__', type(feature_map).__name__)
    expected = ', '.join(f'features.{cls.__name__}' for cls in _FAMILIES)
    raise ValueError(
      f'feature_map is {found}; expected one of the classes {expected} (not '
      'an instance). Other maps are not random and have no variance.'
    )
  return _FAMILIES[feature_map]


def _cosine_of(projection_fn: Projection, dim: int) -> float | None:
  """Returns the inner product of unit directions of one block, if dependent."""
  if projection_fn not in _COSINES:
    found = getattr(projection_fn, '__name__', type(projection_fn).__name__)
    expected = ', '.join(f'projections.{fn.__name__}' for fn in _COSINES)
    raise ValueError(
      f'projection_fn is {found}, for which no closed form of the variance '
      f'exists; expected one of the functions {expected}. Estimate the '
      'variance from draws instead.'
    )
  _validate.at_least(2 if projection_fn is projections.simplex else 1, dim=dim)
  return _COSINES[projection_fn](dim)


def _host_squares(squared_norms: Any) -> np.ndarray:
  _validate.check_concrete('squared_norms', squared_norms)
  squares = np.asarray(squared_norms, np.float64)
  if not np.all(np.isfinite(squares) & (squares >= 0)):
    raise ValueError(
      'squared_norms has a negative or non-finite entry; expected squared '
      'norms |q + k|^2 / sqrt(d_k) of finite queries and keys.'
    )
  return squares


def _capped_exp(log: np.ndarray) -> np.ndarray:
  return np.exp(np.minimum(log, 700.0))


def log_relative_variance_at(
  feature_map: type,
  projection_fn: Projection,
  squared_norms: Any,
  *,
  dim: int,
  num_directions: int,
) -> np.ndarray:
  r"""Returns the log-variance of `phi(q) . phi(k)`, over its squared mean.

  For independent rows :math:`(e^v - 1)/R`, :math:`(\cosh v - 1)/R` and
  :math:`(\cosh u - 1)/R`; rows of one block add their covariance. It is minus
  infinity where the estimate is exact.

  Args:
    feature_map: `features.PositiveFeatures`, `HyperbolicFeatures` or
      `TrigonometricFeatures`, the class.
    projection_fn: `projections.gaussian`, `orthogonal` or `simplex`.
    squared_norms: `v`, or for trigonometric features `u`, of one pair or many.

  Example:
    >>> v = np.array([0.0, 1.0])
    >>> np.exp(log_relative_variance_at(
    ...     features.PositiveFeatures, projections.gaussian, v, dim=4,
    ...     num_directions=1)).round(3).tolist()
    [0.0, 1.718]
  """
  family = _family_of(feature_map)
  cosine = _cosine_of(projection_fn, dim)
  _validate.at_least(1, num_directions=num_directions)
  v = _host_squares(squared_norms)
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
  error of positive maps saturates at order 1. Returned is the root mean square
  of the error over the one of the output.

  Example:
    >>> round(predicted_output_error(
    ...     features.PositiveFeatures, np.zeros((1, 4)), np.zeros((2, 4)),
    ...     np.array([[1.0], [3.0]]), num_directions=64), 3)
    0.0
  """
  family = _family_of(feature_map)
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
  return float(_capped_exp(log_ratio / 2))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureBudget:
  """What random features of given queries and keys can reach.

  Attributes:
    feature_map, projection, num_directions: names of both, and rows `R`.
    target_error: relative standard deviation of a kernel value to aim at.
    squared_norm_median, squared_norm_90: median of `v` (or `u`) over the pairs,
      and its 90 % quantile.
    kernel_error_median, kernel_error_90: relative standard deviation there of a
      kernel value with `num_directions`.
    directions_median, directions_90: directions that reach `target_error`
      there, at least 1; for blocks, at the mean block size of `num_directions`.
    output_error: predicted relative root-mean-square error of the attention
      output, see `predicted_output_error`; None without values.
    verdict: 'fine' (median `v` <= 1), 'caution' (<= 4), 'warn' (<= 8) or
      'hopeless'; at least 'warn' if `output_error` is out of regime.
  """

  feature_map: str
  projection: str
  num_directions: int
  target_error: float
  squared_norm_median: float
  squared_norm_90: float
  kernel_error_median: float
  kernel_error_90: float
  directions_median: float
  directions_90: float
  output_error: float | None
  verdict: str

  def __str__(self) -> str:
    error = 'no values given'
    if self.output_error is not None:
      error = f'{self.output_error:.2g}'
      if self.output_error > LARGEST_VALID_ERROR:
        error = f'out of regime (above {LARGEST_VALID_ERROR:g})'
    needed = f'directions for {self.target_error:.3g}'
    rows = {
      'squared norm': (self.squared_norm_median, self.squared_norm_90),
      'kernel error': (self.kernel_error_median, self.kernel_error_90),
      needed: (self.directions_median, self.directions_90),
    }
    title = (
      f'feature budget: {self.feature_map}, {self.projection}, '
      f'{self.num_directions} directions'
    )
    lines = [title, f'  {"":<24} {"median":>9} {"90 %":>9}']
    lines += [f'  {k:<24} {a:>9.3g} {b:>9.3g}' for k, (a, b) in rows.items()]
    lines += [f'  {"predicted output error":<24} {error}']
    return '\n'.join([*lines, f'  {"verdict":<24} {self.verdict}'])


@host_door
def feature_budget(
  feature_map: type,
  projection_fn: Projection,
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'] | None = None,
  *,
  num_directions: int,
  target_error: float = 0.1,
) -> FeatureBudget:
  """Tells what random features of these queries and keys can reach.

  Args:
    values: values of the keys, for the error of the output. Shape `[N, d_v]`.
      The cost is then `M N^2`: a sample of the queries will do.
    target_error: relative standard deviation of a kernel value to aim at.

  Example:
    >>> x = np.random.default_rng(0).normal(size=(32, 64))
    >>> feature_budget(features.PositiveFeatures, projections.orthogonal,
    ...                x[:8], x[8:], num_directions=256).verdict
    'hopeless'
  """
  family = _family_of(feature_map)
  x, y = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
  dim = x.shape[1]
  norms = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1)[None]
  squares = np.maximum(norms + 2 * family.sign * (x @ y.T), 0)
  output_error = None
  if values is not None:
    output_error = predicted_output_error(
      feature_map, queries, keys, values, num_directions=num_directions
    )
  return feature_budget_at(
    feature_map,
    projection_fn,
    squares / dim**0.5,
    dim=dim,
    num_directions=num_directions,
    target_error=target_error,
    output_error=output_error,
  )


def feature_budget_at(
  feature_map: type,
  projection_fn: Projection,
  squared_norms: Any,
  *,
  dim: int,
  num_directions: int,
  target_error: float = 0.1,
  output_error: float | None = None,
) -> FeatureBudget:
  """Makes a budget of pairs of which only `v` (or `u`) is known.

  Args:
    squared_norms: `v` or `u` of the pairs, see `log_relative_variance_at`; one
      number or an array. Of unrelated directions of known norms, both are
      `(|q|^2 + |k|^2) / sqrt(d_k)`.
    target_error: as in `feature_budget`.
    output_error: from `predicted_output_error`, if known.

  Example:
    >>> print(feature_budget_at(
    ...     features.PositiveFeatures, projections.gaussian, 4.0, dim=64,
    ...     num_directions=256))
    feature budget: PositiveFeatures, gaussian, 256 directions
                                  median      90 %
      squared norm                     4         4
      kernel error                 0.458     0.458
      directions for 0.1        5.36e+03  5.36e+03
      predicted output error   no values given
      verdict                  caution
  """
  _validate.check_scalar('target_error', target_error, minimum=1e-12)
  squares = _host_squares(squared_norms)
  if squares.size == 0:
    raise ValueError('squared_norms is empty; expected at least one pair.')
  quantiles = np.quantile(squares, [0.5, 0.9])
  log_variance = log_relative_variance_at(
    feature_map,
    projection_fn,
    quantiles,
    dim=dim,
    num_directions=num_directions,
  )
  errors = _capped_exp(log_variance / 2)
  log_needed = log_variance + math.log(num_directions / target_error**2)
  needed = np.ceil(_capped_exp(np.maximum(log_needed, 0)))
  level = sum(quantiles[0] > limit for limit in (1, 4, 8))
  if output_error is not None and output_error > LARGEST_VALID_ERROR:
    level = max(level, 2)
  return FeatureBudget(
    feature_map=feature_map.__name__,
    projection=projection_fn.__name__,
    num_directions=num_directions,
    target_error=float(target_error),
    squared_norm_median=float(quantiles[0]),
    squared_norm_90=float(quantiles[1]),
    kernel_error_median=float(errors[0]),
    kernel_error_90=float(errors[1]),
    directions_median=float(needed[0]),
    directions_90=float(needed[1]),
    output_error=output_error,
    verdict=('fine', 'caution', 'warn', 'hopeless')[level],
  )
