"""GPT-2: learned positions, LayerNorm, weights stored as `[in, out]`."""

from typing import Any

import jax

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._config import ACTIVATIONS, Config
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint
from iclcl_jax.pretrained.families import _decoder
from iclcl_jax.transformer import Norms

# Causal masks that older files store.
_GPT2_IGNORED = ('h.*.attn.bias', 'h.*.attn.masked_bias')


def from_gpt2(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of LayerNorm, learned positions and GELU."""
  config = Config(checkpoint.config)
  config.require('is_decoder', False, True)  # Both see the past alone.
  config.require('scale_attn_weights', True)
  config.require('scale_attn_by_inverse_layer_idx', False)
  config.get('reorder_and_upcast_attn')  # Rounding alone.
  config.get('n_ctx')  # The same as n_positions, as older files call it.
  vocabulary = config.count('vocab_size')
  context = config.count('n_positions')
  d = config.count('n_embd')
  tied = config.switch('tie_word_embeddings', True)
  tensors = _reading.Tensors(
    checkpoint.tensors,
    num_layers=config.count('n_layer'),
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
      normalization=transformer.LayerNorm(
        config.number('layer_norm_epsilon', 1e-5, least=0)
      ),
      activation=config.choice('activation_function', ACTIVATIONS, 'gelu_new'),
      visible=transformer.causal,
    ),
    context_length=context,
    tied=tied,
  )
  tensors.check_all_taken()
  config.check_all_read()
  return model


def _gpt2_blocks(
  config: Config, tensors: _reading.Tensors, d: int
) -> transformer.Block:
  """Arranges the tensors of the layers, whose weights are `[in, out]`."""
  heads = config.count('n_head')
  d_k = _reading.head_width(d, heads)
  d_ff = config.count('n_inner', 4 * d)
  joint = tensors.linears('h.{}.attn.c_attn', (d, 3 * d), bias=(3 * d,))
  # Queries, keys and values stand side by side in one projection.
  query, key, value = (
    jax.tree.map(lambda x: _reading.split_heads(x, heads), part)
    for part in _decoder.in_parts(joint, d, d, d)
  )
  return transformer.Block(
    attention_norms=Norms(input=tensors.norms('h.{}.ln_1', d)),
    query=query,
    key=key,
    value=value,
    output=tensors.linears(
      'h.{}.attn.c_proj', (d, d), _reading.reshaped(heads, d_k, d), bias=(d,)
    ),
    ffn_norms=Norms(input=tensors.norms('h.{}.ln_2', d)),
    gate=None,
    up=tensors.linears('h.{}.mlp.c_fc', (d, d_ff), bias=(d_ff,)),
    down=tensors.linears('h.{}.mlp.c_proj', (d_ff, d), bias=(d,)),
  )
