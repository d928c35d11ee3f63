"""What all families share: the layout of a Llama, part by part."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from iclcl_jax import transformer
from iclcl_jax.pretrained._config import ABSENT, ACTIVATIONS, HARMLESS, Config
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint, Shape, Tensors
from iclcl_jax.pretrained._rotary import rotary_of
from iclcl_jax.transformer import (
  Layer,
  LayerNorm,
  Linear,
  Norm,
  Norms,
  RMSNorm,
  Rotary,
)

Reader: TypeAlias = Callable[..., LanguageModel]
KINDS = ('full_attention', 'sliding_attention')
# Tables that other versions of the format store; they follow from the config.
_TABLES = ('*rotary_emb.inv_freq',)
_PROJECTIONS = tuple(f'self_attn.{name}_proj' for name in 'qkvo')


@dataclasses.dataclass(frozen=True)
class Decoder:
  config: Config
  tensors: Tensors
  d_model: int
  heads: int
  groups: int
  d_k: int
  layer: str  # What the names of a layer's tensors begin with.
  norm_bias: bool
  inputs_first: bool  # Whether weights are stored as `[in, out]`.

  @property
  def num_layers(self) -> int:
    return self.tensors.num_layers

  def linear(
    self, name: str, inputs: Shape, outputs: Shape, *, bias: bool
  ) -> Linear:
    sizes = math.prod(inputs), math.prod(outputs)

    def arrange(weight):
      weight = weight if self.inputs_first else weight.T
      return weight.reshape(*inputs, *outputs)

    shape = sizes if self.inputs_first else sizes[::-1]
    weight = self.tensors.take(f'{self.layer}{name}.weight', shape, arrange)
    if not bias:
      return Linear(weight)
    shift = self.tensors.take(
      f'{self.layer}{name}.bias', sizes[1:], lambda x: x.reshape(outputs)
    )
    return Linear(weight, shift)

  def attention(
    self,
    *,
    bias: bool,
    output_bias: bool = False,
    names: Sequence[str] = _PROJECTIONS,
  ) -> dict:
    query, key, value, output = names
    stream, every = (self.d_model,), (self.heads, self.d_k)
    shared = self.groups, self.d_k
    return {
      'query': self.linear(query, stream, every, bias=bias),
      'key': self.linear(key, stream, shared, bias=bias),
      'value': self.linear(value, stream, shared, bias=bias),
      'output': self.linear(output, every, stream, bias=output_bias),
    }

  def joint_attention(
    self, name: str, output: str, *, bias: bool, by_head: bool = False
  ) -> dict:
    """Takes queries, keys and values that stand side by side."""
    groups = self.heads if by_head else self.groups
    counts = self.heads, groups, groups
    stream, every = (self.d_model,), (self.heads, self.d_k)
    joint = self.linear(name, stream, (sum(counts) * self.d_k,), bias=bias)
    if by_head:
      parts = in_parts(_split(joint, self.heads), *[self.d_k] * 3)
    else:
      parts = in_parts(joint, *(count * self.d_k for count in counts))
      parts = [_split(*pair) for pair in zip(parts, counts, strict=True)]
    return {
      **dict(zip(('query', 'key', 'value'), parts, strict=True)),
      'output': self.linear(output, every, stream, bias=bias),
    }

  def network(
    self,
    gate: str | None = 'mlp.gate_proj',
    up: str = 'mlp.up_proj',
    down: str = 'mlp.down_proj',
    *,
    bias: bool = False,
    width: int | None = None,
  ) -> dict:
    """Takes a feed-forward network; the config may leave out its `width`."""
    stream = (self.d_model,)
    inside = (self.config.count('intermediate_size', width),)
    return {
      'gate': gate and self.linear(gate, stream, inside, bias=bias),
      'up': self.linear(up, stream, inside, bias=bias),
      'down': self.linear(down, inside, stream, bias=bias),
    }

  def norm(self, name: str, width: int | None = None) -> Norm:
    shape = (width or self.d_model,)
    scale = self.tensors.take(f'{name}.weight', shape)
    if not self.norm_bias:
      return Norm(scale)
    return Norm(scale, self.tensors.take(f'{name}.bias', shape))

  def norms(self, **names: str) -> Norms:
    taken = {k: self.norm(self.layer + name) for k, name in names.items()}
    return Norms(**taken)

  def pre_norms(
    self,
    attention: str = 'input_layernorm',
    ffn: str = 'post_attention_layernorm',
  ) -> dict:
    return {
      'attention_norms': self.norms(input=attention),
      'ffn_norms': self.norms(input=ffn),
    }

  def head_norms(self, *, together: bool = False) -> dict:
    """Takes normalisations of queries and keys, for each head or for all."""

    def take(name, count):
      name = f'{self.layer}self_attn.{name}'
      if not together:
        return self.norm(name, self.d_k)
      scale = self.norm(name, count * self.d_k).scale
      return Norm(scale.reshape(-1, count, self.d_k))

    return {
      'query_norm': take('q_norm', self.heads),
      'key_norm': take('k_norm', self.groups),
    }

  def rms_norm(self, default: float, **options: float) -> RMSNorm:
    return RMSNorm(
      self.config.number('rms_norm_eps', default, least=0), **options
    )

  def layer_norm(self, name: str, default: float) -> LayerNorm:
    return LayerNorm(self.config.number(name, default, least=0))

  def activation(self, name: str = 'hidden_act', default: str = 'silu'):
    return self.config.choice(name, ACTIVATIONS, default)

  def functions(self, default: float) -> dict:
    """Reads the functions of a Llama; `default` is the epsilon of its norms."""
    return {
      'normalization': self.rms_norm(default),
      'activation': self.activation(),
    }

  def rotary(
    self,
    *,
    base: float = 1e4,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
  ) -> Rotary:
    """Reads the rotation of all layers; `base` and `settings` are defaults."""
    config = self.config
    new, old = config.object('rope_parameters'), config.object('rope_scaling')
    if {**new, **old} != {**old, **new}:
      same = f"the same settings as config['rope_parameters'], {new!r}"
      raise config.error('rope_scaling', old, same)
    stated = {**new, **old} or settings or {}
    return rotary_of(config, stated, self.d_k, base=base, **options)

  def alike(self, **layer: Any) -> list[Layer]:
    """Checks the field that could say that layers are not all alike."""
    kind = KINDS[layer.get('window') is not None]
    self.config.entries('layer_types', self.num_layers, (kind,))
    return [Layer(**layer)]

  def local(self, default: Callable[[int], bool]) -> list[bool]:
    """Reads which layers have a window; `default` says it if no field does."""
    kinds = self.config.entries('layer_types', self.num_layers, KINDS)
    if kinds is None:
      return [default(i) for i in range(self.num_layers)]
    return [kind == 'sliding_attention' for kind in kinds]

  def windowed(
    self, rotation: Rotary, window: int | None, default: Callable[[int], bool]
  ) -> list[Layer]:
    return [
      Layer(rotation=rotation, window=window if is_local else None)
      for is_local in self.local(default)
    ]

  def window(self, default: int | None = None) -> int | None:
    """Reads the window; `default` where the file lacks it, None if null."""
    if self.config.or_null('sliding_window', default) is None:
      return None
    window = self.config.count('sliding_window', default)
    return min(window, np.iinfo(np.int32).max)  # No prompt is longer.

  def language_model(
    self,
    block: dict,
    architecture: dict,
    *,
    layers: Sequence[Layer] = (Layer(),),
    tied: bool = False,
    embedding: str = 'embed_tokens',
    head: str | None = 'lm_head',
    final_norm: str | None = 'norm',
    context: int | None = 2048,
    **options: Any,
  ) -> LanguageModel:
    """Puts a model together and checks that nothing of the checkpoint is left.

    Equal `layers` become one. `tied` says whether the embedding serves as head,
    and `context` how long it is, where the config does not.
    """
    config, tensors = self.config, self.tensors
    shape = config.count('vocab_size'), self.d_model
    tied = config.switch('tie_word_embeddings', tied) and head is not None
    weight = f'{embedding}.weight'
    model = LanguageModel(
      head=tensors.head(f'{head}.weight', weight, shape, tied=tied)
      if head
      else None,
      embedding=tensors.take(weight, shape),
      blocks=transformer.Block(**block),
      final_norm=self.norm(final_norm) if final_norm else None,
      architecture=transformer.Architecture(
        **({'visible': transformer.causal} | architecture),
        layers=tuple(layers) if len(set(layers)) > 1 else tuple(layers[:1]),
      ),
      context_length=config.count('max_position_embeddings', context),
      tied=tied,
      **options,
    )
    tensors.check_all_taken()
    config.check_all_read(ABSENT.items(), HARMLESS)
    return model


def family(
  *,
  prefix: str = 'model.',
  layer: str = 'layers.{}.',
  ignored: Sequence[str] = (),
  names: Mapping[str, str] | None = None,
  d_k: int | None = None,
  groups: int | None = None,
  norm_bias: bool = False,
  inputs_first: bool = False,
) -> Callable[[Callable[[Decoder], LanguageModel]], Reader]:
  """Makes a reader of checkpoints of a function of an open decoder.

  `names` are those of settings that the family calls otherwise. `d_k` and
  `groups` are taken where the config does not say them: None for an equal part
  of the residual stream, and for one group for each query head.
  """

  def open_decoder(checkpoint: Checkpoint, dtype: Any) -> Decoder:
    config = Config(checkpoint.config, names=names)
    config.require('is_decoder', False, True)  # Both see the past alone.
    d_model = config.count('hidden_size')
    heads = config.count('num_attention_heads')
    shared = config.count('num_key_value_heads', groups or heads)
    if heads % shared:
      raise config.error(
        'num_key_value_heads', shared, f'a divisor of {heads} heads'
      )
    width = d_k
    if width is None and config.get('head_dim') is None:
      if d_model % heads:
        expected = f'a multiple of {heads} heads'
        raise config.error('hidden_size', d_model, expected)
      width = d_model // heads
    tensors = Tensors(
      checkpoint.tensors,
      num_layers=config.count('num_hidden_layers'),
      prefix=prefix,
      ignored=(*_TABLES, *ignored),
      dtype=dtype,
    )
    sizes = d_model, heads, shared, config.count('head_dim', width)
    return Decoder(config, tensors, *sizes, layer, norm_bias, inputs_first)

  return lambda make: (
    lambda checkpoint, dtype=None: make(open_decoder(checkpoint, dtype))
  )


def _split(linear: Linear, num_heads: int) -> Linear:
  return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], num_heads, -1), linear)


def in_parts(linear: Linear, *sizes: int) -> list[Linear]:
  """Cuts the last axis of a joint projection of all layers."""
  ends = [0, *np.cumsum(sizes).tolist()]
  return [
    jax.tree.map(lambda x, part=slice(*pair): x[..., part], linear)
    for pair in itertools.pairwise(ends)
  ]
