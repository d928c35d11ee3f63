"""How converters to GGUF store each architecture: settings, names, order."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from iclcl_jax.pretrained._gguf_entries import Entries, Fields
from iclcl_jax.pretrained._reading import Shape
from iclcl_jax.pretrained.families import gpt2


def _rotary(model_type: str, entries: Entries) -> Fields:
  """Reads what architectures with rotary positions and RMSNorm share."""
  heads = entries.base['num_attention_heads']
  width = entries.count('attention.key_length', entries.head_width)
  return entries.base | {
    'model_type': model_type,
    'head_dim': width,
    'num_key_value_heads': entries.count('attention.head_count_kv', heads),
    'hidden_act': 'silu',
    'rms_norm_eps': entries.number('attention.layer_norm_rms_epsilon'),
    'rope_parameters': entries.rope(width),
  }


def _periodic(config: Fields, period: int) -> Fields:
  """Says which layers see a window: all but the last of each period."""
  kinds = ['sliding_attention'] * (period - 1) + ['full_attention']
  layers = range(config['num_hidden_layers'])
  return config | {'layer_types': [kinds[n % period] for n in layers]}


def _biased(model_type: str, entries: Entries) -> Fields:
  bias = {'attention_bias': entries.has('attn_q.bias')}
  return _rotary(model_type, entries) | bias


def _llama(entries: Entries) -> Fields:
  """A llama, or with a window a mistral, which has no biases."""
  window = entries.count('attention.sliding_window', 0, least=0)
  if window:
    return _rotary('mistral', entries) | {'sliding_window': window}
  bias = {'mlp_bias': entries.has('ffn_up.bias')}
  return _biased('llama', entries) | bias


def _smollm3(entries: Entries) -> Fields:
  layers = range(entries.base['num_hidden_layers'])
  return _biased('smollm3', entries) | {
    'mlp_bias': entries.has('ffn_up.bias'),
    'no_rope_layers': [int((layer + 1) % 4 != 0) for layer in layers],
  }


def _phi3(entries: Entries) -> Fields:
  window = entries.count('attention.sliding_window', 0, least=0)
  return _rotary('phi3', entries) | {'sliding_window': window or None}


def _gemma(model_type: str, largest: int, entries: Entries) -> Fields:
  """Reads what Gemma 2 and 3 share; the largest divides by another scalar."""
  config = _biased(model_type, entries)
  config['hidden_activation'] = 'gelu_pytorch_tanh'
  del config['hidden_act']
  is_largest = config['num_hidden_layers'] == largest
  scalar = entries.head_width if is_largest else config['head_dim']
  return config | {'query_pre_attn_scalar': scalar}


def _gemma2(entries: Entries) -> Fields:
  return _periodic(_gemma('gemma2', 46, entries), 2) | {
    'sliding_window': entries.count('attention.sliding_window', 4096),
    'attn_logit_softcapping': entries.number('attn_logit_softcapping', 50.0),
    'final_logit_softcapping': entries.number('final_logit_softcapping', 30.0),
  }


def _gemma3(entries: Entries) -> Fields:
  config = _periodic(_gemma('gemma3_text', 62, entries), 6)
  theta = entries.number('rope.freq_base_swa', 10000.0)
  return config | {
    'rope_parameters': {
      'full_attention': config['rope_parameters'],
      'sliding_attention': {'rope_type': 'default', 'rope_theta': theta},
    },
    'sliding_window': entries.count('attention.sliding_window'),
  }


def _gpt_oss(entries: Entries) -> Fields:
  config = _periodic(_rotary('gpt_oss', entries), 2) | {
    'intermediate_size': entries.count('expert_feed_forward_length'),
    'num_local_experts': entries.count('expert_count'),
    'num_experts_per_tok': entries.count('expert_used_count'),
    'sliding_window': entries.count('attention.sliding_window'),
    'attention_bias': True,
  }
  if config['rope_parameters']['rope_type'] == 'yarn':
    config['rope_parameters']['truncate'] = False
  return config


def _gpt_neox(entries: Entries) -> Fields:
  return entries.base | {
    'model_type': 'gpt_neox',
    'hidden_act': 'gelu',
    'layer_norm_eps': entries.number('attention.layer_norm_epsilon'),
    'rope_parameters': entries.rope(entries.head_width),
    'use_parallel_residual': entries.switch('use_parallel_residual', True),
    'attention_bias': True,
  }


def _gpt2(entries: Entries) -> Fields:
  base = {gpt2.NAMES.get(k, k): v for k, v in entries.base.items()}
  return base | {
    'model_type': 'gpt2',
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': entries.number('attention.layer_norm_epsilon'),
  }


def _bert(entries: Entries) -> Fields:
  return entries.base | {
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'layer_norm_eps': entries.number('attention.layer_norm_epsilon'),
    'type_vocab_size': entries.shapes.get('token_types.weight', (1,))[0],
  }


def _pairs_to_halves(kind: str, array: np.ndarray, base: Fields) -> np.ndarray:
  """Orders rows for rotations of `(j, j + d_k / 2)`, not of `(2j, 2j + 1)`."""
  if not kind.startswith(('attn_q.', 'attn_k.')):
    return array
  heads = base['num_attention_heads']
  if kind.startswith('attn_k'):
    heads = base['num_key_value_heads']
  pairs = array.reshape(heads, -1, 2, *array.shape[1:])
  return pairs.swapaxes(1, 2).reshape(array.shape)


def _heads_together(kind: str, array: np.ndarray, base: Fields) -> np.ndarray:
  """Puts query, key and value of a head together; the file has all queries."""
  if not kind.startswith('attn_qkv.'):
    return array
  apart = array.reshape(3, base['num_attention_heads'], -1, *array.shape[1:])
  return apart.swapaxes(0, 1).reshape(array.shape)


def _minus_one(kind: str, array: np.ndarray, base: Fields) -> np.ndarray:
  """Takes off the one that converters add to the scales of norms."""
  del base
  return array - 1 if kind.endswith('norm.weight') else array


class Layout(NamedTuple):
  """How one architecture is stored.

  `names` are pairs `theirs=ours` of names of tensors; those in a block begin
  with a point. `undo` undoes what converters do, to an `attn_q.weight` say.
  """

  settings: Callable[[Entries], Fields]  # Makes the config of Hugging Face.
  names: str
  undo: Callable[[str, np.ndarray, Fields], np.ndarray] | None = None
  transposed: str = ''  # Kinds whose last two axes are swapped, a pattern.
  blocks: str = 'model.layers'  # Where the blocks are at Hugging Face.

  def name_of(self, tensor: str) -> str | None:
    block = re.match(r'blk\.\d+(?=\.)', tensor)
    theirs = tensor[block.end() :] if block else tensor
    table = dict(pair.split('=') for pair in self.names.split())
    stem, _, kind = theirs.rpartition('.')
    ours = table.get(theirs)
    if stem in table and kind in ('weight', 'bias'):
      ours = f'{table[stem]}.{kind}'
    if ours is None or ours.startswith('.') != bool(block):
      return None
    return ours if block is None else self.blocks + block.group()[3:] + ours

  def shape(self, tensor: str, shape: Shape) -> Shape:
    swapped = re.fullmatch(self.transposed, _kind(tensor))
    return (*shape[:-2], *shape[-2:][::-1]) if swapped else shape

  def undone(self, tensor: str, array: np.ndarray, base: Fields) -> np.ndarray:
    kind = _kind(tensor)
    if re.fullmatch(self.transposed, kind):
      return array.swapaxes(-1, -2)
    return self.undo(kind, array, base) if self.undo else array


def _kind(tensor: str) -> str:
  return '.'.join(tensor.split('.')[-2:])


_MODERN = """
  token_embd=model.embed_tokens output_norm=model.norm output=lm_head
  .attn_norm=.input_layernorm .attn_qkv=.self_attn.qkv_proj
  .attn_q=.self_attn.q_proj .attn_k=.self_attn.k_proj
  .attn_v=.self_attn.v_proj .attn_output=.self_attn.o_proj
  .attn_q_norm=.self_attn.q_norm .attn_k_norm=.self_attn.k_norm
  .attn_sinks.weight=.self_attn.sinks .ffn_down=.mlp.down_proj
  .post_attention_norm=.post_attention_layernorm """
_MLP = ' .ffn_gate=.mlp.gate_proj .ffn_up=.mlp.up_proj '
_BEFORE = ' .ffn_norm=.post_attention_layernorm '
_AFTER = """
  .ffn_norm=.pre_feedforward_layernorm
  .post_ffw_norm=.post_feedforward_layernorm """
_EXPERTS = """
  .ffn_gate_inp=.mlp.router
  .ffn_gate_exps.weight=.mlp.experts.gate_up_proj
  .ffn_up_exps.weight=.mlp.experts.gate_up_proj
  .ffn_down_exps.weight=.mlp.experts.down_proj
  .ffn_gate_exps.bias=.mlp.experts.gate_up_proj_bias
  .ffn_up_exps.bias=.mlp.experts.gate_up_proj_bias
  .ffn_down_exps.bias=.mlp.experts.down_proj_bias """
_GPT_NEOX = """
  token_embd=gpt_neox.embed_in output_norm=gpt_neox.final_layer_norm
  output=embed_out .attn_norm=.input_layernorm
  .attn_qkv=.attention.query_key_value .attn_output=.attention.dense
  .ffn_norm=.post_attention_layernorm
  .ffn_up=.mlp.dense_h_to_4h .ffn_down=.mlp.dense_4h_to_h """
_GPT2 = """
  token_embd=transformer.wte position_embd=transformer.wpe
  output_norm=transformer.ln_f output=lm_head
  .attn_norm=.ln_1 .attn_qkv=.attn.c_attn .attn_output=.attn.c_proj
  .ffn_norm=.ln_2 .ffn_up=.mlp.c_fc .ffn_down=.mlp.c_proj """
_BERT = """
  token_embd=embeddings.word_embeddings
  position_embd=embeddings.position_embeddings
  token_types=embeddings.token_type_embeddings
  token_embd_norm=embeddings.LayerNorm
  .attn_q=.attention.self.query .attn_k=.attention.self.key
  .attn_v=.attention.self.value .attn_output=.attention.output.dense
  .attn_output_norm=.attention.output.LayerNorm
  .ffn_up=.intermediate.dense .ffn_down=.output.dense
  .layer_output_norm=.output.LayerNorm """

LAYOUTS = {
  'llama': Layout(_llama, _MODERN + _MLP + _BEFORE, _pairs_to_halves),
  'smollm3': Layout(_smollm3, _MODERN + _MLP + _BEFORE, _pairs_to_halves),
  'qwen2': Layout(partial(_rotary, 'qwen2'), _MODERN + _MLP + _BEFORE),
  'qwen3': Layout(partial(_biased, 'qwen3'), _MODERN + _MLP + _BEFORE),
  'olmo2': Layout(partial(_biased, 'olmo2'), _MODERN + _MLP + _AFTER),
  'gemma2': Layout(_gemma2, _MODERN + _MLP + _AFTER, _minus_one),
  'gemma3': Layout(_gemma3, _MODERN + _MLP + _AFTER, _minus_one),
  'phi3': Layout(_phi3, _MODERN + _BEFORE + '.ffn_up=.mlp.gate_up_proj'),
  'gpt-oss': Layout(
    _gpt_oss, _MODERN + _EXPERTS, transposed=r'ffn_\w+_exps\.weight'
  ),
  'gptneox': Layout(
    _gpt_neox, _GPT_NEOX, _heads_together, blocks='gpt_neox.layers'
  ),
  'gpt2': Layout(
    _gpt2,
    _GPT2,
    transposed=r'(attn_qkv|attn_output|ffn_up|ffn_down)\.weight',
    blocks='transformer.h',
  ),
  'bert': Layout(_bert, _BERT, blocks='encoder.layer'),
}
