r"""Covariance of two random features whose directions share a block.

Two rows :math:`r_1 u_1, r_2 u_2` of one block have independent chi-distributed
norms and unit directions at a fixed angle, uniformly rotated together. With
:math:`t = |z|^2` and :math:`c = u_1 \cdot u_2`,

.. math:: E\,e^{(r_1 u_1 + r_2 u_2)^\top z} = \rho(t, c)
   = E_s\; {}_1F_1\big(d; d/2; \tfrac{t}{2}(1 + c s)\big),

where :math:`s = 2 r_1 r_2 / (r_1^2 + r_2^2)`, a function of the polar angle of
:math:`(r_1, r_2)`, has the density :math:`\propto \sin(a)^{d-1}` in
:math:`s = \sin a`. Negative `t` stands for imaginary `z`, that is for cosines.
The average over `s` is a quadrature of a smooth positive function, in NumPy;
expanding in powers of `c` instead would cancel.
"""

import functools
import math

import numpy as np

# Beyond these the covariance is negligible beside the variance of one row.
_MAX_REAL, _MAX_IMAGINARY = 200.0, 400.0


def scaled_covariance(t: np.ndarray, dim: int, cosine: float) -> np.ndarray:
  r"""Returns :math:`e^{-|t|} (e^{-t} \rho(t, c) - 1)`: never overflows."""
  t = np.clip(t, -_MAX_IMAGINARY, _MAX_REAL)
  small = np.abs(t) <= 1
  near = _power_series(np.where(small, t, 0.0), dim, cosine)
  return np.where(small, near, _direct(np.where(small, 1.0, t), dim, cosine))


def mean_partners(num_directions: int, dim: int) -> float:
  """Returns the mean number of other rows in the block of a row."""
  whole, rest = divmod(num_directions, dim)
  return (whole * dim * (dim - 1) + rest * (rest - 1)) / num_directions


def _direct(t: np.ndarray, dim: int, cosine: float) -> np.ndarray:
  s, weights = _angles(dim)
  x = np.abs(t)[..., None] / 2 * (1 + cosine * s)
  positive = (t > 0)[..., None]
  # Kummer: both branches are averages under a Poisson distribution of mean x.
  top = np.where(positive, dim, -dim / 2)
  mean = _poisson_mean(x, top, dim / 2)
  shift = np.where(positive, x - 2 * np.abs(t)[..., None], 0.0)
  return (np.exp(shift) * mean) @ weights - np.exp(-np.abs(t))


def _poisson_mean(x: np.ndarray, top: np.ndarray, bottom: float) -> np.ndarray:
  """Sums `e^-x x^k / k! (top)_k / (bottom)_k`."""
  size = 2 * float(np.max(x, initial=0.0))
  term = np.exp(-x)
  total = term
  for k in range(math.ceil(size + 12 * math.sqrt(size) + 40)):
    term = term * (x * (top + k) / ((bottom + k) * (k + 1)))
    total = total + term
  return total


def _power_series(t: np.ndarray, dim: int, cosine: float) -> np.ndarray:
  """Returns the covariance for small `t`, where the difference to 1 cancels."""
  s, weights = _angles(dim)
  k = np.arange(1, 32)
  factorials = np.cumprod(np.concatenate([[1.0], k]))
  rising = np.cumprod((dim + k - 1) / (dim + 2 * (k - 1)))
  moments = (1 + cosine * s)[None] ** k[:, None] @ weights
  joint = np.concatenate([[1.0], rising * moments]) / factorials
  inverse = np.where(np.arange(32) % 2, -1.0, 1.0) / factorials
  coefficients = np.convolve(joint, inverse)[:32]
  coefficients[0] = 0.0
  return np.exp(-np.abs(t)) * np.polynomial.polynomial.polyval(t, coefficients)


@functools.lru_cache(maxsize=16)
def _angles(dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns quadrature nodes and weights of `s`."""
  nodes, weights = np.polynomial.legendre.leggauss(64)
  s = np.sin(math.pi / 4 * (nodes + 1))  # By symmetry, half of the range.
  weights = weights * np.exp((dim - 1) * np.log(s / s.max()))
  return s, weights / weights.sum()
