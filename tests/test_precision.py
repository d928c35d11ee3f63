"""The arithmetic under which certificates are made, and its tolerances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import precision
from tests import tolerances


def operands():
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(5, 5)), 'f4') for _ in range(2))


def plain(x, y):
  return x @ y


@pytest.mark.parametrize(
  ('wrap', 'setting'),
  [
    (precision.HIGHEST.transform, 'highest'),
    (precision.PLATFORM_DEFAULT.transform, 'default'),
  ],
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
  jaxpr = str(jax.make_jaxpr(precision.HIGHEST.transform(plain))(*operands()))
  assert 'HIGHEST' in jaxpr
  assert 'HIGHEST' not in str(jax.make_jaxpr(plain)(*operands()))


def test_tolerances_are_those_of_the_tests():
  for name, value in tolerances.IDENTITY.items():
    assert precision.tolerance(jnp.dtype(name)) == value
  with pytest.raises(ValueError, match=r'dtype is int32; expected one of'):
    precision.tolerance(jnp.int32)


def test_only_reduced_arithmetic_has_a_reduced_tolerance():
  assert precision.HIGHEST.reduced_tolerance is None
  assert precision.PLATFORM_DEFAULT.reduced_tolerance == 2e-2
