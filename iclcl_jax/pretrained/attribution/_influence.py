"""What the answer loses without a demonstration: to first order, and exactly.

The demonstration is taken out of the training set of every head's dual model,
at every later token.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from iclcl_jax import _validate, transformer
from iclcl_jax._door import door, eager_door
from iclcl_jax._program import compiled
from iclcl_jax.precision import widen
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.attribution import _checks
from iclcl_jax.pretrained.attribution._logits import Label, append
from iclcl_jax.transformer import _forward
from iclcl_jax.types import Array, Bool, Float

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

  @property
  def positions(self) -> Array:
    """Position of each token. Shape `[N]`."""
    return _model.positions_of(self.tokens, self.valid)

  def kept_without(self, segment: Array | int) -> Array:
    """Which tokens are left without a demonstration. Shape `[N]`."""
    return self.valid & (self.segment_ids != segment)

  def positions_without(self, segment: Array | int, removal: Removal) -> Array:
    """Their positions. Shape `[N]`."""
    if removal == 'hide':
      return self.positions
    return _model.positions_of(self.tokens, self.kept_without(segment))


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
  r"""Predicts what the answer loses if a demonstration is removed.

  .. math:: I_{lhs} = \sum_t \frac{\partial y}{\partial o_{lht}} \cdot
    \bigl(o_{lht} - o^{\setminus s}_{lht}\bigr)

  with the answer :math:`y = \log p(a) - \log p(b)`, the outputs :math:`o` of
  the heads, and those of their dual models trained without the demonstration,
  summed over the tokens `t` that stay. Summed over layers and heads it is the
  change of `y` to first order: `y` with the demonstration less `y` without it.

  It screens single deletions: which one matters, and in most cases its sign. It
  promises no sizes, nothing of several removals at once, whose effects do not
  add, of a single head, whose terms cancel, or of a demonstration that holds
  the first token, where idle heads rest. `effects_of_removal` is exact.

  Args:
    segment_ids, num_segments, mask: as in `read_heads`; the answer is read
      behind the last valid token.
    label, other_label: ids of the labels, `[]` or `[T]` each.
    removal: 'delete' moves later tokens up as if the text were gone (influence
      leaves position embeddings that are added to tokens); 'hide' moves none.

  Returns:
    The terms. Shape `[L, H, S]`.

  Raises:
    ValueError: as `attribute`; if the last token belongs to a demonstration
      (NaN under `jit` and `vmap`), or deletion may change how tokens rotate.

  References:
    Pruthi et al., arXiv:2002.08484 (TracIn), the same first order for the
    examples of a training set.
  """
  questions = _ask(
    model, tokens, segment_ids, label, other_label, num_segments, removal, mask
  )
  terms = [_influence(model, x, num_segments, removal) for x in questions]
  return _difference(terms, questions[0])


def _influence(
  model: LanguageModel, question: _Question, num_segments: int, removal: Removal
) -> Float[Array, 'L H S']:
  architecture = model.architecture
  segments = jnp.arange(num_segments, dtype=question.segment_ids.dtype)

  def attend(block, x, positions, kept):
    heads = transformer.heads(architecture, block, x, positions=positions)
    return transformer.attend(
      architecture, heads, positions, positions, mask=kept
    )

  def read(block, x):
    return attend(block, x, question.positions, question.valid)

  def forward(x, block):
    x = _forward.clear(x, question.valid)
    return transformer.complete(architecture, block, x, read(block, x)), x

  def backward(gradient, block, x):
    outputs, through_heads = jax.vjp(lambda x: read(block, x), x)

    def complete(x, outputs):
      return transformer.complete(architecture, block, x, outputs)

    direct, of_outputs = jax.vjp(complete, x, outputs)[1](gradient)

    def term(segment):
      kept = question.kept_without(segment)
      moved = question.positions_without(segment, removal)
      lost = jnp.where(
        kept[:, None], outputs - attend(block, x, moved, kept), 0
      )
      return jnp.einsum('htd,htd->h', widen(of_outputs), widen(lost))

    terms = jax.lax.map(term, segments).T
    return direct + through_heads(of_outputs)[0], terms

  x = _model.embed_at(model, question.tokens, question.positions)
  last, streams = transformer.scan_blocks(
    architecture, model.blocks, forward, x
  )
  gradient = jax.grad(lambda x: _answer(model, question, x[question.places]))
  return transformer.scan_blocks(
    architecture, model.blocks, backward, gradient(last), streams, reverse=True
  )[1]


def _answer(
  model: LanguageModel, question: _Question, rows: Float[Array, 'T d_model']
) -> Float[Array, '']:
  """Reads the answer off the residual stream at the places."""
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
  """Computes what the answer loses if each demonstration is removed.

  The answer is the log-probability of a label less that of the other. It is
  computed exactly, for all removals in one pass over a packed prompt: behind
  the prompt stand, for each demonstration, copies of the tokens after it that
  do not see it. Tokens before a demonstration stand there once.

  Takes what `influence` takes, and raises `ValueError` as it does.

  Args:
    num_rows: rows of the packed prompt, one program for all prompts; by default
      what these demonstrations need, or what any could, under `jit` and `vmap`.
      With too few rows all effects are NaN.

  Returns:
    The answer less the one without the demonstration. Shape `[S]`.
  """
  if num_rows is not None:
    _validate.at_least(len(tokens), num_rows=num_rows)
  questions = _ask(
    model, tokens, segment_ids, label, other_label, num_segments, removal, mask
  )
  effects = []
  for question in questions:
    stands = _worlds(question, num_segments, removal).stands
    known = num_rows is None and _validate.is_concrete(stands)
    room = num_rows or stands.size
    if known:
      needed = -(-int(np.sum(stands)) // _ROUNDING) * _ROUNDING
      room = min(needed, stands.size)
    effects.append(
      _effects_of_removal(model, question, num_segments, removal, room)
    )
  return _difference(effects, questions[0])


def _difference(results: list[Array], question: _Question) -> Array:
  """What one label loses, less what the other does, over segments `[..., S]`.

  Without the token that is read nothing is left to read.
  """
  result = results[0] if len(results) == 1 else results[0] - results[1]
  read = question.segment_ids[question.places[0]]
  is_read = jnp.arange(result.shape[-1], dtype=read.dtype) == read
  factors = jnp.where(is_read, jnp.nan, jnp.ones((), result.dtype))
  return jnp.einsum('...s,s->...s', result, factors)


class _Worlds(NamedTuple):
  """The prompt, and what it is without each demonstration."""

  stands: Bool[Array, 'W N']  # Tokens that are not shared with the first.
  kept: Bool[Array, 'W N']
  positions: Int[Array, 'W N']


def _worlds(
  question: _Question, num_segments: int, removal: Removal
) -> _Worlds:
  def without(segment):
    kept = question.kept_without(segment)
    begun = jnp.cumsum(question.segment_ids == segment) > 0
    positions = question.positions_without(segment, removal)
    return _Worlds(begun & kept, kept, positions)

  segments = jnp.arange(num_segments, dtype=question.segment_ids.dtype)
  worlds = jax.vmap(without)(
    jnp.append(jnp.asarray(_NONE, segments.dtype), segments)
  )
  return worlds._replace(stands=worlds.stands.at[0].set(True))


@compiled
def _effects_of_removal(
  model: LanguageModel,
  question: _Question,
  num_segments: int,
  removal: Removal,
  num_rows: int,
) -> Float[Array, ' S']:
  architecture = model.architecture
  worlds = _worlds(question, num_segments, removal)
  stands, shape = worlds.stands, worlds.stands.shape
  # Row of each token of each world, and world and token of each row.
  rows = (jnp.cumsum(stands) - 1).reshape(shape)
  rows = jnp.where(stands, rows, rows[:1])
  flat = jnp.flatnonzero(stands, size=num_rows, fill_value=0)
  owner, token = jnp.divmod(flat, shape[1])
  positions = worlds.positions[owner, token]

  def layer(x, block):
    heads = transformer.heads(architecture, block, x, positions=positions)

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

    outputs = jax.lax.map(attend, (rows, worlds.kept, worlds.positions))
    outputs = jnp.swapaxes(outputs[owner, :, token], 0, 1)
    return transformer.complete(architecture, block, x, outputs), None

  x = _model.embed_at(model, question.tokens[token], positions)
  x = _forward.clear(x, worlds.kept[owner, token])
  x, _ = transformer.scan_blocks(architecture, model.blocks, layer, x)
  answers = jax.vmap(lambda read: _answer(model, question, x[read]))(
    rows[:, question.places]
  )
  enough = jnp.sum(stands) <= num_rows
  return (answers[0] - answers[1:]) * jnp.where(enough, 1, jnp.nan)


def _ask(
  model, tokens, segment_ids, label, other_label, num_segments, removal, mask
) -> list[_Question]:
  """Checks a prompt and its labels; one question if both are single tokens."""
  if other_label is None:
    raise ValueError('other_label is None; expected the ids of another label.')
  _model.check_causal_prompt(model, tokens, mask)
  _checks.check_segments(segment_ids, num_segments)
  _checks.check_query(segment_ids, mask)
  if removal not in get_args(Removal):
    raise ValueError(
      f"removal is {removal!r}; expected 'delete' or 'hide', see the docstring."
    )

  def ask(ids, other_ids):
    ids, whole, valid, places = append(model, tokens, ids, mask)
    rest = len(whole) - len(tokens)
    segments = jnp.asarray(segment_ids, 'int32')
    segments = jnp.pad(segments, (0, rest), constant_values=-1)
    return _Question(whole, segments, valid, places, ids, other_ids)

  if _checks.check_labels(model, label, other_label):
    questions = [ask(label, None), ask(other_label, None)]
  else:
    questions = [ask(label, jnp.asarray(other_label, tokens.dtype)[None])]
  switches = _model.switches(model)
  if removal == 'delete' and any(len(tokens) > x for x in switches):
    raise ValueError(
      f'tokens are {len(tokens)}, more than those of prompts that the model '
      'rotates otherwise; expected fewer. Call pretrained.score_labels on each '
      'shortened prompt.'
    )
  return questions
