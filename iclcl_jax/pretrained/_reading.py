"""Checked access to the config and the tensors of a checkpoint."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.transformer import Linear, Norm
from iclcl_jax.types import Array

Shape: TypeAlias = tuple[int, ...]
Arrange: TypeAlias = Callable[[np.ndarray], np.ndarray]


def gelu(x: Array) -> Array:
  """Exact GELU."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
  """GELU by its approximation with a hyperbolic tangent."""
  return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {
  'gelu': gelu,
  'gelu_new': gelu_tanh,
  'gelu_pytorch_tanh': gelu_tanh,
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
}


def activation(config: Mapping[str, Any], name: str, default: str) -> Callable:
  """Reads the activation that the config names."""
  found = config.get(name) or default
  if not isinstance(found, str) or found not in ACTIVATIONS:
    raise ValueError(
      f'config[{name!r}] is {found!r}; expected one of '
      f'{", ".join(ACTIVATIONS)}. Other activations are not supported.'
    )
  return ACTIVATIONS[found]


def count(
  config: Mapping[str, Any], name: str, default: int | None = None
) -> int:
  """Reads a positive integer of the config; without default it is required."""
  found = _setting(config, name, default)
  if found is None:
    raise ValueError(
      f'config has no {name!r}; expected a positive integer. Use the complete '
      'config.json of the model.'
    )
  if isinstance(found, bool) or not isinstance(found, int) or found < 1:
    raise ValueError(
      f'config[{name!r}] is {found!r}; expected a positive integer.'
    )
  return found


def number(config: Mapping[str, Any], name: str, default: float) -> float:
  """Reads a finite positive number of the config."""
  found = _setting(config, name, default)
  is_number = isinstance(found, int | float) and not isinstance(found, bool)
  if not is_number or not 0 < found < float('inf'):
    raise ValueError(
      f'config[{name!r}] is {found!r}; expected a finite positive number.'
    )
  return float(found)


def switch(config: Mapping[str, Any], name: str, default: bool) -> bool:
  """Reads a truth value of the config."""
  found = _setting(config, name, default)
  if not isinstance(found, bool):
    raise ValueError(f'config[{name!r}] is {found!r}; expected true or false.')
  return found


def _setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
  found = config.get(name)
  return default if found is None else found


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

    Raises:
      ValueError: if `dtype` cannot be made.
    """
    self._num_layers, self._prefix = num_layers, prefix
    self._rest = {
      name.removeprefix(prefix): (name, array)
      for name, array in tensors.items()
      if not any(
        fnmatch.fnmatchcase(name.removeprefix(prefix), pattern)
        for pattern in ignored
      )
    }
    arrays = [array for _, array in self._rest.values()]
    self._dtype = _common_dtype(arrays, dtype)

  def array(
    self, name: str, shape: Shape, arrange: Arrange = np.asarray
  ) -> Array:
    """Takes one tensor, stored with `shape`."""
    array = np.array(arrange(self._take(name, shape)), self._dtype)
    return jnp.asarray(array)

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
    return Linear(
      self.stacked(template + '.weight', shape, arrange),
      None
      if bias is None
      else self.stacked(template + '.bias', bias, arrange_bias),
    )

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
    """Takes the map to the vocabulary; None if the embedding is tied to it.

    Args:
      embedding: name of the embedding, which a tied head may repeat.
      shape: of both.
      tied: whether the config ties them.

    Raises:
      ValueError: if a tied head is stored and differs from the embedding.
    """
    name = 'lm_head.weight'
    if not tied:
      return Linear(self.array(name, shape, np.transpose))
    _, copy = self._rest.pop(name, (name, None))
    if copy is None or embedding not in self._rest:
      return None
    if not np.array_equal(copy, self._rest[embedding][1]):
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
        'config describes an architecture without it. Check that config and '
        'tensors belong together.'
      )

  def _take(self, name: str, shape: Shape) -> np.ndarray:
    if name not in self._rest:
      raise ValueError(
        f'tensor {name!r} (or {self._prefix + name!r}) is missing; expected '
        f'shape {list(shape)}. Check that the download is complete and that '
        'config and tensors belong together.'
      )
    _, array = self._rest.pop(name)
    if tuple(array.shape) != shape:
      raise ValueError(
        f'tensor {name!r} has shape {list(array.shape)}; expected '
        f'{list(shape)} from the config. Check that config and tensors belong '
        'together.'
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
