"""Attention of one head over one sequence: softmax, kernel and linear.

`softmax_attention`, `kernel_attention` and `linear_attention` answer one query
in the order of the formula, score by score. `stream_kernel_attention` and
`causal_kernel_attention` answer many through the moments of the keys, and hold
the features of one chunk at a time.

A query that sees no key (everything masked) gets zeros.
"""

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, moments
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask

_stop = jax.lax.stop_gradient


def softmax_attention(
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Attends to `keys` with the softmax of the scaled scores.

  .. math:: h = \sum_i v_i\, e^{q^\top k_i/\sqrt{d_k}} \big/
     \sum_i e^{q^\top k_i/\sqrt{d_k}}

  Args:
    query: the test input. Shape `[d_k]`.
    keys: training inputs of the dual model. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    mask: valid keys. Shape `[N]`; None for all.

  Returns:
    The attention output. Shape `[d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or there is no key.

  Example:
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> softmax_attention(jnp.ones(4), keys, values).tolist()
    [2.0]

  References:
    Vaswani et al., arXiv:1706.03762, eq. 1.
  """
  _validate.check_tokens(keys, values, mask, query=query)
  if mask is not None:  # A masked NaN would return in the gradient.
    keys = jnp.where(mask[:, None], keys, 0)
    values = jnp.where(mask[:, None], values, 0)
  exponent = keys @ query / query.shape[0] ** 0.5
  if mask is not None:
    exponent = jnp.where(mask, exponent, jnp.finfo(exponent.dtype).min)
  weights = jax.nn.softmax(exponent)
  if mask is not None:
    weights = jnp.where(mask, weights, 0)
  return values.T @ weights


def kernel_attention(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Attends to `keys` with the kernel :math:`\phi(q)^\top\phi(k)`.

  .. math:: h = \sum_i v_i\, \phi(k_i)^\top\phi(q) \big/
     \sum_i \phi(k_i)^\top\phi(q)

  Args:
    phi: feature map of the kernel, or the kernel itself.
    query: the test input. Shape `[d_k]`.
    keys: training inputs of the dual model. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    mask: valid keys. Shape `[N]`; None for all.

  Returns:
    The attention output. Shape `[d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no key, or `phi`
      is neither a feature map nor a kernel.

  Example:
    >>> from iclcl_jax import features
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = features.EluPlusOneFeatures()
    >>> kernel_attention(phi, jnp.ones(4), keys, values).tolist()
    [2.0]

  References:
    Ren & Liu, arXiv:2310.13220, eq. 12.
  """
  _validate.check_tokens(keys, values, mask, query=query)
  weights, _ = scores(phi, query, keys, mask)
  return _divide(*_sums(weights, values, mask), mask)


def linear_attention(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Attends without a normaliser, for maps of either sign.

  .. math:: h = \sum_i v_i\, \phi(k_i)^\top\phi(q)

  Args:
    phi: feature map of the kernel, or the kernel itself.
    query: the test input. Shape `[d_k]`.
    keys: training inputs of the dual model. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    mask: valid keys. Shape `[N]`; None for all.

  Returns:
    The attention output. Shape `[d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no key, or `phi`
      is neither a feature map nor a kernel.

  Example:
    >>> from iclcl_jax import features
    >>> keys, values = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = features.IdentityFeatures()
    >>> linear_attention(phi, jnp.ones(4), keys, values).tolist()
    [16.0]

  References:
    Katharopoulos et al., arXiv:2006.16236, eq. 4, without its denominator.
  """
  _validate.check_tokens(keys, values, mask, query=query)
  weights, log_scale = scores(phi, query, keys, mask)
  numerator, _ = _sums(weights, values, mask)
  return numerator * jnp.exp(log_scale)


def stream_kernel_attention(
  phi: FeatureMap,
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  chunk_size: int = 1024,
  mask: Mask | None = None,
) -> Float[Array, 'M d_v']:
  """Answers many queries in time linear in `N + M`.

  The same function as `kernel_attention` for every query. Keys are absorbed
  into one state, queries read it; nothing of size `[N, R]` or `[M, N]` is
  held, in the backward pass either.

  Args:
    phi: feature map of the kernel.
    queries: the test inputs. Shape `[M, d_k]`.
    keys: training inputs of the dual model. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    chunk_size: rows whose features are held at a time.
    mask: valid keys. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[M, d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no key, `phi` is
      no feature map, or `chunk_size < 1`.

  Example:
    >>> from iclcl_jax import features
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = features.EluPlusOneFeatures()
    >>> stream_kernel_attention(phi, jnp.ones((3, 4)), keys, values).shape
    (3, 1)

  References:
    Choromanski et al., arXiv:2009.14794, eq. 4.
  """
  _validate.check_feature_map(phi)
  _validate.check_tokens(keys, values, mask, queries=queries)
  _validate.check_count('chunk_size', chunk_size)
  state = moments.absorb_stream(
    phi, moments.empty(phi, keys, values), keys, values, chunk_size, mask
  )

  def answer(query):
    reading = moments.read(phi, state, query)
    return _divide(reading.numerator, reading.denominator, mask)

  return moments.map_chunks(answer, queries, chunk_size)


def causal_kernel_attention(
  phi: FeatureMap,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  chunk_size: int = 256,
  mask: Mask | None = None,
) -> Float[Array, 'N d_v']:
  """Lets position `t` attend to the keys `0..t`, in time linear in `N`.

  Across chunks the moments of the past are carried along. Inside a chunk the
  lower triangle is tiled by squares of doubling size: in each, later queries
  read earlier keys relative to the maximum over those keys alone. So nothing
  of the future enters a past output: no value, no gradient, no rounding.

  Args:
    phi: feature map of the kernel.
    queries: the test inputs. Shape `[N, d_k]`.
    keys: training inputs of the dual model. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    chunk_size: rows whose features are held at a time, a power of two.
    mask: valid keys. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no key, `phi` is
      no feature map, or `chunk_size` is no power of two.

  Example:
    >>> from iclcl_jax import features
    >>> x = jnp.zeros((2, 4))
    >>> phi, values = features.EluPlusOneFeatures(), jnp.array([[1.0], [3.0]])
    >>> causal_kernel_attention(phi, x, x, values).tolist()
    [[1.0], [2.0]]

  References:
    Katharopoulos et al., arXiv:2006.16236, eq. 9 (carried moments).
  """
  _validate.check_feature_map(phi)
  _validate.check_tokens(keys, values, mask, queries=queries)
  size = keys.shape[0]
  _validate.check_same('N', 'queries', queries.shape[0], 'keys', size)
  _validate.check_count('chunk_size', chunk_size)
  if chunk_size & (chunk_size - 1):
    raise ValueError(
      f'chunk_size is {chunk_size}; expected a power of two, such as 256.'
    )
  arrays = (queries, keys, values) + (() if mask is None else (mask,))
  padding = -size % chunk_size
  arrays = jax.tree.map(
    lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)), arrays
  )
  chunks, _ = moments.split_chunks(arrays, chunk_size)
  step = jax.checkpoint(lambda state, chunk: _causal_chunk(phi, state, *chunk))
  state = moments.empty(phi, keys, values)
  _, sums = jax.lax.scan(step, state, chunks)
  sums = sums.reshape(size + padding, -1)[:size]
  seen = None if mask is None else jnp.cumsum(mask)[:, None] > 0
  return _divide(sums[:, :-1], sums[:, -1:], seen)


def scores(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  mask: Mask | None = None,
) -> tuple[Float[Array, ' N'], Float[Array, '']]:
  """Returns unnormalised attention scores and their common log-scale.

  Args:
    phi: feature map of the kernel, or the kernel itself.
    query: the test input. Shape `[d_k]`.
    keys: training inputs of the dual model. Shape `[N, d_k]`.
    mask: valid keys. Shape `[N]`; None for all.

  Returns:
    `(scores, log_scale)`: the kernel values are `scores * exp(log_scale)`.
    Shapes `[N]` and `[]`.

  Raises:
    ValueError: if `phi` is neither a feature map nor a kernel.
  """
  form = moments if _validate.is_feature_map(phi) else coefficients
  return form.scores(phi, query, keys, mask)


def _causal_chunk(phi, state, queries, keys, values, mask=None):
  """Returns the state after a chunk, and sums `[C, d_v + 1]` of each row."""
  key_scale, key_features = moments.scaled_rows(phi, keys, mask)
  query_scale, query_features = moments.scaled_rows(phi, queries)
  labels = moments.labels(values, mask)
  past = jnp.broadcast_to(state.log_scale[None], key_features.shape)
  running = jnp.maximum(past, _stop(_running_max(key_scale)))
  shift = moments.largest(query_scale + running, axis=1)[:, None]

  weights = jnp.concatenate([state.weights, state.mass[None]])
  read = jnp.exp(query_scale + state.log_scale[None] - shift) * query_features
  own = jnp.exp(query_scale + key_scale - shift) * query_features
  own = own * key_features
  sums = read @ weights.T + jnp.sum(own, axis=1, keepdims=True) * labels
  size = 1
  while size < keys.shape[0]:
    sums = sums + _square(
      size,
      query_scale,
      shift,
      query_features,
      key_scale,
      key_features,
      labels,
    )
    size *= 2

  log_scale = running[-1]
  features = jnp.exp(key_scale - log_scale[None]) * key_features
  weights = weights * jnp.exp(state.log_scale - log_scale)[None] + (
    labels.T @ features
  )
  return moments.DualState(weights[:-1], weights[-1], log_scale), sums


def _square(
  size, query_scale, shift, query_features, key_scale, key_features, labels
):
  """Second halves of pairs of tiles read the first halves."""

  def halves(array):
    return array.reshape(-1, 2, size, array.shape[1])

  first, second = 0, 1
  key_scale, labels = halves(key_scale)[:, first], halves(labels)[:, first]
  largest = _stop(jnp.max(key_scale, axis=1, keepdims=True))
  keys = jnp.exp(key_scale - largest) * halves(key_features)[:, first]
  exponent = halves(query_scale)[:, second] + largest
  queries = jnp.exp(exponent - halves(shift)[:, second])
  queries = queries * halves(query_features)[:, second]
  sums = (queries @ keys.mT) @ labels
  sums = jnp.stack([jnp.zeros_like(sums), sums], axis=1)
  return sums.reshape(-1, sums.shape[-1])


def _running_max(array: Float[Array, 'C _']) -> Float[Array, 'C _']:
  """Cumulative maximum along axis 0 of a power-of-two length."""
  tiles = array[:, None]
  while tiles.shape[0] > 1:
    first, second = tiles[0::2], tiles[1::2]
    second = jnp.maximum(second, first[:, -1:])
    tiles = jnp.concatenate([first, second], axis=1)
  return tiles[0]


def _sums(weights, values, mask):
  """Returns `sum_i s_i v_i` and `sum_i s_i`."""
  if mask is not None:
    values = jnp.where(mask[:, None], values, 0)
  return values.T @ weights, jnp.sum(weights)


def _divide(numerator, denominator, seen):
  """Divides; where no key is seen (mask all False) the answer is zero."""
  if seen is None:
    return numerator / denominator
  seen = jnp.any(seen) if seen.ndim == 1 else seen
  return jnp.where(seen, numerator, 0) / jnp.where(seen, denominator, 1)
