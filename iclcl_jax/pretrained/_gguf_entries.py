"""The metadata of a GGUF file: each entry is read, neutral, or refused."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from iclcl_jax.pretrained._config import Config
from iclcl_jax.pretrained._reading import Shape

Fields: TypeAlias = dict[str, Any]
# Entries that change no logits, whatever they say: the last of somebody who
# quantised many a model.
_HARMLESS = (
  *('GGUF.', 'general.', 'tokenizer.', 'quantize.', 'split.'),
  'mradermacher.',
)
USE_DIRECTORY = 'Convert the model again, or read its Hugging Face directory.'
# Entries whose zero says that there is no such thing.
_NONE = """attention.clamp_kqv attention.max_alibi_bias attention.scale
attention.sliding_window expert_count expert_used_count"""


class Entries(Config):
  """The metadata of one architecture, without its name in front.

  With the path, for messages, the shapes of the tensors by the names of the
  file, and `base`: what every architecture has, under the names of a llama.
  """

  def __init__(
    self,
    path: pathlib.Path,
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
  ):
    super().__init__(
      {key: _plain(value) for key, value in metadata.items()},
      label=lambda key: f'{path}: the metadata {key!r}',
      fix=USE_DIRECTORY,
    )
    self._prefix, self._take = f'{architecture}.', read
    self.path, self.shapes = path, shapes
    if len(shapes.get('token_embd.weight', ())) != 2:
      raise ValueError(
        f"{path} lacks the tensor 'token_embd.weight', the embeddings of its "
        'tokens; expected a whole language model. Convert it again.'
      )
    layers = self.count('block_count')
    if layers > len(shapes):
      expected = f'several of the {len(shapes)} tensors for each'
      raise self.error('block_count', layers, expected)
    self.base: Fields = {
      'vocab_size': shapes['token_embd.weight'][0],
      'hidden_size': self.count('embedding_length'),
      'intermediate_size': self.count('feed_forward_length'),
      'num_hidden_layers': layers,
      'num_attention_heads': self.count('attention.head_count'),
      'max_position_embeddings': self.count('context_length'),
      'tie_word_embeddings': 'output.weight' not in shapes,
    }

  @property
  def head_width(self) -> int:
    return self.base['hidden_size'] // self.base['num_attention_heads']

  def has(self, kind: str) -> bool:
    return any(f'.{name}'.endswith(f'.{kind}') for name in self.shapes)

  def rope(self, width: int) -> Fields:
    theta = self.number('rope.freq_base', 10000.0)
    rope: Fields = {'rope_type': 'default', 'rope_theta': theta}
    rotated = self.count('rope.dimension_count', width)
    if rotated != width:
      rope['partial_rotary_factor'] = rotated / width
    kind = self.get('rope.scaling.type', 'linear')
    factor = self.number('rope.scale_linear', 1.0)
    factor = self.number('rope.scaling.factor', factor)
    self.require('rope.scale_linear', factor)  # Its older name.
    context = self.base['max_position_embeddings']
    original = self.count('rope.scaling.original_context_length', context)
    # What divides the frequencies: once for all prompts, or for two lengths.
    factors = {
      name: self._take(f'rope_{name}.weight').ravel().tolist()
      for name in ('freqs', 'factors_short', 'factors_long')
      if f'rope_{name}.weight' in self.shapes
    }
    short, long = (
      factors.get('freqs', factors.get(f'factors_{x}'))
      for x in ('short', 'long')
    )
    plain = 'none', 'linear', 'yarn'
    if short and long and factor == 1 and kind in (*plain, 'longrope'):
      return rope | {
        'rope_type': 'longrope',
        'short_factor': short,
        'long_factor': long,
        'original_max_position_embeddings': original,
        'attention_factor': self.number('rope.scaling.attn_factor', 1.0),
      }
    if factors or kind not in plain:
      expected = (
        f'linear or yarn, or tensors of factors for all frequencies alone; the '
        f'factor is {factor}, and there are {list(factors)}'
      )
      raise self.error('rope.scaling.type', kind, expected)
    if kind == 'none' or factor == 1:
      return rope
    rope |= {'rope_type': kind, 'factor': factor}
    if kind == 'yarn':
      rope |= {
        'original_max_position_embeddings': original,
        'beta_fast': self.number('rope.scaling.yarn_beta_fast', 32.0),
        'beta_slow': self.number('rope.scaling.yarn_beta_slow', 1.0),
      }
    return rope

  def check_understood(self, config: Fields) -> None:
    """Raises `ValueError` for what may change the arithmetic unseen."""
    width = config.get('head_dim', self.head_width)
    windowed = [kind[0] == 's' for kind in config.get('layer_types', ())]
    neutral = dict.fromkeys(_NONE.split(), (0,)) | {
      'attention.causal': (config['model_type'] != 'bert',),
      'attention.head_count_kv': (self.base['num_attention_heads'],),
      'attention.key_length': (width,),
      'attention.sliding_window_pattern': (windowed,),
      'attention.value_length': (width,),
      'logit_scale': (0, 1),
      'pooling_type': (0, 1, 2, 3),  # Of the states, which are handed out.
      'rope.dimension_count': (width,),
      'rope.scaling.attn_factor': (1,),
      'rope.scaling.finetuned': (False, True),
      'rope.scaling.yarn_attn_factor': (1,),
      'rope.scaling.yarn_ext_factor': (1,),
      'tensor_data_layout': ('Meta AI original pth',),
      'vocab_size': (self.base['vocab_size'],),
    }
    harmless = [key for key in self.fields if key.startswith(_HARMLESS)]
    self.check_all_read(neutral.items(), harmless)

  def _stored(self, name: str) -> str:
    return self._prefix + name


def _plain(value: Any) -> Any:
  """Returns one value for a list of equal ones, floats as short decimals."""
  if isinstance(value, list) and value and value == value[:1] * len(value):
    value = value[0]
  if not isinstance(value, float):
    return value
  with np.errstate(over='ignore'):  # What is infinite is refused later.
    return float(str(np.float32(value)))
