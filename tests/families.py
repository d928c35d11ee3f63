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


# What released models state, but for sizes and what the names of files say.
RELEASED = {
  'attention_dropout': 0.0,
  'bos_token_id': 1,
  'eos_token_id': [2, 3],
  'hidden_act': 'silu',
  'initializer_range': 0.02,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.45.0',
  'use_cache': True,
}
LLAMA3 = RELEASED | {
  'model_type': 'llama',
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': False,
}
QWEN = RELEASED | {
  'max_position_embeddings': 32768,
  'max_window_layers': 28,
  'rms_norm_eps': 1e-06,
  'rope_theta': 1000000.0,
  'sliding_window': 32768,
  'tie_word_embeddings': True,
  'use_sliding_window': False,
}
GEMMA = RELEASED | {
  'attention_bias': False,
  'attn_logit_softcapping': 50.0,
  'cache_implementation': 'hybrid',
  'final_logit_softcapping': 30.0,
  'head_dim': 256,
  'hidden_act': 'gelu_pytorch_tanh',
  'hidden_activation': 'gelu_pytorch_tanh',
  'max_position_embeddings': 8192,
  'model_type': 'gemma2',
  'query_pre_attn_scalar': 256,
  'rms_norm_eps': 1e-06,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
}
PHI = RELEASED | {
  'model_type': 'phi3',
  'attention_bias': False,
  'auto_map': {'AutoConfig': 'configuration_phi3.Phi3Config'},
  'embd_pdrop': 0.0,
  'max_position_embeddings': 131072,
  'original_max_position_embeddings': 4096,
  'resid_pdrop': 0.0,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'long_factor': [1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 9.0],
    'short_factor': [1.0, 1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    'type': 'longrope',
  },
  'rope_theta': 10000.0,
  'sliding_window': 262144,
  'tie_word_embeddings': False,
}
PUBLISHED = {
  'Llama-2-7b': LLAMA3
  | {'max_position_embeddings': 4096, 'rope_scaling': None, 'rope_theta': 1e4},
  'Llama-3.1-8B': LLAMA3,
  'Llama-3.2-1B': LLAMA3
  | {
    'head_dim': 64,
    'rope_scaling': LLAMA3['rope_scaling'] | {'factor': 32.0},
    'tie_word_embeddings': True,
  },
  'SmolLM2-135M-Instruct': RELEASED
  | {
    'model_type': 'llama',
    'attention_bias': False,
    'is_llama_config': True,
    'mlp_bias': False,
    'rms_norm_eps': 1e-05,
    'rope_interleaved': False,
    'rope_scaling': None,
    'rope_theta': 100000,
    'tie_word_embeddings': True,
    'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}},
  },
  'Qwen2.5-0.5B': QWEN | {'model_type': 'qwen2', 'use_mrope': False},
  'Qwen2.5-7B-Instruct, for long texts': QWEN
  | {
    'model_type': 'qwen2',
    'rope_scaling': {
      'factor': 4.0,
      'original_max_position_embeddings': 32768,
      'type': 'yarn',
    },
  },
  'Qwen3-0.6B': QWEN
  | {
    'model_type': 'qwen3',
    'attention_bias': False,
    'head_dim': 128,
    'rope_scaling': None,
    'sliding_window': None,
  },
  'gemma-2-2b': GEMMA,
  'gemma-3-1b-it': GEMMA
  | {
    'model_type': 'gemma3_text',
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'hidden_act': None,
    'rope_local_base_freq': 10000,
    'rope_scaling': None,
    'rope_theta': 1000000,
    'sliding_window': 512,
    'sliding_window_pattern': 6,
  },
  'pythia-160m': {
    'model_type': 'gpt_neox',
    'architectures': ['GPTNeoXForCausalLM'],
    'bos_token_id': 0,
    'eos_token_id': 0,
    'hidden_act': 'gelu',
    'initializer_range': 0.02,
    'layer_norm_eps': 1e-05,
    'max_position_embeddings': 2048,
    'rotary_emb_base': 10000,
    'rotary_pct': 0.25,
    'tie_word_embeddings': False,
    'torch_dtype': 'float16',
    'use_cache': True,
    'use_parallel_residual': True,
  },
  'OLMo-2-1124-7B': RELEASED
  | {
    'model_type': 'olmo2',
    'attention_bias': False,
    'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-06,
    'rope_scaling': None,
    'rope_theta': 500000,
    'tie_word_embeddings': False,
  },
  'Mistral-7B-v0.1': RELEASED
  | {
    'model_type': 'mistral',
    'max_position_embeddings': 32768,
    'rms_norm_eps': 1e-05,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'tie_word_embeddings': False,
  },
  'Mistral-Nemo-Base-2407': RELEASED
  | {
    'model_type': 'mistral',
    'head_dim': 128,
    'max_position_embeddings': 131072,
    'rms_norm_eps': 1e-05,
    'rope_theta': 1000000.0,
    'sliding_window': None,
    'tie_word_embeddings': False,
  },
  'Phi-3-mini-4k-instruct': PHI
  | {
    'max_position_embeddings': 4096,
    'rope_scaling': None,
    'sliding_window': 2047,
  },
  'Phi-3.5-mini-instruct': PHI,
  'Phi-4-mini-instruct': PHI
  | {
    'full_attn_mod': 1,
    'interpolate_factor': 1,
    'lm_head_bias': False,
    'mlp_bias': False,
    'partial_rotary_factor': 0.75,
    'rope_scaling': {
      name: factors[:6] if isinstance(factors, list) else factors
      for name, factors in PHI['rope_scaling'].items()
    },
    'tie_word_embeddings': True,
  },
  'SmolLM3-3B': RELEASED
  | {
    'model_type': 'smollm3',
    'attention_bias': False,
    'layer_types': ['full_attention'] * 36,
    'max_position_embeddings': 65536,
    'max_window_layers': 28,
    'mlp_bias': False,
    'no_rope_layer_interval': 4,
    'no_rope_layers': [1, 1, 1, 0] * 9,
    'pretraining_tp': 2,
    'rms_norm_eps': 1e-06,
    'rope_scaling': None,
    'rope_theta': 5000000.0,
    'sliding_window': None,
    'use_sliding_window': False,
  },
  'gpt-oss-20b': RELEASED
  | {
    'model_type': 'gpt_oss',
    'attention_bias': True,
    'experts_per_token': 4,
    'head_dim': 64,
    'initial_context_length': 4096,
    'layer_types': [LOCAL, FULL] * 12,
    'max_position_embeddings': 131072,
    'num_experts_per_tok': 4,
    'output_router_logits': False,
    'rms_norm_eps': 1e-05,
    'rope_scaling': {
      'beta_fast': 32.0,
      'beta_slow': 1.0,
      'factor': 32.0,
      'original_max_position_embeddings': 4096,
      'rope_type': 'yarn',
      'truncate': False,
    },
    'rope_theta': 150000,
    'router_aux_loss_coef': 0.9,
    'sliding_window': 128,
    'swiglu_limit': 7.0,
    'tie_word_embeddings': False,
  },
  'gpt2': {
    'model_type': 'gpt2',
    'activation_function': 'gelu_new',
    'architectures': ['GPT2LMHeadModel'],
    'attn_pdrop': 0.1,
    'bos_token_id': 50256,
    'embd_pdrop': 0.1,
    'eos_token_id': 50256,
    'initializer_range': 0.02,
    'layer_norm_epsilon': 1e-05,
    'n_ctx': 1024,
    'output_past': True,
    'resid_pdrop': 0.1,
    'summary_activation': None,
    'summary_first_dropout': 0.1,
    'summary_proj_to_labels': True,
    'summary_type': 'cls_index',
    'summary_use_proj': True,
    'task_specific_params': {'text-generation': {'do_sample': True}},
  },
  'bert-base-multilingual-cased': {
    'model_type': 'bert',
    'architectures': ['BertForMaskedLM'],
    'attention_probs_dropout_prob': 0.1,
    'directionality': 'bidi',
    'gradient_checkpointing': False,
    'hidden_act': 'gelu',
    'hidden_dropout_prob': 0.1,
    'initializer_range': 0.02,
    'layer_norm_eps': 1e-12,
    'pad_token_id': 0,
    'pooler_fc_size': 768,
    'pooler_num_attention_heads': 12,
    'pooler_num_fc_layers': 3,
    'pooler_size_per_head': 128,
    'pooler_type': 'first_token_transform',
    'position_embedding_type': 'absolute',
    'type_vocab_size': 2,
    'use_cache': True,
  },
}
TINY = {
  'vocab_size': 61,
  'hidden_size': 64,
  'intermediate_size': 52,
  'num_hidden_layers': 6,
  'num_attention_heads': 4,
  'pad_token_id': None,
  'bos_token_id': None,
  'eos_token_id': None,
}


def published(name):
  """A released config with other sizes, and without ids that these exclude."""
  config = PUBLISHED[name]
  kind = config['model_type']
  if kind == 'gpt2':
    return config | GPT2
  config = config | TINY
  if kind == 'bert':
    return config | {'max_position_embeddings': 32, 'pad_token_id': 0}
  if kind != 'gpt_neox':
    config['num_key_value_heads'] = 2
  if 'head_dim' in config:
    config['head_dim'] = 10
  if kind == 'gpt_oss':
    config['num_local_experts'] = 5
  for field in ('layer_types', 'no_rope_layers'):
    if field in config:
      config[field] = config[field][:6]
  return config


@functools.cache
def model_of(name, dtype='float64'):
  return make(CONFIGS[name] | {'model_type': name.partition('-')[0]}, dtype)


def make(config, dtype='float64'):
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

  names = map(str, range(config.get('num_hidden_layers', 6)))
  checkpoint = pretrained.Checkpoint(config, dict.fromkeys(names, np.zeros(1)))
  change = functools.partial(mock.patch.object, _reading.Tensors)
  with (
    change('_check', check),
    change('_take', take),
    change('check_all_taken'),
  ):
    return pretrained.from_checkpoint(checkpoint, dtype=dtype)
