"""Phi-3 and Phi-4-mini: joint projections, other rotations in long prompts."""

from typing import Any

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint, split_heads
from iclcl_jax.pretrained._rotary import read_rotary
from iclcl_jax.pretrained.families import _decoder
from iclcl_jax.transformer import Layer, Linear


def from_phi3(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of the family `phi3` (Abdin et al., arXiv:2404.14219)."""
  decoder = _decoder.open_decoder(checkpoint, dtype)
  for name in ('attention_bias', 'lm_head_bias', 'mlp_bias'):
    decoder.config.require(name, False)
  for name in ('full_attn_mod', 'interpolate_factor'):
    decoder.config.require(name, 1)
  part = decoder.config.get('partial_rotary_factor', 1.0)
  rotation = read_rotary(decoder, partial=part)
  window = decoder.window()
  return _decoder.language_model(
    decoder,
    _attention(decoder) | _network(decoder) | decoder.pre_norms(),
    decoder.functions(1e-5),
    layers=decoder.alike(Layer(rotation=rotation, window=window)),
  )


def _attention(decoder) -> dict:
  """Queries, keys and values stand side by side in one projection."""
  counts = {
    'query': decoder.heads,
    'key': decoder.groups,
    'value': decoder.groups,
  }
  sizes = [count * decoder.d_k for count in counts.values()]
  stream, heads = (decoder.d_model,), (decoder.heads, decoder.d_k)
  joint = decoder.linear(
    'self_attn.qkv_proj', stream, (sum(sizes),), bias=False
  )
  parts = _decoder.in_parts(joint, *sizes)
  return {
    name: Linear(split_heads(part.weight, count))
    for (name, count), part in zip(counts.items(), parts, strict=True)
  } | {'output': decoder.linear('self_attn.o_proj', heads, stream, bias=False)}


def _network(decoder) -> dict:
  """The gate stands before the other branch in one projection."""
  d_ff = decoder.config.count('intermediate_size')
  stream = (decoder.d_model,)
  joint = decoder.linear('mlp.gate_up_proj', stream, (2 * d_ff,), bias=False)
  gate, up = _decoder.in_parts(joint, d_ff, d_ff)
  down = decoder.linear('mlp.down_proj', (d_ff,), stream, bias=False)
  return {'gate': gate, 'up': up, 'down': down}
