"""Flax layers: parameters only; the arithmetic is that of the functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

from iclcl_jax import attention, features, kernels, layers, projections

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


def test_a_gradient_step_trains_the_layer():
  layer, x = multi(exact), tokens()
  goal = jnp.roll(x, 1, axis=0)
  params = jax.jit(layer.init)(jax.random.key(0), x)
  optimizer = optax.sgd(0.3, momentum=0.5)

  @jax.jit
  def step(params, optimizer_state):
    loss, slopes = jax.value_and_grad(
      lambda p: jnp.mean((layer.apply(p, x) - goal) ** 2)
    )(params)
    updates, optimizer_state = optimizer.update(slopes, optimizer_state)
    return optax.apply_updates(params, updates), optimizer_state, loss, slopes

  optimizer_state, history = optimizer.init(params), []
  for _ in range(30):
    params, optimizer_state, loss, slopes = step(params, optimizer_state)
    history.append(float(loss))
  assert all(bool(jnp.any(s != 0)) for s in jax.tree.leaves(slopes))
  assert history[-1] < 0.9 * history[0]


def test_nnx_accepts_the_layer_and_trains_it():
  layer, x = single(exact), tokens()
  model = bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(x)
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
