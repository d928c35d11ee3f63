"""Is every attention head one gradient step, and the network their chain?"""

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing
from experiments.language_model import prompts
from iclcl_jax import equivalence, precision, pretrained
from iclcl_jax.types import Array

NUM_TIMED = 3
REN = 'Ren & Liu, arXiv:2310.13220'
BOUNDS = {'float32': 1e-5, 'float64': 1e-12}


class Forward(NamedTuple):
  log_probs: np.ndarray  # Of the token after the prompt. Shape `[vocab]`.
  seconds: float  # Median of a few calls, compiled before.
  continuation: np.ndarray  # Likeliest tokens, one after the other, `[K]`.


class Certified(NamedTuple):
  certificate: equivalence.ModelCertificate  # Of all heads at all positions.
  seconds: float  # Of the certificate, compiled before.
  forward_log_probs: np.ndarray  # Of the plain pass. Shape `[K, vocab]`.
  chain_log_probs: np.ndarray  # The same of the chain of dual models.

  @property
  def total_variations(self) -> np.ndarray:
    """Distances of the two distributions, behind each token. Shape `[K]`."""
    return total_variation(self.forward_log_probs, self.chain_log_probs)


class Results(NamedTuple):
  loaded: prompts.Loaded  # Model and prompt.
  forward: Forward
  certified: Mapping[str, Certified]  # Certificates by dtype.


@lab.once
def first_pass(config: Config) -> tuple[Forward, Certified]:
  """The forward pass and the float32 certificate, alone: their times count."""
  loaded = prompts.load(config)
  forward = run_forward(loaded.model, loaded.tokens, config.greedy_tokens)
  continued = jnp.concatenate([loaded.tokens, forward.continuation[:-1]])
  count = max(config.greedy_tokens, 1)
  return forward, certify(loaded.model, continued, count)


@lab.once
def measure(config: Config) -> Results:
  """Certifies the prompt and its continuation, in both precisions."""
  loaded = prompts.load(config)
  forward, single = first_pass(config)
  with lab.float64_on_host():
    model = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), loaded.model)
    continued = jnp.concatenate([loaded.tokens, forward.continuation[:-1]])
    double = certify(model, continued, max(config.greedy_tokens, 1))
  return Results(loaded, forward, {'float32': single, 'float64': double})


@jax.default_matmul_precision('highest')
def run_forward(
  model: pretrained.LanguageModel, tokens: Array, num_tokens: int
) -> Forward:
  """Runs the model as it is on `N` tokens, and lets it continue by some."""
  call = jax.jit(pretrained.next_token_logits)
  log_probs = jax.device_get(jax.nn.log_softmax(call(model, tokens)))
  times = []
  for _ in range(NUM_TIMED):
    start = time.perf_counter()
    jax.block_until_ready(call(model, tokens))
    times.append(time.perf_counter() - start)
  continuation = np.zeros(0, np.int32)
  if num_tokens:
    generate = lab.compile_quickly(
      lambda model, x: pretrained.generate(model, x, num_tokens=num_tokens)
    )
    continuation = np.asarray(generate(model, tokens))
  return Forward(log_probs, statistics.median(times), continuation)


@jax.default_matmul_precision('highest')
def certify(
  model: pretrained.LanguageModel, tokens: Array, num_answers: int
) -> Certified:
  """Checks every head at every position, and runs the chain of dual models.

  On a prompt and its continuation `[N]`, in the dtype of the model; keeps the
  distributions behind the last `num_answers` tokens.
  """

  def measure(model, tokens):
    x = pretrained.embed(model, tokens)
    result = equivalence.model_residuals(model.architecture, model.blocks, x)
    return result, [
      _log_probs(model, states[-num_answers:])
      for states in (result.forward, result.chain)
    ]

  jitted: Any = lab.compile_quickly(measure)
  compiled = jitted.lower(model, tokens).compile()
  start = time.perf_counter()
  answer = jax.block_until_ready(compiled(model, tokens))
  seconds = time.perf_counter() - start
  result, (forward, chain) = jax.device_get(answer)
  certificate = equivalence.certificate_of(result, arithmetic=precision.HIGHEST)
  return Certified(certificate, seconds, forward, chain)


def _log_probs(model, states) -> Array:
  """Behind the last block: normalise, unembed."""

  def normalise(row):
    return model.architecture.normalization(model.final_norm, row)

  if model.final_norm is not None:
    states = jax.vmap(normalise)(states)
  return jax.nn.log_softmax(pretrained.unembed(model, states))


def total_variation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Half the L1 distance of distributions, given as logs `[..., vocab]`.

  Example:
    >>> log = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))
    >>> float(total_variation(log[0], log[1]))
    0.25
  """
  first, second = (np.exp(np.asarray(x, np.float64)) for x in (first, second))
  return np.sum(np.abs(first - second), axis=-1) / 2


def next_token_distance(results: Results) -> float:
  """Distance of the timed forward pass and the chain, behind the prompt."""
  chain = results.certified['float32'].chain_log_probs[0]
  return float(total_variation(results.forward.log_probs, chain))


def claims(config: Config, results: Results) -> list[lab.Claim]:
  single = results.certified['float32'].certificate
  text = '\n'.join(
    f"""heads-{dtype} [{REN}, Theorem 3.1, head by head] each of the
      {single.num_heads} softmax attention heads is one gradient step of its
      dual model ({dtype}) | largest backward-stable residual over all heads and
      {single.num_positions} positions, closed form and jax.grad"""
    for dtype in BOUNDS
  )
  chain = f"""
chain [{REN}, several attention layers] the chain of dual models predicts the
  same next token | total variation of the next-token distributions, float32"""
  found = {
    f'heads-{dtype}': lab.at_most(
      bound, results.certified[dtype].certificate.max_residual
    )
    for dtype, bound in BOUNDS.items()
  } | {'chain': lab.at_most(1e-5, next_token_distance(results))}
  return lab.statements('language-model-', text + chain, found)


def summary(config: Config, results: Results) -> dict[str, Any]:
  loaded, forward, certified = results
  single = certified['float32']
  log_probs = np.asarray(forward.log_probs, np.float64)
  best = np.argsort(-log_probs, kind='stable')[: config.top_tokens]
  chain_ids = np.argmax(single.chain_log_probs, axis=1)
  chain_ids = chain_ids[: len(forward.continuation)]
  by_dtype: dict[str, Any] = {}
  for dtype, found in certified.items():
    by_dtype |= {
      f'max_residual_{dtype}': found.certificate.max_residual,
      f'max_chain_error_{dtype}': found.certificate.max_chain_error,
      f'verdict_{dtype}': found.certificate.verdict,
    }
  return by_dtype | {
    'num_tokens': len(loaded.tokens),
    'num_positions': single.certificate.num_positions,
    'num_layers': single.certificate.num_layers,
    'num_heads': single.certificate.num_heads,
    'holds': all(found.certificate.holds for found in certified.values()),
    'next_token_total_variation': next_token_distance(results),
    'next_token_total_variation_float64': certified['float64'].total_variations[
      0
    ],
    'continuation_total_variation': np.max(single.total_variations),
    'top_tokens': [
      {
        'id': index,
        'log_probability': log_probs[index],
        'text': loaded.tokenizer.token(index),
      }
      for index in best.tolist()
    ],
    'greedy_tokens': forward.continuation,
    'greedy_text': ''.join(map(loaded.tokenizer.token, forward.continuation)),
    'chain_greedy_tokens': chain_ids,
    'chain_continues_the_same': np.array_equal(forward.continuation, chain_ids),
    'prompt': loaded.prompt.text,
    'prompt_token_ids': loaded.tokens,
    'certificate_seconds': single.seconds,
    'forward_seconds': forward.seconds,
    'seconds_note': 'The float64 certificate runs beside the other parts.',
    'peak_memory_bytes': peak_memory_bytes(),
  }


def peak_memory_bytes() -> int:
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def of_layers(results: Results) -> list[dict[str, Any]]:
  rows: list[dict[str, Any]] = []
  for layer in range(results.certified['float32'].certificate.num_layers):
    row: dict[str, Any] = {'layer': layer}
    for dtype, certified in results.certified.items():
      found = certified.certificate.residuals
      row |= {
        f'residual_closed_form_{dtype}': np.max(found.closed_form[layer], 1),
        f'residual_autodiff_{dtype}': np.max(found.autodiff[layer], 1),
        f'chain_error_{dtype}': float(found.chain_error[layer]),
      }
    rows.append(row)
  return rows


def positions_note(results: Results) -> str:
  """What the positions of the certificate are."""
  count = len(results.loaded.tokens)
  text = f'{count} tokens of the prompt'
  more = results.certified['float32'].certificate.num_positions - count
  return f'{text} and {more} generated after it' if more else text


def sentence(config: Config, results: Results) -> str:
  single, double = (x.certificate for x in results.certified.values())
  verb = 'is' if single.holds and double.holds else 'is NOT'
  count = len(results.forward.continuation)
  chain = np.argmax(results.certified['float32'].chain_log_probs, axis=1)
  same = np.array_equal(chain[:count], results.forward.continuation)
  continues = (
    f' and continues the prompt by {"the same" if same else "other"} {count} '
    'tokens'
  )
  return f"""Every one of the {single.num_heads} heads {verb} one gradient step
    of its dual model at all {single.num_positions} positions, to
    {single.max_residual:.1e} in float32 and {double.max_residual:.1e} in
    float64. The chain of dual models gives next-token probabilities within a
    total variation of
    {next_token_distance(results):.1e}{continues if count else ''}."""


def residuals(certified: Certified) -> np.ndarray:
  """The largest residual of each head over positions. Shape `[L, H]`."""
  found = certified.certificate.residuals
  return np.maximum(found.closed_form, found.autodiff).max(axis=2)


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axes = drawing.subplots(len(results.certified), 1, figsize=(10, 7))
  for axis, (dtype, found) in zip(axes, results.certified.items(), strict=True):
    largest = residuals(found).T
    exponent = int(np.floor(np.log10(max(largest.max(), 1e-300))))
    image = axis.imshow(
      largest / 10.0**exponent, cmap='cividis', vmin=0, aspect='auto'
    )
    head, layer = np.unravel_index(np.argmax(largest), largest.shape)
    axis.plot(layer, head, 'x', color='white', markersize=11, mew=4)
    axis.plot(layer, head, 'x', color='black', markersize=10, mew=2)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label(f'residual / $10^{{{exponent}}}$')
    axis.set(ylabel='head', yticks=range(0, largest.shape[0], 2))
    axis.set_title(
      f'{dtype}: largest residual {found.certificate.max_residual:.1e} '
      f'(tolerance {found.certificate.tolerance:.0e})'
    )
  axes[-1].set_xlabel('layer')
  return [lab.Figure('residuals', figure, caption(results))]


def caption(results: Results) -> str:
  found = results.certified['float32'].certificate
  return lab.one_line(f"""Largest distance between attention and its dual model
    after one gradient step, for each of {found.num_heads} heads over
    {found.num_positions} positions, relative to what rounding can cause; a
    cross marks the largest one.""")
