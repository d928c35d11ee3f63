"""Checkpoints of the GPT-2 family."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.transformer import Architecture, Block, Linear

# Causal masks that older files store.
IGNORED = ('h.*.attn.bias', 'h.*.attn.masked_bias')


class _Sizes(NamedTuple):
  """Counts and widths of the config."""

  vocabulary: int
  context: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int


def from_gpt2(checkpoint: Checkpoint, dtype: Any = None) -> LanguageModel:
  """Makes a model of LayerNorm, learned positions and GELU."""
  config = checkpoint.config
  _require_plain(config)
  sizes = _sizes(config)
  tied = _reading.switch(config, 'tie_word_embeddings', True)
  stored = checkpoint.tensors
  if tied:
    stored = _reading.without_copy(
      stored, copy='lm_head.weight', original='wte.weight'
    )
  tensors = _reading.take(
    stored,
    _shapes(sizes, tied),
    num_layers=sizes.num_layers,
    prefix='transformer.',
    ignored=IGNORED,
    dtype=dtype,
  )
  return LanguageModel(
    embedding=tensors.array('wte.weight'),
    position_embedding=tensors.array('wpe.weight'),
    token_type_embedding=None,
    embedding_norm=None,
    blocks=_blocks(tensors, sizes),
    final_norm=tensors.norm('ln_f'),
    head=None
    if tied
    else Linear(tensors.array('lm_head.weight', np.transpose)),
    architecture=_architecture(config),
    context_length=sizes.context,
    tied=tied,
  )


def _require_plain(config: Mapping[str, Any]) -> None:
  """Checks that the attention is that of GPT-2 itself."""
  _reading.require(config, 'scale_attn_weights', True)
  _reading.require(config, 'scale_attn_by_inverse_layer_idx', False)
  _reading.require(config, 'add_cross_attention', False)


def _sizes(config: Mapping[str, Any]) -> _Sizes:
  """Reads and checks the sizes."""
  d_model = _reading.count(config, 'n_embd')
  return _Sizes(
    vocabulary=_reading.count(config, 'vocab_size'),
    context=_reading.count(config, 'n_positions'),
    num_layers=_reading.count(config, 'n_layer'),
    d_model=d_model,
    d_ff=_reading.count(config, 'n_inner', 4 * d_model),
    num_heads=_reading.count(config, 'n_head'),
  )


def _shapes(sizes: _Sizes, tied: bool) -> dict[str, tuple[int, ...]]:
  """Expected tensors; the weights of the layers are stored `[in, out]`."""
  d, d_ff = sizes.d_model, sizes.d_ff
  weights = {
    'h.{}.attn.c_attn': (d, 3 * d),
    'h.{}.attn.c_proj': (d, d),
    'h.{}.mlp.c_fc': (d, d_ff),
    'h.{}.mlp.c_proj': (d_ff, d),
    'h.{}.ln_1': (d,),
    'h.{}.ln_2': (d,),
  }
  layer = {f'{name}.weight': shape for name, shape in weights.items()}
  layer |= {f'{name}.bias': shape[-1:] for name, shape in weights.items()}
  shapes = _reading.of_layers(layer, sizes.num_layers)
  shapes |= {
    'wte.weight': (sizes.vocabulary, d),
    'wpe.weight': (sizes.context, d),
    'ln_f.weight': (d,),
    'ln_f.bias': (d,),
  }
  return shapes if tied else shapes | {'lm_head.weight': (sizes.vocabulary, d)}


def _blocks(tensors: _reading.Tensors, sizes: _Sizes) -> Block:
  """Arranges the tensors of the layers."""
  heads = sizes.num_heads
  d_k = _reading.head_width(sizes.d_model, heads)
  query, key, value = (
    tensors.linears(
      'h.{}.attn.c_attn',
      _third(part, sizes.d_model, heads, d_k),
      _third(part, heads, d_k),
    )
    for part in range(3)
  )
  return Block(
    attention_norm=tensors.norms('h.{}.ln_1'),
    query=query,
    key=key,
    value=value,
    output=tensors.linears(
      'h.{}.attn.c_proj', _reading.reshaped(heads, d_k, sizes.d_model)
    ),
    ffn_norm=tensors.norms('h.{}.ln_2'),
    gate=None,
    up=tensors.linears('h.{}.mlp.c_fc'),
    down=tensors.linears('h.{}.mlp.c_proj'),
  )


def _third(part: int, *shape: int) -> Callable[[np.ndarray], np.ndarray]:
  """Takes the queries, keys or values out of the joint projection."""
  return lambda array: np.split(array, 3, axis=-1)[part].reshape(shape)


def _architecture(config: Mapping[str, Any]) -> Architecture:
  """Reads what the shapes do not say."""
  epsilon = _reading.number(config, 'layer_norm_epsilon', 1e-5)
  return Architecture(
    placement=transformer.pre_norm,
    normalization=transformer.LayerNorm(epsilon),
    activation=_reading.activation(config, 'activation_function', 'gelu_new'),
    rotation=transformer.unrotated,
    visible=transformer.causal,
  )
