"""Attention weights of one query, normalised."""

import jax.numpy as jnp

from iclcl_jax import _validate, attention
from iclcl_jax.types import Array, Float


def attention_weights(phi, query, keys, values, mask) -> Float[Array, ' N']:
  """Attention weights of one query, zeros if it sees no key."""
  _validate.check_tokens(keys, values, mask, query=query)
  scores, _ = attention.scores(phi, query, keys, mask)
  total = jnp.sum(scores)
  if mask is None:
    return scores / total
  return scores / jnp.where(jnp.any(mask), total, 1)


def visible_values(values, mask):
  return values if mask is None else jnp.where(mask[:, None], values, 0)
