"""Regularised and augmented attention of a whole sequence: a layer's view."""

from collections.abc import Callable

import jax.numpy as jnp

from iclcl_jax import _validate, attention, coefficients, moments
from iclcl_jax.modified import _augmented, _rows
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask


def stream_regularised_attention(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  strength: float | Array,
  learning_rate: float | Array = 1.0,
  chunk_size: int = 1024,
  mask: Mask | None = None,
) -> Float[Array, 'N d_v']:
  r"""`regularised_attention` of all tokens, each its own query side.

  .. math:: H = (A - \eta\alpha\,\mathrm{diag}(A))\,V

  With a feature map the time is linear in `N`: numerator, normaliser and own
  score of a row come from one reading of the moments. With a kernel the scores
  of one block of queries are held, `[chunk_size, N]`.

  Args:
    phi: feature map or kernel.
    queries: the query of every token. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    strength: the coefficient `alpha`, of either sign.
    learning_rate: the step size `eta` of the ridge.
    chunk_size: rows whose features or scores are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no token, a number
      is not finite, or `chunk_size < 1`.

  Example:
    >>> from iclcl_jax import kernels
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = kernels.ExponentialKernel()
    >>> stream_regularised_attention(phi, x, x, values, strength=1.0).tolist()
    [[1.5], [0.5]]

  References:
    Ren & Liu, arXiv:2310.13220, section 4.1, derived strictly.
  """
  queries, keys, values = _rows.check_rows(
    queries, keys, values, chunk_size, mask
  )
  decay = _decay(strength, learning_rate, values)
  keys, values = (_rows.visible_rows(x, mask) for x in (keys, values))
  read = _reader(phi, keys, values, chunk_size, mask)
  seen = None if mask is None else jnp.any(mask)

  def answer(row):
    numerator, denominator, own = read(*row)
    numerator = numerator - decay * own * values[row[1]]
    return _rows.divide(numerator, denominator, seen)

  rows = queries, jnp.arange(keys.shape[0])
  return moments.map_chunks(answer, rows, chunk_size)


def causal_regularised_attention(
  phi: FeatureMap,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  strength: float | Array,
  learning_rate: float | Array = 1.0,
  chunk_size: int = 64,
  mask: Mask | None = None,
) -> Float[Array, 'N d_v']:
  r"""`stream_regularised_attention` with causal `A`, in time linear in `N`.

  Args:
    phi: feature map.
    queries: the query of every token. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    strength: the coefficient `alpha`, of either sign.
    learning_rate: the step size `eta` of the ridge.
    chunk_size: rows whose features are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d_v]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no token, `phi` is
      no feature map, a number is not finite, or `chunk_size < 1`.

  Example:
    >>> from iclcl_jax import features
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = features.EluPlusOneFeatures()
    >>> causal_regularised_attention(phi, x, x, values, strength=1.0).tolist()
    [[0.0], [0.5]]

  References:
    Ren & Liu, arXiv:2310.13220, section 4.1, derived strictly; Katharopoulos
    et al., arXiv:2006.16236, eq. 9 (carried moments).
  """
  _validate.check_feature_map(phi)
  queries, keys, values = _rows.check_rows(
    queries, keys, values, chunk_size, mask
  )
  decay = _decay(strength, learning_rate, values)
  keys, values = (_rows.visible_rows(x, mask) for x in (keys, values))
  sums = moments.causal_sums(phi, queries, keys, values, chunk_size, mask)
  numerator = sums[:, :-2] - decay * sums[:, -1:] * values
  seen = None if mask is None else jnp.cumsum(mask)[:, None] > 0
  return _rows.divide(numerator, sums[:, -2:-1], seen)


def stream_regularised_attention_as_printed(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  strength: float | Array,
  chunk_size: int = 1024,
  mask: Mask | None = None,
) -> Float[Array, 'N d_v']:
  r"""The printed form of the regularised layer, `(A - alpha I) V`.

  A masked token has value zero, so its row is that of plain attention.

  Args:
    phi: feature map or kernel.
    queries: the query of every token. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    strength: the coefficient `alpha`, of either sign.
    chunk_size: rows whose features or scores are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d_v]`.

  Raises:
    ValueError: as `stream_regularised_attention`.

  Example:
    >>> from iclcl_jax import features
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> stream_regularised_attention_as_printed(
    ...     features.EluPlusOneFeatures(), x, x, values, strength=1.0).tolist()
    [[1.0], [-1.0]]

  References:
    Ren & Liu, arXiv:2310.13220v2, section 4.1, as printed.
  """
  queries, keys, values = _rows.check_rows(
    queries, keys, values, chunk_size, mask
  )
  decay = _decay(strength, 1.0, values)
  output = _rows.attend(
    phi, queries, keys, values, chunk_size=chunk_size, mask=mask
  )
  return output - decay * _rows.visible_rows(values, mask)


def causal_regularised_attention_as_printed(
  phi: FeatureMap,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  strength: float | Array,
  chunk_size: int = 64,
  mask: Mask | None = None,
) -> Float[Array, 'N d_v']:
  r"""`stream_regularised_attention_as_printed` with causal `A`.

  Args:
    phi: feature map.
    queries: the query of every token. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    strength: the coefficient `alpha`, of either sign.
    chunk_size: rows whose features are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d_v]`.

  Raises:
    ValueError: as `causal_regularised_attention`.

  References:
    Ren & Liu, arXiv:2310.13220v2, section 4.1, as printed.
  """
  queries, keys, values = _rows.check_rows(
    queries, keys, values, chunk_size, mask
  )
  decay = _decay(strength, 1.0, values)
  output = attention.causal_kernel_attention(
    phi, queries, keys, values, chunk_size=chunk_size, mask=mask
  )
  return output - decay * _rows.visible_rows(values, mask)


def stream_augmented_attention(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  augment_keys: Callable[[Array], Array] = lambda key: key,
  augment_values: Callable[[Array], Array] = lambda value: value,
  chunk_size: int = 1024,
  mask: Mask | None = None,
) -> Float[Array, 'M _']:
  r"""`augmented_attention` of many queries.

  .. math:: H = A(Q, g_2(K))\,g_1(V)

  Args:
    phi: feature map or kernel.
    queries: the test inputs, not augmented. Shape `[M, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    augment_keys: `g_2`, a function of one key `[d_k]`.
    augment_values: `g_1`, a function of one value `[d_v]`.
    chunk_size: rows whose features or scores are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[M, d]`, `d` that of `augment_values`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no token, or
      `chunk_size < 1`.

  Example:
    >>> from iclcl_jax import features
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> stream_augmented_attention(features.EluPlusOneFeatures(), x, x, values,
    ...     augment_values=jnp.square).tolist()
    [[5.0], [5.0]]

  References:
    Ren & Liu, arXiv:2310.13220, section 4.2.
  """
  keys, values = _augment(
    queries, keys, values, augment_keys, augment_values, mask
  )
  return _rows.attend(
    phi, queries, keys, values, chunk_size=chunk_size, mask=mask
  )


def causal_augmented_attention(
  phi: FeatureMap,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  augment_keys: Callable[[Array], Array] = lambda key: key,
  augment_values: Callable[[Array], Array] = lambda value: value,
  chunk_size: int = 64,
  mask: Mask | None = None,
) -> Float[Array, 'N _']:
  r"""`stream_augmented_attention` in which token `t` sees the keys `0..t`.

  Args:
    phi: feature map.
    queries: the test inputs, not augmented. Shape `[N, d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    augment_keys: `g_2`, a function of one key `[d_k]`.
    augment_values: `g_1`, a function of one value `[d_v]`.
    chunk_size: rows whose features are held at a time.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention outputs. Shape `[N, d]`, `d` that of `augment_values`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no token, `phi` is
      no feature map, or `chunk_size < 1`.

  References:
    Ren & Liu, arXiv:2310.13220, section 4.2.
  """
  keys, values = _augment(
    queries, keys, values, augment_keys, augment_values, mask
  )
  return attention.causal_kernel_attention(
    phi, queries, keys, values, chunk_size=chunk_size, mask=mask
  )


def _decay(strength, learning_rate, values):
  _validate.check_scalar('strength', strength)
  _validate.check_scalar('learning_rate', learning_rate, minimum=0)
  return jnp.asarray(learning_rate * strength, values.dtype)


def _augment(queries, keys, values, augment_keys, augment_values, mask):
  """Both views; a masked row is zero before and after `g`."""
  _validate.check_tokens(keys, values, mask, queries=queries)
  keys, values = (_rows.visible_rows(x, mask) for x in (keys, values))
  return _augmented.views(keys, values, augment_keys, augment_values)


def _reader(phi, keys, values, chunk_size, mask):
  """Returns `(query, position) -> (numerator, normaliser, own score)`."""
  if not _validate.is_feature_map(phi):

    def read_scores(query, position):
      scores, _ = coefficients.scores(phi, query, keys, mask)
      return values.T @ scores, jnp.sum(scores), scores[position]

    return read_scores

  state = moments.absorb_stream(
    phi, moments.empty(phi, keys, values), keys, values, chunk_size, mask
  )

  def read(query, position):
    reading = moments.read(phi, state, query)
    own = _rows.own_score(
      phi,
      query,
      keys[position],
      reading.log_scale,
      None if mask is None else mask[position],
    )
    return reading.numerator, reading.denominator, own

  return read
