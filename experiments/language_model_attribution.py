"""Which tokens and demonstrations made the answer of a language model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from iclcl_jax import pretrained
from iclcl_jax.pretrained import attribution
from iclcl_jax.types import Array


class Attribution(NamedTuple):
  """The difference of two logits behind a prompt, taken apart.

  Positive numbers speak for the first label, the likelier one.

  Attributes:
    logit_difference: logit of the first label less that of the second.
    identity_error: what the sum of all terms lacks, over the sum of their
      absolute values.
    of_tokens: what the heads read from each token. Shape `[N]`.
    of_heads: what each head reads, from the whole prompt. Shape `[L, H]`.
    of_demonstrations: what the heads read from each. Shape `[S]`.
    rest: what they read from all other tokens.
    embedding: of the last token itself.
    biases: of all blocks and of the head.
    removal: what the difference loses if each head alone forgets the
      demonstration, to first order, summed over heads. Shape `[S]`.
    deletion: what it loses in a forward pass of the prompt without the
      demonstration. Shape `[S]`.
    drop_shares: share of a demonstration in the loss drop of a dual model,
      mean over layers and key-value heads. Shape `[S]`.
  """

  logit_difference: float
  identity_error: float
  of_tokens: np.ndarray
  of_heads: np.ndarray
  of_demonstrations: np.ndarray
  rest: float
  embedding: float
  biases: float
  removal: np.ndarray
  deletion: np.ndarray
  drop_shares: np.ndarray


def attribute(
  model: pretrained.LanguageModel,
  tokens: Array,
  segments: np.ndarray,
  label_ids: tuple[int, int],
) -> Attribution:
  """Takes the difference of two logits behind a prompt apart.

  Args:
    model: a causal language model.
    tokens: ids of the prompt. Shape `[N]`.
    segments: demonstration of each token, -1 for the rest. Shape `[N]`.
    label_ids: the two tokens.

  Returns:
    The `Attribution`.
  """
  num_tokens, num_segments = len(tokens), int(segments.max()) + 1

  def of_tokens(model, tokens, labels):
    return attribution.attribute(
      model, tokens, jnp.arange(num_tokens), *labels, num_segments=num_tokens
    )

  with jax.default_matmul_precision('highest'):
    labels = jnp.asarray(label_ids)
    found = harness.compile_quickly(of_tokens)(model, tokens, labels)
    found = jax.device_get(found)
    empty = np.zeros(0)
    parts: Any = empty, empty, empty
    if num_segments:
      parts = _of_demonstrations(
        model, tokens, jnp.asarray(segments), labels, num_segments
      )
  terms = [
    found.contributions,
    found.rest,
    found.embedding,
    found.biases,
    found.final_bias,
  ]
  flat = np.concatenate([np.ravel(x).astype(np.float64) for x in terms])
  difference = float(found.logit_difference)
  rows = found.contributions.sum((0, 1), dtype=np.float64)
  removal, deletion, shares = parts
  return Attribution(
    logit_difference=difference,
    identity_error=float(abs(flat.sum() - difference) / np.abs(flat).sum()),
    of_tokens=rows,
    of_heads=found.contributions.sum(2, dtype=np.float64),
    of_demonstrations=np.array(
      [rows[segments == index].sum() for index in range(num_segments)]
    ),
    rest=float(rows[segments < 0].sum()),
    embedding=float(found.embedding),
    biases=float(found.biases.sum(dtype=np.float64) + found.final_bias),
    removal=removal,
    deletion=difference - deletion if num_segments else deletion,
    drop_shares=shares,
  )


def _of_demonstrations(model, tokens, segments, labels, num_segments):
  """Removal from heads, deletion from the prompt, shares of the loss drop."""

  def measure(model, tokens, segments, labels):
    effects = attribution.attribute(
      model, tokens, segments, *labels, num_segments=num_segments
    ).removal_effects
    gradients = attribution.demonstration_gradients(
      model, tokens, segments, num_segments=num_segments
    )

    def without(index):  # Positions close up, as in the shorter prompt.
      return attribution.logit_difference(
        model, tokens, *labels, mask=segments != index
      )

    indices = jnp.arange(num_segments, dtype=segments.dtype)
    return (
      jnp.sum(effects, axis=(0, 1)),
      jax.lax.map(without, indices),
      jnp.mean(gradients.drop_shares, axis=(0, 1)),
    )

  call = harness.compile_quickly(measure)
  found = call(model, tokens, segments, labels)
  return tuple(np.asarray(x, np.float64) for x in jax.device_get(found))
