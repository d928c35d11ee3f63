"""Augmented layers of `experiments.modifications`, and wide plain ones.

References:
  Ren & Liu, arXiv:2310.13220, section 4.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import pretraining
from experiments.modifications_layers import (
  PlainParams,
  Prompt,
  draw_matrix,
  query_weights,
  read,
  scale_of,
)
from iclcl_jax import projections
from iclcl_jax.types import Array, Float, PRNGKeyArray

HIDDEN_DIM = 4 * pretraining.TOKEN_DIM  # Of the two-layer maps of keys.


class AugmentedParams(NamedTuple):
  """The layer, and a two-layer map of keys.

  Attributes:
    query: shape `[d_model, d_k]`.
    key: shape `[d_model, d_k]`.
    value: label columns of the value projection. Shape `[d_model, d_y]`.
    hidden: `M1`. Shape `[d_model, d_hidden]`.
    out: `M2`. Shape `[d_hidden, d_k]`.
  """

  query: Float[Array, 'd_model d_k']
  key: Float[Array, 'd_model d_k']
  value: Float[Array, 'd_model d_y']
  hidden: Float[Array, 'd_model d_hidden']
  out: Float[Array, 'd_hidden d_k']


class Augmented(NamedTuple):
  """Settings of an augmented layer; the defaults are the plain layer.

  Attributes:
    linear: weight of `x W_K` in the keys.
    gelu: weight of `GELU(x W_K)` in the keys.
    two_layer: weight of `GELU(x M1) M2` in the keys.
    value_gelu: 1 for `GELU(v)` in place of the values, 0 for values.
  """

  linear: float | Array = 1.0
  gelu: float | Array = 0.0
  two_layer: float | Array = 0.0
  value_gelu: float | Array = 0.0


def gelu(x: Array) -> Array:
  """The exact GELU."""
  return jax.nn.gelu(x, approximate=False)


def init_augmented(
  key: PRNGKeyArray, run: pretraining.Run
) -> tuple[AugmentedParams, Array]:
  """The layer of a run, with matrices for a two-layer map of keys."""
  key_hidden, key_out = jax.random.split(key)
  query, keys, value = run.params
  params = AugmentedParams(
    query,
    keys,
    value[:, -pretraining.LABEL_DIM :],
    draw_matrix(key_hidden, keys.shape[0], HIDDEN_DIM),
    draw_matrix(key_out, HIDDEN_DIM, keys.shape[1]),
  )
  return params, run.phi.projection


def predict_augmented(
  params: AugmentedParams,
  settings: Augmented,
  directions: Array,
  prompt: Prompt,
) -> Float[Array, ' d_y']:
  """The label that an augmented layer predicts."""
  query, linear, values = read(params, prompt.tokens)
  keys = (
    settings.linear * linear
    + settings.gelu * gelu(linear)
    + settings.two_layer * (gelu(prompt.tokens @ params.hidden) @ params.out)
  )
  values = values + settings.value_gelu * (gelu(values) - values)
  weights = query_weights(query, keys, directions, scale_of(query))
  return values.T @ weights


class Wide(NamedTuple):
  """Settings of a wide plain layer.

  Attributes:
    width: its `d_k`; columns beyond it are neither read nor trained.
  """

  width: float | Array


def init_wide(max_width: int) -> Callable[..., tuple[PlainParams, Array]]:
  """Makes `init` of wide layers; the first columns are the plain layer's."""

  def init(key, run):
    key_query, key_key, key_directions = jax.random.split(key, 3)
    rows, width = run.params.query.shape
    shape = rows, max_width - width

    def widen(key, matrix):
      return jnp.concatenate([matrix, draw_matrix(key, *shape)], axis=1)

    params = PlainParams(
      widen(key_query, run.params.query),
      widen(key_key, run.params.key),
      run.params.value[:, -pretraining.LABEL_DIM :],
    )
    directions = run.phi.projection
    more = projections.gaussian(
      key_directions, directions.shape[0], max_width - width
    )
    return params, jnp.concatenate([directions, more], axis=1)

  return init


def predict_wide(
  params: PlainParams, settings: Wide, directions: Array, prompt: Prompt
) -> Float[Array, ' d_y']:
  """The label that a wide plain layer predicts."""
  query, keys, values = read(params, prompt.tokens)
  used = jnp.arange(query.shape[0], dtype=query.dtype) < settings.width
  query, keys = jnp.where(used, query, 0), jnp.where(used[None], keys, 0)
  scale = jnp.asarray(settings.width, query.dtype) ** -0.25
  return values.T @ query_weights(query, keys, directions, scale)
