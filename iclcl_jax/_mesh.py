"""What a mesh of devices asks of code that is written for one."""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_T = TypeVar('_T')
_FunctionT = TypeVar('_FunctionT', bound=Callable[..., Any])


def vary_as(tree: _T, *others: Any) -> _T:
  """Lets arrays vary over the mesh axes over which they or others vary.

  A carry of `lax.scan` that starts from a constant varies over none, and after
  a step over those of what was added: `scan` wants one type.
  """
  arrays = [x for x in jax.tree.leaves((tree, others)) if hasattr(x, 'dtype')]
  axes = frozenset().union(*map(_varying_axes, arrays))

  def vary(x):
    missing = tuple(sorted(axes - _varying_axes(x)))
    if not missing:
      return x
    if hasattr(jax.lax, 'pcast'):
      return jax.lax.pcast(x, missing, to='varying')
    return jax.lax.pvary(x, missing)  # Until jax 0.8.

  return jax.tree.map(vary, tree) if axes else tree


def gather(rows: jax.Array, axis_name: str | tuple[str, ...]) -> jax.Array:
  """Joins the rows of all devices; the result is the same on each."""
  if hasattr(jax.lax, 'all_gather_invariant'):  # Until jax 0.8.
    return jax.lax.all_gather_invariant(rows, axis_name, tiled=True)
  return jax.lax.all_gather(rows, axis_name, tiled=True, to='invarying')


def _varying_axes(x: Any) -> frozenset[str]:
  kind = jax.typeof(x)
  # `vma` until jax 0.9, a part of `mat` since.
  return kind.vma if hasattr(kind, 'vma') else kind.mat.varying


def in_auto_axes(function: _FunctionT) -> _FunctionT:
  """Runs a function on arrays of explicit axes with automatic ones.

  A result `[M, d_v]`, by its annotation, is sharded as the arguments with an
  axis `M` or `d_v`. One that has no such annotation, a state for one, is on
  every device.
  """
  signature = inspect.signature(function)
  axes_of = {
    name: _axis_names(parameter.annotation)
    for name, parameter in signature.parameters.items()
  }
  result_axes = getattr(signature.return_annotation, 'dim_str', '').split()

  @functools.wraps(function)
  def automatic(*args: Any, **kwargs: Any) -> Any:
    leaves, structure = jax.tree.flatten((args, kwargs))
    explicit = [leaf for leaf in leaves if _explicit_axes(leaf)]
    if not explicit:
      return function(*args, **kwargs)
    shardings: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
      if axes_of[name] and _explicit_axes(value):
        shardings |= _by_axis(axes_of[name], jax.typeof(value).sharding.spec)
    spec = PartitionSpec(
      *(name for axis in result_axes for name in shardings.pop(axis, [None]))
    )
    mesh = jax.typeof(explicit[0]).sharding.mesh
    auto = dict.fromkeys(_explicit_axes(explicit[0]), AxisType.Auto)
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(auto)):
      leaves = [
        jax.sharding.reshard(x, PartitionSpec()) if _explicit_axes(x) else x
        for x in leaves
      ]
      args, kwargs = jax.tree.unflatten(structure, leaves)
      result = function(*args, **kwargs)

    def shard(x):
      if not isinstance(x, jax.Array):
        return x
      return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(shard, result)

  return cast(_FunctionT, automatic)


def _by_axis(axes: Sequence[str], spec: Sequence[Any]) -> dict[str, list[Any]]:
  """Returns how the axes that are sharded are; `...` stands for any number."""
  found: dict[str, list[Any]] = {}
  rest, more = list(spec), len(spec) - len(axes)
  for axis in axes if more >= -1 else ():  # Less is broadcast.
    is_any = axis.startswith(('.', '*'))
    count = more + 1 if is_any else 1
    names, rest = rest[:count], rest[count:]
    if is_any or any(names):
      found[axis] = names
  return found


def _explicit_axes(x: Any) -> tuple[str, ...]:
  """Returns the axes of an array's mesh that its type shards explicitly."""
  if not isinstance(x, jax.Array):
    return ()
  mesh = jax.typeof(x).sharding.mesh
  pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in pairs if kind == AxisType.Explicit)


def _axis_names(annotation: Any) -> tuple[str, ...]:
  """Returns the axes that an annotation names; none if it is no array."""
  for part in (annotation, *typing.get_args(annotation)):
    if hasattr(part, 'dim_str'):
      return tuple(part.dim_str.split())
  return ()
