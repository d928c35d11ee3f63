"""Causal attention where log-features rise by hundreds inside one chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import _pytree, attention, dual, kernels
from tests import tolerances


@_pytree.dataclass
class LogLinearFeatures:
  """`exp(W x) * signs`: log-features as steep as the inputs."""

  projection: jax.Array
  signs: jax.Array

  def __call__(self, x):
    log_scale, features = self.scaled(x)
    return jnp.exp(log_scale) * features

  def scaled(self, x):
    return self.projection @ x, self.signs


def oracle(phi, queries, keys, values, mask):
  """Float64, each row relative to its own largest visible log-score."""
  projection, signs = np.asarray(phi.projection), np.asarray(phi.signs)
  query_logs, key_logs = queries @ projection.T, keys @ projection.T
  outputs = np.zeros_like(values)
  for t in range(len(queries)):
    rows = [i for i in range(t + 1) if mask[i]]
    if rows:
      logs = query_logs[t] + key_logs[rows]
      scores = (np.exp(logs - logs.max()) * signs**2).sum(axis=1)
      outputs[t] = scores @ values[rows] / scores.sum()
  return outputs


RISES = {
  'flat': np.zeros(40),
  'up': np.linspace(-400, 400, 40),
  'down': np.linspace(400, -400, 40),
  'late peak': np.where(np.arange(40) == 29, 300.0, 0),
  'stairs': np.arange(40) // 4 * 60.0,
}


def inputs(rise, dtype, seed=0):
  """Two features, of which the first rises with the position."""
  rng = np.random.default_rng(seed)
  queries, keys = rng.normal(size=(2, 40, 2))
  keys[:, 0] += rise
  values = rng.normal(size=(40, 3))
  projection = jnp.array([[1, 0], [0, 1], [0.5, -1]], dtype)
  phi = LogLinearFeatures(projection, jnp.array([1, -0.5, 2], dtype))
  return phi, *(jnp.asarray(x, dtype) for x in (queries, keys, values))


def attend(phi, *arrays, chunk_size=16, **options):
  return jax.jit(
    attention.causal_kernel_attention, static_argnames='chunk_size'
  )(phi, *arrays, chunk_size=chunk_size, **options)


@pytest.mark.parametrize('chunk_size', [1, 7, 64])
@pytest.mark.parametrize('rise', RISES)
def test_any_rise_gives_the_attention_of_the_formula(rise, chunk_size, dtype):
  phi, *arrays = inputs(RISES[rise], dtype)
  mask = np.arange(40) % 5 != 0
  host = [np.asarray(array, np.float64) for array in arrays]
  # Exponents of hundreds are themselves rounded to eps * 400.
  tolerance = 10 * 400 * float(jnp.finfo(dtype).eps)
  for valid in (None, mask):
    outputs = attend(phi, *arrays, chunk_size=chunk_size, mask=valid)
    expected = oracle(phi, *host, np.ones(40) if valid is None else valid)
    assert outputs.dtype == dtype
    np.testing.assert_allclose(outputs, expected, atol=tolerance)


@pytest.mark.parametrize('rise', RISES)
def test_the_future_leaves_no_trace_in_the_past_not_even_a_rounding(rise):
  phi, *arrays = inputs(RISES['flat'], jnp.float32)
  past = attend(phi, *arrays)[:23]
  changed = inputs(RISES[rise] + 50, jnp.float32, seed=1)[1:]
  future = [
    jnp.concatenate([a[:23], b[23:]])
    for a, b in zip(arrays, changed, strict=True)
  ]
  np.testing.assert_array_equal(attend(phi, *future)[:23], past)

  both = [jnp.stack(pair) for pair in zip(arrays, future, strict=True)]
  batch = jax.vmap(lambda *x: attend(phi, *x))(*both)
  np.testing.assert_array_equal(batch[0, :23], batch[1, :23])


@pytest.mark.parametrize('rise', RISES)
def test_gradients_are_finite_and_vanish_in_the_future(rise):
  phi, *arrays = inputs(RISES[rise], jnp.float64)

  def earlier(*arrays):
    return jnp.sum(attend(phi, *arrays)[:23] ** 2)

  for gradient in jax.grad(earlier, argnums=(0, 1, 2))(*arrays):
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[23:])
    assert np.any(gradient[:23])


def test_derivatives_of_steep_rows_agree_with_differences():
  phi, *arrays = inputs(RISES['late peak'], jnp.float64)
  direction = jax.random.normal(jax.random.key(0), arrays[1].shape)

  def along(step):
    keys = arrays[1] + step * direction
    return jnp.sum(attend(phi, arrays[0], keys, arrays[2])[:, 0])

  difference = (along(1e-5) - along(-1e-5)) / 2e-5
  np.testing.assert_allclose(jax.grad(along)(0.0), difference, rtol=1e-6)


def test_the_slow_path_is_not_taken_for_every_batch():
  phi, *arrays = inputs(RISES['flat'], jnp.float32)
  batch = [jnp.stack([array] * 3) for array in arrays]
  jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(lambda *x: attend(phi, *x))))(
    *[array[None] for array in batch]
  )
  assert ' cond[' in str(jaxpr)
  tolerance = tolerances.OTHER_SUMMATION_ORDER['float32']
  np.testing.assert_allclose(
    jax.vmap(lambda *x: attend(phi, *x))(*batch)[2],
    attend(phi, *arrays),
    atol=tolerance,
  )


@pytest.mark.parametrize('is_masked', [False, True])
@pytest.mark.parametrize('rise', ['flat', 'late peak', 'kernel'])
def test_a_sequence_in_two_parts_is_the_sequence(rise, is_masked, dtype):
  phi, *arrays = inputs(RISES.get(rise, 0), dtype)
  phi = kernels.ExponentialKernel() if rise == 'kernel' else phi
  mask = np.arange(40) % 20 > 2 if is_masked else None  # From the first on.
  first, second = slice(17), slice(17, None)
  seen = None if mask is None else mask[first]
  start = dual.zero_shot(phi, *(x[first] for x in arrays[1:]), mask=seen)
  seen = None if mask is None else mask[second]
  rest = [x[second] for x in arrays]
  outputs = attend(phi, *rest, mask=seen, start=start)
  expected = attend(phi, *arrays, mask=mask)[second]
  tolerance = 10 * 300 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(outputs, expected, rtol=tolerance, atol=tolerance)


def test_a_start_of_another_form_is_an_error():
  phi, *arrays = inputs(0, jnp.float32)
  start = dual.zero_shot(kernels.ExponentialKernel(), *arrays[1:])
  with pytest.raises(ValueError, match=r'start is a KernelDualState'):
    attention.causal_kernel_attention(phi, *arrays, start=start)
