"""The forward pass of blocks: oracles, caches, batches and dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import transformer
from tests import transformer_blocks as made
from tests.tolerances import IDENTITY

NAMES = list(made.FAMILIES)
MASKS = {
  'all': None,
  'right': np.arange(made.SIZE) < 5,
  'left': np.arange(made.SIZE) >= 2,
  'none': np.zeros(made.SIZE, bool),
}

ARCHITECTURE = made.FAMILIES['llama'].architecture
BLOCK, BLOCKS = made.make_block('llama'), made.make_blocks('llama', 2)


@functools.cache
def compiled(name):
  architecture = made.FAMILIES[name].architecture
  return jax.jit(functools.partial(transformer.apply_block, architecture))


@pytest.mark.parametrize('padding', [*MASKS, 'one token'])
@pytest.mark.parametrize('name', NAMES)
def test_block_equals_the_oracle(name, padding):
  mask = MASKS.get(padding)
  x = made.make_tokens(size=1 if padding == 'one token' else made.SIZE)
  x = x if mask is None else x.at[~mask].set(0.0)  # As the block reads them.
  given = None if mask is None else jnp.asarray(mask)
  result = compiled(name)(made.make_block(name), x, mask=given)
  expected = made.FAMILIES[name].oracle(
    made.parameters(name, 0), np.asarray(x), mask
  )
  assert made.relative_error(result, expected) < IDENTITY['float64']


@pytest.mark.parametrize('name', NAMES)
def test_stack_equals_blocks_one_by_one(name):
  architecture = made.FAMILIES[name].architecture
  x = expected = made.make_tokens()
  for seed in range(3):
    expected = compiled(name)(made.make_block(name, seed), expected)
  result = transformer.apply_blocks(architecture, made.make_blocks(name, 3), x)
  assert made.relative_error(result, expected) < IDENTITY['float64']


@pytest.mark.parametrize(
  ('name', 'dtype', 'tolerance'),
  [
    ('llama', 'float32', 1e-5),
    ('llama', 'bfloat16', 8e-2),
    ('gpt2', 'float16', 1e-2),
    ('bert', 'bfloat16', 8e-2),
  ],
)
def test_dtype_is_kept_and_rounds_as_it_should(name, dtype, tolerance):
  x = made.make_tokens()
  result = compiled(name)(made.make_block(name, dtype=dtype), x.astype(dtype))
  assert result.dtype == dtype
  expected = compiled(name)(made.make_block(name), x)
  assert made.relative_error(result, expected) < tolerance


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_norms_of_large_tokens_do_not_overflow(dtype):
  x = jnp.asarray(made.make_tokens()[0] * 2000, dtype)
  ones = transformer.Norm(jnp.ones(made.D_MODEL, dtype))
  for norm in (transformer.RMSNorm(1e-5), transformer.LayerNorm(1e-5)):
    result = norm(ones, x)
    assert result.dtype == dtype
    assert 0.9 < float(jnp.max(jnp.abs(result))) < 4


@pytest.mark.parametrize('size', [1e-30, 1e-19, 1e19, 1e30, 9e37])
def test_squares_of_huge_and_tiny_tokens_stay_in_range(size):
  x = made.make_tokens()[0].astype('float32')
  x = x / jnp.max(jnp.abs(x))
  ones = transformer.Norm(jnp.ones(made.D_MODEL, 'float32'))
  for norm in (transformer.RMSNorm(0.0), transformer.LayerNorm(0.0)):

    @jax.jit
    def normalise(x, norm=norm):
      return jax.vmap(lambda row: norm(ones, row))(x[None])[0]

    expected = normalise(x)
    result = normalise(x * size)
    assert made.relative_error(result, expected) < IDENTITY['float32']
    slope = jax.grad(lambda x: normalise(x)[0])(x * size)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
@pytest.mark.parametrize('epsilon', [0.0, 1e-5])
def test_a_token_without_spread_is_normalised_to_zero(dtype, epsilon):
  ones = transformer.Norm(jnp.ones(8, dtype))
  largest = float(jnp.finfo(dtype).max) / 16
  for value in (0.0, 2.0, 2.0**60, largest):
    x = jnp.full(8, value, dtype)
    norm = transformer.LayerNorm(epsilon)
    np.testing.assert_array_equal(norm(ones, x), jnp.zeros(8, dtype))
    slope = jax.grad(lambda x, norm=norm: norm(ones, x)[0])(x)
    assert np.all(np.isfinite(slope.astype('float32')))
  zero = transformer.RMSNorm(epsilon)(ones, jnp.zeros(8, dtype))
  np.testing.assert_array_equal(zero, jnp.zeros(8, dtype))


def test_large_scores_pick_one_token():
  architecture = made.FAMILIES['gpt2'].architecture
  keys = jnp.eye(3)[None] * 1e4
  positions = jnp.arange(3)
  heads = transformer.Heads(keys, keys, jnp.eye(3)[None])
  result = transformer.attend(architecture, heads, positions, positions)
  np.testing.assert_array_equal(result[0], np.eye(3))


def test_a_query_that_sees_nothing_gets_zeros():
  x = jnp.ones((2, 3, 4))
  mask, positions = jnp.array([False, True, True]), jnp.arange(3)
  architecture = made.FAMILIES['llama'].architecture
  result = transformer.attend(
    architecture, transformer.Heads(x, x, x), positions, positions, mask=mask
  )
  assert np.all(result[:, 0] == 0)
  assert np.all(result[:, 1:] == 1)


@pytest.mark.parametrize('name', NAMES)
def test_left_padding_changes_nothing_but_the_padding(name):
  x, block = made.make_tokens(), made.make_block(name)
  padding = jnp.full((2, made.D_MODEL), jnp.nan)
  result = compiled(name)(
    block,
    jnp.concatenate([padding, x]),
    positions=jnp.array([0, 0, *range(made.SIZE)]),
    mask=jnp.arange(made.SIZE + 2) >= 2,
  )
  expected = compiled(name)(block, x)
  assert made.relative_error(result[2:], expected) < IDENTITY['float64']


@pytest.mark.parametrize('name', NAMES)
def test_attention_of_a_cache_is_the_last_row(name):
  """One query at its position, keys and values of all, the last one padded."""
  architecture = made.FAMILIES[name].architecture
  x, block = made.make_tokens(), made.make_block(name)
  seen = jax.jit(functools.partial(transformer.heads, architecture))(block, x)
  positions = jnp.arange(made.SIZE)
  whole = transformer.attend(architecture, seen, positions, positions)

  def pad(rows):
    return jnp.pad(rows, [(0, 0), (0, 3), (0, 0)], constant_values=jnp.nan)

  last = transformer.attend(
    architecture,
    transformer.Heads(seen.queries[:, -1:], pad(seen.keys), pad(seen.values)),
    positions[-1:],
    jnp.arange(made.SIZE + 3),
    mask=jnp.arange(made.SIZE + 3) < made.SIZE,
  )
  assert made.relative_error(last, whole[:, -1:]) < IDENTITY['float64']


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_future_tokens_are_invisible(name):
  x, block = made.make_tokens(), made.make_block(name)
  changed = x.at[-1].add(1.0)
  before, after = compiled(name)(block, x), compiled(name)(block, changed)
  np.testing.assert_array_equal(before[:-1], after[:-1])
  assert np.all(before[-1] != after[-1])


def test_bidirectional_tokens_see_the_last_one():
  x, block = made.make_tokens(), made.make_block('bert')
  before = compiled('bert')(block, x)
  after = compiled('bert')(block, x.at[-1].add(1.0))
  assert np.all(np.any(np.asarray(before != after), axis=1))


@pytest.mark.parametrize('name', NAMES)
def test_batches_are_vmap(name):
  block = made.make_block(name)
  batch = jnp.stack([made.make_tokens(seed) for seed in range(2)])
  mask = jnp.stack([jnp.arange(made.SIZE) < 5, jnp.ones(made.SIZE, bool)])
  apply = compiled(name)
  result = jax.vmap(lambda x, mask: apply(block, x, mask=mask))(batch, mask)
  for row, x, valid in zip(result, batch, mask, strict=True):
    expected = apply(block, x, mask=valid)
    assert made.relative_error(row, expected) < IDENTITY['float64']


@pytest.mark.parametrize('name', NAMES)
def test_gradients_are_finite_and_those_of_differences(name):
  block, x = made.make_block(name), made.make_tokens()
  mask = jnp.arange(made.SIZE) < 5
  x = x.at[5:].set(jnp.nan)  # Padding reaches no gradient of a valid token.

  def total(block, x):
    return jnp.sum(compiled(name)(block, x, mask=mask)[:5])

  slopes, slope = jax.jit(jax.grad(total, argnums=(0, 1)))(block, x)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))
  step = 1e-6
  ends = [total(block, x.at[2, 3].add(sign * step)) for sign in (1, -1)]
  np.testing.assert_allclose(
    slope[2, 3], (ends[0] - ends[1]) / (2 * step), rtol=1e-6
  )


@pytest.mark.parametrize(
  ('visible', 'window', 'seen'),
  [
    ('causal', 2, lambda i, j: (j <= i) & (i - j < 2)),
    ('bidirectional', 3, lambda i, j: abs(i - j) < 3),
    ('bidirectional', 2**40, lambda i, j: i == i + 0 * j),
  ],
)
@pytest.mark.parametrize('dtype', ['int8', 'int32'])
def test_a_window_shows_the_tokens_that_are_nearer(
  visible, window, seen, dtype
):
  architecture = dataclasses.replace(
    ARCHITECTURE,
    visible=getattr(transformer, visible),
    layers=(transformer.Layer(window=window),),
  )
  positions = jnp.arange(made.SIZE, dtype=dtype)
  heads = transformer.heads(
    architecture, BLOCK, made.make_tokens(), positions=positions
  )
  rows = jnp.eye(made.SIZE)[None]
  heads = transformer.Heads(0 * rows, 0 * rows, rows, window=heads.window)
  result = transformer.attend(architecture, heads, positions, positions)
  rows, columns = np.indices((made.SIZE, made.SIZE))
  np.testing.assert_array_equal(result[0] > 0, seen(rows, columns))


def test_constants_are_those_of_the_architecture_in_use():
  layers = [made.rotated((f, f, f)) for f in (1.0, 2.0)]
  other = dataclasses.replace(ARCHITECTURE, layers=tuple(layers))
  stacks = (BLOCKS, transformer.with_constants(other, BLOCKS))
  for architecture in (ARCHITECTURE, other):
    results = [
      transformer.apply_blocks(architecture, blocks, made.make_tokens())
      for blocks in stacks
    ]
    np.testing.assert_array_equal(*results)


def test_rotary_scores_depend_on_the_distance_alone():
  block, x = made.make_block('llama'), made.make_tokens()
  architecture = made.FAMILIES['llama'].architecture
  far = 1000 + jnp.arange(made.SIZE)

  def scores(positions):
    seen = transformer.heads(architecture, block, x, positions=positions)
    return jnp.einsum('nd,md->nm', seen.queries[0], seen.keys[0])

  near = scores(None)
  np.testing.assert_allclose(near, scores(far), rtol=1e-9)
  assert abs(near - scores(2 * far)).max() > 1e-3


class WrongNorm(transformer.RMSNorm):
  def __call__(self, parameters, x):
    return x[1:]


@pytest.mark.parametrize(
  ('part', 'function', 'message'),
  [
    ('normalization', lambda p, x: x * p.scale,
     'normalization has no method linear_part'),
    ('activation', jax.nn.softmax, 'applied to a single number'),
    ('activation', lambda z: jnp.cumsum(z, -1), 'applied to a single number'),
    ('activation', 'silu', r'activation is a str; expected a function .*silu'),
    ('visible', lambda position: True, r'visible takes \(position\); expected'),
    ('layers', (), r'layers is \(\); expected a tuple'),
    ('layers', (None,), 'expected a tuple of transformer.Layer'),
    ('layers', (transformer.Layer(), transformer.Layer(window=1)),
     'has 2 layers, and block is one of them'),
    ('layers', transformer.Layer(), 'expected a tuple of transformer.Layer'),
    ('layers', (made.rotated((1.0, 1.0)),), '2 frequencies for heads of width'),
    ('query_scale', -1.0, 'query_scale is -1.0'),
    ('query_scale', jnp.ones(()), 'query_scale is an? .*; expected a Python'),
    ('experts_per_token', -1, 'experts_per_token is -1; expected an integer'),
    ('experts_per_token', 1.0, 'experts_per_token is 1.0; expected an integer'),
    ('experts_per_token', 1, 'block.router has 0 experts; expected'),
    ('score_cap', 0.0, 'score_cap is 0'),
    ('gating', lambda gate, up: up, r'gating takes \(gate, up\)'),
    ('activation', jnp.sum, 'activation returned'),
    ('gating', lambda f, gate, up: up[:1], 'gating returned float'),
    ('normalization', WrongNorm(1e-5), 'normalization returned'),
    ('visible', lambda q, k: None, 'visible returned'),
    ('visible', lambda q, k: jnp.stack([q, k]) > 0, 'visible returned'),
    ('visible', lambda q, k: q - k, 'visible returned int'),
  ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(part, function, message):
  """Some when the architecture is made, others when a block is applied."""
  architecture, block = transformer.example()
  with pytest.raises(ValueError, match=message):
    transformer.apply_block(
      dataclasses.replace(architecture, **{part: function}),
      block,
      jnp.ones((3, 4)),
    )


ONES = transformer.Norm(jnp.ones(2))
NEAR = transformer.Rotary(frequencies=(1.0, 2.0))
BEYOND = (
  (5, 'beyond is 5; expected a position and a Rotary'),
  ((5, transformer.Rotary(frequencies=(1.0,))), 'with 2 frequencies'),
  ((5, dataclasses.replace(NEAR, scale=2.0)), 'scale=1.0'),
  ((5, dataclasses.replace(NEAR, beyond=(9, NEAR))), 'none beyond it'),
  ((0, NEAR), 'the position in beyond is 0'),
)


def mixture(num_experts, chosen):
  return {
    'architecture': dataclasses.replace(ARCHITECTURE, experts_per_token=chosen),
    'block': BLOCK._replace(
      router=transformer.Linear(jnp.ones((made.D_MODEL, num_experts)))
    ),
  }


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: transformer.RMSNorm(-1.0), 'epsilon is -1.0'),
    (lambda: transformer.LayerNorm(float('nan')), 'epsilon is nan'),
    (lambda: transformer.rotary_frequencies(4, 0.5), 'base is 0.5'),
    (lambda: transformer.rotary_frequencies(3), 'width is 3; expected an even'),
    (lambda: transformer.Layer(window=0), 'window is 0'),
    (lambda: transformer.Layer(rotation=1e4), 'rotation is a float'),
    (lambda: made.rotated((1.0, float('nan'))), 'frequencies is nan'),
    *((lambda beyond=beyond: transformer.Rotary(
      frequencies=(1.0, 2.0), beyond=beyond), message)
      for beyond, message in BEYOND),
    (lambda: transformer.with_constants(ARCHITECTURE, [BLOCK]),
     'blocks is a list'),
    (lambda: transformer.with_constants(ARCHITECTURE, BLOCK),
     r'expected \[L, d_model\]'),
    (lambda: transformer.scan_blocks(ARCHITECTURE, None, print, None),
     'blocks is a NoneType'),
    (lambda: transformer.ClampedGating(0.0), 'limit is 0'),
    (lambda: transformer.RMSNorm(0.0)(ONES, jnp.ones((3, 2))),
     r'x has shape \[3, 2\]'),
    (lambda: transformer.LayerNorm(0.0)(ONES, jnp.ones((3, 2))),
     r'x has shape \[3, 2\]'),
  ],
)  # fmt: skip
def test_wrong_parts_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


SEQUENCE = {
  'architecture': ARCHITECTURE,
  'block': BLOCK,
  'x': made.make_tokens(),
}


def with_weight(name, weight):
  linear = getattr(BLOCK, name)._replace(weight=weight)
  return {'block': BLOCK._replace(**{name: linear})}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': jnp.ones((2, 3, 4))}, 'x has shape'),
    ({'x': jnp.ones((0, made.D_MODEL))}, 'x is empty'),
    ({'x': jnp.ones((7, 5))}, 'block.attention_norms.input.scale has shape'),
    ({'positions': jnp.arange(3)}, 'x and positions disagree in N: 7 and 3'),
    ({'positions': jnp.ones(7)}, 'positions has dtype float64; expected an'),
    ({'positions': [0]}, 'positions is a list; expected an array of integers'),
    ({'mask': jnp.ones(3, bool)}, 'mask has shape'),
    ({'mask': jnp.ones(7)}, 'mask has dtype'),
    ({'architecture': 'llama'}, 'architecture is a str'),
    ({'block': None}, 'block is a NoneType'),
    (with_weight('key', BLOCK.key.weight[1:]), 'block.key.weight has shape'),
    ({'block': BLOCK._replace(**{
      name: transformer.Linear(jnp.ones((made.D_MODEL, 3, made.D_K)))
      for name in ('key', 'value')})},
     'block.query has 4 heads and block.key has 3'),
    (with_weight('value', BLOCK.value.weight[:, :1]),
     'block.value.weight has shape'),
    ({'block': BLOCK._replace(down=None)}, 'block.down is a NoneType'),
    (with_weight('up', BLOCK.up.weight.astype(jnp.float32)),
     'block.up.weight has dtype float32'),
    ({'block': BLOCK._replace(
      ffn_norms=transformer.Norms(output=transformer.Norm(jnp.ones(3))))},
     'block.ffn_norms.output.scale has shape'),
    ({'block': BLOCK._replace(ffn_norms=None)}, 'ffn_norms is a NoneType'),
    ({'block': BLOCK._replace(sinks=jnp.ones(3))}, 'block.sinks has shape'),
    ({'block': BLOCK._replace(key_norm=transformer.Norm(jnp.ones((4, 6))))},
     'block.key_norm.scale has shape'),
    ({'block': BLOCK._replace(query_norm=jnp.ones(6))}, 'query_norm is a'),
    (mixture(2, 0), 'experts_per_token is 0 and block.router has 2 experts'),
    (mixture(2, 3), 'experts_per_token is 3 and block.router has 2 experts'),
    (mixture(3, 1), 'router has 3 experts and d_ff is 10'),
    ({'block': BLOCK._replace(constants=transformer.Constants(window=1))},
     'block has the constants of another architecture'),
  ],
)  # fmt: skip
def test_wrong_blocks_and_sequences_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    transformer.apply_block(**(SEQUENCE | change))


def test_wrong_stacks_are_named():
  architecture, x = SEQUENCE['architecture'], SEQUENCE['x']
  ragged = BLOCKS._replace(up=transformer.Linear(BLOCKS.up.weight[:1]))
  for blocks, message in (
    (BLOCK, r'expected \[L, d_model\]'),
    (ragged, 'disagree in L: 2 and 1'),
  ):
    with pytest.raises(ValueError, match=message):
      transformer.apply_blocks(architecture, blocks, x)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'queries': jnp.ones((3, 7, 6))}, 'expected a multiple'),
    ({'values': jnp.ones((2, 6, 6))}, 'values disagree in N: 7 and 6'),
    ({'key_positions': jnp.arange(3)}, 'positions disagree in N: 7 and 3'),
    ({'mask': jnp.ones(3, bool)}, 'mask has shape'),
    ({'heads': jnp.ones((4, 7, 6))}, 'heads is a'),
  ],
)
def test_wrong_heads_are_named(change, message):
  shapes = {'queries': (4, 7, 6), 'keys': (2, 7, 6), 'values': (2, 7, 6)}
  arrays = {k: change.pop(k, jnp.ones(shape)) for k, shape in shapes.items()}
  arguments = {
    'heads': transformer.Heads(**arrays),
    'query_positions': jnp.arange(7),
    'key_positions': jnp.arange(7),
  } | change
  with pytest.raises(ValueError, match=message):
    transformer.attend(SEQUENCE['architecture'], **arguments)
