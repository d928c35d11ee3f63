"""Empirical Rademacher complexity: bound in closed form, and Monte Carlo."""

import jax
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
  log_norm,
  log_positive,
  visible,
)
from iclcl_jax.bounds._norms import log_norms, wide_log_diagonal
from iclcl_jax.precision import accumulation_dtype
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask, PRNGKeyArray


@eager_door
@compiled_of_logarithms
def rademacher_bound(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  radius: Positive,
  ball: Ball = FROBENIUS,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> LogValue:
  r"""Bounds the empirical Rademacher complexity in closed form.

  .. math:: \hat R \le \frac{w}{N}\sqrt{\sum_i |v_i|^2\,k(k_i, k_i)}

  for the Frobenius ball, and :math:`\sqrt{\min(d_v, N, R)}` times that for the
  spectral one.

  Example:
    >>> from iclcl_jax import kernels
    >>> bound = rademacher_bound(
    ...     kernels.LinearKernel(), jnp.eye(4), jnp.ones((4, 1)), radius=2.0)
    >>> round(float(bound.value), 6)
    1.0

  References:
    Ren & Liu, arXiv:2310.13220v2, Theorem 3.2; Bartlett & Mendelson, JMLR 3
    (2002), Lemma 22.
  """
  _validate.at_least(1, chunk_size=chunk_size)
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  dtype = accumulation_dtype(values.dtype)
  diagonal = wide_log_diagonal(phi, keys, mask, chunk_size)
  lengths = log_norm(visible(values, mask).astype(dtype))
  size = count(values, mask)
  rank = jnp.minimum(values.shape[1], size)
  if _validate.is_feature_map(phi):
    row = jax.ShapeDtypeStruct(keys.shape[1:], keys.dtype)
    rank = jnp.minimum(rank, jax.eval_shape(phi, row).shape[0])
  bound = (
    log_positive('radius', radius, dtype)
    + jax.nn.logsumexp(diagonal + 2 * lengths) / 2
    + jnp.log(ball.growth(rank))
    - jnp.log(size)
  )
  return LogValue(bound.astype(values.dtype))


@eager_door
@compiled_of_logarithms
def rademacher_draws(
  key: PRNGKeyArray,
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  radius: Positive,
  num_draws: int,
  ball: Ball = FROBENIUS,
  mask: Mask | None = None,
  chunk_size: int = CHUNK_SIZE,
) -> LogValue:
  r"""Draws `P` sign vectors; returns the exact supremum over the ball for each.

  .. math:: \frac{w}{N} \Bigl|\sum_i s_i v_i\,\phi(k_i)^\top\Bigr|_*

  Their mean estimates the empirical Rademacher complexity without bias. The
  signs of demonstration `i` depend on `key` and `i` alone. Holds
  `num_draws * d_v * R` numbers for a feature map; for a kernel, whose matrix is
  read block by block, `num_draws * d_v * (d_v + chunk_size)`.

  Args:
    key: consumed.
    num_draws: sign vectors `P`.
    chunk_size: demonstrations that are read at a time.

  Example:
    >>> from iclcl_jax import kernels
    >>> draws = rademacher_draws(
    ...     jax.random.key(0), kernels.LinearKernel(), jnp.eye(4),
    ...     jnp.ones((4, 1)), radius=2.0, num_draws=3)
    >>> draws.value.round(6).tolist()
    [1.0, 1.0, 1.0]

  References:
    Bartlett & Mendelson, JMLR 3 (2002), Definition 2.
  """
  _validate.at_least(1, num_draws=num_draws, chunk_size=chunk_size)
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  data, impl = jax.random.key_data(key), jax.random.key_impl(key)

  def signed(rows, labels):
    def signs(row):
      # From its data: a chunk that is recomputed is not a second use.
      root = jax.random.wrap_key_data(data, impl=impl)
      return jax.random.rademacher(
        jax.random.fold_in(root, row), (num_draws,), labels.dtype
      )

    return jax.vmap(signs)(rows)[:, :, None] * labels[:, None, :]

  logs = log_norms(phi, keys, values, signed, num_draws, ball, mask, chunk_size)
  size = jnp.log(count(values, mask))
  logs = logs + (log_positive('radius', radius, logs.dtype) - size)
  return LogValue(logs.astype(values.dtype))
