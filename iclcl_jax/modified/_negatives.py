"""Attention with negative samples."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.modified._weights import attention_weights, visible_values
from iclcl_jax.types import (
  Array,
  Bool,
  FeatureMap,
  Float,
  Kernel,
  Mask,
  PRNGKeyArray,
)


class Negatives(NamedTuple):
  r"""A change of attention weights, :math:`a' = g \odot a - m`.

  The same numbers make the loss, `losses.negatives(*change)`: the label of
  demonstration `i` becomes :math:`g_i v_i - \sum_j m_j v_j`.

  Attributes:
    mixing: `m`, what is taken from each token. Shape `[N]`.
    gains: `g`. Shape `[N]`.
  """

  mixing: Float[Array, ' N']
  gains: Float[Array, ' N']


Renormalisation: TypeAlias = Callable[
  [Array, Array, Array, float | Array], Negatives
]
Selection: TypeAlias = Callable[[Array, Array, int], Array]


def lowest_scores(
  weights: Float[Array, ' N'], candidates: Bool[Array, ' N'], count: int
) -> Bool[Array, ' N']:
  """Chooses the candidates of lowest weight; ties by lower index."""
  return _smallest(weights, candidates, count)


def highest_scores(
  weights: Float[Array, ' N'], candidates: Bool[Array, ' N'], count: int
) -> Bool[Array, ' N']:
  """Chooses the candidates of highest weight, as a control."""
  return _smallest(-weights, candidates, count)


def random_choice(key: PRNGKeyArray) -> Selection:
  """Makes a selection that chooses candidates at random, as a control."""
  _validate.check_key('key', key)

  def select(weights, candidates, count):
    noise = jax.random.uniform(key, weights.shape, weights.dtype)
    return _smallest(noise, candidates, count)

  return select


def _smallest(criterion, candidates, count):
  """The `count` candidates of least criterion; ties by lower index.

  In two levels, the least row minimum and then the least of that row: all
  entries are read once, by `min`. On CPU that is an order of magnitude faster
  than `argmin` over all of them, once for each choice.
  """
  # Selection is discrete: no gradient passes through it.
  criterion = jax.lax.stop_gradient(criterion)
  criterion = jnp.where(candidates, criterion, jnp.inf)
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
  return chosen.at[jnp.array(found, int)].set(True) & candidates


def unnormalised(weights, negatives, visible, strength) -> Negatives:
  """Takes `strength / k` from each negative; weights then sum to 1 - beta."""
  del visible
  return Negatives(
    _share(strength, negatives, weights.dtype), jnp.ones_like(weights)
  )


def raise_others(weights, negatives, visible, strength) -> Negatives:
  """Gives what the negatives lose to all others in equal parts."""
  dtype = weights.dtype
  num_others = jnp.sum(visible) - jnp.sum(negatives)
  gain = jnp.asarray(strength, dtype) / jnp.maximum(num_others, 1).astype(dtype)
  others = jnp.where(visible, -gain, 0)
  mixing = jnp.where(negatives, _share(strength, negatives, dtype), others)
  return Negatives(mixing, jnp.ones_like(weights))


def scale_others(weights, negatives, visible, strength) -> Negatives:
  """Gives what the negatives lose to all others in proportion."""
  rest = 1 - jnp.sum(jnp.where(negatives, weights, 0))
  # No one else is visible: there is nobody to give to.
  gain = jnp.where(rest > 0, rest + strength, 1) / jnp.where(rest > 0, rest, 1)
  gains = jnp.where(visible & ~negatives, gain, 1)
  return Negatives(
    _share(strength, negatives, weights.dtype), gains.astype(weights.dtype)
  )


def divide_all(weights, negatives, visible, strength) -> Negatives:
  """Divides all weights by what is left, `1 - beta`; needs beta != 1."""
  del visible
  gains = jnp.full_like(weights, 1 / (1 - strength))
  return Negatives(_share(strength, negatives, weights.dtype) * gains, gains)


def _share(total, chosen, dtype):
  """Divides a total in equal parts among the chosen."""
  count = jnp.maximum(jnp.sum(chosen), 1).astype(dtype)
  return jnp.where(chosen, jnp.asarray(total, dtype) / count, 0)


def check_negatives(num_negatives, strength, select, renormalise) -> None:
  """Checks what all doors of negative samples share."""
  _validate.check_count('num_negatives', num_negatives, minimum=0)
  _validate.check_scalar('strength', strength)
  _validate.check_function(
    'select',
    select,
    3,
    '(weights [N], candidates [N], count) -> [N], such as '
    'modified.lowest_scores or modified.random_choice(key)',
  )
  _validate.check_function(
    'renormalise',
    renormalise,
    4,
    '(weights [N], negatives [N], visible [N], strength) -> Negatives, such as '
    'modified.raise_others',
  )
  is_all = renormalise is divide_all and _validate.is_concrete(strength)
  if is_all and strength == 1:
    raise ValueError(
      'strength is 1, so that no weight is left to divide by; expected another '
      'strength, or another renormalise, such as raise_others.'
    )


def check_choice(name: str, chosen, size: int) -> None:
  """Raises unless a caller's choice of tokens is a boolean for each."""
  _validate.check_result(name, chosen, (size,))
  if chosen.dtype != jnp.bool_:
    raise ValueError(
      f'{name} returned {chosen.dtype} {list(chosen.shape)}; expected '
      'booleans, True for a token that is chosen.'
    )


def choose(select, weights, candidates, visible, count, *, masked: bool):
  """At most `count` negatives, and never all visible tokens."""
  if not masked:
    chosen = select(weights, candidates, count)
    check_choice('select', chosen, candidates.shape[0])
    return chosen
  # The number of visible tokens is not known while tracing: one at a time.
  limit = jnp.sum(visible) - 1
  chosen = jnp.zeros_like(candidates)
  for index in range(count):
    one = select(weights, candidates & ~chosen, 1)
    check_choice('select', one, candidates.shape[0])
    chosen = chosen | (one & (index < limit))
  return chosen


def negatives_of(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  *,
  num_negatives: int,
  strength: float | Array,
  select: Selection = lowest_scores,
  renormalise: Renormalisation = raise_others,
  candidates: Mask | None = None,
  mask: Mask | None = None,
) -> Negatives:
  """Chooses the negatives of one query; see `negative_attention`."""
  check_negatives(num_negatives, strength, select, renormalise)
  if callable(candidates):
    raise ValueError(
      'candidates is a function; expected a mask [N] of the tokens that may be '
      'negatives of this query. Functions of the position are the argument '
      'candidates_fn of stream_negative_attention.'
    )
  if candidates is not None:
    _validate.check_mask(candidates, keys.shape[0], name='candidates')
  weights = attention_weights(phi, query, keys, keys, mask)
  visible = jnp.ones(keys.shape[0], bool) if mask is None else mask
  allowed = visible if candidates is None else visible & candidates
  count = min(num_negatives, keys.shape[0] - 1)
  chosen = choose(
    select, weights, allowed, visible, count, masked=mask is not None
  )
  strength = jnp.asarray(strength, keys.dtype)
  strength = jnp.where(jnp.any(chosen), strength, 0)
  return renormalise(weights, chosen, visible, strength)


def negative_attention(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_negatives: int,
  strength: float | Array,
  select: Selection = lowest_scores,
  renormalise: Renormalisation = raise_others,
  candidates: Mask | None = None,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Attention that pushes away from the tokens that matter least.

  .. math:: h = \sum_i (g_i a_i - m_i)\, v_i

  with `m` and `g` from `renormalise`; weights may become negative. The dual
  model trains with the loss `losses.negatives(*negatives_of(...))`.

  Args:
    phi: feature map or kernel.
    query: the test input. Shape `[d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    num_negatives: how many, `k`. Fewer candidates are no error: all are taken,
      but one visible token always stays out.
    strength: the total `beta` that the negatives lose.
    select: `lowest_scores`, `highest_scores` or `random_choice(key)`.
    renormalise: `unnormalised`, `raise_others`, `scale_others`, `divide_all`.
    candidates: tokens that may be negatives, for example all but the query's
      own. Shape `[N]`; None for all. (`stream_negative_attention` takes a
      function, `candidates_fn`, since each query has a mask of its own.)
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention output. Shape `[d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, `num_negatives < 0`, or
      `select` or `renormalise` is no function of its arguments.

  References:
    Ren & Liu, arXiv:2310.13220, section 4.3; v1 (scores of one query).
  """
  weights = attention_weights(phi, query, keys, values, mask)
  change = negatives_of(
    phi,
    query,
    keys,
    num_negatives=num_negatives,
    strength=strength,
    select=select,
    renormalise=renormalise,
    candidates=candidates,
    mask=mask,
  )
  weights = change.gains * weights - change.mixing
  return visible_values(values, mask).T @ weights


def token_negative_labels(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_negatives: int,
  strength: float | Array,
  select: Selection = lowest_scores,
) -> Float[Array, 'N d_v']:
  r"""Labels of the printed formula: every token has negatives of its own.

  .. math:: u_i = v_i - \frac{\beta}{k} \sum_{j\in N(i)} v_j,

  `N(i)` the `k` other tokens that token `i` itself attends to least. Attention
  with these labels is `A (I - M) V`; rows are chosen one at a time.

  Args:
    phi: feature map or kernel.
    queries: the query of every token. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    num_negatives: how many, `k`. Fewer others are no error: all are
      taken.
    strength: the total `beta` that the negatives lose.
    select: `lowest_scores`, `highest_scores` or `random_choice(key)`.

  Returns:
    The labels. Shape `[N, d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or `num_negatives < 0`.

  References:
    Ren & Liu, arXiv:2310.13220v2, section 4.3.
  """
  _validate.check_tokens(keys, values, queries=queries)
  size = keys.shape[0]
  _validate.check_same('N', 'queries', queries.shape[0], 'keys', size)
  check_negatives(num_negatives, strength, select, raise_others)

  def label(row):
    query, value, index = row
    weights = attention_weights(phi, query, keys, values, None)
    others = jnp.arange(size) != index
    chosen = select(weights, others, min(num_negatives, size - 1))
    check_choice('select', chosen, size)
    return value - values.T @ _share(strength, chosen, values.dtype)

  return jax.lax.map(label, (queries, values, jnp.arange(size)))
