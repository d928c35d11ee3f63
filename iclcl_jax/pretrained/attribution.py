r"""Which demonstrations taught a language model its answer.

One position of a prompt is read, the last one by default. What its heads see is
cut into segments (the demonstrations, and the rest). Three questions:

* `read_heads` and `direct_logit_attribution`: what does each segment add to
  each head, to the residual stream, and to the difference of two logits? The
  direction of that difference is carried backwards through the blocks exactly
  as they are at that position, with **frozen gates and normalisations**
  (`transformer.linearise`), so all terms together are the difference itself.
* `removal_effects`, within the same result: what if a demonstration is removed
  from the dual state of a head? The head's new output is exact, in closed form;
  its effect on the logits is a first-order approximation of what a new forward
  pass gives (`logit_difference` on the shortened prompt, or with `hidden`).
* `demonstration_gradients`: how large is the gradient of each demonstration in
  the head's dual model, and how much of the loss does its step take away?

Layers are streamed by `jax.lax.scan`. No attention map of all layers is held,
and nothing of shape `[L, H, N, d_model]`.

References:
  Elhage et al., A Mathematical Framework for Transformer Circuits (2021);
  Ren & Liu, arXiv:2310.13220, Theorem 3.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from iclcl_jax import transformer
from iclcl_jax.pretrained import _attribution_checks as checks
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._attribution_checks import mark_spans as mark_spans
from iclcl_jax.pretrained._attribution_checks import token_spans as token_spans
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.types import Array, Bool, Float


class HeadReadings(NamedTuple):
  """What one position reads, head by head and segment by segment.

  Attributes:
    outputs: share of each segment in the output of each head, the sum of its
      values times their attention weights; the last segment is the rest. They
      sum to the output. Shape `[L, H, S + 1, d_k]`.
    log_shares: log of the attention weight of each segment; `-inf` if the
      position sees none of it. Shape `[L, H, S + 1]`.
    log_normalisers: log of the normaliser `D`. Shape `[L, H]`.
    removed_outputs: output of the head whose dual state never saw the segment;
      zeros if nothing else is seen. Shape `[L, H, S, d_k]`.
    points: where each block is read, for `transformer.map_label`.
    stream: residual stream of the position before each block. Shape
      `[L, d_model]`.
    last: residual stream of the position behind the last block. Shape
      `[d_model]`.
  """

  outputs: Float[Array, 'L H T d_k']
  log_shares: Float[Array, 'L H T']
  log_normalisers: Float[Array, 'L H']
  removed_outputs: Float[Array, 'L H S d_k']
  points: transformer.Linearisation
  stream: Float[Array, 'L d_model']
  last: Float[Array, ' d_model']


class LogitAttribution(NamedTuple):
  """The difference of two logits as a sum.

  `contributions`, `rest`, `embedding`, `biases` and `final_bias` sum to
  `logit_difference`, up to rounding.

  Attributes:
    logit_difference: logit of the label less that of the other label.
    contributions: of each demonstration through each head. Shape `[L, H, S]`.
    rest: of all other tokens through each head. Shape `[L, H]`.
    embedding: of the embedded token itself.
    biases: of each block, through the blocks above. Shape `[L]`.
    final_bias: of final normalisation and head.
    removal_effects: what the difference would lose if the head alone had not
      seen the demonstration, to first order: gates, normalisations and all
      other heads stay as they are. Shape `[L, H, S]`.
    directions: what turns a vector in the residual stream, added by the heads
      of a layer, into a part of the difference. Shape `[L, d_model]`.
  """

  logit_difference: Float[Array, '']
  contributions: Float[Array, 'L H S']
  rest: Float[Array, 'L H']
  embedding: Float[Array, '']
  biases: Float[Array, ' L']
  final_bias: Float[Array, '']
  removal_effects: Float[Array, 'L H S']
  directions: Float[Array, 'L d_model']

  @property
  def total(self) -> Float[Array, '']:
    """The sum of all terms."""
    return (
      jnp.sum(self.contributions)
      + jnp.sum(self.rest)
      + self.embedding
      + jnp.sum(self.biases)
      + self.final_bias
    )


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


def read_heads(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  *,
  num_segments: int,
  position: int | Int[Array, ''] | None = None,
  mask: Bool[Array, ' N'] | None = None,
) -> HeadReadings:
  r"""Reads the heads of all layers at one position, segment by segment.

  A segment `s` is a dual state of its own with mass
  :math:`D_s = \sum_{i \in s} k(k_i, q)` and prediction :math:`h_s`; the head's
  output is that of the merged state, :math:`\sum_s (D_s / D)\, h_s`. Without a
  demonstration the other states are merged, which subtracts nothing.

  Args:
    model: a causal language model.
    tokens: ids of the prompt. Shape `[N]`.
    segment_ids: demonstration of each token, from 0; -1 for the rest, as
      `mark_spans` gives them. Shape `[N]`.
    num_segments: number of demonstrations `S`.
    position: index of the token that is read; the last valid one by default.
    mask: tokens that are no padding. Shape `[N]`.

  Returns:
    The `HeadReadings`.

  Raises:
    ValueError: as `pretrained.logits`; if `segment_ids` do not fit the tokens;
      if `position` is not a valid token. Values are looked at outside of `jit`
      and `vmap`.

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1: the step is a sum over
    demonstrations.
  """
  checks.check_segments(model, tokens, segment_ids, num_segments, mask)
  position = checks.check_position(tokens, position, mask)

  def read(block, x, heads, outputs, seen):
    query = heads.queries[:, position]
    members = _members(segment_ids, num_segments, seen)
    point = transformer.linearise(
      model.architecture, block, x[position][None], outputs[:, position, None]
    )
    point = jax.tree.map(lambda leaf: leaf[0], point)
    pieces = _read_segments(query, heads.keys, heads.values, members)
    return pieces, point, x[position]

  last, readings = _scan_layers(model, tokens, position, mask, read)
  (outputs, shares, normalisers, removed), point, stream = readings
  return HeadReadings(
    outputs, shares, normalisers, removed, point, stream, last[position]
  )


def direct_logit_attribution(
  model: LanguageModel,
  readings: HeadReadings,
  label: int | Int[Array, ''],
  other_label: int | Int[Array, ''],
) -> LogitAttribution:
  r"""Splits the difference of two logits over layers, heads and segments.

  .. math:: \ell_a - \ell_b = \sum_{l,h,s} o^{lh}_s W_O^{lh} g_l
    + x_0 J_0 g_0 + \textrm{biases}, \qquad g_l = J_{l} g_{l+1}

  with the exact affine maps :math:`J` of the blocks at the position, gates and
  normalisations frozen, and :math:`g_L` from final normalisation and head.

  Args:
    model: the model that gave the readings.
    readings: of one position.
    label: token id whose logit counts.
    other_label: token id whose logit is subtracted.

  Returns:
    The `LogitAttribution`.

  Raises:
    ValueError: if the model has no head, or a label is not in the vocabulary.

  References:
    Elhage et al., A Mathematical Framework for Transformer Circuits (2021),
    direct paths; maps of the blocks derived in `transformer.linearise`.
  """
  checks.check_labels(model, label, other_label)
  row, bias = _label_direction(model, label, other_label)
  state = _model.normalise(model, model.final_norm, readings.last[None])[0]

  def final_part(x):
    norm = model.final_norm
    if norm is None:
      return x
    linear_part = model.architecture.normalization.linear_part
    return linear_part(norm, readings.last, x)

  norm_bias = state - final_part(readings.last)
  direction = _transpose(final_part, row)
  embedded, (terms, effects, biases, directions) = _carry_back(
    model, readings, direction
  )
  return LogitAttribution(
    logit_difference=state @ row + bias,
    contributions=terms[:, :, :-1],
    rest=terms[:, :, -1],
    embedding=readings.stream[0] @ embedded,
    biases=biases,
    final_bias=norm_bias @ row + bias,
    removal_effects=effects,
    directions=directions,
  )


def attribute(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  label: int | Int[Array, ''],
  other_label: int | Int[Array, ''],
  *,
  num_segments: int,
  position: int | Int[Array, ''] | None = None,
  mask: Bool[Array, ' N'] | None = None,
) -> LogitAttribution:
  """`read_heads`, then `direct_logit_attribution`.

  Args:
    model: a causal language model.
    tokens: ids of the prompt. Shape `[N]`.
    segment_ids: demonstration of each token, from 0; -1 for the rest. Shape
      `[N]`.
    label: token id whose logit counts.
    other_label: token id whose logit is subtracted.
    num_segments: number of demonstrations `S`.
    position: index of the token that is read; the last valid one by default.
    mask: tokens that are no padding. Shape `[N]`.

  Returns:
    The `LogitAttribution`.

  Raises:
    ValueError: as `read_heads` and `direct_logit_attribution`.
  """
  checks.check_prompt(model, tokens, mask)
  checks.check_labels(model, label, other_label)
  readings = read_heads(
    model,
    tokens,
    segment_ids,
    num_segments=num_segments,
    position=position,
    mask=mask,
  )
  return direct_logit_attribution(model, readings, label, other_label)


def to_residual_stream(
  model: LanguageModel, outputs: Float[Array, 'L H S d_k']
) -> Float[Array, 'L H S d_model']:
  """Maps outputs of heads, or parts of them, through the output projections.

  Args:
    model: the model.
    outputs: such as `HeadReadings.outputs`. Shape `[L, H, S, d_k]`.

  Returns:
    What each adds to the residual stream. Shape `[L, H, S, d_model]`.
  """
  return jnp.einsum('lhsd,lhdm->lhsm', outputs, model.blocks.output.weight)


def demonstration_gradients(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  *,
  num_segments: int,
  position: int | Int[Array, ''] | None = None,
  mask: Bool[Array, ' N'] | None = None,
) -> DemonstrationGradients:
  r"""Gradient norm and loss drop of every demonstration in every dual model.

  .. math:: \langle G_s, G_t \rangle
    = \sum_{i \in s} \sum_{j \in t} (v_i^\top v_j)\, k(k_i, k_j)

  for the gradient :math:`G_s = -\sum_{i \in s} v_i \otimes \phi(k_i)` of the
  tokens of a demonstration. The norm is :math:`\langle G_s, G_s \rangle^{1/2}`.
  The loss is linear, so one step of all takes
  :math:`\sum_{s,t} \langle G_s, G_t \rangle` from it, of which
  :math:`\sum_t \langle G_s, G_t \rangle` is due to the step of `s`. Kernels
  are evaluated relative to the largest key of each demonstration, so nothing
  overflows; heads that share keys and values share the dual model.

  Args:
    model: a causal language model.
    tokens: ids of the prompt. Shape `[N]`.
    segment_ids: demonstration of each token, from 0; -1 for the rest. Shape
      `[N]`.
    num_segments: number of demonstrations `S`.
    position: tokens that it does not see count for nothing; the last valid one
      by default.
    mask: tokens that are no padding. Shape `[N]`.

  Returns:
    The `DemonstrationGradients`.

  Raises:
    ValueError: as `read_heads`.

  References:
    Ren & Liu, arXiv:2310.13220, the loss of Theorem 3.1; its drop in one step
    derived here.
  """
  checks.check_segments(model, tokens, segment_ids, num_segments, mask)
  position = checks.check_position(tokens, position, mask)

  def read(block, x, heads, outputs, seen):
    members = _members(segment_ids, num_segments, seen)[:-1]
    return jax.vmap(lambda k, v: _gradients(k, v, members))(
      heads.keys, heads.values
    )

  return _scan_layers(model, tokens, position, mask, read)[1]


def logit_difference(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  label: int | Int[Array, ''],
  other_label: int | Int[Array, ''],
  *,
  position: int | Int[Array, ''] | None = None,
  mask: Bool[Array, ' N'] | None = None,
  hidden: Bool[Array, ' N'] | None = None,
) -> Float[Array, '']:
  """The difference of two logits by a forward pass: what attribution predicts.

  Args:
    model: a causal language model.
    tokens: ids of the prompt. Shape `[N]`.
    label: token id whose logit counts.
    other_label: token id whose logit is subtracted.
    position: index of the token that is read; the last valid one by default.
    mask: tokens that are no padding. Shape `[N]`.
    hidden: tokens that no other may see, such as a demonstration that is
      deleted; all others keep their positions. Shape `[N]`.

  Returns:
    The difference. Shape `[]`.

  Raises:
    ValueError: as `pretrained.logits`; if the token that is read is hidden or
      padding, or a label is not in the vocabulary.
  """
  checks.check_prompt(model, tokens, mask)
  checks.check_labels(model, label, other_label)
  position = checks.check_position(tokens, position, mask)
  visible = checks.check_hidden(tokens, position, mask, hidden)
  positions = _model.positions_of(tokens, mask)
  x = transformer.apply_blocks(
    model.architecture,
    model.blocks,
    _model.embed_at(model, tokens, positions),
    positions=positions,
    mask=visible,
  )
  state = _model.normalise(model, model.final_norm, x[position][None])[0]
  row, bias = _label_direction(model, label, other_label)
  return state @ row + bias


def _scan_layers(
  model: LanguageModel,
  tokens: Array,
  position: Any,
  mask: Array | None,
  read: Callable[..., Any],
) -> tuple[Array, Any]:
  """The forward pass; what `read` returns is stacked over the layers."""
  architecture = model.architecture
  positions = _model.positions_of(tokens, mask)
  seen = jax.vmap(architecture.visible, in_axes=(None, 0))(
    positions[position], positions
  )
  seen = seen if mask is None else seen & mask

  def step(x, block):
    x = x if mask is None else jnp.where(mask[:, None], x, 0)
    heads = transformer.heads(architecture, block, x, positions=positions)
    outputs = transformer.attend(
      architecture, *heads, positions, positions, mask=mask
    )
    reading = read(block, x, heads, outputs, seen)
    return transformer.complete(architecture, block, x, outputs), reading

  x = _model.embed_at(model, tokens, positions)
  return jax.lax.scan(step, x, model.blocks)


def _members(segment_ids, num_segments: int, seen) -> Bool[Array, 'T N']:
  """Tokens of each segment that the position sees; the last is the rest."""
  names = jnp.arange(num_segments, dtype=segment_ids.dtype)
  chosen = segment_ids[None] == names[:, None]
  rest = ~jnp.any(chosen, axis=0)
  return jnp.concatenate([chosen, rest[None]]) & seen[None]


def _read_segments(
  query: Float[Array, 'H d_k'],
  keys: Float[Array, 'G N d_k'],
  values: Float[Array, 'G N d_k'],
  members: Bool[Array, 'T N'],
) -> tuple[Array, Array, Array, Array]:
  """Reads a dual state for each segment, and merges them, all but one too."""
  (num_heads, width), num_groups = query.shape, keys.shape[0]
  rows = (query / width**0.5).reshape(num_groups, -1, width)
  scores = jnp.einsum('grd,gnd->grn', rows, keys)[:, :, None]
  neutral = jnp.finfo(scores.dtype).min
  largest = jnp.max(jnp.where(members, scores, neutral), axis=3, keepdims=True)
  weights = jnp.where(members[None, None], jnp.exp(scores - largest), 0)
  masses = jnp.sum(weights, axis=3)
  means = jnp.einsum('grtn,gnd->grtd', weights, values)
  means = means / jnp.where(masses > 0, masses, 1)[..., None]
  means = means.reshape(num_heads, -1, width)
  is_seen = masses > 0
  logs = jnp.log(jnp.where(is_seen, masses, 1)) + largest[..., 0]
  logs = jnp.where(is_seen, logs, neutral).reshape(num_heads, -1)
  normaliser = jax.nn.logsumexp(logs, axis=1)
  shares = jax.nn.softmax(logs)
  removed = _without_each(logs, means)
  log_shares = jnp.where(
    is_seen.reshape(logs.shape), logs - normaliser[:, None], -jnp.inf
  )
  return shares[..., None] * means, log_shares, normaliser, removed


def _without_each(
  logs: Float[Array, 'H T'], means: Float[Array, 'H T d_k']
) -> Float[Array, 'H S d_k']:
  """Merges all segments but one, for each segment but the rest."""
  neutral = jnp.finfo(logs.dtype).min
  own = jnp.eye(logs.shape[1], dtype=bool)[:-1]
  others = jnp.where(own[None], neutral, logs[:, None])
  any_seen = jnp.any(others > neutral, axis=2, keepdims=True)
  shares = jnp.where(any_seen, jax.nn.softmax(others), 0)
  return jnp.einsum('hst,htd->hsd', shares, means)


def _gradients(
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_k'],
  members: Bool[Array, 'S N'],
) -> DemonstrationGradients:
  """Inner products of gradients, each relative to its largest key."""
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
  """The logarithm, `-inf` where rounding has left nothing."""
  return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def _label_direction(model, label, other_label) -> tuple[Array, Array]:
  """The difference of two logits as a function of the final state."""
  if model.head is None:
    row = model.embedding[label] - model.embedding[other_label]
    return row, jnp.zeros((), row.dtype)
  weight, bias = model.head
  row = weight[:, label] - weight[:, other_label]
  if bias is None:
    return row, jnp.zeros((), row.dtype)
  return row, bias[label] - bias[other_label]


def _carry_back(
  model: LanguageModel, readings: HeadReadings, direction: Array
) -> tuple[Array, tuple[Array, ...]]:
  """Carries the direction through the blocks, from the last to the first."""
  architecture = model.architecture

  def step(above, layer):
    block, point, outputs, removed = layer

    def frozen(row):
      return transformer.map_label(architecture, block, point, row)

    below = _transpose(frozen, above)
    of_heads = jnp.einsum('hdm,m->hd', block.output.weight, below)
    lost = jnp.sum(outputs, axis=1, keepdims=True) - removed
    bias = transformer.bias_of(
      architecture, block, point, jnp.zeros_like(above)
    )
    return below, (
      jnp.einsum('hsd,hd->hs', outputs, of_heads),
      jnp.einsum('hsd,hd->hs', lost, of_heads),
      bias @ above,
      below,
    )

  layers = (
    model.blocks,
    readings.points,
    readings.outputs,
    readings.removed_outputs,
  )
  return jax.lax.scan(step, direction, layers, reverse=True)


def _transpose(linear_fn: Callable[[Array], Array], row: Array) -> Array:
  """Applies the transpose of a linear map of one token to `row`."""
  return jax.vjp(linear_fn, jnp.zeros_like(row))[1](row)[0]
