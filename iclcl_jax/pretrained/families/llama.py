"""Llama 2, 3.x and their likes: RMSNorm, rotations, grouped queries, SwiGLU."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder


@_decoder.family()
def from_llama(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `llama`; all others are told apart from it."""
  config = decoder.config
  config.require('sliding_window')
  config.require('rope_interleaved', False)
  bias = config.switch('attention_bias', False)
  return decoder.language_model(
    decoder.attention(bias=bias, output_bias=bias)
    | decoder.network(bias=config.switch('mlp_bias', False))
    | decoder.pre_norms(),
    decoder.functions(1e-6),
    layers=decoder.alike(rotation=decoder.rotary()),
  )
