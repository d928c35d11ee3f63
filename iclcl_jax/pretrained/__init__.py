"""Real models as pure functions over a parameter pytree."""

from iclcl_jax.pretrained._architectures import from_checkpoint
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._decoding import (
  KeyValueCache,
  decode_step,
  generate,
  prefill,
)
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

__all__ = [
  'Checkpoint',
  'KeyValueCache',
  'LanguageModel',
  'decode_step',
  'embed',
  'from_checkpoint',
  'generate',
  'hidden_states',
  'logits',
  'next_token_log_probs',
  'next_token_logits',
  'positions_of',
  'prefill',
  'unembed',
]
