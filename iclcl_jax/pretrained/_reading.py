"""What a reader of files hands over, and checked access to it."""

import collections
import fnmatch
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.transformer import Linear
from iclcl_jax.types import Array

Shape: TypeAlias = tuple[int, ...]
Arrange: TypeAlias = Callable[[np.ndarray], np.ndarray]
_ALIGNMENT = 64  # Bytes.
_TOGETHER = 'Check that config and tensors belong together.'


class StoredTensors(collections.UserDict[str, Any]):
  """Tensors in a file, read when taken; `specs` are known without reading."""

  def __init__(
    self,
    specs: dict[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
  ):
    self.data = self.specs = specs
    self._read = read

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self.specs:
      raise KeyError(name)
    return self._read(name)


class Tensors:
  """The tensors of a checkpoint, each checked and read when it is taken.

  Names are those of the family, without prefix; `{}` is the number of a layer.
  """

  def __init__(
    self,
    tensors: Mapping[str, np.ndarray],
    *,
    num_layers: int,
    prefix: str,
    ignored: Sequence[str],
    dtype: Any,
  ):
    """Looks at which tensors there are, and reads none.

    Their names may have the prefix; those that match an `ignored` pattern are
    not needed. `dtype` is the one to make, None for that of the tensors.
    """
    if num_layers > len(tensors):
      raise ValueError(
        f'the number of layers is {num_layers}, but there are only '
        f'{len(tensors)} tensors; expected several for each. {_TOGETHER}'
      )
    self.num_layers, self._prefix, self._tensors = num_layers, prefix, tensors
    specs: Mapping[str, Any] = getattr(tensors, 'specs', tensors)
    # Of the tensors that are left: full name, shape and dtype.
    self._rest = {}
    for full, spec in specs.items():
      name = full.removeprefix(prefix)
      # Older names of the scale and offset of a LayerNorm.
      name = re.sub(r'\bgamma$', 'weight', re.sub(r'\bbeta$', 'bias', name))
      if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
        self._rest[name] = full, spec
    self._dtype = _common_dtype([s for _, s in self._rest.values()], dtype)

  def take(
    self, template: str, shape: Shape, arrange: Arrange = np.asarray
  ) -> Array:
    is_stack = '{}' in template
    names = [template.format(n) for n in range(self.num_layers)]
    names = names if is_stack else [template]
    for name in names:
      self._check(name, shape)
    for n, name in enumerate(names):
      row = arrange(self._take(name))
      if n == 0:
        stack = _aligned((len(names), *row.shape), self._dtype)
      with np.errstate(all='ignore'):
        stack[n] = row
        total = np.sum(stack[n], dtype=np.float64)  # Needs no memory.
      if not np.isfinite(total):
        raise ValueError(
          f'tensor {name!r} holds NaN or infinity as {self._dtype}; expected '
          'finite numbers. Copy the file again, or take a wider dtype.'
        )
    return jax.device_put(stack if is_stack else stack[0])

  def head(
    self, name: str, embedding: str, shape: Shape, *, tied: bool
  ) -> Linear | None:
    """Takes the map to the vocabulary; None if it is tied to `embedding`."""
    if not tied:
      return Linear(self.take(name, shape, np.transpose))
    if name not in self._rest:
      return None
    copy = self._rest.pop(name)
    # Writers keep either of two equal tensors.
    original = self._rest.setdefault(embedding, copy)
    if copy is not original and not np.array_equal(
      self._tensors[copy[0]], self._tensors[original[0]]
    ):
      raise ValueError(
        f'tensor {name!r} differs from the embedding {embedding!r}, but the '
        'config ties them. Set tie_word_embeddings to false in config.json if '
        'the model was trained with a head of its own.'
      )
    return None

  def check_all_taken(self) -> None:
    """Raises `ValueError` if a tensor is left that nobody took."""
    for name, spec in self._rest.values():
      raise ValueError(
        f'tensor {name!r} of shape {list(spec.shape)} is unexpected; the '
        f'config describes an architecture without it. {_TOGETHER}'
      )

  def _check(self, name: str, shape: Shape) -> None:
    spec: Any = self._rest.get(name, (None, None))[1]
    found = 'missing' if spec is None else f'{spec.dtype} {list(spec.shape)}'
    is_floating = spec is not None and jnp.issubdtype(spec.dtype, jnp.floating)
    if not is_floating or tuple(spec.shape) != shape:
      raise ValueError(
        f'tensor {name!r} (or {self._prefix + name!r}) is {found}; expected '
        f'floating-point numbers {list(shape)} by the config. Check that the '
        f'download is complete, and not quantised. {_TOGETHER}'
      )

  def _take(self, name: str) -> np.ndarray:
    return self._tensors[self._rest.pop(name)[0]]


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
  """Makes an empty array that JAX uses on a CPU as it is, without a copy."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _common_dtype(specs: Sequence[Any], dtype: Any) -> np.dtype:
  if dtype is None:
    found = {np.dtype(spec.dtype) for spec in specs}
    widest = np.float64 if np.dtype(np.float64) in found else np.float32
    common = found.pop() if len(found) == 1 else widest
    return jax.dtypes.canonicalize_dtype(common)
  _validate.check_float_dtype('dtype', dtype)
  wanted = np.dtype(dtype)
  read = jax.dtypes.canonicalize_dtype(wanted)
  if read != wanted:
    raise ValueError(
      f'dtype is {wanted}, which JAX would read as {read}; '
      "expected 64-bit types to be enabled: jax.config.update('jax_enable_x64'"
      ', True) before loading.'
    )
  return wanted


class Checkpoint(NamedTuple):
  """A model on disk, in the layout and with the names of Hugging Face."""

  config: Mapping[str, Any]  # The content of `config.json`.
  tensors: Mapping[str, np.ndarray]  # By name: `lm_head.weight`, for one.


def import_reader(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f"this needs the package {name.partition('.')[0]!r}, which can't be "
      f"imported ({error}). Install it: pip install 'iclcl_jax[lm]'."
    ) from error
