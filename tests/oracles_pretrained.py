"""Language models in NumPy float64, from tensors as Hugging Face names them.

Small random checkpoints, and their forward pass by the blocks of
`oracles_transformer`. Nothing of the package is imported.
"""

import numpy as np

from tests import oracles_transformer as blocks

LLAMA = {
  'model_type': 'llama',
  'vocab_size': 23,
  'hidden_size': 24,
  'intermediate_size': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'hidden_act': 'silu',
  'max_position_embeddings': 16,
  'rms_norm_eps': 1e-3,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0},
  'tie_word_embeddings': False,
  'attention_bias': True,
  'mlp_bias': True,
}
GPT2 = {
  'model_type': 'gpt2',
  'vocab_size': 23,
  'n_positions': 16,
  'n_embd': 24,
  'n_layer': 2,
  'n_head': 3,
  'n_inner': 20,
  'activation_function': 'gelu_new',
  'layer_norm_epsilon': 1e-3,
}
BERT = {
  'model_type': 'bert',
  'vocab_size': 23,
  'max_position_embeddings': 16,
  'type_vocab_size': 2,
  'hidden_size': 24,
  'intermediate_size': 20,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-3,
}


def llama_shapes(config):
  """Names and shapes of a Llama's tensors, `nn.Linear` as `[out, in]`."""
  d, d_ff = config['hidden_size'], config['intermediate_size']
  heads = config['num_attention_heads']
  d_k = config.get('head_dim', d // heads)
  groups = config.get('num_key_value_heads', heads)
  shapes = {
    'model.embed_tokens.weight': (config['vocab_size'], d),
    'model.norm.weight': (d,),
  }
  if not config.get('tie_word_embeddings', False):
    shapes['lm_head.weight'] = (config['vocab_size'], d)
  linear = {
    'self_attn.q_proj': (heads * d_k, d),
    'self_attn.k_proj': (groups * d_k, d),
    'self_attn.v_proj': (groups * d_k, d),
    'self_attn.o_proj': (d, heads * d_k),
    'mlp.gate_proj': (d_ff, d),
    'mlp.up_proj': (d_ff, d),
    'mlp.down_proj': (d, d_ff),
  }
  for n in range(config['num_hidden_layers']):
    layer = f'model.layers.{n}.'
    shapes[layer + 'input_layernorm.weight'] = (d,)
    shapes[layer + 'post_attention_layernorm.weight'] = (d,)
    for name, shape in linear.items():
      shapes[f'{layer}{name}.weight'] = shape
      kind = 'attention_bias' if 'attn' in name else 'mlp_bias'
      if config.get(kind, False):
        shapes[f'{layer}{name}.bias'] = shape[:1]
  return shapes


def gpt2_shapes(config):
  """Names and shapes of a GPT-2's tensors, `Conv1D` as `[in, out]`."""
  d, d_ff = config['n_embd'], config['n_inner']
  shapes = {
    'transformer.wte.weight': (config['vocab_size'], d),
    'transformer.wpe.weight': (config['n_positions'], d),
    'transformer.ln_f.weight': (d,),
    'transformer.ln_f.bias': (d,),
  }
  for n in range(config['n_layer']):
    for name, shape in {
      'ln_1': (d,),
      'attn.c_attn': (d, 3 * d),
      'attn.c_proj': (d, d),
      'ln_2': (d,),
      'mlp.c_fc': (d, d_ff),
      'mlp.c_proj': (d_ff, d),
    }.items():
      shapes[f'transformer.h.{n}.{name}.weight'] = shape
      shapes[f'transformer.h.{n}.{name}.bias'] = shape[-1:]
  return shapes


def bert_shapes(config):
  """Names and shapes of a BERT's tensors, `nn.Linear` as `[out, in]`."""
  d, d_ff = config['hidden_size'], config['intermediate_size']
  shapes = {
    'embeddings.word_embeddings.weight': (config['vocab_size'], d),
    'embeddings.position_embeddings.weight': (
      config['max_position_embeddings'],
      d,
    ),
    'embeddings.token_type_embeddings.weight': (config['type_vocab_size'], d),
    'embeddings.LayerNorm.weight': (d,),
    'embeddings.LayerNorm.bias': (d,),
  }
  for n in range(config['num_hidden_layers']):
    for name, shape in {
      'attention.self.query': (d, d),
      'attention.self.key': (d, d),
      'attention.self.value': (d, d),
      'attention.output.dense': (d, d),
      'attention.output.LayerNorm': (d,),
      'intermediate.dense': (d_ff, d),
      'output.dense': (d, d_ff),
      'output.LayerNorm': (d,),
    }.items():
      shapes[f'encoder.layer.{n}.{name}.weight'] = shape
      shapes[f'encoder.layer.{n}.{name}.bias'] = shape[:1]
  return shapes


def random_tensors(shapes, seed=0, dtype=np.float64):
  """Tensors that make softmax and norms matter: no weight is zero or one."""
  rng = np.random.default_rng(seed)
  return {
    name: (rng.normal(size=shape) * 0.5).astype(dtype)
    for name, shape in shapes.items()
  }


def parameters(tensors, layer, names, norms, *, is_transposed=True):
  """One block in the layout of `oracles_transformer`."""
  p = {}
  for key, name in names.items():
    weight = tensors[f'{layer}{name}.weight']
    p['w_' + key] = weight.T if is_transposed else weight
    if f'{layer}{name}.bias' in tensors:
      p['b_' + key] = tensors[f'{layer}{name}.bias']
  for index, name in enumerate(norms, 1):
    p[f'norm_{index}'] = tensors[f'{layer}{name}.weight']
    p[f'shift_{index}'] = tensors.get(f'{layer}{name}.bias')
  return p


LLAMA_NAMES = {key: f'self_attn.{key}_proj' for key in 'qkvo'} | {
  key: f'mlp.{key}_proj' for key in ('gate', 'up', 'down')
}
GPT2_NAMES = {'o': 'attn.c_proj', 'up': 'mlp.c_fc', 'down': 'mlp.c_proj'}
BERT_NAMES = {
  'q': 'attention.self.query',
  'k': 'attention.self.key',
  'v': 'attention.self.value',
  'o': 'attention.output.dense',
  'up': 'intermediate.dense',
  'down': 'output.dense',
}


def llama_logits(config, tensors, tokens):
  """Logits of a Llama after each token."""
  base, epsilon = (
    config['rope_parameters']['rope_theta'],
    config['rms_norm_eps'],
  )
  counts = config['num_attention_heads'], config['num_key_value_heads']
  norms = 'input_layernorm', 'post_attention_layernorm'
  x = tensors['model.embed_tokens.weight'][tokens]
  for n in range(config['num_hidden_layers']):
    p = parameters(tensors, f'model.layers.{n}.', LLAMA_NAMES, norms)
    x = blocks.llama_block(p, x, *counts, base, epsilon)
  scale = tensors['model.norm.weight']
  x = np.stack([blocks.rms_norm(row, scale, epsilon) for row in x])
  tied = config['tie_word_embeddings']
  head = 'model.embed_tokens.weight' if tied else 'lm_head.weight'
  return x @ tensors[head].T


def gpt2_logits(config, tensors, tokens):
  """Logits of a GPT-2 after each token."""
  tensors = {k.removeprefix('transformer.'): v for k, v in tensors.items()}
  heads, epsilon = config['n_head'], config['layer_norm_epsilon']
  x = tensors['wte.weight'][tokens] + tensors['wpe.weight'][: len(tokens)]
  for n in range(config['n_layer']):
    p = parameters(
      tensors, f'h.{n}.', GPT2_NAMES, ('ln_1', 'ln_2'), is_transposed=False
    )
    for kind, name in (('w', 'weight'), ('b', 'bias')):
      thirds = np.split(tensors[f'h.{n}.attn.c_attn.{name}'], 3, axis=-1)
      p |= {f'{kind}_{key}': x for key, x in zip('qkv', thirds, strict=True)}
    x = blocks.gpt2_block(p, x, heads, epsilon)
  norm = tensors['ln_f.weight'], tensors['ln_f.bias']
  x = np.stack([blocks.layer_norm(row, *norm, epsilon) for row in x])
  return x @ tensors['wte.weight'].T


def bert_hidden_states(config, tensors, tokens, token_types):
  """Output of a BERT for each token."""
  heads, epsilon = config['num_attention_heads'], config['layer_norm_eps']
  x = tensors['embeddings.word_embeddings.weight'][tokens]
  x = x + tensors['embeddings.position_embeddings.weight'][: len(tokens)]
  x = x + tensors['embeddings.token_type_embeddings.weight'][token_types]
  norm = (
    tensors[f'embeddings.LayerNorm.{name}'] for name in ('weight', 'bias')
  )
  scale, shift = norm
  x = np.stack([blocks.layer_norm(row, scale, shift, epsilon) for row in x])
  norms = 'attention.output.LayerNorm', 'output.LayerNorm'
  for n in range(config['num_hidden_layers']):
    p = parameters(tensors, f'encoder.layer.{n}.', BERT_NAMES, norms)
    x = blocks.bert_block(p, x, heads, epsilon)
  return x
