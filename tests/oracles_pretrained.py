"""Language models in NumPy float64, from tensors as Hugging Face names them.

Small random checkpoints and their forward pass, one token and one head at a
time. Nothing of the package is imported.
"""

import math

import numpy as np

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


def _linear(x, tensors, name):
  y = x @ tensors[name + '.weight'].T
  return y + tensors[name + '.bias'] if name + '.bias' in tensors else y


def _conv1d(x, tensors, name):
  return x @ tensors[name + '.weight'] + tensors[name + '.bias']


def _layer_norm(x, tensors, name, epsilon):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt(x.var(-1, keepdims=True) + epsilon)
  return (
    centred / deviation * tensors[name + '.weight'] + tensors[name + '.bias']
  )


def _rms_norm(x, weight, epsilon):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def _gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _gelu_new(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def _silu(x):
  return x / (1 + np.exp(-x))


def _attend(queries, keys, values, visible):
  """One head, query by query. Rows are tokens."""
  out = np.zeros((len(queries), values.shape[1]))
  for i, query in enumerate(queries):
    seen = [j for j in range(len(keys)) if visible(i, j)]
    scores = np.array([keys[j] @ query for j in seen]) / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    out[i] = (weights / weights.sum()) @ values[seen]
  return out


def _rotate(x, base):
  """Turns the pair `(i, i + d_k/2)` of token p by p base^(-2i/d_k)."""
  half = x.shape[1] // 2
  angles = np.outer(np.arange(len(x)), base ** (-np.arange(half) / half))
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
  return np.concatenate([turned.real, turned.imag], axis=1)


def llama_logits(config, tensors, tokens):
  """Logits of a Llama after each token."""
  d_k, base = config['head_dim'], config['rope_parameters']['rope_theta']
  heads, groups = config['num_attention_heads'], config['num_key_value_heads']
  epsilon = config['rms_norm_eps']
  x = tensors['model.embed_tokens.weight'][tokens]
  for n in range(config['num_hidden_layers']):
    layer = f'model.layers.{n}.'
    y = _rms_norm(x, tensors[layer + 'input_layernorm.weight'], epsilon)
    q, k, v = (
      _linear(y, tensors, f'{layer}self_attn.{name}_proj') for name in 'qkv'
    )
    outputs = []
    for h in range(heads):
      g = h // (heads // groups)
      of_h, of_g = slice(h * d_k, (h + 1) * d_k), slice(g * d_k, (g + 1) * d_k)
      outputs.append(
        _attend(
          _rotate(q[:, of_h], base),
          _rotate(k[:, of_g], base),
          v[:, of_g],
          lambda i, j: j <= i,
        )
      )
    x = x + _linear(
      np.concatenate(outputs, axis=1), tensors, layer + 'self_attn.o_proj'
    )
    y = _rms_norm(
      x, tensors[layer + 'post_attention_layernorm.weight'], epsilon
    )
    gate = _silu(_linear(y, tensors, layer + 'mlp.gate_proj'))
    up = _linear(y, tensors, layer + 'mlp.up_proj')
    x = x + _linear(gate * up, tensors, layer + 'mlp.down_proj')
  x = _rms_norm(x, tensors['model.norm.weight'], epsilon)
  tied = config['tie_word_embeddings']
  head = 'model.embed_tokens.weight' if tied else 'lm_head.weight'
  return x @ tensors[head].T


def gpt2_logits(config, tensors, tokens):
  """Logits of a GPT-2 after each token."""
  tensors = {k.removeprefix('transformer.'): v for k, v in tensors.items()}
  heads, epsilon = config['n_head'], config['layer_norm_epsilon']
  x = tensors['wte.weight'][tokens] + tensors['wpe.weight'][: len(tokens)]
  for n in range(config['n_layer']):
    layer = f'h.{n}.'
    y = _layer_norm(x, tensors, layer + 'ln_1', epsilon)
    joint = _conv1d(y, tensors, layer + 'attn.c_attn')
    q, k, v = (np.split(part, heads, 1) for part in np.split(joint, 3, 1))
    outputs = [
      _attend(q[h], k[h], v[h], lambda i, j: j <= i) for h in range(heads)
    ]
    x = x + _conv1d(
      np.concatenate(outputs, axis=1), tensors, layer + 'attn.c_proj'
    )
    y = _layer_norm(x, tensors, layer + 'ln_2', epsilon)
    y = _gelu_new(_conv1d(y, tensors, layer + 'mlp.c_fc'))
    x = x + _conv1d(y, tensors, layer + 'mlp.c_proj')
  return _layer_norm(x, tensors, 'ln_f', epsilon) @ tensors['wte.weight'].T


def bert_hidden_states(config, tensors, tokens, token_types):
  """Output of a BERT for each token."""
  heads, epsilon = config['num_attention_heads'], config['layer_norm_eps']
  x = tensors['embeddings.word_embeddings.weight'][tokens]
  x = x + tensors['embeddings.position_embeddings.weight'][: len(tokens)]
  x = x + tensors['embeddings.token_type_embeddings.weight'][token_types]
  x = _layer_norm(x, tensors, 'embeddings.LayerNorm', epsilon)
  for n in range(config['num_hidden_layers']):
    layer = f'encoder.layer.{n}.'
    q, k, v = (
      np.split(_linear(x, tensors, f'{layer}attention.self.{name}'), heads, 1)
      for name in ('query', 'key', 'value')
    )
    outputs = [
      _attend(q[h], k[h], v[h], lambda i, j: True) for h in range(heads)
    ]
    y = np.concatenate(outputs, axis=1)
    x = x + _linear(y, tensors, layer + 'attention.output.dense')
    x = _layer_norm(x, tensors, layer + 'attention.output.LayerNorm', epsilon)
    y = _gelu(_linear(x, tensors, layer + 'intermediate.dense'))
    x = x + _linear(y, tensors, layer + 'output.dense')
    x = _layer_norm(x, tensors, layer + 'output.LayerNorm', epsilon)
  return x
