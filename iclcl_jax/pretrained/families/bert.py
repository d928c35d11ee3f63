"""BERT and MiniLM: encoders that normalise the sums."""

from iclcl_jax import transformer
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder

# Tables, and the heads of other tasks than encoding.
_IGNORED = (
  'embeddings.position_ids',
  'embeddings.token_type_ids',
  'pooler.dense.*',
  'cls.*',
  'classifier.*',
  'qa_outputs.*',
)
_PROJECTIONS = (
  *(f'attention.self.{name}' for name in ('query', 'key', 'value')),
  'attention.output.dense',
)


@_decoder.family(
  prefix='bert.', layer='encoder.layer.{}.', ignored=_IGNORED, norm_bias=True
)
def from_bert(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes an encoder of LayerNorm after each sublayer and GELU."""
  config, d = decoder.config, decoder.d_model
  config.require('position_embedding_type', 'absolute')
  config.require('is_decoder', False)
  config.require('directionality', 'bidi')

  def table(kind, size):
    name = f'embeddings.{kind}_embeddings.weight'
    return decoder.tensors.take(name, (size, d))

  return decoder.language_model(
    decoder.attention(bias=True, output_bias=True, names=_PROJECTIONS)
    | decoder.network(None, 'intermediate.dense', 'output.dense', bias=True)
    | {
      'attention_norms': decoder.norms(sum='attention.output.LayerNorm'),
      'ffn_norms': decoder.norms(sum='output.LayerNorm'),
    },
    {
      'normalization': decoder.layer_norm('layer_norm_eps', 1e-12),
      'activation': decoder.activation(default='gelu'),
      'visible': transformer.bidirectional,
    },
    embedding='embeddings.word_embeddings',
    head=None,
    final_norm=None,
    context=None,
    position_embedding=table(
      'position', config.count('max_position_embeddings')
    ),
    token_type_embedding=table(
      'token_type', config.count('type_vocab_size', 2)
    ),
    embedding_norm=decoder.norm('embeddings.LayerNorm'),
  )
