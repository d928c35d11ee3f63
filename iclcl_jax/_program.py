"""Functions of arrays as compiled programs: one for each kind of call."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np

from iclcl_jax import _mesh, _validate
from iclcl_jax._sameness import NoName, Static, sameness

_FunctionT = TypeVar('_FunctionT', bound=Callable[..., Any])
# Programs that keep arrays or objects of a caller alive: the last so many.
_MOST_KEPT = 64
_NUMBERS = (jax.Array, np.ndarray, np.generic, float)
_OPERAND = object()
# What a body raises that reads traced values as Python numbers.
_READS_VALUES = (
  jax.errors.ConcretizationTypeError,
  jax.errors.NonConcreteBooleanIndexError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
)


def compiled(function: _FunctionT) -> _FunctionT:
  """Returns the function as one program for each kind of call.

  Arrays and Python floats, wherever they are in the arguments, are operands of
  the program. So are integers where an array could be passed. All else is the
  kind of call: structures, sizes, None, dtypes, and functions, which count as
  the same where `_sameness` says so. What the function asks `_validate.look` to
  check is checked at every call.

  The function runs as Python where an argument is traced, so that it composes
  with transformations; where a kind has no hash; and where it, or a function
  that it was given, reads values.
  """
  parameters = list(inspect.signature(function).parameters.values())
  body = _mesh.in_auto_axes(function)
  numbers, indices = (_places(parameters, k) for k in (_is_number, _is_index))

  def run(call: _Call, operands: Sequence[Any]) -> _Answer:
    with _validate.watching(operands) as checks:
      args, kwargs = call.fill(operands)
      return _Answer(body(*args, **kwargs), tuple(checks))

  run.__name__ = run.__qualname__ = function.__name__
  program = jax.jit(run, static_argnums=0)

  @functools.wraps(function)
  def answer(*args, **kwargs):
    try:
      call, operands = _split(args, kwargs, numbers, indices)
    except NoName:
      return body(*args, **kwargs)
    with _validate.knowing(operands):
      try:
        if call.keeps:
          found = _program_that_keeps(run, call)(operands)
        else:
          found = program(call, operands)
      except _READS_VALUES:
        found = None
    if found is None:
      return body(*args, **kwargs)
    _validate.repeat(found.checks, operands)
    return found.result

  return cast(_FunctionT, answer)


@functools.lru_cache(maxsize=_MOST_KEPT)
def _program_that_keeps(run: Callable[..., Any], call: '_Call'):
  def run_call(operands):
    return run(call, operands)

  run_call.__name__ = run_call.__qualname__ = run.__name__
  return jax.jit(run_call)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Answer:
  """A result, and what to look at in the operands."""

  result: Any
  checks: tuple = dataclasses.field(metadata={'static': True})


class _Call:
  """A call without its operands; equal to others of its kind."""

  def __init__(self, arguments: list, key: tuple, keeps: bool):
    self._arguments, self._key, self._hash = arguments, key, hash(key)
    self.keeps = keeps  # Something alive that may be large.

  def fill(self, operands: Sequence[Any]) -> tuple[list, dict[str, Any]]:
    """Returns the arguments with these operands."""
    rest = iter(operands)
    args, kwargs = [], {}
    for place, tree, leaves in self._arguments:
      value = jax.tree.unflatten(
        tree, [next(rest) if leaf is _OPERAND else leaf for leaf in leaves]
      )
      if isinstance(place, str):
        kwargs[place] = value
      else:
        args.append(value)
    return args, kwargs

  def __eq__(self, other):
    return isinstance(other, _Call) and self._key == other._key

  def __hash__(self):
    return self._hash


def _split(args, kwargs, numbers, indices) -> tuple[_Call, list[Any]]:
  """Separates the operands of a call from its kind."""
  arguments, operands = [], []
  key: list[Any] = []
  keeps = False
  for place, value in (*enumerate(args), *sorted(kwargs.items())):
    leaves, tree = jax.tree.flatten(value)
    # What should be no number is an error, which the function will name.
    is_itself = len(leaves) == 1 and leaves[0] is value
    may_be_number = place in numbers or not is_itself
    key += [place, tree]
    for index, leaf in enumerate(leaves):
      if isinstance(leaf, jax.core.Tracer):
        raise NoName
      is_index = place in indices and type(leaf) is int
      if is_index or (may_be_number and isinstance(leaf, _NUMBERS)):
        operands.append(leaf)
        key.append(_OPERAND)
        leaves[index] = _OPERAND
      else:
        leaf_key, kept = sameness(leaf)
        key.append(leaf_key)
        keeps |= kept
    for static in _statics(tree):
      if static.holds_tracer:
        raise NoName
      keeps |= static.keeps
    arguments.append((place, tree, leaves))
  try:
    return _Call(arguments, tuple(key), keeps), operands
  except TypeError:
    raise NoName from None


def _statics(tree: Any) -> Iterator[Static]:
  data = tree.node_data()
  if data is None:
    return
  if isinstance(data[1], tuple):
    yield from (item for item in data[1] if isinstance(item, Static))
  for child in tree.children():
    yield from _statics(child)


def _is_number(annotation: Any) -> bool:
  """Whether an argument may be an array or a Python float, or is unknown."""
  kinds = typing.get_args(annotation) or (annotation,)
  return any(
    kind in (float, jax.Array, Any, inspect.Parameter.empty)
    or hasattr(kind, 'dtypes')
    for kind in kinds
  )


def _is_index(annotation: Any) -> bool:
  """Whether an argument may be an array or a Python integer."""
  return int in typing.get_args(annotation) and _is_number(annotation)


def _places(parameters, is_meant: Callable[[Any], bool]) -> frozenset:
  """Returns positions and names of the parameters of such annotations."""
  found: set[int | str] = set()
  for position, parameter in enumerate(parameters):
    if is_meant(parameter.annotation):
      found |= {position, parameter.name}
  return frozenset(found)
