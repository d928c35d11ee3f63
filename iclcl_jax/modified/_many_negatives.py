"""Negative samples of a whole sequence, in blocks of queries.

Selection reads every score of a row, so the time is quadratic in `N` with a
feature map too. Scores of one block of queries are held, `[chunk_size, N]`, and
the features of all keys, `[N, R]`; never `[N, N]`.
"""

import operator
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from iclcl_jax import _validate, moments
from iclcl_jax.modified import _rows
from iclcl_jax.modified._negatives import (
  Renormalisation,
  Selection,
  check_choice,
  check_negatives,
  lowest_scores,
  raise_others,
)
from iclcl_jax.modified._negatives import choose as choose_negatives
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask

Candidates: TypeAlias = Callable[[Array, Array], Array]


def stream_negative_attention(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_negatives: int,
  strength: float | Array,
  select: Selection = lowest_scores,
  renormalise: Renormalisation = raise_others,
  candidates_fn: Candidates = operator.ne,
  chunk_size: int = 128,
  mask: Mask | None = None,
) -> Float[Array, 'N d_v']:
  r"""`negative_attention` of all tokens: every query has its own negatives.

  .. math:: h_j = \sum_i (g_{ji} a_{ji} - m_{ji})\, v_i

  Args:
    phi: feature map or kernel.
    queries: the query of every token. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    num_negatives: how many, `k`. Fewer candidates are no error: all are taken,
      but one visible token always stays out.
    strength: the total `beta` that the negatives lose.
    select: `lowest_scores`, `highest_scores` or `random_choice(key)`, which
      ranks the tokens alike for every query.
    renormalise: `unnormalised`, `raise_others`, `scale_others`, `divide_all`.
    candidates_fn: `(position [], positions [N]) -> [N]`, which tokens may be
      negatives of the token at `position`; by default all others.
    chunk_size: queries whose scores are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no token,
      `num_negatives < 0`, `strength` is not finite, `chunk_size < 1`, or a
      function does not take its arguments.

  Example:
    >>> from iclcl_jax import kernels
    >>> x = jnp.zeros((3, 4))
    >>> values = jnp.array([[0.0], [3.0], [6.0]])
    >>> stream_negative_attention(kernels.ExponentialKernel(), x, x, values,
    ...     num_negatives=2, strength=1.0).round(4).tolist()
    [[-1.5], [3.0], [7.5]]

  References:
    Ren & Liu, arXiv:2310.13220, section 4.3; v1 (scores of one query).
  """
  queries, keys, values = _rows.check_rows(
    queries, keys, values, chunk_size, mask
  )
  check_negatives(num_negatives, strength, select, renormalise)
  _check_candidates_fn(candidates_fn)
  choose = _chooser(keys.shape[0], num_negatives, mask)
  weigh = _rows.weights_fn(phi, keys, mask)
  values = _rows.visible_rows(values, mask)
  visible = jnp.ones(keys.shape[0], bool) if mask is None else mask
  strength = jnp.asarray(strength, values.dtype)

  def answer(row):
    query, position = row
    weights = weigh(query)
    chosen = choose(select, candidates_fn, visible, weights, position)
    total = jnp.where(jnp.any(chosen), strength, 0)
    change = renormalise(weights, chosen, visible, total)
    return (change.gains * weights - change.mixing) @ values

  rows = queries, jnp.arange(keys.shape[0])
  return moments.map_chunks(answer, rows, chunk_size)


def stream_token_negative_attention(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_negatives: int,
  strength: float | Array,
  select: Selection = lowest_scores,
  candidates_fn: Candidates = operator.ne,
  chunk_size: int = 128,
  mask: Mask | None = None,
) -> Float[Array, 'N d_v']:
  r"""The printed formula: every token has negatives, shared by all queries.

  .. math:: H = A (I - M) V, \quad M_{ij} = \beta/|N(i)| \text{ for } j \in N(i)

  Labels :math:`u_i = v_i - \sum_j M_{ij} v_j` in blocks of queries, then plain
  attention with these labels: linear in `N` again with a feature map.

  Args:
    phi: feature map or kernel.
    queries: the query of every token. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    num_negatives: how many, `k`. Fewer candidates are no error: all are taken,
      but one visible token always stays out.
    strength: the total `beta` that the negatives lose.
    select: as in `stream_negative_attention`.
    candidates_fn: as in `stream_negative_attention`.
    chunk_size: queries whose scores are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d_v]`.

  Raises:
    ValueError: as `stream_negative_attention`.

  Example:
    >>> from iclcl_jax import kernels
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> stream_token_negative_attention(kernels.ExponentialKernel(), x, x,
    ...     values, num_negatives=1, strength=0.5).tolist()
    [[1.0], [1.0]]

  References:
    Ren & Liu, arXiv:2310.13220v2, section 4.3.
  """
  queries, keys, values = _rows.check_rows(
    queries, keys, values, chunk_size, mask
  )
  check_negatives(num_negatives, strength, select, raise_others)
  _check_candidates_fn(candidates_fn)
  choose = _chooser(keys.shape[0], num_negatives, mask)
  score = _rows.score_fn(phi, keys, mask)
  values = _rows.visible_rows(values, mask)
  visible = jnp.ones(keys.shape[0], bool) if mask is None else mask
  strength = jnp.asarray(strength, values.dtype)

  def label(row):
    query, position = row
    # Scores rank the tokens as weights do.
    chosen = choose(select, candidates_fn, visible, score(query), position)
    count = jnp.maximum(jnp.sum(chosen), 1).astype(values.dtype)
    share = jnp.where(chosen, strength / count, 0)
    return values[position] - share @ values

  rows = queries, jnp.arange(keys.shape[0])
  labels = moments.map_chunks(label, rows, chunk_size)
  return _rows.attend(
    phi, queries, keys, labels, chunk_size=chunk_size, mask=mask
  )


def _check_candidates_fn(candidates_fn) -> None:
  _validate.check_function(
    'candidates_fn',
    candidates_fn,
    2,
    '(position [], positions [N]) -> [N], such as jnp.not_equal. One mask for '
    'one query is the argument candidates of negative_attention',
  )


def _chooser(size, num_negatives, mask):
  """Returns the choice of one token's negatives."""
  positions = jnp.arange(size)
  count = min(num_negatives, size - 1)

  def choose_for(select, candidates_fn, visible, weights, position):
    candidates = candidates_fn(position, positions)
    check_choice('candidates_fn', candidates, size)
    allowed = visible & candidates
    return choose_negatives(
      select, weights, allowed, visible, count, masked=mask is not None
    )

  return choose_for
