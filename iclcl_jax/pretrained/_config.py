"""The settings of a model: each is understood, harmless, or refused by name."""

import functools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax

from iclcl_jax.types import Array

_T = TypeVar('_T')
_gelu = functools.partial(jax.nn.gelu, approximate=False)
_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'gelu': _gelu,
  'gelu_accurate': _gelu_tanh,
  'gelu_fast': _gelu_tanh,
  'gelu_new': _gelu_tanh,
  'gelu_python': _gelu,
  'gelu_python_tanh': _gelu_tanh,
  'gelu_pytorch_tanh': _gelu_tanh,
  'relu': jax.nn.relu,
  'relu2': lambda z: jax.nn.relu(z) ** 2,
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
}
# What no forward pass outside of training reads: files, special tokens,
# training, losses, labels of classifiers, and how text is sampled.
_HARMLESS = """
_attn_implementation _name_or_path architectures attn_implementation auto_map
cache_implementation dtype is_llama_config keys_to_ignore_at_inference
max_sequence_length model_type name_or_path output_past tokenizer_class
torch_dtype torchscript transformers.js_config transformers_version use_bfloat16

bos_token_id cls_token_id decoder_start_token_id eos_token_id mask_token_id
pad_token_id sep_token_id

attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
embd_pdrop gradient_checkpointing hidden_dropout hidden_dropout_prob
initializer_factor initializer_range output_router_logits pretraining_tp
resid_pdrop router_aux_loss_coef tf_legacy_loss

chunk_size_feed_forward finetuning_task id2label label2id num_labels
output_attentions output_hidden_states pooler_fc_size
pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
prefix problem_type return_dict summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj task_specific_params
use_cache

bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty
forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
output_scores remove_invalid_values repetition_penalty
return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
HARMLESS = frozenset(_HARMLESS.split())
_SMALLEST = math.ulp(0.0)
# Every family lacks these; the values are those that say so.
ABSENT: Mapping[str, tuple] = {
  'add_cross_attention': (False,),
  'cross_attention_hidden_size': (),
  'is_encoder_decoder': (False,),
  'pruned_heads': ({},),
  'tie_encoder_decoder': (False,),
}


class Config:
  """Settings of a model, of which every one must be read."""

  def __init__(
    self,
    fields: Mapping[str, Any],
    *,
    label: Callable[[str], str] = 'config[{!r}]'.format,
    fix: str = 'Check config.json, or choose another model.',
    names: Mapping[str, str] | None = None,
  ):
    """Takes the content, where null is absent, and what messages advise.

    `names` are those of fields that are read under another one.
    """
    self.fields = {k: v for k, v in fields.items() if v is not None}
    self._null = set(fields) - set(self.fields)
    self._read: set[str] = set()
    self._label, self._fix, self._names = label, fix, names or {}

  def get(self, name: str, default: Any = None) -> Any:
    name = self._stored(name)
    self._read.add(name)
    return self.fields.get(name, default)

  def or_null(self, name: str, default: Any) -> Any:
    """Reads a field; the default stands in for a missing one, not for null."""
    return self.get(name, None if self._stored(name) in self._null else default)

  def choice(
    self, name: str, options: Mapping[str, _T], default: str | None = None
  ) -> _T:
    found = self.get(name, default)
    if not isinstance(found, str) or found not in options:
      raise self.error(name, found, f'one of {", ".join(options)}')
    return options[found]

  def count(
    self, name: str, default: int | None = None, *, least: int = 1
  ) -> int:
    """Reads an integer; without default it is required."""
    return self._checked(name, self.get(name, default), int, least)

  def number(
    self, name: str, default: float | None = None, *, least: float = _SMALLEST
  ) -> float:
    """Reads a finite number; without default it is required."""
    found = self.get(name, default)
    return float(self._checked(name, found, int | float, least))

  def switch(self, name: str, default: bool) -> bool:
    found = self.get(name, default)
    if not isinstance(found, bool):
      raise self.error(name, found, 'true or false')
    return found

  def entries(self, name: str, size: int, kinds: tuple) -> list | None:
    """Reads a list with one of the values for each layer, if there is one."""
    found = self.get(name)
    if found is None:
      return None
    if not isinstance(found, list) or len(found) != size:
      raise self.error(name, found, f'{size} entries, one for each layer')
    for entry in found:
      if entry not in kinds:
        expected = f'for each layer one of {", ".join(map(repr, kinds))}'
        raise self.error(name, found, expected)
    return found

  def numbers(self, name: str, size: int) -> list[float]:
    found = self.get(name)
    if not isinstance(found, list) or len(found) != size:
      raise self.error(name, found, f'{size} numbers')
    return [self._checked(name, x, int | float, _SMALLEST) for x in found]

  def object(self, name: str) -> Mapping[str, Any]:
    """Reads an object; null and absent are an empty one."""
    found = self.get(name, {})
    if not isinstance(found, Mapping):
      raise self.error(name, found, 'a JSON object or null')
    return found

  def require(self, name: str, *expected: Any) -> None:
    """Checks a field whose other values are not supported; absent is right."""
    found = self.get(name)
    if found is not None and found not in expected:
      wanted = ' or '.join(map(repr, expected)) or 'nothing'
      raise self.error(name, found, wanted)

  def check_all_read(
    self,
    absent: Iterable[tuple[str, tuple]] = (),
    harmless: Collection[str] = (),
  ) -> None:
    """Raises if a field is unread, not `harmless`, and not `absent` as here."""
    for name, expected in absent:
      if self._stored(name) not in self._read:
        self.require(name, *expected)
    for name in sorted(set(self.fields) - self._read - set(harmless)):
      raise ValueError(
        f'{self._label(name)} is {self.fields[name]!r}, a setting that is not '
        'known here and might change what the model computes; expected none. '
        f'Remove it if it changes nothing. {self._fix}'
      )

  def error(self, name: str, found: Any, expected: str) -> ValueError:
    said = 'missing' if found is None else f'{found!r:.200}'
    return ValueError(
      f'{self._label(self._stored(name))} is {said}; expected {expected}. '
      f'Nothing else is supported. {self._fix}'
    )

  def _stored(self, name: str) -> str:
    return self._names.get(name, name)

  def _checked(self, name: str, value: Any, kind: Any, least: float) -> Any:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not least <= value <= sys.float_info.max:
      noun = 'integer' if kind is int else 'finite number'
      expected = f'a positive {noun}' if least else f'0 or a positive {noun}'
      raise self.error(name, value, expected)
    return value
