"""Checkpoints of the Llama family."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.transformer import Architecture, Block, Linear

# Tables that other versions of the format store; they follow from the config.
IGNORED = ('layers.*.self_attn.rotary_emb.inv_freq', 'rotary_emb.inv_freq')


class _Sizes(NamedTuple):
  """Counts and widths of the config."""

  vocabulary: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_groups: int
  d_k: int


def from_llama(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of RMSNorm, rotary positions, grouped queries and SwiGLU."""
  config = checkpoint.config
  sizes = _sizes(config)
  tied = _reading.switch(config, 'tie_word_embeddings', False)
  stored = checkpoint.tensors
  if tied:
    stored = _reading.without_copy(
      stored, copy='lm_head.weight', original='embed_tokens.weight'
    )
  tensors = _reading.take(
    stored,
    _shapes(config, sizes, tied),
    num_layers=sizes.num_layers,
    prefix='model.',
    ignored=IGNORED,
    dtype=dtype,
  )
  return LanguageModel(
    embedding=tensors.array('embed_tokens.weight'),
    position_embedding=None,
    token_type_embedding=None,
    embedding_norm=None,
    blocks=_blocks(tensors, sizes),
    final_norm=tensors.norm('norm'),
    head=None
    if tied
    else Linear(tensors.array('lm_head.weight', np.transpose)),
    architecture=_architecture(config),
    context_length=_reading.count(config, 'max_position_embeddings', 2048),
    tied=tied,
  )


def _sizes(config: Mapping[str, Any]) -> _Sizes:
  """Reads and checks the sizes."""
  _reading.require(config, 'sliding_window', None)
  d_model = _reading.count(config, 'hidden_size')
  num_heads = _reading.count(config, 'num_attention_heads')
  num_groups = _reading.count(config, 'num_key_value_heads', num_heads)
  if num_heads % num_groups:
    raise ValueError(
      f"config['num_key_value_heads'] is {num_groups} for {num_heads} heads; "
      'expected a divisor. Check the sizes in config.json.'
    )
  if config.get('head_dim') is None:
    d_k = _reading.head_width(d_model, num_heads)
  else:
    d_k = _reading.count(config, 'head_dim')
  if d_k % 2:
    raise ValueError(
      f'heads have the width {d_k}; expected an even one, because rotary '
      'positions turn pairs. Check the sizes in config.json.'
    )
  return _Sizes(
    vocabulary=_reading.count(config, 'vocab_size'),
    num_layers=_reading.count(config, 'num_hidden_layers'),
    d_model=d_model,
    d_ff=_reading.count(config, 'intermediate_size'),
    num_heads=num_heads,
    num_groups=num_groups,
    d_k=d_k,
  )


def _shapes(
  config: Mapping[str, Any], sizes: _Sizes, tied: bool
) -> dict[str, tuple[int, ...]]:
  """Expected tensors."""
  d, d_ff = sizes.d_model, sizes.d_ff
  width_q = sizes.num_heads * sizes.d_k
  width_kv = sizes.num_groups * sizes.d_k
  attention = {
    'q_proj': (width_q, d),
    'k_proj': (width_kv, d),
    'v_proj': (width_kv, d),
    'o_proj': (d, width_q),
  }
  ffn = {'gate_proj': (d_ff, d), 'up_proj': (d_ff, d), 'down_proj': (d, d_ff)}
  layer: dict[str, tuple[int, ...]] = {
    'layers.{}.input_layernorm.weight': (d,),
    'layers.{}.post_attention_layernorm.weight': (d,),
  }
  for part, maps, switch in (
    ('self_attn', attention, 'attention_bias'),
    ('mlp', ffn, 'mlp_bias'),
  ):
    has_bias = _reading.switch(config, switch, False)
    for name, shape in maps.items():
      layer[f'layers.{{}}.{part}.{name}.weight'] = shape
      if has_bias:
        layer[f'layers.{{}}.{part}.{name}.bias'] = shape[:1]
  shapes = _reading.of_layers(layer, sizes.num_layers)
  shapes |= {'embed_tokens.weight': (sizes.vocabulary, d), 'norm.weight': (d,)}
  return shapes if tied else shapes | {'lm_head.weight': (sizes.vocabulary, d)}


def _blocks(tensors: _reading.Tensors, sizes: _Sizes) -> Block:
  """Arranges the tensors of the layers."""
  d, d_k = sizes.d_model, sizes.d_k
  to_heads = _reading.transposed(d, sizes.num_heads, d_k)
  to_groups = _reading.transposed(d, sizes.num_groups, d_k)
  of_heads = _reading.reshaped(sizes.num_heads, d_k)
  of_groups = _reading.reshaped(sizes.num_groups, d_k)
  from_heads = _reading.transposed(sizes.num_heads, d_k, d)
  attention, mlp = 'layers.{}.self_attn.', 'layers.{}.mlp.'
  return Block(
    attention_norm=tensors.norms('layers.{}.input_layernorm'),
    query=tensors.linears(attention + 'q_proj', to_heads, of_heads),
    key=tensors.linears(attention + 'k_proj', to_groups, of_groups),
    value=tensors.linears(attention + 'v_proj', to_groups, of_groups),
    output=tensors.linears(attention + 'o_proj', from_heads),
    ffn_norm=tensors.norms('layers.{}.post_attention_layernorm'),
    gate=tensors.linears(mlp + 'gate_proj', np.transpose),
    up=tensors.linears(mlp + 'up_proj', np.transpose),
    down=tensors.linears(mlp + 'down_proj', np.transpose),
  )


def _architecture(config: Mapping[str, Any]) -> Architecture:
  """Reads what the shapes do not say."""
  epsilon = _reading.number(config, 'rms_norm_eps', 1e-6)
  return Architecture(
    placement=transformer.pre_norm,
    normalization=transformer.RMSNorm(epsilon),
    activation=_reading.activation(config, 'hidden_act', 'silu'),
    rotation=transformer.Rotary(_rotary_base(config)),
    visible=transformer.causal,
  )


def _rotary_base(config: Mapping[str, Any]) -> float:
  """Base of the rotary angles, in either of the two places it is kept."""
  scaling = config.get('rope_parameters') or config.get('rope_scaling') or {}
  if not isinstance(scaling, Mapping):
    raise ValueError(
      f'the settings of the rotary positions are {scaling!r}; expected a JSON '
      'object or null. Copy config.json again.'
    )
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind != 'default':
    raise ValueError(
      f'the rotary positions have the scaling {kind!r}; only '
      "'default' is supported. Choose a checkpoint without rope_scaling in "
      'its config.json.'
    )
  _reading.require(scaling, 'partial_rotary_factor', 1.0)
  if 'rope_theta' in scaling:
    return _reading.number(scaling, 'rope_theta', 10_000.0)
  return _reading.number(config, 'rope_theta', 10_000.0)
