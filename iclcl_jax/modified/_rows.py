"""Many queries at a time, each at the token of its own key and value."""

from collections.abc import Callable
from typing import TypeAlias, cast

import jax.numpy as jnp

from iclcl_jax import _validate, attention, coefficients, moments
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask

ScoreFn: TypeAlias = Callable[[Array], Array]


def check_rows(queries, keys, values, chunk_size, mask) -> tuple[Array, ...]:
  """Checks tokens of which each has a query, a key and a value."""
  _validate.check_tokens(keys, values, mask, queries=queries)
  _validate.check_same('N', 'queries', queries.shape[0], 'keys', keys.shape[0])
  _validate.check_count('chunk_size', chunk_size)
  return jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(values)


def visible_rows(array: Array, mask: Mask | None) -> Array:
  """Masked rows become zeros, so that a NaN there goes nowhere."""
  return array if mask is None else jnp.where(mask[:, None], array, 0)


def divide(numerator: Array, denominator: Array, seen: Array | None) -> Array:
  """Divides; a row that has seen no key gets zeros."""
  if seen is None:
    return numerator / denominator
  return jnp.where(seen, numerator, 0) / jnp.where(seen, denominator, 1)


def attend(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  chunk_size: int,
  mask: Mask | None,
) -> Float[Array, 'M d_v']:
  """Plain attention: streamed with a feature map, in blocks with a kernel."""
  if _validate.is_feature_map(phi):
    return attention.stream_kernel_attention(
      cast(FeatureMap, phi),
      queries,
      keys,
      values,
      chunk_size=chunk_size,
      mask=mask,
    )
  return moments.map_chunks(
    lambda query: attention.kernel_attention(
      phi, query, keys, values, mask=mask
    ),
    queries,
    chunk_size,
  )


def own_score(
  phi: FeatureMap,
  query: Float[Array, ' d_k'],
  key: Float[Array, ' d_k'],
  log_scale: Float[Array, ''],
  visible: Array | None,
) -> Float[Array, '']:
  """`phi(q) . phi(k) exp(-log_scale)`; zero for an invisible key."""
  query_scale, query_features = moments.scaled(phi, query)
  key_scale, key_features = moments.scaled(phi, key)
  exponent = query_scale + key_scale - log_scale
  if visible is not None:
    neutral = moments.zero_log_scale(exponent.dtype)
    exponent = jnp.where(visible, exponent, neutral)
  return jnp.sum(jnp.exp(exponent) * query_features * key_features)


def weights_fn(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  mask: Mask | None,
) -> ScoreFn:
  """Returns `query -> attention weights [N]`, zeros if no key is visible.

  The features of all keys are computed once and held, `[N, R]`; under `vmap`
  the scores of a block of queries are one product of matrices.
  """
  score = score_fn(phi, keys, mask)
  seen = None if mask is None else jnp.any(mask)

  def weights(query):
    scores = score(query)
    return divide(scores, jnp.sum(scores), seen)

  return weights


def score_fn(phi, keys, mask) -> ScoreFn:
  """Returns `query -> scores [N]`, up to a common scale."""
  if not _validate.is_feature_map(phi):
    return lambda query: coefficients.scores(phi, query, keys, mask)[0]
  key_scale, key_features = moments.scaled_rows(phi, keys, mask)
  feature_scale = moments.largest(key_scale, axis=0)
  key_features = jnp.exp(key_scale - feature_scale[None]) * key_features
  if mask is not None:
    key_features = jnp.where(mask[:, None], key_features, 0)

  def score(query):
    query_scale, query_features = moments.scaled(phi, query)
    exponent = query_scale + feature_scale
    log_scale = moments.largest(exponent)
    return key_features @ (jnp.exp(exponent - log_scale) * query_features)

  return score
