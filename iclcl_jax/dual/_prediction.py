"""What a state answers."""

import jax.numpy as jnp

from iclcl_jax import _validate, attention, moments
from iclcl_jax._door import door
from iclcl_jax.forms import form_of
from iclcl_jax.precision import cast_like
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
def normaliser(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  query: Float[Array, ' d_k'],
  *,
  mask: Mask | None = None,
) -> Float[Array, '']:
  r"""Returns the papers' normaliser of one query.

  .. math:: D = \sum_i \phi(k_i)^\top\phi(q)

  over the keys of demonstrations AND query side. It is a plain number, in
  float32 at least, and may overflow where a state does not.

  Example:
    >>> from iclcl_jax import dual, kernels
    >>> float(dual.normaliser(
    ...     kernels.ExponentialKernel(), jnp.zeros((3, 4)), jnp.ones(4)))
    3.0
  """
  scores, log_scale = attention.scores(phi, query, keys, mask)
  return jnp.sum(scores) * jnp.exp(log_scale)


@door
def predict(
  phi: FeatureMap | Kernel,
  state: State,
  query: Float[Array, ' d_k'],
  *,
  normaliser: Float[Array, ''] | None = None,
) -> Float[Array, ' d_v']:
  r"""Returns the prediction of the dual model for one query.

  .. math:: f(q) = W\phi(q) / D, \qquad D = z^\top\phi(q)

  or a fixed `D`, see :func:`normaliser`. It is NaN if the state has seen no
  token.

  Example:
    >>> from iclcl_jax import dual, kernels
    >>> kernel = kernels.ExponentialKernel()
    >>> keys, values = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> state = dual.zero_shot(kernel, keys, values)
    >>> dual.predict(kernel, state, jnp.ones(4)).tolist()
    [2.0]
  """
  reading = form_of(phi, state).read(phi, state, query)
  if normaliser is None:
    return cast_like(reading.numerator / reading.denominator, query)
  _validate.finite(normaliser=normaliser)
  normaliser = jnp.asarray(normaliser, reading.log_scale.dtype)
  scale = jnp.exp(reading.log_scale - jnp.log(jnp.abs(normaliser)))
  return cast_like(reading.numerator * scale * jnp.sign(normaliser), query)


@door
def read(
  phi: FeatureMap | Kernel, state: State, query: Float[Array, ' d_k']
) -> Reading:
  """Returns numerator and normaliser of a prediction, on a common scale.

  Readings of one query merge where states do not: exact demonstrations with
  features, or those of other devices (`dual.all_merge`).

  Example:
    >>> from iclcl_jax import dual, kernels
    >>> kernel, x = kernels.ExponentialKernel(), jnp.zeros((2, 4))
    >>> state = dual.zero_shot(kernel, x, jnp.ones((2, 1)))
    >>> dual.read(kernel, state, jnp.ones(4)).denominator.tolist()
    2.0
  """
  return form_of(phi, state).read(phi, state, query)


@door
def stream_predict(
  phi: FeatureMap | Kernel,
  state: State,
  queries: Float[Array, 'M d_k'],
  *,
  chunk_size: int = 1024,
) -> Float[Array, 'M d_v']:
  """Predicts for many queries, one chunk of them at a time: `[M, d_v]`.

  Example:
    >>> from iclcl_jax import dual, kernels
    >>> kernel = kernels.ExponentialKernel()
    >>> keys, values = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> state = dual.zero_shot(kernel, keys, values)
    >>> dual.stream_predict(kernel, state, jnp.ones((2, 4))).tolist()
    [[2.0], [2.0]]
  """
  _validate.at_least(1, chunk_size=chunk_size)
  return moments.map_chunks(
    lambda query: predict(phi, state, query), queries, chunk_size
  )
