"""Doors: functions whose arguments are checked, and whose bodies are compiled.

A `door` checks its arguments by their annotations and then runs its body as one
program (`_program`). An `eager_door` runs its body as Python: one that looks at
results, or is a few operations. A `host_door` computes on the host.
"""

import functools
import inspect
import threading
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from iclcl_jax import _mesh, _program, _validate
from iclcl_jax.types import DualState, FeatureMap, KernelDualState

_FunctionT = TypeVar('_FunctionT', bound=Callable[..., Any])
_KINDS = (_validate.FLOATING, _validate.INTEGER, _validate.BOOLEAN)


class _Array(NamedTuple):
  """What an annotation says of an array."""

  kind: _validate.Kind
  axes: tuple[str, ...]
  is_sum: bool = False  # A state, which float32 holds for 16-bit tokens.


# Name, annotation and value of each array of a call.
_Arrays: TypeAlias = list[tuple[str, _Array, Any]]
# Checks the argument of a name by its annotation, and returns its arrays.
_Reader: TypeAlias = Callable[[str, Any], _Arrays]


class _Thread(threading.local):
  is_inside = False


_thread = _Thread()


def door(function: _FunctionT) -> _FunctionT:
  """Checks the arguments of a function by their annotations.

  See docs/architecture.md. Scalars are left to the function. A door that is
  called inside another one checks nothing: what it is given was checked, or is
  the library's own. The body is compiled, see `_program.compiled`.
  """
  return _make_door(function, _program.compiled(function), on_host=False)


def eager_door(function: _FunctionT) -> _FunctionT:
  """A `door` whose body is not compiled: it may look at results."""
  return _make_door(function, _mesh.in_auto_axes(function), on_host=False)


def host_door(function: _FunctionT) -> _FunctionT:
  """A `door` to arithmetic on the host: concrete arrays, of any precision."""
  return _make_door(function, function, on_host=True)


def call_outside(
  function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
  """Calls a caller's function, in which a door checks as it does outside."""
  was_inside, _thread.is_inside = _thread.is_inside, False
  try:
    return function(*args, **kwargs)
  finally:
    _thread.is_inside = was_inside


def _make_door(
  function: _FunctionT, body: Callable[..., Any], *, on_host: bool
) -> _FunctionT:
  readers: list[tuple[str, int | None, _Reader]] = []
  parameters = inspect.signature(function).parameters.values()
  for position, parameter in enumerate(parameters):
    place = None if parameter.kind is parameter.KEYWORD_ONLY else position
    reader = _reader(parameter.annotation)
    if reader is not None:
      readers.append((parameter.name, place, reader))

  @functools.wraps(function)
  def checked(*args, **kwargs):
    if _thread.is_inside:
      return body(*args, **kwargs)
    arrays = []
    for name, position, read in readers:
      if position is not None and position < len(args):
        arrays += read(name, args[position])
      elif name in kwargs:
        arrays += read(name, kwargs[name])
    _check_arrays(arrays, on_host)
    _thread.is_inside = True
    try:
      return body(*args, **kwargs)
    finally:
      _thread.is_inside = False

  return cast(_FunctionT, checked)


def _reader(annotation: Any) -> _Reader | None:
  """Returns what reads such an argument, None if nothing is said of it."""
  kinds, is_optional = _kinds_of(annotation)
  array = _array_of(annotation)
  check: Any = None
  if kinds == (FeatureMap,):
    check = _validate.check_feature_map
  elif 'prng_key' in getattr(kinds[0], 'dtypes', ()):
    check = _validate.check_key
  elif all(hasattr(kind, '_fields') for kind in kinds):
    check = functools.partial(_read_fields, {k: _fields(k) for k in kinds})
  elif array is None:
    return None

  def read(name, value):
    if value is None and is_optional:
      return []
    return [(name, array, value)] if check is None else check(name, value) or []

  return read


def _kinds_of(annotation: Any) -> tuple[tuple[Any, ...], bool]:
  """Returns the kinds that an annotation admits, and whether None is one."""
  is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  parts = typing.get_args(annotation) if is_union else (annotation,)
  kinds = tuple(part for part in parts if part is not type(None))
  return kinds, len(kinds) < len(parts)


def _array_of(annotation: Any) -> _Array | None:
  """Returns kind and axes, or None for several kinds, a scalar, any rank."""
  (first, *others), _ = _kinds_of(annotation)
  dtypes = getattr(first, 'dtypes', ())
  if others or not isinstance(dtypes, tuple) or 'complex64' in dtypes:
    return None
  kinds = [kind for kind in _KINDS if kind.dtype in dtypes]
  axes = tuple(first.dim_str.split()) if kinds else ()
  any_rank = any(axis.startswith(('.', '*')) for axis in axes)
  is_sum = axes == ('d_v', 'R')  # Weights of a learner.
  return None if any_rank or not axes else _Array(kinds[0], axes, is_sum)


def _fields(named_tuple: Any) -> dict[str, tuple[_Array, bool]]:
  """Returns the fields that are arrays, and whether they may be None."""
  is_state = named_tuple in (DualState, KernelDualState)
  fields = {}
  for field, annotation in named_tuple.__annotations__.items():
    array = _array_of(annotation)
    if array is not None:
      array = array._replace(is_sum=is_state and field != 'keys')
      fields[field] = array, _kinds_of(annotation)[1]
  return fields


def _read_fields(known: dict, name: str, value: Any) -> _Arrays:
  if type(value) not in known:
    options = (f'{t.__name__}({", ".join(t._fields)})' for t in known)
    raise ValueError(
      f'{name} is {_validate.kind_of(value)}; expected a '
      f'{" or a ".join(options)}. Pass what the library returned, or fill its '
      'fields.'
    )
  arrays: _Arrays = []
  for field, (array, is_optional) in known[type(value)].items():
    found = getattr(value, field)
    if found is not None or not is_optional:  # A count `n` is its own.
      axes = tuple(f'{name}_n' if axis == 'n' else axis for axis in array.axes)
      arrays.append((f'{name}.{field}', array._replace(axes=axes), found))
  return arrays


def _check_arrays(arrays: _Arrays, on_host: bool) -> None:
  for name, (kind, axes, _), array in arrays:
    _validate.check_kind(name, array, axes, kind)
    if on_host:
      _validate.check_concrete(name, array)
      _validate.check_finite(name, array)
  # Masks last: their sizes follow from what they mask.
  arrays.sort(key=lambda entry: entry[1].kind is _validate.BOOLEAN)
  _check_axes(arrays)
  if not on_host:
    floats = [a for a in arrays if a[1].kind is _validate.FLOATING]
    states = {name: array for name, kind, array in floats if kind.is_sum}
    rest = {name: array for name, kind, array in floats if not kind.is_sum}
    _validate.check_dtypes(rest, states)


def _check_axes(arrays: _Arrays) -> None:
  """Checks that axes of one name have one size, and what sizes may be 0."""
  seen: dict[str, tuple[str, int]] = {}
  for name, (kind, axes, _), array in arrays:
    for axis, size in zip(axes, array.shape, strict=True):
      if axis == '_' or not axis.isidentifier():
        continue
      first, known = seen.setdefault(axis, (name, size))
      if size != known and (first == name or kind is _validate.BOOLEAN):
        shape = ', '.join(str(known) if a == axis else a for a in axes)
        raise ValueError(
          f'{name} has shape {list(array.shape)}; expected [{shape}]: {axis} '
          f'is {known} in {first}.'
        )
      _validate.check_same(axis, first, known, name, size)
      if size == 0 and kind is _validate.FLOATING:
        _check_may_be_empty(name, axis, array.shape)


def _check_may_be_empty(name: str, axis: str, shape: tuple[int, ...]) -> None:
  if axis == 'N':
    raise ValueError(
      f'{name} is empty (N = 0); expected at least one demonstration or token. '
      'A model that has seen none is dual.empty.'
    )
  if axis == 'd' or axis.startswith('d_'):
    raise ValueError(
      f'{name} has shape {list(shape)}; expected a width {axis} of at least '
      '1. Drop no feature columns, or check the axis that was split.'
    )
