"""What the families of decoders share: the layout of a Llama, part by part."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained import _reading
from iclcl_jax.pretrained._config import ACTIVATIONS, Config
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint, Tensors
from iclcl_jax.transformer import Layer, Linear, Norm, Norms, RMSNorm

LAYER = 'layers.{}.'
# Tables that other versions of the format store; they follow from the config.
_TABLES = ('*rotary_emb.inv_freq',)
KINDS = ('full_attention', 'sliding_attention')


@dataclasses.dataclass(frozen=True)
class Decoder:
  """A checkpoint that is being read, and the sizes of its heads."""

  config: Config
  tensors: Tensors
  d_model: int
  heads: int
  groups: int
  d_k: int

  @property
  def num_layers(self) -> int:
    return self.tensors.num_layers

  def projection(self, name: str, count: int, *, bias: bool) -> Linear:
    """Takes the queries, keys or values of all layers."""
    size = count * self.d_k
    return self.tensors.linears(
      f'{LAYER}self_attn.{name}',
      (size, self.d_model),
      _reading.transposed(self.d_model, count, self.d_k),
      bias=(size,) if bias else None,
      arrange_bias=_reading.reshaped(count, self.d_k),
    )

  def output(
    self, name: str = 'self_attn.o_proj', *, bias: bool = False
  ) -> Linear:
    """Takes the projection of what the heads say."""
    return self.tensors.linears(
      LAYER + name,
      (self.d_model, self.heads * self.d_k),
      _reading.transposed(self.heads, self.d_k, self.d_model),
      bias=(self.d_model,) if bias else None,
    )

  def attention(self, *, bias: bool, output_bias: bool = False) -> dict:
    """Takes the four projections of the attention."""
    return {
      'query': self.projection('q_proj', self.heads, bias=bias),
      'key': self.projection('k_proj', self.groups, bias=bias),
      'value': self.projection('v_proj', self.groups, bias=bias),
      'output': self.output(bias=output_bias),
    }

  def linear(self, name: str, sizes: tuple[int, int], *, bias: bool) -> Linear:
    """Takes a layer `[in, out]` of the feed-forward network."""
    shape = sizes[::-1]
    return self.tensors.linears(
      LAYER + name, shape, np.transpose, bias=shape[:1] if bias else None
    )

  def network(self, *, bias: bool = False) -> dict:
    """Takes a gated feed-forward network."""
    d, d_ff = self.d_model, self.config.count('intermediate_size')
    return {
      'gate': self.linear('mlp.gate_proj', (d, d_ff), bias=bias),
      'up': self.linear('mlp.up_proj', (d, d_ff), bias=bias),
      'down': self.linear('mlp.down_proj', (d_ff, d), bias=bias),
    }

  def norms(self, *, has_bias: bool = False, **names: str) -> Norms:
    """Takes normalisations around a sublayer, by their places."""
    taken = {
      place: self.tensors.norms(LAYER + name, self.d_model, has_bias=has_bias)
      for place, name in names.items()
    }
    return Norms(**taken)

  def pre_norms(self, *, bias: bool = False) -> dict:
    """Takes the normalisations before both sublayers, as Llama names them."""
    names = 'input_layernorm', 'post_attention_layernorm'
    first, second = (self.norms(input=name, has_bias=bias) for name in names)
    return {'attention_norms': first, 'ffn_norms': second}

  def head_norms(self, *, together: bool = False) -> dict:
    """Takes normalisations of queries and keys, for each head or for all."""

    def take(name, count):
      width = count * self.d_k if together else self.d_k
      norm = self.tensors.norms(
        f'{LAYER}self_attn.{name}', width, has_bias=False
      )
      if not together:
        return norm
      return Norm(norm.scale.reshape(-1, count, self.d_k))

    return {
      'query_norm': take('q_norm', self.heads),
      'key_norm': take('k_norm', self.groups),
    }

  def rms_norm(self, default: float, **options: float) -> RMSNorm:
    """Reads the normalisation."""
    return RMSNorm(
      self.config.number('rms_norm_eps', default, least=0), **options
    )

  def activation(self, name: str = 'hidden_act', default: str = 'silu'):
    """Reads the activation of the feed-forward network."""
    return self.config.choice(name, ACTIVATIONS, default)

  def functions(self, default: float) -> dict:
    """Reads the functions of a Llama; `default` is the epsilon of its norms."""
    return {
      'normalization': self.rms_norm(default),
      'activation': self.activation(),
    }

  def alike(self, layer: Layer) -> list[Layer]:
    """Checks the field that could say that layers are not all alike."""
    kind = KINDS[layer.window is not None]
    self.config.entries('layer_types', self.num_layers, (kind,))
    return [layer]

  def windowed(
    self, layer: Layer, window: int | None, default: Callable[[int], bool]
  ) -> list[Layer]:
    """Reads which layers have a window; `default` says it if no field does."""
    local = dataclasses.replace(layer, window=window)
    places = local_layers(self, default)
    return [local if is_local else layer for is_local in places]


def open_decoder(
  checkpoint: Checkpoint,
  dtype: Any,
  *,
  prefix: str = 'model.',
  ignored: Sequence[str] = (),
  d_k: int | None = None,
  groups: int | None = None,
) -> Decoder:
  """Reads the sizes of a decoder, and looks at its tensors as `Tensors` does.

  `d_k` and `groups` are taken where the config does not say them: None for an
  equal part of the residual stream, and for one group for each query head.
  """
  config = Config(checkpoint.config)
  config.require('is_decoder', False, True)  # Both see the past alone.
  d_model = config.count('hidden_size')
  heads = config.count('num_attention_heads')
  groups = config.count('num_key_value_heads', groups or heads)
  if heads % groups:
    raise ValueError(
      f"config['num_key_value_heads'] is {groups} for {heads} heads; expected "
      'a divisor. Check the sizes in config.json.'
    )
  if d_k is None and config.get('head_dim') is None:
    d_k = _reading.head_width(d_model, heads)
  tensors = Tensors(
    checkpoint.tensors,
    num_layers=config.count('num_hidden_layers'),
    prefix=prefix,
    ignored=(*_TABLES, *ignored),
    dtype=dtype,
  )
  width = config.count('head_dim', d_k)
  return Decoder(config, tensors, d_model, heads, groups, width)


def language_model(
  decoder: Decoder,
  block: dict,
  architecture: dict,
  *,
  layers: Sequence[Layer],
  tied: bool = False,
  embedding: str = 'embed_tokens',
  head: str = 'lm_head',
  final_norm: str = 'norm',
  has_bias: bool = False,
  **options: Any,
) -> LanguageModel:
  """Puts a model together and checks that nothing of the checkpoint is left.

  `block` and `architecture` are parts of those of `transformer`; equal `layers`
  become one. `tied` says whether the embedding serves as head where the config
  does not, `has_bias` whether the last normalisation has a bias.
  """
  config, tensors = decoder.config, decoder.tensors
  shape = config.count('vocab_size'), decoder.d_model
  tied = config.switch('tie_word_embeddings', tied)
  weight = f'{embedding}.weight'
  model = LanguageModel(
    head=tensors.head(weight, shape, tied=tied, name=f'{head}.weight'),
    embedding=tensors.array(weight, shape),
    blocks=transformer.Block(**block),
    final_norm=tensors.norm(final_norm, decoder.d_model, has_bias=has_bias),
    architecture=transformer.Architecture(
      **({'visible': transformer.causal} | architecture),
      layers=tuple(layers) if len(set(layers)) > 1 else tuple(layers[:1]),
    ),
    context_length=config.count('max_position_embeddings', 2048),
    tied=tied,
    **options,
  )
  tensors.check_all_taken()
  config.check_all_read()
  return model


def local_layers(
  decoder: Decoder, default: Callable[[int], bool]
) -> list[bool]:
  """Reads which layers have a window; `default` says it if no field does."""
  kinds = decoder.config.entries('layer_types', decoder.num_layers, KINDS)
  if kinds is None:
    return [default(i) for i in range(decoder.num_layers)]
  return [kind == 'sliding_attention' for kind in kinds]


def window_of(decoder: Decoder, default: int | None = None) -> int | None:
  """Reads the window; `default` where the file lacks it, None if it is null."""
  if decoder.config.or_null('sliding_window', default) is None:
    return None
  window = decoder.config.count('sliding_window', default)
  return min(window, np.iinfo(np.int32).max)  # No prompt is longer.


def in_parts(linear: Linear, *sizes: int) -> list[Linear]:
  """Cuts the last axis of a joint projection of all layers."""
  ends = np.cumsum(sizes)[:-1]
  weights = jnp.split(linear.weight, ends, axis=-1)
  if linear.bias is None:
    return [Linear(weight) for weight in weights]
  biases = jnp.split(linear.bias, ends, axis=-1)
  return [Linear(*pair) for pair in zip(weights, biases, strict=True)]
