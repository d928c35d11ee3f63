"""Doors: what an annotation says is checked, and checked once."""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import _door, attention, features, kernels
from iclcl_jax.types import (
  Array,
  Bool,
  FeatureMap,
  Float,
  Int,
  PRNGKeyArray,
)


class Pair(NamedTuple):
  left: Float[Array, 'T d']
  right: Float[Array, ' T'] | None = None


@_door.door
def read(
  x: Float[Array, 'N d_k'],
  matrix: Float[Array, 'N N'] | None = None,
  *,
  where: Int[Array, ' N'] | None = None,
  mask: Bool[Array, ' N'] | None = None,
  pair: Pair | None = None,
  key: PRNGKeyArray | None = None,
  phi: FeatureMap | None = None,
  any_rank: Float[Array, '*batch'] | None = None,
  free: Float[Array, ''] | float = 0.0,
) -> Float[Array, ' N']:
  """Adds the columns.

  >>> read(jnp.ones((2, 3))).tolist()
  [3.0, 3.0]
  """
  return jnp.sum(x, axis=1)


@_door.host_door
def on_host(x: Float[Array, ' n'], y: Float[Array, ' n']) -> float:
  return float(np.dot(x, y))


X = jnp.ones((3, 2))
FAULTS = [
  (lambda: read(None), r'x is a NoneType; expected a floating-point array of'),
  (lambda: read([[1.0]]), r'x is a list; .*\[N, d_k\]\. Wrap it'),
  (lambda: read(X[0]), r'x has shape \[2\]; expected \[N, d_k\]'),
  (lambda: read(x=X.astype(int)), r'x has dtype int\d+; .*x\.astype'),
  (lambda: read(X[:0]), r'x is empty \(N = 0\)'),
  (lambda: read(X[:, :0]), r'x has shape \[3, 0\]; expected a width d_k'),
  (lambda: read(X, X), r'x and matrix disagree in N: 3 and 2\. Pass'),
  (lambda: read(X, (X @ X.T).astype(jnp.float32)), r'dtypes disagree \(x: fl'),
  (
    lambda: read(X, where=X[:, 0]),
    r'where has dtype float\d+; expected an array of int',
  ),
  (lambda: read(X, where=[0]), r'where is a list; expected an array of integ'),
  (lambda: read(X, mask=jnp.ones(2, bool)), r'mask has shape \[2\]; .*\[3\]'),
  (lambda: read(X, mask=jnp.ones(3)), r'mask has dtype .*Compare first'),
  (lambda: read(X, pair=(X,)), r'pair is a tuple; expected a Pair\(left, rig'),
  (lambda: read(X, pair=Pair(X[0])), r'pair\.left has shape \[2\]; .*\[T, d\]'),
  (lambda: read(X, pair=Pair(X, X[0, :2])), r'pair.left and pair.right disag'),
  (lambda: read(X, key=0), r'key is an int; expected a typed random key'),
  (lambda: read(X, phi=kernels.LinearKernel()), r'phi is a LinearKernel; this'),
  (lambda: jax.vmap(read)(X), r'x has shape \[2\]; expected \[N, d_k\]'),
  (lambda: jax.jit(read)(X, X), r'x and matrix disagree in N'),
  (lambda: on_host(X, X[0]), r'x has shape \[3, 2\]; expected \[n\]'),
  (lambda: jax.jit(on_host)(X[0], X[0]), r'x is traced; .*outside jit'),
]


@pytest.mark.parametrize(('call', 'message'), FAULTS, ids=range(len(FAULTS)))
def test_what_an_annotation_says_is_checked(call, message):
  with (
    jax.numpy_dtype_promotion('standard'),
    pytest.raises(ValueError, match=message),
  ):
    call()


def test_what_an_annotation_leaves_open_passes():
  read(
    np.ones((3, 2)),
    where=jnp.arange(3),
    mask=X[:, 0] > 0,
    pair=Pair(X),
    key=jax.random.key(0),
    phi=features.EluPlusOneFeatures(),
    any_rank=X[None],
    free=np.inf,
  )
  assert on_host(np.ones(2, np.float32), np.ones(2)) == 2.0
  assert on_host(np.ones(0), np.ones(0)) == 0.0


def test_a_door_keeps_name_signature_and_errors_of_calls():
  assert read.__name__ == 'read'
  assert list(inspect.signature(read).parameters)[:2] == ['x', 'matrix']
  with pytest.raises(TypeError, match='missing 1 required positional'):
    read()
  with pytest.raises(TypeError, match='unexpected keyword'):
    read(X, nonsense=1)


def test_a_call_inside_a_door_is_not_checked_again():
  @_door.door
  def outer(x: Float[Array, 'N d_k'], inner) -> Array:
    return inner(x[0])

  assert outer(X, lambda x: read(x[None, None]).shape) == (1, 2)
  with pytest.raises(ZeroDivisionError):
    outer(X, lambda x: 1 / 0)
  with pytest.raises(ValueError, match='x has shape'):  # Outside again.
    read(X[0])


def test_doors_compose_with_transformations():
  batch = jnp.ones((5, 3, 2))
  attend = jax.vmap(attention.softmax_attention)
  assert attend(batch[:, 0], batch, batch).shape == (5, 2)
  slope = jax.jit(jax.grad(lambda x: jnp.sum(read(x))))(X)
  np.testing.assert_array_equal(slope, X)
