"""Readings and gradients at the last position, head by head, part by part."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, kernels, moments, transformer
from iclcl_jax._door import door
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.transformer import _forward
from iclcl_jax.types import Array, Bool, Float, Int


@_pytree.with_short_repr
class HeadReadings(NamedTuple):
  """The readings of the last position, head by head, segment by segment.

  Attributes:
    outputs: share of each segment in the output of each head, the sum of its
      values times their attention weights; the last segment is the rest. They
      sum to the output. Shape `[L, H, S + 1, d_k]`.
    log_shares: log of the attention weight of each segment; `-inf` if the
      position sees none of it. Shape `[L, H, S + 1]`.
    log_normalisers: log of the normaliser `D`, with the sink. Shape `[L, H]`.
    removed_outputs: output of the head whose dual state never saw the segment;
      zeros if nothing else is seen. Shape `[L, H, S, d_k]`.
    points: where each block is read, for `transformer.map_label`.
    stream, last: residual stream of the position before each block, and behind
      the last one. Shapes `[L, d_model]` and `[d_model]`.
    sink_shares: share of a sink in the normaliser, or None. Shape `[L, H]`.
  """

  outputs: Float[Array, 'L H T d_k']
  log_shares: Float[Array, 'L H T']
  log_normalisers: Float[Array, 'L H']
  removed_outputs: Float[Array, 'L H S d_k']
  points: transformer.Linearisation
  stream: Float[Array, 'L d_model']
  last: Float[Array, ' d_model']
  sink_shares: Float[Array, 'L H'] | None = None


@door
def read_heads(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  *,
  num_segments: int,
  mask: Bool[Array, ' N'] | None = None,
) -> HeadReadings:
  r"""Reads the heads of all layers at the last position, by segments.

  A segment `s` is a dual state of its own with mass
  :math:`D_s = \sum_{i \in s} k(k_i, q)` and prediction :math:`h_s`; the head's
  output is that of the merged state, :math:`\sum_s (D_s / D)\, h_s`. Without a
  demonstration the other states are merged, which subtracts nothing.

  Args:
    segment_ids: demonstration of each token, from 0; -1 for the rest, as
      `mark_spans` gives them. Shape `[N]`.
    num_segments: number of demonstrations `S`.
    mask: the last valid token is read: mask later ones to read another.

  Raises `ValueError` as `pretrained.logits`, or if `segment_ids` do not fit.
  """
  members = _members(model, tokens, segment_ids, num_segments, mask)
  position = _model.last_valid(tokens, mask)

  def read(block, x, heads, outputs, seen):
    point = transformer.linearise(
      model.architecture, block, x[position][None], outputs[:, position, None]
    )
    pieces = _read_segments(
      heads.queries[:, position],
      heads.keys,
      heads.values,
      members & seen,
      cap=model.architecture.score_cap,
      sinks=heads.sinks,
    )
    return pieces, jax.tree.map(lambda leaf: leaf[0], point), x[position]

  last, readings = scan_layers(model, tokens, mask, read)
  (outputs, shares, normalisers, removed, sinks), point, stream = readings
  return HeadReadings(
    outputs, shares, normalisers, removed, point, stream, last[position], sinks
  )


def scan_layers(
  model: LanguageModel,
  tokens: Array,
  mask: Array | None,
  read: Callable[..., Any],
) -> tuple[Array, Any]:
  """Runs the blocks and stacks over the layers what `read` returns.

  It is given the block, the rows before it, heads, their outputs, and which
  tokens the last one sees `[1, N]`.
  """
  architecture = model.architecture
  positions = _model.positions_of(tokens, mask)
  last = positions[_model.last_valid(tokens, mask)][None]

  def step(x, block):
    x = moments.visible(x, mask)
    heads = transformer.heads(architecture, block, x, positions=positions)
    outputs = transformer.attend(
      architecture, heads, positions, positions, mask=mask
    )
    window = heads.window
    seen = _forward.visibility(architecture, last, positions, mask, window)
    reading = read(block, x, heads, outputs, seen)
    return transformer.complete(architecture, block, x, outputs), reading

  x = _model.embed_at(model, tokens, positions)
  return transformer.scan_blocks(architecture, model.blocks, step, x)


def _members(
  model, tokens, segment_ids, num_segments: int, mask
) -> Bool[Array, 'T N']:
  """Checks a prompt; returns the tokens of each segment, the rest last."""
  _model.check_causal_prompt(model, tokens, mask)
  check_segments(segment_ids, num_segments)
  names = jnp.arange(num_segments, dtype=segment_ids.dtype)
  chosen = segment_ids[None] == names[:, None]
  return jnp.concatenate([chosen, ~jnp.any(chosen, axis=0)[None]])


def check_segments(segment_ids: Array, num_segments: int) -> None:
  _validate.at_least(1, num_segments=num_segments)
  remedy = 'Tokens of no demonstration have -1; num_segments counts the others.'
  _validate.check_ids('segment_ids', segment_ids, -1, num_segments, remedy)


def _read_segments(
  query: Float[Array, 'H d_k'],
  keys: Float[Array, 'G N d_k'],
  values: Float[Array, 'G N d_k'],
  members: Bool[Array, 'T N'],
  *,
  cap: float | None = None,
  sinks: Float[Array, ' H'] | None = None,
) -> tuple[Array, Array, Array, Array, Array | None]:
  """Reads one dual state for each segment, and merges them.

  Returns what each adds to the output, log shares, the log normaliser, the
  output without each, and the share of a sink, a demonstration with label 0.
  """
  (num_heads, width), num_groups = query.shape, keys.shape[0]
  rows = (query / width**0.5).reshape(num_groups, -1, width)
  scores = jnp.einsum('grd,gnd->grn', rows, keys)[:, :, None]
  scores = scores if cap is None else kernels.cap(scores, cap)
  members = members[None, None]
  weights = jax.nn.softmax(scores, axis=3, where=members)
  means = jnp.einsum('grtn,gnd->grtd', weights, values)
  means = means.reshape(num_heads, -1, width)
  logs = jax.nn.logsumexp(
    jnp.broadcast_to(scores, weights.shape), axis=3, where=members
  ).reshape(num_heads, -1)
  size = logs.shape[1]
  if sinks is not None:
    logs = jnp.concatenate([logs, sinks[:, None].astype(logs.dtype)], axis=1)
    means = jnp.pad(means, [(0, 0), (0, 1), (0, 0)])
  normaliser = jax.nn.logsumexp(logs, axis=1)
  shares = jax.nn.softmax(logs)
  others = ~jnp.eye(logs.shape[1], dtype=bool)[: size - 1]
  others = others[None] & jnp.isfinite(logs)[:, None]
  removed = jax.nn.softmax(logs[:, None], where=others)
  return (
    (shares[..., None] * means)[:, :size],
    logs[:, :size] - normaliser[:, None],
    normaliser,
    jnp.einsum('hst,htd->hsd', removed, means),
    None if sinks is None else shares[:, -1],
  )


@_pytree.with_short_repr
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
  mask: Bool[Array, ' N'] | None = None,
) -> DemonstrationGradients:
  r"""Returns gradient norm and loss drop of each demonstration in each model.

  .. math:: \langle G_s, G_t \rangle
    = \sum_{i \in s} \sum_{j \in t} (v_i^\top v_j)\, k(k_i, k_j)

  for the gradient :math:`G_s = -\sum_{i \in s} v_i \otimes \phi(k_i)` of the
  tokens of a demonstration. The norm is :math:`\langle G_s, G_s \rangle^{1/2}`.
  The loss is linear, so one step of all takes
  :math:`\sum_{s,t} \langle G_s, G_t \rangle` from it, of which
  :math:`\sum_t \langle G_s, G_t \rangle` is due to the step of `s`. Heads that
  share keys and values share the dual model.

  Takes what `read_heads` takes, and raises `ValueError` as it does; tokens that
  the last position does not see count for nothing.
  """
  members = _members(model, tokens, segment_ids, num_segments, mask)
  if model.architecture.score_cap is not None:
    raise ValueError(
      'model caps its scores, and the capped kernel is not positive definite: '
      'its gradients have no norm. Use read_heads, whose shares are exact.'
    )

  def read(block, x, heads, outputs, seen):
    keys = heads.keys * model.architecture.query_scale**0.5  # Of the kernel.
    inside = (members & seen)[:-1]
    return jax.vmap(lambda k, v: _gradients(k, v, inside))(keys, heads.values)

  return scan_layers(model, tokens, mask, read)[1]


def _gradients(
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_k'],
  members: Bool[Array, 'S N'],
) -> DemonstrationGradients:
  chosen = members.astype(keys.dtype)
  exponents = keys @ keys.T / keys.shape[1] ** 0.5
  scales = jnp.max(chosen * jnp.diagonal(exponents)[None] / 2, axis=1)
  own = jnp.where(jnp.any(members, axis=0), scales @ chosen, jnp.inf)
  kernel = jnp.exp(exponents - own[:, None] - own[None])
  products = chosen @ (kernel * (values @ values.T)) @ chosen.T
  largest = jnp.max(scales)
  relative = jnp.exp(scales - largest)
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
