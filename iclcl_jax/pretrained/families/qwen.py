"""Qwen 2, 2.5 and 3: biased projections, or normalised queries and keys."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder


@_decoder.family(groups=32)
def from_qwen2(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `qwen2`: no bias behind the heads."""
  return _model(decoder, decoder.attention(bias=True))


@_decoder.family(d_k=128, groups=32)
def from_qwen3(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `qwen3`: each query and key is normalised."""
  bias = decoder.config.switch('attention_bias', False)
  attention = decoder.attention(bias=bias, output_bias=bias)
  return _model(decoder, attention | decoder.head_norms())


def _model(decoder, attention: dict) -> LanguageModel:
  config = decoder.config
  # A window may stand in the config and apply to no layer.
  has_window = config.switch('use_sliding_window', False)
  window = decoder.window(4096) if has_window else None
  config.get('sliding_window')
  config.require('use_mrope', False)
  name = 'max_window_layers'
  first = config.count(name, config.or_null(name, 28), least=0)
  layers = decoder.windowed(decoder.rotary(), window, lambda i: i >= first)
  return decoder.language_model(
    attention | decoder.network() | decoder.pre_norms(),
    decoder.functions(1e-6),
    layers=layers,
  )
