"""BERT and MiniLM: encoders that normalise the sums."""

from typing import Any

import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._config import ACTIVATIONS, Config
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint
from iclcl_jax.transformer import Norms

# Tables, and the heads of other tasks than encoding.
_BERT_IGNORED = (
  'embeddings.position_ids',
  'embeddings.token_type_ids',
  'pooler.dense.*',
  'cls.*',
  'classifier.*',
  'qa_outputs.*',
)


def from_bert(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes an encoder of LayerNorm after each sublayer and GELU."""
  config = Config(checkpoint.config)
  config.require('position_embedding_type', 'absolute')
  config.require('is_decoder', False)
  config.require('directionality', 'bidi')
  config.get('tie_word_embeddings')  # There is no head.
  d = config.count('hidden_size')
  context = config.count('max_position_embeddings')
  tensors = _reading.Tensors(
    checkpoint.tensors,
    num_layers=config.count('num_hidden_layers'),
    prefix='bert.',
    ignored=_BERT_IGNORED,
    dtype=dtype,
  )

  def table(kind, size):
    return tensors.array(f'embeddings.{kind}_embeddings.weight', (size, d))

  model = LanguageModel(
    embedding=table('word', config.count('vocab_size')),
    position_embedding=table('position', context),
    token_type_embedding=table(
      'token_type', config.count('type_vocab_size', 2)
    ),
    embedding_norm=tensors.norm('embeddings.LayerNorm', d),
    blocks=_bert_blocks(config, tensors, d),
    architecture=transformer.Architecture(
      normalization=transformer.LayerNorm(
        config.number('layer_norm_eps', 1e-12, least=0)
      ),
      activation=config.choice('hidden_act', ACTIVATIONS, 'gelu'),
      visible=transformer.bidirectional,
    ),
    context_length=context,
  )
  tensors.check_all_taken()
  config.check_all_read()
  return model


def _bert_blocks(
  config: Config, tensors: _reading.Tensors, d: int
) -> transformer.Block:
  """Arranges the tensors of the layers."""
  heads = config.count('num_attention_heads')
  d_k = _reading.head_width(d, heads)
  d_ff = config.count('intermediate_size')
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
    attention_norms=Norms(
      sum=tensors.norms(layer + 'attention.output.LayerNorm', d)
    ),
    query=projection('query'),
    key=projection('key'),
    value=projection('value'),
    output=tensors.linears(
      layer + 'attention.output.dense',
      (d, d),
      _reading.transposed(heads, d_k, d),
      bias=(d,),
    ),
    ffn_norms=Norms(sum=tensors.norms(layer + 'output.LayerNorm', d)),
    gate=None,
    up=tensors.linears(
      layer + 'intermediate.dense', (d_ff, d), np.transpose, bias=(d_ff,)
    ),
    down=tensors.linears(
      layer + 'output.dense', (d, d_ff), np.transpose, bias=(d,)
    ),
  )
