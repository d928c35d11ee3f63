"""Arithmetic under which an identity is checked, and its tolerances.

A matrix product in float32 means different things on different machines: one
bfloat16 pass on a TPU by default, TF32 on recent GPUs, float32 on a CPU. An
`Arithmetic` names what ran.

Inputs of 16 bits are multiplied as they are; every sum over tokens and every
state is kept in float32, and results are cast back (`widen`, `product`,
`cast_like`).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

_FunctionT = TypeVar('_FunctionT', bound=Callable[..., Any])
# Residual (see iclcl_jax.equivalence) that rounding alone may cause.
TOLERANCES = {
  'float64': 1e-12,
  'float32': 1e-5,
  'bfloat16': 2e-2,
  'float16': 2e-2,
}


def tolerance(dtype: Any) -> float:
  """Returns the largest residual that rounding explains in a dtype.

  Example:
    >>> tolerance(jnp.float32)
    1e-05
  """
  name = jnp.dtype(dtype).name
  if name not in TOLERANCES:
    raise ValueError(
      f'dtype is {name}; expected one of {", ".join(TOLERANCES)}.'
    )
  return TOLERANCES[name]


def accumulation_dtype(dtype: Any) -> Any:
  """Returns the dtype of sums over tokens: float32 at least."""
  dtype = jax.dtypes.canonicalize_dtype(dtype)
  return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def widen(tree: Any) -> Any:
  """Casts the 16-bit floating-point arrays of a tree to float32."""

  def cast(x):
    is_half = getattr(x, 'dtype', None) in (jnp.float16, jnp.bfloat16)
    return jnp.asarray(x, jnp.float32) if is_half else x

  return jax.tree.map(cast, tree)


def widened(function: _FunctionT) -> _FunctionT:
  """Runs a function in float32 at least, and casts its results back.

  The results get the dtype of the first argument, `self` apart.
  """
  names = list(inspect.signature(function).parameters)
  position = int(names[0] == 'self')

  @functools.wraps(function)
  def wide(*args, **kwargs):
    results = function(*widen(args), **widen(kwargs))
    named = kwargs.get(names[position])
    like = jax.tree.leaves(args[position] if named is None else named)[-1]
    return jax.tree.map(lambda result: cast_like(result, like), results)

  return cast(_FunctionT, wide)


def cast_like(x: jax.Array, like: Any) -> jax.Array:
  """Casts a result back to the dtype of an input, as JAX reads it."""
  return x.astype(jax.dtypes.canonicalize_dtype(like.dtype))


def product(a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
  """Returns `a @ b` of operands in a dtype, summed in float32 at least.

  As in flash attention: matrix units multiply bfloat16 and add up in float32 at
  no cost. float16 is widened first: scores may exceed its range. Without a
  dtype it is the narrower of both.
  """
  if dtype is None:
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
  dtype = jnp.float32 if dtype == jnp.float16 else dtype
  return jnp.matmul(
    a.astype(dtype),
    b.astype(dtype),
    preferred_element_type=accumulation_dtype(dtype),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
  """How matrix products are computed while an identity is checked.

  Attributes:
    name: what certificates print.
    transform: turns a function into one that computes in this arithmetic.
    reduced_tolerance: the residual that reduced precision explains, below which
      a verdict is 'precision-limited'; None for full precision.
  """

  name: str
  transform: Callable[[Callable[..., Any]], Callable[..., Any]]
  reduced_tolerance: float | None = None


def ratio(difference: jax.Array, scale: jax.Array) -> jax.Array:
  """Divides; 0 where nothing differs, even relative to zero."""
  return difference / jnp.where(scale > 0, scale, 1)


HIGHEST = Arithmetic(
  name='highest',
  transform=lambda fn: jax.default_matmul_precision('highest')(fn),
)
PLATFORM_DEFAULT = Arithmetic(
  name='platform default',
  transform=lambda fn: jax.default_matmul_precision('default')(fn),
  reduced_tolerance=2e-2,
)
