"""From a checkpoint to a model, whatever its family."""

from typing import Any

from iclcl_jax.pretrained._bert import from_bert
from iclcl_jax.pretrained._checkpoint import Checkpoint
from iclcl_jax.pretrained._gpt2 import from_gpt2
from iclcl_jax.pretrained._llama import from_llama
from iclcl_jax.pretrained._model import LanguageModel

FAMILIES = {'llama': from_llama, 'gpt2': from_gpt2, 'bert': from_bert}


def from_checkpoint(
  checkpoint: Checkpoint, *, dtype: Any = None
) -> LanguageModel:
  """Makes a model of a checkpoint in the layout of Hugging Face.

  Args:
    checkpoint: config and tensors. The config's `model_type` names the family:
      `llama`, `gpt2` or `bert` (an encoder; MiniLM is one).
    dtype: dtype of the parameters; by default that of the tensors, or float32
      if they are of several 16- and 32-bit types.

  Returns:
    The model. Tables that follow from the config (angles, causal masks) and a
    BERT's pooler and pre-training heads are left out.

  Raises:
    ValueError: if the family is unknown, a variant of the architecture is not
      supported, or a tensor is missing, unexpected, or of another shape.
  """
  family = checkpoint.config.get('model_type')
  if not isinstance(family, str) or family not in FAMILIES:
    raise ValueError(
      f"config['model_type'] is {family!r}; expected one of "
      f'{", ".join(FAMILIES)}. Other architectures are not supported.'
    )
  for name in ('num_hidden_layers', 'n_layer'):
    count = checkpoint.config.get(name)
    if isinstance(count, int) and count > len(checkpoint.tensors):
      raise ValueError(
        f'config[{name!r}] is {count}, but there are only '
        f'{len(checkpoint.tensors)} tensors; expected several for each layer. '
        'Check that config and tensors belong together.'
      )
  return FAMILIES[family](checkpoint, dtype)
