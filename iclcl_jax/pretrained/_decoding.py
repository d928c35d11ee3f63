"""Greedy decoding with cached keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, transformer
from iclcl_jax._door import door
from iclcl_jax._mesh import vary_as
from iclcl_jax._program import compiled
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.transformer._forward import normalise
from iclcl_jax.types import Array, Bool, Float, Int


@_pytree.with_short_repr
class KeyValueCache(NamedTuple):
  """Keys and values of the tokens so far, in `S` slots filled from the left.

  Attributes:
    keys, values: of each layer and key-value head; keys are rotated.
    positions: position of the token in each slot. Shape `[S]`.
    mask: slots that hold a token which is no padding. Shape `[S]`.
    length: number of slots in use. Shape `[]`.
  """

  keys: Float[Array, 'L G S d_k']
  values: Float[Array, 'L G S d_k']
  positions: Int[Array, ' S']
  mask: Bool[Array, ' S']
  length: Int[Array, '']


@door
def prefill(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  *,
  cache_length: int,
  mask: Bool[Array, ' N'] | None = None,
) -> tuple[Float[Array, ' vocab'], KeyValueCache]:
  """Reads a whole prompt; returns the logits after it, and a new cache.

  It is a `ValueError` if the prompt is empty or has an id outside the
  vocabulary, the cache of `cache_length` slots is shorter than the prompt or
  longer than the context, or the model is an encoder, or rotates otherwise in
  prompts as long as the cache.
  """
  _model.check_causal_prompt(model, tokens, mask)
  num_tokens = tokens.shape[0]
  _validate.at_least(num_tokens, cache_length=cache_length)
  _model.check_room(model, num_tokens, mask, cache_length - num_tokens)
  num_layers, _, num_groups, width = model.blocks.key.weight.shape
  shape = num_layers, num_groups, cache_length, width
  zeros = jnp.zeros(shape, model.embedding.dtype)
  slots = jnp.arange(cache_length)
  cache = KeyValueCache(zeros, zeros, slots, slots < 0, jnp.asarray(0))
  valid = jnp.ones(num_tokens, bool) if mask is None else mask
  positions = _model.positions_of(tokens, mask)
  states, cache = _extend(model, cache, tokens, positions, valid)
  last = states[_model.last_valid(tokens, mask)]
  return _model.unembed(model, last[None])[0], cache


@compiled
def decode_step(
  model: LanguageModel, cache: KeyValueCache, token: int | Int[Array, '']
) -> tuple[Float[Array, ' vocab'], KeyValueCache]:
  """Reads one more token; returns the logits after it, and the longer cache.

  By the model that filled the cache. A full one, or an id outside the
  vocabulary, is a `ValueError`; looked at outside of `jit` and `vmap`.
  """
  _model.check_model(model)
  expected = 'the KeyValueCache that prefill or decode_step returned'
  _validate.check_type('cache', cache, KeyValueCache, expected)
  remedy = 'Call prefill with a larger cache_length.'
  _validate.check_room('cache', len(cache.mask), remedy, cache.length, 1)
  _model.check_text(model, 'token', token, ranks=(0,))
  token = jnp.asarray(token)
  position = jnp.sum(cache.mask, dtype=cache.positions.dtype)[None]
  valid = jnp.ones(1, bool)
  states, cache = _extend(model, cache, token[None], position, valid)
  return _model.unembed(model, states)[0], cache


@door
def generate(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  *,
  num_tokens: int,
  mask: Bool[Array, ' N'] | None = None,
) -> Int[Array, ' T']:
  """Continues a prompt by the likeliest token each time: new ids `[T]`.

  So many as `num_tokens`; the caller cuts them at an end-of-text token. One
  prompt: `jax.vmap` over tokens and masks makes batches of prompts that were
  padded to one length on either side. It is a `ValueError` if the prompt is
  empty or has an id outside the vocabulary, the continued prompt does not fit
  into the context, or the model is an encoder.
  """
  _validate.at_least(1, num_tokens=num_tokens)
  scores, cache = prefill(
    model, tokens, cache_length=tokens.shape[0] + num_tokens, mask=mask
  )

  def step(carry, _):
    scores, cache = carry
    token = jnp.argmax(scores).astype(tokens.dtype)
    return decode_step(model, cache, token), token

  # The last token is not read again.
  (scores, _), generated = jax.lax.scan(
    step, (scores, cache), length=num_tokens - 1
  )
  last = jnp.argmax(scores).astype(tokens.dtype)
  return jnp.concatenate([generated, last[None]])


@door
def score_labels(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  labels: Sequence[Any],
  *,
  mask: Bool[Array, ' N'] | None = None,
) -> Float[Array, ' K']:
  """Returns log-probabilities `[K]` of texts that may stand behind a prompt.

  Of any length each: the sum over its tokens. The prompt is read once. Labels
  are the ids `[T]` of each text, those of `tokenizer.encode(' very good',
  add_special_tokens=False)`; `[[3], [5]]` for two single tokens.

  Raises `ValueError` as `generate`; if there is no label, or one has no token.
  """
  if not isinstance(labels, Sequence) or not labels:
    raise ValueError(
      f'labels is {_validate.describe(labels)}; expected a list of at least '
      'one label, each the ids [T] of a text.'
    )
  for number, ids in enumerate(labels):
    _model.check_text(model, f'labels[{number}]', ids)
  sizes = [len(ids) for ids in labels]
  longest = max(sizes)
  rows = [jnp.asarray(ids, tokens.dtype) for ids in labels]
  padded = jnp.stack([jnp.pad(x, (0, longest - len(x))) for x in rows])
  scores, cache = prefill(
    model, tokens, cache_length=tokens.shape[0] + longest - 1, mask=mask
  )
  start = jnp.sum(cache.mask, dtype=cache.positions.dtype)
  positions = start + jnp.arange(longest - 1, dtype=start.dtype)

  def score(ids, size):
    logits = scores[None]
    if longest > 1:
      valid = jnp.ones(longest - 1, bool)
      states, _ = _extend(model, cache, ids[:-1], positions, valid)
      logits = jnp.concatenate([logits, _model.unembed(model, states)])
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], 1)
    return jnp.sum(jnp.where(jnp.arange(longest) < size, found[:, 0], 0))

  return jax.vmap(score)(padded, jnp.array(sizes))


def _extend(
  model: LanguageModel,
  cache: KeyValueCache,
  tokens: Int[Array, ' N'],
  positions: Int[Array, ' N'],
  mask: Bool[Array, ' N'],
) -> tuple[Float[Array, 'N d_model'], KeyValueCache]:
  tokens, cache = vary_as((tokens, cache), model, positions, mask)
  start = cache.length
  cache = cache._replace(
    positions=_write(cache.positions, positions, start),
    mask=_write(cache.mask, mask, start),
    length=start + tokens.shape[0],
  )
  architecture = model.architecture

  def layer(carry, block, index):
    stream, keys, values = carry
    new = transformer.heads(architecture, block, stream, positions=positions)
    keys = _write(keys, new.keys[None], index, 0, start, 0)
    values = _write(values, new.values[None], index, 0, start, 0)
    seen = new._replace(keys=keys[index], values=values[index])
    outputs = transformer.attend(
      architecture, seen, positions, cache.positions, mask=cache.mask
    )
    stream = transformer.complete(architecture, block, stream, outputs)
    return (stream, keys, values), None

  carry = (_model.embed_at(model, tokens, positions), cache.keys, cache.values)
  layers = jnp.arange(model.num_layers, dtype=start.dtype)
  (stream, keys, values), _ = transformer.scan_blocks(
    architecture, model.blocks, layer, carry, layers
  )
  cache = cache._replace(keys=keys, values=values)
  return normalise(architecture, model.final_norm, stream), cache


def _write(slots: Array, new: Array, *place: Array | int) -> Array:
  return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), place)
