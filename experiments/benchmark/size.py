"""Memory of a large model in bfloat16: loaded, certified and decoded.

  python -m experiments.benchmark.size --num_layers=22

A random Llama is written to a temporary folder (2.1 GiB with 22 layers) and
read by another process, whose peak is printed after each step, with and without
the pass of XLA that widens the parameters of all layers at once on a CPU. Three
minutes on two cores.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmark import timing
from iclcl_jax import equivalence, pretrained

FLAG = '--xla_disable_hlo_passes=while-loop-invariant-code-motion'
NUM_LAYERS = flags.DEFINE_integer('num_layers', 22, 'layers of 44 M parameters')
WIDTH = flags.DEFINE_integer('width', 2048, 'width of the residual stream')
FOLDER = flags.DEFINE_string('folder', '', 'a written model, to be measured')


def write(folder: pathlib.Path, num_layers: int, width: int) -> None:
  from safetensors.numpy import save_file

  rng, d_ff, words = np.random.default_rng(0), width * 11 // 4, 32_000
  shapes: dict[str, tuple[int, ...]] = {
    'model.embed_tokens': (words, width),
    'lm_head': (words, width),
  }
  for layer in range(num_layers):
    place = f'model.layers.{layer}.'
    for name, size in (('q', width), ('k', width // 4), ('v', width // 4)):
      shapes[f'{place}self_attn.{name}_proj'] = (size, width)
    shapes[f'{place}self_attn.o_proj'] = (width, width)
    for name in ('gate', 'up'):
      shapes[f'{place}mlp.{name}_proj'] = (d_ff, width)
    shapes[f'{place}mlp.down_proj'] = (width, d_ff)
    for name in ('input_layernorm', 'post_attention_layernorm'):
      shapes[place + name] = (width,)
  shapes['model.norm'] = (width,)
  tensors = {
    f'{name}.weight': (
      rng.standard_normal(shape, np.float32) * 0.02 + (len(shape) == 1)
    ).astype(jnp.bfloat16)
    for name, shape in shapes.items()
  }
  save_file(tensors, folder / 'model.safetensors')
  config = {
    'model_type': 'llama',
    'vocab_size': words,
    'hidden_size': width,
    'intermediate_size': d_ff,
    'num_hidden_layers': num_layers,
    'num_attention_heads': width // 64,
    'num_key_value_heads': width // 256,
    'max_position_embeddings': 2048,
  }
  (folder / 'config.json').write_text(json.dumps(config))


def measure(folder: str) -> None:
  """Loads the model, and prints the peak of the process after each step."""

  def report(step):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f'{step:<12} peak {peak:.2f} GiB, {peak / size:.2f} x the parameters')

  model = pretrained.from_checkpoint(pretrained.read_safetensors(folder))
  leaves = jax.tree.leaves(model)
  count = sum(x.size for x in leaves)
  size = sum(x.nbytes for x in leaves) / 2**30
  print(f'{count / 1e9:.2f} B parameters, {size:.2f} GiB; {timing.machine()}')
  report('loaded')
  tokens = jnp.arange(64, dtype=jnp.int32)
  certificate = equivalence.verify_model(
    model.architecture, model.blocks, pretrained.embed(model, tokens)
  )
  report('certified')
  print(f'  residual {certificate.max_residual:.1e}, {certificate.verdict}')
  pretrained.generate(model, tokens, num_tokens=8).block_until_ready()
  report('decoded')


def main(argv: list[str]) -> None:
  del argv
  if FOLDER.value:
    measure(FOLDER.value)
    return
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder), NUM_LAYERS.value, WIDTH.value)
    command = [sys.executable, '-m', __spec__.name, f'--folder={folder}']
    for given in (FLAG, ''):
      print(f'XLA_FLAGS={given}', flush=True)
      environment = os.environ | {'XLA_FLAGS': given}
      subprocess.run(command, env=environment, check=True)


if __name__ == '__main__':
  app.run(main)
