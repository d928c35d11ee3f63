r"""Metrics that compare in-context learning with finetuning, and their nulls.

All are functions of recorded activations of the last query token: zero-shot
(no demonstrations), in context, and finetuned (without them again). Each metric
takes one query; `vmap` takes many. A metric without its null says little. An
undefined value (no update at all, no example to recover) is NaN.

The nulls take activations of `Q` queries, `[Q, ...]`, and return one number for
each draw: the metric, mean over queries. Their `key` is consumed.

References:
  Dai et al., arXiv:2212.10559; Deutch et al., arXiv:2311.07772 (similarities
  of updates that are not normalised). The chance level of `recovery` is new.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, precision
from iclcl_jax._door import door
from iclcl_jax.accounts import _numerics
from iclcl_jax.types import Array, Bool, Float, PRNGKeyArray


@door
def update_similarity(
  in_context: Float[Array, ' d'],
  finetuned: Float[Array, ' d'],
  zero_shot: Float[Array, ' d'],
) -> Float[Array, '']:
  """Returns SimAOU, the cosine of the two updates of an attention output.

  Of any two updates that shrink the baseline it is high; see
  `partial_update_similarity`.
  """
  updates = _updates(in_context, finetuned, zero_shot)
  return _numerics.cosine(*updates).astype(zero_shot.dtype)


@door
def normalised_update_similarity(
  in_context: Float[Array, ' d'],
  finetuned: Float[Array, ' d'],
  zero_shot: Float[Array, ' d'],
) -> Float[Array, '']:
  r"""Returns SimAOU as first published, of outputs that are normalised first.

  Biased: independent noise of relative variance `s^2` scores
  :math:`(1 - 1/\sqrt{1 + s^2})/2`, up to one half. NaN if an update is none, to
  rounding.
  """
  rounding = 16 * float(jnp.finfo(zero_shot.dtype).eps)
  baseline = _numerics.unit(zero_shot)

  def update(output):
    rest = _numerics.unit(output) - baseline
    return jnp.where(_numerics.norm(rest) > rounding, rest, 0)

  updates = map(update, (in_context, finetuned))
  return _numerics.cosine(*updates).astype(in_context.dtype)


@door
def partial_update_similarity(
  in_context: Float[Array, ' d'],
  finetuned: Float[Array, ' d'],
  zero_shot: Float[Array, ' d'],
) -> Float[Array, '']:
  """Returns SimAOU of the parts of the updates orthogonal to the baseline.

  NaN if an update has no such part that is larger than rounding.
  """
  rounding = 16 * float(jnp.finfo(zero_shot.dtype).eps)
  outputs = jnp.stack([in_context, finetuned, zero_shot])
  outputs = _numerics.scaled(outputs)[1]
  axis = _numerics.unit(outputs[2])

  def across(output):
    update = output - outputs[2]
    rest = update - axis * (axis @ update)
    noise = rounding * (jnp.linalg.norm(output) + jnp.linalg.norm(outputs[2]))
    return jnp.where(_numerics.norm(rest) > noise, rest, 0)

  updates = map(across, outputs[:2])
  return _numerics.cosine(*updates).astype(zero_shot.dtype)


@door
def map_similarity(
  in_context: Float[Array, 'H N'],
  other: Float[Array, 'H N'],
  zero_shot: Float[Array, 'H N'] | None = None,
) -> Float[Array, '']:
  """Returns SimAM, the mean cosine over heads of attention logits.

  They are logits before the softmax, one row a head; `other` are those of the
  zero-shot ("before") or finetuned model ("after"). With a baseline `zero_shot`
  it is SimAM-delta, of the updates of both.
  """
  pair = in_context, other
  if zero_shot is not None:
    pair = _updates(*pair, zero_shot)
  return jnp.mean(jax.vmap(_numerics.cosine)(*pair)).astype(in_context.dtype)


@door
def kendall(
  in_context: Float[Array, ' N'], finetuned: Float[Array, ' N']
) -> Float[Array, '']:
  """Returns Kendall's tau-a of two orders of at least two training tokens.

  It is `(concordant - discordant) / (N (N - 1) / 2)`; ties count as neither.
  The orders are of the attention logits on the demonstrations, summed over
  heads, and of the inner products of the final query with the training tokens'
  queries at their own step.
  """
  size = len(in_context)
  if size < 2:
    raise ValueError('in_context has 1 entry; expected at least two to order.')
  pair = precision.widen((in_context, finetuned))
  signs = [jnp.sign(x[:, None] - x[None]) for x in pair]
  rank = jnp.sum(signs[0] * signs[1]) / (size * (size - 1))
  return rank.astype(in_context.dtype)


def _updates(in_context, finetuned, zero_shot):
  """Returns both updates, widened before the difference can overflow."""
  base = precision.widen(zero_shot)
  return tuple(precision.widen(x) - base for x in (in_context, finetuned))


# `(in_context, finetuned, zero_shot) -> []`, for one query.
Similarity = Callable[[Array, Array, Array], Array]


@door
def random_null(
  key: PRNGKeyArray,
  similarity: Similarity,
  in_context: Array,
  finetuned: Array,
  zero_shot: Array,
  *,
  num_draws: int,
) -> Float[Array, ' draws']:
  """Draws the metric with random updates of the size of the finetuned ones.

  Gaussian, norm-matched along the last axis, and sent through the same metric.
  For one without baseline, such as `lambda a, b, _: kendall(a, b)`, pass zeros
  as `zero_shot`: the partner itself is random then.
  """
  norms = jnp.vectorize(_numerics.norm, signature='(d)->()')

  def draw(key):
    base = precision.widen(zero_shot)
    sizes = norms(precision.widen(finetuned) - base)[..., None]
    noise = jax.random.normal(key, base.shape, base.dtype)
    noise = sizes * (noise / norms(noise)[..., None])
    return (base + noise).astype(finetuned.dtype)

  activations = in_context, finetuned, zero_shot
  return _over_draws(key, num_draws, similarity, draw, activations)


@door
def permuted_null(
  key: PRNGKeyArray,
  similarity: Similarity,
  in_context: Array,
  finetuned: Array,
  zero_shot: Array,
  *,
  num_draws: int,
) -> Float[Array, ' draws']:
  """Draws the metric with each finetuned update taken from another query.

  It keeps what all queries share: a metric above `random_null` alone says
  nothing of the query. There are two queries or more.
  """
  count = in_context.shape[0]
  if count < 2:
    raise ValueError(
      'in_context has 1 query; expected at least two to permute.'
    )

  def draw(key):
    key_order, key_shift = jax.random.split(key)
    order = jax.random.permutation(key_order, count)
    shift = jax.random.randint(key_shift, (), 1, count)
    # A cycle along a random order: nobody keeps their own.
    partner = jnp.zeros_like(order).at[order].set(jnp.roll(order, shift))
    return zero_shot + (finetuned - zero_shot)[partner]

  activations = in_context, finetuned, zero_shot
  return _over_draws(key, num_draws, similarity, draw, activations)


def _over_draws(key, num_draws, similarity, draw, activations):
  """Returns mean similarities with what `draw(key)` puts in their place."""
  _validate.at_least(1, num_draws=num_draws)
  _validate.check_function(
    'similarity', similarity, 3, '(in_context, finetuned, zero_shot) -> []'
  )
  kinds = [f'{x.dtype} {list(x.shape)}' for x in activations]
  if len(set(kinds)) > 1:
    raise ValueError(
      f'activations disagree: in_context, finetuned and zero_shot are {kinds}; '
      'record all at the same place.'
    )
  in_context, _, zero_shot = activations

  def one(key):
    scores = jax.vmap(similarity)(in_context, draw(key), zero_shot)
    queries = in_context.shape[:1]
    _validate.check_result('similarity, of all queries,', scores, queries)
    return jnp.mean(scores)

  return jax.lax.map(one, jax.random.split(key, num_draws))


class Recovery(NamedTuple):
  """How many of the examples that finetuning gains are recovered in context.

  Attributes:
    gained, recovered: how many are wrong zero-shot and right finetuned, and of
      these right in context.
    percent: Rec2FTP, `100 recovered / gained`; NaN if nothing is gained.
    chance: the same over ALL that zero-shot gets wrong: what Rec2FTP is if the
      two have nothing to do with each other.
  """

  recovered: Array
  gained: Array
  percent: Float[Array, '']
  chance: Float[Array, '']


@door
def recovery(
  in_context: Bool[Array, ' Q'],
  finetuned: Bool[Array, ' Q'],
  zero_shot: Bool[Array, ' Q'],
) -> Recovery:
  """Counts the examples that both learn: Rec2FTP and its chance level.

  The arguments say whether each query was answered right.

  Example:
    >>> right = jnp.array([True, True, False, False])
    >>> wrong = jnp.array([False, False, False, False])
    >>> float(recovery(right, right, wrong).percent)
    100.0
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

  They are permuted among the examples that zero-shot gets wrong. The mean of
  the draws is `Recovery.chance`.
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
