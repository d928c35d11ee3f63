"""Real models as pure functions over a parameter pytree.

Throughout, `model` is a `LanguageModel` (for the next token a causal one),
`tokens` `[N]` are the ids of one prompt, `mask` `[N]` says which of them are no
padding, which may be on either side and which positions do not count, and
`token_types` `[N]` are the segments of an encoder's input, zeros by default.
"""

from iclcl_jax.pretrained import (
  attribution as attribution,
  finite as finite,
  learning as learning,
  smollm2 as smollm2,
)
from iclcl_jax.pretrained._decoding import (
  KeyValueCache as KeyValueCache,
  decode_step as decode_step,
  generate as generate,
  prefill as prefill,
  score_labels as score_labels,
)
from iclcl_jax.pretrained._load import (
  Pretrained as Pretrained,
  from_checkpoint as from_checkpoint,
  load as load,
)
from iclcl_jax.pretrained._model import (
  LanguageModel as LanguageModel,
  embed as embed,
  hidden_states as hidden_states,
  logits as logits,
  next_token_logits as next_token_logits,
  positions_of as positions_of,
  unembed as unembed,
)
from iclcl_jax.pretrained._reading import Checkpoint as Checkpoint
from iclcl_jax.pretrained.gguf import read_gguf as read_gguf
from iclcl_jax.pretrained.safetensors import (
  read_safetensors as read_safetensors,
)
from iclcl_jax.pretrained.tokenizer import (
  Tokenizer as Tokenizer,
  read_tokenizer as read_tokenizer,
)
