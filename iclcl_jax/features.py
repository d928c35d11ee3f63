r"""Feature maps :math:`\phi` with :math:`\phi(q)^\top\phi(k)` a kernel.

A feature map is a callable pytree: `phi(x)` are the features of one vector,
`phi.scaled(x)` the same as `(log_scale, features)` with
`phi(x) = exp(log_scale) * features`, which never under- or overflows. Maps of
the softmax kernel scale their input by `d_k ** -0.25` themselves, so that
`phi(q) . phi(k)` estimates `exp(q . k / sqrt(d_k))`.

Random maps take a `projection`, random directions `[R, d_k]` from
:mod:`iclcl_jax.projections`; their closed-form variance is in
:mod:`iclcl_jax.budget`.

===================== ============== ======== ===========================
map                   features       sign     kernel
===================== ============== ======== ===========================
PositiveFeatures      R              positive softmax (in expectation)
HyperbolicFeatures    2 R            positive softmax (in expectation)
TrigonometricFeatures 2 R            any      softmax (in expectation)
TaylorFeatures        C(d_k + p, p)  any      truncated exponential, exact
EluPlusOneFeatures    d_k            positive its own
IdentityFeatures      d_k            any      inner product, exact
===================== ============== ======== ===========================

Your own is one function: `from_function` and `from_log` make a map of it. A
field of a `flax.nnx.Module` that holds a map is `nnx.data(phi)`.

References:
  Choromanski et al., arXiv:2009.14794, lemma 1 (`PositiveFeatures`,
  `HyperbolicFeatures`), 2 (variances) and section 2 (`TrigonometricFeatures`,
  by Rahimi & Recht, NIPS 2007); Ren & Liu, arXiv:2310.13220, section 3.1
  (`TaylorFeatures` of first order); Katharopoulos et al., arXiv:2006.16236,
  eq. 7 (`EluPlusOneFeatures`); Schlag et al., arXiv:2102.11174
  (`IdentityFeatures`).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _pytree, _validate, kernels
from iclcl_jax._door import eager_door
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, FeatureMap, Float, Vector


class FromScaled:
  """Gives a map its `__call__`: `phi(x) = exp(log_scale) * features`.

  A base class for maps that define `scaled`. One that reads queries otherwise
  than keys also defines `scaled_query`; the call is that of the keys.
  """

  @widened
  def __call__(self, x: Vector) -> Float[Array, ' R']:
    log_scale, features = self.scaled(x)  # type: ignore[attr-defined]
    return jnp.exp(log_scale) * features


def _project(
  projection: Float[Array, 'R d_k'], x: Float[Array, ' d_k']
) -> tuple[Float[Array, ' R'], Float[Array, '']]:
  r"""Returns :math:`\Omega y` and :math:`|y|^2 / 2`, `y = x / d_k^{1/4}`."""
  _validate.check_array('projection', projection, 'R d_k')
  _validate.check_same(
    'd_k', 'x', x.shape[0], 'projection', projection.shape[1]
  )
  if not projection.shape[0]:
    raise ValueError(
      'projection is empty (R = 0); expected at least one direction.'
    )
  x = jnp.asarray(x)
  y = x / x.shape[0] ** 0.25
  return y @ projection.astype(x.dtype).T, jnp.sum(y * y) / 2


@_pytree.dataclass
class PositiveFeatures(FromScaled):
  r"""Positive random features of the softmax kernel.

  .. math:: \phi(x) = R^{-1/2} \exp(\Omega y - |y|^2/2), \quad y=x/d_k^{1/4}

  Unbiased for the softmax kernel if rows of :math:`\Omega` are marginally
  :math:`N(0, I)`.

  Example:
    >>> phi = PositiveFeatures(projections.gaussian(jax.random.key(0), 8, 4))
    >>> phi(jnp.ones(4)).shape
    (8,)
  """

  projection: Float[Array, 'R d_k']

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' R'], Float[Array, ' R']]:
    """Returns `(log phi(x), ones)`. Shapes `[R]`."""
    projected, half_square = _project(self.projection, x)
    num_features = self.projection.shape[0]
    log_scale = projected - (half_square + math.log(num_features) / 2)
    return log_scale, jnp.ones_like(log_scale)

  def log_product(self, x: Vector, y: Vector) -> Float[Array, '']:
    """Returns `log phi(x) . phi(y)`, by one product with `x + y`."""
    projected, _ = _project(self.projection, x + y)
    squares = (x @ x + y @ y) / (2 * x.shape[0] ** 0.5)
    log_count = math.log(self.projection.shape[0])
    return jax.nn.logsumexp(projected) - squares - log_count


@_pytree.dataclass
class FeatureKernel(kernels.FromLog):
  r"""The kernel of a positive feature map, in log space.

  .. math:: \log k(x, y) = \mathrm{logsumexp}_r
     \bigl(\log\phi_r(x) + \log\phi_r(y)\bigr)

  It answers as the map does, with the features never formed, which is the fast
  way where one query meets a few keys. The map has no negative features.

  Example:
    >>> kernel = FeatureKernel(EluPlusOneFeatures())
    >>> round(float(kernel(jnp.zeros(4), jnp.ones(4))), 5)
    8.0
  """

  phi: FeatureMap

  def __post_init__(self):
    _validate.check_feature_map('phi', self.phi)
    if hasattr(self.phi, 'scaled_query'):
      raise ValueError(
        f'phi is {_validate.kind_of(self.phi)}, which reads queries otherwise '
        'than keys; expected a map of one tower, since a kernel is symmetric.'
      )

  @eager_door
  @widened
  def log_kernel(self, x: Vector, y: Vector) -> Float[Array, '']:
    """Returns `log phi(x) . phi(y)`, which neither under- nor overflows."""
    if isinstance(self.phi, PositiveFeatures):
      return self.phi.log_product(x, y)
    x_scale, x_features = self.phi.scaled(x)
    y_scale, y_features = self.phi.scaled(y)
    return jax.nn.logsumexp(x_scale + y_scale, b=x_features * y_features)


@_pytree.dataclass
class HyperbolicFeatures(FromScaled):
  r"""Positive random features, each direction used with both signs.

  .. math:: \phi(x) = (2R)^{-1/2} e^{-|y|^2/2}\,
     [\exp(\Omega y), \exp(-\Omega y)], \quad y=x/d_k^{1/4}

  Unbiased for the softmax kernel, as `PositiveFeatures`.
  """

  projection: Float[Array, 'R d_k']

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' _'], Float[Array, ' _']]:
    """Returns `(log phi(x), ones)`. Shapes `[2 R]`."""
    projected, half_square = _project(self.projection, x)
    num_features = 2 * self.projection.shape[0]
    both_signs = jnp.concatenate([projected, -projected])
    log_scale = both_signs - (half_square + math.log(num_features) / 2)
    return log_scale, jnp.ones_like(log_scale)


@_pytree.dataclass
class TrigonometricFeatures(FromScaled):
  r"""Random Fourier features of the softmax kernel, of either sign.

  .. math:: \phi(x) = R^{-1/2} e^{|y|^2/2}\,
     [\sin(\Omega y), \cos(\Omega y)], \quad y=x/d_k^{1/4}

  Unbiased for the softmax kernel: better than the positive maps for similar
  pairs, useless for distant ones, where the normaliser may vanish or turn
  negative.
  """

  projection: Float[Array, 'R d_k']

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' 1'], Float[Array, ' _']]:
    """Returns `|y|^2 / 2`, shape `[1]`, and the bounded rest, `[2 R]`."""
    projected, half_square = _project(self.projection, x)
    waves = jnp.concatenate([jnp.sin(projected), jnp.cos(projected)])
    return half_square[None], waves / self.projection.shape[0] ** 0.5


@_pytree.dataclass
class EluPlusOneFeatures(FromScaled):
  r"""The map of the linear Transformer: `elu(x) + 1`, elementwise.

  Positive, deterministic, without the scale `d_k ** -0.25`. It defines its own
  kernel and does not estimate the softmax kernel.

  Example:
    >>> EluPlusOneFeatures()(jnp.array([0.0, 1.0])).tolist()
    [1.0, 2.0]
  """

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Vector, Vector]:
    """Returns `(log phi(x), ones)`. Shapes `[d_k]`."""
    x = jnp.asarray(x)
    log_scale = jnp.log1p(jnp.maximum(x, 0)) + jnp.minimum(x, 0)
    return log_scale, jnp.ones_like(log_scale)


@_pytree.dataclass
class TaylorFeatures(FromScaled):
  r"""All scaled monomials up to order `p`: the truncated exponential kernel.

  .. math:: \phi_\alpha(x) = y^\alpha / \sqrt{\alpha!}, \quad
     |\alpha| \le p, \quad y = x/d_k^{1/4}

  Exact: :math:`\phi(q)^\top\phi(k) = \sum_{r \le p} t^r/r!` with the score
  :math:`t = q^\top k/\sqrt{d_k}`. The `order` is :math:`p \ge 0`; even ones
  have a positive kernel.

  Example:
    >>> TaylorFeatures(order=2)(jnp.ones(4)).shape
    (15,)
  """

  order: int = _pytree.static(default=2)

  def __post_init__(self):
    _validate.at_least(0, order=self.order)

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' 1'], Float[Array, ' _']]:
    """Returns `order * log s`, shape `[1]`, and monomials of `y / s`."""
    x = jnp.asarray(x)
    y = x / x.shape[0] ** 0.25
    size = jax.lax.stop_gradient(jnp.maximum(1, jnp.max(jnp.abs(y))))
    log_size = jnp.log(size)
    blocks = []
    for degree in range(self.order + 1):
      indices, factors = _monomials(x.shape[0], degree)
      monomials = jnp.prod((y / size)[indices], axis=1)
      shrink = jnp.exp((degree - self.order) * log_size)
      blocks.append(monomials * shrink * factors.astype(x.dtype))
    return (self.order * log_size)[None], jnp.concatenate(blocks)


@functools.lru_cache(maxsize=64)
def _monomials(dim: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
  r"""Index rows of all monomials of a degree, and :math:`1/\sqrt{\alpha!}`."""
  rows = list(itertools.combinations_with_replacement(range(dim), degree))
  factors = [
    math.prod(math.factorial(row.count(i)) for i in set(row)) ** -0.5
    for row in rows
  ]
  indices = np.asarray(rows, dtype=np.int32).reshape(len(rows), degree)
  return indices, np.asarray(factors)


@_pytree.dataclass
class IdentityFeatures(FromScaled):
  """The input itself: linear attention.

  Use it with `attention.linear_attention`; a normaliser `sum_i k_i . q` may
  vanish or turn negative.

  Example:
    >>> IdentityFeatures()(jnp.array([3.0, 4.0])).tolist()
    [3.0, 4.0]
  """

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' 1'], Vector]:
    """Returns `(0, x)`. Shapes `[1]` and `[d_k]`."""
    x = jnp.asarray(x)
    return jnp.zeros(1, x.dtype), x


@_pytree.dataclass
class FunctionFeatures(FromScaled):
  """The map that `from_function` and `from_log` make of a function."""

  scaled_fn: Callable[[Array], tuple[Array, Array]]

  @eager_door
  def scaled(self, x: Vector) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
    """Returns `(log_scale, features)`. Shapes `[1]` or `[R]`, and `[R]`."""
    log_scale, features = self.scaled_fn(jnp.asarray(x))
    return jnp.atleast_1d(log_scale), features


def key_side(phi: Any) -> Any:
  """Returns the map that reads queries as keys; one of a single tower as is."""
  if hasattr(phi, 'scaled_query'):
    return FunctionFeatures(phi.scaled)
  return phi


def from_function(fn: Callable[[Array], Any]) -> FunctionFeatures:
  """Makes a feature map of the function that computes its features.

  Also a decorator. Features that may overflow belong to `from_log`, or are
  returned with their scale: `fn` is `x [d_k] -> phi(x) [R]`, of either sign, or
  `x -> (log_scale, features)` with a `log_scale` of shape `[]`, `[1]` or `[R]`.
  Arrays of a callable pytree (`jax.tree_util.Partial`, a module) stay leaves.

  Example:
    >>> @from_function
    ... def phi(x):
    ...   return jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)])
    >>> phi(jnp.array([1.0, -2.0])).tolist()
    [1.0, 0.0, 0.0, 2.0]
  """
  _validate.check_function('fn', fn, 1, 'x [d_k] -> phi(x) [R]')
  return FunctionFeatures(jax.tree_util.Partial(_plain, _pytree.function(fn)))


def from_log(fn: Callable[[Array], Array]) -> FunctionFeatures:
  """Makes a positive feature map of the function that computes its logarithm.

  Also a decorator. Nothing under- or overflows, whatever the logarithms
  `log phi(x)` `[R]`; callable pytrees are as in `from_function`.

  Example:
    >>> phi = from_log(lambda x: jnp.concatenate([x, -x]))
    >>> phi(jnp.zeros(2)).tolist()
    [1.0, 1.0, 1.0, 1.0]
  """
  _validate.check_function('fn', fn, 1, 'x [d_k] -> log phi(x) [R]')
  scaled = jax.tree_util.Partial(_exponential, _pytree.function(fn))
  return FunctionFeatures(scaled)


def _plain(fn, x):
  result = fn(x)
  is_pair = isinstance(result, tuple) and len(result) == 2
  log_scale, features = result if is_pair else (None, result)
  _validate.check_array('fn(x)', features, 'R')
  return (log_scale if is_pair else jnp.zeros(1, features.dtype)), features


def _exponential(fn, x):
  log_features = fn(x)
  _validate.check_array('fn(x)', log_features, 'R')
  return log_features, jnp.ones_like(log_features)
