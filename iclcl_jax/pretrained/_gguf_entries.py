"""The metadata of a GGUF file: each entry is taken, neutral, or refused."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from iclcl_jax.pretrained._config import check_number
from iclcl_jax.pretrained._reading import Shape

Config: TypeAlias = dict[str, Any]
# Entries that change no logits, whatever they say: the last of somebody who
# quantised many a model.
_HARMLESS = (
  *('GGUF.', 'general.', 'tokenizer.', 'quantize.', 'split.'),
  'mradermacher.',
)
# Entries whose zero says that there is no such thing.
_NONE = """attention.clamp_kqv attention.max_alibi_bias attention.scale
attention.sliding_window expert_count expert_used_count"""


class Entries:
  """The metadata of one architecture, which knows what nobody took.

  Attributes:
    shapes: of the tensors, by the names of the file.
  """

  def __init__(
    self,
    path: pathlib.Path,
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
  ):
    """Takes what a file says; `read` reads the tensor of a name."""
    self._path, self._prefix = path, f'{architecture}.'
    self._rest, self.shapes, self._read = dict(metadata), shapes, read

  def take(self, name: str, default: Any = None) -> Any:
    """Takes an entry; a list of equal values is one value for all blocks."""
    value = self._rest.pop(self._prefix + name, default)
    if isinstance(value, list) and value and value == value[:1] * len(value):
      value = value[0]
    if value is None:
      raise ValueError(
        f'{self._path} lacks the metadata {self._prefix + name!r}; expected it '
        'in every file of its architecture. Convert the model again with a '
        'current converter.'
      )
    return value

  def count(self, name: str, default: int | None = None) -> int:
    """Takes a positive integer, or a zero that is the default."""
    value = self.take(name, default)
    return 0 if value == default == 0 else self._checked(name, value, int)

  def number(self, name: str, default: float | None = None) -> float:
    """Takes a positive number: the shortest decimal of it, such as `1e-05`."""
    value = self._checked(name, self.take(name, default), int | float)
    with np.errstate(over='ignore'):  # What is infinite is refused later.
      return float(str(np.float32(value)))

  def has(self, kind: str) -> bool:
    """Whether there is a tensor of this name, in a block or outside."""
    return any(f'.{name}'.endswith(f'.{kind}') for name in self.shapes)

  def factors(self, name: str) -> list[float] | None:
    """Reads what divides the frequencies of a rotation, None if nothing."""
    name = f'rope_{name}.weight'
    return self._read(name).ravel().tolist() if name in self.shapes else None

  def check_all_taken(self, config: Config, base: Config) -> None:
    """Raises `ValueError` for what may change the arithmetic unseen."""
    width = base['hidden_size'] // base['num_attention_heads']
    width = config.get('head_dim', width)
    windowed = [kind[0] == 's' for kind in config.get('layer_types', ())]
    neutral = dict.fromkeys(_NONE.split(), (0,)) | {
      'attention.causal': (config['model_type'] != 'bert',),
      'attention.head_count_kv': (base['num_attention_heads'],),
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
      'vocab_size': (base['vocab_size'],),
    }
    for key, value in list(self._rest.items()):
      own = key.startswith(self._prefix)
      name = key.removeprefix(self._prefix)
      if own and self.take(name) in neutral.get(name, ()):
        continue
      if own or not key.startswith(_HARMLESS):
        raise ValueError(
          f'{self._path}: the metadata {key!r} is {value!r}, which may change '
          'what the model computes and is not supported. Read the model from '
          'its Hugging Face directory, or, if the entry changes nothing, '
          f'remove it: gguf-new-metadata --remove-metadata {key} OLD NEW.'
        )

  def _checked(self, name: str, value: Any, kind: Any) -> Any:
    label = f'{self._path}: the metadata {self._prefix + name!r}'
    expected = 'a positive number, the same for all blocks'
    return check_number(label, value, kind, expected)

  def rope(self, width: int, context: int) -> Config:
    """Reads the angles of the rotation: `rope_parameters` of Hugging Face."""
    rope: Config = {
      'rope_type': 'default',
      'rope_theta': self.number('rope.freq_base', 10000.0),
    }
    rotated = self.count('rope.dimension_count', width)
    if rotated != width:
      rope['partial_rotary_factor'] = rotated / width
    kind = self.take('rope.scaling.type', 'linear')
    factor = self.number('rope.scale_linear', 1.0)
    factor = self.number('rope.scaling.factor', factor)
    original = self.count('rope.scaling.original_context_length', context)
    short, long = (
      self.factors('freqs') or self.factors(f'factors_{name}')
      for name in ('short', 'long')
    )
    if short and long and (factor == 1 or kind == 'longrope'):
      return rope | {
        'rope_type': 'longrope',
        'short_factor': short,
        'long_factor': long,
        'original_max_position_embeddings': original,
        'attention_factor': self.number('rope.scaling.attn_factor', 1.0),
      }
    if short or long or kind not in ('none', 'linear', 'yarn'):
      tensors = 'factors' if short or long else 'no factors'
      raise ValueError(
        f'{self._path}: the rotary positions are rescaled by {kind!r} with the '
        f'factor {factor} and {tensors} for each frequency; expected linear, '
        'yarn, or factors alone. Read the Hugging Face directory instead.'
      )
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
