"""Attention with negative samples.

Selection reads every score of a row, so the time of all doors that choose is
quadratic in `N`, with a feature map too.
"""

import operator

import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, attention, moments
from iclcl_jax._door import door
from iclcl_jax.modified import _selection
from iclcl_jax.modified._attention import Attention, check_own
from iclcl_jax.modified._selection import Candidates, Choice, Renormalisation
from iclcl_jax.precision import cast_like, widen
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask, Selection


@_pytree.dataclass(kw_only=True)
class Negative(Attention):
  """Attention that pushes each query away from others, see `negative`.

  With a feature map `stream` holds `[chunk_size, N]` scores and `[N, R]`
  features; `causal`, whose scores are relative to what each token sees,
  `[chunk_size, N, R]`.
  """

  choice: Choice
  renormalise: Renormalisation

  @door
  def change(
    self,
    phi: FeatureMap | Kernel,
    query: Float[Array, ' d_k'],
    keys: Float[Array, 'N d_k'],
    *,
    num_query_tokens: int = 0,
    mask: Mask | None = None,
  ) -> Float[Array, ' N']:
    """Returns what one query's weights lose; arguments as in the call."""
    size = keys.shape[0]
    _validate.check_num_query_tokens(
      num_query_tokens, size, num_demonstrations=0
    )
    weights = attention.weights(phi, *widen((query, keys)), mask=mask)
    change = self._change(weights, _own(keys, num_query_tokens), mask)
    return cast_like(change, keys)

  def _change(self, weights, position, mask) -> Array:
    visible = jnp.ones(weights.shape, bool) if mask is None else mask
    chosen = self.choice.choose(weights, position, mask)
    strength = jnp.asarray(self.choice.strength, weights.dtype)
    strength = jnp.where(jnp.any(chosen), strength, 0)
    change = self.renormalise(weights, chosen, visible, strength)
    _validate.check_result('renormalise', change, weights.shape)
    return change

  def _mix(self, weights, position, mask, values) -> Array:
    return (weights - self._change(weights, position, mask)) @ values

  def _one(self, phi, query, keys, values, num_query_tokens, mask):
    weights = attention.weights(phi, *widen((query, keys)), mask=mask)
    return self._mix(weights, _own(keys, num_query_tokens), mask, values)

  def _many(self, phi, queries, keys, values, chunk_size, mask):
    look = _looking_at_all(phi, keys, mask)
    return self._rows(look, queries, values, chunk_size)

  def _causal(self, phi, queries, keys, values, chunk_size, mask):
    look = _looking_back(phi, keys, mask)
    return self._rows(look, queries, values, chunk_size)

  def _rows(self, look, queries, values, chunk_size):
    check_own(queries, values)

    def answer(row):
      scores, visible = look(*row)
      weights = attention.divide(scores, jnp.sum(scores), visible)
      return self._mix(weights, row[1], visible, values)

    rows = queries, jnp.arange(values.shape[0])
    return moments.map_chunks(answer, rows, chunk_size)


def negative(
  *,
  num_negatives: int | Array,
  strength: float | Array,
  select: Selection = _selection.lowest_scores,
  renormalise: Renormalisation = _selection.raise_others,
  candidates_fn: Candidates = operator.ne,
) -> Negative:
  r"""Makes attention that pushes away from the tokens that matter least.

  .. math:: h_j = \sum_i (a_{ji} - m_{ji})\, v_i

  with `m` from `renormalise`; weights may become negative. The dual model of
  one query trains with `losses.negatives(attend.change(...))`.

  One query is at the position of the last row if it has query-side tokens, and
  else (the default) of none: then all rows may be its negatives.

  Args:
    num_negatives: how many, `k`. Fewer candidates are no error: all are taken,
      but one visible token always stays out. A traced number sweeps: then
      tokens are sorted.
    strength: the total `beta` that the negatives lose.
    select: `lowest_scores`, `highest_scores` or `random_choice(key)`, which
      ranks the tokens alike for every query.
    renormalise: `unnormalised`, `raise_others` or `scale_others`.
    candidates_fn: `(position [], positions [N]) -> [N]`, which tokens may be
      negatives of the token at `position`; by default all others.

  Example:
    >>> x, values = jnp.zeros((3, 4)), jnp.array([[0.0], [3.0], [6.0]])
    >>> attend = negative(num_negatives=2, strength=1.0)
    >>> found = attend.stream(kernels.ExponentialKernel(), x, x, values)
    >>> found.round(4).tolist()
    [[-1.5], [3.0], [7.5]]
  """
  choice = Choice.checked(num_negatives, strength, select, candidates_fn)
  expected = (
    '(weights [N], negatives [N], visible [N], strength) -> [N], such as '
    'modified.raise_others'
  )
  _validate.check_function('renormalise', renormalise, 4, expected)
  return Negative(choice=choice, renormalise=_pytree.function(renormalise))


@_pytree.dataclass(kw_only=True)
class TokenNegative(Attention):
  r"""Attention whose tokens push each other away, see `token_negative`.

  `stream` and `causal` are plain attention to the labels :math:`(I - M) V`. The
  call is an error: one query does not bring those of the other tokens.
  """

  choice: Choice

  def _labels(self, look, queries, values, chunk_size):
    check_own(queries, values)

    def label(row):
      # Scores rank the tokens as weights do.
      scores, visible = look(*row)
      chosen = self.choice.choose(scores, row[1], visible)
      lost = _selection.share(self.choice.strength, chosen, values.dtype)
      return values[row[1]] - lost @ values

    rows = queries, jnp.arange(values.shape[0])
    return moments.map_chunks(label, rows, chunk_size)

  def _one(self, phi, query, keys, values, num_query_tokens, mask):
    raise ValueError(
      'query is one; expected the query of every token, by which each chooses '
      'its negatives. Call stream, or causal.'
    )

  def _many(self, phi, queries, keys, values, chunk_size, mask):
    look = _looking_at_all(phi, keys, mask)
    labels = self._labels(look, queries, values, chunk_size)
    return attention.stream_kernel_attention(
      phi, queries, keys, labels, chunk_size=chunk_size, mask=mask
    )

  def _causal(self, phi, queries, keys, values, chunk_size, mask):
    look = _looking_back(phi, keys, mask)
    labels = self._labels(look, queries, values, chunk_size)
    return attention.causal_kernel_attention(
      phi, queries, keys, labels, chunk_size=chunk_size, mask=mask
    )


def token_negative(
  *,
  num_negatives: int | Array,
  strength: float | Array,
  select: Selection = _selection.lowest_scores,
  candidates_fn: Candidates = operator.ne,
) -> TokenNegative:
  r"""Makes the printed formula: every token has negatives of its own.

  .. math:: H = A (I - M) V, \quad M_{ij} = \beta/|N(i)| \text{ for } j\in N(i),

  `N(i)` the `k` other tokens that token `i` itself attends to least; in
  `causal`, among those before it. Arguments are those of `negative`. The
  attention has doors for many queries alone.

  Example:
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> attend = token_negative(num_negatives=1, strength=0.5)
    >>> attend.stream(kernels.ExponentialKernel(), x, x, values).tolist()
    [[1.0], [1.0]]
  """
  choice = Choice.checked(num_negatives, strength, select, candidates_fn)
  return TokenNegative(choice=choice)


def _own(keys, num_query_tokens: int) -> Array:
  """The query's position: the last row if it has one, else behind all."""
  size = keys.shape[0]
  return jnp.asarray(size - 1 if num_query_tokens else size)


def _looking_at_all(phi, keys, mask):
  """Returns `(query, position) -> (scores [N], mask)`, up to a common scale."""
  # Features are held: under `vmap` scores are one product of matrices.
  if not _validate.is_feature_map(phi):
    return lambda query, _: (attention.scores(phi, query, keys, mask)[0], mask)
  key_scale, key_features = moments.scaled_rows(phi, keys, mask)
  feature_scale = moments.largest(key_scale, axis=0)
  key_features = jnp.exp(key_scale - feature_scale[None]) * key_features
  key_features = moments.visible(key_features, mask)

  def look(query, _):
    query_scale, query_features = moments.scaled_query(phi, query)
    exponent = query_scale + feature_scale
    log_scale = moments.largest(exponent)
    query_features = jnp.exp(exponent - log_scale) * query_features
    return key_features @ query_features, mask

  return look


def _looking_back(phi, keys, mask):
  """Returns the same function, of the tokens up to a position."""
  positions = jnp.arange(keys.shape[0])

  def look(query, position):
    visible = positions <= position
    visible = visible if mask is None else visible & mask
    return attention.scores(phi, query, keys, visible)[0], visible

  return look
