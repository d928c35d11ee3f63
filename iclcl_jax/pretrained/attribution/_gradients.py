"""Gradients of the demonstrations in the heads' dual models."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from iclcl_jax._door import door
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.attribution import _checks
from iclcl_jax.pretrained.attribution._readings import members_of, scan_layers
from iclcl_jax.types import Array, Bool, Float


class DemonstrationGradients(NamedTuple):
  r"""The gradients of the demonstrations in each key-value head's dual model.

  The loss is :math:`L(W) = -\sum_i v_i^\top W \phi(k_i)` over the tokens of all
  demonstrations, the learning rate is 1, and what else the position sees is the
  zero-shot part. In the papers' form for one query the loss is divided by `D`:
  subtract `HeadReadings.log_normalisers` from `log_norms`, twice that from
  `log_loss_drops`; shares stay.

  Attributes:
    log_norms: log of the norm of each demonstration's gradient in the function
      space of the softmax kernel; `-inf` if it is zero. Shape `[L, G, S]`.
    log_loss_drops: log of what the step of all demonstrations takes from the
      loss, the squared norm of the gradient. Shape `[L, G]`.
    drop_shares: part of it due to the step of each demonstration, negative if
      it opposes the others; they sum to 1. Shape `[L, G, S]`.
  """

  log_norms: Float[Array, 'L G S']
  log_loss_drops: Float[Array, 'L G']
  drop_shares: Float[Array, 'L G S']


@door
def demonstration_gradients(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  *,
  num_segments: int,
  position: int | Int[Array, ''] | None = None,
  mask: Bool[Array, ' N'] | None = None,
) -> DemonstrationGradients:
  r"""Returns gradient norm and loss drop of each demonstration in each model.

  .. math:: \langle G_s, G_t \rangle
    = \sum_{i \in s} \sum_{j \in t} (v_i^\top v_j)\, k(k_i, k_j)

  for the gradient :math:`G_s = -\sum_{i \in s} v_i \otimes \phi(k_i)` of the
  tokens of a demonstration. The norm is :math:`\langle G_s, G_s \rangle^{1/2}`.
  The loss is linear, so one step of all takes
  :math:`\sum_{s,t} \langle G_s, G_t \rangle` from it, of which
  :math:`\sum_t \langle G_s, G_t \rangle` is due to the step of `s`. Kernels
  are evaluated relative to the largest key of each demonstration, so nothing
  overflows; heads that share keys and values share the dual model.

  Takes what `read_heads` takes, and raises `ValueError` as it does; tokens that
  `position` does not see count for nothing.

  References:
    Ren & Liu, arXiv:2310.13220, the loss of Theorem 3.1; its drop in one step
    derived here.
  """
  _model.check_causal_prompt(model, tokens, mask)
  _checks.check_segments(segment_ids, num_segments)
  position = _checks.check_position(tokens, position, mask)

  def read(block, x, heads, outputs, seen):
    members = members_of(segment_ids, num_segments, seen)[:-1]
    return jax.vmap(lambda k, v: _gradients(k, v, members))(
      heads.keys, heads.values
    )

  return scan_layers(model, tokens, position, mask, read)[1]


def _gradients(
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_k'],
  members: Bool[Array, 'S N'],
) -> DemonstrationGradients:
  """Gradients of one dual model, each relative to its largest key."""
  width = keys.shape[1]
  inside = jnp.any(members, axis=0)
  sizes = jnp.sum(keys * keys, axis=1) / (2 * width**0.5)
  neutral = jnp.finfo(keys.dtype).min
  scales = jnp.max(jnp.where(members, sizes[None], neutral), axis=1)
  is_seen = jnp.any(members, axis=1)
  scales = jnp.where(is_seen, scales, 0)
  chosen = members.astype(keys.dtype)
  own = scales @ chosen
  exponents = keys @ keys.T / width**0.5 - own[:, None] - own[None]
  pairs = inside[:, None] & inside[None]
  kernel = jnp.exp(jnp.where(pairs, exponents, neutral))
  products = chosen @ (kernel * (values @ values.T)) @ chosen.T
  largest = jnp.max(jnp.where(is_seen, scales, neutral))
  largest = jnp.where(jnp.any(is_seen), largest, 0)
  relative = jnp.where(is_seen, jnp.exp(scales - largest), 0)
  drops = relative * (products @ relative)
  drop = jnp.sum(drops)
  return DemonstrationGradients(
    log_norms=scales + _log(jnp.diagonal(products)) / 2,
    log_loss_drops=2 * largest + _log(drop),
    drop_shares=drops / jnp.where(drop > 0, drop, 1),
  )


def _log(x: Array) -> Array:
  """Returns the logarithm, `-inf` where rounding has left nothing."""
  return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)
