"""Checked access to the config and the tensors of a checkpoint."""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax.transformer import Linear, Norm
from iclcl_jax.types import Array


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
  """The activation that the config names."""
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
  """A positive integer of the config; without default it is required."""
  found = config.get(name)
  found = default if found is None else found
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
  """A positive number of the config."""
  found = config.get(name)
  found = default if found is None else found
  if isinstance(found, bool) or not isinstance(found, int | float):
    raise ValueError(f'config[{name!r}] is {found!r}; expected a number.')
  if not 0 < found < float('inf'):
    raise ValueError(
      f'config[{name!r}] is {found!r}; expected a finite positive number.'
    )
  return float(found)


def switch(config: Mapping[str, Any], name: str, default: bool) -> bool:
  """A truth value of the config."""
  found = config.get(name)
  found = default if found is None else found
  if not isinstance(found, bool):
    raise ValueError(f'config[{name!r}] is {found!r}; expected true or false.')
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
  """Width of one head, when the heads share the width of the model."""
  if width % num_heads:
    raise ValueError(
      f'a width of {width} does not divide into {num_heads} heads; expected a '
      'multiple. Check the sizes in config.json.'
    )
  return width // num_heads


def identity(array: np.ndarray) -> np.ndarray:
  """Leaves a tensor as it is stored."""
  return array


def transposed(*shape: int) -> Callable[[np.ndarray], np.ndarray]:
  """Arranges a stored `[out, in]` as `[in, out]`, then reshapes."""
  return lambda array: array.T.reshape(shape) if shape else array.T


def reshaped(*shape: int) -> Callable[[np.ndarray], np.ndarray]:
  """Arranges a tensor in another shape."""
  return lambda array: array.reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
  """Tensors whose names and shapes were checked.

  Attributes:
    named: the tensors, by name without prefix.
    num_layers: number of layers.
    dtype: dtype of the arrays that are made of them.
  """

  named: Mapping[str, np.ndarray]
  num_layers: int
  dtype: np.dtype

  def array(self, name: str, arrange: Callable = identity) -> Array:
    """One tensor."""
    return jnp.asarray(np.array(arrange(self.named[name]), self.dtype))

  def stacked(self, template: str, arrange: Callable = identity) -> Array:
    """A tensor of all layers, with the leading axis `L`."""
    arrays = [self.named[template.format(n)] for n in range(self.num_layers)]
    stack = np.empty((len(arrays), *arrange(arrays[0]).shape), self.dtype)
    for row, array in zip(stack, arrays, strict=True):
      row[...] = arrange(array)
    return jnp.asarray(stack)

  def linears(
    self,
    template: str,
    arrange: Callable = identity,
    arrange_bias: Callable = identity,
  ) -> Linear:
    """An affine map of all layers; its bias only if it was expected."""
    bias = template + '.bias'
    return Linear(
      self.stacked(template + '.weight', arrange),
      self.stacked(bias, arrange_bias) if self._has(bias) else None,
    )

  def norms(self, template: str) -> Norm:
    """A normalisation of all layers."""
    bias = template + '.bias'
    return Norm(
      self.stacked(template + '.weight'),
      self.stacked(bias) if self._has(bias) else None,
    )

  def norm(self, stem: str) -> Norm:
    """A normalisation outside of the layers."""
    bias = stem + '.bias'
    return Norm(
      self.array(stem + '.weight'),
      self.array(bias) if bias in self.named else None,
    )

  def _has(self, template: str) -> bool:
    return template.format(0) in self.named


def of_layers(
  shapes: Mapping[str, tuple[int, ...]], num_layers: int
) -> dict[str, tuple[int, ...]]:
  """Expected shapes of every layer, from templates with `{}`."""
  return {
    template.format(n): shape
    for n in range(num_layers)
    for template, shape in shapes.items()
  }


def without_copy(
  tensors: Mapping[str, np.ndarray], *, copy: str, original: str
) -> dict[str, np.ndarray]:
  """Drops a tied head that was stored beside the embedding.

  Args:
    tensors: arrays by name.
    copy: name of the head.
    original: how the name of the embedding ends.

  Returns:
    The other tensors.

  Raises:
    ValueError: if the two differ.
  """
  found = next((tensors[n] for n in tensors if n.endswith(original)), None)
  head = tensors.get(copy)
  differs = head is not None and found is not None
  if differs and not np.array_equal(head, found):  # type: ignore[arg-type]
    raise ValueError(
      f'tensor {copy!r} differs from the embedding {original!r}, but the '
      'config ties them. Set tie_word_embeddings to false in config.json if '
      'the model was trained with a head of its own.'
    )
  return {name: array for name, array in tensors.items() if name != copy}


def take(
  tensors: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  *,
  num_layers: int,
  prefix: str,
  ignored: Sequence[str],
  dtype: Any,
) -> Tensors:
  """Checks that the tensors are those that the architecture needs.

  Args:
    tensors: arrays by name.
    shapes: expected shape of each, by name without prefix.
    num_layers: number of layers.
    prefix: what may stand before the names.
    ignored: patterns of names without prefix that are not needed.
    dtype: dtype to make, or None for that of the tensors.

  Returns:
    The tensors that are needed.

  Raises:
    ValueError: if one is missing, has another shape, is not floating, or is
      unexpected.
  """
  named = {name.removeprefix(prefix): array for name, array in tensors.items()}
  stored = {name.removeprefix(prefix): name for name in tensors}
  for name, shape in shapes.items():
    _check_tensor(name, named, shape, prefix)
  for name in named:
    known = any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    if name not in shapes and not known:
      raise ValueError(
        f'tensor {stored[name]!r} of shape {list(named[name].shape)} is '
        'unexpected; the config describes an architecture without it. Check '
        'that config and tensors belong together.'
      )
  taken = {name: named[name] for name in shapes}
  return Tensors(
    named=taken, num_layers=num_layers, dtype=_common_dtype(taken, dtype)
  )


def _check_tensor(
  name: str,
  named: Mapping[str, np.ndarray],
  shape: tuple[int, ...],
  prefix: str,
) -> None:
  """Checks that a needed tensor is there, of its shape, and floating."""
  if name not in named:
    raise ValueError(
      f'tensor {name!r} (or {prefix + name!r}) is missing; expected shape '
      f'{list(shape)}. Check that the download is complete and that config '
      'and tensors belong together.'
    )
  array = named[name]
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


def _common_dtype(named: Mapping[str, np.ndarray], dtype: Any) -> np.dtype:
  """The requested dtype, or that of the tensors."""
  if dtype is None:
    found = {np.dtype(array.dtype) for array in named.values()}
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
