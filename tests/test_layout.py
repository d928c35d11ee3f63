"""The layout door: `[B, T, N, H]`, for every attention of the library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from iclcl_jax import attention, features, kernels, losses, modified
from tests import oracles, tolerances

B, T, S, N, K, H = 2, 6, 5, 4, 2, 3
SOFTMAX = kernels.ExponentialKernel()
ELU = features.EluPlusOneFeatures()
FROM_LOSS = functools.partial(modified.attention_from_loss(losses.squared), ELU)
WAYS = {
  'map': ELU,
  'kernel': SOFTMAX,
  'loss': FROM_LOSS,
  'regularised': functools.partial(modified.regularised(strength=0.3), ELU),
}


def normal(seed, *shape, dtype='float64'):
  array = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(array, dtype)


def arrays(dtype='float64', size=S, heads=K, batch=(B,), width=H):
  """Query, key and value of grouped heads."""
  return (
    normal(0, *batch, T, N, H, dtype=dtype),
    normal(1, *batch, size, heads, H, dtype=dtype),
    normal(2, *batch, size, heads, width, dtype=dtype),
  )


def random_mask(*shape):
  """Every query sees the first key."""
  mask = np.random.default_rng(3).random(shape) < 0.6
  mask[..., 0] = True
  return jnp.asarray(mask)


LENGTHS = jnp.array([3, 5], jnp.int32)
# Arguments of the exact softmax, and the sizes it is tried on.
OPTIONS = {
  'plain': {},
  'bias': {'bias': normal(4, B, N, T, S)},
  'shared bias': {'bias': normal(4, 1, 1, T, S)},
  'mask': {'mask': random_mask(B, N, T, S)},
  'padding': {'mask': random_mask(B, 1, 1, S)},
  'mask of rank 2': {'mask': random_mask(T, S)},
  'masked rows': {'mask': random_mask(B, N, T, S).at[:, :, 2].set(False)},
  'scale': {'scale': 0.7},
  'causal': {'is_causal': True},
  'window': {'local_window_size': (2, 1)},
  'symmetric window': {'local_window_size': 2},
  'key lengths': {'key_value_seq_lengths': LENGTHS},
  'query lengths': {'query_seq_lengths': LENGTHS},
  'all': {
    'bias': normal(4, B, 1, T, S),
    'mask': random_mask(1, N, T, S),
    'scale': 0.3,
    'is_causal': True,
    'query_seq_lengths': LENGTHS,
    'key_value_seq_lengths': LENGTHS,
    'local_window_size': (3, 0),
  },
}
every_option = pytest.mark.parametrize('name', OPTIONS)


def visible(size, mask=None, **options):
  """Who sees whom, as the documentation of `jax.nn` says."""
  seen = np.ones((B, N, T, size), bool)
  if mask is not None:
    seen = seen & np.asarray(mask)
  distance = np.arange(T)[:, None] - np.arange(size)
  if options.get('is_causal'):
    seen &= distance >= 0
  window = options.get('local_window_size')
  if window is not None:
    left, right = (window, window) if isinstance(window, int) else window
    seen &= (distance <= left) & (distance >= -right)
  lengths = options.get('key_value_seq_lengths')
  if lengths is not None:
    seen &= np.arange(size) < np.asarray(lengths)[:, None, None, None]
  return seen


def oracle(query, key, value, bias=None, scale=None, **options):
  """Flax Linen's, which is right in float64, unlike that of `jax.nn`."""
  scale = 1 if scale is None else scale * query.shape[-1] ** 0.5
  groups = query.shape[-2] // key.shape[-2]
  output = linen.dot_product_attention(
    query * scale,
    *(jnp.repeat(x, groups, axis=-2) for x in (key, value)),
    bias=bias if bias is None else jnp.broadcast_to(bias, (B, N, T, S)),
    mask=jnp.asarray(visible(key.shape[-3], **options)),
    precision='highest',
  )
  lengths = options.get('query_seq_lengths')
  if lengths is None:
    return output
  valid = jnp.arange(T, dtype='int32')[None] < lengths[:, None]
  return jnp.where(valid[..., None, None], output, 0)


def with_slopes(fn, *inputs):
  """Returns the output, and the slopes of a number made of it."""

  def total(*inputs):
    output = fn(*inputs)
    weights = normal(5, *output.shape, dtype=output.dtype)
    return jnp.sum(weights * output), output

  slopes, output = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*inputs)
  return output, *slopes


def assert_close(found, expected, tolerance):
  for a, b in zip(found, expected, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@every_option
def test_the_exact_softmax_is_that_of_jax(name):
  options = dict(OPTIONS[name])
  inputs = arrays('float32')
  if 'bias' in options:
    options['bias'] = options['bias'].astype('float32')
  ours = functools.partial(attention.dot_product_attention, **options)
  if options.get('mask') is not None and options['mask'].ndim == 2:
    options['mask'] = options['mask'][None, None]
  found = with_slopes(ours, *inputs)
  if 'local_window_size' in options:  # jax 0.7 forgets one that stands alone.
    options.setdefault('mask', jnp.ones((1, 1, T, S), bool))
  with jax.numpy_dtype_promotion('standard'):
    theirs = functools.partial(jax.nn.dot_product_attention, **options)
    assert_close(found, with_slopes(theirs, *inputs), 1e-6)


@every_option
@pytest.mark.parametrize('width', [H, 2])
def test_the_exact_softmax_is_right_in_float64(name, width):
  inputs = arrays(width=width)
  ours = functools.partial(attention.dot_product_attention, **OPTIONS[name])
  expected = with_slopes(functools.partial(oracle, **OPTIONS[name]), *inputs)
  assert_close(with_slopes(ours, *inputs), expected, 1e-14)


@every_option
def test_the_softmax_kernel_honours_what_is_no_bias(name):
  if 'bias' in OPTIONS[name] and len(OPTIONS[name]) == 1:
    pytest.skip('a bias belongs to the exact softmax')
  options = {k: v for k, v in OPTIONS[name].items() if k != 'bias'}
  inputs = arrays()
  ours = functools.partial(attention.dot_product_attention, attend=SOFTMAX)
  found = with_slopes(functools.partial(ours, **options), *inputs)

  def expected(*inputs):
    seen = jnp.asarray(visible(S, **options).any(-1))
    seen = jnp.swapaxes(seen, 1, 2)[..., None]
    return jnp.where(seen, oracle(*inputs, **options), 0)

  assert_close(found, with_slopes(expected, *inputs), 1e-13)


@functools.partial(jax.jit, static_argnums=(0, 5))
def by_hand(way, query, key, value, mask, is_causal):
  """The door of one query, for every token, head and sequence."""
  fn = way
  if not isinstance(way, functools.partial):
    fn = functools.partial(attention.kernel_attention, way)
  groups = query.shape[-2] // key.shape[-2]
  key, value = (jnp.repeat(x, groups, axis=-2) for x in (key, value))
  past = jnp.tril(jnp.ones((1, T, T), bool), 0 if is_causal else T)
  mask = jnp.broadcast_to(mask[:, 0] & past, (B, T, T))
  tokens = jax.vmap(lambda q, k, v, m: fn(q, k, v, mask=m), (0, None, None, 0))
  heads = jax.vmap(tokens, (1, 1, 1, None), 1)
  return jax.vmap(heads)(query, key, value, mask)


@pytest.mark.parametrize('is_causal', [False, True])
@pytest.mark.parametrize('name', [n for n in WAYS if n != 'regularised'])
def test_every_way_is_its_door_of_one_query(name, is_causal):
  query, key, value = arrays(size=T, width=2)
  mask = random_mask(B, 1, 1, T)
  expected = by_hand(WAYS[name], query, key, value, mask, is_causal)
  door = functools.partial(
    attention.dot_product_attention, attend=WAYS[name], is_causal=is_causal
  )
  found = jax.jit(door)(query, key, value, mask=mask)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  # The same mask in other words.
  lower = jnp.tril(jnp.ones((T, T), bool))[None, None]
  full = mask & lower if is_causal else jnp.broadcast_to(mask, (B, 1, T, T))
  again = attention.dot_product_attention(
    query, key, value, mask=full, attend=WAYS[name]
  )
  np.testing.assert_allclose(again, expected, rtol=1e-12)
  one = door(query[0], key[0], value[0], mask=mask[0], chunk_size=2)
  np.testing.assert_allclose(one, expected[0], rtol=1e-12)
  more = (x[None] for x in (query, key, value, mask))
  found = jax.jit(lambda q, k, v, m: door(q, k, v, mask=m))(*more)
  np.testing.assert_allclose(found[0], expected, rtol=1e-12)


def test_a_traced_causal_mask_is_read_beside_is_causal_alone():
  query, key, value = arrays(size=T)
  mask = random_mask(B, 1, 1, T) & jnp.tril(jnp.ones((T, T), bool))[None, None]
  door = functools.partial(attention.dot_product_attention, attend=ELU)
  expected = door(query, key, value, mask=mask)
  causal = jax.jit(functools.partial(door, is_causal=True))
  np.testing.assert_allclose(
    causal(query, key, value, mask=mask), expected, rtol=1e-12
  )
  other = mask.at[:, :, -1, 1].set(~mask[:, :, -1, 1])
  assert np.all(np.isnan(causal(query, key, value, mask=other)))
  with pytest.raises(ValueError, match='mask differs from query to query'):
    jax.jit(door)(query, key, value, mask=mask)


@pytest.mark.parametrize('name', [None, *WAYS])
def test_padded_rows_take_no_part(name):
  inputs = arrays(size=T)
  options = {
    'attend': WAYS.get(name),
    'query_seq_lengths': LENGTHS,
    'key_value_seq_lengths': LENGTHS,
    'is_causal': name is None,
  }
  fn = functools.partial(attention.dot_product_attention, **options)
  padded = [x.at[0, 3:].set(jnp.nan) for x in inputs]
  found, expected = with_slopes(fn, *padded), with_slopes(fn, *inputs)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a[0, :3], b[0, :3], rtol=1e-12)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-12)
    np.testing.assert_array_equal(a[0, 3:], 0)


def test_scale_is_the_factor_of_the_score():
  query, key, value = arrays()
  phi = features.TaylorFeatures(order=2)
  found = attention.dot_product_attention(
    query, key, value, attend=phi, scale=0.2
  )
  kernel = oracles.truncated_exponential(2)
  expected = attention.dot_product_attention(
    0.2 * H**0.5 * query, key, value, attend=kernel
  )
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize('half', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', [None, *WAYS])
def test_half_precision_and_vmap(name, half):
  door = functools.partial(
    attention.dot_product_attention, attend=WAYS.get(name), is_causal=True
  )
  inputs = arrays('float32', size=T)
  expected = jax.jit(door)(*inputs)
  found = jax.jit(door)(*(x.astype(half) for x in inputs))
  assert found.dtype == half
  np.testing.assert_allclose(
    found.astype('float32'), expected, atol=4 * tolerances.IDENTITY['bfloat16']
  )
  one = jax.jit(jax.vmap(door))(*inputs)
  np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


ERRORS = {
  'bias is given': {'attend': ELU, 'bias': jnp.zeros((T, S))},
  'local_window_size is': {'attend': FROM_LOSS, 'local_window_size': 2},
  'mask differs from': {'attend': ELU, 'mask': random_mask(B, N, T, S)},
  'is_causal is set for 6': {'attend': ELU, 'is_causal': True},
  'without a feature map': {'attend': modified.regularised(strength=1.0)},
  'attend is an int': {'attend': 3},
  'scale is -1': {'attend': ELU, 'scale': -1.0},
  'mask has shape': {'mask': random_mask(T, S + 1)},
  'mask has dtype': {'mask': jnp.ones((T, S))},
  'key_value_seq_lengths is': {'key_value_seq_lengths': LENGTHS[:1]},
  'chunk_size is 0': {'attend': ELU, 'chunk_size': 0},
  r'local_window_size is \(1, 2, 3\)': {'local_window_size': (1, 2, 3)},
  'local_window_size is 1.5': {'local_window_size': 1.5},
  "scale is 'a'": {'scale': 'a'},
  'scale is nan': {'scale': float('nan')},
}


@pytest.mark.parametrize('message', ERRORS)
def test_what_cannot_be_honoured_is_an_error(message):
  with pytest.raises(ValueError, match=message):
    attention.dot_product_attention(*arrays(), **ERRORS[message])


def test_arrays_that_do_not_fit_are_errors():
  query, key, value = arrays()
  for bad, message in (
    ((query, key.swapaxes(1, 2), value), 'tokens before heads'),
    ((query[:, :, :3], key, value), 'heads that those of key divide'),
    ((query, key[0], value), 'key has shape'),
    ((query, key, value.astype('float32')), 'dtypes disagree'),
    ((query, key.astype(int), value), 'key has dtype'),
  ):
    with pytest.raises(ValueError, match=message):
      attention.dot_product_attention(*bad)


@pytest.mark.parametrize('attend', [None, features.EluPlusOneFeatures()])
def test_no_queries_get_no_outputs(attend):
  x = jnp.ones((2, 6, 2, 8))
  door = functools.partial(attention.dot_product_attention, attend=attend)
  assert door(x[:, :0], x, x).shape == (2, 0, 2, 8)
  assert door(x[:0], x[:0], x[:0]).shape == (0, 6, 2, 8)
