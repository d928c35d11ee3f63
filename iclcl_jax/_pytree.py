"""Dataclasses as pytrees whose structures compare by class.

With `jax.tree_util.register_dataclass` those of two classes may compare equal
in jax 0.10, and `jit` calls what was compiled for the other. Functions in a
structure compare by `_sameness`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

from iclcl_jax._sameness import Static

_ClassT = TypeVar('_ClassT', bound=type)
_MOST_SHOWN = 4  # Numbers of an array, entries of a sequence.


def static(**options: Any) -> Any:
  """Returns a field that is part of the structure; `options` as of `field`."""
  return dataclasses.field(metadata={'static': True}, **options)


@dataclass_transform(
  frozen_default=True,
  eq_default=False,
  field_specifiers=(static, dataclasses.field),
)
def dataclass(cls: Any = None, /, *, kw_only: bool = False) -> Any:
  """Makes a class of settings: a frozen pytree, fields `static` or leaves."""
  if cls is None:
    return lambda cls: dataclass(cls, kw_only=kw_only)
  make = dataclasses.dataclass(
    frozen=True, eq=False, repr=False, kw_only=kw_only
  )
  cls = make(cls)
  cls = cls if '__repr__' in vars(cls) else with_short_repr(cls)
  fields = dataclasses.fields(cls)
  names = tuple(f.name for f in fields if f.metadata.get('static'))
  data = tuple(f.name for f in fields if f.name not in names)

  def flatten(node):
    children = tuple(getattr(node, name) for name in data)
    structure = (getattr(node, name) for name in names)
    return children, tuple(Static(x) if callable(x) else x for x in structure)

  def flatten_with_keys(node):
    children, structure = flatten(node)
    keys = map(jax.tree_util.GetAttrKey, data)
    return tuple(zip(keys, children, strict=True)), structure

  def unflatten(structure, children):
    node = object.__new__(cls)  # Children may be anything: nothing to check.
    fields, values = (*names, *data), (*structure, *children)
    for name, value in zip(fields, values, strict=True):
      value = value.value if isinstance(value, Static) else value
      object.__setattr__(node, name, value)
    return node

  jax.tree_util.register_pytree_with_keys(
    cls, flatten_with_keys, unflatten, flatten
  )
  return cls


def function(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a callable pytree as it is, another as a part of the structure."""
  is_pytree = not jax.tree_util.all_leaves([fn])
  return fn if is_pytree else jax.tree_util.Partial(Static(fn))


def with_short_repr(cls: _ClassT) -> _ClassT:
  """Gives a class a repr of dtypes and shapes, without fields that are None."""
  cls.__repr__ = _short  # type: ignore[assignment]
  return cls


def _short(node: Any) -> str:
  if dataclasses.is_dataclass(node):
    names = [field.name for field in dataclasses.fields(node)]
  else:
    names = node._fields
  fields = {name: getattr(node, name) for name in names}
  shown = [f'{k}={_show(x)}' for k, x in fields.items() if x is not None]
  return f'{type(node).__name__}({", ".join(shown)})'


def _show(value: Any) -> str:
  if isinstance(value, jax.Array | np.ndarray):
    if np.size(value) > _MOST_SHOWN or isinstance(value, jax.core.Tracer):
      return f'{value.dtype}{list(value.shape)}'
    return str(value.tolist()) if value.dtype.kind in 'biuf' else str(value)
  if hasattr(value, '_fields') or (
    dataclasses.is_dataclass(value) and not isinstance(value, type)
  ):
    return _short(value)
  if isinstance(value, tuple):
    parts = [_show(x) for x in value[:_MOST_SHOWN]]
    rest = len(value) - len(parts)
    return f'({", ".join(parts)}{f", and {rest} more" if rest else ""})'
  return getattr(value, '__qualname__', repr(value))
