"""Checks of user input that annotations cannot say, at trace time.

Every check raises `ValueError` with the name of the argument, what it was,
what was expected, and how to mend it. Values are looked at only when they are
known: inside a caller's `jit` a check of values is skipped.
"""

import contextlib
import functools
import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Kind(NamedTuple):
  """A kind of numbers for `jnp.issubdtype`, its name, and a dtype of it."""

  numbers: Any
  name: str
  dtype: str


FLOATING = Kind(jnp.floating, 'a floating-point array', 'float32')
INTEGER = Kind(jnp.integer, 'an array of integers', 'int32')
BOOLEAN = Kind(jnp.bool_, 'booleans', 'bool')


def is_concrete(*arrays: Any) -> bool:
  """Whether no leaf is a tracer, so that values may be looked at."""
  leaves = jax.tree.leaves(arrays)
  return not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def check_concrete(
  name: str, *arrays: Any, remedy: str = 'Call it outside jit, vmap and grad.'
) -> None:
  if not is_concrete(*arrays):
    raise ValueError(
      f'{name} is traced; expected concrete numbers, which are read on the '
      f'host. {remedy}'
    )


def check_finite(name: str, array: Any) -> None:
  if not np.all(np.isfinite(np.asarray(array, np.float64))):
    raise ValueError(f'{name} holds NaN or infinity; expected finite numbers.')


class _Thread(threading.local):
  """What the compiled body that is being traced may look at."""

  places: Mapping[int, int] = MappingProxyType({})  # Of operands, by tracer.
  checks: list[Callable[[Sequence[Any]], None]] | None = None


_thread = _Thread()


@contextlib.contextmanager
def watching(tracers: Sequence[Any]) -> Iterator[list]:
  """Collects the checks of a body that is traced; each takes the operands."""
  before = _thread.places, _thread.checks
  _thread.places = {id(tracer): place for place, tracer in enumerate(tracers)}
  _thread.checks = []
  try:
    yield _thread.checks
  finally:
    _thread.places, _thread.checks = before


def look(check: Callable[..., None], *arrays: Any) -> bool:
  """Calls `check(*arrays)` where the values can be known; says whether it does.

  In the compiled body of a door these are the values of its arguments: the
  check is made at every call, and must refer to no other array.
  """
  places = [_thread.places.get(id(array)) for array in arrays]
  known = [
    a if p is None else None for a, p in zip(arrays, places, strict=True)
  ]
  if not is_concrete(known):
    return False

  def check_again(operands: Sequence[Any]) -> None:
    pairs = zip(known, places, strict=True)
    check(*(a if p is None else operands[p] for a, p in pairs))

  if _thread.checks is None or places == [None] * len(places):
    with jax.ensure_compile_time_eval():
      check(*arrays)
  else:
    _thread.checks.append(check_again)
  return True


def check_array(name: str, array: Any, shape: str) -> None:
  """Checks for a floating-point array of the rank of `shape`, as `'N d_k'`."""
  check_kind(name, array, shape.split(), FLOATING)


def check_kind(name: str, array: Any, axes: Sequence[str], kind: Kind) -> None:
  """Checks for an array of this kind of numbers and of the rank of `axes`."""
  try:
    shape, dtype = array.shape, array.dtype
  except AttributeError:
    found = 'a function' if callable(array) else kind_of(array)
    raise ValueError(
      f'{name} is {found}; expected {kind.name} of shape '
      f'[{", ".join(axes)}]. Wrap it in jnp.asarray.'
    ) from None
  if len(shape) != len(axes):
    remedy = (
      'Core functions take one sequence and one head: use jax.vmap for further '
      'leading axes, or index the axis away.'
    )
    if len(shape) < len(axes):
      remedy = 'Add what is missing, for example an axis of one, x[None].'
    expected = f'expected [{", ".join(axes)}]. {remedy}'
    raise ValueError(f'{name} has shape {list(shape)}; {expected}')
  if not _is_of_kind(dtype, kind.numbers):
    remedy = f'Cast it, for example {name}.astype(jnp.{kind.dtype}).'
    if kind is BOOLEAN:
      remedy = 'Compare first, for example jnp.arange(N) < length.'
    raise ValueError(
      f'{name} has dtype {dtype}; expected {kind.name}. {remedy}'
    )


@functools.lru_cache(maxsize=256)
def _is_of_kind(dtype: Any, numbers: Any) -> bool:
  return jnp.issubdtype(dtype, numbers)


def check_same(
  axis: str, name_a: str, size_a: int, name_b: str, size_b: int
) -> None:
  """Checks that two arguments agree in the size of a shared axis."""
  if size_a != size_b:
    raise ValueError(
      f'{name_a} and {name_b} disagree in {axis}: {size_a} and {size_b}. '
      f'Pass arrays whose {axis} axes have equal sizes.'
    )


def check_dtypes(
  arrays: dict[str, Any], states: dict[str, Any] | None = None
) -> None:
  """Checks that all arrays, by name, have one dtype, as JAX will read them.

  For `states` float32 will do beside arrays of 16 bits.
  """
  arrays = arrays | (states or {})
  if len({array.dtype for array in arrays.values()}) < 2:
    return
  dtypes = {
    name: np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
    for name, array in arrays.items()
  }
  own = {dtype for name, dtype in dtypes.items() if name not in (states or {})}
  sums = {dtypes[name] for name in states or {}}
  if len(own) == 1 and all(d.itemsize == 2 for d in own):
    sums -= {np.dtype('float32')}
  if len(own | sums) > 1:
    found = ', '.join(f'{name}: {dtype}' for name, dtype in dtypes.items())
    raise ValueError(
      f'dtypes disagree ({found}); expected one dtype for all. Cast the '
      'others with .astype.'
    )


def check_float_dtype(name: str, dtype: Any) -> None:
  try:
    is_floating = jnp.issubdtype(dtype, jnp.floating)
  except TypeError:
    is_floating = False
  if not is_floating or jnp.finfo(dtype).bits < 16:
    raise ValueError(
      f'{name} is {getattr(dtype, "__name__", dtype)}; expected a '
      'floating-point dtype of at least 16 bits, such as jnp.float32.'
    )


def check_num_query_tokens(
  num_query_tokens: Any, size: int, *, num_demonstrations: int = 1
) -> None:
  """Checks that the query side leaves `num_demonstrations` tokens or more."""
  at_least(0, num_query_tokens=num_query_tokens)
  if num_query_tokens + num_demonstrations > size:
    raise ValueError(
      f'num_query_tokens is {num_query_tokens} of {size} tokens; expected '
      f'fewer than {size - num_demonstrations + 1}.'
    )


def at_least(minimum: int, /, **counts: Any) -> None:
  """Checks that every argument is a Python integer of at least `minimum`."""
  for name, value in counts.items():
    is_bool = isinstance(value, bool)
    is_integer = isinstance(value, int | np.integer) and not is_bool
    if not is_integer or value < minimum:
      hint = '' if is_integer else ' Counts are static: pass a Python int.'
      raise ValueError(
        f'{name} is {value!r}; expected an integer >= {minimum}.{hint}'
      )


def check_ids(name: str, ids: Any, least: int, stop: int, remedy: str) -> None:
  """Checks that integers, where known, are from `least` on, below `stop`."""

  def check(ids: Any) -> None:
    ids = np.asarray(ids)
    outside = ids[(ids < least) | (ids >= stop)]
    if outside.size:
      raise ValueError(
        f'{name} holds {outside[0]}; expected integers from {least} to '
        f'{stop - 1}. {remedy}'
      )

  look(check, ids)


def check_room(name: str, capacity: int, remedy: str, *counts: Any) -> None:
  """Checks that so many tokens fit into a state, where that is known."""

  def check(*counts: Any) -> None:
    total = sum(map(int, counts))
    if total > capacity:
      raise ValueError(
        f'{name} has room for {capacity} tokens, and {total} are to be kept; '
        f'expected no more. {remedy}'
      )

  look(check, *counts)


# What a range may say, as messages print it.
_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
  'minimum': ('>=', operator.ge),
  'maximum': ('<=', operator.le),
  'above': ('>', operator.gt),
  'below': ('<', operator.lt),
}


def check_scalar(name: str, value: Any, **limits: float) -> None:
  """Checks for a finite scalar; `limits` are named as in `_LIMITS`."""
  if np.shape(value) != ():
    raise ValueError(
      f'{name} has shape {list(np.shape(value))}; expected a scalar. Use '
      'jax.vmap to sweep over several.'
    )
  look(functools.partial(_check_range, name, limits), value)


def _check_range(name: str, limits: Mapping[str, float], value: Any) -> None:
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{name} is {value!r}; expected a finite number.'
    ) from error
  pairs = [(_LIMITS[key], limit) for key, limit in limits.items()]
  fits = all(holds(number, limit) for (_, holds), limit in pairs)
  if not (fits and math.isfinite(number)):
    stated = ' and '.join(f'{sign} {limit:g}' for (sign, _), limit in pairs)
    expected = f'a finite number {stated}'.strip()
    raise ValueError(f'{name} is {number}; expected {expected}.')


def _check_scalars(limits: Mapping[str, float], /, **scalars: Any) -> None:
  for name, value in scalars.items():
    check_scalar(name, value, **limits)


# Each checks that all its keyword arguments are finite scalars in a range.
finite = functools.partial(_check_scalars, {})
non_negative = functools.partial(_check_scalars, {'minimum': 0})
positive = functools.partial(_check_scalars, {'above': 0})
below_one = functools.partial(_check_scalars, {'minimum': 0, 'below': 1})


def check_optimizer(optimizer: Any) -> None:
  is_transformation = callable(getattr(optimizer, 'init', None)) and callable(
    getattr(optimizer, 'update', None)
  )
  if not is_transformation:
    raise ValueError(
      f'optimizer is {kind_of(optimizer)}; expected an optax '
      'transformation, such as optax.sgd(0.1).'
    )

  weights = jax.ShapeDtypeStruct((1, 1), jnp.float32)
  try:  # A traced rate has a dtype of its own.
    with jax.numpy_dtype_promotion('standard'):
      state = jax.eval_shape(optimizer.init, weights)
      jax.eval_shape(optimizer.update, weights, state, weights)
  except TypeError as error:
    raise ValueError(
      f'optimizer cannot be called as update(gradient, state, weights): '
      f'{error}. Expected one that needs no more, such as optax.sgd(0.1).'
    ) from error


def check_type(name: str, value: Any, kind: Any, expected: str) -> None:
  """Raises unless `value` is of this class; `expected` says what to pass."""
  if not isinstance(value, kind):
    raise ValueError(f'{name} is {kind_of(value)}; expected {expected}.')


def check_function(
  name: str, function: Any, num_arguments: int, example: str
) -> None:
  """Raises unless `function` takes as many arguments; `example` names them."""
  if not callable(function):
    raise ValueError(
      f'{name} is {kind_of(function)}; expected a function {example}.'
    )
  if not _takes(function, num_arguments):
    takes = ', '.join(inspect.signature(function).parameters)
    raise ValueError(f'{name} takes ({takes}); expected a function {example}.')


def _takes(function: Callable[..., Any], num_arguments: int) -> bool:
  try:
    inspect.signature(function).bind(*range(num_arguments))
  except ValueError:  # Written in C: unknown.
    return True
  except TypeError:
    return False
  return True


def check_result(name: str, result: Any, shape: tuple[int, ...]) -> None:
  """Raises unless a caller's function has returned real numbers of a shape."""
  is_array = getattr(result, 'shape', None) == shape
  if not is_array or jnp.issubdtype(result.dtype, jnp.complexfloating):
    raise ValueError(
      f'{name} returned {describe(result)}; expected an array of shape '
      f'{list(shape)}.'
    )


def check_real_scalar(
  name: str, function: Callable[..., Any], *arrays: Any
) -> None:
  """Raises unless `function(*arrays)` is a real scalar, which has a slope."""
  result = jax.eval_shape(function, *arrays)
  is_scalar = getattr(result, 'shape', None) == ()
  if not is_scalar or not jnp.issubdtype(result.dtype, jnp.floating):
    raise ValueError(
      f'{name} returns {describe(result)}; expected a scalar array [] of a '
      'floating-point dtype. Sum over what remains, for example with jnp.sum.'
    )


def check_feature_map(name: str, phi: Any) -> None:
  if not is_feature_map(phi, name):
    raise ValueError(
      f'{name} is {kind_of(phi)}; this function needs a FeatureMap: a '
      'callable with a method scaled(x) -> (log_scale, features), such as '
      'features.PositiveFeatures. For an exact kernel use '
      'attention.kernel_attention or the functions of iclcl_jax.dual.'
    )


def is_feature_map(phi: Any, name: str = 'phi') -> bool:
  """Whether `phi` is a feature map (has `scaled`), or a kernel; else raises."""
  if isinstance(phi, type):
    raise ValueError(
      f'{name} is the class {phi.__name__}; expected an instance. Call it '
      'first.'
    )
  if callable(getattr(phi, 'scaled', None)):
    return True
  if callable(phi) and _takes(phi, 2):
    return False
  raise ValueError(
    f'{name} is {kind_of(phi)}; expected a FeatureMap (a callable with '
    'a method scaled(x) -> (log_scale, features)) or a Kernel (a callable '
    'k(x, y), with log_kernel(x, y) when it is positive). See '
    'iclcl_jax.types.'
  )


def describe(tree: Any) -> str:
  if isinstance(tree, tuple):
    return f'({", ".join(map(describe, tree))})'
  if hasattr(tree, 'shape') and hasattr(tree, 'dtype'):
    return f'{tree.dtype} {list(tree.shape)}'
  return kind_of(tree)


def kind_of(value: Any) -> str:
  """Returns the name of a class, as in 'an int'."""
  name = type(value).__name__
  return f'{"an" if name[0] in "AEIOUaeiou" else "a"} {name}'


def check_key(name: str, key: Any) -> None:
  dtype = getattr(key, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    found = f'is {kind_of(key)}'
    if dtype is not None:
      found = f'is an array of {dtype} {list(key.shape)}'
    raise ValueError(
      f'{name} {found}; expected a typed random key, such as jax.random.key(0).'
    )
  if key.shape:
    raise ValueError(
      f'{name} has shape {list(key.shape)}; expected one key. Use jax.vmap '
      'for several.'
    )
