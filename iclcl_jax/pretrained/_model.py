"""A language model as a pytree of parameters, and its forward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _pytree, _validate, kernels, transformer
from iclcl_jax._door import door
from iclcl_jax.transformer import Architecture, Block, Linear, Norm
from iclcl_jax.transformer._forward import normalise
from iclcl_jax.types import Array, Bool, Float, Int


@_pytree.dataclass(kw_only=True)
class LanguageModel:
  """A Transformer with its embeddings; `from_checkpoint` makes them.

  Attributes:
    embedding: of the words. Shape `[vocab, d_model]`.
    position_embedding: `[context, d_model]`, of learned positions, or None.
    token_type_embedding: `[types, d_model]`, of an encoder's segments, or None.
    embedding_norm: normalisation of the embedded tokens, or None.
    blocks: a `transformer.Block` with a leading axis `L` in all its arrays.
    final_norm: normalisation of the last block's output, or None.
    head: map to the vocabulary, or None. Weight `[d_model, vocab]`.
    architecture: what the shapes do not say.
    embedding_scale: factor of the embedded words, rounded to their dtype.
    logit_cap: the number `c` if logits `t` are capped, `c tanh(t / c)`.
    context_length: largest number of tokens.
    tied: whether the transposed embedding serves as the head. A model with
      neither is an encoder.
  """

  embedding: Float[Array, 'vocab d_model']
  position_embedding: Float[Array, 'context d_model'] | None = None
  token_type_embedding: Float[Array, 'types d_model'] | None = None
  embedding_norm: Norm | None = None
  blocks: Block
  final_norm: Norm | None = None
  head: Linear | None = None
  architecture: Architecture = _pytree.static()
  context_length: int = _pytree.static()
  tied: bool = _pytree.static(default=False)
  embedding_scale: float = _pytree.static(default=1.0)
  logit_cap: float | None = _pytree.static(default=None)

  @property
  def num_layers(self) -> int:
    """Number of blocks."""
    return self.blocks.query.weight.shape[0]

  @property
  def vocabulary_size(self) -> int:
    """Number of token ids."""
    return self.embedding.shape[0]


@door
def embed(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  *,
  mask: Bool[Array, ' N'] | None = None,
  token_types: Int[Array, ' N'] | None = None,
) -> Float[Array, 'N d_model']:
  """Embeds the tokens of a prompt: the input `[N, d_model]` of the first block.

  A prompt that is empty, longer than the context, or has an id outside the
  vocabulary is a `ValueError`; ids are looked at outside of `jit` and `vmap`.
  """
  check_prompt(model, tokens, mask)
  return embed_at(model, tokens, positions_of(tokens, mask), token_types)


def embed_at(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  positions: Int[Array, ' N'],
  token_types: Int[Array, ' N'] | None = None,
) -> Float[Array, 'N d_model']:
  """Embeds tokens at given positions, unchecked."""
  x = model.embedding[tokens]
  x = x * jnp.asarray(model.embedding_scale, x.dtype)
  if model.position_embedding is not None:
    x = x + model.position_embedding[positions]
  if model.token_type_embedding is not None:
    if token_types is None:
      token_types = jnp.zeros_like(tokens)
    x = x + model.token_type_embedding[token_types]
  elif token_types is not None:
    raise ValueError(
      'token_types were given to a model without embeddings of token types; '
      'expected None. Leave the argument out.'
    )
  return normalise(model.architecture, model.embedding_norm, x)


def positions_of(
  tokens: Int[Array, ' N'], mask: Bool[Array, ' N'] | None = None
) -> Int[Array, ' N']:
  """Returns the position of each token, `[N]`: how many valid ones before it.

  The padding may be on either side.

  Example:
    >>> tokens = jnp.array([0, 0, 7, 8])
    >>> print(positions_of(tokens, tokens > 0))
    [0 0 0 1]
  """
  if mask is None:
    return jnp.arange(tokens.shape[0])
  return jnp.maximum(jnp.cumsum(mask) - 1, 0)


@door
def hidden_states(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  *,
  mask: Bool[Array, ' N'] | None = None,
  token_types: Int[Array, ' N'] | None = None,
) -> Float[Array, 'N d_model']:
  """Runs the blocks over a prompt, as an encoder answers it.

  One sequence; `jax.vmap` makes batches, with a mask for each. Only one block
  is compiled. Returns the last block's output after the final normalisation,
  `[N, d_model]`; rows of padding mean nothing. Raises `ValueError` as `embed`.
  """
  x = embed(model, tokens, mask=mask, token_types=token_types)
  positions = positions_of(tokens, mask)
  x = transformer.apply_blocks(
    model.architecture, model.blocks, x, positions=positions, mask=mask
  )
  return normalise(model.architecture, model.final_norm, x)


@door
def unembed(
  model: LanguageModel, states: Float[Array, 'N d_model']
) -> Float[Array, 'N vocab']:
  """Maps rows of `hidden_states` to logits `[N, vocab]` over the vocabulary.

  Raises `ValueError` if the model is an encoder.
  """
  check_head(model)
  if model.head is None:
    result = jnp.einsum('nd,wd->nw', states, model.embedding)
  else:
    result = states @ model.head.weight
    if model.head.bias is not None:
      result = result + model.head.bias[None]
  cap = model.logit_cap
  return result if cap is None else kernels.cap(result, cap)


@door
def logits(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  *,
  mask: Bool[Array, ' N'] | None = None,
) -> Float[Array, 'N vocab']:
  """Scores the token after each token of a prompt: logits `[N, vocab]`.

  Rows of padding mean nothing. Raises `ValueError` as `embed` does, and if the
  model is an encoder.
  """
  return unembed(model, hidden_states(model, tokens, mask=mask))


@door
def next_token_logits(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  *,
  mask: Bool[Array, ' N'] | None = None,
) -> Float[Array, ' vocab']:
  """Scores the token after the last valid one of a prompt: logits `[vocab]`.

  Without the head at other positions. Raises `ValueError` as `logits` does.
  """
  states = hidden_states(model, tokens, mask=mask)
  return unembed(model, states[last_valid(tokens, mask)][None])[0]


def last_valid(
  tokens: Int[Array, ' N'], mask: Bool[Array, ' N'] | None
) -> Int[Array, '']:
  """Returns the index of the last token that is no padding."""
  if mask is None:
    return jnp.asarray(tokens.shape[0] - 1)
  return tokens.shape[0] - 1 - jnp.argmax(mask[::-1])


def check_model(model: Any) -> None:
  expected = (
    'a pretrained.LanguageModel. Unpack what load returns: model, tokenizer = '
    'pretrained.load(path)'
  )
  _validate.check_type('model', model, LanguageModel, expected)


def check_head(model: LanguageModel) -> None:
  check_model(model)
  if model.head is None and not model.tied:
    raise ValueError(
      'model is an encoder without a head over the vocabulary, so it has no '
      'logits. Use pretrained.hidden_states, or load a causal language model.'
    )


def check_causal_prompt(
  model: LanguageModel, tokens: Int[Array, ' N'], mask: Any
) -> None:
  """Checks a prompt, and that the model sees no token to come."""
  check_head(model)
  with jax.ensure_compile_time_eval():
    sees_ahead = bool(model.architecture.visible(*np.arange(2)))
  if sees_ahead:
    raise ValueError(
      'model is bidirectional: no token is the next one; expected a causal '
      'language model.'
    )
  check_prompt(model, tokens, mask)


def check_prompt(
  model: LanguageModel, tokens: Int[Array, ' N'], mask: Any = None
) -> None:
  """Checks a prompt; its ids and its mask only where they are concrete."""
  check_model(model)
  if jnp.iinfo(tokens.dtype).bits < 32:
    raise ValueError(
      f'tokens has dtype {tokens.dtype}; expected int32, which holds every id. '
      'Cast them with tokens.astype(jnp.int32).'
    )
  check_length(model, tokens.shape[0])
  check_ids(model, 'tokens', tokens)

  def check(mask: Any) -> None:
    if not np.any(mask):
      raise ValueError(
        'mask excludes every token, so the prompt is empty; expected at least '
        'one valid token.'
      )

  if mask is not None:
    _validate.look(check, mask)


def check_length(model: LanguageModel, length: int) -> None:
  if not 0 < length <= model.context_length:
    found = f'{length} tokens are asked of' if length else 'tokens is empty for'
    raise ValueError(
      f'{found} a model whose context is {model.context_length}; expected 1 to '
      'as many. Shorten the prompt, ask for fewer new tokens, or pass for an '
      "empty text the id of the tokenizer's beginning-of-text token."
    )


def check_text(
  model: LanguageModel, name: str, ids: Any, *, ranks: tuple[int, ...] = (1,)
) -> None:
  """Checks the ids of a text that may stand behind a prompt."""
  array = ids if hasattr(ids, 'dtype') else np.asarray(ids)
  is_integer = np.issubdtype(array.dtype, np.integer)
  if array.ndim not in ranks or not array.size or not is_integer:
    found = repr(ids) if array is not ids else f'{array.dtype}{[*array.shape]}'
    raise ValueError(
      f'{name} is {found}; expected the ids of a text, a list or an array [T] '
      "of at least one integer, such as tokenizer.encode(' very good', "
      'add_special_tokens=False). For a single token pass [id].'
    )
  check_ids(model, name, array)


def check_ids(model: LanguageModel, name: str, ids: Any) -> None:
  remedy = 'These are the vocabulary: use the tokenizer that belongs to it.'
  _validate.check_ids(name, ids, 0, model.vocabulary_size, remedy)


def check_room(
  model: LanguageModel,
  num_tokens: int,
  mask: Any,
  room: int,
  *,
  shorter: bool = False,
) -> None:
  """Checks that all lengths of a prompt rotate its tokens alike.

  So many tokens may follow it, and others be taken out if it gets `shorter`.
  """
  check_length(model, num_tokens + room)

  def check(switch: int, valid: Any) -> None:
    size = int(np.sum(valid))
    if (0 if shorter else size) <= switch < size + room:
      raise ValueError(
        f'a prompt of {size} tokens is read, {room} may follow and '
        f'{"some" if shorter else "none"} be taken out; but longer ones than '
        f'{switch} rotate all positions otherwise, those read before too. '
        'Expected lengths on one side: decode up to there, and prefill or '
        'score the other prompt anew. Inside jit and vmap leave the mask out, '
        'which may hide any number of tokens there.'
      )

  for layer in model.architecture.layers:
    if layer.rotation is not None and layer.rotation.beyond:
      switch = layer.rotation.beyond[0]
      valid = num_tokens if mask is None else mask
      if not _validate.look(functools.partial(check, switch), valid):
        # Any number may be valid.
        check(switch, num_tokens if shorter else min(num_tokens, switch))
