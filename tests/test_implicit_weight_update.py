"""What a context does to a token, as a change of the weights of rank one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import pretrained, transformer
from iclcl_jax.accounts import implicit_weight_update as account
from tests import families, transformer_blocks as made
from tests.tolerances import IDENTITY

CONTEXT = np.arange(made.SIZE) < 4


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('name', list(made.FAMILIES))
def test_blocks_without_the_context_are_blocks_with_it(name, dtype):
  architecture = made.FAMILIES[name].architecture
  blocks = made.make_blocks(name, 2, dtype)
  x = made.make_tokens(dtype=dtype)
  found = account.residuals(architecture, blocks, x, CONTEXT)
  assert found.shape == (2, made.SIZE)
  assert found.dtype == dtype
  assert np.max(found) <= IDENTITY[dtype]


def test_the_block_with_its_context_is_another_one():
  """The statement says something: without the change the block differs."""
  architecture = made.FAMILIES['llama'].architecture
  block = jax.tree.map(lambda leaf: leaf[0], made.make_blocks('llama', 1))
  x = made.make_tokens()
  update = account.weight_update(architecture, block, x, CONTEXT)
  unchanged = update._replace(change=jnp.zeros_like(update.change))
  found = account.apply_update(architecture, block, x, unchanged)
  expected = transformer.apply_block(architecture, block, x)
  assert np.min(np.max(np.abs(found - expected), axis=1)[4:]) > 1e-3


@pytest.mark.parametrize('place', [5, 6])
def test_a_change_has_rank_one_and_belongs_to_one_token(place):
  architecture = made.FAMILIES['llama'].architecture
  block = jax.tree.map(lambda leaf: leaf[0], made.make_blocks('llama', 1))
  x = made.make_tokens()
  update = account.weight_update(architecture, block, x, CONTEXT)
  read, change = update.read[place], update.change[place]
  changed = account.updated_block(block, read, change)
  for name in ('gate', 'up'):
    old, new = (getattr(b, name).weight for b in (block, changed))
    values = np.linalg.svd(new - old, compute_uv=False)
    assert values[1] < 1e-12 * values[0]
    np.testing.assert_allclose(read @ new, (read + change) @ old, rtol=1e-10)
    other = update.read[11 - place]
    assert np.max(np.abs(other @ new - (other + change) @ old)) > 1e-2


@pytest.mark.parametrize('name', sorted(families.CONFIGS))
def test_every_family_has_it(name):
  model = families.model_of(name)
  tokens = jnp.arange(9, dtype='int32') + 3
  x = pretrained.embed(model, tokens)
  context = np.arange(9) < 6
  found = account.residuals(model.architecture, model.blocks, x, context)
  assert np.max(found) <= IDENTITY[str(x.dtype)]


def test_tokens_of_zeros_keep_the_weights():
  block = transformer.example()[1]
  zeros = jnp.zeros(4)
  changed = account.updated_block(block, zeros, zeros)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, block, changed))


def test_transformations_and_bad_input():
  architecture, block = transformer.example()
  x = jnp.eye(3, 4)
  context = jnp.array([True, False, False])

  def size(x):
    update = account.weight_update(architecture, block, x, context)
    return jnp.sum(account.apply_update(architecture, block, x, update) ** 2)

  gradient = jax.jit(jax.grad(size))(x)
  assert np.all(np.isfinite(gradient))
  batch = jax.vmap(size)(jnp.stack([x, 2 * x]))
  np.testing.assert_allclose(batch[0], size(x), rtol=1e-6)
  one = account.weight_update(architecture, block, x[:1], context[:1])
  assert np.all(np.isfinite(one.change))
  with pytest.raises(ValueError, match=r'context.*bool'):
    account.weight_update(architecture, block, x, jnp.arange(3))
  with pytest.raises(ValueError, match='context'):
    account.weight_update(architecture, block, x, context[:2])
