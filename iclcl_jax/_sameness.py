"""When two functions are the same: what a compiled program is kept by.

`optax.sgd(0.1)` and `lambda p, v: ...` are new objects each time they are
written. Here they are equal if their code is, and the values that it refers to:
defaults, closures, and global names. Where such a value may change unseen (a
list, an object of an unknown class), the function is equal to itself alone, as
for `jax.jit`.
"""

import dataclasses
import enum
import functools
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

_PLAIN = (
  *(type(None), bool, int, str, bytes, complex, range, frozenset, type(...)),
  *(np.dtype, enum.Enum, types.CodeType),
)
_JITTED = type(jax.jit(lambda: None))
# Packages whose modules, classes and named functions stay what they are.
_LIBRARIES = {'iclcl_jax', 'jax', 'jaxlib', 'numpy', 'optax', 'flax', 'equinox'}
_LIBRARIES |= sys.stdlib_module_names - {'__main__'}


class NoName(Exception):
  """A call, or a function, that refers to a traced value."""


class _MayChange(Exception):
  pass


class _Itself:
  """Equal to the same object alone."""

  def __init__(self, value: Any):
    self.value = value

  def __eq__(self, other):
    return isinstance(other, _Itself) and self.value is other.value

  def __hash__(self):
    return id(self.value)


class Static:
  """A function, equal to others of the same code and references."""

  def __init__(self, value: Any):
    self.value = value
    self.is_traced = False
    try:  # What it refers to now: another value later is another function.
      self._key = sameness(value)
    except NoName:
      self._key, self.is_traced = _Itself(value), True

  def __call__(self, *args, **kwargs):
    return self.value(*args, **kwargs)

  def __repr__(self):
    return getattr(self.value, '__qualname__', repr(self.value))

  @property
  def __wrapped__(self):  # Where `inspect` looks for a signature.
    return self.value

  def __eq__(self, other):
    return isinstance(other, Static) and self._key == other._key

  def __hash__(self):
    return hash(self._key)


def check_untraced(tree: Any, leaves: Sequence[Any]) -> None:
  """Raises `NoName` if an argument, or a function in it, holds a tracer."""
  _, static = tree.node_data() or (None, ())
  static = static if isinstance(static, tuple) else (static,)
  if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or any(
    isinstance(item, Static) and item.is_traced for item in static
  ):
    raise NoName
  for child in tree.children():
    check_untraced(child, ())


def sameness(value: Any) -> Hashable:
  """Returns a key that two values share if they mean the same.

  It has no hash where the value has none. Raises `NoName` if a function refers
  to a traced value.
  """
  try:
    return _key_of(value, {})
  except _MayChange:
    return type(value), value


def _key_of(value: Any, seen: dict[int, int]) -> Hashable:
  """Walks through all that a value refers to; functions are `seen` once."""
  if isinstance(value, jax.core.Tracer):
    raise NoName
  if isinstance(value, float):  # Zeros of both signs; NaN.
    return type(value), value.hex()
  if isinstance(value, _PLAIN):
    return type(value), value
  if isinstance(value, np.generic):
    return type(value), value.tobytes()
  if isinstance(value, jax.Array) or _is_named(value):
    return _Itself(value)
  parts = _parts(value)
  if isinstance(value, types.FunctionType):
    if id(value) in seen:
      return seen[id(value)]
    seen[id(value)] = len(seen)
  return type(value), *(_key_of(part, seen) for part in parts)


def _parts(value: Any) -> Sequence[Any]:
  """Returns what decides how a value behaves."""
  if isinstance(value, tuple):
    return value
  if isinstance(value, functools.partial):
    return value.func, value.args, tuple(value.keywords.items())
  if isinstance(value, types.MethodType):
    return value.__func__, value.__self__
  if isinstance(value, types.FunctionType):
    return _references(value)
  if isinstance(value, Static):
    return (value.value,)
  if isinstance(value, _JITTED):
    return (value.__wrapped__,)  # type: ignore[attr-defined]
  is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
  if is_instance and _is_library(type(value).__module__):
    return [getattr(value, field.name) for field in dataclasses.fields(value)]
  raise _MayChange


def _is_named(value: Any) -> bool:
  """Whether a library knows it by its name: a module, class or function."""
  if isinstance(value, types.ModuleType):
    return _is_library(value.__name__)
  module, name = (
    getattr(value, attribute, None)
    for attribute in ('__module__', '__qualname__')
  )
  if not isinstance(module, str) or not isinstance(name, str):
    return isinstance(value, types.BuiltinFunctionType)
  found: Any = sys.modules.get(module) if _is_library(module) else None
  for part in name.split('.'):
    found = getattr(found, part, None)
  return found is value


def _is_library(module: str) -> bool:
  return module.partition('.')[0] in _LIBRARIES


def _references(function: types.FunctionType) -> list[Any]:
  """Returns its code, and all values that a call of the function may read."""
  module = function.__globals__.get('__name__') or ''
  if hasattr(function, '__wrapped__') and module.startswith('iclcl_jax.'):
    # A door is known by what is behind it.
    return [function.__code__, *function.__dict__.items()]
  found = [
    function.__code__,
    function.__defaults__,
    *(function.__kwdefaults__ or {}).items(),
    *function.__dict__.items(),
    *map(_content, function.__closure__ or ()),
  ]
  if not _is_library(module):
    names = sorted(_names(function.__code__) & function.__globals__.keys())
    found += [function.__globals__[name] for name in names]
  return found


def _content(cell: types.CellType) -> Any:
  try:
    return cell.cell_contents
  except ValueError:  # Not bound yet.
    return None


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> frozenset[str]:
  """Returns the global names in a piece of code, among others."""
  inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
  return frozenset(code.co_names).union(*map(_names, inner))
