"""Who the negatives of a token are, and who gets what they lose."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, _validate
from iclcl_jax.types import Array, Bool, Float, PRNGKeyArray, Selection

# What negatives do to the attention weights of a query, `a' = a - m`. Shape
# `[N]`. The same numbers make the loss, `losses.negatives(m)`: the label of
# demonstration `i` becomes `v_i - sum_j m_j v_j`.
Renormalisation: TypeAlias = Callable[
  [Array, Array, Array, float | Array], Array
]
Candidates: TypeAlias = Callable[[Array, Array], Array]


def lowest_scores(
  weights: Float[Array, ' N'], candidates: Bool[Array, ' N'], count: int | Array
) -> Bool[Array, ' N']:
  """Chooses the candidates of lowest weight; ties by lower index."""
  return _smallest(weights, candidates, count)


def highest_scores(
  weights: Float[Array, ' N'], candidates: Bool[Array, ' N'], count: int | Array
) -> Bool[Array, ' N']:
  """Chooses the candidates of highest weight, as a control."""
  return _smallest(-weights, candidates, count)


def random_choice(key: PRNGKeyArray) -> Selection:
  """Makes a selection that chooses candidates at random, as a control."""
  _validate.check_key('key', key)
  return jax.tree_util.Partial(_at_random, key)


def _at_random(key, weights, candidates, count):
  noise = jax.random.uniform(key, weights.shape, weights.dtype)
  return _smallest(noise, candidates, count)


def _smallest(criterion, candidates, count):
  """The `count` candidates of least criterion; ties by lower index."""
  # Selection is discrete: no gradient passes through it.
  criterion = jax.lax.stop_gradient(criterion)
  criterion = jnp.where(candidates, criterion, jnp.inf)
  if isinstance(count, int):
    return _first(criterion, count) & candidates
  ranks = jnp.argsort(jnp.argsort(criterion))
  return (ranks < jnp.asarray(count, ranks.dtype)) & candidates


def _first(criterion, count: int):
  """The `count` least entries, one after the other.

  In two levels, the least row minimum and then the least of that row: all are
  read once, by `min`. On a CPU `lax.top_k` takes half as long again and more.
  """
  size = criterion.shape[0]
  width = 1 << (size.bit_length() // 2)  # Lengths are round in base 2.
  rows = jnp.pad(criterion, (0, -size % width), constant_values=jnp.inf)
  rows = rows.reshape(-1, width)
  least, places = jnp.min(rows, axis=1), jnp.arange(width)
  found: list[Array] = []
  for _ in range(count):
    row = jnp.argmin(least)
    indices = row * width + places
    entries = rows[row]
    if found:
      taken = jnp.stack(found)[:, None] == indices[None]
      entries = jnp.where(jnp.any(taken, axis=0), jnp.inf, entries)
    place = jnp.argmin(entries)
    found.append(indices[place])
    rest = jnp.where(places == place, jnp.inf, entries)
    least = least.at[row].set(jnp.min(rest))
  chosen = jnp.zeros(size, bool)
  return chosen.at[jnp.array(found, int)].set(True)


def unnormalised(weights, negatives, visible, strength) -> Float[Array, ' N']:
  """Takes `strength / k` from each negative; weights then sum to 1 - beta."""
  del visible
  return share(strength, negatives, weights.dtype)


def raise_others(weights, negatives, visible, strength) -> Float[Array, ' N']:
  """Gives what the negatives lose to all others in equal parts."""
  dtype = weights.dtype
  num_others = jnp.sum(visible) - jnp.sum(negatives)
  gain = jnp.asarray(strength, dtype) / jnp.maximum(num_others, 1).astype(dtype)
  others = jnp.where(visible, -gain, 0)
  return jnp.where(negatives, share(strength, negatives, dtype), others)


def scale_others(weights, negatives, visible, strength) -> Float[Array, ' N']:
  """Gives what the negatives lose to all others in proportion."""
  rest = 1 - jnp.sum(jnp.where(negatives, weights, 0))
  # No one else is visible: there is nobody to give to.
  gain = jnp.where(rest > 0, strength, 0) / jnp.where(rest > 0, rest, 1)
  others = jnp.where(visible, -gain * weights, 0).astype(weights.dtype)
  lost = share(strength, negatives, weights.dtype)
  return jnp.where(negatives, lost, others)


def share(total, chosen, dtype) -> Float[Array, ' N']:
  count = jnp.maximum(jnp.sum(chosen), 1).astype(dtype)
  return jnp.where(chosen, jnp.asarray(total, dtype) / count, 0)


@_pytree.dataclass(kw_only=True)
class Choice:
  """The negatives of a token, and what they lose; see `negative`."""

  num_negatives: int | Array
  strength: float | Array
  select: Selection
  candidates_fn: Candidates

  @classmethod
  def checked(cls, num_negatives, strength, select, candidates_fn) -> 'Choice':
    """Makes one of what a caller says, which it checks."""
    dtype = getattr(num_negatives, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
      _validate.at_least(0, num_negatives=num_negatives)
    _validate.non_negative(num_negatives=num_negatives)
    _validate.finite(strength=strength)
    expected = (
      '(weights [N], candidates [N], count) -> [N], such as '
      'modified.lowest_scores or modified.random_choice(key)'
    )
    _validate.check_function('select', select, 3, expected)
    expected = (
      '(position [], positions [N]) -> [N], such as jnp.not_equal. A mask is '
      'lambda position, positions: mask[positions]'
    )
    _validate.check_function('candidates_fn', candidates_fn, 2, expected)
    return cls(
      num_negatives=num_negatives,
      strength=strength,
      select=_pytree.function(select),
      candidates_fn=_pytree.function(candidates_fn),
    )

  def choose(self, weights, position, mask) -> Array:
    """At most `k` of the candidates, and never all visible tokens."""
    size = weights.shape[0]
    candidates = self.candidates_fn(position, jnp.arange(size))
    _check_choice('candidates_fn', candidates, size)

    def select(candidates, count):
      chosen = self.select(weights, candidates, count)
      _check_choice('select', chosen, size)
      return chosen

    count, limit = self.num_negatives, size - 1
    if mask is None and isinstance(count, int):
      return select(candidates, min(count, limit))
    if mask is not None:
      candidates, limit = candidates & mask, jnp.sum(mask) - 1
    if not isinstance(count, int):
      limit = jnp.asarray(limit)
      count = jnp.minimum(jnp.asarray(count, limit.dtype), limit)
      return select(candidates, count)
    # The number of visible tokens is not known while tracing: one at a time.
    chosen = jnp.zeros_like(candidates)
    for index in range(min(count, size - 1)):
      one = select(candidates & ~chosen, 1)
      chosen = chosen | (one & (index < limit))
    return chosen


def _check_choice(name: str, chosen, size: int) -> None:
  _validate.check_result(name, chosen, (size,))
  if chosen.dtype != jnp.bool_:
    raise ValueError(
      f'{name} returned {chosen.dtype} {list(chosen.shape)}; expected '
      'booleans, True for a token that is chosen.'
    )
