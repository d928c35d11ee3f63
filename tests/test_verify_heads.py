"""Attention of other people's models, head by head: certified, or told why."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from iclcl_jax import (
  attention,
  equivalence,
  features,
  kernels,
  layers,
  losses,
  modified,
  precision,
)
from tests import tolerances

SIZE, WIDTH, HEADS, BATCH = 6, 16, 4, 2
LIMIT = tolerances.IDENTITY['float32']
LOWER = np.tril(np.ones((SIZE, SIZE), bool))
PADDED = (np.arange(SIZE) < 4)[None, None, None]
DISTANCE = np.abs(np.subtract.outer(np.arange(SIZE), np.arange(SIZE)))
SLOPES = 2.0 ** (-8 * np.arange(1, HEADS + 1) / HEADS)
ALIBI = np.float32(-SLOPES[None, :, None, None] * DISTANCE)


def tokens(groups=HEADS, dtype=jnp.float32):
  """Queries, keys and values in the layout of jax.nn."""
  shapes = [(BATCH, SIZE, heads, 4) for heads in (HEADS, groups, groups)]
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = map(jax.random.normal, keys, shapes)
  return [(2 * x).astype(dtype) for x in arrays]


def by_hand(q, k, v, *, bias=0.0, scale=0.5, cap=None, weigh=jax.nn.softmax):
  """Attention with what people put into it."""
  scores = jnp.einsum('btnh,bsnh->bnts', q, k) * scale + bias
  scores = scores if cap is None else cap * jnp.tanh(scores / cap)
  return jnp.einsum('bnts,bsnh->btnh', weigh(scores), v)


STATED = {
  'plain': {},
  'causal': {'is_causal': True},
  'mask': {'mask': LOWER[None, None]},
  'padding': {'mask': PADDED},
  'scale': {'scale': 1.0},
  'bias': {'bias': ALIBI},
  'hiding': {'bias': np.where(LOWER, 0, -np.inf).astype('f4')[None, None]},
  'all': {'is_causal': True, 'mask': PADDED, 'scale': 0.3, 'bias': ALIBI},
}


@pytest.mark.parametrize('groups', [HEADS, 2])
@pytest.mark.parametrize('name', STATED)
def test_what_is_stated_holds_and_a_wrong_head_is_named(name, groups):
  q, k, v = tokens(groups)
  h = jax.nn.dot_product_attention(q, k, v, **STATED[name])
  certificate = equivalence.verify_heads(q, k, v, h, **STATED[name])
  assert certificate.holds, str(certificate)
  assert np.max(certificate.residual) <= LIMIT == certificate.tolerance
  assert certificate.sizes == (BATCH, HEADS, SIZE, SIZE)
  wrong = h.at[1, 3, 2].add(0.01)
  certificate = equivalence.verify_heads(q, k, v, wrong, **STATED[name])
  assert certificate.verdict.startswith('fails: ')
  assert np.flatnonzero(certificate.residual > LIMIT).tolist() == [2]


def share(scores):
  weights = jax.nn.relu(scores) + 1e-3
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def sink(scores):
  weights = jnp.exp(scores)
  return weights / (1 + jnp.sum(weights, axis=-1, keepdims=True))


def drop(scores):
  kept = jax.random.bernoulli(jax.random.key(0), 0.5, scores.shape)
  return jnp.where(kept, 2 * jax.nn.softmax(scores), 0)


# What a model may compute where plain softmax is stated, and what it is told.
UNSTATED = {
  'scale': ({'scale': 1.0}, 'that of scale=1.0'),
  'scale by width': ({'scale': 1 / 4}, r'scale=1 / '),
  'alibi': ({'bias': ALIBI}, 'that of ALiBi, bias='),
  'causal': (
    {'bias': np.where(LOWER, 0, -1e9).astype('f4')[None, None]},
    'is_causal=True',
  ),
  'bias': ({'bias': np.sin(9 * ALIBI)}, 'state a bias'),
  'cap': ({'cap': 30.0}, 'log_kernel 30'),
  'relu': ({'weigh': share}, 'another activation'),
  'sink': ({'weigh': sink}, 'an attention sink'),
  'sigmoid': ({'weigh': jax.nn.sigmoid}, 'no mean of the values'),
  'dropout': ({'weigh': drop}, 'dropout is on'),
}


@pytest.mark.parametrize('name', UNSTATED)
def test_what_is_not_stated_fails_and_is_told(name):
  options, message = UNSTATED[name]
  q, k, v = tokens()
  certificate = equivalence.verify_heads(q, k, v, by_hand(q, k, v, **options))
  assert certificate.verdict.startswith('fails: ')
  assert message in certificate.verdict
  assert not certificate.holds


ELU = features.EluPlusOneFeatures()
SOFTMAX = kernels.ExponentialKernel()


@losses.sum_over_demonstrations
def margin(predictions, values):
  return jnp.sum(jax.nn.softplus(1 - predictions * values))


def from_loss(loss, **options):
  return functools.partial(modified.attention_from_loss(loss, **options), ELU)


@pytest.mark.parametrize(
  ('attention_fn', 'is_causal'),
  [
    (functools.partial(attention.causal_kernel_attention, ELU), True),
    (functools.partial(attention.stream_kernel_attention, SOFTMAX), False),
    (functools.partial(modified.attention_from_loss(margin).causal, ELU), True),
  ],
)
def test_the_layer_of_the_library_is_captured(attention_fn, is_causal):
  layer = layers.MultiHeadAttention(
    attention_fn, num_heads=2, key_dim=4, value_dim=3
  )
  x = jax.random.normal(jax.random.key(1), (BATCH, SIZE, WIDTH), 'f4')
  model = layers.as_nnx(layer, x, rngs=nnx.Rngs(0))
  with equivalence.capture() as calls:
    model(x)
  (call,) = calls
  assert call['is_causal'] == is_causal
  assert equivalence.verify_heads(**call).holds


FROM_MARGIN = from_loss(margin, learning_rate=0.3)


@pytest.mark.parametrize(
  ('settings', 'with_record'),
  [
    ({'is_causal': True, 'scale': 0.3}, False),
    ({'attend': ELU, 'is_causal': True, 'scale': 0.3}, False),
    ({'attend': ELU, 'is_causal': True, 'scale': 0.3}, True),
    ({'attend': kernels.GaussianKernel()}, False),
    ({'attend': FROM_MARGIN, 'is_causal': True}, False),
    ({'attend': FROM_MARGIN, 'is_causal': True}, True),
    ({'attend': from_loss(losses.info_nce()), 'is_causal': True}, False),
  ],
)
def test_attention_of_the_library_says_itself_what_it_is(settings, with_record):
  calls, fn = [], layers.as_attention_fn(**settings)
  model = nnx.MultiHeadAttention(
    HEADS,
    WIDTH,
    decode=False,
    rngs=nnx.Rngs(0),
    attention_fn=equivalence.record(fn, calls) if with_record else fn,
  )
  x = jax.random.normal(jax.random.key(1), (BATCH, SIZE, WIDTH), 'f4')
  if with_record:
    model(x)
  else:
    with equivalence.capture(model) as calls:
      model(x)
  (call,) = calls
  certificate = equivalence.verify_heads(**call)
  assert certificate.holds, str(certificate)
  assert not equivalence.verify_heads(
    **call | {'phi': SOFTMAX, 'scale': 1}
  ).holds


def test_a_loss_that_is_wrongly_stated_is_told():
  q, k, v = tokens()
  h = attention.dot_product_attention(q, k, v)
  for wrong in {'loss': margin}, {'learning_rate': 2.0}:
    certificate = equivalence.verify_heads(q, k, v, h, **wrong)
    assert certificate.verdict.endswith(
      'is that of loss=losses.contrastive, learning_rate=1.0'
    )
  h = attention.dot_product_attention(q, k, v, attend=FROM_MARGIN)
  certificate = equivalence.verify_heads(q, k, v, h)
  assert 'by loss=' in certificate.verdict or 'as loss=' in certificate.verdict


def test_one_token_at_a_time_is_captured_with_what_it_sees():
  model = nnx.MultiHeadAttention(
    HEADS,
    WIDTH,
    decode=True,
    rngs=nnx.Rngs(0),
    attention_fn=layers.as_attention_fn(ELU, is_causal=True),
  )
  model.init_cache((BATCH, SIZE, WIDTH), jnp.float32)
  with (
    jax.numpy_dtype_promotion('standard'),
    equivalence.capture(model) as calls,
  ):
    for token in jax.random.normal(jax.random.key(1), (3, BATCH, 1, WIDTH)):
      model(token.astype(jnp.float32))
  found = [equivalence.verify_heads(**call) for call in calls]
  assert all(x.holds for x in found)
  verdicts = [x.verdict for x in found]
  assert verdicts[0].startswith('holds, untested')  # It sees itself alone.
  assert verdicts[1:] == ['holds'] * 2


def test_a_mask_that_is_not_stated_is_told_under_any_map():
  q, k, v = tokens()
  h = attention.dot_product_attention(q, k, v, attend=ELU, is_causal=True)
  certificate = equivalence.verify_heads(q, k, v, h, phi=ELU)
  assert certificate.verdict == 'fails: the output is that of is_causal=True'


@pytest.mark.parametrize('phi', [ELU, kernels.GaussianKernel()])
def test_other_maps_and_kernels(phi):
  q, k, v = tokens()
  attend = functools.partial(attention.causal_kernel_attention, phi)
  heads = jax.vmap(attend, in_axes=1, out_axes=1)
  h = jax.vmap(heads)(q, k, v)
  check = functools.partial(equivalence.verify_heads, q, k, v, h)
  certificate = check(phi=phi, is_causal=True)
  assert certificate.holds, str(certificate)
  plain = check(is_causal=True)
  assert plain.verdict.startswith('fails: ')
  assert ('phi=features.EluPlusOneFeatures()' in plain.verdict) == (phi is ELU)


class Nnx(nnx.Module):
  """Two layers of attention."""

  def __init__(self, **options):
    make = functools.partial(
      nnx.MultiHeadAttention, HEADS, WIDTH, decode=False, **options
    )
    self.first, self.second = make(rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(1))

  def __call__(self, x):
    for layer in (self.first, self.second):
      x = x + layer(x, mask=LOWER[None, None])
    return x


class Linen(linen.Module):
  """The same in Linen, with remat, which traces."""

  options: dict

  @linen.compact
  def __call__(self, x):
    mask = linen.make_causal_mask(x[..., 0])
    for _ in range(2):
      layer = linen.remat(linen.MultiHeadDotProductAttention)
      x = x + layer(HEADS, **self.options)(x, mask=mask)
    return x


def train(forward, params, x, y):
  """Takes a few steps; returns the trained parameters."""
  slope = jax.jit(
    jax.grad(lambda params: jnp.mean((forward(params, x) - y) ** 2))
  )
  for _ in range(5):
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope(params))
  return params


def nnx_model(x, y, **options):
  graph, params = nnx.split(Nnx(**options))
  params = train(lambda p, x: nnx.merge(graph, p)(x), params, x, y)
  model = nnx.merge(graph, params)
  forward = nnx.jit(lambda model, x: model(x))
  return [model], lambda: forward(model, x)


def linen_model(x, y, **options):
  model = Linen(options)
  params = train(model.apply, model.init(jax.random.key(0), x), x, y)
  forward = jax.jit(model.apply)
  return [], lambda: forward(params, x)


def equinox_model(x, y):
  eqx = pytest.importorskip('equinox')
  make = functools.partial(eqx.nn.MultiheadAttention, dtype=jnp.float32)
  model = [make(HEADS, WIDTH, key=jax.random.key(i)) for i in range(2)]
  params, static = eqx.partition(model, eqx.is_array)

  def forward(params, x):
    for layer in eqx.combine(params, static):
      x = x + jax.vmap(lambda x, layer=layer: layer(x, x, x, mask=LOWER))(x)
    return x

  params = train(forward, params, x, y)
  forward = jax.jit(forward)
  return [], lambda: forward(params, x)


def mean_of_relu(query, key, value, **_):
  return by_hand(query, key, value, weigh=share)


def with_alibi(query, key, value, mask=None, **_):
  return jax.nn.dot_product_attention(query, key, value, ALIBI, mask != 0)


MODELS = {'nnx': nnx_model, 'linen': linen_model, 'equinox': equinox_model}


@pytest.mark.parametrize(
  ('name', 'attention_fn'),
  [
    *((name, None) for name in MODELS),
    *((n, fn) for n in ('nnx', 'linen') for fn in (mean_of_relu, with_alibi)),
  ],
)
def test_a_trained_model_is_certified_or_caught(name, attention_fn):
  x, y = jax.random.normal(jax.random.key(1), (2, BATCH, SIZE, WIDTH), 'f4')
  options = {} if attention_fn is None else {'attention_fn': attention_fn}
  models, forward = MODELS[name](x, jnp.cumsum(y, axis=1), **options)
  before = forward()
  with equivalence.capture(*models) as calls:
    during = forward()
  np.testing.assert_allclose(during, before, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(forward(), before)
  assert len(calls) == 2
  assert not np.allclose(calls[0]['query'], calls[1]['query'])
  for call in calls:
    certificate = equivalence.verify_heads(**call)
    assert certificate.sizes == (BATCH, HEADS, SIZE, SIZE)
    if attention_fn is None:
      assert certificate.holds, str(certificate)
      assert np.max(certificate.residual) <= LIMIT
    else:
      assert certificate.verdict.startswith('fails: ')
    if attention_fn is with_alibi:
      assert 'ALiBi' in certificate.verdict
      assert equivalence.verify_heads(**call | {'bias': ALIBI}).holds


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_16_bits_limit_the_verdict(dtype):
  q, k, v = tokens(dtype=dtype)
  for attend in (jax.nn.dot_product_attention, linen.dot_product_attention):
    with jax.numpy_dtype_promotion('standard'):
      h = attend(q, k, v)
    certificate = equivalence.verify_heads(q, k, v, h)
    assert certificate.verdict == 'precision-limited', str(certificate)
    assert certificate.dtype == dtype
  wrong = by_hand(q, k, v, weigh=share)
  assert 'fails' in equivalence.verify_heads(q, k, v, wrong).verdict


def test_reduced_arithmetic_limits_the_verdict():
  arithmetic = precision.PLATFORM_DEFAULT
  q, k, v = tokens()
  h = jax.nn.dot_product_attention(q, k, v)
  certificate = equivalence.verify_heads(q, k, v, h, arithmetic=arithmetic)
  assert certificate.verdict == 'precision-limited', str(certificate)
  assert certificate.precision == arithmetic.name


def test_some_queries_bound_the_cost():
  q, k, v = tokens()
  h = jax.nn.dot_product_attention(q, k, v).at[:, 1].set(9)
  check = functools.partial(equivalence.verify_heads, q, k, v)
  certificate = check(h, num_queries=2)  # The first and the last.
  assert certificate.holds
  assert certificate.sizes == (BATCH, HEADS, 2, SIZE)
  assert not check(h).holds
  assert not check(h.at[:, -1].set(9), num_queries=2).holds


def test_what_cannot_be_judged():
  q, k, v = tokens()
  mask = np.broadcast_to(PADDED, (1, 1, SIZE, SIZE)).copy()
  mask[0, 0, 5] = False
  h = jax.nn.dot_product_attention(q, k, v, mask=mask)
  check = functools.partial(equivalence.verify_heads, mask=mask)
  spoilt = k.at[:, 4:].set(jnp.nan)
  assert check(q, spoilt, v, h.at[:, 5].set(9)).holds  # Sees nothing.
  bad = h.at[0, 0, 0, 0].set(jnp.inf)
  assert check(q, k, v, bad).verdict == 'not finite: output'
  nothing = check(q, k, v, h, mask=np.zeros((1, 1), bool))
  assert nothing.verdict == 'no visible token'


def test_equal_values_test_nothing():
  q, k, v = tokens()
  same = jnp.broadcast_to(v[:, :1], v.shape)
  check = functools.partial(equivalence.verify_heads, q, k, phi=ELU)
  assert check(same, same).verdict.startswith(
    'holds, untested: values of a query'
  )
  assert check(same, same + 1).verdict.startswith('fails')
  # One query that sees two values is enough.
  other = same.at[:, 1].add(1)
  mask = np.eye(SIZE, dtype=bool)[None, None]
  assert check(other, other, mask=mask).verdict.startswith('holds, untested')
  mask = mask.copy()
  mask[..., 2, 1] = True
  h = jax.nn.dot_product_attention(q, k, other, mask=mask)
  assert check(other, h, mask=mask).verdict.startswith('fails')
  h = attention.dot_product_attention(
    q, k, other, attend=kernels.ExponentialKernel(), mask=mask
  )
  assert equivalence.verify_heads(q, k, other, h, mask=mask).holds


def test_the_softmax_and_swapped_axes_are_told():
  q, k, v = tokens()
  h = jax.nn.dot_product_attention(q, k, v)
  verdict = equivalence.verify_heads(q, k, v, h, phi=ELU).verdict
  assert verdict.endswith('phi=kernels.ExponentialKernel(), the exact softmax')
  swapped = [jnp.swapaxes(x, 1, 2) for x in (q, k, v, h)]
  verdict = equivalence.verify_heads(*swapped).verdict
  assert 'the axes may be [B, H, T, D]' in verdict


def test_a_certificate_is_plain_data_and_short():
  q, k, v = tokens()
  certificate = equivalence.verify_heads(q, k, v, v)
  plain = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
  assert plain['holds'] is False
  assert len(plain['residual']) == HEADS
  assert plain['sizes'] == [BATCH, HEADS, SIZE, SIZE]
  assert repr(certificate) == str(certificate)
  assert certificate.verdict in str(certificate)


def test_a_handful_of_programs_and_none_the_second_time(caplog):
  q, k, v = tokens()
  q, k, v = (x[:, :5, :, :3] for x in (q, k, v))  # A shape of its own.
  h = v + 1
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    for most in (4, 0):  # Sorted, measured, guesses; whether it is finite.
      caplog.clear()
      equivalence.verify_heads(q, k, v, h)
      found = [r for r in caplog.records if 'Compiling' in r.getMessage()]
      assert len(found) <= most, [r.getMessage() for r in found]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'query': jnp.ones((3, 4))}, 'query has shape'),
    ({'query': jnp.ones((2, 6, 4, 4), int)}, 'query has dtype int'),
    ({'key': jnp.ones((2, 6, 4, 5), 'f4')}, 'have shapes'),
    ({'value': jnp.ones((2, 7, 4, 4), 'f4')}, 'have shapes'),
    ({'output': jnp.ones((1, 6, 4, 4), 'f4')}, 'output is float32'),
    ({'mask': np.ones((6, 5), bool)}, r'mask has shape \[6, 5\]'),
    ({'mask': np.ones((6, 6), 'f4')}, 'mask has dtype float32'),
    ({'bias': np.ones((6, 6), bool)}, 'bias has dtype bool'),
    ({'scale': 1.0, 'phi': ELU}, 'scale is given with an EluPlusOne'),
    ({'bias': ALIBI, 'phi': ELU}, 'bias is given with an EluPlusOne'),
    ({'num_queries': 0}, 'num_queries is 0'),
    ({'arithmetic': 'highest'}, 'arithmetic is a str'),
  ],
)
def test_wrong_arguments_are_named(change, message):
  names = 'query', 'key', 'value', 'output'
  q, k, v = tokens()
  arguments = dict(zip(names, (q, k, v, v), strict=True)) | change
  with pytest.raises(ValueError, match=f'(?i){message}'):
    equivalence.verify_heads(**arguments)


def test_heads_that_do_not_divide_and_tracers_are_refused():
  q, k, v = tokens(groups=3)
  with pytest.raises(ValueError, match='4 heads and key'):
    equivalence.verify_heads(q, k, v, q)
  with pytest.raises(ValueError, match='capture collect'):
    jax.jit(lambda q: equivalence.verify_heads(q, k, v, q).tolerance)(q)


def one_head(query, keys, values, mask=None):
  scores = query @ keys.T / 2
  scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
  return jax.nn.softmax(scores) @ values


@pytest.mark.parametrize('transform', [jax.jit, lambda f: f, jax.grad])
def test_recording_under_transformations(transform):
  q, k, v = tokens()
  calls = []
  attend = equivalence.record(one_head, calls)
  heads = jax.vmap(attend, in_axes=(1, 1, 1, None), out_axes=1)
  batch = jax.vmap(heads, in_axes=(0, 0, 0, None))
  if transform is jax.grad:
    slope = jax.grad(lambda q: jnp.sum(batch(q, k, v, LOWER)))(q)
    plain = jax.grad(
      lambda q: jnp.sum(
        by_hand(
          q, k, v, bias=jnp.where(LOWER, 0, -jnp.inf).astype('f4')[None, None]
        )
      )
    )(q)
    np.testing.assert_allclose(slope, plain, atol=1e-5)
  else:
    transform(batch)(q, k, v, LOWER).block_until_ready()
  (call,) = calls
  np.testing.assert_array_equal(call['query'], q)
  certificate = equivalence.verify_heads(**call)
  assert certificate.holds, str(certificate)
  assert certificate.sizes == (BATCH, HEADS, SIZE, SIZE)
  attend(q[0, :, 0], k[0, :, 0], v[0, :, 0], LOWER)
  assert equivalence.verify_heads(**calls[1]).holds


@pytest.mark.parametrize(
  'options',
  [
    {'local_window_size': 1, 'mask': PADDED},
    {'local_window_size': (2, 0), 'is_causal': True},
    {'key_value_seq_lengths': np.array([2, 5], np.int32), 'scale': 0.7},
    {'query_seq_lengths': np.array([2, 5], np.int32), 'is_causal': True},
    {'bias': ALIBI, 'mask': PADDED},
  ],
)
@pytest.mark.parametrize('module', [jax.nn, attention])
def test_capture_knows_the_options_of_jax(module, options):
  with jax.numpy_dtype_promotion('standard'), equivalence.capture() as calls:
    module.dot_product_attention(*tokens(), **options)
  with jax.numpy_dtype_promotion('standard'):
    attend = functools.partial(module.dot_product_attention, **options)
    equivalence.record(attend, calls)(*tokens())
  for call in calls:
    certificate = equivalence.verify_heads(**call)
    assert certificate.holds, str(certificate)
  assert len(calls) == 2


@pytest.mark.parametrize('transform', [jax.checkpoint, jax.jit])
def test_what_a_traced_attention_has_learnt_is_recorded(transform):
  calls = []

  @transform
  def model(phi, scale):
    by_loss = functools.partial(modified.attention_from_loss(margin), phi)
    fns = [
      functools.partial(attention.dot_product_attention, attend=attend)
      for attend in (phi, by_loss, None)
    ]
    return [equivalence.record(fn, calls)(*tokens(), scale=scale) for fn in fns]

  phi = features.PositiveFeatures(
    jax.random.normal(jax.random.key(3), (7, 4), 'f4')
  )
  model(phi, jnp.float32(0.3))
  assert len(calls) == 3
  for call in calls:
    assert not any(
      isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(call)
    )
    assert equivalence.verify_heads(**call).holds


def test_capture_restores_and_does_not_stay_silent():
  function = jax.nn.dot_product_attention
  with (
    pytest.raises(ValueError, match='capture saw no attention'),
    equivalence.capture(),
  ):
    assert jax.nn.dot_product_attention is not function
  assert jax.nn.dot_product_attention is function


@pytest.mark.parametrize('model', [3, nnx.MultiHeadAttention, 'model'])
def test_capture_takes_no_class_and_no_number(model):
  with (
    pytest.raises(ValueError, match=r'capture was given .*expected objects'),
    equivalence.capture(model),
  ):
    jax.nn.dot_product_attention(*tokens())


def test_what_no_certificate_states_is_refused_where_it_is_captured():
  q, k, v = tokens()
  attend = functools.partial(modified.regularised(strength=0.1), ELU)
  with (
    pytest.raises(ValueError, match=r'Regularised, which verify_heads cannot'),
    equivalence.capture(),
  ):
    attention.dot_product_attention(q, k, v, attend=attend)


def test_attention_itself_is_compiled_while_it_is_captured():
  is_off = []

  def attend(query, key, value):
    is_off.append(jax.config.jax_disable_jit)
    return jax.nn.dot_product_attention(query, key, value)

  q, k, v = tokens()
  with equivalence.capture() as calls:
    equivalence.record(attend, calls)(q, k, v)
    is_off.append(jax.config.jax_disable_jit)
  assert is_off == [False, True]
  assert [equivalence.verify_heads(**call).holds for call in calls] == [True]
