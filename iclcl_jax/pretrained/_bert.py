"""Checkpoints of the BERT family, which MiniLM belongs to."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.transformer import Architecture, Block

# Tables, and the heads of other tasks than encoding.
IGNORED = (
  'embeddings.position_ids',
  'embeddings.token_type_ids',
  'pooler.dense.*',
  'cls.*',
)


class _Sizes(NamedTuple):
  """Counts and widths of the config."""

  vocabulary: int
  context: int
  token_types: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int


def from_bert(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes an encoder of LayerNorm after each sublayer and GELU."""
  config = checkpoint.config
  _reading.require(config, 'position_embedding_type', 'absolute')
  _reading.require(config, 'is_decoder', False)
  _reading.require(config, 'add_cross_attention', False)
  sizes = _sizes(config)
  tensors = _reading.take(
    checkpoint.tensors,
    _shapes(sizes),
    num_layers=sizes.num_layers,
    prefix='bert.',
    ignored=IGNORED,
    dtype=dtype,
  )
  return LanguageModel(
    embedding=tensors.array('embeddings.word_embeddings.weight'),
    position_embedding=tensors.array('embeddings.position_embeddings.weight'),
    token_type_embedding=tensors.array(
      'embeddings.token_type_embeddings.weight'
    ),
    embedding_norm=tensors.norm('embeddings.LayerNorm'),
    blocks=_blocks(tensors, sizes),
    final_norm=None,
    head=None,
    architecture=_architecture(config),
    context_length=sizes.context,
    tied=False,
  )


def _sizes(config: Mapping[str, Any]) -> _Sizes:
  """Reads and checks the sizes."""
  return _Sizes(
    vocabulary=_reading.count(config, 'vocab_size'),
    context=_reading.count(config, 'max_position_embeddings'),
    token_types=_reading.count(config, 'type_vocab_size', 2),
    num_layers=_reading.count(config, 'num_hidden_layers'),
    d_model=_reading.count(config, 'hidden_size'),
    d_ff=_reading.count(config, 'intermediate_size'),
    num_heads=_reading.count(config, 'num_attention_heads'),
  )


def _shapes(sizes: _Sizes) -> dict[str, tuple[int, ...]]:
  """Expected tensors."""
  d, d_ff = sizes.d_model, sizes.d_ff
  weights = {
    'attention.self.query': (d, d),
    'attention.self.key': (d, d),
    'attention.self.value': (d, d),
    'attention.output.dense': (d, d),
    'attention.output.LayerNorm': (d,),
    'intermediate.dense': (d_ff, d),
    'output.dense': (d, d_ff),
    'output.LayerNorm': (d,),
  }
  layer: dict[str, tuple[int, ...]] = {}
  for name, shape in weights.items():
    layer[f'encoder.layer.{{}}.{name}.weight'] = shape
    layer[f'encoder.layer.{{}}.{name}.bias'] = shape[:1]
  return _reading.of_layers(layer, sizes.num_layers) | {
    'embeddings.word_embeddings.weight': (sizes.vocabulary, d),
    'embeddings.position_embeddings.weight': (sizes.context, d),
    'embeddings.token_type_embeddings.weight': (sizes.token_types, d),
    'embeddings.LayerNorm.weight': (d,),
    'embeddings.LayerNorm.bias': (d,),
  }


def _blocks(tensors: _reading.Tensors, sizes: _Sizes) -> Block:
  """Arranges the tensors of the layers."""
  d, heads = sizes.d_model, sizes.num_heads
  d_k = _reading.head_width(d, heads)
  to_heads = _reading.transposed(d, heads, d_k)
  of_heads = _reading.reshaped(heads, d_k)
  layer = 'encoder.layer.{}.'
  attention = layer + 'attention.self.'
  return Block(
    attention_norm=tensors.norms(layer + 'attention.output.LayerNorm'),
    query=tensors.linears(attention + 'query', to_heads, of_heads),
    key=tensors.linears(attention + 'key', to_heads, of_heads),
    value=tensors.linears(attention + 'value', to_heads, of_heads),
    output=tensors.linears(
      layer + 'attention.output.dense', _reading.transposed(heads, d_k, d)
    ),
    ffn_norm=tensors.norms(layer + 'output.LayerNorm'),
    gate=None,
    up=tensors.linears(layer + 'intermediate.dense', np.transpose),
    down=tensors.linears(layer + 'output.dense', np.transpose),
  )


def _architecture(config: Mapping[str, Any]) -> Architecture:
  """Reads what the shapes do not say."""
  epsilon = _reading.number(config, 'layer_norm_eps', 1e-12)
  return Architecture(
    placement=transformer.post_norm,
    normalization=transformer.LayerNorm(epsilon),
    activation=_reading.activation(config, 'hidden_act', 'gelu'),
    rotation=transformer.unrotated,
    visible=transformer.bidirectional,
  )
