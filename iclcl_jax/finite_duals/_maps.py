"""Feature maps that are made for the queries and keys of a head."""

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, features
from iclcl_jax._door import door, eager_door
from iclcl_jax.moments import largest, zero_log_scale
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, FeatureMap, Float, Vector

# Of multiplicative steps, which stay non-negative.
_NUM_STEPS = 60


@_pytree.dataclass
class NystroemFeatures(features.FromScaled):
  r"""The symmetric map of `R` landmarks, see `nystroem`.

  .. math:: \phi(x) = K_{LL}^{-1/2}\, k(L, x), \qquad
     k(x, y) = e^{x^\top y/\sqrt{d_k}}

  The only map here that reads queries as keys. Its features have either sign,
  so the normaliser of a query that sees few keys may vanish.
  """

  landmarks: Float[Array, 'R d_k']
  whitening: Float[Array, 'R R']

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' 1'], Float[Array, ' R']]:
    y, rows = (z / x.shape[0] ** 0.25 for z in (x, self.landmarks))
    exponent = rows @ y - jnp.sum(rows**2, axis=1) / 2
    log_scale = largest(exponent)
    return log_scale[None], self.whitening @ jnp.exp(exponent - log_scale)


@door
def nystroem(
  landmarks: Float[Array, 'R d_k'], *, cutoff: float = 1e-5
) -> NystroemFeatures:
  r"""Makes the Nystroem map of landmarks, exact among the landmarks.

  The kernel is written as :math:`e^{|x|^2/2}` times a Gaussian kernel times
  :math:`e^{|y|^2/2}`, and only the Gaussian one is inverted. The landmarks are
  keys, such as `fit_landmarks` chooses; eigenvalues below the `cutoff`, a share
  of the largest one, are left out.

  Example:
    >>> keys = jnp.eye(4)
    >>> phi = finite_duals.nystroem(keys)
    >>> print((phi(keys[0]) @ phi(keys[1])).round(4))  # exp(0)
    1.0
  """
  rows = landmarks / landmarks.shape[1] ** 0.25
  squares = jnp.sum((rows[:, None] - rows[None]) ** 2, axis=2)
  eigenvalues, basis = jnp.linalg.eigh(jnp.exp(-squares / 2))
  kept = eigenvalues > cutoff * eigenvalues[-1]
  scale = jnp.where(kept, jnp.where(kept, eigenvalues, 1) ** -0.5, 0)
  return NystroemFeatures(landmarks, (basis * scale[None]) @ basis.T)


@_pytree.dataclass
class LandmarkFeatures(features.FromScaled):
  r"""Two towers over `R` landmarks, all features non-negative.

  .. math:: \phi_q(q)_r = e^{l_r^\top q/\sqrt{d_k}}, \qquad
     \phi_k(k) = \arg\min_{c\ge 0} |G c - a(k)|^2

  with the attention of `M` calibration queries,
  :math:`a_m(k) = e^{q_m^\top k/\sqrt{d_k}}/Z_m` and
  :math:`G_{mr} = a_m(l_r)`: a key is written as a mixture of landmarks to which
  these queries attend as they attend to the key. Weights are fitted by
  multiplicative steps, so that normalisers stay positive. See `fit_landmarks`.

  The landmarks :math:`l_r` are chosen keys `[R, d_k]`, the calibration queries
  `[M, d_k]`, and `log_normalisers` :math:`\log Z_m` over the keys of each.
  """

  landmarks: Float[Array, 'R d_k']
  queries: Float[Array, 'M d_k']
  log_normalisers: Float[Array, ' M']

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' R'], Float[Array, ' R']]:
    attended = self._attended(self.landmarks)
    gram = attended.T @ attended
    exponent = self.queries @ x / x.shape[0] ** 0.5 - self.log_normalisers
    log_scale = largest(exponent)
    target = attended.T @ jnp.exp(exponent - log_scale)
    tiny = jnp.finfo(target.dtype).tiny

    def step(_, weights):
      return weights * target / (gram @ weights + tiny)

    start = jnp.full_like(target, jnp.sum(target) / (jnp.sum(gram) + tiny))
    weights = jax.lax.fori_loop(0, _NUM_STEPS, step, start)
    found = weights > 0
    logs = log_scale + jnp.log(jnp.where(found, weights, 1))
    neutral = zero_log_scale(logs.dtype)  # Else it would outweigh the others.
    return jnp.where(found, logs, neutral), found.astype(logs.dtype)

  @eager_door
  @widened
  def scaled_query(
    self, x: Vector
  ) -> tuple[Float[Array, ' R'], Float[Array, ' R']]:
    log_scale = self.landmarks @ x / x.shape[0] ** 0.5
    return log_scale, jnp.ones_like(log_scale)

  def _attended(self, keys: Array) -> Array:
    exponent = self.queries @ keys.T / keys.shape[1] ** 0.5
    return jnp.exp(exponent - self.log_normalisers[:, None])


@_pytree.dataclass
class ExponentialFeatures(features.FromScaled):
  r"""Learnt exponentials of two towers, see `train_features`.

  .. math:: \phi_q(q) = e^{W_q q + b_q}, \qquad \phi_k(k) = e^{W_k k + b_k}
  """

  query_weight: Float[Array, 'R d_k']
  key_weight: Float[Array, 'R d_k']
  query_bias: Float[Array, ' R']
  key_bias: Float[Array, ' R']

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' R'], Float[Array, ' R']]:
    log_scale = self.key_weight @ x + self.key_bias
    return log_scale, jnp.ones_like(log_scale)

  @eager_door
  @widened
  def scaled_query(
    self, x: Vector
  ) -> tuple[Float[Array, ' R'], Float[Array, ' R']]:
    log_scale = self.query_weight @ x + self.query_bias
    return log_scale, jnp.ones_like(log_scale)


@_pytree.dataclass
class BalancedFeatures(features.FromScaled):
  r"""A map of the softmax kernel behind two affine maps, see `balance`.

  .. math:: e^{q^\top k} = e^{(q-\mu_q)^\top(k-\mu_k)}\, e^{\mu_q^\top k}\,
     e^{q^\top\mu_k - \mu_q^\top\mu_k}

  with queries read as :math:`A(q-\mu_q)`, keys as :math:`A^{-\top}(k-\mu_k)`;
  all of it divided by :math:`\sqrt{d_k}` in exponents. Exact in what it
  changes: unbiased if `phi` is.

  Attributes:
    phi: such as `features.PositiveFeatures`.
    query_mean, key_mean: Shape `[d_k]`.
    matrix, inverse: :math:`A`, symmetric, and its inverse. Shape `[d_k, d_k]`.
  """

  phi: FeatureMap
  query_mean: Float[Array, ' d_k']
  key_mean: Float[Array, ' d_k']
  matrix: Float[Array, 'd_k d_k']
  inverse: Float[Array, 'd_k d_k']

  def rows(self, queries: Array, keys: Array) -> tuple[Array, Array]:
    """Returns balanced queries and keys, as `phi` sees them."""
    queries = (queries - self.query_mean[None]) @ self.matrix.T
    return queries, (keys - self.key_mean[None]) @ self.inverse.T

  @eager_door
  @widened
  def scaled(self, x: Vector) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
    log_scale, found = self.phi.scaled(self.inverse @ (x - self.key_mean))
    return log_scale + self.query_mean @ x / x.shape[0] ** 0.5, found

  @eager_door
  @widened
  def scaled_query(
    self, x: Vector
  ) -> tuple[Float[Array, ' _'], Float[Array, ' R']]:
    centred = x - self.query_mean
    log_scale, found = self.phi.scaled(self.matrix @ centred)
    return log_scale + self.key_mean @ centred / x.shape[0] ** 0.5, found
