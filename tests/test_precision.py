"""Emulated arithmetic: what a platform that rounds operands would compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import attention, features, precision, projections
from tests import tolerances


def bfloat16(x):
  """The round trip that `reduce_precision` must equal bit for bit."""
  return x.astype(jnp.bfloat16).astype(x.dtype)


def operands(dtype=jnp.float32, size=5):
  rng = np.random.default_rng(0)
  return tuple(
    jnp.asarray(rng.normal(size=(size, size)), dtype) for _ in range(2)
  )


def rounded_product(x, y):
  return bfloat16(x) @ bfloat16(y)


def plain(x, y):
  return x @ y


def scanned(x, y):
  def step(carry, row):
    carry = carry @ y + row[None] * row[:, None]
    return carry, carry @ x

  return jax.lax.scan(step, x, y)


def scanned_by_hand(x, y):
  carry, outputs = x, []
  for row in y:
    carry = rounded_product(carry, y) + row[None] * row[:, None]
    outputs.append(rounded_product(carry, x))
  return carry, jnp.stack(outputs)


def branched(x, y):
  return jax.lax.cond(x[0, 0] < 9, lambda: x @ y, lambda: y @ x)


def looped(x, y):
  return jax.lax.fori_loop(0, 3, lambda _, z: z @ y, x)


def looped_by_hand(x, y):
  for _ in range(3):
    x = rounded_product(x, y)
  return x


@jax.custom_jvp
def custom(x, y):
  return x @ y


@custom.defjvp
def custom_jvp(primals, tangents):
  (x, y), (dx, dy) = primals, tangents
  return custom(x, y), 3 * (dx @ y) + dy  # A rule that no one would derive.


@jax.custom_vjp
def custom_backward(x, y):
  return x @ y


custom_backward.defvjp(
  lambda x, y: (x @ y, (x, y)),
  lambda kept, slope: (3 * (slope @ kept[1].T), slope),
)


@jax.custom_batching.custom_vmap
def custom_batched(x, y):
  return x @ y


@custom_batched.def_vmap
def custom_batched_rule(axis_size, in_batched, x, y):
  del axis_size, in_batched
  return custom_batched(x, y), True


ones = jnp.ones_like


def gradient(fn):
  return jax.grad(lambda x, y: jnp.sum(fn(x, y)))


CASES = {
  'plain': (plain, rounded_product),
  'einsum': (
    functools.partial(jnp.einsum, 'ij,kj->ik'),
    lambda x, y: rounded_product(x, y.T),
  ),
  'jit': (jax.jit(plain), rounded_product),
  'jit_in_jit': (jax.jit(lambda x, y: jax.jit(plain)(x, y)), rounded_product),
  'scan': (scanned, scanned_by_hand),
  'jitted_scan': (jax.jit(scanned), scanned_by_hand),
  'cond': (branched, rounded_product),
  'fori_loop': (looped, looped_by_hand),
  'map': (
    lambda x, y: jax.lax.map(lambda row: row @ y, x),
    lambda x, y: jnp.stack([rounded_product(row, y) for row in x]),
  ),
  'vmap': (jax.vmap(plain, in_axes=(0, None)), rounded_product),
  'remat': (jax.checkpoint(plain), rounded_product),
  'custom_jvp': (custom, rounded_product),
  'custom_vjp': (custom_backward, rounded_product),
  'custom_vmap': (custom_batched, rounded_product),
  'grad': (gradient(plain), lambda x, y: rounded_product(ones(x), y.T)),
  'grad_of_jit': (
    gradient(jax.jit(plain)),
    lambda x, y: rounded_product(ones(x), y.T),
  ),
  'grad_of_remat': (
    gradient(jax.checkpoint(plain)),
    lambda x, y: rounded_product(ones(x), y.T),
  ),
  'grad_of_custom_jvp': (
    gradient(custom),
    lambda x, y: rounded_product(3 * ones(x), y.T),
  ),
  'grad_of_custom_vjp': (
    gradient(custom_backward),
    lambda x, y: 3 * rounded_product(ones(x), y.T),
  ),
  'no_product': (lambda x, y: (x + y, {'sum': jnp.sum(x * y)}), None),
}


@pytest.mark.parametrize('case', list(CASES))
@pytest.mark.parametrize('outer', [lambda fn: fn, jax.jit])
def test_rounding_equals_rounding_by_hand(case, outer):
  fn, by_hand = CASES[case]
  x, y = operands()
  found = outer(precision.round_operands(fn))(x, y)
  expected = (by_hand or fn)(x, y)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6 * jnp.abs(b).max())
  if by_hand:
    exact = jax.tree.leaves(fn(x, y))
    gaps = [
      float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
      for a, b in zip(jax.tree.leaves(found), exact, strict=True)
    ]
    assert all(1e-5 < gap < 0.1 for gap in gaps), gaps


def test_operands_are_rounded_as_bfloat16_bit_for_bit(dtype):
  x = jax.random.normal(jax.random.key(0), (64, 1), dtype)
  x = jnp.concatenate([x, 1e30 * x, 1e-30 * x])
  one = jnp.ones((1, 1), dtype)
  found = precision.round_operands(plain)(x, one)
  np.testing.assert_array_equal(found, bfloat16(x))


def test_constants_and_pytrees_are_reached():
  x, y = operands()
  closed_over = precision.round_operands(lambda tree: {'out': tree['x'] @ y})
  np.testing.assert_allclose(
    closed_over({'x': x})['out'], rounded_product(x, y), rtol=2e-6, atol=1e-6
  )


def test_half_precision_operands_are_left_alone():
  x, y = operands(jnp.bfloat16)
  np.testing.assert_array_equal(precision.round_operands(plain)(x, y), x @ y)


@pytest.mark.parametrize('chunk_size', [4, 16])
def test_attention_is_reached_through_its_scans(chunk_size):
  """The measured error of rounded operands: some 3e-3, relative."""
  rng = np.random.default_rng(0)
  tokens = [
    jnp.asarray(rng.normal(size=(32, width)), jnp.float32)
    for width in (16, 16, 8)
  ]
  phi = features.PositiveFeatures(
    projections.gaussian(jax.random.key(0), 64, 16)
  )
  fn = functools.partial(
    attention.causal_kernel_attention, phi, chunk_size=chunk_size
  )
  exact, rounded = fn(*tokens), precision.round_operands(fn)(*tokens)
  error = jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)
  assert 1e-4 < error < 2e-2


@pytest.mark.parametrize(
  ('wrap', 'setting'),
  [(precision.highest, 'highest'), (precision.platform_default, 'default')],
)
def test_precision_is_set_inside_and_restored_outside(wrap, setting):
  name = 'jax_default_matmul_precision'
  before = getattr(jax.config, name)
  inside = wrap(lambda x: (x, str(getattr(jax.config, name))))
  assert inside(1) == (1, setting)
  assert getattr(jax.config, name) == before
  x, y = operands()
  np.testing.assert_allclose(wrap(plain)(x, y), x @ y, rtol=1e-5)


def test_products_are_requested_at_highest_precision():
  jaxpr = str(jax.make_jaxpr(precision.highest(plain))(*operands()))
  assert 'HIGHEST' in jaxpr
  assert 'HIGHEST' not in str(jax.make_jaxpr(plain)(*operands()))


def test_tolerances_are_those_of_the_tests():
  for name, value in tolerances.IDENTITY.items():
    assert precision.tolerance(jnp.dtype(name)) == value
  with pytest.raises(ValueError, match=r'dtype is int32; expected one of'):
    precision.tolerance(jnp.int32)


def test_only_reduced_arithmetic_has_a_reduced_tolerance():
  assert precision.HIGHEST.reduced_tolerance is None
  for reduced in (precision.PLATFORM_DEFAULT, precision.BFLOAT16_OPERANDS):
    assert reduced.reduced_tolerance == 2e-2
