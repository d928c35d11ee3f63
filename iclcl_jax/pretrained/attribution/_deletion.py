"""The difference of two logits without a demonstration, by forward passes."""

import jax
import jax.numpy as jnp
from jaxtyping import Int

from iclcl_jax._door import door
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.attribution import _checks
from iclcl_jax.pretrained.attribution._logits import logit_difference
from iclcl_jax.types import Array, Bool, Float


@door
def logit_differences_without(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  label: int | Int[Array, ''],
  other_label: int | Int[Array, ''],
  *,
  num_segments: int,
  mask: Bool[Array, ' N'] | None = None,
) -> Float[Array, ' S']:
  """The difference of two logits behind a prompt without each demonstration.

  A forward pass of each shortened prompt, one after the other: the tokens of
  the demonstration are masked, and those behind it move up. This is what
  `removal_effects` and `contributions` may be compared with.

  Args:
    model: a causal language model.
    tokens: ids of the prompt. Shape `[N]`.
    segment_ids: demonstration of each token, from 0; -1 for the rest, the last
      valid token among them. Shape `[N]`.
    label: token id whose logit counts.
    other_label: token id whose logit is subtracted.
    num_segments: number of demonstrations `S`.
    mask: tokens that are no padding. Shape `[N]`.

  Returns:
    The differences. Shape `[S]`.

  Raises:
    ValueError: as `read_heads` and `logit_difference`.
  """
  _checks.check_segments(segment_ids, num_segments)
  position = _checks.check_position(tokens, None, mask)

  def without(number):
    kept = segment_ids != number
    kept = kept if mask is None else kept & mask
    return logit_difference(
      model, tokens, label, other_label, position=position, mask=kept
    )

  numbers = jnp.arange(num_segments, dtype=segment_ids.dtype)
  return jax.lax.map(without, numbers)
