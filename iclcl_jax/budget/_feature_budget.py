"""The budget of given queries and keys."""

import dataclasses
import math
from typing import Any

import numpy as np

from iclcl_jax import _validate
from iclcl_jax._door import host_door
from iclcl_jax.budget._variance import (
  LARGEST_VALID_ERROR,
  capped_exp,
  family_of,
  host_squares,
  log_relative_variance_at,
  predicted_output_error,
  verdict,
)
from iclcl_jax.types import Array, Float, Projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureBudget:
  """What random features of given queries and keys can reach.

  Attributes:
    feature_map: name of the map.
    projection: name of the projection.
    num_directions: rows `R` of the projection.
    target_error: relative standard deviation of a kernel value that is asked
      for.
    squared_norm_median: median of `v` (or `u`) over the pairs.
    squared_norm_90: its 90 % quantile.
    kernel_error_median: relative standard deviation of a kernel value with
      `num_directions`, at the median.
    kernel_error_90: the same at the 90 % quantile.
    directions_median: directions that reach `target_error` at the median, at
      least 1; for blocks, at the mean block size of `num_directions`.
    directions_90: the same at the 90 % quantile.
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

  @property
  def in_regime(self) -> bool | None:
    """Whether `output_error` can be trusted; None without values."""
    if self.output_error is None:
      return None
    return self.output_error <= LARGEST_VALID_ERROR

  def to_dict(self) -> dict[str, Any]:
    """Returns plain Python values, for JSON."""
    return dataclasses.asdict(self) | {'in_regime': self.in_regime}

  def __str__(self) -> str:
    error = 'no values given'
    if self.output_error is not None:
      error = f'{self.output_error:.2g}'
      if not self.in_regime:
        error = f'out of regime (above {LARGEST_VALID_ERROR:g})'
    rows = {
      'squared norm': (self.squared_norm_median, self.squared_norm_90),
      'kernel error': (self.kernel_error_median, self.kernel_error_90),
      f'directions for {self.target_error:.3g}': (
        self.directions_median,
        self.directions_90,
      ),
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
    queries: the queries. Shape `[M, d_k]`.
    keys: the keys. Shape `[N, d_k]`.
    values: their values, for the error of the output. Shape `[N, d_v]`. The
      cost is then `M N^2`: a sample of the queries will do.
    target_error: relative standard deviation of a kernel value to aim at.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> x = np.random.default_rng(0).normal(size=(32, 64))
    >>> budget.feature_budget(features.PositiveFeatures, projections.orthogonal,
    ...                x[:8], x[8:], num_directions=256).verdict
    'hopeless'

  References:
    Choromanski et al., arXiv:2009.14794, lemma 2.
  """
  family = family_of(feature_map)
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
      number or an array. From norms alone: `typical_squared_norms`.
    target_error: relative standard deviation of a kernel value to aim at.
    output_error: from `predicted_output_error`, if known.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> print(budget.feature_budget_at(
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
  squares = host_squares(squared_norms)
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
  errors = capped_exp(log_variance / 2)
  log_needed = log_variance + math.log(num_directions / target_error**2)
  needed = np.ceil(capped_exp(np.maximum(log_needed, 0)))
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
    verdict=verdict(quantiles[0], output_error),
  )


@host_door
def typical_squared_norms(
  query_norms: Float[Array, ' M'], key_norms: Float[Array, ' N'], *, dim: int
) -> np.ndarray:
  r"""Returns `v` (and `u`) `[M, N]` of unrelated directions, from their norms.

  .. math:: v = u = (|q|^2 + |k|^2) / \sqrt{d_k}

  Args:
    query_norms: norms of the queries. Shape `[M]`.
    key_norms: norms of the keys. Shape `[N]`.

  Example:
    >>> from iclcl_jax import budget, features, projections
    >>> budget.typical_squared_norms(np.ones(1), np.ones(2), dim=4).tolist()
    [[1.0, 1.0]]
  """
  _validate.at_least(1, dim=dim)
  x, y = np.asarray(query_norms, np.float64), np.asarray(key_norms, np.float64)
  return (x[:, None] ** 2 + y[None] ** 2) / dim**0.5
