"""Small configs of all families, and random checkpoints that fit them."""

import functools
from unittest import mock

import numpy as np

from iclcl_jax import pretrained
from iclcl_jax.pretrained import _reading

LLAMA = {
  'vocab_size': 61,
  'hidden_size': 40,
  'intermediate_size': 52,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'head_dim': 10,
  'max_position_embeddings': 32,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': 0,
}
GPT2 = {
  'vocab_size': 61,
  'n_positions': 32,
  'n_embd': 36,
  'n_layer': 3,
  'n_head': 3,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': 0,
}
BERT = {
  'vocab_size': 61,
  'hidden_size': 36,
  'intermediate_size': 44,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'max_position_embeddings': 32,
}
CONFIGS = {
  'llama': LLAMA | {'num_key_value_heads': 4},
  'llama-grouped-tied': LLAMA
  | {
    'num_key_value_heads': 2,
    'tie_word_embeddings': True,
    'rms_norm_eps': 1e-4,
  },
  'llama-one-group-biases': LLAMA
  | {
    'num_key_value_heads': 1,
    'attention_bias': True,
    'mlp_bias': True,
    'head_dim': 14,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e5},
  },
  'gpt2': GPT2,
  'gpt2-untied': GPT2
  | {
    'tie_word_embeddings': False,
    'n_inner': 50,
    'activation_function': 'relu',
    'layer_norm_epsilon': 1e-3,
  },
  'bert': BERT,
  'bert-tanh': BERT
  | {
    'hidden_act': 'gelu_new',
    'type_vocab_size': 3,
    'layer_norm_eps': 1e-3,
  },
}
# Every delta of a family counts: windows shorter than the prompt, both kinds of
# layer, biases, factors that differ from their defaults.
SMALL = {
  'vocab_size': 61,
  'hidden_size': 36,
  'intermediate_size': 44,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 10,
  'max_position_embeddings': 32,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': 0,
}
TEN_A_HEAD = {k: v for k, v in SMALL.items() if k != 'head_dim'} | {
  'hidden_size': 40
}
FULL, LOCAL = 'full_attention', 'sliding_attention'
KINDS = {'layer_types': [LOCAL, FULL, LOCAL, LOCAL], 'sliding_window': 3}
ROTARY = {
  'llama3': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 24,
  },
  'linear': {'factor': 3.0},
  'dynamic': {'factor': 4.0},
  'yarn': {
    'factor': 4.0,
    'original_max_position_embeddings': 8,
    'beta_fast': 4.0,
    'truncate': False,
  },
}
CONFIGS |= {
  f'llama-{kind}': LLAMA
  | {
    'num_key_value_heads': 2,
    'rope_parameters': {'rope_type': kind, 'rope_theta': 50.0} | settings,
  }
  for kind, settings in ROTARY.items()
}
CONFIGS |= {
  'mistral': SMALL | {'sliding_window': 4},
  'mistral-everywhere': SMALL | {'sliding_window': None},
  'qwen2': TEN_A_HEAD
  | {'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': 2},
  'qwen2-everywhere': TEN_A_HEAD | {'sliding_window': 4},
  'qwen3': SMALL | KINDS | {'use_sliding_window': True, 'attention_bias': True},
  'gemma2': SMALL
  | {
    'sliding_window': 3,
    'query_pre_attn_scalar': 7,
    'attn_logit_softcapping': 2.0,
    'final_logit_softcapping': 1.5,
  },
  'gemma2-biased': SMALL
  | KINDS
  | {
    'attention_bias': True,
    'attn_logit_softcapping': None,
    'hidden_activation': 'silu',
    'tie_word_embeddings': False,
  },
  'gemma3_text': SMALL
  | {
    'sliding_window': 3,
    'layer_types': KINDS['layer_types'],
    'query_pre_attn_scalar': 7,
    'rope_parameters': {
      FULL: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 900.0},
      LOCAL: {'rope_type': 'default', 'rope_theta': 30.0},
    },
  },
  'gpt_neox': TEN_A_HEAD
  | {
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': 90.0,
      'partial_rotary_factor': 0.4,
    }
  },
  'gpt_neox-sequential': TEN_A_HEAD
  | {
    'use_parallel_residual': False,
    'attention_bias': False,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': 1e4,
      'partial_rotary_factor': 1.0,
    },
  },
  'olmo2': TEN_A_HEAD | {'attention_bias': True},
  'phi3': TEN_A_HEAD
  | {
    'sliding_window': 5,
    'original_max_position_embeddings': 9,
    'rope_parameters': {
      'rope_type': 'longrope',
      'rope_theta': 70.0,
      'partial_rotary_factor': 0.8,
      'short_factor': [1.0, 1.1, 1.3, 2.0],
      'long_factor': [1.5, 2.0, 4.0, 7.0],
    },
  },
  'phi3-plain': TEN_A_HEAD,
  'smollm3': TEN_A_HEAD
  | {
    'no_rope_layers': [1, 0, 1, 0],
    'use_sliding_window': True,
    'sliding_window': 4,
    'attention_bias': True,
    'mlp_bias': True,
  },
  'gpt_oss': SMALL
  | {
    'num_local_experts': 5,
    'num_experts_per_tok': 2,
    'sliding_window': 3,
    'swiglu_limit': 0.7,
    'swiglu_alpha': 1.3,
    'rope_parameters': {
      'rope_type': 'yarn',
      'rope_theta': 150.0,
      'factor': 4.0,
      'beta_fast': 4.0,
      'beta_slow': 1.0,
      'truncate': False,
      'original_max_position_embeddings': 8,
    },
  },
}


@functools.cache
def model_of(name, dtype='float64'):
  """A model of random tensors; no weight is zero or one, so that each counts.

  The tensors are what the reader asks for: names are tested with checkpoints
  that `transformers` writes.
  """
  rng = np.random.default_rng(0)

  shapes = {}

  def check(self, tensor, shape):
    shapes[tensor] = shape

  def take(self, tensor):
    scale = 0.05 if tensor.endswith('bias') else 0.4
    return rng.normal(size=shapes[tensor]) * scale

  config = CONFIGS[name] | {'model_type': name.partition('-')[0]}
  names = map(str, range(config['num_hidden_layers']))
  checkpoint = pretrained.Checkpoint(config, dict.fromkeys(names, np.zeros(1)))
  change = functools.partial(mock.patch.object, _reading.Tensors)
  with (
    change('_check', check),
    change('_take', take),
    change('check_all_taken'),
  ):
    return pretrained.from_checkpoint(checkpoint, dtype=dtype)
