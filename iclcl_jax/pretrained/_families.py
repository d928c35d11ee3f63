"""Checkpoints of the Llama, GPT-2 and BERT families; MiniLM is a BERT."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint
from iclcl_jax.transformer import Linear

# Tables that other versions of the format store; they follow from the config.
_LLAMA_IGNORED = (
  'layers.*.self_attn.rotary_emb.inv_freq',
  'rotary_emb.inv_freq',
)


def from_llama(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of RMSNorm, rotary positions, grouped queries and SwiGLU."""
  config = checkpoint.config
  _reading.require(config, 'sliding_window', None)
  vocabulary = _reading.count(config, 'vocab_size')
  d = _reading.count(config, 'hidden_size')
  tied = _reading.switch(config, 'tie_word_embeddings', False)
  tensors = _reading.Tensors(
    checkpoint.tensors,
    num_layers=_reading.count(config, 'num_hidden_layers'),
    prefix='model.',
    ignored=_LLAMA_IGNORED,
    dtype=dtype,
  )
  head = tensors.head('embed_tokens.weight', (vocabulary, d), tied=tied)
  model = LanguageModel(
    embedding=tensors.array('embed_tokens.weight', (vocabulary, d)),
    blocks=_llama_blocks(config, tensors, d),
    final_norm=tensors.norm('norm', d, has_bias=False),
    head=head,
    architecture=transformer.Architecture(
      placement=transformer.pre_norm,
      normalization=transformer.RMSNorm(
        _reading.number(config, 'rms_norm_eps', 1e-6)
      ),
      activation=_reading.choice(
        config, 'hidden_act', _reading.ACTIVATIONS, 'silu'
      ),
      rotation=transformer.Rotary(_rotary_base(config)),
      visible=transformer.causal,
    ),
    context_length=_reading.count(config, 'max_position_embeddings', 2048),
    tied=tied,
  )
  tensors.check_all_taken()
  return model


def _llama_blocks(
  config: Mapping[str, Any], tensors: _reading.Tensors, d: int
) -> transformer.Block:
  """Arranges the tensors of the layers, whose weights are `[out, in]`."""
  heads, groups, d_k = _heads(config, d)
  d_ff = _reading.count(config, 'intermediate_size')
  attention_bias = _reading.switch(config, 'attention_bias', False)
  mlp_bias = _reading.switch(config, 'mlp_bias', False)

  def projection(name, count):
    return tensors.linears(
      f'layers.{{}}.self_attn.{name}',
      (count * d_k, d),
      _reading.transposed(d, count, d_k),
      bias=(count * d_k,) if attention_bias else None,
      arrange_bias=_reading.reshaped(count, d_k),
    )

  def layer_of_mlp(name, shape):
    bias = shape[:1] if mlp_bias else None
    template = f'layers.{{}}.mlp.{name}'
    return tensors.linears(template, shape, np.transpose, bias=bias)

  def norm(name):
    return tensors.norms(f'layers.{{}}.{name}', d, has_bias=False)

  return transformer.Block(
    attention_norm=norm('input_layernorm'),
    query=projection('q_proj', heads),
    key=projection('k_proj', groups),
    value=projection('v_proj', groups),
    output=tensors.linears(
      'layers.{}.self_attn.o_proj',
      (d, heads * d_k),
      _reading.transposed(heads, d_k, d),
      bias=(d,) if attention_bias else None,
    ),
    ffn_norm=norm('post_attention_layernorm'),
    gate=layer_of_mlp('gate_proj', (d_ff, d)),
    up=layer_of_mlp('up_proj', (d_ff, d)),
    down=layer_of_mlp('down_proj', (d, d_ff)),
  )


def _heads(config: Mapping[str, Any], d: int) -> tuple[int, int, int]:
  """Reads the numbers of query and key-value heads, and their width."""
  heads = _reading.count(config, 'num_attention_heads')
  groups = _reading.count(config, 'num_key_value_heads', heads)
  if heads % groups:
    raise ValueError(
      f"config['num_key_value_heads'] is {groups} for {heads} heads; expected "
      'a divisor. Check the sizes in config.json.'
    )
  if config.get('head_dim') is None:
    d_k = _reading.head_width(d, heads)
  else:
    d_k = _reading.count(config, 'head_dim')
  if d_k % 2:
    raise ValueError(
      f'heads have the width {d_k}; expected an even one, because rotary '
      'positions turn pairs. Check the sizes in config.json.'
    )
  return heads, groups, d_k


def _rotary_base(config: Mapping[str, Any]) -> float:
  """Reads the base of the rotary angles, which either of two settings holds."""
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


# Causal masks that older files store.
_GPT2_IGNORED = ('h.*.attn.bias', 'h.*.attn.masked_bias')


def from_gpt2(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of LayerNorm, learned positions and GELU."""
  config = checkpoint.config
  _reading.require(config, 'scale_attn_weights', True)
  _reading.require(config, 'scale_attn_by_inverse_layer_idx', False)
  _reading.require(config, 'add_cross_attention', False)
  vocabulary = _reading.count(config, 'vocab_size')
  context = _reading.count(config, 'n_positions')
  d = _reading.count(config, 'n_embd')
  tied = _reading.switch(config, 'tie_word_embeddings', True)
  tensors = _reading.Tensors(
    checkpoint.tensors,
    num_layers=_reading.count(config, 'n_layer'),
    prefix='transformer.',
    ignored=_GPT2_IGNORED,
    dtype=dtype,
  )
  head = tensors.head('wte.weight', (vocabulary, d), tied=tied)
  model = LanguageModel(
    embedding=tensors.array('wte.weight', (vocabulary, d)),
    position_embedding=tensors.array('wpe.weight', (context, d)),
    blocks=_gpt2_blocks(config, tensors, d),
    final_norm=tensors.norm('ln_f', d),
    head=head,
    architecture=transformer.Architecture(
      placement=transformer.pre_norm,
      normalization=transformer.LayerNorm(
        _reading.number(config, 'layer_norm_epsilon', 1e-5)
      ),
      activation=_reading.choice(
        config, 'activation_function', _reading.ACTIVATIONS, 'gelu_new'
      ),
      rotation=transformer.unrotated,
      visible=transformer.causal,
    ),
    context_length=context,
    tied=tied,
  )
  tensors.check_all_taken()
  return model


def _gpt2_blocks(
  config: Mapping[str, Any], tensors: _reading.Tensors, d: int
) -> transformer.Block:
  """Arranges the tensors of the layers, whose weights are `[in, out]`."""
  heads = _reading.count(config, 'n_head')
  d_k = _reading.head_width(d, heads)
  d_ff = _reading.count(config, 'n_inner', 4 * d)
  joint = 'h.{}.attn.c_attn.'
  weights = tensors.stacked(joint + 'weight', (d, 3 * d))
  biases = tensors.stacked(joint + 'bias', (3 * d,))
  # Queries, keys and values stand side by side in one projection.
  query, key, value = (
    Linear(
      weights[..., part * d : (part + 1) * d].reshape(-1, d, heads, d_k),
      biases[..., part * d : (part + 1) * d].reshape(-1, heads, d_k),
    )
    for part in range(3)
  )
  return transformer.Block(
    attention_norm=tensors.norms('h.{}.ln_1', d),
    query=query,
    key=key,
    value=value,
    output=tensors.linears(
      'h.{}.attn.c_proj', (d, d), _reading.reshaped(heads, d_k, d), bias=(d,)
    ),
    ffn_norm=tensors.norms('h.{}.ln_2', d),
    gate=None,
    up=tensors.linears('h.{}.mlp.c_fc', (d, d_ff), bias=(d_ff,)),
    down=tensors.linears('h.{}.mlp.c_proj', (d_ff, d), bias=(d,)),
  )


# Tables, and the heads of other tasks than encoding.
_BERT_IGNORED = (
  'embeddings.position_ids',
  'embeddings.token_type_ids',
  'pooler.dense.*',
  'cls.*',
)


def from_bert(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes an encoder of LayerNorm after each sublayer and GELU."""
  config = checkpoint.config
  _reading.require(config, 'position_embedding_type', 'absolute')
  _reading.require(config, 'is_decoder', False)
  _reading.require(config, 'add_cross_attention', False)
  d = _reading.count(config, 'hidden_size')
  context = _reading.count(config, 'max_position_embeddings')
  tensors = _reading.Tensors(
    checkpoint.tensors,
    num_layers=_reading.count(config, 'num_hidden_layers'),
    prefix='bert.',
    ignored=_BERT_IGNORED,
    dtype=dtype,
  )

  def table(kind, size):
    return tensors.array(f'embeddings.{kind}_embeddings.weight', (size, d))

  model = LanguageModel(
    embedding=table('word', _reading.count(config, 'vocab_size')),
    position_embedding=table('position', context),
    token_type_embedding=table(
      'token_type', _reading.count(config, 'type_vocab_size', 2)
    ),
    embedding_norm=tensors.norm('embeddings.LayerNorm', d),
    blocks=_bert_blocks(config, tensors, d),
    architecture=transformer.Architecture(
      placement=transformer.post_norm,
      normalization=transformer.LayerNorm(
        _reading.number(config, 'layer_norm_eps', 1e-12)
      ),
      activation=_reading.choice(
        config, 'hidden_act', _reading.ACTIVATIONS, 'gelu'
      ),
      rotation=transformer.unrotated,
      visible=transformer.bidirectional,
    ),
    context_length=context,
  )
  tensors.check_all_taken()
  return model


def _bert_blocks(
  config: Mapping[str, Any], tensors: _reading.Tensors, d: int
) -> transformer.Block:
  """Arranges the tensors of the layers."""
  heads = _reading.count(config, 'num_attention_heads')
  d_k = _reading.head_width(d, heads)
  d_ff = _reading.count(config, 'intermediate_size')
  layer = 'encoder.layer.{}.'

  def projection(name):
    return tensors.linears(
      f'{layer}attention.self.{name}',
      (d, d),
      _reading.transposed(d, heads, d_k),
      bias=(d,),
      arrange_bias=_reading.reshaped(heads, d_k),
    )

  return transformer.Block(
    attention_norm=tensors.norms(layer + 'attention.output.LayerNorm', d),
    query=projection('query'),
    key=projection('key'),
    value=projection('value'),
    output=tensors.linears(
      layer + 'attention.output.dense',
      (d, d),
      _reading.transposed(heads, d_k, d),
      bias=(d,),
    ),
    ffn_norm=tensors.norms(layer + 'output.LayerNorm', d),
    gate=None,
    up=tensors.linears(
      layer + 'intermediate.dense', (d_ff, d), np.transpose, bias=(d_ff,)
    ),
    down=tensors.linears(
      layer + 'output.dense', (d, d_ff), np.transpose, bias=(d,)
    ),
  )
