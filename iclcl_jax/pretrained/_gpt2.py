"""Checkpoints of the GPT-2 family."""

from collections.abc import Mapping
from typing import Any

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.transformer import Linear

# Causal masks that older files store.
IGNORED = ('h.*.attn.bias', 'h.*.attn.masked_bias')


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
    ignored=IGNORED,
    dtype=dtype,
  )
  head = tensors.head('wte.weight', (vocabulary, d), tied=tied)
  model = LanguageModel(
    embedding=tensors.array('wte.weight', (vocabulary, d)),
    position_embedding=tensors.array('wpe.weight', (context, d)),
    blocks=_blocks(config, tensors, d),
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


def _blocks(
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
