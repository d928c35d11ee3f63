"""Functions of arrays as compiled programs: one for each kind of call."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np

from iclcl_jax import _mesh, _validate
from iclcl_jax._sameness import NoName, check_untraced, sameness

_FunctionT = TypeVar('_FunctionT', bound=Callable[..., Any])
# Programs of one function, and what they keep alive: the last so many.
_MOST_KEPT = 64
_NUMBERS = (jax.Array, np.ndarray, np.inexact, float)


def compiled(function: _FunctionT) -> _FunctionT:
  """Returns the function as one program for each kind of call.

  Arrays and floats are operands of the program, integers where an array could
  be passed. All else is the kind of call: structures, sizes, None, dtypes, and
  functions, by `_sameness`. What `_validate.look` checks is checked every time.

  The function runs as Python where an argument is traced, where a kind has no
  hash, and where it cannot be traced: it reads values or raises an error.
  """
  body = _mesh.in_auto_axes(function)
  indices = _indices(inspect.signature(function).parameters)

  @functools.lru_cache(maxsize=_MOST_KEPT)
  def program_of(call: _Call) -> Callable[..., Any]:
    def run(operands):
      with _validate.watching(operands) as checks:
        args, kwargs = call.fill(operands)
        result = body(*args, **kwargs)
      return result, jax.tree_util.Partial(lambda x: [f(x) for f in checks])

    run.__name__ = run.__qualname__ = function.__name__
    return jax.jit(run)

  @functools.wraps(function)
  def answer(*args, **kwargs):
    try:
      call, operands = _split(args, kwargs, indices)
      result, check = program_of(call)(operands)
    except (NoName, TypeError, ValueError, IndexError):
      pass  # An error is raised again, by the values and not by tracers.
    else:
      check(operands)
      return result
    return body(*args, **kwargs)

  return cast(_FunctionT, answer)


@dataclasses.dataclass(frozen=True)
class _Call:
  """A call without its operands; equal to others of its kind."""

  key: Hashable
  arguments: list = dataclasses.field(compare=False)

  def fill(self, operands: Sequence[Any]) -> tuple[list, dict[str, Any]]:
    """Returns the arguments with these operands."""
    rest = iter(operands)
    filled = {
      place: jax.tree.unflatten(
        tree, [next(rest) if leaf is None else leaf for leaf in leaves]
      )
      for place, tree, leaves in self.arguments
    }
    kwargs = {k: v for k, v in filled.items() if isinstance(k, str)}
    return list(filled.values())[: len(filled) - len(kwargs)], kwargs


def _split(args, kwargs, indices) -> tuple[_Call, list[Any]]:
  """Separates the operands of a call from its kind."""
  arguments, operands, key = [], [], []
  for place, value in (*enumerate(args), *sorted(kwargs.items())):
    leaves, tree = jax.tree.flatten(value)
    check_untraced(tree, leaves)
    for index, leaf in enumerate(leaves):
      is_index = place in indices and type(leaf) is int
      if is_index or isinstance(leaf, _NUMBERS):
        operands.append(leaf)
        leaves[index] = None  # No leaf is None.
    arguments.append((place, tree, leaves))
    key.append((place, tree, *map(sameness, leaves)))
  return _Call(tuple(key), arguments), operands


def _indices(parameters: Mapping[str, inspect.Parameter]) -> set[int | str]:
  """Returns positions and names of arguments that are integers or arrays."""
  found: set[int | str] = set()
  for position, (name, parameter) in enumerate(parameters.items()):
    kinds = typing.get_args(parameter.annotation)
    if int in kinds and any(
      kind is jax.Array or hasattr(kind, 'dtypes') for kind in kinds
    ):
      found |= {position, name}
  return found
