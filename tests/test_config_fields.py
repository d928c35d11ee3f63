"""Every field of a family's config changes both sides alike, or is refused.

The oracle is `transformers`: each field gets another value, one at a time.
"""

import copy

import jax
import numpy as np
import pytest

from iclcl_jax import pretrained
from iclcl_jax.pretrained import _config
from iclcl_jax.pretrained.safetensors import read_safetensors

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
parity = pytest.importorskip('tests.test_pretrained_parity')

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
  pytest.mark.filterwarnings('ignore::FutureWarning'),
]
NAMES = [
  'bert', 'gemma2', 'gemma3_text', 'gpt2', 'gpt_neox', 'gpt_oss',
  'llama-llama3', 'mistral', 'olmo2', 'phi3', 'qwen2', 'qwen3', 'smollm3',
]  # fmt: skip
# What is about files, devices or classes.
UNREAD = ('_attn_implementation', 'architectures', 'dtype', 'id2label')
# Sizes decide the shapes of tensors, which are checked one by one.
SIZES = (
  *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers'),
  *('num_attention_heads', 'num_key_value_heads', 'head_dim', 'n_embd'),
  *('n_layer', 'n_head', 'n_inner', 'n_positions', 'num_local_experts'),
  *('max_position_embeddings', 'type_vocab_size', 'model_type'),
)


def others(value):
  """Values that differ from one."""
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int | float):
    return [value * 2 + 1]
  if value is None:
    return [3, 0.5, True]
  if isinstance(value, list):
    return [value[::-1]]
  if value in ('silu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh'):
    return ['relu']
  return []


# Fields as transformers 4 spells them.
OLD = {'rope_parameters': None, 'rope_theta': 33.0}
SPELLINGS = {
  'plain': OLD,
  'scaled': OLD | {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
  'part': OLD | {'partial_rotary_factor': 0.6},
  'neox': {'rope_parameters': None, 'rotary_pct': 0.6, 'rotary_emb_base': 33.0},
  'local': OLD | {'rope_local_base_freq': 7.0},
  'pattern': {'layer_types': None, 'sliding_window_pattern': 2},
  'side by side': {'rope_theta': 33.0},
}


def changes_of(config):
  """Every field, and every field of the rotary settings, with other values."""
  for spelling, change in SPELLINGS.items():
    if not set(change).isdisjoint(config):
      yield spelling, copy.deepcopy(change)
  for name, value in config.items():
    if name in SIZES or name in UNREAD:
      continue
    if isinstance(value, dict):
      for inner, entry in value.items():
        for other in others(entry):
          yield f'{name}.{inner}', {name: value | {inner: other}}
    for other in others(value):
      yield name, {name: other}


@pytest.mark.parametrize('name', NAMES)
def test_every_field_is_understood_or_refused(name, tmp_path):
  peer = parity.make_peer(name)
  peer.save_pretrained(tmp_path)
  checkpoint = read_safetensors(tmp_path)
  forward = pretrained.hidden_states if name == 'bert' else pretrained.logits
  tokens = parity.tokens_of(1)
  weights = {k: v.clone() for k, v in peer.state_dict().items()}
  silent, refused, same = [], [], []
  model = pretrained.from_checkpoint(checkpoint, dtype='float32')
  start = np.asarray(jax.jit(forward)(model, tokens[0]))
  for field, change in changes_of(peer.config.to_dict()):
    fields = {**checkpoint.config, **change}
    try:
      config = type(peer.config)(**{**peer.config.to_dict(), **change})
      config._attn_implementation = config._experts_implementation = 'eager'
      other = type(peer)(config).eval()
      other.load_state_dict(weights, strict=False)
      expected = parity.answers_of(other, tokens)[0]
    except Exception:
      continue
    try:
      model = pretrained.from_checkpoint(
        checkpoint._replace(config=fields), dtype='float32'
      )
    except ValueError:
      refused.append(field)
      continue
    harmless = field in _config.HARMLESS
    found = start if harmless else jax.jit(forward)(model, tokens[0])
    (same if np.abs(found - expected).max() < 1e-4 else silent).append(field)
  print(name, 'refused', sorted(set(refused)), 'same', sorted(set(same)))
  assert not silent, f'{silent} change the answer, and nobody says so'
