"""Every attention in the call shape of `jax.nn.dot_product_attention`."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from iclcl_jax import _mesh, _validate, moments, precision
from iclcl_jax._program import compiled
from iclcl_jax.attention._kernel import (
  causal_kernel_attention,
  kernel_attention,
  stream_kernel_attention,
)
from iclcl_jax.types import Array, Bool, FeatureMap, Float, Int, Kernel

# What `jax.nn.dot_product_attention` puts in the place of a masked score.
_MASKED = -0.7 * float(np.finfo(np.float32).max)
_USE_A_KERNEL = (
  'Kernels honour any mask, score by score: features.FeatureKernel(phi) is '
  'that of a positive map.'
)


class _Doors(NamedTuple):
  """How one head is answered: `(queries, keys, values, mask=) -> [T, d_v]`."""

  name: str
  many: Callable[..., Array]
  causal: Callable[..., Array]
  any_mask: Callable[..., Array] | None  # Masks `[T, S]`: exact kernels alone.


@_mesh.in_auto_axes
def dot_product_attention(
  query: Float[Array, '... T N H'],
  key: Float[Array, '... S K H'],
  value: Float[Array, '... S K d_v'],
  bias: Float[Array, '... N T S'] | None = None,
  mask: Bool[Array, '... N T S'] | None = None,
  *,
  attend: FeatureMap | Kernel | Callable[..., Array] | None = None,
  scale: float | Array | None = None,
  is_causal: bool = False,
  query_seq_lengths: Int[Array, ' B'] | None = None,
  key_value_seq_lengths: Int[Array, ' B'] | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  chunk_size: int | None = None,
) -> Float[Array, '... T N d_v']:
  r"""Attends by any attention, in the layout of `jax.nn`: `[B, T, N, H]`.

  Without `attend` it is the exact softmax and answers as
  `jax.nn.dot_product_attention` does, a query that sees no key included (the
  mean of all values); float64 stays float64, which it does not there. With
  `attend` a query that sees no key gets zeros, and an argument that it cannot
  honour (a bias, a window, a mask of another kind) is a `ValueError`, as are
  shapes or dtypes that disagree. NaN beyond a length, or in a key that a mask
  shared by the heads hides from every query, goes nowhere.

  Args:
    query: `[..., T, N, H]`, of `N` heads, with any batch axes or none.
    key: `[..., S, K, H]`, of `K` heads, each for `N / K` heads of queries.
    value: their values. Shape `[..., S, K, d_v]`.
    bias: of the scores `[..., N, T, S]`, or broadcast; exact softmax alone.
    mask: True where a query sees a key. Broadcastable to `[..., N, T, S]`. A
      kernel reads any. Sums over keys, of a feature map or of an attention
      from a loss, read key padding `[..., 1, 1, S]`, and masks over `[T, S]`
      that are causal or none, times valid queries and keys. Under `jit` such a
      mask needs `is_causal=True`; one that is something else then gives NaN.
    attend: a feature map or kernel; `functools.partial(attention, phi)` for an
      attention from a loss or a modification; None for the exact softmax.
    scale: factor of the scores `q . k`; None for `1 / sqrt(H)`. With `attend`
      queries and keys are both multiplied by the root of
      `scale * sqrt(H) > 0`: a kernel of the score sees the score that is meant,
      another one (`EluPlusOneFeatures`) sees longer or shorter vectors.
    is_causal: whether query `t` sees the keys `0..t` alone.
    query_seq_lengths: queries beyond get zeros. Shape `[...]` as the batch.
    key_value_seq_lengths: keys beyond are seen by none. Shape `[...]`.
    local_window_size: how many keys to the left and right a query sees; exact
      softmax and kernels alone.
    chunk_size: rows whose features or scores are held at a time, in each head;
      None for what the doors of `attend` have. The exact softmax holds all.

  Example:
    >>> x = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> dot_product_attention(x, x[:, :, :2], x[:, :, :2]).shape
    (2, 6, 4, 8)
    >>> phi = features.EluPlusOneFeatures()
    >>> attend = modified.attention_from_loss(losses.squared)
    >>> for way in (phi, functools.partial(attend, phi)):
    ...   dot_product_attention(x, x, x, attend=way, is_causal=True).shape
    (2, 6, 4, 8)
    (2, 6, 4, 8)
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  check_layout(query, key, value)
  batch, size = query.shape[:-3], math.prod(query.shape[:-3])
  scores = *batch, query.shape[-2], query.shape[-3], key.shape[-3]
  query, key, value = (
    x.reshape(size, *x.shape[-3:]) for x in (query, key, value)
  )
  bias, mask = (
    broadcastable(name, array, scores)
    for name, array in (('bias', bias), ('mask', mask))
  )
  if mask is not None:
    _validate.check_kind('mask', mask, 'BNTS', _validate.BOOLEAN)
  valid = within(
    'key_value_seq_lengths', key_value_seq_lengths, batch, key.shape[1]
  )
  if valid is not None:
    valid = valid[:, None, None]
    mask = valid if mask is None else mask & valid
  valid = within('query_seq_lengths', query_seq_lengths, batch, query.shape[1])
  if valid is not None:
    valid = valid[:, :, None, None]
    query = jnp.where(valid, query, 0)  # NaN would return in the gradient.
  if scale is not None:
    _validate.check_scalar('scale', scale)
  limits = (bool(is_causal), _window(local_window_size))
  if attend is None:
    output = _exact(query, key, value, bias, mask, scale, *limits)
  else:
    doors = _doors_of(attend, chunk_size)
    if bias is not None:
      raise ValueError(
        f'bias is given, and the scores of {doors.name} are not there to add '
        'it to; expected None. Leave attend out for the exact softmax, or '
        'write a kernel whose log_kernel adds the bias.'
      )
    output = _by_doors(doors, query, key, value, mask, scale, *limits)
  output = output if valid is None else jnp.where(valid, output, 0)
  return output.reshape(*batch, *output.shape[1:])


def _window(size) -> tuple[int, int] | None:
  """Returns how many keys to the left and right a query sees."""
  if size is None:
    return None
  sides = (size, size) if np.ndim(size) == 0 else tuple(size)
  if len(sides) != 2 or not all(isinstance(s, int | np.integer) for s in sides):
    raise ValueError(
      f'local_window_size is {size!r}; expected an integer, or two: how many '
      'keys to the left and to the right a query sees.'
    )
  return int(sides[0]), int(sides[1])


@functools.partial(jax.jit, static_argnums=(6, 7))
def _exact(query, key, value, bias, mask, scale, is_causal, window):
  """The exact softmax of `[B, T, N, H]`, bias and mask up to `[B, N, T, S]`."""
  if query.dtype == jnp.float16:  # Not every CPU has its products.
    wide = precision.widen((query, key, value, bias))
    output = _exact(*wide, mask, scale, is_causal, window)
    return precision.cast_like(output, value)
  if mask is not None and mask.shape[1] == 1:
    seen = jnp.any(mask, axis=(1, 2))[..., None, None]
    key, value = (
      jnp.where(seen, x, jnp.nan_to_num(x, posinf=0, neginf=0))
      for x in (key, value)
    )
  mask = visible(mask, query.shape[1], key.shape[1], is_causal, window)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  if query.dtype != jnp.float64 and key.shape == value.shape:
    with jax.numpy_dtype_promotion('standard'):  # It needs that.
      return jax.nn.dot_product_attention(
        query, key, value, bias, mask, scale=scale
      )
  # There the softmax is float32, and values are as wide as keys.
  dtype = precision.accumulation_dtype(query.dtype)
  groups = _by_group(query, key.shape[2])
  scores = jnp.einsum(
    'btkgh,bskh->bkgts', groups, key, preferred_element_type=dtype
  )
  shape = scores.shape
  scores = scores.reshape(shape[0], query.shape[2], *shape[3:])
  scores = scores * jnp.asarray(scale, dtype)
  if bias is not None:
    scores = scores + bias.astype(dtype)
  if mask is not None:
    scores = jnp.where(mask, scores, _MASKED)
  weights = jax.nn.softmax(scores).astype(value.dtype).reshape(shape)
  output = jnp.einsum('bkgts,bskd->btkgd', weights, value)
  return output.reshape(*query.shape[:3], value.shape[-1])


def _doors_of(attend, chunk_size: int | None) -> _Doors:
  if chunk_size is not None:
    _validate.at_least(1, chunk_size=chunk_size)
  is_bound = isinstance(attend, functools.partial)
  fn = attend.func if is_bound else attend
  name = type(fn).__name__
  if not (hasattr(fn, 'stream') and hasattr(fn, 'causal')):
    is_kernel = not _validate.is_feature_map(attend, 'attend')
    name, arguments = type(attend).__name__, [attend]
    many, causal = stream_kernel_attention, causal_kernel_attention
  elif is_bound and len(attend.args) == 1 and not attend.keywords:
    is_kernel, arguments = False, [fn, *attend.args]
    many, causal = type(fn).stream, type(fn).causal
  else:
    raise ValueError(
      f'attend is a {name} without a feature map, or with more than that; '
      'expected functools.partial(attention, phi).'
    )
  options = {} if chunk_size is None else {'chunk_size': chunk_size}
  return _Doors(
    name,
    Partial(many, *arguments, **options),
    Partial(causal, *arguments, **options),
    Partial(_any_mask, attend, chunk_size or 1024) if is_kernel else None,
  )


def _any_mask(kernel, chunk_size, queries, keys, values, mask):
  """Answers every query with a mask of its own, `[T, S]`, score by score."""
  return moments.map_chunks(
    lambda row: kernel_attention(kernel, row[0], keys, values, mask=row[1]),
    (queries, mask),
    chunk_size,
  )


def _by_doors(doors, query, key, value, mask, scale, is_causal, window):
  """Answers as `_exact` does, by any attention, head after head."""
  query, key = stretched(query, key, scale)
  size = query.shape[1], key.shape[1]
  if mask is not None:
    mask = mask | np.zeros((1, 1, 1, size[1]), bool)  # Rows of full length.
  differs = mask is not None and mask.shape[2] > 1
  is_square = size[0] == size[1]
  if doors.any_mask and (differs or window or (is_causal and not is_square)):
    seen = visible(mask, *size, is_causal, window)
    seen = jnp.broadcast_to(seen, (*seen.shape[:2], *size))
    return _over_heads(doors.any_mask, query, key, value, seen)
  if window is not None:
    raise ValueError(
      f'local_window_size is {window}, which the sums over keys of '
      f'{doors.name} cannot leave; expected None. {_USE_A_KERNEL}'
    )
  rows, fits = None, True
  if differs:
    is_causal, mask, rows, fits = _read_mask(mask, is_causal, doors.name)
  if is_causal and not is_square:
    raise ValueError(
      f'is_causal is set for {size[0]} queries and {size[1]} keys; expected '
      'one query for each key. Pass the keys that the queries see.'
    )
  if mask is not None:
    mask = mask[:, :, 0]
  door = doors.causal if is_causal else doors.many
  output = _over_heads(door, query, key, value, mask)
  if rows is not None:
    rows = jnp.moveaxis(rows, 1, 2)[..., None]
    output = jnp.where(rows, output, 0)
    output = jnp.where(fits, output, jnp.nan)
  return output


def stretched(query, key, scale) -> tuple[Array, Array]:
  """Returns what a feature map or kernel sees of a scale of the scores."""
  if scale is None:
    return query, key
  _validate.positive(scale=scale)
  root = jnp.sqrt(jnp.asarray(scale * query.shape[-1] ** 0.5, query.dtype))
  return root * query, root * key


def _read_mask(mask, is_causal: bool, name: str):
  """Reads a mask as valid queries times valid keys, causal or not.

  Returns whether it is causal, keys `[B, N, 1, S]`, queries `[B, N, T]`, and
  whether that is all it says, which of a traced mask is not known.
  """
  is_known = _validate.is_concrete(mask)
  # By NumPy: under jit, jnp would make a tracer of what is known.
  xp, mask = (np, np.asarray(mask)) if is_known else (jnp, mask)
  past = xp.tril(xp.ones((1, 1, *mask.shape[2:]), bool))
  for causal in (False, True) if is_known and not is_causal else (is_causal,):
    pattern = past if causal else xp.ones_like(past)
    seen = mask & pattern if is_causal else mask
    keys, rows = xp.any(seen, axis=2, keepdims=True), xp.any(seen, axis=3)
    fits = xp.all(seen == (rows[..., None] & keys & pattern))
    if (is_known and fits) or (is_causal and not is_known):
      return causal, keys, rows, fits
  raise ValueError(
    f'mask differs from query to query, which the sums over keys of {name} '
    'cannot honour; expected key padding [..., 1, 1, S]. Of masks over [T, S] '
    'a causal one is read, with padding of keys and queries: pass '
    f'is_causal=True, or call it where the mask is not traced. {_USE_A_KERNEL}'
  )


def visible(mask, num_queries: int, num_keys: int, is_causal, window):
  """Returns who sees whom, broadcasting to `[B, N, T, S]`; None for all."""
  if not is_causal and window is None:
    return mask
  sizes = num_queries, num_keys
  row, column = (jnp.arange(n, dtype=jnp.int32) for n in sizes)
  distance = (row[:, None] - column[None])[None, None]
  limit = distance >= 0 if is_causal else jnp.ones_like(distance, bool)
  if window is not None:
    limit &= (distance <= window[0]) & (distance >= -window[1])
  return limit if mask is None else mask & limit


def _by_group(query, num_kv_heads: int):
  """Returns queries `[B, T, K, N / K, H]`, by the key head that they share."""
  shared = query.shape[2] // num_kv_heads
  return query.reshape(*query.shape[:2], num_kv_heads, shared, query.shape[3])


@compiled
def _over_heads(door, query, key, value, mask):
  """Answers every head of a batch; heads of a group share what a door keeps."""
  num_kv_heads = key.shape[2]
  groups = _by_group(query, num_kv_heads)
  axes = [None] * 3
  if mask is not None:
    lead = (1, 1) if mask.shape[1] == 1 else groups.shape[2:4]
    mask = mask.reshape(mask.shape[0], *lead, *mask.shape[2:])
    axes = [None if size == 1 else 0 for size in mask.shape[:3]]
    mask = mask.reshape(*(n for n in mask.shape[:3] if n > 1), *mask.shape[3:])

  def fn(queries, keys, values, mask):
    return door(queries, keys, values, mask=mask)

  fn = jax.vmap(fn, (1, None, None, axes[2]), 1)
  fn = jax.vmap(fn, (1, 1, 1, axes[1]), 1)
  output = jax.vmap(fn, (0, 0, 0, axes[0]))(groups, key, value, mask)
  return output.reshape(*query.shape[:3], output.shape[-1])


def within(name: str, lengths, batch: tuple[int, ...], size: int):
  """Returns which of `size` rows each sequence of the batch has, or None."""
  if lengths is None:
    return None
  lengths = jnp.asarray(lengths)
  is_integer = jnp.issubdtype(lengths.dtype, jnp.integer)
  if not is_integer or lengths.shape not in (batch, batch or (1,)):
    raise ValueError(
      f'{name} is {_validate.describe(lengths)}; expected integers '
      f'{list(batch)}, one length for each sequence.'
    )
  return jnp.arange(size, dtype=lengths.dtype)[None] < lengths.reshape(-1, 1)


def broadcastable(name: str, array, shape: tuple[int, ...]):
  """Returns an array of scores as `[B | 1, N | 1, T | 1, S | 1]`, or None."""
  if array is None:
    return None
  array = array if hasattr(array, 'shape') else np.asarray(array)
  missing = len(shape) - array.ndim
  sizes = (1,) * missing + array.shape[max(0, -missing) :]
  fits = all(a in (1, b) for a, b in zip(sizes, shape, strict=True))
  if not fits or any(n > 1 for n in array.shape[: max(0, -missing)]):
    raise ValueError(
      f'{name} has shape {list(array.shape)}; expected one that broadcasts to '
      f'[..., N, T, S] = {list(shape)}.'
    )
  array = array.reshape(sizes)
  if any(n > 1 for n in sizes[:-3]):
    array = jnp.broadcast_to(array, shape[:-3] + sizes[-3:])
  return array.reshape(-1, *sizes[-3:])


def check_layout(query, key, value) -> None:
  """Raises unless the arrays are `[..., T, N, H]` and `[..., S, K, H]`."""
  arrays = {'query': query, 'key': key, 'value': value}
  for name, array in arrays.items():
    if array.ndim < 3 or array.ndim != query.ndim:
      raise ValueError(
        f'{name} has shape {list(array.shape)}; expected [..., tokens, heads, '
        'width], as many axes in query, key and value. One head is an axis, '
        f'too: {name}[..., None, :].'
      )
    _validate.check_kind(name, array, '_' * array.ndim, _validate.FLOATING)
  _validate.check_dtypes(arrays)
  expected = *query.shape[:-3], *key.shape[-3:-1], query.shape[-1]
  if key.shape != expected or value.shape[:-1] != expected[:-1]:
    raise ValueError(
      f'query, key and value have shapes {list(query.shape)}, '
      f'{list(key.shape)} and {list(value.shape)}; expected [..., T, N, H], '
      '[..., S, K, H] and [..., S, K, d_v]: tokens before heads.'
    )
  if 0 in key.shape[-3:] or query.shape[-2] % key.shape[-2]:
    raise ValueError(
      f'query has {query.shape[-2]} heads and key {list(key.shape)}; expected '
      'at least one key, and a number of heads that those of key divide.'
    )
