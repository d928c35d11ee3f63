"""Rec2FTP: what learning in context recovers of what finetuning gains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.types import Array, Bool, Float, PRNGKeyArray


class Recovery(NamedTuple):
  """How many of the examples that finetuning gains are recovered in context.

  Attributes:
    recovered: right finetuned and in context, wrong zero-shot: a count.
    gained: right finetuned, wrong zero-shot: a count.
    percent: Rec2FTP, `100 recovered / gained`; NaN if nothing is gained.
    chance: the same over ALL that zero-shot gets wrong: what Rec2FTP is if the
      two have nothing to do with each other.
  """

  recovered: Array
  gained: Array
  percent: Float[Array, '']
  chance: Float[Array, '']

  @property
  def lift(self) -> Float[Array, '']:
    """Returns Rec2FTP less its chance level, in points."""
    return self.percent - self.chance


@door
def recovery(
  in_context: Bool[Array, ' Q'],
  finetuned: Bool[Array, ' Q'],
  zero_shot: Bool[Array, ' Q'],
) -> Recovery:
  """Counts the examples that both learn: Rec2FTP and its chance level.

  Args:
    in_context: whether each query was answered right. Shape `[Q]`.
    finetuned: likewise.
    zero_shot: likewise.

  Example:
    >>> right = jnp.array([True, True, False, False])
    >>> wrong = jnp.array([False, False, False, False])
    >>> float(recovery(right, right, wrong).percent)
    100.0

  References:
    Dai et al., arXiv:2212.10559; the chance level is not theirs.
  """
  gained, missed = finetuned & ~zero_shot, ~zero_shot
  both = jnp.sum(in_context & gained)
  return Recovery(
    both,
    jnp.sum(gained),
    100 * _ratio(both, jnp.sum(gained)),
    100 * _ratio(jnp.sum(in_context & missed), jnp.sum(missed)),
  )


@door
def recovery_null(
  key: PRNGKeyArray,
  in_context: Bool[Array, ' Q'],
  finetuned: Bool[Array, ' Q'],
  zero_shot: Bool[Array, ' Q'],
  *,
  num_draws: int,
) -> Float[Array, ' draws']:
  """Draws Rec2FTP with answers in context permuted.

  They are permuted among the examples that zero-shot gets wrong.

  Args:
    key: consumed.
    in_context: as in `recovery`. Shape `[Q]`.
    finetuned: likewise.
    zero_shot: likewise.
    num_draws: number of draws.

  Returns:
    Rec2FTP of each draw, in percent; its mean is `Recovery.chance`. Shape
    `[num_draws]`.
  """
  _validate.at_least(1, num_draws=num_draws)

  def one_draw(key):
    # Two orders of the wrong ones, random and given, matched rank by rank.
    rank = jax.random.uniform(key, zero_shot.shape)
    rank = rank + zero_shot.astype(rank.dtype)
    source, place = jnp.argsort(rank), jnp.argsort(zero_shot, stable=True)
    shuffled = in_context.at[place].set(in_context[source])
    return recovery(shuffled, finetuned, zero_shot).percent

  return jax.lax.map(one_draw, jax.random.split(key, num_draws))


def _ratio(part, whole):
  """Divides; NaN, without a warning, where the whole is 0."""
  part, whole = jnp.asarray(part, float), jnp.asarray(whole, float)
  return jnp.where(whole == 0, jnp.nan, part / jnp.where(whole == 0, 1, whole))
