"""GPT-NeoX (Pythia): attention and network side by side, LayerNorm."""

from typing import Any

import jax

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint, split_heads
from iclcl_jax.pretrained._rotary import read_rotary
from iclcl_jax.pretrained.families import _decoder
from iclcl_jax.transformer import Layer

# Causal masks that older files store.
_MASKS = ('layers.*.attention.bias', 'layers.*.attention.masked_bias')


def from_gpt_neox(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of the family `gpt_neox` (arXiv:2204.06745)."""
  decoder = _decoder.open_decoder(
    checkpoint, dtype, prefix='gpt_neox.', ignored=_MASKS, norm_bias=True
  )
  config = decoder.config
  rotation = read_rotary(
    decoder,
    base_name='rotary_emb_base',
    partial=config.number('rotary_pct', 0.25),
  )
  # Others ignore this name of the base.
  base = config.get('rotary_emb_base', 1e4)
  base = config.get('rope_parameters', {}).get('rope_theta', base)
  config.require('rope_theta', base)
  bias = config.switch('attention_bias', True)
  return _decoder.language_model(
    decoder,
    _attention(decoder, bias)
    | decoder.pre_norms()
    | decoder.network(
      None, 'mlp.dense_h_to_4h', 'mlp.dense_4h_to_h', bias=True
    ),
    {
      'normalization': decoder.layer_norm('layer_norm_eps', 1e-5),
      'activation': decoder.activation(default='gelu'),
      'parallel': config.switch('use_parallel_residual', True),
    },
    layers=decoder.alike(Layer(rotation=rotation)),
    embedding='embed_in',
    head='embed_out',
    final_norm='final_layer_norm',
  )


def _attention(decoder, bias: bool) -> dict:
  """Each head has its query, key and value side by side."""
  stream, heads = (decoder.d_model,), (decoder.heads, decoder.d_k)
  size = (3 * decoder.heads * decoder.d_k,)
  joint = decoder.linear('attention.query_key_value', stream, size, bias=bias)
  joint = jax.tree.map(lambda x: split_heads(x, decoder.heads), joint)
  query, key, value = _decoder.in_parts(joint, *[decoder.d_k] * 3)
  output = decoder.linear('attention.dense', heads, stream, bias=bias)
  return {'query': query, 'key': key, 'value': value, 'output': output}
