"""What `experiments.language_model` measures on a model and a prompt."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from iclcl_jax import equivalence, precision, pretrained
from iclcl_jax.types import Array

NUM_TIMED = 3


class Forward(NamedTuple):
  """The plain forward pass.

  Attributes:
    log_probs: of the token after the prompt. Shape `[vocab]`.
    seconds: median of a few calls, compiled before.
    continuation: likeliest tokens, one after the other. Shape `[K]`.
  """

  log_probs: np.ndarray
  seconds: float
  continuation: np.ndarray


class Certified(NamedTuple):
  """A certificate of a model on a prompt and its continuation.

  Attributes:
    certificate: of all heads at all positions.
    seconds: of the certificate, compiled before.
    forward_log_probs: of the plain pass, behind the prompt and behind each
      token of its continuation. Shape `[K, vocab]`.
    chain_log_probs: the same of the chain of dual models.
  """

  certificate: equivalence.ModelCertificate
  seconds: float
  forward_log_probs: np.ndarray
  chain_log_probs: np.ndarray


def run_forward(
  model: pretrained.LanguageModel, tokens: Array, num_tokens: int
) -> Forward:
  """Runs the model as it is, and lets it continue.

  Args:
    model: a causal language model.
    tokens: ids of the prompt. Shape `[N]`.
    num_tokens: how many to append; 0 for none.

  Returns:
    The `Forward`.
  """
  with jax.default_matmul_precision('highest'):
    call = jax.jit(pretrained.next_token_log_probs)
    log_probs = jax.device_get(call(model, tokens))
    seconds = median_seconds(lambda: call(model, tokens))
    continuation = np.zeros(0, np.int32)
    if num_tokens:
      generate = harness.compile_quickly(
        lambda model, tokens: pretrained.generate(
          model, tokens, num_tokens=num_tokens
        )
      )
      continuation = np.asarray(generate(model, tokens))
  return Forward(log_probs, seconds, continuation)


def median_seconds(call: Callable[[], Any]) -> float:
  """Median of a few calls."""
  times = []
  for _ in range(NUM_TIMED):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def certify(
  model: pretrained.LanguageModel, tokens: Array, num_answers: int
) -> Certified:
  """Checks every head at every position, and runs the chain of dual models.

  Args:
    model: a causal language model; its dtype is that of the certificate.
    tokens: the prompt and its continuation. Shape `[N]`.
    num_answers: distributions to keep, those behind the last tokens.

  Returns:
    The `Certified`.
  """

  def measure(model, tokens):
    x = pretrained.embed(model, tokens)
    result = equivalence.model_residuals(model.architecture, model.blocks, x)
    return result, [
      _log_probs(model, states[-num_answers:])
      for states in (result.forward, result.chain)
    ]

  with jax.default_matmul_precision('highest'):
    jitted: Any = harness.compile_quickly(measure)
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
  """Half the L1 distance of distributions, given as log-probabilities.

  Args:
    first: log-probabilities. Shape `[..., vocab]`.
    second: the same of another distribution.

  Returns:
    The distances. Shape `[...]`.

  Example:
    >>> log = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))
    >>> float(total_variation(log[0], log[1]))
    0.25
  """
  first, second = (np.exp(np.asarray(x, np.float64)) for x in (first, second))
  return np.sum(np.abs(first - second), axis=-1) / 2


def widened(model: pretrained.LanguageModel) -> pretrained.LanguageModel:
  """The same parameters in float64; call it in `harness.float64_on_host`."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model)


def peak_memory_bytes() -> int:
  """Largest resident memory of this process so far."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
