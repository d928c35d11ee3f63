"""What the answer loses without a demonstration: to first order, and exactly.

The demonstration is taken out of the training set of every head's dual model,
at every later token.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate, moments, transformer
from iclcl_jax._door import door, eager_door
from iclcl_jax._program import compiled
from iclcl_jax.precision import cast_like, widen
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.attribution import _readings
from iclcl_jax.pretrained.attribution._logits import Label, append, check_labels
from iclcl_jax.transformer import _forward
from iclcl_jax.types import Array, Bool, Float, Int

Removal = Literal['delete', 'hide']
_NONE = -2  # A segment without tokens.
_ROUNDING = 64  # So that many prompts share a program.


class _Question(NamedTuple):
  """A prompt with all but the last token of a label behind it.

  The answer is the sum of log-probabilities of ids, less that of others, each
  at its place.
  """

  tokens: Int[Array, ' N']
  segment_ids: Int[Array, ' N']
  valid: Bool[Array, ' N']
  places: Int[Array, ' T']
  ids: Int[Array, ' T']
  other_ids: Int[Array, ' T'] | None

  def without(self, segment: Any, removal: Removal) -> tuple[Array, Array]:
    """Returns which tokens stay, and the positions of all. Shapes `[N]`."""
    kept = self.valid & (self.segment_ids != segment)
    counted = self.valid if removal == 'hide' else kept
    return kept, _model.positions_of(self.tokens, counted)


@door
def influence(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  label: Label,
  other_label: Label,
  *,
  num_segments: int,
  removal: Removal = 'delete',
  mask: Bool[Array, ' N'] | None = None,
) -> Float[Array, 'L H S']:
  r"""Predicts what the answer loses without a demonstration: `[L, H, S]`.

  .. math:: I_{lhs} = \sum_t \frac{\partial y}{\partial o_{lht}} \cdot
    \bigl(o_{lht} - o^{\setminus s}_{lht}\bigr)

  with the answer :math:`y = \log p(a) - \log p(b)`, the outputs :math:`o` of
  the heads, and those of their dual models trained without the demonstration,
  summed over the tokens `t` that stay. Summed over layers and heads it is the
  change of `y` to first order: `y` with the demonstration less `y` without it.

  It ranks single deletions, and has most signs; the largest effect is often not
  its first. It promises no sizes, nothing of several removals, whose effects do
  not add, of a single head, whose terms cancel, or of a demonstration that
  holds the first token, where idle heads rest. `effects_of_removal` is exact.

  Args:
    segment_ids, num_segments, mask: as in `read_heads`; the answer is read
      behind the last valid token.
    label, other_label: ids of the labels, `[]` or `[T]` each.
    removal: 'delete' moves later tokens up as if the text were gone (influence
      leaves position embeddings that are added to tokens); 'hide' moves none.

  Raises `ValueError` as `attribute`; if the last token is of a demonstration
  (NaN under `jit` and `vmap`), or deletion may change how tokens rotate.
  """
  return _of_segments(
    lambda question: _influence(model, question, num_segments, removal),
    *(model, tokens, segment_ids, (label, other_label)),
    *(num_segments, removal, mask),
  )


def _influence(
  model: LanguageModel, question: _Question, num_segments: int, removal: Removal
) -> Float[Array, 'L H S']:
  def terms(block, x, outputs, slopes):
    def term(segment):
      kept, moved = question.without(segment, removal)
      lost = outputs - read(model, block, x, kept, moved)
      return jnp.einsum('htd,htd->h', slopes, jnp.where(kept[:, None], lost, 0))

    return jax.lax.map(term, jnp.arange(num_segments, dtype='int32')).T

  return first_order(model, question, terms)[0]


def first_order(
  model: LanguageModel,
  question: _Question,
  term: Callable[..., Any],
  *rows: Any,
) -> tuple[Any, Float[Array, '']]:
  """Carries the slope of an answer back through the blocks.

  Returns the answer, and before it what `term(block, x, outputs, slopes, *row)`
  returns of the stream before a block, its heads' outputs, and the answer's
  slope in them `[H, N, d_k]`; with a leading axis `L`, as the rows have.
  """
  architecture, valid = model.architecture, question.valid
  positions = _model.positions_of(question.tokens, valid)

  def complete(block, x, outputs):
    outputs = cast_like(outputs, x)
    return transformer.complete(architecture, block, x, outputs)

  def backward(gradient, block, x, *row):
    outputs, through_heads = jax.vjp(
      lambda x: read(model, block, x, valid, positions), x
    )
    _, through_rest = jax.vjp(functools.partial(complete, block), x, outputs)
    direct, slopes = through_rest(gradient)
    result = term(block, x, outputs, slopes, *row)
    return direct + through_heads(slopes)[0], result

  last, streams = _readings.scan_layers(
    model, question.tokens, valid, lambda block, x, *_: x
  )
  answer, gradient = jax.value_and_grad(
    lambda x: answer_of(model, question, x[question.places])
  )(last)
  results = transformer.scan_blocks(
    architecture, model.blocks, backward, gradient, streams, *rows, reverse=True
  )[1]
  return results, answer


def read(
  model: LanguageModel,
  block: transformer.Block,
  x: Array,
  kept: Array,
  positions: Array,
  rates: Array | None = None,
) -> Float[Array, 'H N d_k']:
  heads = transformer.heads(model.architecture, block, x, positions=positions)
  heads = heads._replace(values=widen(heads.values))
  return transformer.attend(
    model.architecture, heads, positions, positions, mask=kept, rates=rates
  )


def answer_of(
  model: LanguageModel, question: _Question, rows: Float[Array, 'T d_model']
) -> Float[Array, '']:
  states = _forward.normalise(model.architecture, model.final_norm, rows)
  scores = jax.nn.log_softmax(widen(_model.unembed(model, states)))

  def total(ids):
    return jnp.sum(jnp.take_along_axis(scores, ids[:, None], axis=1))

  if question.other_ids is None:
    return total(question.ids)
  return total(question.ids) - total(question.other_ids)


@eager_door
def effects_of_removal(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  label: Label,
  other_label: Label,
  *,
  num_segments: int,
  removal: Removal = 'delete',
  mask: Bool[Array, ' N'] | None = None,
  num_rows: int | None = None,
) -> Float[Array, ' S']:
  """Computes what the answer loses without each demonstration: `[S]`.

  The answer is the log-probability of a label less that of the other. It is
  computed exactly, for all removals in one pass over a packed prompt: behind
  the prompt stand, for each demonstration, copies of the tokens after it that
  do not see it. Tokens before a demonstration stand there once.

  Takes what `influence` takes, and raises `ValueError` as it does. `num_rows`
  are those of the packed prompt, one program for all prompts; by default what
  these demonstrations need, or what any could, under `jit` and `vmap`. With too
  few rows all effects are NaN.
  """
  if num_rows is not None:
    _validate.at_least(len(tokens), num_rows=num_rows)
  elif _validate.is_concrete(segment_ids, mask):
    num_rows = _count_rows(segment_ids, num_segments, mask)
  labels = label, other_label
  return _effects_of_removal(
    model, tokens, segment_ids, *labels, num_segments, removal, mask, num_rows
  )


def _count_rows(segment_ids: Any, num_segments: int, mask: Any) -> int:
  """Counts the tokens of a prompt, and the copies of those after segments."""
  ids = np.asarray(segment_ids)
  inside = ids == np.arange(num_segments)[:, None]
  behind = (np.cumsum(inside, axis=1) > 0) & ~inside
  copies = np.sum(behind if mask is None else behind & np.asarray(mask))
  return -(-int(len(ids) + copies) // _ROUNDING) * _ROUNDING


@compiled
def _effects_of_removal(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  label: Label,
  other_label: Label,
  num_segments: int,
  removal: Removal,
  mask: Bool[Array, ' N'] | None,
  num_rows: int | None,
) -> Float[Array, ' S']:
  def effects(question):
    answers = _answers(model, question, num_segments, removal, num_rows)
    return answers[-1] - answers[:-1]

  return _of_segments(
    effects,
    *(model, tokens, segment_ids, (label, other_label)),
    *(num_segments, removal, mask),
  )


def _answers(
  model, question: _Question, num_segments: int, removal: Removal, num_rows
) -> Float[Array, ' W']:
  """Answers without each demonstration, and behind the prompt itself."""
  architecture = model.architecture
  segments = jnp.array([*range(num_segments), _NONE], 'int32')

  def world(segment):
    begun = jnp.cumsum(question.segment_ids == segment) > 0
    kept, positions = question.without(segment, removal)
    return kept & (begun | (segment == _NONE)), kept, positions

  stands, kept, positions = jax.vmap(world)(segments)
  shape = stands.shape
  if num_rows is None:
    num_rows = stands.size
  else:  # Tokens of the label stand in all worlds.
    num_rows = min(num_rows + shape[0] * (len(question.ids) - 1), stands.size)
  # Row of each token of each world, and world and token of each row: a token
  # has one of its own where something before it is missing.
  rows = (jnp.cumsum(stands) - 1).reshape(shape)
  rows = jnp.where(stands, rows, rows[-1:])
  flat = jnp.flatnonzero(stands, size=num_rows, fill_value=0)
  owner, token = jnp.divmod(flat, shape[1])
  row_positions = positions[owner, token]

  def layer(x, block):
    heads = transformer.heads(architecture, block, x, positions=row_positions)

    def attend(world):
      rows, kept, positions = world
      inside = heads._replace(
        queries=heads.queries[:, rows],
        keys=heads.keys[:, rows],
        values=heads.values[:, rows],
      )
      return transformer.attend(
        architecture, inside, positions, positions, mask=kept
      )

    outputs = jax.lax.map(attend, (rows, kept, positions))
    outputs = jnp.swapaxes(outputs[owner, :, token], 0, 1)
    return transformer.complete(architecture, block, x, outputs), None

  x = _model.embed_at(model, question.tokens[token], row_positions)
  x = moments.visible(x, kept[owner, token])
  x, _ = transformer.scan_blocks(architecture, model.blocks, layer, x)
  answers = jax.vmap(lambda read: answer_of(model, question, x[read]))(
    rows[:, question.places]
  )
  return jnp.where(jnp.sum(stands) <= num_rows, answers, jnp.nan)


def _of_segments(
  of_question, model, tokens, segment_ids, labels, num_segments, removal, mask
) -> Array:
  """Returns what is lost without each segment, NaN for the one that is read."""
  _model.check_causal_prompt(model, tokens, mask)
  _readings.check_segments(segment_ids, num_segments)
  _validate.look(_check_query, mask, segment_ids)
  if removal not in get_args(Removal):
    raise ValueError(
      f"removal is {removal!r}; expected 'delete' or 'hide', see the docstring."
    )
  _model.check_room(model, len(tokens), mask, 0, shorter=removal == 'delete')
  segment_ids = jnp.asarray(segment_ids, 'int32')
  asked = of_question, model, tokens, segment_ids, *labels, mask
  result = difference(*asked)
  last = segment_ids[_model.last_valid(tokens, mask)]
  is_read = jnp.arange(num_segments, dtype='int32') == last
  factors = jnp.where(is_read, jnp.nan, jnp.ones((), result.dtype))
  return jnp.einsum('...s,s->...s', result, factors)


def difference(
  of_question, model, tokens, segment_ids, label, other_label, mask
) -> Any:
  """Returns what is found of a label, less what is found of the other.

  Single tokens are one question. Without `segment_ids` all tokens are the rest.
  """
  if other_label is None:
    raise ValueError('other_label is None; expected the ids of another label.')
  if segment_ids is None:
    segment_ids = jnp.full(len(tokens), -1, 'int32')

  def answer(ids, other_ids):
    ids, whole, valid, places = append(model, tokens, ids, mask)
    rest = len(whole) - len(tokens)
    segments = jnp.pad(segment_ids, (0, rest), constant_values=-1)
    return of_question(
      _Question(whole, segments, valid, places, ids, other_ids)
    )

  if check_labels(model, label, other_label):
    return jax.tree.map(
      jnp.subtract, answer(label, None), answer(other_label, None)
    )
  return answer(label, jnp.asarray(other_label, tokens.dtype)[None])


def _check_query(mask: Any, segment_ids: Any) -> None:
  last = np.flatnonzero(np.ones(len(segment_ids)) if mask is None else mask)[-1]
  if np.asarray(segment_ids)[last] >= 0:
    raise ValueError(
      f'segment_ids puts token {last}, the last one, into a demonstration; '
      'expected -1: the answer is read there. End the prompt with the query.'
    )
