"""What does a real language model cost, and its certificate?

SmolLM2-135M in float32, the forward pass up to the next token's logits, beside
`transformers` on the same weights: eager, with PyTorch's fused attention, and
compiled; the matrix products of that pass alone, a bound for all programs on
the same library of products; and the certificate of all heads at all positions
with the chain of dual models, as a multiple of the forward pass.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import peers, timing
from experiments.benchmark.timing import Goal, compile_call
from experiments.lab import Config
from iclcl_jax import equivalence, pretrained
from iclcl_jax.types import Array

# Peers by name: the attention, and whether `torch.compile` makes one program.
PEERS = {
  'transformers, eager': ('eager', False),
  'transformers, SDPA': ('sdpa', False),
  'transformers, SDPA and torch.compile': ('sdpa', True),
}
FORWARD, CERTIFICATE = 'forward pass', 'certificate and chain'
PRODUCTS = 'bare products'
COST = 4.5  # Forward passes that a certificate may cost.


def measure(config: Config) -> timing.Rows:
  """Measures SmolLM2; a goal without weights or peer has no value."""
  group = f'language model, {config.prompt_length} tokens'
  try:
    path = pretrained.smollm2.weights_path()
    calls = calls_of(path, config.prompt_length, config.seed)
  except ValueError as error:  # Weights or readers are missing.
    print(f'The language model is left out: {error}')
    return timing.Rows(group, goals(config.prompt_length, {}), {}, {})
  seconds = timing.measure(calls, -(-config.repetitions // 2))
  seconds |= timing.beside_matmul(config, {})
  return timing.Rows(group, goals(config.prompt_length, seconds), seconds, {})


def calls_of(
  path: str | os.PathLike[str], num_tokens: int, seed: int
) -> timing.Calls:
  """Compiles the forward pass, the certificate, and the peers' passes.

  Of a GGUF file, on random tokens; a call is None where a peer is missing.
  """
  model = pretrained.load(path).model
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, model.vocabulary_size, num_tokens, np.int32)

  def certify(model, tokens):
    x = pretrained.embed(model, tokens)
    return equivalence.model_residuals(model.architecture, model.blocks, x)

  with jax.default_matmul_precision('highest'):
    return {
      FORWARD: compile_call(pretrained.next_token_logits, model, tokens).call,
      PRODUCTS: compile_call(products, model, tokens).call,
      CERTIFICATE: compile_call(certify, model, tokens).call,
      **{name: peer(path, tokens, *kind) for name, kind in PEERS.items()},
    }


def products(model: pretrained.LanguageModel, tokens: Array) -> Array:
  """The matrix products of the pass, without what stands between them."""

  def apply_block(x, block):
    sides = block.query, block.key, block.value
    queries, keys, values = (
      jnp.einsum('nd,dhk->hnk', x, side.weight) for side in sides
    )
    rows = queries.reshape(len(keys), -1, keys.shape[2])
    outputs = (rows @ keys.mT @ values).reshape(queries.shape)
    x = jnp.einsum('hnk,hkd->nd', outputs, block.output.weight)
    inside = x @ block.gate.weight + x @ block.up.weight
    return inside @ block.down.weight, None

  x = pretrained.embed(model, tokens)
  x, _ = jax.lax.scan(apply_block, x, model.blocks)
  return pretrained.unembed(model, x[-1:])


def goals(num_tokens: int, seconds: timing.Seconds) -> list[Goal]:
  """Ratios of times; without a value where a time is missing.

  Example:
    >>> [goal.value for goal in goals(8, {FORWARD: 2.0, CERTIFICATE: 6.0})]
    [None, None, None, None, 3.0]
  """
  name = f'SmolLM2, {num_tokens} tokens'
  others = (*PEERS, PRODUCTS)
  speeds = {other: timing.ratio(seconds, other, FORWARD) for other in others}
  cost = timing.ratio(seconds, CERTIFICATE, FORWARD)
  what = f'{name}: time of {CERTIFICATE} / of the {FORWARD}'
  return [
    *(
      Goal(f'{name}: speed / speed of {k}', x, 0.9 if k == PRODUCTS else 1)
      for k, x in speeds.items()
    ),
    Goal(what, cost, COST, False),
  ]


def peer(
  path: str | os.PathLike[str],
  tokens: np.ndarray,
  attention: str = 'eager',
  is_compiled: bool = False,
) -> timing.Call | None:
  """The same pass by `transformers`, with the weights of the same file."""
  torch, transformers = peers.load('torch'), peers.load('transformers')
  if torch is None or transformers is None:
    return None
  checkpoint = pretrained.read_gguf(path)
  config = {k: v for k, v in checkpoint.config.items() if k != 'model_type'}
  config |= {'attn_implementation': attention}
  model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
  model = model.to(torch.float32).eval()
  state = {k: torch.tensor(v) for k, v in checkpoint.tensors.items()}
  model.load_state_dict(state, strict=False)
  model.tie_weights()
  forward = peers.compiled(model) if is_compiled else model
  ids = torch.tensor(tokens[None].astype(np.int64))

  def call() -> np.ndarray:
    with torch.inference_mode():
      answer = forward(ids, use_cache=False, logits_to_keep=1)
    return answer.logits[0, -1].numpy()

  return peers.working(call) if is_compiled else call
