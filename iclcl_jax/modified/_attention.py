"""What every modified attention is: an object with three doors."""

from typing import ClassVar

import jax.numpy as jnp

from iclcl_jax import _validate, attention, moments
from iclcl_jax._door import door
from iclcl_jax.precision import cast_like, widen
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask


class Attention:
  """An attention: one query, many queries, or every token after the last.

  Queries, keys and values of one place belong to one token where a modification
  asks whose they are; then there is one query for each token, `M = N`.

  ================  ==========================================================
  ``phi``           feature map or kernel
  ``query``         the test input, ``[d_k]``; ``queries [M, d_k]``
  ``keys``          keys of the demonstrations, ``[N, d_k]``
  ``values``        their values, ``[N, d_v]``
  ``mask``          valid rows, ``[N]``; None for all
  ``chunk_size``    rows whose features or scores are held at a time
  ================  ==========================================================

  All doors raise `ValueError` where ranks, sizes or dtypes disagree, there is
  no key, or a count is out of its range. With many queries the time is linear
  in `N + M` for a feature map, unless the class says otherwise; for a kernel it
  is that of all `M N` scores, of which `[chunk_size, N]` are held.

  A new one is a class under `types.dataclass`, frozen and a pytree, that has
  `_learnt` if it changes what each token teaches, or else `_one`, `_many`
  and `_causal`. They are given checked arrays in which masked rows are zero,
  values in float32 at least. Its settings that are numbers are leaves:
  `jax.vmap` over stacked attentions sweeps them.
  """

  # How many rows the query side has unless the call says so.
  _default_query_tokens: ClassVar[int] = 0

  @door
  def __call__(
    self,
    phi: FeatureMap | Kernel,
    query: Float[Array, ' d_k'],
    keys: Float[Array, 'N d_k'],
    values: Float[Array, 'N d_v'],
    *,
    num_query_tokens: int | None = None,
    mask: Mask | None = None,
  ) -> Float[Array, ' d_v']:
    """Answers one query: `[d_v]`.

    The last `num_query_tokens` rows belong to the query side, the query's own
    token last; None for as many as the constructor names.
    """
    count = num_query_tokens
    count = self._default_query_tokens if count is None else count
    size = keys.shape[0]
    _validate.check_num_query_tokens(count, size, num_demonstrations=0)
    rows = visible_rows(mask, keys, values)
    output = self._one(phi, jnp.asarray(query), *rows, count, mask)
    return self._checked('_one', output, values, ())

  @door
  def stream(
    self,
    phi: FeatureMap | Kernel,
    queries: Float[Array, 'M d_k'],
    keys: Float[Array, 'N d_k'],
    values: Float[Array, 'N d_v'],
    *,
    chunk_size: int = 1024,
    mask: Mask | None = None,
  ) -> Float[Array, 'M d_v']:
    """Answers many queries, each as if it were asked alone: `[M, d_v]`."""
    _validate.at_least(1, chunk_size=chunk_size)
    rows = visible_rows(mask, keys, values)
    outputs = self._many(phi, jnp.asarray(queries), *rows, chunk_size, mask)
    return self._checked('_many', outputs, values, queries.shape[:1])

  @door
  def causal(
    self,
    phi: FeatureMap | Kernel,
    queries: Float[Array, 'N d_k'],
    keys: Float[Array, 'N d_k'],
    values: Float[Array, 'N d_v'],
    *,
    chunk_size: int = 64,
    mask: Mask | None = None,
  ) -> Float[Array, 'N d_v']:
    """Answers token `t` with the tokens `0..t`, no future entering: `[N, d_v]`.

    If what a token learns depends on later ones, that is a `ValueError`.
    """
    _validate.at_least(1, chunk_size=chunk_size)
    rows = visible_rows(mask, keys, values)
    outputs = self._causal(phi, jnp.asarray(queries), *rows, chunk_size, mask)
    return self._checked('_causal', outputs, values, queries.shape[:1])

  def _checked(self, method, outputs, values, rows: tuple[int, ...]) -> Array:
    name = f'{type(self).__name__}.{method}'
    width = getattr(outputs, 'shape', ())[-1:] or values.shape[1:]  # Of views.
    _validate.check_result(name, outputs, (*rows, *width))
    return cast_like(outputs, values)

  def _learnt(self, phi, keys, values, chunk_size, mask) -> tuple[Array, Array]:
    """Returns keys and labels to attend to in place of keys and values."""
    raise NotImplementedError(f'{type(self).__name__} defines no _learnt.')

  def _one(self, phi, query, keys, values, num_query_tokens, mask) -> Array:
    """Answers one query. Shape `[d_v]`."""
    del num_query_tokens  # A plain step learns both sides alike.
    keys, labels = self._learnt(phi, keys, values, 1024, mask)
    return attention.kernel_attention(phi, query, keys, labels, mask=mask)

  def _many(self, phi, queries, keys, values, chunk_size, mask) -> Array:
    """Answers many queries. Shape `[M, d_v]`."""
    keys, labels = self._learnt(phi, keys, values, chunk_size, mask)
    return attention.stream_kernel_attention(
      phi, queries, keys, labels, chunk_size=chunk_size, mask=mask
    )

  def _causal(self, phi, queries, keys, values, chunk_size, mask) -> Array:
    """Answers every token: what one teaches depends on no other."""
    keys, labels = self._learnt(phi, keys, values, chunk_size, mask)
    return attention.causal_kernel_attention(
      phi, queries, keys, labels, chunk_size=chunk_size, mask=mask
    )


def visible_rows(
  mask: Mask | None, keys: Array, values: Array
) -> tuple[Array, Array]:
  """Masked rows become zeros, so that a NaN there goes nowhere.

  Values are widened to float32 at least: modifications add them up.
  """
  keys, values = jnp.asarray(keys), widen(jnp.asarray(values))
  return moments.visible(keys, mask), moments.visible(values, mask)


def check_own(queries, keys) -> None:
  _validate.check_same('N', 'queries', queries.shape[0], 'keys', keys.shape[0])
