r"""A language model whose heads learn otherwise.

Each head answers by a dual model that has taken every token that it sees, with
the same rate, in one step on the contrastive loss. A `Learning` says what
changes: the rate of each token, where tokens stand, or the loss, and so the
attention. `logits` runs the model with it, and `effect_on_answer` tells what an
answer gains: predicted to first order, and as it is.

=====================================  =====================================
``with_rates(segment_ids, rates)``     demonstrations learnt more, less, not
``alone(segment_ids, ...)``            each encoded without the others, their
                                       states merged: no order is left
``Learning(attend=...)``               any attention of `modified`: another
                                       loss, a ridge, negatives, a second step
=====================================  =====================================
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate, modified, moments, transformer
from iclcl_jax._door import door
from iclcl_jax.precision import cast_like, widen
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.attribution import _influence
from iclcl_jax.pretrained.attribution._logits import Label
from iclcl_jax.pretrained.attribution._readings import check_segments
from iclcl_jax.transformer._forward import normalise
from iclcl_jax.types import Array, Bool, Float, Int


class Learning(NamedTuple):
  """How heads learn from the tokens of one prompt.

  Attributes:
    rates: rate with which the dual model of each token, a row, learns each
      token; 0 takes it out. What no token saw stays unseen. Shape `[N, N]`;
      None for 1.
    positions: where tokens stand, for rotations and windows. Shape `[N]`; None
      for where they are.
    attend: an attention of `modified`, whose `causal` door answers in place of
      the softmax; None for the softmax. It takes no rates.
  """

  rates: Float[Array, 'N N'] | None = None
  positions: Int[Array, ' N'] | None = None
  attend: modified.Attention | None = None


class Effect(NamedTuple):
  """What another learning adds to an answer.

  `predicted` `[L, H]` is through each head alone, to first order: the sum
  predicts what it adds, `actual`; single terms may cancel.
  """

  predicted: Float[Array, 'L H']
  actual: Float[Array, '']


@door
def with_rates(
  segment_ids: Int[Array, ' N'], rates: Float[Array, ' S']
) -> Learning:
  """Lets every demonstration be learnt with a rate of its own.

  By all tokens but its own, which see each other as before; a rate of 0 hides
  the demonstration. Rates `[S]` are not negative; `segment_ids` `[N]` are the
  demonstration of each token, -1 for the rest.

  Example:
    >>> segments = jnp.array([-1, 0, 0, -1])
    >>> with_rates(segments, jnp.array([0.5])).rates[3].tolist()
    [1.0, 0.5, 0.5, 1.0]
  """
  check_segments(segment_ids, rates.shape[0])
  of_tokens = jnp.where(segment_ids < 0, 1, rates[segment_ids])
  own = segment_ids[:, None] == segment_ids[None]
  return Learning(rates=jnp.where(own, 1, of_tokens[None]))


@door
def alone(
  segment_ids: Int[Array, ' N'],
  *,
  num_segments: int,
  share_positions: bool = True,
  mask: Bool[Array, ' N'] | None = None,
) -> Learning:
  """Encodes each demonstration without the others, and merges their states.

  A demonstration sees itself and what stands before all of them; what is
  behind sees everything.

  Args:
    segment_ids: demonstration of each token, -1 for the rest, each of tokens in
      a row. Shape `[N]`.
    num_segments: number of demonstrations `S`.
    share_positions: whether all stand in the place of the first, and what is
      behind them behind the longest: then their order changes nothing. Models
      whose embeddings hold positions keep those.
    mask: which tokens are no padding, as it is given to `logits`. Shape `[N]`.

  Example:
    >>> segments = jnp.array([-1, 0, 0, 1, -1])
    >>> alone(segments, num_segments=2).positions.tolist()
    [0, 1, 2, 1, 3]
  """
  check_segments(segment_ids, num_segments)
  segment_ids = jnp.asarray(segment_ids, 'int32')
  inside = segment_ids >= 0
  before = jnp.cumsum(inside) == 0
  behind = ~inside & ~before
  own = inside[:, None] & (segment_ids[:, None] == segment_ids[None])
  rates = (behind[:, None] | before[None] | own).astype('float32')
  if not share_positions:
    return Learning(rates)

  def count(members):
    if mask is not None:
      members &= jnp.broadcast_to(mask, members.shape)
    return jnp.cumsum(members, axis=-1, dtype='int32')

  # The place of a token in its demonstration, and the length of the longest.
  place = jnp.diagonal(count(own))
  longest = jnp.where(behind, jnp.max(place), 0)
  positions = count(before) + place + longest + count(behind) - 1
  return Learning(rates, positions)


@door
def logits(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  learning: Learning,
  *,
  heads: Bool[Array, 'L H'] | None = None,
  mask: Bool[Array, ' N'] | None = None,
) -> Float[Array, 'N vocab']:
  """Scores the token after each token, with heads that learn otherwise.

  With `heads` these heads alone. The mask and what is a `ValueError` are as in
  `pretrained.logits`; so is learning of another number of tokens, or with rates
  and an attention both, and an attention where the model has sinks or windows,
  which no attention of a loss knows.
  """
  _check(model, tokens, learning, mask)
  valid = jnp.ones(tokens.shape, bool) if mask is None else mask
  x = _run(model, learning, tokens, heads, valid)
  states = normalise(model.architecture, model.final_norm, x)
  return _model.unembed(model, states)


@door
def effect_on_answer(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  learning: Learning,
  label: Label,
  other_label: Label,
  *,
  heads: Bool[Array, 'L H'] | None = None,
  mask: Bool[Array, ' N'] | None = None,
) -> Effect:
  r"""Predicts and computes what another learning adds to an answer.

  The answer is the log-probability of a label less that of the other, behind
  the prompt. Predicted is

  .. math:: \sum_t \frac{\partial y}{\partial o_{lht}} \cdot
    \bigl(o'_{lht} - o_{lht}\bigr)

  with the outputs :math:`o` of a head, and :math:`o'` of its dual model that
  has learnt otherwise from the same tokens. Tokens of a label behind the first
  learn as the last token of the prompt does.

  Takes what `logits` takes, raises `ValueError` as it does, and for labels as
  `attribution.influence`.
  """
  _check(model, tokens, learning, mask)
  chosen = _chosen(model, heads)

  def of_question(question):
    changed = _extend(learning, question)
    valid = question.valid

    def term(block, x, outputs, slopes, chosen):
      gained = _outputs(model, changed, block, x, valid) - outputs
      gained = jnp.where(valid[:, None], gained, 0)
      return jnp.where(chosen, jnp.einsum('htd,htd->h', slopes, gained), 0)

    predicted, plain = _influence.first_order(model, question, term, chosen)
    x = _run(model, changed, question.tokens, heads, valid)
    actual = _influence.answer_of(model, question, x[question.places])
    return Effect(predicted, actual - plain)

  return _influence.difference(
    of_question, model, tokens, None, label, other_label, mask
  )


def _run(
  model: LanguageModel,
  learning: Learning,
  tokens: Array,
  heads: Array | None,
  valid: Array,
) -> Float[Array, 'N d_model']:
  architecture = model.architecture
  positions = _model.positions_of(tokens, valid)

  def layer(x, block, chosen):
    x = moments.visible(x, valid)
    outputs = _outputs(model, learning, block, x, valid)
    if heads is not None:
      plain = _influence.read(model, block, x, valid, positions)
      outputs = jnp.where(chosen[:, None, None], outputs, plain)
    outputs = cast_like(outputs, x)
    return transformer.complete(architecture, block, x, outputs), None

  x = _model.embed_at(model, tokens, positions)
  chosen = _chosen(model, heads)
  x, _ = transformer.scan_blocks(architecture, model.blocks, layer, x, chosen)
  return x


def _outputs(
  model: LanguageModel,
  learning: Learning,
  block: transformer.Block,
  x: Array,
  valid: Array,
) -> Float[Array, 'H N d_k']:
  """Outputs of all heads of a block that learn otherwise, widened."""
  architecture = model.architecture
  rates, positions = learning.rates, learning.positions
  if positions is None:
    positions = _model.positions_of(x, valid)
  else:  # What stands behind a token stays hidden from it.
    rates = jnp.tril(jnp.ones((len(x), len(x))) if rates is None else rates)
  if learning.attend is None:
    return _influence.read(model, block, x, valid, positions, rates)
  heads = transformer.heads(architecture, block, x, positions=positions)
  share = len(heads.queries) // len(heads.keys)
  root = jnp.asarray(architecture.query_scale**0.5, x.dtype)  # Of the kernel.

  def answer(row):
    queries, keys, values = row
    return learning.attend.causal(
      architecture.kernel, queries / root, keys * root, values, mask=valid
    )

  keys, values = heads.keys, widen(heads.values)
  rows = heads.queries, *(jnp.repeat(a, share, axis=0) for a in (keys, values))
  return jax.lax.map(answer, rows)


def _chosen(model: LanguageModel, heads: Array | None) -> Bool[Array, 'L H']:
  num_layers, _, num_heads, _ = model.blocks.query.weight.shape
  if heads is None:
    return jnp.ones((num_layers, num_heads), bool)
  _validate.check_same('L', 'heads', heads.shape[0], 'model', num_layers)
  _validate.check_same('H', 'heads', heads.shape[1], 'model', num_heads)
  return jnp.asarray(heads)


def _extend(learning: Learning, question: Any) -> Learning:
  """Lets the tokens of a label learn as the last one of the prompt does."""
  rates, positions = learning.rates, learning.positions
  last = question.places[0]
  if rates is not None:
    rest = len(question.tokens) - len(rates)
    rows = jnp.broadcast_to(rates[last], (rest, len(rates)))
    rates = jnp.concatenate([rates, rows])
    rates = jnp.pad(rates, [(0, 0), (0, rest)], constant_values=1)
  if positions is not None:
    rest = len(question.tokens) - len(positions)
    after = positions[last] + 1 + jnp.arange(rest, dtype=positions.dtype)
    positions = jnp.concatenate([positions, after])
  return learning._replace(rates=rates, positions=positions)


def _check(model: LanguageModel, tokens: Array, learning: Any, mask) -> None:
  _model.check_causal_prompt(model, tokens, mask)
  if learning.positions is not None:
    _model.check_room(model, len(tokens), mask, 0, shorter=True)
  if learning.rates is not None:
    _validate.look(_check_rates, learning.rates)
  if learning.attend is None:
    return
  expected = 'an attention of modified, such as modified.second_step()'
  kind = modified.Attention
  _validate.check_type('learning.attend', learning.attend, kind, expected)
  windows = [layer.window for layer in model.architecture.layers]
  for name, has in {
    'rates': learning.rates is not None,
    'sinks without tokens in the model': model.blocks.sinks is not None,
    'windows in the model': any(windows),
  }.items():
    if has:
      raise ValueError(
        f'learning.attend was given beside {name}, which the attention of a '
        'loss does not know; expected one of them. Leave attend out for the '
        'softmax, which knows all.'
      )


def _check_rates(rates: Any) -> None:
  rates = np.asarray(rates, np.float64)
  wrong = rates[~(np.isfinite(rates) & (rates >= 0))]
  if wrong.size:
    raise ValueError(
      f'learning.rates holds {wrong[0]}; expected finite numbers from 0 on.'
    )
