"""Phi-3 and Phi-4-mini: joint projections, other rotations in long prompts."""

from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder


@_decoder.family()
def from_phi3(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `phi3` (Abdin et al., arXiv:2404.14219)."""
  for name in ('attention_bias', 'lm_head_bias', 'mlp_bias'):
    decoder.config.require(name, False)
  for name in ('full_attn_mod', 'interpolate_factor'):
    decoder.config.require(name, 1)
  part = decoder.config.get('partial_rotary_factor', 1.0)
  rotation, window = decoder.rotary(partial=part), decoder.window()
  return decoder.language_model(
    decoder.joint_attention(
      'self_attn.qkv_proj', 'self_attn.o_proj', bias=False
    )
    | _network(decoder)
    | decoder.pre_norms(),
    decoder.functions(1e-5),
    layers=decoder.alike(rotation=rotation, window=window),
  )


def _network(decoder) -> dict:
  """The gate stands before the other branch in one projection."""
  d_ff = decoder.config.count('intermediate_size')
  stream = (decoder.d_model,)
  joint = decoder.linear('mlp.gate_up_proj', stream, (2 * d_ff,), bias=False)
  gate, up = _decoder.in_parts(joint, d_ff, d_ff)
  down = decoder.linear('mlp.down_proj', (d_ff,), stream, bias=False)
  return {'gate': gate, 'up': up, 'down': down}
