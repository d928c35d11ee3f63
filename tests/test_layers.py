"""Flax layers: parameters only; the arithmetic is that of the functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from iclcl_jax import (
  attention,
  features,
  kernels,
  layers,
  modified,
  projections,
)

N, D_MODEL, D_K, D_V, H = 6, 5, 4, 3, 2


def exact(queries, keys, values):
  """Exact softmax attention of many queries, as a user would write it."""
  kernel = kernels.ExponentialKernel()
  return jax.vmap(
    lambda query: attention.kernel_attention(kernel, query, keys, values)
  )(queries)


def positive():
  phi = features.PositiveFeatures(
    projections.orthogonal(jax.random.key(0), 8, D_K)
  )
  return functools.partial(attention.stream_kernel_attention, phi, chunk_size=4)


def causal():
  return functools.partial(
    attention.causal_kernel_attention,
    features.EluPlusOneFeatures(),
    chunk_size=4,
  )


FORMS = pytest.mark.parametrize(
  'attention_fn', [exact, positive(), causal()], ids=['exact', 'map', 'causal']
)


def tokens(seed=1, size=N):
  return jax.random.normal(jax.random.key(seed), (size, D_MODEL))


def single(attention_fn):
  return layers.SelfAttention(attention_fn, key_dim=D_K, value_dim=D_V)


def multi(attention_fn, **options):
  return layers.MultiHeadAttention(
    attention_fn, num_heads=H, key_dim=D_K, value_dim=D_V, **options
  )


def head_by_hand(attention_fn, params, x):
  return attention_fn(
    x @ params['query'], x @ params['key'], x @ params['value']
  )


@FORMS
def test_one_head_is_the_function_of_its_parameters(attention_fn):
  layer, x = single(attention_fn), tokens()
  params = jax.jit(layer.init)(jax.random.key(0), x)['params']
  assert jax.tree.map(jnp.shape, params) == {
    'query': (D_MODEL, D_K),
    'key': (D_MODEL, D_K),
    'value': (D_MODEL, D_V),
  }
  found = jax.jit(layer.apply)({'params': params}, x)
  expected = jax.jit(head_by_hand, static_argnums=0)(attention_fn, params, x)
  assert found.shape == (N, D_V)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('attention_fn', 'output_dim'),
  [(exact, 7), (positive(), None)],
  ids=['exact', 'map'],
)
def test_heads_are_the_function_of_each_ones_parameters(
  attention_fn, output_dim
):
  layer, x = multi(attention_fn, output_dim=output_dim), tokens()
  params = jax.jit(layer.init)(jax.random.key(0), x)['params']
  width = output_dim or D_MODEL
  assert jax.tree.map(jnp.shape, params) == {
    'heads': {
      'query': (H, D_MODEL, D_K),
      'key': (H, D_MODEL, D_K),
      'value': (H, D_MODEL, D_V),
    },
    'output': (H * D_V, width),
  }
  heads_params = params['heads']
  by_hand = jax.jit(head_by_hand, static_argnums=0)
  heads = [
    by_hand(attention_fn, {k: p[h] for k, p in heads_params.items()}, x)
    for h in range(H)
  ]
  expected = jnp.concatenate(heads, axis=1) @ params['output']
  found = jax.jit(layer.apply)({'params': params}, x)
  assert found.shape == (N, width)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert jnp.any(heads[0] != heads[1])  # Heads are initialised apart.


def test_vmap_over_the_batch_is_the_loop():
  layer = multi(positive())
  batch = jnp.stack([tokens(seed) for seed in range(3)])
  params = jax.jit(layer.init)(jax.random.key(0), batch[0])
  found = jax.jit(jax.vmap(layer.apply, in_axes=(None, 0)))(params, batch)
  apply = jax.jit(layer.apply)
  expected = jnp.stack([apply(params, x) for x in batch])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_parameters_follow_the_dtype_of_the_tokens(dtype):
  layer = single(causal())
  output, variables = layer.init_with_output(
    jax.random.key(0), tokens().astype(dtype)
  )
  assert output.dtype == dtype
  assert all(p.dtype == dtype for p in jax.tree.leaves(variables))


def test_nnx_accepts_the_layer_and_trains_it():
  layer, x = single(exact), tokens()
  model = layers.as_nnx(layer, x, rngs=nnx.Rngs(0))
  params = {
    name: getattr(model, name)[...] for name in ('query', 'key', 'value')
  }
  expected = jax.jit(layer.apply)({'params': params}, x)
  np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)

  def loss_fn(model):
    return jnp.mean(model(x) ** 2)

  before, slopes = nnx.value_and_grad(loss_fn)(model)
  state = jax.tree.map(
    lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), slopes
  )
  nnx.update(model, state)
  assert loss_fn(model) < before


# Modifications: an attention function, or a view with parameters.

PHI = features.PositiveFeatures(
  projections.orthogonal(jax.random.key(0), 8, D_K)
)
PUSHED = {'num_negatives': 2, 'strength': 0.3}


def modification(fn, phi=PHI):
  return functools.partial(fn, phi, chunk_size=4)


MODIFICATIONS = {
  'regularised': modification(modified.regularised(strength=0.5).stream),
  'regularised, softmax': modification(
    modified.regularised(strength=0.5).stream, kernels.ExponentialKernel()
  ),
  'causal regularised': modification(modified.regularised(strength=0.5).causal),
  'printed': modification(
    modified.regularised_as_printed(strength=-0.5).stream
  ),
  'augmented': modification(
    modified.augmented(
      augment_keys=jax.nn.gelu, augment_values=jax.nn.gelu
    ).stream
  ),
  'negatives': modification(modified.negative(**PUSHED).stream),
  'token negatives': modification(modified.token_negative(**PUSHED).stream),
}


def heavy(width):
  layers = [
    linen.Dense(n, use_bias=False, param_dtype=float) for n in (6, width)
  ]
  return linen.Sequential([layers[0], jax.nn.gelu, layers[1]])


VIEWS = {
  'adapter': layers.Adapter(width=D_K, hidden_dim=6, scale=0.5),
  'heavy keys': heavy(D_K),
}


def adapter_by_hand(p, x):
  return x @ p['linear'] + 0.5 * jax.nn.gelu(x @ p['hidden']) @ p['output']


def heavy_by_hand(p, x):
  first, second = (p[f'layers_{n}']['kernel'] for n in (0, 2))
  return jax.nn.gelu(x @ first) @ second


BY_HAND = {'adapter': adapter_by_hand, 'heavy keys': heavy_by_hand}


def train(layer, params, x, num_steps=30):
  """Returns the loss of each step, and the last gradient."""
  goal = jnp.roll(x, 1, axis=0)
  optimizer = optax.sgd(0.3, momentum=0.7)

  def step(carry, _):
    params, state = carry
    loss, slopes = jax.value_and_grad(
      lambda p: jnp.mean((layer.apply({'params': p}, x) - goal) ** 2)
    )(params)
    updates, state = optimizer.update(slopes, state)
    return (optax.apply_updates(params, updates), state), (loss, slopes)

  carry = params, optimizer.init(params)
  _, (losses, slopes) = jax.lax.scan(step, carry, length=num_steps)
  return losses, slopes


def init(layer, x):
  return jax.jit(layer.init)(jax.random.key(0), x)['params']


def check_training(losses, slopes):
  assert losses[-1] < 0.8 * losses[0]
  for slope in jax.tree.leaves(slopes):
    assert np.all(np.isfinite(slope))
    assert np.any(slope[-1] != 0)


def test_gradient_steps_train_the_layer():
  layer, x = multi(exact), tokens()
  check_training(*jax.jit(functools.partial(train, layer))(init(layer, x), x))


@pytest.mark.parametrize('name', sorted(MODIFICATIONS))
def test_a_modification_is_the_function_of_its_parameters_and_trains(name):
  attention_fn, x = MODIFICATIONS[name], tokens()
  layer, one = multi(attention_fn), single(attention_fn)

  @jax.jit
  def everything(params, x):
    by_hand = jax.vmap(lambda p: head_by_hand(attention_fn, p, x))
    heads = by_hand(params['heads'])
    first = jax.tree.map(lambda p: p[0], params['heads'])
    return (
      (one.apply({'params': first}, x), heads[0]),
      (
        layer.apply({'params': params}, x),
        jnp.concatenate(list(heads), axis=1) @ params['output'],
      ),
      train(layer, params, x),
    )

  *pairs, training = everything(init(layer, x), x)
  for found, expected in pairs:
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
  check_training(*training)


@pytest.mark.parametrize('name', sorted(VIEWS))
def test_a_view_takes_the_place_of_the_projection(name):
  attention_fn, x = positive(), tokens()
  layer = layers.SelfAttention(
    attention_fn, key_dim=D_K, value_dim=D_V, key_view=VIEWS[name]
  )
  params = init(layer, x)
  assert set(params) == {'query', 'key_view', 'value'}

  @jax.jit
  def both(params, x):
    keys = BY_HAND[name](params['key_view'], x)
    by_hand = attention_fn(x @ params['query'], keys, x @ params['value'])
    return layer.apply({'params': params}, x), by_hand

  np.testing.assert_allclose(*both(params, x), rtol=1e-11, atol=1e-12)


def test_heads_have_views_of_their_own_and_train():
  layer = multi(
    positive(),
    key_view=VIEWS['adapter'],
    value_view=heavy(D_V),
  )
  x = tokens()
  params = init(layer, x)
  shapes = jax.tree.map(jnp.shape, params['heads'])
  assert shapes == {
    'query': (H, D_MODEL, D_K),
    'key_view': {
      'linear': (H, D_MODEL, D_K),
      'hidden': (H, D_MODEL, 6),
      'output': (H, 6, D_K),
    },
    'value_view': {
      'layers_0': {'kernel': (H, D_MODEL, 6)},
      'layers_2': {'kernel': (H, 6, D_V)},
    },
  }
  linear = params['heads']['key_view']['linear']
  assert np.any(linear[0] != linear[1])
  training = jax.jit(functools.partial(train, layer))(params, x)
  check_training(*training)


def test_an_adapter_of_scale_zero_is_the_projection():
  x = tokens()
  view = layers.Adapter(width=D_K, hidden_dim=6, scale=0.0)
  output, variables = view.init_with_output(jax.random.key(0), x)
  np.testing.assert_array_equal(output, x @ variables['params']['linear'])


def test_a_plain_function_may_be_a_view():
  layer = layers.SelfAttention(
    exact, key_dim=D_K, value_dim=D_V, value_view=lambda x: x[:, :D_V]
  )
  x = tokens()
  output, variables = layer.init_with_output(jax.random.key(0), x)
  params = variables['params']
  assert set(params) == {'query', 'key'}
  expected = exact(x @ params['query'], x @ params['key'], x[:, :D_V])
  np.testing.assert_allclose(output, expected, rtol=1e-12)


def test_nnx_accepts_a_layer_with_views():
  x = tokens()
  layer = layers.SelfAttention(
    exact, key_dim=D_K, value_dim=D_V, key_view=VIEWS['adapter']
  )
  model = layers.as_nnx(layer, x, rngs=nnx.Rngs(0))
  slopes = nnx.jit(nnx.grad(lambda model: jnp.mean(model(x) ** 2)))(model)
  leaves = jax.tree.leaves(slopes)
  assert len(leaves) == 5
  assert all(np.any(slope != 0) for slope in leaves)


@pytest.mark.parametrize(
  ('views', 'message'),
  [
    ({'key_view': heavy(D_K + 1)}, 'key_view returned'),
    ({'value_view': layers.Adapter}, 'value_view is'),
    ({'key_view': layers.Adapter(width=D_K, hidden_dim=0)}, 'hidden_dim is 0'),
    (
      {'key_view': layers.Adapter(width=D_K, hidden_dim=1, scale=np.nan)},
      'scale is nan',
    ),
  ],
)
def test_views_that_do_not_fit_are_errors(views, message):
  layer = single(exact).clone(**views)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(layer.init, jax.random.key(0), tokens())


# Batches, cross-attention, dtypes, NNX.


@pytest.mark.parametrize('view', [None, 'heavy keys'])
def test_a_batch_with_context_and_mask_is_each_sequence(view):
  layer = multi(positive(), key_view=VIEWS.get(view), output_dim=7)
  rng = np.random.default_rng(0)
  x, context = (
    jnp.asarray(rng.normal(size=(2, 3, n, D_MODEL))) for n in (N, 4)
  )
  mask = jnp.asarray(rng.random((2, 3, 4)) < 0.7).at[..., 0].set(True)
  params = init(layer, x[0, 0])
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, jax.eval_shape(layer.init, jax.random.key(0), x)['params']
  )
  apply = jax.jit(lambda *inputs: layer.apply({'params': params}, *inputs))
  found = apply(x, context, mask)
  assert found.shape == (2, 3, N, 7)
  one = x[1, 2], context[1, 2], mask[1, 2]
  np.testing.assert_allclose(found[1, 2], apply(*one), rtol=1e-11)
  seen = context[1, 2][mask[1, 2]]
  np.testing.assert_allclose(found[1, 2], apply(x[1, 2], seen), rtol=1e-11)
  itself = apply(x)
  np.testing.assert_allclose(itself, apply(x, x), rtol=1e-11)
  with pytest.raises(ValueError, match='same batch axes'):
    apply(x, context[0], mask)


def test_dtype_computes_and_param_dtype_keeps():
  layer = multi(
    causal(),
    key_view=layers.Adapter(D_K, 6, dtype='bfloat16', param_dtype='float32'),
    dtype='bfloat16',
    param_dtype='float32',
  )
  x = tokens().astype('float32')
  output, variables = jax.jit(layer.init_with_output)(jax.random.key(0), x)
  assert output.dtype == jnp.bfloat16
  assert {p.dtype.name for p in jax.tree.leaves(variables)} == {'float32'}
  wide = layer.clone(dtype=None, key_view=layers.Adapter(D_K, 6))
  np.testing.assert_allclose(
    output.astype('float32'), jax.jit(wide.apply)(variables, x), atol=0.05
  )


def test_an_nnx_layer_is_the_linen_layer():
  layer, x = multi(causal()), jnp.stack([tokens(1), tokens(2)])
  model = layers.as_nnx(layer, x[:1, :1], rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  expected = jax.jit(layer.apply)({'params': params}, x, x)
  np.testing.assert_allclose(
    nnx.jit(lambda model, x: model(x, x))(model, x), expected, rtol=1e-11
  )


# Attention in Flax's own modules.

ELU = features.EluPlusOneFeatures()
SOFTMAX = kernels.ExponentialKernel()
LENGTHS = jnp.array([[N], [3]])
PADDING = (jnp.arange(N)[None] < LENGTHS)[:, None, None]
CAUSAL = nnx.make_causal_mask(jnp.zeros((2, N)))
MASKS = {'none': None, 'padding': PADDING, 'causal': CAUSAL}


def nnx_layer(attention_fn=None, **options):
  if attention_fn is not None:
    options['attention_fn'] = attention_fn
  return nnx.MultiHeadAttention(
    num_heads=H, in_features=4, decode=False, rngs=nnx.Rngs(0), **options
  )


def batch(seed=0, size=N):
  return jax.random.normal(jax.random.key(seed), (2, size, 4), 'float32')


@pytest.mark.parametrize('attend', [None, SOFTMAX], ids=['exact', 'kernel'])
@pytest.mark.parametrize('mask', MASKS)
def test_nnx_with_our_softmax_is_nnx(attend, mask):
  @nnx.jit
  @nnx.value_and_grad
  def loss(layer, x, mask):
    return jnp.sum(layer(x, batch(1), mask=mask) ** 2)

  x, mask = batch(), MASKS[mask]
  with jax.numpy_dtype_promotion('standard'):
    expected = loss(nnx_layer(), x, mask)
  found = loss(nnx_layer(layers.as_attention_fn(attend)), x, mask)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize('attend', [None, SOFTMAX], ids=['exact', 'kernel'])
@pytest.mark.parametrize('mask', MASKS)
def test_linen_with_our_softmax_is_linen(attend, mask):
  x, mask = batch(), MASKS[mask]
  mask = mask if mask is None else mask.astype('float32')
  layer = linen.MultiHeadDotProductAttention(num_heads=H, dtype='float32')
  ours = layer.clone(attention_fn=layers.as_attention_fn(attend))
  params = layer.init(jax.random.key(0), x)

  def loss(layer, params, x):
    return jnp.sum(layer.apply(params, x, batch(1), mask=mask) ** 2)

  found, expected = (
    jax.jit(jax.value_and_grad(functools.partial(loss, module), (0, 1)))(
      params, x
    )
    for module in (ours, layer)
  )
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5)


def test_a_decoder_of_flax_takes_a_linear_time_attention():
  attention_fn = layers.as_attention_fn(ELU, is_causal=True)
  layer, x = nnx_layer(attention_fn), batch()
  expected = layer(x)
  read = nnx_layer(layers.as_attention_fn(ELU))(x, mask=CAUSAL)
  traced = nnx.jit(
    lambda layer, x: layer(x, mask=nnx.make_causal_mask(x[..., 0]))
  )
  for found in (read, traced(layer, x)):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match='is_causal=True'):
    traced(nnx_layer(layers.as_attention_fn(ELU)), x)
  layer.decode = True
  layer.init_cache(x.shape, dtype=x.dtype)
  with jax.numpy_dtype_promotion('standard'):  # Flax's cache needs it.
    tokens = [layer(x[:, t : t + 1]) for t in range(N)]
  np.testing.assert_allclose(
    jnp.concatenate(tokens, axis=1), expected, rtol=1e-4, atol=1e-5
  )


def test_dtype_and_precision_of_flax_are_honoured():
  attention_fn = layers.as_attention_fn(SOFTMAX)
  for precision in ('highest', jax.lax.Precision.HIGH, ('high', 'high')):
    layer = nnx_layer(attention_fn, dtype=jnp.bfloat16, precision=precision)
    assert layer(batch()).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'dropout_rate': 0.1, 'deterministic': False}, 'dropout_rate is 0.1'),
    ({'module': 'any'}, 'are to be sown'),
  ],
)
def test_what_a_form_without_weights_cannot_do_is_an_error(options, message):
  x = batch()[:, :, None]
  with pytest.raises(ValueError, match=message):
    layers.as_attention_fn(ELU)(x, x, x, **options)
  options['deterministic'] = True
  if 'module' not in options:
    layers.as_attention_fn(ELU)(x, x, x, **options)
