"""OLMo 2: normalised outputs, and queries and keys over all heads together."""

from typing import Any

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint
from iclcl_jax.pretrained.families import _decoder


def from_olmo2(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of the family `olmo2` (OLMo Team, arXiv:2501.00656)."""
  decoder = _decoder.open_decoder(checkpoint, dtype)
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
