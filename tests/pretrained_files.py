"""Small model files of each layout, written for tests.

The GGUF file is written as converters write it: by the package `gguf`, with the
rows of the query and key projections permuted for rotations of neighbours.
"""

import json

import ml_dtypes
import numpy as np
import pytest

from tests import oracles_pretrained as oracles

REASON = "the readers need packages of the extra 'iclcl_jax[lm]'"
gguf = pytest.importorskip('gguf', reason=REASON)
tokenizers = pytest.importorskip('tokenizers', reason=REASON)
save_file = pytest.importorskip('safetensors.numpy', reason=REASON).save_file

NUM_HEADS, NUM_GROUPS, HEAD_DIM = 4, 2, 8
D_MODEL, D_FF, NUM_LAYERS = 32, 64, 2
SPECIAL = ['<|end|>', '<|start|>']
MERGES = [('Ġ', 't'), ('h', 'e'), ('Ġt', 'he'), ('1', '2'), ('o', 'k')]
TOKENS = [
  *SPECIAL,
  *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
  *(a + b for a, b in MERGES),
]
CONFIG = {
  'model_type': 'llama',
  'hidden_size': D_MODEL,
  'intermediate_size': D_FF,
  'num_hidden_layers': NUM_LAYERS,
  'num_attention_heads': NUM_HEADS,
  'num_key_value_heads': NUM_GROUPS,
  'head_dim': HEAD_DIM,
  'hidden_act': 'silu',
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-05,
  'rope_theta': 20000.0,
  'attention_bias': False,
  'mlp_bias': False,
  'vocab_size': len(TOKENS),
  'tie_word_embeddings': False,
}
# What llama.cpp calls the tensors, part by part.
GGUF_PARTS = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'model.layers.': 'blk.',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
METADATA = {
  'llama.block_count': NUM_LAYERS,
  'llama.context_length': 64,
  'llama.embedding_length': D_MODEL,
  'llama.feed_forward_length': D_FF,
  'llama.attention.head_count': NUM_HEADS,
  'llama.attention.head_count_kv': NUM_GROUPS,
  'llama.rope.dimension_count': HEAD_DIM,
  'llama.rope.freq_base': 20000.0,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'smollm',
  'tokenizer.ggml.tokens': TOKENS,
  'tokenizer.ggml.token_type': [3] * len(SPECIAL)
  + [1] * (len(TOKENS) - len(SPECIAL)),
  'tokenizer.ggml.merges': [' '.join(pair) for pair in MERGES],
  'tokenizer.ggml.bos_token_id': 1,
  'tokenizer.ggml.eos_token_id': 0,
}


def tensors(*, tied=False):
  """Random tensors of a small llama, by their Hugging Face names."""
  shapes = oracles.llama_shapes(CONFIG | {'tie_word_embeddings': tied})
  return oracles.random_tensors(shapes, dtype=np.float32)


def gguf_name(name):
  """The name that llama.cpp gives to a tensor."""
  for ours, theirs in GGUF_PARTS.items():
    name = name.replace(ours, theirs)
  return name


def permuted(array, num_heads):
  """Rows as converters store them, from the order of Hugging Face."""
  halves = array.reshape(num_heads, 2, HEAD_DIM // 2, *array.shape[1:])
  return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def stored(name, array):
  """A tensor as a GGUF file holds it."""
  if '.q_proj.' in name:
    return permuted(array, NUM_HEADS)
  return permuted(array, NUM_GROUPS) if '.k_proj.' in name else array


def write_gguf(
  path,
  arrays,
  metadata=METADATA,
  *,
  architecture='llama',
  types=None,
  as_named=False,
  raw=None,
  alignment=None,
  order=gguf.GGUFEndian.LITTLE,
):
  """Writes a GGUF file.

  Args:
    path: the file.
    arrays: tensors by Hugging Face name; unknown names are kept.
    metadata: entries; those that are None are left out.
    architecture: entry `general.architecture`.
    types: quantisation of tensors by Hugging Face name; float32 otherwise.
    raw: quantisation of tensors that are given as bytes.
    alignment: of the tensors, if not the usual one.
    as_named: whether the tensors have their names and order in the file.
    order: of the bytes.
  """
  writer = gguf.GGUFWriter(path, architecture, endianess=order)
  if alignment:
    writer.data_alignment = alignment
  add = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  for name, value in metadata.items():
    if value is not None:
      add[type(value)](name, value)
  for name, array in arrays.items():
    kind = (types or {}).get(name)
    if not as_named:
      name, array = gguf_name(name), stored(name, array)
    if kind is None or array.dtype == np.int8:
      writer.add_tensor(name, array, raw_dtype=(raw or {}).get(name))
    else:
      writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def backend():
  """The tokenizer of the files, as `tokenizers` builds it."""
  parts = tokenizers.pre_tokenizers
  result = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: n for n, token in enumerate(TOKENS)}, merges=MERGES
    )
  )
  result.pre_tokenizer = parts.Sequence(
    [
      parts.Digits(individual_digits=True),
      parts.ByteLevel(add_prefix_space=False),
    ]
  )
  result.decoder = tokenizers.decoders.ByteLevel()
  result.add_special_tokens(SPECIAL)
  return result


def write_directory(directory, arrays, config=CONFIG, *, num_shards=1):
  """Writes a directory in the layout of Hugging Face."""
  directory.mkdir(exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(config))
  backend().save(str(directory / 'tokenizer.json'))
  arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
  if num_shards == 1:
    save_file(arrays, directory / 'model.safetensors')
    return directory
  weight_map = {}
  for n in range(num_shards):
    shard = f'model-{n + 1:05}-of-{num_shards:05}.safetensors'
    part = dict(list(arrays.items())[n::num_shards])
    save_file(part, directory / shard)
    weight_map |= dict.fromkeys(part, shard)
  write_index(directory, weight_map)
  return directory


def write_index(directory, weight_map):
  """Writes which tensor lies in which shard."""
  index = {'metadata': {}, 'weight_map': weight_map}
  path = directory / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))


DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def write_model(path, added):
  """A random model whose tokenizer has some words more."""
  size = len(TOKENS) + len(added)
  rng = np.random.default_rng(0)
  arrays = tensors()
  for name in ('model.embed_tokens.weight', 'lm_head.weight'):
    arrays[name] = rng.normal(size=(size, D_MODEL)).astype(np.float32)
  changes = {'vocab_size': size, 'max_position_embeddings': 1024}
  write_directory(path, arrays, CONFIG | changes)
  tokenizer = backend()
  tokenizer.add_tokens(added)
  tokenizer.save(str(path / 'tokenizer.json'))
  return str(path)
