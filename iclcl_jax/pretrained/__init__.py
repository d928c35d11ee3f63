"""Real models as pure functions over a parameter pytree."""

from iclcl_jax.pretrained import attribution, smollm2
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._decoding import (
  KeyValueCache,
  decode_step,
  generate,
  prefill,
)
from iclcl_jax.pretrained._load import Pretrained, from_checkpoint, load
from iclcl_jax.pretrained._model import (
  LanguageModel,
  embed,
  hidden_states,
  logits,
  next_token_log_probs,
  next_token_logits,
  positions_of,
  unembed,
)
from iclcl_jax.pretrained.gguf import read_gguf
from iclcl_jax.pretrained.safetensors import read_safetensors
from iclcl_jax.pretrained.tokenizer import Tokenizer, read_tokenizer

__all__ = [
  'Checkpoint',
  'KeyValueCache',
  'LanguageModel',
  'Pretrained',
  'Tokenizer',
  'attribution',
  'decode_step',
  'embed',
  'from_checkpoint',
  'generate',
  'hidden_states',
  'load',
  'logits',
  'next_token_log_probs',
  'next_token_logits',
  'positions_of',
  'prefill',
  'read_gguf',
  'read_safetensors',
  'read_tokenizer',
  'smollm2',
  'unembed',
]
