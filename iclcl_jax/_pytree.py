"""Registers dataclasses as pytrees whose structures compare by class.

With `jax.tree_util.register_dataclass` those of two classes may compare equal
in jax 0.10, and `jit` calls what was compiled for the other. Functions in a
structure compare by `_sameness`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from iclcl_jax._sameness import Static

_T = TypeVar('_T')


def register(cls: type[_T]) -> type[_T]:
  """Registers a frozen dataclass; fields are children unless marked static.

  Those with `metadata={'static': True}` are part of the structure.
  """
  fields = dataclasses.fields(cls)  # type: ignore[arg-type]
  static = tuple(f.name for f in fields if f.metadata.get('static'))
  data = tuple(f.name for f in fields if f.name not in static)

  def flatten(node):
    children = tuple(getattr(node, name) for name in data)
    structure = (getattr(node, name) for name in static)
    return children, tuple(Static(x) if callable(x) else x for x in structure)

  def flatten_with_keys(node):
    children, structure = flatten(node)
    keys = map(jax.tree_util.GetAttrKey, data)
    return tuple(zip(keys, children, strict=True)), structure

  def unflatten(structure, children):
    node = object.__new__(cls)  # Children may be anything: nothing to check.
    names, values = (*static, *data), (*structure, *children)
    for name, value in zip(names, values, strict=True):
      value = value.value if isinstance(value, Static) else value
      object.__setattr__(node, name, value)
    return node

  jax.tree_util.register_pytree_with_keys(
    cls, flatten_with_keys, unflatten, flatten
  )
  return cls


def function(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a callable as a pytree: itself, or a `jax.tree_util.Partial` of it.

  Arrays of a callable pytree stay leaves; any other function becomes part of
  the structure.
  """
  is_pytree = not jax.tree_util.all_leaves([fn])
  return fn if is_pytree else jax.tree_util.Partial(Static(fn))
