"""OLMo 2: normalised outputs, and queries and keys over all heads together."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder


@_decoder.family()
def from_olmo2(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `olmo2` (OLMo Team, arXiv:2501.00656)."""
  bias = decoder.config.switch('attention_bias', False)
  return decoder.language_model(
    decoder.attention(bias=bias, output_bias=bias)
    | decoder.head_norms(together=True)
    | decoder.network()
    | {
      'attention_norms': decoder.norms(output='post_attention_layernorm'),
      'ffn_norms': decoder.norms(output='post_feedforward_layernorm'),
    },
    decoder.functions(1e-5),
    layers=decoder.alike(rotation=decoder.rotary()),
  )
