"""Exact kernels against NumPy and scikit-learn, and bounds on truncation."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import pairwise

from iclcl_jax import kernels, types
from tests import oracles

DIM = 5


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  kernel: Any
  oracle: Callable[[Any, Any], float]
  sklearn: Callable[[Any, Any], Any] | None = None


CASES = [
  Case('exponential', kernels.ExponentialKernel(), oracles.exponential_kernel),
  Case(
    'gaussian',
    kernels.GaussianKernel(),
    oracles.gaussian_kernel,
    functools.partial(pairwise.rbf_kernel, gamma=1 / (2 * DIM**0.5)),
  ),
  Case(
    'linear',
    kernels.LinearKernel(),
    oracles.linear_kernel,
    pairwise.linear_kernel,
  ),
]
DTYPES = ['float16', 'bfloat16', 'float32', 'float64']

every_kernel = pytest.mark.parametrize(
  'case', CASES, ids=lambda case: case.name
)


def normal(seed, *shape, dtype='float64'):
  array = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(array, dtype)


def gram(kernel, x, y):
  return jax.vmap(lambda a: jax.vmap(lambda b: kernel(a, b))(y))(x)


@every_kernel
def test_agrees_with_the_oracle(case):
  for seed in range(4):
    x, y = normal(seed, 2, DIM)
    expected = case.oracle(np.asarray(x), np.asarray(y))
    np.testing.assert_allclose(case.kernel(x, y), expected, rtol=1e-12)


@pytest.mark.parametrize(
  'case',
  [case for case in CASES if case.sklearn is not None],
  ids=lambda case: case.name,
)
def test_agrees_with_scikit_learn(case):
  x, y = normal(0, 6, DIM), normal(1, 4, DIM)
  expected = case.sklearn(np.asarray(x), np.asarray(y))
  np.testing.assert_allclose(
    gram(case.kernel, x, y), expected, rtol=1e-12, atol=1e-14
  )


def test_exponential_is_gaussian_times_its_diagonal():
  x, y = normal(0, 2, DIM)
  exponential, gaussian = kernels.ExponentialKernel(), kernels.GaussianKernel()
  expected = gaussian(x, y) * (exponential(x, x) * exponential(y, y)) ** 0.5
  np.testing.assert_allclose(exponential(x, y), expected, rtol=1e-13)


@every_kernel
def test_is_symmetric_and_positive_semidefinite(case):
  x = normal(2, 8, DIM)
  matrix = np.asarray(gram(case.kernel, x, x))
  np.testing.assert_allclose(matrix, matrix.T, rtol=1e-13)
  eigenvalues = np.linalg.eigvalsh(matrix)
  assert eigenvalues.min() >= -1e-12 * eigenvalues.max()


@every_kernel
def test_jit_vmap_and_gradient(case):
  x, y, slope = normal(3, 3, DIM)
  traced = jax.jit(lambda kernel, x, y: kernel(x, y))(case.kernel, x, y)
  np.testing.assert_allclose(traced, case.kernel(x, y), rtol=1e-13)
  gradient = jax.grad(case.kernel)(x, y)
  step = 1e-6
  finite_difference = (
    case.kernel(x + step * slope, y) - case.kernel(x - step * slope, y)
  ) / (2 * step)
  np.testing.assert_allclose(
    gradient @ slope, finite_difference, rtol=1e-6, atol=1e-9
  )


@every_kernel
def test_dtype_shape_and_pytree(case):
  for dtype in DTYPES:
    x, y = normal(4, 2, DIM, dtype=dtype)
    assert case.kernel(x, y).dtype == dtype
    assert case.kernel(x, y).shape == ()
  leaves, structure = jax.tree.flatten(case.kernel)
  assert not leaves
  again = jax.tree.unflatten(structure, leaves)
  assert again(x, y) == case.kernel(x, y)
  assert isinstance(case.kernel, types.Kernel)
  with pytest.raises(dataclasses.FrozenInstanceError):
    case.kernel.order = 3


def test_structures_of_different_kernels_differ():
  # Equal ones would let a cache of jit mistake one kernel for another.
  structures = [jax.tree.structure(case.kernel) for case in CASES]
  equal = [[a == b for a in structures] for b in structures]
  np.testing.assert_array_equal(equal, np.eye(len(CASES), dtype=bool))


@pytest.mark.parametrize(
  'kernel', [kernels.ExponentialKernel(), kernels.GaussianKernel()]
)
def test_log_kernel_is_the_logarithm_and_does_not_overflow(kernel):
  assert hasattr(kernel, 'log_kernel')
  x, y = normal(5, 2, DIM)
  np.testing.assert_allclose(
    kernel.log_kernel(x, y), jnp.log(kernel(x, y)), rtol=1e-12
  )
  x, y = (1e4 * v.astype('float32') for v in (x, y))
  assert kernel(x, y) in (0, math.inf)
  assert jnp.isfinite(kernel.log_kernel(x, y))


def test_a_signed_kernel_has_no_log_kernel():
  assert not hasattr(kernels.LinearKernel(), 'log_kernel')


# Bad input.


@every_kernel
def test_bad_inputs_are_named(case):
  good = jnp.zeros(DIM)
  for x, y, message in (
    (jnp.zeros((2, DIM)), good, r'x has shape \[2, 5\]; expected'),
    (good, jnp.zeros(()), r'y has shape \[\]; expected'),
    (good, jnp.zeros(DIM - 1), 'x and y disagree in d_k: 5 and 4'),
    (good, jnp.zeros(DIM, int), 'y has dtype int'),
  ):
    with pytest.raises(ValueError, match=message):
      case.kernel(x, y)


def test_bad_parameters_are_named():
  with pytest.raises(ValueError, match=r'limit is -1\.0; .* > 0'):
    kernels.CappedExponentialKernel(-1.0)
