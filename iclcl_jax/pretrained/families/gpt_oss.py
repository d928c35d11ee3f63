"""gpt-oss: a sink in every head, windows, and a mixture of clamped experts."""

import dataclasses

import jax
import jax.numpy as jnp

from iclcl_jax import transformer
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.families import _decoder
from iclcl_jax.transformer import Linear

_YARN = {
  'rope_type': 'yarn',
  'factor': 32.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'truncate': False,
  'original_max_position_embeddings': 4096,
}


@dataclasses.dataclass(frozen=True)
class SwishWithSlope:
  """The activation `z sigmoid(slope z)`."""

  slope: float

  def __call__(self, z: jax.Array) -> jax.Array:
    return z * jax.nn.sigmoid(self.slope * z)


@_decoder.family(d_k=64, groups=8)
def from_gpt_oss(decoder: _decoder.Decoder) -> LanguageModel:
  """Makes a model of the family `gpt_oss` (OpenAI, arXiv:2508.10925)."""
  config = decoder.config
  config.require('hidden_act', 'silu')
  config.get('initial_context_length')  # The settings of the rotation say it.
  chosen = config.count('num_experts_per_tok', 4)
  config.require('experts_per_token', chosen)
  if chosen > (experts := config.count('num_local_experts', 128)):
    raise config.error(
      'num_experts_per_tok', chosen, f'no more than {experts} experts'
    )
  rotation = decoder.rotary(base=150_000.0, settings=_YARN)
  window = decoder.window(128)
  layers = decoder.windowed(rotation, window, lambda i: i % 2 == 0)
  bias = config.switch('attention_bias', True)
  block = decoder.attention(bias=bias, output_bias=bias) | decoder.pre_norms()
  block['sinks'] = decoder.tensors.take(
    f'{decoder.layer}self_attn.sinks', (decoder.heads,)
  )
  return decoder.language_model(
    block | _experts(decoder),
    {
      'normalization': decoder.rms_norm(1e-5),
      'activation': SwishWithSlope(config.number('swiglu_alpha', 1.702)),
      'gating': transformer.ClampedGating(config.number('swiglu_limit', 7.0)),
      'experts_per_token': chosen,
    },
    layers=layers,
  )


def _experts(decoder) -> dict:
  """The experts side by side; gate and other branch alternate in the file."""
  config, d = decoder.config, decoder.d_model
  experts = config.count('num_local_experts', 128)
  d_ff = config.count('intermediate_size')
  take, place = decoder.tensors.take, f'{decoder.layer}mlp.experts.'
  joint = take(place + 'gate_up_proj', (experts, d, 2 * d_ff))
  shifts = take(place + 'gate_up_proj_bias', (experts, 2 * d_ff))

  def branch(start: int) -> Linear:
    weight = jnp.swapaxes(joint[..., start::2], 1, 2)  # [L, d, E, d_ff]
    shape = len(weight), d, experts * d_ff
    bias = shifts[..., start::2].reshape(len(weight), -1)
    return Linear(weight.reshape(shape), bias)

  down = take(
    place + 'down_proj', (experts, d_ff, d), lambda x: x.reshape(-1, d)
  )
  return {
    'router': decoder.linear('mlp.router', (d,), (experts,), bias=True),
    'gate': branch(0),
    'up': branch(1),
    'down': Linear(down, take(place + 'down_proj_bias', (experts, d))),
  }
