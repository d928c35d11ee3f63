"""Random blocks of three families, for the tests of blocks and certificates."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import transformer
from tests import oracles_transformer as oracles

SIZE, D_MODEL, HEADS, D_K, D_FF = 7, 12, 4, 6, 10
EPSILON, BASE = 1e-5, 100.0


class Family(NamedTuple):
  architecture: Any
  num_groups: int
  has_biases: bool
  is_gated: bool
  oracle: Any


def exact_gelu(z):
  return jax.nn.gelu(z, approximate=False)


def rotated(frequencies, **options):
  rotation = transformer.Rotary(frequencies=frequencies)
  return transformer.Layer(rotation=rotation, **options)


FAMILIES = {
  'llama': Family(
    transformer.Architecture(
      normalization=transformer.RMSNorm(EPSILON),
      activation=jax.nn.silu,
      visible=transformer.causal,
      layers=(rotated(transformer.rotary_frequencies(D_K, BASE)),),
    ),
    2,
    False,
    True,
    lambda p, x, mask: oracles.llama_block(p, x, HEADS, 2, BASE, EPSILON, mask),
  ),
  'gpt2': Family(
    transformer.Architecture(
      normalization=transformer.LayerNorm(EPSILON),
      activation=jax.nn.gelu,
      visible=transformer.causal,
    ),
    HEADS,
    True,
    False,
    lambda p, x, mask: oracles.gpt2_block(p, x, HEADS, EPSILON, mask),
  ),
  'bert': Family(
    transformer.Architecture(
      normalization=transformer.LayerNorm(EPSILON),
      activation=exact_gelu,
      visible=transformer.bidirectional,
    ),
    HEADS,
    True,
    False,
    lambda p, x, mask: oracles.bert_block(p, x, HEADS, EPSILON, mask),
  ),
}


@functools.cache
def parameters(name, seed):
  """Arrays in the layout of the oracle."""
  family, rng = FAMILIES[name], np.random.default_rng(seed)
  wide, narrow = HEADS * D_K, family.num_groups * D_K
  matrices = {
    'w_q': (D_MODEL, wide),
    'w_k': (D_MODEL, narrow),
    'w_v': (D_MODEL, narrow),
    'w_o': (wide, D_MODEL),
    'w_up': (D_MODEL, D_FF),
    'w_down': (D_FF, D_MODEL),
  } | ({'w_gate': (D_MODEL, D_FF)} if family.is_gated else {})
  p = {k: rng.normal(size=s) * s[0] ** -0.5 for k, s in matrices.items()}
  p |= {k: 1 + rng.normal(size=D_MODEL) / 4 for k in ('norm_1', 'norm_2')}
  if family.has_biases:
    biases = {
      'b' + k[1:]: rng.normal(size=s[1]) / 4 for k, s in matrices.items()
    }
    shifts = ('shift_1', 'shift_2')
    p |= biases | {k: rng.normal(size=D_MODEL) / 4 for k in shifts}
  return p


def make_block(name, seed=0, dtype=np.float64):
  """The same parameters as a `transformer.Block`."""
  p = {k: jnp.asarray(v, dtype) for k, v in parameters(name, seed).items()}
  groups = FAMILIES[name].num_groups

  def linear(key, weight_shape, bias_shape):
    bias = p.get('b_' + key)
    return transformer.Linear(
      p['w_' + key].reshape(weight_shape),
      None if bias is None else bias.reshape(bias_shape),
    )

  def norms(index):
    norm = transformer.Norm(p[f'norm_{index}'], p.get(f'shift_{index}'))
    place = 'sum' if name == 'bert' else 'input'
    return transformer.Norms(**{place: norm})

  narrow = (D_MODEL, groups, D_K)
  return transformer.Block(
    attention_norms=norms(1),
    query=linear('q', (D_MODEL, HEADS, D_K), (HEADS, D_K)),
    key=linear('k', narrow, narrow[1:]),
    value=linear('v', narrow, narrow[1:]),
    output=linear('o', (HEADS, D_K, D_MODEL), (D_MODEL,)),
    ffn_norms=norms(2),
    gate=linear('gate', (D_MODEL, D_FF), (D_FF,)) if 'w_gate' in p else None,
    up=linear('up', (D_MODEL, D_FF), (D_FF,)),
    down=linear('down', (D_FF, D_MODEL), (D_MODEL,)),
  )


def make_blocks(name, num_layers, dtype=np.float64):
  blocks = [make_block(name, seed, dtype) for seed in range(num_layers)]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def make_tokens(seed=0, size=SIZE, dtype=np.float64, scale=1.0):
  rng = np.random.default_rng(100 + seed)
  return jnp.asarray(rng.normal(size=(size, D_MODEL)) * scale, dtype)


def relative_error(result, expected):
  result = np.asarray(result, np.float64)
  expected = np.asarray(expected, np.float64)
  return np.abs(result - expected).max() / (np.abs(expected).max() or 1.0)
