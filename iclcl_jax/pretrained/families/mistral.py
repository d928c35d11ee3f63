"""Mistral: a Llama whose layers all have the window that the config states."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder


@_decoder.family(groups=8)
def from_mistral(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `mistral` (Jiang et al., arXiv:2310.06825)."""
  for name in ('attention_bias', 'mlp_bias'):
    decoder.config.require(name, False)
  rotation = decoder.rotary()
  return decoder.language_model(
    decoder.attention(bias=False) | decoder.network() | decoder.pre_norms(),
    decoder.functions(1e-6),
    layers=decoder.alike(rotation=rotation, window=decoder.window(4096)),
  )
