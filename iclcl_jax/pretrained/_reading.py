"""What a reader of files hands over, and checked access to it."""

import fnmatch
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.transformer import Linear, Norm
from iclcl_jax.types import Array

Shape: TypeAlias = tuple[int, ...]
Arrange: TypeAlias = Callable[[np.ndarray], np.ndarray]
_ALIGNMENT = 64  # Bytes.
_TOGETHER = 'Check that config and tensors belong together.'


def head_width(width: int, num_heads: int) -> int:
  """Returns the width of one head of several that share a width."""
  if width % num_heads:
    raise ValueError(
      f'a width of {width} does not divide into {num_heads} heads; expected a '
      'multiple. Check the sizes in config.json.'
    )
  return width // num_heads


def transposed(*shape: int) -> Arrange:
  """Arranges a stored `[out, in]` as `[in, out]`, then reshapes."""
  return lambda array: array.T.reshape(shape) if shape else array.T


def reshaped(*shape: int) -> Arrange:
  """Arranges a tensor in another shape."""
  return lambda array: array.reshape(shape)


def split_heads(array: Array, num_heads: int) -> Array:
  """Cuts the last axis into heads."""
  return array.reshape(*array.shape[:-1], num_heads, -1)


class StoredTensors(Mapping[str, np.ndarray]):
  """Tensors in a file: each is read when it is taken, and not kept.

  Attributes:
    specs: shape and dtype of each by name, known without reading it.
  """

  def __init__(
    self,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
  ):
    """Takes the specs and what reads the tensor of a name."""
    self.specs, self._read = specs, read

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self.specs:
      raise KeyError(name)
    return self._read(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self.specs)

  def __len__(self) -> int:
    return len(self.specs)


class Tensors:
  """The tensors of a checkpoint, each checked and read when it is taken.

  Names are those of the family, without prefix; `{}` in a template stands for
  the number of a layer.
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
    self.num_layers, self._prefix = num_layers, prefix
    self._tensors = tensors
    specs: Mapping[str, Any] = tensors
    if isinstance(tensors, StoredTensors):
      specs = tensors.specs
    everything = {
      _renamed(name.removeprefix(prefix)): (name, spec)
      for name, spec in specs.items()
    }
    self._rest = {
      name: entry
      for name, entry in everything.items()
      if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    }
    self._dtype = _common_dtype([s for _, s in self._rest.values()], dtype)

  def array(
    self, name: str, shape: Shape, arrange: Arrange = np.asarray
  ) -> Array:
    """Takes one tensor, stored with `shape`."""
    self._check(name, shape)
    array = arrange(self._take(name))
    result = _aligned(array.shape, self._dtype)
    result[...] = array
    return jax.device_put(result)

  def stacked(
    self, template: str, shape: Shape, arrange: Arrange = np.asarray
  ) -> Array:
    """Takes a tensor of all layers, with the leading axis `L`."""
    names = [template.format(n) for n in range(self.num_layers)]
    for name in names:
      self._check(name, shape)
    stack = None
    for n, name in enumerate(names):
      row = arrange(self._take(name))
      if stack is None:
        stack = _aligned((len(names), *row.shape), self._dtype)
      stack[n] = row
    return jax.device_put(stack)

  def linears(
    self,
    template: str,
    shape: Shape,
    arrange: Arrange = np.asarray,
    *,
    bias: Shape | None,
    arrange_bias: Arrange = np.asarray,
  ) -> Linear:
    """Takes an affine map of all layers; `bias` is the shape of its bias."""
    weight = self.stacked(template + '.weight', shape, arrange)
    if bias is None:
      return Linear(weight)
    return Linear(weight, self.stacked(template + '.bias', bias, arrange_bias))

  def norms(self, template: str, width: int, *, has_bias: bool = True) -> Norm:
    """Takes a normalisation of all layers."""
    return Norm(
      self.stacked(template + '.weight', (width,)),
      self.stacked(template + '.bias', (width,)) if has_bias else None,
    )

  def norm(self, stem: str, width: int, *, has_bias: bool = True) -> Norm:
    """Takes a normalisation outside of the layers."""
    return Norm(
      self.array(stem + '.weight', (width,)),
      self.array(stem + '.bias', (width,)) if has_bias else None,
    )

  def head(
    self,
    embedding: str,
    shape: Shape,
    *,
    tied: bool,
    name: str = 'lm_head.weight',
  ) -> Linear | None:
    """Takes the map to the vocabulary; None if it is tied to `embedding`."""
    if not tied:
      return Linear(self.array(name, shape, np.transpose))
    copy = self._rest.pop(name, None)
    original = self._rest.get(embedding)
    if copy and original is None:  # Writers keep either of two equal tensors.
      self._rest[embedding] = copy
    elif (
      copy
      and original
      and not np.array_equal(self._tensors[copy[0]], self._tensors[original[0]])
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
    if name not in self._rest:
      raise ValueError(
        f'tensor {name!r} (or {self._prefix + name!r}) is missing; expected '
        f'shape {list(shape)}. Check that the download is complete. {_TOGETHER}'
      )
    _, spec = self._rest[name]
    if tuple(spec.shape) != shape:
      raise ValueError(
        f'tensor {name!r} has shape {list(spec.shape)}; expected '
        f'{list(shape)} from the config. {_TOGETHER}'
      )
    if not jnp.issubdtype(spec.dtype, jnp.floating):
      raise ValueError(
        f'tensor {name!r} has dtype {spec.dtype}; expected floating-point '
        'numbers. Dequantise the checkpoint first.'
      )

  def _take(self, name: str) -> np.ndarray:
    full, _ = self._rest.pop(name)
    return self._tensors[full]


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
  """Makes an empty array that JAX uses on a CPU as it is, without a copy."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _renamed(name: str) -> str:
  """Gives a scale and offset of a LayerNorm the names that replaced theirs."""
  stem, _, kind = name.rpartition('.')
  names = {'gamma': 'weight', 'beta': 'bias'}
  return f'{stem}.{names[kind]}' if kind in names else name


def _common_dtype(specs: Sequence[Any], dtype: Any) -> np.dtype:
  """The requested dtype, or that of the tensors."""
  if dtype is None:
    found = {np.dtype(spec.dtype) for spec in specs}
    widest = np.float64 if np.dtype(np.float64) in found else np.float32
    return _canonical(found.pop() if len(found) == 1 else np.dtype(widest))
  _validate.check_float_dtype('dtype', dtype)
  wanted = np.dtype(dtype)
  if _canonical(wanted) != wanted:
    raise ValueError(
      f'dtype is {wanted}, which JAX would read as {_canonical(wanted)}; '
      "expected 64-bit types to be enabled: jax.config.update('jax_enable_x64'"
      ', True) before loading.'
    )
  return wanted


def _canonical(dtype: np.dtype) -> np.dtype:
  return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


class Checkpoint(NamedTuple):
  """A model on disk, in the layout and with the names of Hugging Face.

  Attributes:
    config: the content of `config.json`: `model_type`, `hidden_size`, ...
    tensors: arrays by name, such as `model.layers.0.self_attn.q_proj.weight`.
  """

  config: Mapping[str, Any]
  tensors: Mapping[str, np.ndarray]


def import_reader(name: str) -> Any:
  """Imports a package, or a module of it, that only readers of files need."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f'reading this file needs the package {name.partition(".")[0]!r}, which '
      f"can't be imported ({error}). Install it: pip install "
      "'iclcl_jax[lm]'."
    ) from error
