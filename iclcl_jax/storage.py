"""Save and load the state of a dual model.

One `.npz` file holds one state; NumPy alone can read it. Dtypes that NumPy
does not know (bfloat16) are stored as their bits, with the dtype's name.
"""

import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.types import DualState, KernelDualState, State

_FORMAT = 'iclcl_jax.state.1'
_KINDS: dict[str, Any] = {x.__name__: x for x in (DualState, KernelDualState)}


def save(path: str | os.PathLike[str], state: State) -> None:
  """Saves a state to one file: readers find the old state or the new one.

  An existing file is replaced, a folder is an `OSError`, and a state that is
  not concrete a `ValueError`. Leading axes that all arrays share (heads, a
  batch) are kept; free rows of a fixed capacity become masked ones.

  Example:
    >>> import tempfile
    >>> state = DualState(jnp.ones((2, 3)), jnp.ones(3), jnp.zeros(3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save(f'{folder}/state.npz', state)
    ...   load(f'{folder}/state.npz').mass.tolist()
    [1.0, 1.0, 1.0]
  """
  kind = type(state).__name__
  expected = 'a DualState or a KernelDualState, such as dual.zero_shot returns'
  _validate.check_type('state', state, (DualState, KernelDualState), expected)
  arrays = dict(zip(state._fields, state[:3], strict=False))
  _check_shapes('state', kind, arrays)
  write(path, kind, arrays)


def load(path: str | os.PathLike[str]) -> State:
  """Loads a state, of the kind and the dtypes with which `save` wrote it.

  Raises `OSError` if there is no such file, `ValueError` if it is corrupt or
  truncated, holds something else, lacks an array, has arrays whose shapes
  disagree, or holds float64 while JAX computes in float32.
  """
  kind, arrays = read(path, {k: v._fields[:3] for k, v in _KINDS.items()})
  _check_shapes(str(path), kind, arrays)
  return _KINDS[kind](*map(jnp.asarray, arrays.values()))


def _check_shapes(owner: str, kind: str, arrays: dict) -> None:
  axes = {
    name: annotation.dim_str.split()
    for name, annotation in list(_KINDS[kind].__annotations__.items())[:3]
  }
  sizes: set[tuple[str, Any]] = set()
  fits = True
  for name, array in arrays.items():
    leading, own = np.split(array.shape, [max(array.ndim - len(axes[name]), 0)])
    fits &= len(own) == len(axes[name])
    fits &= jnp.issubdtype(array.dtype, jnp.floating)
    sizes |= {('leading', tuple(leading)), *zip(axes[name], own, strict=False)}
  if not fits or len(sizes) > len(dict(sizes)):  # An axis with two sizes.
    pairs = [f'{k}: {_validate.describe(a)}' for k, a in arrays.items()]
    found = ', '.join(pairs)
    expected = ', '.join(f'{k} [{", ".join(x)}]' for k, x in axes.items())
    raise ValueError(
      f'{owner}: the arrays of the {kind} disagree ({found}); expected '
      f'floating-point arrays {expected}, with the same leading axes if any.'
    )


def write(
  path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Any]
) -> None:
  """Writes named arrays to one file, all or nothing, and what they are."""
  path = pathlib.Path(path)
  remedy = 'Return it from what is transformed (jit, vmap, grad), then save it.'
  _validate.check_concrete(f'the {kind}', arrays, remedy=remedy)
  if not path.parent.is_dir():
    raise FileNotFoundError(
      f'path is {str(path)!r}, but there is no folder {str(path.parent)!r}. '
      'Create it first.'
    )
  contents = {'format': np.asarray(_FORMAT), 'kind': np.asarray(kind)}
  for name, array in arrays.items():
    stored, bits = np.asarray(array), f'u{array.dtype.itemsize}'
    is_native = stored.dtype.isbuiltin == 1
    contents[name] = stored if is_native else stored.view(bits)
    contents[f'{name}.dtype'] = np.asarray(np.dtype(array.dtype).name)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    with open(temporary, 'xb') as file:
      np.savez(file, allow_pickle=False, **contents)  # type: ignore[arg-type]
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def read(
  path: str | os.PathLike[str], kinds: Mapping[str, Sequence[str]]
) -> tuple[str, dict[str, np.ndarray]]:
  """Reads what `write` wrote: the kind, one of these, and its named arrays."""
  with open(path, 'rb') as file:
    try:
      archive = np.load(file, allow_pickle=False)
      contents = {name: archive[name] for name in archive.files}
    except Exception as error:  # Whatever a damaged archive raises.
      raise ValueError(
        f'{path} is no readable state: it is corrupt, truncated, or of '
        f'another format ({type(error).__name__}: {error}). Save the state '
        'again.'
      ) from error
  if str(contents.get('format', '')) != _FORMAT:
    raise ValueError(
      f'{path} holds no state of a dual model (no format {_FORMAT!r}); '
      'expected a file that this library saved.'
    )
  kind = str(contents.get('kind', ''))
  if kind not in kinds:
    raise ValueError(
      f'{path} holds a {kind!r}; expected one of {", ".join(kinds)}.'
    )
  return kind, {name: _from_bits(path, name, contents) for name in kinds[kind]}


def _from_bits(path, name: str, contents: dict[str, np.ndarray]) -> np.ndarray:
  missing = [k for k in (name, f'{name}.dtype') if k not in contents]
  if missing:
    raise ValueError(
      f'{path} lacks the array {missing[0]!r}; the file was not written by '
      'storage.save, or was edited. Save the state again.'
    )
  stored, dtype_name = contents[name], str(contents[f'{name}.dtype'])
  try:
    dtype = jnp.dtype(dtype_name)
    array = stored if stored.dtype == dtype else stored.view(dtype)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{path}: {name} is stored as {stored.dtype} and declared as '
      f'{dtype_name!r}, which do not fit. Save the state again.'
    ) from error
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError(
      f'{path}: {name} has dtype float64, but JAX computes in float32. Set '
      "jax.config.update('jax_enable_x64', True) first, or save the state in "
      'float32.'
    )
  return array
