"""The gap between a loss and its mean, in closed form over a whole ball."""

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, dual, forms, moments
from iclcl_jax._door import door
from iclcl_jax._program import compiled
from iclcl_jax.bounds._common import (
  CHUNK_SIZE,
  FROBENIUS,
  Ball,
  LogValue,
  Positive,
  count,
  log_positive,
)
from iclcl_jax.bounds._norms import log_norms, state_norms
from iclcl_jax.precision import accumulation_dtype
from iclcl_jax.types import Array, DualState, FeatureMap, Float, Kernel, State


@door
def mean_embedding(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
) -> State:
  r"""Returns the mean of :math:`v\,\phi(k)^\top` as weights of a dual model.

  The representation loss of `W` is minus its inner product with the mean over
  the distribution; its estimate, with that over the demonstrations.

  Example:
    >>> state = mean_embedding(
    ...     features.IdentityFeatures(), jnp.eye(2), jnp.ones((2, 1)))
    >>> state.weights.tolist()
    [[0.5, 0.5]]
  """
  values, size = jnp.asarray(values), count(values)
  labels = (values.astype(size.dtype) / size).astype(values.dtype)
  form, keys = forms.form_of(phi), jnp.asarray(keys)
  state = form.empty(phi, keys, labels)
  return form.absorb_stream(phi, state, keys, labels, CHUNK_SIZE)


@compiled
def gap_supremum(
  phi: FeatureMap | Kernel,
  population: State,
  sample: State,
  *,
  radius: Positive,
  ball: Ball = FROBENIUS,
) -> LogValue:
  r"""Returns the largest gap over the ball, in closed form.

  .. math:: \sup_{|W| \le w} (L - \hat L)
     = w\,\Bigl|E[v\,\phi(k)^\top] - \frac1N\sum_i v_i\,\phi(k_i)^\top\Bigr|_*

  Both are a `mean_embedding`: of the distribution, or of a large sample, and of
  the demonstrations.

  Example:
    >>> phi = features.IdentityFeatures()
    >>> a = mean_embedding(phi, jnp.zeros((1, 2)), jnp.ones((1, 1)))
    >>> b = mean_embedding(phi, jnp.array([[3.0, 4.0]]), jnp.ones((1, 1)))
    >>> round(float(gap_supremum(phi, a, b, radius=1.0).value), 5)
    5.0
  """
  forms.form_of(phi, population, name='population')
  form, dtype = forms.form_of(phi, sample, name='sample'), sample.mass.dtype
  expected = 'a Ball, bounds.FROBENIUS or bounds.SPECTRAL'
  _validate.check_type('ball', ball, Ball, expected)
  opposite = form.with_weights(sample, -form.get_weights(sample))
  both = form.merge(population, opposite)
  if isinstance(both, DualState):
    log_norm = state_norms(both, 1, ball)[0]
  else:
    log_norm = log_norms(phi, both.keys, both.coefficients[:, None], ball)[0]
  log_norm = log_norm + log_positive('radius', radius, log_norm.dtype)
  return LogValue(log_norm.astype(dtype))


@compiled
def expected_loss(
  phi: FeatureMap | Kernel, state: State, population: State
) -> Float[Array, '']:
  r"""Returns the loss over the distribution, `-<W, E[v phi(k)^T]>`.

  `population` is the `mean_embedding` of the distribution; with that of the
  demonstrations it is their mean loss.

  Example:
    >>> phi, x = features.IdentityFeatures(), jnp.eye(2)
    >>> population = mean_embedding(phi, x, x)
    >>> float(expected_loss(phi, dual.zero_shot(phi, x, x), population))
    -1.0
  """
  forms.form_of(phi, state)
  forms.form_of(phi, population, name='population')
  if isinstance(state, DualState) and isinstance(population, DualState):
    return -_inner_product_of_weights(state, population)
  labels = population.coefficients  # type: ignore[union-attr]
  keys = population.keys  # type: ignore[union-attr]
  dtype, one = accumulation_dtype(labels.dtype), jnp.ones((), labels.dtype)

  def predict(key):
    return dual.predict(phi, state, key, normaliser=one).astype(dtype)

  predictions = moments.map_chunks(predict, keys, CHUNK_SIZE)
  return -jnp.sum(labels.astype(dtype) * predictions).astype(labels.dtype)


def _inner_product_of_weights(a: DualState, b: DualState) -> Float[Array, '']:
  dtype = a.weights.dtype
  a, b = jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), (a, b))
  exponent = a.log_scale + b.log_scale
  top = moments.largest(exponent)
  scaled = a.weights * b.weights * jnp.exp(exponent - top)[None]
  # In two steps, each finite: weights of zero stay zero at any scale.
  root = jnp.minimum(jnp.exp(top / 2), jnp.finfo(top.dtype).max)
  return (jnp.sum(scaled) * root * root).astype(dtype)
