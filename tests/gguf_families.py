"""A small model of every architecture that GGUF files hold, as converters do.

Names come from the tables of the package `gguf`; what converters do to the
tensors and settings is written down here once more, the other way round.
"""

from typing import NamedTuple

import numpy as np

from tests import oracles_pretrained as oracles, pretrained_files as files

SIZES = {'V': 48, 'd': 32, 'ff': 24, 'h': 64, 'g': 32, 'w': 16, 'C': 64, 'E': 3}
SIZES |= {'ff2': 48, 'qkv': 64, '3d': 96, 'H': 4, 'rows': 2, '1': 1}
PROJECTIONS = """self_attn.q_proj.weight:h,d self_attn.k_proj.weight:g,d
  self_attn.v_proj.weight:g,d self_attn.o_proj.weight:d,h"""
BIASES = """self_attn.q_proj.bias:h self_attn.k_proj.bias:g
  self_attn.v_proj.bias:g"""
MLP = 'mlp.gate_proj.weight:ff,d mlp.up_proj.weight:ff,d '
DOWN = ' mlp.down_proj.weight:d,ff '
BEFORE = ' input_layernorm.weight:d post_attention_layernorm.weight:d '
AFTER = """ post_attention_layernorm.weight:d
  post_feedforward_layernorm.weight:d """
Q_K_NORMS = ' self_attn.q_norm.weight:w self_attn.k_norm.weight:w '
LLAMA = PROJECTIONS + ' ' + MLP + DOWN
GEMMA = LLAMA + AFTER + 'input_layernorm.weight:d pre_feedforward_layernorm.'
GEMMA += 'weight:d '
AROUND = 'model.embed_tokens.weight:V,d model.norm.weight:d '


class Family(NamedTuple):
  """A model: its config at Hugging Face, and what its file says."""

  architecture: str
  config: dict
  metadata: dict
  shapes: dict


def shapes_of(around, layers, inside, num_layers=2):
  def read(pairs, prefix=''):
    for pair in pairs.split():
      name, _, sizes = pair.partition(':')
      yield prefix + name, tuple(SIZES[size] for size in sizes.split(','))

  shapes = dict(read(around))
  for n in range(num_layers):
    shapes |= read(inside, f'{layers}.{n}.')
  return shapes


def modern(
  architecture,
  inside,
  config,
  metadata=(),
  *,
  model_type=None,
  rope=(),
  layers=2,
  head=True,
):
  """A family with RMSNorm and rotary positions."""
  every = {
    'model_type': model_type or architecture,
    'vocab_size': 48,
    'hidden_size': 32,
    'intermediate_size': 24,
    'num_hidden_layers': layers,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 16,
    'hidden_act': 'silu',
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0}
    | dict(rope),
    'tie_word_embeddings': not head,
  }
  said = {
    'block_count': layers,
    'context_length': 64,
    'embedding_length': 32,
    'feed_forward_length': 24,
    'attention.head_count': 4,
    'attention.head_count_kv': [2] * layers,
    'attention.key_length': 16,
    'attention.value_length': 16,
    'attention.layer_norm_rms_epsilon': 1e-5,
    'rope.freq_base': 500.0,
    'vocab_size': 48,
  }
  around = AROUND + ('lm_head.weight:V,d' if head else '')
  shapes = shapes_of(around, 'model.layers', inside, layers)
  changed = {k: v for k, v in (every | dict(config)).items() if v != 'absent'}
  return Family(architecture, changed, said | dict(metadata), shapes)


BIAS = {'attention_bias': False}
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 16,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
}
YARN_SAID = {
  'rope.scaling.type': 'yarn',
  'rope.scaling.factor': 4.0,
  'rope.scaling.original_context_length': 16,
}
LONG = {
  'rope_type': 'longrope',
  'short_factor': [1.0, 1.5, 2.0],
  'long_factor': [2.0, 3.0, 4.0],
  'original_max_position_embeddings': 16,
  'attention_factor': 1.25,
  'partial_rotary_factor': 0.75,
}
GEMMA_CONFIG = BIAS | {
  'hidden_act': 'absent',
  'hidden_activation': 'gelu_pytorch_tanh',
  'query_pre_attn_scalar': 16,
  'sliding_window': 8,
}
SLIDING, FULL = 'sliding_attention', 'full_attention'
FAMILIES = {
  'llama': modern('llama', LLAMA + BEFORE, BIAS | {'mlp_bias': False}),
  'linear llama': modern(
    'llama',
    LLAMA + BEFORE + BIASES + ' self_attn.o_proj.bias:d',
    {'attention_bias': True, 'mlp_bias': False},
    {'rope.scale_linear': 2.0},
    rope={'rope_type': 'linear', 'factor': 2.0},
  ),
  'mistral': modern(
    'llama',
    LLAMA + BEFORE,
    {'sliding_window': 8},
    {'attention.sliding_window': 8},
    model_type='mistral',
  ),
  'qwen2': modern('qwen2', LLAMA + BEFORE + BIASES, {}, YARN_SAID, rope=YARN),
  'qwen3': modern('qwen3', LLAMA + BEFORE + Q_K_NORMS, BIAS, head=False),
  'olmo2': modern(
    'olmo2',
    LLAMA + AFTER + 'self_attn.q_norm.weight:h self_attn.k_norm.weight:g',
    BIAS,
  ),
  'gemma2': modern(
    'gemma2',
    GEMMA,
    GEMMA_CONFIG
    | {
      'layer_types': [SLIDING, FULL],
      'attn_logit_softcapping': 40.0,
      'final_logit_softcapping': 20.0,
    },
    {
      'attention.sliding_window': 8,
      'attn_logit_softcapping': 40.0,
      'final_logit_softcapping': 20.0,
    },
    head=False,
  ),
  'gemma3': modern(
    'gemma3',
    GEMMA + Q_K_NORMS,
    GEMMA_CONFIG
    | {
      'layer_types': [SLIDING] * 5 + [FULL, SLIDING],
      'rope_parameters': {
        FULL: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 500.0},
        SLIDING: {'rope_type': 'default', 'rope_theta': 50.0},
      },
    },
    {
      'attention.sliding_window': 8,
      'attention.sliding_window_pattern': [True] * 5 + [False, True],
      'rope.freq_base_swa': 50.0,
      'rope.scaling.type': 'linear',
      'rope.scaling.factor': 8.0,
    },
    model_type='gemma3_text',
    layers=7,
    head=False,
  ),
  'phi3': modern(
    'phi3',
    """self_attn.qkv_proj.weight:qkv,d self_attn.o_proj.weight:d,d
    mlp.gate_up_proj.weight:ff2,d"""
    + DOWN
    + BEFORE,
    {'sliding_window': None, 'head_dim': 8},
    {
      'attention.key_length': 8,
      'attention.value_length': 8,
      'rope.dimension_count': 6,
      'rope.scaling.attn_factor': 1.25,
      'rope.scaling.original_context_length': 16,
      'attention.sliding_window': 0,
    },
    rope=LONG,
  ),
  'smollm3': modern(
    'smollm3',
    LLAMA + BEFORE,
    BIAS | {'mlp_bias': False, 'no_rope_layers': [1, 1, 1, 0, 1]},
    layers=5,
    head=False,
  ),
  'gpt_oss': modern(
    'gpt-oss',
    PROJECTIONS
    + BEFORE
    + BIASES
    + """ self_attn.o_proj.bias:d self_attn.sinks:H
    mlp.router.weight:E,d mlp.router.bias:E
    mlp.experts.gate_up_proj:E,d,ff2 mlp.experts.gate_up_proj_bias:E,ff2
    mlp.experts.down_proj:E,ff,d mlp.experts.down_proj_bias:E,d""",
    {
      'attention_bias': True,
      'num_local_experts': 3,
      'num_experts_per_tok': 2,
      'sliding_window': 8,
      'layer_types': [SLIDING, FULL],
    },
    {
      'expert_count': 3,
      'expert_used_count': 2,
      'expert_feed_forward_length': 24,
      'attention.sliding_window': 8,
    }
    | YARN_SAID,
    model_type='gpt_oss',
    rope=YARN | {'truncate': False},
  ),
  'gpt_neox': Family(
    'gptneox',
    {
      'model_type': 'gpt_neox',
      'vocab_size': 48,
      'hidden_size': 32,
      'intermediate_size': 24,
      'num_hidden_layers': 2,
      'num_attention_heads': 4,
      'hidden_act': 'gelu',
      'max_position_embeddings': 64,
      'layer_norm_eps': 1e-5,
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 10000.0,
        'partial_rotary_factor': 0.25,
      },
      'use_parallel_residual': False,
      'attention_bias': True,
      'tie_word_embeddings': False,
    },
    {
      'block_count': 2,
      'context_length': 64,
      'embedding_length': 32,
      'feed_forward_length': 24,
      'attention.head_count': 4,
      'attention.layer_norm_epsilon': 1e-5,
      'rope.dimension_count': 2,
      'use_parallel_residual': False,
    },
    shapes_of(
      """gpt_neox.embed_in.weight:V,d gpt_neox.final_layer_norm.weight:d
      gpt_neox.final_layer_norm.bias:d embed_out.weight:V,d""",
      'gpt_neox.layers',
      """input_layernorm.weight:d input_layernorm.bias:d
      post_attention_layernorm.weight:d post_attention_layernorm.bias:d
      attention.query_key_value.weight:3d,d attention.query_key_value.bias:3d
      attention.dense.weight:d,d attention.dense.bias:d
      mlp.dense_h_to_4h.weight:ff,d mlp.dense_h_to_4h.bias:ff
      mlp.dense_4h_to_h.weight:d,ff mlp.dense_4h_to_h.bias:d""",
    ),
  ),
  'gpt2': Family(
    'gpt2',
    oracles.GPT2 | {'tie_word_embeddings': True},
    {
      'block_count': 2,
      'context_length': 16,
      'embedding_length': 24,
      'feed_forward_length': 20,
      'attention.head_count': 3,
      'attention.layer_norm_epsilon': 1e-3,
    },
    {
      f'transformer.{name.removeprefix("transformer.")}': shape
      for name, shape in oracles.gpt2_shapes(oracles.GPT2).items()
    },
  ),
  'bert': Family(
    'bert',
    oracles.BERT | {'tie_word_embeddings': True},
    {
      'block_count': 2,
      'context_length': 16,
      'embedding_length': 24,
      'feed_forward_length': 20,
      'attention.head_count': 3,
      'attention.layer_norm_epsilon': 1e-3,
      'attention.causal': False,
      'pooling_type': 1,
    },
    oracles.bert_shapes(oracles.BERT),
  ),
}


def tensors_of(family):
  """Random tensors that float32 holds with one added, and one taken off."""
  arrays = oracles.random_tensors(family.shapes)
  return {
    name: np.asarray(np.round(array * 1024) / 1024, np.float32)
    for name, array in arrays.items()
  }


def converted(family, tensors):
  """The tensors of the file by their names there."""
  architecture = family.architecture
  number = next(
    n for n, name in files.gguf.MODEL_ARCH_NAMES.items() if name == architecture
  )
  layers = family.metadata['block_count']
  table = files.gguf.get_tensor_name_map(number, layers)
  stored = {}
  for name, array in tensors.items():
    stored |= parts_of(table, family, name, array)
  if family.config.get('rope_parameters', {}).get('short_factor'):
    for length in ('short', 'long'):
      factors = family.config['rope_parameters'][f'{length}_factor']
      stored[f'rope_factors_{length}.weight'] = np.float32(factors)
  return stored


def parts_of(table, family, name, array):
  """What a converter makes of one tensor."""
  architecture, stem = family.architecture, name.removesuffix('_bias')
  kind = 'bias' if stem != name else 'weight'
  if '.experts.' in name or name.endswith('sinks'):
    if array.ndim == 3:
      array = array.swapaxes(1, 2)
    if 'gate_up_proj' not in name:
      return {f'{table.get_name(stem)}.{kind}': array}
    down = table.get_name(stem.replace('gate_up', 'down'))
    halves = {'gate': slice(0, None, 2), 'up': slice(1, None, 2)}
    return {
      f'{down.replace("down", half)}.{kind}': array[:, index]
      for half, index in halves.items()
    }
  if architecture in ('llama', 'smollm3'):
    for part, heads in (('q_proj', 4), ('k_proj', 2)):
      if part in name:
        rows = array.reshape(heads, 2, -1, *array.shape[1:])
        array = rows.swapaxes(1, 2).reshape(array.shape)
  if architecture.startswith('gemma') and name.endswith('norm.weight'):
    array = array + 1
  if 'query_key_value' in name:
    heads = array.reshape(4, 3, -1, *array.shape[1:])
    array = heads.swapaxes(0, 1).reshape(array.shape)
  if architecture == 'gpt2' and '.c_' in name:
    array = array.T
  return {table.get_name(name, ('.weight', '.bias')): array}


def write(path, family, tensors, changes=()):
  """Writes the file of a family; `changes` of its metadata."""
  metadata = {
    f'{family.architecture}.{name}': value
    for name, value in (family.metadata | dict(changes)).items()
  }
  return files.write_gguf(
    path,
    {
      name: np.ascontiguousarray(array)
      for name, array in converted(family, tensors).items()
    },
    metadata,
    architecture=family.architecture,
    as_named=True,
  )
