"""What a reader of files hands over, and checked access to it."""

import fnmatch
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.transformer import Linear, Norm
from iclcl_jax.types import Array

Shape: TypeAlias = tuple[int, ...]
Arrange: TypeAlias = Callable[[np.ndarray], np.ndarray]
_T = TypeVar('_T')
_TOGETHER = 'Check that config and tensors belong together.'


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_new': _gelu_tanh,
  'gelu_pytorch_tanh': _gelu_tanh,
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
}


def choice(
  config: Mapping[str, Any],
  name: str,
  options: Mapping[str, _T],
  default: str | None = None,
) -> _T:
  """Reads which of the options the config names."""
  found = config.get(name)
  found = default if found is None else found
  if not isinstance(found, str) or found not in options:
    raise ValueError(
      f'config[{name!r}] is {found!r}; expected one of {", ".join(options)}. '
      'Others are not supported.'
    )
  return options[found]


def count(
  config: Mapping[str, Any], name: str, default: int | None = None
) -> int:
  """Reads a positive integer of the config; without default it is required."""
  return _read(config, name, default, int, 'a positive integer')


def number(config: Mapping[str, Any], name: str, default: float) -> float:
  """Reads a finite positive number of the config."""
  kinds = int | float
  return float(_read(config, name, default, kinds, 'a finite positive number'))


def switch(config: Mapping[str, Any], name: str, default: bool) -> bool:
  """Reads a truth value of the config."""
  return _read(config, name, default, bool, 'true or false')


def _read(config, name: str, default, kind, expected: str) -> Any:
  found = config.get(name)
  found = default if found is None else found
  if found is None:
    raise ValueError(
      f'config has no {name!r}; expected {expected}. Use the complete '
      'config.json of the model.'
    )
  fits = isinstance(found, kind) and isinstance(found, bool) == (kind is bool)
  if not fits or not (kind is bool or 0 < found < float('inf')):
    raise ValueError(f'config[{name!r}] is {found!r}; expected {expected}.')
  return found


def require(config: Mapping[str, Any], name: str, expected: Any) -> None:
  """Checks a setting that has one supported value, which is its default."""
  found = config.get(name)
  if found is not None and found != expected:
    raise ValueError(
      f'config[{name!r}] is {found!r}; only {expected!r} is supported. Choose '
      'a checkpoint without this variant of the architecture.'
    )


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


class Tensors:
  """The tensors of a checkpoint, each checked when it is taken.

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
    """Reads which tensors there are.

    Args:
      tensors: arrays by name.
      num_layers: number of layers.
      prefix: what may stand before the names.
      ignored: patterns of names without prefix that are not needed.
      dtype: dtype to make, or None for that of the tensors.
    """
    if num_layers > len(tensors):
      raise ValueError(
        f'the number of layers is {num_layers}, but there are only '
        f'{len(tensors)} tensors; expected several for each. {_TOGETHER}'
      )
    self._num_layers, self._prefix = num_layers, prefix
    everything = {
      name.removeprefix(prefix): (name, array)
      for name, array in tensors.items()
    }
    self._rest = {
      name: entry
      for name, entry in everything.items()
      if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    }
    arrays = [array for _, array in self._rest.values()]
    self._dtype = _common_dtype(arrays, dtype)

  def array(
    self, name: str, shape: Shape, arrange: Arrange = np.asarray
  ) -> Array:
    """Takes one tensor, stored with `shape`."""
    return jnp.asarray(np.array(arrange(self._take(name, shape)), self._dtype))

  def stacked(
    self, template: str, shape: Shape, arrange: Arrange = np.asarray
  ) -> Array:
    """Takes a tensor of all layers, with the leading axis `L`."""
    names = [template.format(n) for n in range(self._num_layers)]
    arrays = [self._take(name, shape) for name in names]
    stack = np.empty((len(arrays), *arrange(arrays[0]).shape), self._dtype)
    for row, array in zip(stack, arrays, strict=True):
      row[...] = arrange(array)
    return jnp.asarray(stack)

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

  def head(self, embedding: str, shape: Shape, *, tied: bool) -> Linear | None:
    """Takes the map to the vocabulary; None if it is tied to `embedding`."""
    name = 'lm_head.weight'
    if not tied:
      return Linear(self.array(name, shape, np.transpose))
    original = self._rest.get(embedding)
    copy = self._rest.pop(name, original)
    if original and copy and not np.array_equal(copy[1], original[1]):
      raise ValueError(
        f'tensor {name!r} differs from the embedding {embedding!r}, but the '
        'config ties them. Set tie_word_embeddings to false in config.json if '
        'the model was trained with a head of its own.'
      )
    return None

  def check_all_taken(self) -> None:
    """Raises `ValueError` if a tensor is left that nobody took."""
    for name, array in self._rest.values():
      raise ValueError(
        f'tensor {name!r} of shape {list(array.shape)} is unexpected; the '
        f'config describes an architecture without it. {_TOGETHER}'
      )

  def _take(self, name: str, shape: Shape) -> np.ndarray:
    if name not in self._rest:
      raise ValueError(
        f'tensor {name!r} (or {self._prefix + name!r}) is missing; expected '
        f'shape {list(shape)}. Check that the download is complete. {_TOGETHER}'
      )
    _, array = self._rest.pop(name)
    if tuple(array.shape) != shape:
      raise ValueError(
        f'tensor {name!r} has shape {list(array.shape)}; expected '
        f'{list(shape)} from the config. {_TOGETHER}'
      )
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f'tensor {name!r} has dtype {array.dtype}; expected floating-point '
        'numbers. Dequantise the checkpoint first.'
      )
    return array


def _common_dtype(arrays: Sequence[np.ndarray], dtype: Any) -> np.dtype:
  """The requested dtype, or that of the tensors."""
  if dtype is None:
    found = {np.dtype(array.dtype) for array in arrays}
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
  """Imports a package that only the readers of files need.

  Args:
    name: the package, or a module of it.

  Raises:
    ValueError: if it is not installed; the message says how to install it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f'reading this file needs the package {name.partition(".")[0]!r}, which '
      f"can't be imported ({error}). Install it: pip install "
      "'iclcl_jax[lm]'."
    ) from error
