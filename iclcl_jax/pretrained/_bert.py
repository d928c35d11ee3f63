"""Checkpoints of the BERT family, which MiniLM belongs to."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._model import LanguageModel

# Tables, and the heads of other tasks than encoding.
IGNORED = (
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
    ignored=IGNORED,
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
    blocks=_blocks(config, tensors, d),
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


def _blocks(
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
