"""GPT-2: learned positions, LayerNorm, weights stored as `[in, out]`."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder

# Causal masks that older files store.
_IGNORED = ('h.*.attn.bias', 'h.*.attn.masked_bias')
NAMES = {
  'hidden_size': 'n_embd',
  'intermediate_size': 'n_inner',
  'num_hidden_layers': 'n_layer',
  'num_attention_heads': 'n_head',
  'max_position_embeddings': 'n_positions',
}


@_decoder.family(
  prefix='transformer.',
  layer='h.{}.',
  ignored=_IGNORED,
  names=NAMES,
  norm_bias=True,
  inputs_first=True,
)
def from_gpt2(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of LayerNorm, learned positions and GELU."""
  config, d = decoder.config, decoder.d_model
  config.require('scale_attn_weights', True)
  config.require('scale_attn_by_inverse_layer_idx', False)
  config.get('reorder_and_upcast_attn')  # Rounding alone.
  config.get('n_ctx')  # The same as n_positions, as older files call it.
  context = config.count('max_position_embeddings')
  return decoder.language_model(
    decoder.joint_attention('attn.c_attn', 'attn.c_proj', bias=True)
    | decoder.network(None, 'mlp.c_fc', 'mlp.c_proj', bias=True, width=4 * d)
    | decoder.pre_norms('ln_1', 'ln_2'),
    {
      'normalization': decoder.layer_norm('layer_norm_epsilon', 1e-5),
      'activation': decoder.activation('activation_function', 'gelu_new'),
    },
    tied=True,
    embedding='wte',
    final_norm='ln_f',
    position_embedding=decoder.tensors.take('wpe.weight', (context, d)),
  )
