"""Null distributions: similarities of updates that have nothing in common."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, precision
from iclcl_jax._door import door
from iclcl_jax.accounts import _numerics
from iclcl_jax.types import Array, Float, PRNGKeyArray

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

  Args:
    key: consumed.
    similarity: a metric of one query.
    in_context: activations. Shape `[Q, ...]`.
    finetuned: likewise.
    zero_shot: likewise.
    num_draws: number of draws.

  Returns:
    The metric, mean over queries, of each draw. Shape `[num_draws]`.
  """
  _check_null(similarity, num_draws, in_context, finetuned, zero_shot)
  base = precision.widen(zero_shot)
  norms = jnp.vectorize(_numerics.norm, signature='(d)->()')
  sizes = norms(precision.widen(finetuned) - base)[..., None]

  def one_draw(key):
    noise = jax.random.normal(key, base.shape, base.dtype)
    noise = sizes * (noise / norms(noise)[..., None])
    moved = (base + noise).astype(finetuned.dtype)
    return _mean_of(similarity, in_context, moved, zero_shot)

  return jax.lax.map(one_draw, jax.random.split(key, num_draws))


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

  It keeps what all queries share, so a metric above `random_null` but not above
  this one says nothing of the query.

  Takes what `random_null` takes, of two queries or more.

  Returns:
    The metric, mean over queries, of each draw. Shape `[num_draws]`.
  """
  _check_null(similarity, num_draws, in_context, finetuned, zero_shot)
  count = in_context.shape[0]
  if count < 2:
    raise ValueError(
      'in_context has 1 query; expected at least two to permute.'
    )
  updates = finetuned - zero_shot

  def one_draw(key):
    key_order, key_shift = jax.random.split(key)
    order = jax.random.permutation(key_order, count)
    shift = jax.random.randint(key_shift, (), 1, count)
    # A cycle along a random order: nobody keeps their own.
    partner = jnp.zeros_like(order).at[order].set(jnp.roll(order, shift))
    moved = zero_shot + updates[partner]
    return _mean_of(similarity, in_context, moved, zero_shot)

  return jax.lax.map(one_draw, jax.random.split(key, num_draws))


def _mean_of(similarity, *activations):
  scores = jax.vmap(similarity)(*activations)
  queries = activations[0].shape[:1]
  _validate.check_result('similarity, of all queries,', scores, queries)
  return jnp.mean(scores)


def _check_null(similarity, num_draws, *activations) -> None:
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
