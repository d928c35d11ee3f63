"""Gemma 2 and 3: four normalisations a block, windows on most layers."""

from collections.abc import Mapping

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._rotary import rotary_of
from iclcl_jax.pretrained.families import _decoder
from iclcl_jax.transformer import Layer


@_decoder.family(d_k=256, groups=4)
def from_gemma2(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `gemma2` (arXiv:2408.00118)."""
  window = decoder.window(4096)
  layers = decoder.windowed(decoder.rotary(), window, lambda i: i % 2 == 0)
  return _model(decoder, layers, caps=(50.0, 30.0))


@_decoder.family(d_k=256, groups=4)
def from_gemma3(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `gemma3_text` (arXiv:2503.19786)."""
  config = decoder.config
  window = decoder.window(4096)
  config.require('attn_logit_softcapping')
  pattern = config.count('sliding_window_pattern', 6)
  config.get('_sliding_window_pattern')  # A copy for files with layer_types.
  local = decoder.local(lambda i: (i + 1) % pattern != 0)
  new, old = config.object('rope_parameters'), config.object('rope_scaling')
  for kind, settings in new.items():
    if kind not in _decoder.KINDS or not isinstance(settings, Mapping):
      expected = f'settings for each of {" and ".join(_decoder.KINDS)}'
      raise config.error('rope_parameters', new, expected)
  far = {**new.get('full_attention', {}), **old}
  if old and 'rope_type' not in far:
    raise config.error('rope_scaling', old, "a 'rope_type' in it, or null")
  near = new.get('sliding_attention', {})
  layers = {
    False: Layer(rotation=rotary_of(config, far, decoder.d_k, base=1e6)),
    True: Layer(
      rotation=rotary_of(
        config, near, decoder.d_k, base=1e4, base_name='rope_local_base_freq'
      ),
      window=window,
    ),
  }
  return _model(
    decoder,
    [layers[is_local] for is_local in local],
    caps=(None, None),
    **decoder.head_norms(),
  )


def _model(decoder, layers, *, caps, **block) -> LanguageModel:
  config = decoder.config
  config.require('use_bidirectional_attention', False)
  bias = config.switch('attention_bias', False)
  activation = 'gelu_pytorch_tanh'
  config.require('hidden_act', config.get('hidden_activation', activation))
  score_cap, logit_cap = (
    _cap(decoder, name, default)
    for name, default in zip(
      ('attn_logit_softcapping', 'final_logit_softcapping'), caps, strict=True
    )
  )
  scale = config.number('query_pre_attn_scalar', 256) ** -0.5
  block |= {
    'attention_norms': decoder.norms(
      input='input_layernorm', output='post_attention_layernorm'
    ),
    'ffn_norms': decoder.norms(
      input='pre_feedforward_layernorm', output='post_feedforward_layernorm'
    ),
  }
  return decoder.language_model(
    decoder.attention(bias=bias, output_bias=bias) | decoder.network() | block,
    {
      'normalization': decoder.rms_norm(1e-6, offset=1.0),
      'activation': decoder.activation('hidden_activation', activation),
      'query_scale': scale * decoder.d_k**0.5,
      'score_cap': score_cap,
    },
    layers=layers,
    tied=True,
    embedding_scale=decoder.d_model**0.5,
    logit_cap=logit_cap,
  )


def _cap(decoder, name: str, default: float | None) -> float | None:
  config = decoder.config
  found = config.or_null(name, default)
  return None if found is None else config.number(name, default)
