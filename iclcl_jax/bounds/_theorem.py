"""Bounds of the gap between the representation loss and its mean."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import eager_door
from iclcl_jax.bounds._common import (
  CHUNK_SIZE,
  FROBENIUS,
  Ball,
  LogValue,
  Positive,
  compiled_of_logarithms,
  count,
  log_positive,
)
from iclcl_jax.bounds._complexity import rademacher_bound
from iclcl_jax.bounds._norms import log_trace
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask


class GeneralizationBound(NamedTuple):
  """A bound of `L - L_hat` that holds for a whole ball of weights.

  Attributes:
    complexity: the term of the class of functions.
    confidence: the term of the probability `delta`.
  """

  complexity: LogValue
  confidence: LogValue

  @property
  def total(self) -> LogValue:
    """Returns the sum of both terms."""
    return LogValue(
      jnp.logaddexp(self.complexity.log_value, self.confidence.log_value)
    )


@eager_door
@compiled_of_logarithms
def generalization_bound(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  radius: Positive,
  loss_bound: Positive,
  delta: float | Array,
  ball: Ball = FROBENIUS,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> GeneralizationBound:
  r"""Bounds the gap from the demonstrations alone: Theorem 3.2 with constants.

  .. math:: L - \hat L \le 2\hat R_{\mathrm{bound}}
     + 3\cdot 2B\sqrt{\log(2/\delta) / (2N)}

  By symmetrisation and bounded differences, for independent demonstrations.

  Args:
    loss_bound: `B > 0`, at least `|v . W phi(k)|` for ALL `W` of the ball and
      all demonstrations that can occur; the papers' `rho ** 2`.
    delta: probability of failure, in (0, 1).

  Example:
    >>> from iclcl_jax import kernels
    >>> bound = generalization_bound(
    ...     kernels.LinearKernel(), jnp.eye(4), jnp.ones((4, 1)), radius=1.0,
    ...     loss_bound=1.0, delta=0.05)
    >>> round(float(bound.complexity.value), 6)
    1.0
    >>> round(float(bound.confidence.value), 6)
    4.074305

  References:
    Ren & Liu, arXiv:2310.13220v2, Theorem 3.2, there as an order of magnitude;
    Mohri, Rostamizadeh & Talwalkar, Foundations of Machine Learning, Theorem
    3.3.
  """
  values = jnp.asarray(values)
  complexity = rademacher_bound(
    phi,
    keys,
    values,
    radius=radius,
    ball=ball,
    mask=mask,
    chunk_size=chunk_size,
  )
  rate = _log_rate(2, delta, count(values, mask))
  log_bound = log_positive('loss_bound', loss_bound, rate.dtype)
  confidence = log_bound + math.log(6) + rate
  return GeneralizationBound(
    LogValue(complexity.log_value + math.log(2)),
    LogValue(confidence.astype(values.dtype)),
  )


def one_sided_bound(
  second_moment: Positive,
  num_demonstrations: int,
  *,
  radius: Positive,
  loss_bound: Positive,
  delta: float | Array,
) -> GeneralizationBound:
  r"""Bounds the gap of the Frobenius ball where the distribution is known.

  Sharper than `generalization_bound`.

  .. math:: L - \hat L \le w\sqrt{E[|v|^2 k(k,k)] / N}
     + 2B\sqrt{\log(1/\delta) / (2N)}

  The supremum of `L - L_hat` is a norm (`gap_supremum`), so no symmetrisation
  is needed; the first term alone bounds its expectation.

  Args:
    second_moment: :math:`E[|v|^2 k(k,k)] > 0`.
    num_demonstrations: demonstrations `N`.
    loss_bound: as in `generalization_bound`.

  Example:
    >>> bound = one_sided_bound(
    ...     4.0, 100, radius=1.0, loss_bound=1.0, delta=0.05)
    >>> round(float(bound.complexity.value), 6)
    0.2
  """
  _validate.at_least(1, num_demonstrations=num_demonstrations)
  size = jnp.asarray(num_demonstrations, float)
  log_radius = log_positive('radius', radius, size.dtype)
  log_moment = log_positive('second_moment', second_moment, size.dtype)
  log_bound = log_positive('loss_bound', loss_bound, size.dtype)
  return GeneralizationBound(
    LogValue(log_radius + (log_moment - jnp.log(size)) / 2),
    LogValue(log_bound + math.log(2) + _log_rate(1, delta, size)),
  )


@eager_door
@compiled_of_logarithms
def published_bound(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  *,
  radius: Positive,
  value_bound: Positive,
  dimension_factor: float | Array,
  delta: float | Array,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> GeneralizationBound:
  r"""Evaluates Theorem 3.2 as published, its hidden constants set to 1.

  .. math:: w \rho d \sqrt{\mathrm{Tr} K} / N + \sqrt{\log(1/\delta) / N}

  An order of magnitude, to compare growth with; no bound of anything.

  Args:
    value_bound: largest norm `rho > 0` of a value.
    dimension_factor: the factor `d > 0` of the output dimension; 1 removes it,
      which `generalization_bound` justifies for the Frobenius ball.

  Example:
    >>> from iclcl_jax import kernels
    >>> bound = published_bound(
    ...     kernels.LinearKernel(), jnp.eye(4), radius=1.0, value_bound=1.0,
    ...     dimension_factor=3, delta=0.05)
    >>> round(float(bound.complexity.value), 6)
    1.5

  References:
    Ren & Liu, arXiv:2310.13220v2, Theorem 3.2.
  """
  trace = log_trace(phi, keys, mask=mask, chunk_size=chunk_size)
  keys, size = jnp.asarray(keys), count(keys, mask)
  factors = (
    log_positive('radius', radius, size.dtype)
    + log_positive('value_bound', value_bound, size.dtype)
    + log_positive('dimension_factor', dimension_factor, size.dtype)
  )
  complexity = factors + trace.astype(size.dtype) / 2 - jnp.log(size)
  rate = _log_rate(1, delta, size) + math.log(2) / 2
  return GeneralizationBound(
    LogValue(complexity.astype(keys.dtype)), LogValue(rate.astype(keys.dtype))
  )


def _log_rate(sides: int, delta, size: Float[Array, '']) -> Float[Array, '']:
  """Returns `log sqrt(log(sides / delta) / (2 N))`."""
  log_delta = log_positive('delta', delta, size.dtype)
  return (jnp.log(math.log(sides) - log_delta) - jnp.log(2 * size)) / 2
