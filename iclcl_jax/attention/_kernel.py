"""Softmax, kernel and linear attention of one head over one sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, coefficients, moments
from iclcl_jax._door import door
from iclcl_jax.forms import form_of
from iclcl_jax.precision import cast_like, product
from iclcl_jax.types import (
  Array,
  FeatureMap,
  Float,
  Kernel,
  Mask,
  Reading,
  State,
)


@door
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

  Example:
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> softmax_attention(jnp.ones(4), keys, values).tolist()
    [2.0]
  """
  # A masked NaN would return in the gradient.
  keys = moments.visible(jnp.asarray(keys), mask)
  values = moments.visible(jnp.asarray(values), mask)
  exponent = product(keys, jnp.asarray(query) / query.shape[0] ** 0.5)
  if mask is not None:
    exponent = jnp.where(mask, exponent, jnp.finfo(exponent.dtype).min)
  weights = jax.nn.softmax(coefficients.relative(exponent))
  if mask is not None:
    weights = jnp.where(mask, weights, 0)
  return cast_like(product(values.T, weights), values)


@door
def kernel_attention(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Attends to `keys` with the kernel :math:`\phi(q)^\top\phi(k)`: `[d_v]`.

  .. math:: h = \sum_i v_i\, \phi(k_i)^\top\phi(q) \big/
     \sum_i \phi(k_i)^\top\phi(q)

  Args:
    phi: feature map of the kernel, or the kernel itself.
    query: the test input. Shape `[d_k]`.
    keys: training inputs of the dual model. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    mask: valid keys. Shape `[N]`; None for all.

  Example:
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = features.EluPlusOneFeatures()
    >>> kernel_attention(phi, jnp.ones(4), keys, values).tolist()
    [2.0]
  """
  weights, _ = scores(phi, query, keys, mask)
  numerator, denominator = _sums(weights, values, mask)
  return cast_like(divide(numerator, denominator, mask), values)


@door
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

  Example:
    >>> keys, values = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = features.IdentityFeatures()
    >>> linear_attention(phi, jnp.ones(4), keys, values).tolist()
    [16.0]
  """
  weights, log_scale = scores(phi, query, keys, mask)
  numerator, _ = _sums(weights, values, mask)
  return cast_like(numerator * jnp.exp(log_scale), values)


@door
def stream_kernel_attention(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  chunk_size: int = 1024,
  mask: Mask | None = None,
) -> Float[Array, 'M d_v']:
  """Answers many queries, `[M, d_v]`, in linear time with a feature map.

  Keys are absorbed into one state, queries read it; nothing of size `[N, R]` or
  `[M, N]` is held, in the backward pass either. With a kernel the time is that
  of all `M N` scores, of which `[chunk_size, N]` are held.

  Example:
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> phi = features.EluPlusOneFeatures()
    >>> stream_kernel_attention(phi, jnp.ones((3, 4)), keys, values).shape
    (3, 1)
  """
  _validate.at_least(1, chunk_size=chunk_size)
  read = reader(phi, keys, values, chunk_size, mask)

  def answer(query):
    reading = read(query)
    output = divide(reading.numerator, reading.denominator, mask)
    return cast_like(output, values)

  return moments.map_chunks(answer, queries, chunk_size)


@door
def causal_kernel_attention(
  phi: FeatureMap | Kernel,
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  chunk_size: int = 64,
  mask: Mask | None = None,
  start: State | None = None,
) -> Float[Array, 'N d_v']:
  """Lets position `t` attend to the keys `0..t`: `[N, d_v]`.

  With a feature map the time is linear in `N`; with a kernel it is that of all
  `N^2` scores, of which `[chunk_size, N]` are held.

  Nothing of the future enters a past output: no value, gradient or rounding.
  Where a key rises above the past by more than half the range of the dtype's
  exponents, its chunk is answered row by row, which is slower.

  `start` is the state of the tokens before position 0, which all positions see:
  so a long prompt is read part by part, or by many devices
  (`dual.prefix_merge`).

  Example:
    >>> x = jnp.zeros((2, 4))
    >>> phi, values = features.EluPlusOneFeatures(), jnp.array([[1.0], [3.0]])
    >>> causal_kernel_attention(phi, x, x, values).tolist()
    [[1.0], [2.0]]
  """
  _validate.at_least(1, chunk_size=chunk_size)
  form = form_of(phi, start, name='start')
  sums = form.causal_sums(phi, queries, keys, values, chunk_size, mask, start)
  seen = None
  if mask is not None:
    some = False if start is None else jnp.any(start.mass != 0)
    seen = some | (jnp.cumsum(mask)[:, None] > 0)
  return cast_like(divide(sums[:, :-2], sums[:, -2:-1], seen), values)


@door
def weights(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  *,
  mask: Mask | None = None,
) -> Float[Array, ' N']:
  """Returns the attention weights `[N]` of one query; they sum to 1.

  All are 0 if no key is visible.

  Example:
    >>> kernel = kernels.ExponentialKernel()
    >>> weights(kernel, jnp.ones(4), jnp.zeros((2, 4))).tolist()
    [0.5, 0.5]
  """
  raw, _ = scores(phi, query, keys, mask)
  return cast_like(divide(raw, jnp.sum(raw), mask), keys)


def reader(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  chunk_size: int,
  mask: Mask | None = None,
) -> Callable[[Float[Array, ' d_k']], Reading]:
  """Absorbs the keys once; returns `query -> Reading`."""
  form = form_of(phi)
  empty = form.empty(phi, keys, values)
  state = form.absorb(phi, empty, keys, values, mask, chunk_size)
  return lambda query: form.read(phi, state, query)


@door
def scores(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  mask: Mask | None = None,
) -> tuple[Float[Array, ' N'], Float[Array, '']]:
  """Returns unnormalised attention scores and their common log-scale.

  The kernel values are `scores * exp(log_scale)`. Shapes `[N]` and `[]`.
  """
  terms, log_scale = form_of(phi).score_terms(phi, query, keys, mask)
  return jnp.sum(terms, axis=1), log_scale


def _sums(weights, values, mask):
  values = moments.visible(jnp.asarray(values), mask)
  return product(values.T, weights), jnp.sum(weights)


def divide(numerator, denominator, seen):
  """Divides; where no key is seen (mask all False) the answer is zero."""
  if seen is None:
    return numerator / denominator
  seen = jnp.any(seen) if seen.ndim == 1 else seen
  return jnp.where(seen, numerator, 0) / jnp.where(seen, denominator, 1)
