"""Which tokens are negatives of a token: one choice for all doors."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from iclcl_jax import _pytree, _validate
from iclcl_jax.modified._selection import Selection
from iclcl_jax.types import Array

Candidates: TypeAlias = Callable[[Array, Array], Array]


@_pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
  """Which tokens are negatives of a token, and what they lose.

  Attributes:
    num_negatives: how many, `k`; traced in a sweep.
    strength: the total `beta` that they lose.
    select: a `Selection`.
    candidates_fn: `(position [], positions [N]) -> [N]`.
  """

  num_negatives: int | Array
  strength: float | Array
  select: Selection
  candidates_fn: Candidates

  def choose(self, weights, position, mask) -> Array:
    """At most `k` of the candidates, and never all visible tokens."""
    size = weights.shape[0]
    candidates = self.candidates_fn(position, jnp.arange(size))
    _check_choice('candidates_fn', candidates, size)

    def select(candidates, count):
      chosen = self.select(weights, candidates, count)
      _check_choice('select', chosen, size)
      return chosen

    count = self.num_negatives
    if mask is None:
      is_static = isinstance(count, int)
      count = (
        min(count, size - 1) if is_static else jnp.minimum(count, size - 1)
      )
      return select(candidates, count)
    candidates, limit = candidates & mask, jnp.sum(mask) - 1
    if not isinstance(count, int):
      return select(
        candidates, jnp.minimum(jnp.asarray(count, limit.dtype), limit)
      )
    # The number of visible tokens is not known while tracing: one at a time.
    chosen = jnp.zeros_like(candidates)
    for index in range(min(count, size - 1)):
      one = select(candidates & ~chosen, 1)
      chosen = chosen | (one & (index < limit))
    return chosen


def make_choice(num_negatives, strength, select, candidates_fn) -> Choice:
  dtype = getattr(num_negatives, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    _validate.at_least(0, num_negatives=num_negatives)
  _validate.non_negative(num_negatives=num_negatives)
  _validate.finite(strength=strength)
  _validate.check_function(
    'select',
    select,
    3,
    '(weights [N], candidates [N], count) -> [N], such as '
    'modified.lowest_scores or modified.random_choice(key)',
  )
  _validate.check_function(
    'candidates_fn',
    candidates_fn,
    2,
    '(position [], positions [N]) -> [N], such as jnp.not_equal. A mask is '
    'lambda position, positions: mask[positions]',
  )
  return Choice(
    num_negatives=num_negatives,
    strength=strength,
    select=_pytree.function(select),
    candidates_fn=_pytree.function(candidates_fn),
  )


def _check_choice(name: str, chosen, size: int) -> None:
  """Raises unless a caller's choice of tokens is a boolean for each."""
  _validate.check_result(name, chosen, (size,))
  if chosen.dtype != jnp.bool_:
    raise ValueError(
      f'{name} returned {chosen.dtype} {list(chosen.shape)}; expected '
      'booleans, True for a token that is chosen.'
    )
