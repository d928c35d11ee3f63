"""The error of the attention output that a variance implies."""

import math

import numpy as np

from iclcl_jax import _validate
from iclcl_jax._door import host_door
from iclcl_jax.budget._variance import capped_exp, family_of
from iclcl_jax.types import Array, Float

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
    feature_map: see `relative_variance`.
    queries: the queries. Shape `[M, d_k]`.
    keys: the keys. Shape `[N, d_k]`.
    values: their values. Shape `[N, d_v]`.
    num_directions: rows `R` of the projection.

  Returns:
    The root mean square of the error over the one of the output.

  Raises:
    ValueError: as `relative_variance`, or if there is no query or no key.

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
