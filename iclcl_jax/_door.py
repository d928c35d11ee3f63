"""Doors: functions whose arguments are checked, and whose bodies are compiled.

A `door` checks its arguments by their annotations and then runs its body as one
program (`_program`). An `eager_door` runs its body as Python: one that looks at
results, or is a few operations. A `host_door` computes on the host.
"""

import functools
import inspect
import threading
import types as python_types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from iclcl_jax import _mesh, _program, _validate
from iclcl_jax.types import DualState, FeatureMap, KernelDualState

_FunctionT = TypeVar('_FunctionT', bound=Callable[..., Any])
# Kinds of numbers, by a dtype that only annotations of the kind admit.
_KINDS = {
  'float32': _validate.FLOATING,
  'int32': _validate.INTEGER,
  'bool': _validate.BOOLEAN,
}


class _Array(NamedTuple):
  """What an annotation says of an array."""

  kind: _validate.Kind
  axes: tuple[str, ...]
  is_sum: bool = False  # A state, which float32 holds for 16-bit tokens.


class _Argument(NamedTuple):
  """An argument, or a field of one, whose annotation can be checked."""

  name: str  # `argument.field` for a field.
  position: int | None  # None for a keyword.
  is_optional: bool
  # An array; a check of anything else; fields of the types of a `NamedTuple`.
  expected: _Array | Callable[[str, Any], None] | dict[Any, list['_Argument']]


class _Thread(threading.local):
  is_inside = False


_thread = _Thread()
_ABSENT = object()


def door(function: _FunctionT) -> _FunctionT:
  """Checks the arguments of a function by their annotations.

  They are read once, when the function is defined; docs/architecture.md says
  what they mean. Scalars are left to the function. A door that is called inside
  another one checks nothing: what it is given was checked, or is the library's
  own. The body is compiled, see `_program.compiled`.
  """
  return _make_door(function, _program.compiled(function), on_host=False)


def eager_door(function: _FunctionT) -> _FunctionT:
  """A `door` whose body is not compiled: it may look at results."""
  return _make_door(function, _mesh.in_auto_axes(function), on_host=False)


def host_door(function: _FunctionT) -> _FunctionT:
  """A `door` to arithmetic on the host: concrete arrays, of any precision."""
  return _make_door(function, function, on_host=True)


def _make_door(
  function: _FunctionT, body: Callable[..., Any], *, on_host: bool
) -> _FunctionT:
  found: list[_Argument] = []
  parameters = inspect.signature(function).parameters.values()
  for position, parameter in enumerate(parameters):
    place = None if parameter.kind is parameter.KEYWORD_ONLY else position
    found += _read(parameter.name, place, parameter.annotation)
  arguments = tuple(found)

  @functools.wraps(function)
  def checked(*args, **kwargs):
    if _thread.is_inside:
      return body(*args, **kwargs)
    _check_call(arguments, args, kwargs, on_host)
    _thread.is_inside = True
    try:
      return body(*args, **kwargs)
    finally:
      _thread.is_inside = False

  return cast(_FunctionT, checked)


def _read(name: str, position: int | None, annotation: Any) -> list[_Argument]:
  """Returns the argument in a list, or none if its annotation says nothing."""
  origin = typing.get_origin(annotation)
  is_union = origin in (typing.Union, python_types.UnionType)
  parts = typing.get_args(annotation) if is_union else (annotation,)
  is_optional = type(None) in parts
  parts = tuple(part for part in parts if part is not type(None))
  expected: Any = None
  if parts == (FeatureMap,):
    expected = _validate.check_feature_map
  elif all(hasattr(part, '_fields') for part in parts):
    expected = {part: _read_fields(name, part) for part in parts}
  elif 'prng_key' in getattr(parts[0], 'dtypes', ()):
    expected = _validate.check_key
  elif len(parts) == 1:
    expected = _read_array(annotation=parts[0])
  if expected is None:
    return []
  return [_Argument(name, position, is_optional, expected)]


def _read_fields(name: str, named_tuple: Any) -> list[_Argument]:
  """Returns the fields that are arrays; a count `n` is their argument's own."""
  fields: list[_Argument] = []
  for position, field in enumerate(named_tuple._fields):
    annotation = named_tuple.__annotations__[field]
    for argument in _read(f'{name}.{field}', position, annotation):
      if isinstance(argument.expected, _Array):
        axes = argument.expected.axes
        own = tuple(f'{name}_n' if axis == 'n' else axis for axis in axes)
        is_sum = named_tuple in (DualState, KernelDualState) and field != 'keys'
        expected = argument.expected._replace(axes=own, is_sum=is_sum)
        fields.append(argument._replace(expected=expected))
  return fields


def _read_array(annotation: Any) -> _Array | None:
  """Returns kind and axes, or None for several kinds, a scalar, any rank."""
  dtypes = getattr(annotation, 'dtypes', ())
  if not isinstance(dtypes, tuple) or 'complex64' in dtypes:
    return None
  kinds = [kind for dtype, kind in _KINDS.items() if dtype in dtypes]
  axes = tuple(annotation.dim_str.split()) if kinds else ()
  any_rank = any(axis.startswith(('.', '*')) for axis in axes)
  is_sum = axes == ('d_v', 'R')  # Weights of a learner.
  return None if any_rank or not axes else _Array(kinds[0], axes, is_sum)


def _check_call(arguments, args, kwargs, on_host: bool) -> None:
  arrays: list[tuple[str, _Array, Any]] = []
  for name, position, is_optional, expected in arguments:
    if position is not None and position < len(args):
      value = args[position]
    else:
      value = kwargs.get(name, _ABSENT)
    if value is _ABSENT or (value is None and is_optional):
      continue
    if isinstance(expected, _Array):
      arrays.append((name, expected, value))
    elif isinstance(expected, dict):
      arrays += _arrays_of(name, expected, value)
    else:
      expected(name, value)
  for name, (kind, axes, _), array in arrays:
    if on_host:
      _validate.check_concrete(name, array)
    _validate.check_kind(name, array, axes, kind)
  # Masks last: their sizes follow from what they mask.
  arrays.sort(key=lambda entry: entry[1].kind is _validate.BOOLEAN)
  _check_axes(arrays)
  if not on_host:
    floats = [a for a in arrays if a[1].kind is _validate.FLOATING]
    states = {name: array for name, kind, array in floats if kind.is_sum}
    rest = {name: array for name, kind, array in floats if not kind.is_sum}
    _validate.check_dtypes(rest, states)


def _arrays_of(name: str, types: dict, value: Any):
  if type(value) not in types:
    known = (f'{t.__name__}({", ".join(t._fields)})' for t in types)
    raise ValueError(
      f'{name} is a {type(value).__name__}; expected a {" or a ".join(known)}. '
      'Pass what the library returned, or fill its fields.'
    )
  for field, position, is_optional, expected in types[type(value)]:
    if value[position] is not None or not is_optional:
      yield field, expected, value[position]


def _check_axes(arrays: list[tuple[str, _Array, Any]]) -> None:
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
