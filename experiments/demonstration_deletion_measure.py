"""What attribution predicts for each prompt, and what deletion does."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments import demonstration_deletion_data as data
from experiments import harness
from iclcl_jax import pretrained
from iclcl_jax.pretrained import attribution


def measure(
  model: pretrained.LanguageModel,
  labels: tuple[int, int],
  prompts: data.Prompts,
  *,
  block_size: int,
  checkpoints: pathlib.Path,
) -> dict[str, Any]:
  """Attribution and deletion of all prompts, in blocks that are resumed.

  Args:
    model: the language model.
    labels: ids of the positive and of the negative label.
    prompts: the prompts.
    block_size: prompts between checkpoints.
    checkpoints: folder of the checkpoints.

  Returns:
    Arrays with a leading axis `P`, see `one_prompt`.
  """
  arrays = jax.tree.map(jnp.asarray, prompts)

  def step(carry, number):
    prompt = jax.tree.map(lambda rows: rows[number], arrays)
    return carry, one_prompt(model, labels, prompt)

  _, results = harness.scan_blocks(
    step,
    jnp.zeros(()),
    len(prompts.tokens),
    block_size=block_size,
    checkpoints=checkpoints,
    description='prompts',
  )
  return results


def one_prompt(
  model: pretrained.LanguageModel,
  labels: tuple[int, int],
  prompt: Any,
) -> dict[str, Any]:
  """Measures one prompt.

  Args:
    model: the language model.
    labels: ids of the positive and of the negative label.
    prompt: `data.Prompts` of JAX arrays, without the axis `P`.

  Returns:
    Of the logit difference, positive less negative label: `difference`, the
    relative error `identity_gap` of the sum of its parts; for each
    demonstration `[S]` the `contribution` and `removal_effect` of all heads
    together, the attention weight and the share of the dual loss drop, mean
    over heads; what is lost by a new forward pass without it, `removed`, and
    with its tokens hidden, `hidden`.
  """
  size = prompt.positive.shape[0]
  options = {'num_segments': size, 'mask': prompt.mask}
  readings = attribution.read_heads(
    model, prompt.tokens, prompt.segment_ids, **options
  )
  parts = attribution.direct_logit_attribution(model, readings, *labels)
  gradients = attribution.demonstration_gradients(
    model, prompt.tokens, prompt.segment_ids, **options
  )
  again = jax.vmap(
    functools.partial(attribution.logit_difference, model),
    in_axes=(0, None, None),
  )
  removed = again(prompt.shortened, *labels, mask=prompt.shortened_mask)
  numbers = jnp.arange(size, dtype=prompt.segment_ids.dtype)
  tokens = jnp.broadcast_to(prompt.tokens, (size, *prompt.tokens.shape))
  hidden = again(
    tokens,
    *labels,
    mask=jnp.broadcast_to(prompt.mask, tokens.shape),
    excluded=numbers[:, None] == prompt.segment_ids[None],
  )
  return {
    'difference': parts.logit_difference,
    'identity_gap': _gap(parts),
    'contribution': jnp.sum(parts.contributions, axis=(0, 1)),
    'removal_effect': jnp.sum(parts.removal_effects, axis=(0, 1)),
    'attention': jnp.mean(jnp.exp(readings.log_shares), axis=(0, 1))[:-1],
    'loss_drop': jnp.mean(gradients.drop_shares, axis=(0, 1)),
    'removed': parts.logit_difference - removed,
    'hidden': parts.logit_difference - hidden,
  }


def _gap(parts: attribution.LogitAttribution) -> jax.Array:
  """Error of the sum of all parts, relative to their absolute values."""
  terms = (
    parts.contributions,
    parts.rest,
    parts.embedding,
    parts.biases,
    parts.final_bias,
  )
  scale = sum(jnp.sum(jnp.abs(term)) for term in terms)
  return jnp.abs(parts.total - parts.logit_difference) / scale
