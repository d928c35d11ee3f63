"""Rademacher complexity, bounds, and the gap in closed form over a ball."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, dual, forms, moments
from iclcl_jax._door import door
from iclcl_jax._program import compiled
from iclcl_jax.bounds import _norms
from iclcl_jax.bounds._norms import FROBENIUS, Ball, LogValue, Positive
from iclcl_jax.precision import accumulation_dtype
from iclcl_jax.types import (
  Array,
  DualState,
  FeatureMap,
  Float,
  Kernel,
  PRNGKeyArray,
  State,
)


@door
def rademacher_bound(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  radius: Positive,
  ball: Ball = FROBENIUS,
) -> LogValue:
  r"""Bounds the empirical Rademacher complexity in closed form.

  .. math:: \hat R \le \frac{w}{N}\sqrt{\sum_i |v_i|^2\,k(k_i, k_i)}

  for the Frobenius ball, and :math:`\sqrt{\min(d_v, N, R)}` times that for the
  spectral one.

  Example:
    >>> bound = rademacher_bound(
    ...     kernels.LinearKernel(), jnp.eye(4), jnp.ones((4, 1)), radius=2.0)
    >>> round(float(bound.value), 6)
    1.0
  """
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  dtype = accumulation_dtype(values.dtype)
  diagonal = _norms.log_diagonal(phi, keys)
  lengths = _norms.log_norm(values.astype(dtype))
  size = _norms.count(values)
  rank = jnp.minimum(values.shape[1], size)
  if _validate.is_feature_map(phi):
    row = jax.ShapeDtypeStruct(keys.shape[1:], keys.dtype)
    rank = jnp.minimum(rank, jax.eval_shape(phi, row).shape[0])
  bound = (
    _norms.log_positive('radius', radius, dtype)
    + jax.nn.logsumexp(diagonal + 2 * lengths) / 2
    + jnp.log(ball.growth(rank))
    - jnp.log(size)
  )
  return LogValue(bound.astype(values.dtype))


@door
def rademacher_draws(
  key: PRNGKeyArray,
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  radius: Positive,
  num_draws: int,
  ball: Ball = FROBENIUS,
) -> LogValue:
  r"""Draws `P` sign vectors; returns the exact supremum over the ball for each.

  .. math:: \frac{w}{N} \Bigl|\sum_i s_i v_i\,\phi(k_i)^\top\Bigr|_*

  Their mean estimates the empirical Rademacher complexity without bias. Holds
  `num_draws * d_v * (N + R)` numbers for a feature map, without `R` for a
  kernel. The `key` is consumed.

  Example:
    >>> draws = rademacher_draws(
    ...     jax.random.key(0), kernels.LinearKernel(), jnp.eye(4),
    ...     jnp.ones((4, 1)), radius=2.0, num_draws=3)
    >>> draws.value.round(6).tolist()
    [1.0, 1.0, 1.0]
  """
  _validate.at_least(1, num_draws=num_draws)
  keys, values = jnp.asarray(keys), jnp.asarray(values)

  def signs(row):
    row_key = jax.random.fold_in(key, row)
    return jax.random.rademacher(row_key, (num_draws,), values.dtype)

  labels = jax.vmap(signs)(jnp.arange(len(values)))[..., None] * values[:, None]
  logs = _norms.log_norms(phi, keys, labels, ball)
  size = jnp.log(_norms.count(values))
  logs = logs + (_norms.log_positive('radius', radius, logs.dtype) - size)
  return LogValue(logs.astype(values.dtype))


class GeneralizationBound(NamedTuple):
  """A bound of `L - L_hat` that holds for a whole ball of weights.

  It has a term of the class of functions and one of the probability `delta`.
  """

  complexity: LogValue
  confidence: LogValue

  @property
  def total(self) -> LogValue:
    """Returns the sum of both terms."""
    return LogValue(
      jnp.logaddexp(self.complexity.log_value, self.confidence.log_value)
    )


@door
def generalization_bound(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  radius: Positive,
  loss_bound: Positive,
  delta: float | Array,
  ball: Ball = FROBENIUS,
) -> GeneralizationBound:
  r"""Bounds the gap from the demonstrations alone: Theorem 3.2 with constants.

  .. math:: L - \hat L \le 2\hat R_{\mathrm{bound}}
     + 3\cdot 2B\sqrt{\log(2/\delta) / (2N)}

  By symmetrisation and bounded differences, for independent demonstrations.
  The `loss_bound` `B > 0` is at least `|v . W phi(k)|` for ALL `W` of the ball
  and all demonstrations that can occur; the papers' `rho ** 2`.

  Example:
    >>> bound = generalization_bound(
    ...     kernels.LinearKernel(), jnp.eye(4), jnp.ones((4, 1)), radius=1.0,
    ...     loss_bound=1.0, delta=0.05)
    >>> round(float(bound.complexity.value), 6)
    1.0
    >>> round(float(bound.confidence.value), 6)
    4.074305
  """
  values = jnp.asarray(values)
  complexity = rademacher_bound(phi, keys, values, radius=radius, ball=ball)
  size = _norms.count(values)
  log_delta = _norms.log_positive('delta', delta, size.dtype)
  rate = (jnp.log(math.log(2) - log_delta) - jnp.log(2 * size)) / 2
  log_bound = _norms.log_positive('loss_bound', loss_bound, rate.dtype)
  confidence = log_bound + math.log(6) + rate
  return GeneralizationBound(
    LogValue(complexity.log_value + math.log(2)),
    LogValue(confidence.astype(values.dtype)),
  )


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
  values, size = jnp.asarray(values), _norms.count(values)
  labels = (values.astype(size.dtype) / size).astype(values.dtype)
  form, keys = forms.form_of(phi), jnp.asarray(keys)
  state = form.empty(phi, keys, labels)
  return form.absorb(phi, state, keys, labels, None, _norms.CHUNK_SIZE)


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
    log_gap = _norms.state_norms(both, 1, ball)[0]
  else:
    log_gap = _norms.log_norms(
      phi, both.keys, both.coefficients[:, None], ball
    )[0]
  log_gap = log_gap + _norms.log_positive('radius', radius, log_gap.dtype)
  return LogValue(log_gap.astype(dtype))


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
    dtype = accumulation_dtype(state.mass.dtype)
    a, b = jax.tree.map(lambda x: x.astype(dtype), (state, population))
    exponent = a.log_scale + b.log_scale
    top = moments.largest(exponent)
    scaled = a.weights * b.weights * jnp.exp(exponent - top)[None]
    # In two steps, each finite: weights of zero stay zero at any scale.
    root = jnp.minimum(jnp.exp(top / 2), jnp.finfo(top.dtype).max)
    return -(jnp.sum(scaled) * root * root).astype(state.mass.dtype)
  labels = population.coefficients  # type: ignore[union-attr]
  keys = population.keys  # type: ignore[union-attr]
  dtype, one = accumulation_dtype(labels.dtype), jnp.ones((), labels.dtype)

  def predict(key):
    return dual.predict(phi, state, key, normaliser=one).astype(dtype)

  predictions = moments.map_chunks(predict, keys, _norms.CHUNK_SIZE)
  return -jnp.sum(labels.astype(dtype) * predictions).astype(labels.dtype)
