"""Mistral: a Llama whose layers all have the window that the config states."""

from typing import Any

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint
from iclcl_jax.pretrained._rotary import read_rotary
from iclcl_jax.pretrained.families import _decoder
from iclcl_jax.transformer import Layer


def from_mistral(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of the family `mistral` (Jiang et al., arXiv:2310.06825)."""
  decoder = _decoder.open_decoder(checkpoint, dtype, groups=8)
  for name in ('attention_bias', 'mlp_bias'):
    decoder.config.require(name, False)
  rotation = read_rotary(decoder)
  layer = Layer(rotation=rotation, window=decoder.window(4096))
  return _decoder.language_model(
    decoder,
    decoder.attention(bias=False) | decoder.network() | decoder.pre_norms(),
    decoder.functions(1e-6),
    layers=decoder.alike(layer),
  )
