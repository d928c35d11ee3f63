"""Attention: oracles, streams, causality, stability, memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import test_util

from iclcl_jax import attention, features, kernels, projections
from tests import oracles, tolerances

N, D_K, D_V, R = 11, 4, 3, 8
F64 = np.float64

# Compiled once for each shape: faster here than op by op.
kernel_attention = jax.jit(attention.kernel_attention)
linear_attention = jax.jit(attention.linear_attention)
softmax_attention = jax.jit(attention.softmax_attention)
stream = jax.jit(
  attention.stream_kernel_attention, static_argnames='chunk_size'
)
causal = jax.jit(
  attention.causal_kernel_attention, static_argnames='chunk_size'
)


def omega(dtype=F64, num_features=R, dim=D_K):
  return projections.gaussian(jax.random.key(0), num_features, dim, dtype=dtype)


MAPS = {
  'positive': (
    lambda dtype: features.PositiveFeatures(omega(dtype)),
    lambda w: functools.partial(oracles.positive_features, w),
  ),
  'hyperbolic': (
    lambda dtype: features.HyperbolicFeatures(omega(dtype)),
    lambda w: functools.partial(oracles.hyperbolic_features, w),
  ),
  'trigonometric': (
    lambda dtype: features.TrigonometricFeatures(omega(dtype, 64)),
    lambda w: functools.partial(oracles.trigonometric_features, w),
  ),
  'elu_plus_one': (
    lambda dtype: features.EluPlusOneFeatures(),
    lambda w: oracles.elu_plus_one_features,
  ),
  'taylor': (
    lambda dtype: features.TaylorFeatures(order=2),
    lambda w: functools.partial(oracles.taylor_features, 2),
  ),
  'identity': (
    lambda dtype: features.IdentityFeatures(),
    lambda w: oracles.identity_features,
  ),
}
KERNELS = {
  'exponential': (kernels.ExponentialKernel(), oracles.exponential_kernel),
  'gaussian': (kernels.GaussianKernel(), oracles.gaussian_kernel),
  'linear': (kernels.LinearKernel(), oracles.linear_kernel),
  'truncated': (
    oracles.truncated_exponential(2),
    functools.partial(oracles.truncated_exponential_kernel, 2),
  ),
}


def make(name, dtype=F64):
  """A map or kernel, and the oracle's kernel of two vectors."""
  if name in KERNELS:
    return KERNELS[name]
  phi = MAPS[name][0](dtype)
  projection = np.asarray(getattr(phi, 'projection', np.zeros(0)), F64)
  return phi, oracles.feature_kernel(MAPS[name][1](projection))


def make_tokens(dtype=F64, size=N, seed=0, scale=1.0):
  """Queries and keys near one direction, so that signed maps behave."""
  rng = np.random.default_rng(seed)
  center = np.ones(D_K)
  return tuple(
    jnp.asarray(x, dtype)
    for x in (
      scale * (rng.normal(size=(size, D_K)) / 2 + center),
      scale * (rng.normal(size=(size, D_K)) / 2 + center),
      rng.normal(size=(size, D_V)),
    )
  )


def close(actual, expected, dtype=F64):
  expected = np.asarray(expected, F64)
  tolerance = tolerances.OTHER_SUMMATION_ORDER[jnp.dtype(dtype).name]
  np.testing.assert_allclose(
    np.asarray(actual, F64),
    expected,
    rtol=0,
    atol=tolerance * max(1, np.abs(expected).max()),
  )


def wide(*arrays):
  return [np.asarray(x, F64) for x in arrays]


POSITIVE = features.PositiveFeatures
BOTH_WAYS = pytest.mark.parametrize(
  ('dtype', 'masked'),
  [(jnp.dtype('float64'), False), (jnp.dtype('float32'), True)],
  ids=['float64', 'float32_masked'],
)
MASK = jnp.asarray([i % 3 != 1 for i in range(N)])


# One query.


@BOTH_WAYS
def test_softmax_attention_equals_oracle_and_flax(dtype, masked):
  queries, keys, values = make_tokens(dtype)
  mask = MASK if masked else None
  found = softmax_attention(queries[0], keys, values, mask=mask)
  expected = oracles.softmax_attention(
    *wide(queries[0], keys, values), None if mask is None else np.asarray(mask)
  )
  flax = nn.dot_product_attention(
    queries[:1, None],
    keys[:, None],
    values[:, None],
    mask=None if mask is None else mask[None, None],
  )[0, 0]
  assert found.dtype == dtype
  close(found, expected, dtype)
  close(found, flax, dtype)


@pytest.mark.parametrize('name', [*MAPS, *KERNELS])
@BOTH_WAYS
def test_kernel_and_linear_attention_equal_the_oracle(name, dtype, masked):
  phi, kernel = make(name, dtype)
  queries, keys, values = make_tokens(dtype)
  mask = MASK if masked else None
  plain = None if mask is None else np.asarray(mask)
  for found_fn, expected_fn in (
    (kernel_attention, oracles.kernel_attention),
    (linear_attention, oracles.linear_attention),
  ):
    found = found_fn(phi, queries[0], keys, values, mask=mask)
    assert found.dtype == dtype
    expected = expected_fn(kernel, *wide(queries[0], keys, values), plain)
    close(found, expected, dtype)


def test_exponential_kernel_attention_is_softmax_attention(dtype):
  queries, keys, values = make_tokens(dtype, scale=5.0)
  found = kernel_attention(
    kernels.ExponentialKernel(), queries[0], keys, values
  )
  close(found, softmax_attention(queries[0], keys, values), dtype)


@BOTH_WAYS
def test_weights_are_what_the_values_are_summed_with(dtype, masked):
  queries, keys, values = make_tokens(dtype)
  mask = MASK if masked else None
  phi, _ = make('positive', dtype)
  found = attention.weights(phi, queries[0], keys, mask=mask)
  close(jnp.sum(found), 1, dtype)
  expected = kernel_attention(phi, queries[0], keys, values, mask=mask)
  close(found @ values, expected, dtype)
  nobody = attention.weights(phi, queries[0], keys, mask=jnp.zeros(N, bool))
  np.testing.assert_array_equal(nobody, 0)


# Many queries.


@pytest.mark.parametrize('name', [*MAPS, *KERNELS])
@BOTH_WAYS
def test_stream_equals_direct(name, dtype, masked):
  phi, _ = make(name, dtype)
  queries, keys, values = make_tokens(dtype)
  mask = MASK if masked else None
  direct = jax.vmap(
    lambda q: kernel_attention(phi, q, keys, values, mask=mask)
  )(queries[:5])
  found = stream(phi, queries[:5], keys, values, chunk_size=4, mask=mask)
  close(found, direct, dtype)


@pytest.mark.parametrize('chunk_size', [1, 3, N, 100])
def test_stream_does_not_depend_on_the_chunks(chunk_size):
  phi, kernel = make('positive')
  queries, keys, values = make_tokens()
  found = stream(phi, queries[:5], keys, values, chunk_size=chunk_size)
  expected = [
    oracles.kernel_attention(kernel, *wide(q, keys, values))
    for q in queries[:5]
  ]
  close(found, np.stack(expected))


def test_no_query_gives_no_row():
  phi, _ = make('positive')
  _, keys, values = make_tokens()
  assert stream(phi, keys[:0], keys, values, chunk_size=4).shape == (0, D_V)


# Causal.


@pytest.mark.parametrize('name', [*MAPS, *KERNELS])
@BOTH_WAYS
def test_causal_equals_the_quadratic_oracle(name, dtype, masked):
  phi, kernel = make(name, dtype)
  tokens = make_tokens(dtype)
  mask = jnp.arange(N) % 3 != 0 if masked else None  # Position 0 sees none.
  found = causal(phi, *tokens, chunk_size=4, mask=mask)
  plain = None if mask is None else np.asarray(mask)
  expected = oracles.causal_attention(kernel, *wide(*tokens), plain)
  assert found.dtype == dtype
  close(found, expected, dtype)


@pytest.mark.parametrize('chunk_size', [1, 3, 8, 256])
def test_causal_does_not_depend_on_the_chunks(chunk_size):
  phi, kernel = make('positive')
  tokens = make_tokens()
  found = causal(phi, *tokens, chunk_size=chunk_size)
  close(found, oracles.causal_attention(kernel, *wide(*tokens)))


def test_causal_attention_of_one_token_is_its_value():
  tokens = make_tokens(size=1)
  phi, _ = make('positive')
  close(causal(phi, *tokens, chunk_size=4), tokens[2])


@pytest.mark.parametrize(
  ('name', 'chunk_size'),
  [
    ('positive', 4),
    ('positive', 16),
    ('trigonometric', 4),
    ('exponential', 4),
  ],
)
def test_no_gradient_from_the_future(name, chunk_size):
  """The Jacobian of past outputs is exactly zero, and not empty."""
  phi, _ = make(name)
  jacobians = jax.jit(
    jax.jacrev(
      lambda *tokens: attention.causal_kernel_attention(
        phi, *tokens, chunk_size=chunk_size
      ),
      argnums=(0, 1, 2),
    )
  )(*make_tokens())
  row, column = np.arange(N)[:, None], np.arange(N)[None]
  for i, jacobian in enumerate(jacobians):
    size = np.abs(np.asarray(jacobian)).max(axis=(1, 3))
    forbidden = column > row if i else column != row  # Queries stay at home.
    np.testing.assert_array_equal(size[forbidden], 0)
    allowed = (column <= row) & (row > 0) if i else (column == row) & (row > 0)
    assert (size[allowed] > 0).all()


@pytest.mark.parametrize(
  ('name', 'chunk_size'),
  [('positive', 4), ('positive', 16), ('trigonometric', 4)],
)
@pytest.mark.parametrize('scale', [60.0, np.nan])
def test_the_past_does_not_change_by_one_bit(name, chunk_size, scale):
  """Whatever the future holds, enormous keys and NaN included."""
  phi, _ = make(name, np.float32)
  tokens = make_tokens(np.float32)
  others = make_tokens(np.float32, seed=1, scale=scale)
  for start in (1, 6, 8):
    mixed = [
      jnp.concatenate([a[:start], b[start:]])
      for a, b in zip(tokens, others, strict=True)
    ]
    np.testing.assert_array_equal(
      causal(phi, *mixed, chunk_size=chunk_size)[:start],
      causal(phi, *tokens, chunk_size=chunk_size)[:start],
    )


# Large norms.


def log_space_oracle(projection, query, keys, values):
  """Attention of positive features, by log-sum-exp in float64."""
  scale = keys.shape[1] ** 0.25

  def logs(x):
    return projection @ (x / scale) - (x / scale) @ (x / scale) / 2

  scores = [np.logaddexp.reduce(logs(k) + logs(query)) for k in keys]
  weights = np.exp(np.array(scores) - max(scores))
  return weights @ values / weights.sum()


@pytest.mark.parametrize('half_square', [145.0, 500.0, 5000.0])
def test_large_norms_are_finite_and_right(half_square):
  """`|y|^2 / 2` of hundreds, where the naive form is 0 / 0 in float32."""
  rng = np.random.default_rng(0)
  raw = rng.normal(size=(2 * N, D_K))
  norms = np.linalg.norm(raw, axis=1, keepdims=True)
  raw *= D_K**0.25 * math.sqrt(2 * half_square) / norms
  queries, keys = (jnp.asarray(x, jnp.float32) for x in np.split(raw, 2))
  values = jnp.asarray(rng.normal(size=(N, D_V)), jnp.float32)
  phi = POSITIVE(omega(np.float32))
  naive = jax.vmap(phi)(keys) @ phi(queries[0])
  assert not jnp.isfinite(naive @ values / jnp.sum(naive)).all()
  streamed = stream(phi, queries, keys, values, chunk_size=4)
  one_by_one = causal(phi, queries, keys, values, chunk_size=4)
  plain = wide(phi.projection, queries, keys, values)
  # Rounding of an exponent of that size, once in the key and in the query.
  atol = 64 * half_square * float(jnp.finfo(jnp.float32).eps)
  for t in range(N):
    rows = [
      (kernel_attention(phi, queries[t], keys, values), N),
      (streamed[t], N),
      (one_by_one[t], t + 1),
    ]
    for found, seen in rows:
      expected = log_space_oracle(
        plain[0], plain[1][t], plain[2][:seen], plain[3][:seen]
      )
      np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('scale', [1.0, 30.0])
def test_trigonometric_scale_never_overflows(scale):
  """`exp(|y|^2 / 2)` cancels between numerator and normaliser."""
  phi, _ = make('trigonometric', np.float32)
  queries, keys, values = make_tokens(np.float32, scale=scale)
  for output in (
    kernel_attention(phi, queries[0], keys, values),
    stream(phi, queries, keys, values, chunk_size=4),
    causal(phi, queries, keys, values, chunk_size=4),
  ):
    assert jnp.isfinite(output).all()


# Gradients.


@pytest.mark.parametrize(
  ('name', 'form'),
  [
    ('hyperbolic', 'kernel'),
    ('trigonometric', 'kernel'),
    ('positive', 'stream'),
    ('positive', 'causal'),
    ('trigonometric', 'causal'),
  ],
)
def test_gradients_are_those_of_finite_differences(name, form):
  """In all arguments, the projection included."""
  queries, keys, values = make_tokens(size=5)
  phi, _ = make(name)

  def attend(projection, queries, keys, values):
    phi_now = type(phi)(projection)
    if form == 'kernel':
      return attention.kernel_attention(phi_now, queries[0], keys, values)
    if form == 'stream':
      return attention.stream_kernel_attention(
        phi_now, queries, keys, values, chunk_size=2
      )
    return attention.causal_kernel_attention(
      phi_now, queries, keys, values, chunk_size=4
    )

  arguments = (phi.projection[:6], queries, keys, values)
  modes = ['fwd', 'rev'] if form == 'kernel' else ['rev']
  test_util.check_grads(jax.jit(attend), arguments, order=1, modes=modes)


@pytest.mark.parametrize('form', [stream, causal])
def test_gradients_stay_finite_at_large_norms(form):
  phi, _ = make('positive', np.float32)
  tokens = make_tokens(np.float32, scale=25.0)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
  def slopes(phi, *tokens):
    return jnp.sum(form(phi, *tokens, chunk_size=4) ** 2)

  for slope in jax.tree.leaves(slopes(phi, *tokens)):
    assert jnp.isfinite(slope).all()
    assert jnp.any(slope != 0)


def test_projection_can_be_learnt():
  """A step against the gradient in the projection lowers the error."""
  phi, _ = make('positive')
  queries, keys, values = make_tokens()
  goal = jax.vmap(lambda q: softmax_attention(q, keys, values))(queries)

  @jax.jit
  @jax.value_and_grad
  def error(phi):
    return jnp.mean((stream(phi, queries, keys, values) - goal) ** 2)

  before, slope = error(phi)
  phi = jax.tree.map(lambda x, g: x - 0.1 * g, phi, slope)
  assert error(phi)[0] < before


# Masks.


PHI, SIGNED_PHI = make('positive')[0], make('trigonometric')[0]
ONE_QUERY = {
  'softmax': lambda q, k, v, m: softmax_attention(q, k, v, mask=m),
  'feature': lambda q, k, v, m: kernel_attention(PHI, q, k, v, mask=m),
  'signed': lambda q, k, v, m: kernel_attention(SIGNED_PHI, q, k, v, mask=m),
  'kernel': lambda q, k, v, m: kernel_attention(
    kernels.ExponentialKernel(), q, k, v, mask=m
  ),
  'kernel_without_log': lambda q, k, v, m: kernel_attention(
    KERNELS['truncated'][0], q, k, v, mask=m
  ),
  'linear': lambda q, k, v, m: linear_attention(PHI, q, k, v, mask=m),
  'stream': lambda q, k, v, m: stream(PHI, q[None], k, v, chunk_size=4, mask=m)[
    0
  ],
  'causal': lambda q, k, v, m: causal(
    PHI,
    jnp.broadcast_to(q[None], k.shape),
    k,
    v,
    chunk_size=4,
    mask=m,
  )[-1],
}


@pytest.mark.parametrize('form', list(ONE_QUERY))
def test_masked_rows_may_hold_anything(form):
  """Outputs are those of the shorter sequence, and so are gradients."""
  attend = ONE_QUERY[form]
  queries, keys, values = make_tokens()
  keep = np.asarray(MASK)
  dirty_keys = jnp.where(MASK[:, None], keys, jnp.nan)
  dirty_values = jnp.where(MASK[:, None], values, jnp.inf)

  @functools.partial(jax.jit, static_argnums=4)
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def slopes(query, keys, values, mask, attend):
    output = attend(query, keys, values, mask)
    return jnp.sum(output**2), output

  (_, output), found = slopes(
    queries[0], dirty_keys, dirty_values, MASK, attend
  )
  (_, short), expected = slopes(
    queries[0], keys[keep], values[keep], None, attend
  )
  close(output, short)
  close(found[0], expected[0])
  for full, part in zip(found[1:], expected[1:], strict=True):
    close(full[keep], part)
    np.testing.assert_array_equal(full[~keep], 0)


@pytest.mark.parametrize('form', list(ONE_QUERY))
def test_nothing_visible_gives_zeros(form):
  queries, keys, values = make_tokens()
  hidden = jnp.zeros(N, bool)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def slopes(query, keys, values):
    output = ONE_QUERY[form](query, keys, values, hidden)
    return jnp.sum(output), output

  (_, output), found = slopes(queries[0], keys, values)
  np.testing.assert_array_equal(output, np.zeros(D_V))
  for slope in found:
    assert jnp.isfinite(slope).all()


# Heads and batches.


@pytest.mark.parametrize('form', [stream, causal])
def test_vmap_over_heads_and_batch_is_the_loop(form):
  """A projection for each head; tokens for each head and sequence."""
  draws = [[make_tokens(seed=2 * b + h) for h in range(2)] for b in range(3)]
  tokens = jax.tree.map(
    lambda *x: jnp.stack(x).reshape(3, 2, *x[0].shape),
    *(x for row in draws for x in row),
  )
  phis = POSITIVE(jnp.stack([omega(), omega()[::-1] * jnp.asarray(0.5, F64)]))
  heads = jax.vmap(functools.partial(form, chunk_size=4))
  batch = jax.jit(jax.vmap(heads, in_axes=(None, 0, 0, 0)))
  found = batch(phis, *tokens)
  assert found.shape == (3, 2, N, D_V)
  for b in range(3):
    for h in range(2):
      expected = form(POSITIVE(phis.projection[h]), *draws[b][h], chunk_size=4)
      close(found[b, h], expected)


# Memory.


def shapes_of(jaxpr):
  """Shapes of everything that a jaxpr computes, bodies included."""
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      if hasattr(var.aval, 'shape'):
        yield var.aval.shape
    for param in jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      body = getattr(param, 'jaxpr', param)
      if hasattr(body, 'eqns'):
        yield from shapes_of(body)


@pytest.mark.parametrize('with_gradient', [False, True])
def test_stream_holds_nothing_quadratic(with_gradient):
  """Neither `[N, R]` nor `[M, N]`, in the backward pass either."""
  num_keys, num_queries, num_features, chunk_size = 4096, 2048, 64, 128
  struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  phi = POSITIVE(struct((num_features, D_K)))
  tokens = [
    struct((rows, width))
    for rows, width in (
      (num_queries, D_K),
      (num_keys, D_K),
      (num_keys, D_V),
    )
  ]

  def attend(phi, *tokens, chunk_size=chunk_size):
    return jnp.sum(
      attention.stream_kernel_attention(phi, *tokens, chunk_size=chunk_size)
    )

  def largest(fn):
    jaxpr = jax.make_jaxpr(fn)(phi, *tokens).jaxpr
    return max(math.prod(shape) for shape in shapes_of(jaxpr))

  def wrap(fn):
    return jax.grad(fn, argnums=(0, 1, 2, 3)) if with_gradient else fn

  # Inputs (with the copy that splits them) and the state of every chunk.
  held = max(num_keys * D_K, num_keys // chunk_size * num_features * D_V)
  limit = 2 * held
  assert limit < num_queries * num_features < num_keys * num_features
  assert largest(wrap(attend)) <= limit
  # The walk finds what is quadratic: one chunk of everything.
  whole = functools.partial(attend, chunk_size=num_keys)
  assert largest(wrap(whole)) >= num_keys * num_features


@pytest.mark.parametrize('size', [1e5, 1e7, 1e9])
@pytest.mark.parametrize('shape', [(64, 7, 6), (1, 16, 8), (2, 1500, 24)])
def test_compiled_softmax_of_huge_scores_picks_the_largest(size, shape):
  num_queries, num_keys, width = shape
  rng = np.random.default_rng(0)
  queries = jnp.asarray(size * rng.normal(size=(num_queries, width)), 'float32')
  keys = jnp.asarray(size * rng.normal(size=(num_keys, width)), 'float32')
  values = jnp.asarray(rng.normal(size=(num_keys, 3)), 'float32')
  wide = np.asarray(queries, 'float64') @ np.asarray(keys, 'float64').T
  expected = np.asarray(values)[np.argmax(wide, axis=1)]
  phi = kernels.ExponentialKernel()
  for fn in (
    attention.softmax_attention,
    functools.partial(attention.kernel_attention, phi),
  ):
    answer = jax.jit(jax.vmap(fn, in_axes=(0, None, None)))
    np.testing.assert_array_equal(answer(queries, keys, values), expected)
