"""Blocks as dual models: the same numbers as the forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import attention, dual, features, kernels, transformer
from iclcl_jax.transformer import _dual_heads
from tests import transformer_blocks as made
from tests.tolerances import IDENTITY

NAMES = list(made.FAMILIES)
MASKS = {
  'all': np.ones(made.SIZE, bool),
  'right': np.arange(made.SIZE) < 5,
  'left': np.arange(made.SIZE) >= 2,
}
KERNEL = kernels.ExponentialKernel()


@functools.cache
def both(name):
  """The forward pass and the chain of a stack, compiled."""
  architecture = made.FAMILIES[name].architecture

  @jax.jit
  def run(blocks, x, mask, positions):
    return tuple(
      apply(architecture, blocks, x, mask=mask, positions=positions)
      for apply in (transformer.apply_blocks, transformer.apply_blocks_dual)
    )

  return run


@functools.cache
def make_heads(name):
  make = functools.partial(transformer.heads, made.FAMILIES[name].architecture)
  return jax.jit(make)(made.make_block(name), made.make_tokens())


@pytest.mark.parametrize('padding', MASKS)
@pytest.mark.parametrize('name', NAMES)
def test_chain_of_dual_models_equals_the_forward_pass(name, padding):
  mask = jnp.asarray(MASKS[padding])
  forward, chain = both(name)(
    made.make_blocks(name, 2), made.make_tokens(), mask, None
  )
  assert made.relative_error(chain, forward) < IDENTITY['float64']


def test_any_order_of_positions_is_served():
  name = 'llama'
  positions = jnp.array([3, 0, 1, 5, 2, 2, 6])
  forward, chain = both(name)(
    made.make_blocks(name, 2), made.make_tokens(), None, positions
  )
  assert made.relative_error(chain, forward) < IDENTITY['float64']


@pytest.mark.parametrize('name', ['llama', 'bert'])
def test_one_token_is_its_own_zero_shot_model(name):
  forward, chain = both(name)(
    made.make_blocks(name, 2), made.make_tokens(size=1), None, None
  )
  assert made.relative_error(chain, forward) < IDENTITY['float64']


@pytest.mark.parametrize(
  ('name', 'dtype', 'tolerance'),
  [
    ('llama', 'float32', 1e-5),
    ('gpt2', 'float16', 1e-2),
    ('bert', 'bfloat16', 8e-2),
  ],
)
def test_chain_keeps_the_dtype(name, dtype, tolerance):
  forward, chain = both(name)(
    made.make_blocks(name, 2, dtype), made.make_tokens(dtype=dtype), None, None
  )
  assert chain.dtype == dtype
  assert made.relative_error(chain, forward) < tolerance


@pytest.mark.parametrize('scale', [1e-6, 1e4])
@pytest.mark.parametrize('name', NAMES)
def test_chain_at_small_and_large_norms(name, scale):
  x, mask = made.make_tokens(scale=scale), jnp.ones(made.SIZE, bool)
  forward, chain = both(name)(made.make_blocks(name, 2), x, mask, None)
  assert made.relative_error(chain, forward) < IDENTITY['float64']


@pytest.mark.parametrize('name', NAMES)
def test_chain_calls_no_attention(name, monkeypatch):
  def refuse(*arguments, **keywords):
    raise AssertionError('attention was called')

  def trace(apply):
    apply = functools.partial(apply, made.FAMILIES[name].architecture)
    return jax.make_jaxpr(apply)(made.make_block(name), made.make_tokens())

  monkeypatch.setattr(transformer._forward, 'attend', refuse)
  monkeypatch.setattr(jax.nn, 'softmax', refuse)
  trace(transformer.apply_block_dual)
  with pytest.raises(AssertionError, match='attention was called'):
    trace(transformer.apply_block)


def one_head(name='llama'):
  """Queries of a group, keys, values and the causal triangle."""
  heads = make_heads(name)
  seen = jnp.tril(jnp.ones((made.SIZE, made.SIZE), bool))
  return heads.queries[:2], heads.keys[0], heads.values[0], None, seen


@pytest.mark.parametrize(
  'phi',
  [KERNEL, kernels.LinearKernel(), features.EluPlusOneFeatures()],
  ids=['softmax', 'linear', 'feature map'],
)
def test_online_pass_equals_a_state_for_each_query(phi):
  arguments = one_head()
  online, per_query, gradients = jax.jit(
    lambda *arguments: (
      _dual_heads.answer_online(phi, *arguments),
      _dual_heads.answer_per_query(phi, *arguments),
      _dual_heads.answer_by_gradients(phi, *arguments),
    )
  )(*arguments)
  scale = jnp.max(jnp.abs(online))
  assert jnp.max(jnp.abs(online - per_query)) < 1e-11 * scale
  assert jnp.max(jnp.abs(online - gradients)) < 1e-11 * scale


def test_online_pass_knows_nothing_of_the_future():
  queries, keys, values, *rest = one_head()
  run = jax.jit(functools.partial(_dual_heads.answer_online, KERNEL))
  before = run(queries, keys, values, *rest)
  after = run(queries, keys.at[-1].add(9.0), values.at[-1].add(9.0), *rest)
  np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
  assert np.all(before[:, -1] != after[:, -1])


@jax.jit
def states_of_one_step(keys, values, own, demonstrations):
  start = dual.zero_shot(KERNEL, keys, values, mask=own)
  return (
    _dual_heads.gradient_state(KERNEL, keys, values, own, demonstrations),
    dual.one_step_autodiff(KERNEL, start, keys, values, mask=demonstrations),
  )


@pytest.mark.parametrize('index', [0, 4])
@pytest.mark.parametrize('masked_self', [False, True])
def test_gradient_state_is_that_of_one_step_autodiff(index, masked_self):
  """Written out for the kernel, it is what `dual` computes in general."""
  _, keys, values, *_ = one_head()
  own = (jnp.arange(made.SIZE) == index) & (not masked_self)
  demonstrations = jnp.arange(made.SIZE) < index + (index == 0) * 3
  demonstrations = demonstrations & (jnp.arange(made.SIZE) != index)
  state, general = states_of_one_step(keys, values, own, demonstrations)
  size = made.SIZE
  rows = general.coefficients[:size] + general.coefficients[size:]
  np.testing.assert_allclose(state.coefficients, rows, rtol=1e-12)
  mass = general.mass[:size] + general.mass[size:]
  np.testing.assert_array_equal(state.mass, mass)


def test_gradients_are_those_of_the_contrastive_loss(monkeypatch):
  """A loss that learns twice as fast gives other weights."""
  arguments = one_head()

  def answer():
    """Traced anew: a compilation from before would know the old loss."""
    fresh = functools.partial(_dual_heads.answer_by_gradients, KERNEL)
    return jax.jit(lambda *arguments: fresh(*arguments))(*arguments)

  plain = answer()
  monkeypatch.setattr(
    _dual_heads.losses, 'contrastive', lambda p, v: -2 * jnp.sum(p * v)
  )
  doubled = answer()
  assert made.relative_error(doubled[:, 1:], plain[:, 1:]) > 0.1
  # The first token sees no demonstration: its model is the zero-shot one.
  np.testing.assert_array_equal(doubled[:, 0], plain[:, 0])


@pytest.mark.parametrize('name', NAMES)
def test_gradients_serve_padding_and_unseen_queries(name):
  architecture, heads = made.FAMILIES[name].architecture, make_heads(name)
  mask, positions = jnp.arange(made.SIZE) >= 2, jnp.arange(made.SIZE)
  heads = heads._replace(values=heads.values.at[:, :2].set(jnp.nan))
  result = jax.jit(
    functools.partial(transformer.predict_heads_autodiff, architecture)
  )(heads, mask=mask)
  expected = transformer.attend(
    architecture, heads, positions, positions, mask=mask
  )
  assert made.relative_error(result, expected) < IDENTITY['float64']


@pytest.mark.parametrize('name', NAMES)
def test_random_features_have_their_own_chain(name):
  """With a feature map the heads are its kernel attention."""
  architecture, heads = made.FAMILIES[name].architecture, make_heads(name)
  rows = np.random.default_rng(0).normal(size=(9, made.D_K))
  phi = features.PositiveFeatures(jnp.asarray(rows))
  share = made.HEADS // made.FAMILIES[name].num_groups
  if architecture.visible is transformer.causal:
    attend = functools.partial(attention.causal_kernel_attention, phi)
  else:
    attend = functools.partial(attention.stream_kernel_attention, phi)

  @jax.jit
  def run(heads):
    each = (jnp.repeat(x, share, axis=0) for x in (heads.keys, heads.values))
    result = transformer.predict_heads(architecture, heads, phi=phi)
    return result, jax.vmap(attend)(heads.queries, *each)

  for result, expected in zip(*run(heads), strict=True):
    assert made.relative_error(result, expected) < IDENTITY['float64']


@functools.cache
def folded(name):
  """A block, its heads and its affine maps."""
  architecture, block = made.FAMILIES[name].architecture, made.make_block(name)
  x, heads = made.make_tokens(), make_heads(name)

  @jax.jit
  def run(heads):
    outputs = transformer.predict_heads(architecture, heads)
    return transformer.linearise(architecture, block, x, outputs)

  return architecture, block, x, heads, run(heads)


@functools.cache
def folded_prediction(name):
  """The block at one token as one gradient step for each head."""
  architecture, block, x, heads, points = folded(name)
  is_causal = architecture.visible is transformer.causal
  share = made.HEADS // heads.keys.shape[0]
  rows = jnp.arange(made.SIZE)

  def predict(index):
    point = jax.tree.map(lambda leaf: leaf[index], points)
    labels = transformer.fold_labels(architecture, block, point, heads.values)
    output = transformer.bias_of(architecture, block, point, x[index])
    others = (rows != index) & ((rows < index) | (not is_causal))
    for h in range(made.HEADS):
      pairs = heads.keys[h // share], labels[h]
      state = dual.zero_shot(KERNEL, *pairs, mask=rows == index)
      state = dual.one_step_autodiff(KERNEL, state, *pairs, mask=others)
      output = output + dual.predict(KERNEL, state, heads.queries[h, index])
    return output, transformer.apply_block(architecture, block, x)[index]

  return jax.jit(predict)


@pytest.mark.parametrize('index', [0, 5])
@pytest.mark.parametrize('name', NAMES)
def test_block_is_dual_models_with_folded_labels(name, index):
  """`y = sum_h f_h(q_h) + bias`, one gradient step on the labels `v W_O J`."""
  output, expected = folded_prediction(name)(index)
  assert made.relative_error(output, expected) < IDENTITY['float64']


def centring():
  return np.eye(made.D_MODEL) - 1 / made.D_MODEL


@pytest.mark.parametrize('name', NAMES)
def test_label_map_is_the_matrix_of_the_formula(name):
  """`J = I + P U1 G U2`, or `P1 (I + U1 G U2) P2` for post-norm."""
  architecture, block, _, _, points = folded(name)
  index, p = 4, made.parameters(name, 0)
  point = jax.tree.map(lambda leaf: leaf[index], points)
  apply = functools.partial(transformer.map_label, architecture, block, point)
  matrix = jax.jit(jax.vmap(apply))(jnp.eye(made.D_MODEL))
  u1, u2, gate = p['w_up'], p['w_down'], np.diag(point.gate)

  def deviation(vector):
    return np.sqrt(np.var(vector) + made.EPSILON)

  stream = np.asarray(point.ffn_input)
  eye = np.eye(made.D_MODEL)
  if name == 'llama':
    rms = np.sqrt(np.mean(stream**2) + made.EPSILON)
    expected = eye + np.diag(p['norm_2']) / rms @ u1 @ gate @ u2
  elif name == 'gpt2':
    norm = centring() @ np.diag(p['norm_2']) / deviation(stream)
    expected = eye + norm @ u1 @ gate @ u2
  else:
    first = np.diag(p['norm_1']) / deviation(np.asarray(point.attention_sum))
    last = np.diag(p['norm_2']) / deviation(np.asarray(point.ffn_sum))
    middle = eye + u1 @ gate @ u2
    expected = centring() @ first @ middle @ centring() @ last
  assert made.relative_error(matrix, expected) < IDENTITY['float64']


@pytest.mark.parametrize(
  ('activation', 'slope'),
  [
    (jax.nn.relu, 0.0),
    (jax.nn.gelu, 0.5),
    (made.exact_gelu, 0.5),
    (jax.nn.silu, 0.5),
    (jnp.tanh, 1.0),
    (jax.nn.softplus, 0.5),
  ],
)
def test_gate_has_its_limit_at_zero_and_reproduces_the_activation(
  activation, slope
):
  """Softplus does not vanish at 0: the rest belongs to the bias."""
  family = made.FAMILIES['gpt2']
  architecture = dataclasses.replace(family.architecture, activation=activation)
  block, x = made.make_block('gpt2'), made.make_tokens()
  block = block._replace(
    up=transformer.Linear(
      block.up.weight.at[:, 0].set(0.0), block.up.bias.at[0].set(0.0)
    )
  )
  outputs = np.random.default_rng(3).normal(
    size=(made.HEADS, made.SIZE, made.D_K)
  )

  @jax.jit
  def run(outputs):
    points = transformer.linearise(architecture, block, x, outputs)
    added = jnp.einsum('hnd,hdm->nm', outputs, block.output.weight)

    def complete(point, added, x):
      label = transformer.map_label(architecture, block, point, added)
      return label + transformer.bias_of(architecture, block, point, x)

    result = jax.vmap(complete)(points, added, x)
    expected = transformer.complete(architecture, block, x, outputs)
    return points.gate, result, expected

  gate, result, expected = run(jnp.asarray(outputs))
  np.testing.assert_allclose(gate[:, 0], slope, rtol=1e-15)
  assert made.relative_error(result, expected) < IDENTITY['float64']


def test_relu_gate_is_a_mask():
  family = made.FAMILIES['gpt2']
  architecture = dataclasses.replace(
    family.architecture, activation=jax.nn.relu
  )
  block, x = made.make_block('gpt2'), made.make_tokens()
  outputs = jnp.zeros((made.HEADS, made.SIZE, made.D_K))
  run = jax.jit(functools.partial(transformer.linearise, architecture))
  gate = run(block, x, outputs).gate
  assert set(np.unique(gate)) == {0.0, 1.0}


def test_derivatives_of_the_chain_are_those_of_the_forward_pass():
  name = 'llama'
  blocks, x = made.make_blocks(name, 1), made.make_tokens()
  mask = jnp.arange(made.SIZE) >= 2
  pair = made.FAMILIES[name].architecture, blocks
  weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))

  def total(apply, x):
    return jnp.sum(weights * apply(*pair, x, mask=mask))

  slopes = [
    jax.jit(jax.grad(functools.partial(total, apply)))(x)
    for apply in (transformer.apply_blocks, transformer.apply_blocks_dual)
  ]
  assert made.relative_error(slopes[1], slopes[0]) < 1e-10


def test_chain_of_a_batch():
  name, blocks = 'llama', made.make_blocks('llama', 2)
  batch = jnp.stack([made.make_tokens(seed) for seed in range(2)])
  forward, chain = jax.vmap(lambda x: both(name)(blocks, x, None, None))(batch)
  assert made.relative_error(chain, forward) < IDENTITY['float64']


def test_wrong_arguments_are_named():
  architecture, heads = made.FAMILIES['llama'].architecture, make_heads('llama')
  with pytest.raises(ValueError, match='and positions disagree in N: 7 and 3'):
    transformer.predict_heads(architecture, heads, positions=jnp.arange(3))
  with pytest.raises(ValueError, match='mask has shape'):
    transformer.predict_heads(architecture, heads, mask=jnp.ones(3, bool))
  with pytest.raises(ValueError, match='expected a multiple'):
    transformer.predict_heads(
      architecture, heads._replace(queries=heads.queries[:3])
    )
  with pytest.raises(ValueError, match='phi is a str'):
    transformer.predict_heads(architecture, heads, phi='softmax')
  with pytest.raises(ValueError, match='x has shape'):
    transformer.apply_block_dual(
      architecture, made.make_block('llama'), jnp.ones(3)
    )
