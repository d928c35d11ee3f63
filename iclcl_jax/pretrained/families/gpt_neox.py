"""GPT-NeoX (Pythia): attention and network side by side, LayerNorm."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder

# Causal masks that older files store.
_MASKS = ('layers.*.attention.bias', 'layers.*.attention.masked_bias')


@_decoder.family(prefix='gpt_neox.', ignored=_MASKS, norm_bias=True)
def from_gpt_neox(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `gpt_neox` (arXiv:2204.06745)."""
  config = decoder.config
  rotation = decoder.rotary(
    base_name='rotary_emb_base', partial=config.number('rotary_pct', 0.25)
  )
  # Others ignore this name of the base.
  base = config.get('rotary_emb_base', 1e4)
  base = config.get('rope_parameters', {}).get('rope_theta', base)
  config.require('rope_theta', base)
  bias = config.switch('attention_bias', True)
  return decoder.language_model(
    decoder.joint_attention(
      'attention.query_key_value', 'attention.dense', bias=bias, by_head=True
    )
    | decoder.pre_norms()
    | decoder.network(
      None, 'mlp.dense_h_to_4h', 'mlp.dense_4h_to_h', bias=True
    ),
    {
      'normalization': decoder.layer_norm('layer_norm_eps', 1e-5),
      'activation': decoder.activation(default='gelu'),
      'parallel': config.switch('use_parallel_residual', True),
    },
    layers=decoder.alike(rotation=rotation),
    embedding='embed_in',
    head='embed_out',
    final_norm='final_layer_norm',
  )
