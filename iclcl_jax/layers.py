"""Flax Linen layers: they hold parameters, the arithmetic stays below.

This module alone imports flax; `import iclcl_jax` does not load it.

One layer serves every attention of the library: `attention_fn` says how the
rows are read, `key_view` and `value_view` where they come from. A modification
without parameters is an `attention_fn`::

  functools.partial(modified.regularised(strength=0.1).stream, phi)

A trained view of the tokens is a module, such as `Adapter` or `MLPView`.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax.nn.initializers import Initializer

from iclcl_jax import _validate
from iclcl_jax.types import Array, Float, SequenceAttentionFn, View


class MLPView(nn.Module):
  r"""A view with two layers in place of the projection.

  .. math:: g(x) = \sigma(x M_1)\, M_2

  Attributes:
    width: width `d` of the rows.
    hidden_dim: width between the layers.
    activation: the function `sigma`, entry by entry.
    kernel_init: initializer of both matrices.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> view = MLPView(width=4, hidden_dim=8)
    >>> view.init_with_output(jax.random.key(0), jnp.ones((3, 5)))[0].shape
    (3, 4)

  References:
    Ren & Liu, arXiv:2310.13220v1, section 4.2 (the augmentation of keys with
    more parameters).
  """

  width: int
  hidden_dim: int
  activation: Callable[[Array], Array] = nn.gelu
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, tokens: Float[Array, 'N d_model']) -> Float[Array, 'N d']:
    _check_sizes(self, tokens)
    hidden = _matrix(self, 'hidden', tokens, tokens.shape[1], self.hidden_dim)
    output = _matrix(self, 'output', tokens, self.hidden_dim, self.width)
    return self.activation(tokens @ hidden) @ output


class Adapter(nn.Module):
  r"""A view with two layers in parallel to the projection.

  .. math:: g(x) = x W + c\,\sigma(x M_1)\, M_2

  Attributes:
    width: width `d` of the rows.
    hidden_dim: width between the two layers.
    scale: the factor `c`; with 0 the view is the plain projection.
    activation: the function `sigma`, entry by entry.
    kernel_init: initializer of all matrices.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> view = Adapter(width=4, hidden_dim=8)
    >>> view.init_with_output(jax.random.key(0), jnp.ones((3, 5)))[0].shape
    (3, 4)

  References:
    Ren & Liu, arXiv:2310.13220v2, section 4.2 (parallel adapter).
  """

  width: int
  hidden_dim: int
  scale: float = 1.0
  activation: Callable[[Array], Array] = nn.gelu
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, tokens: Float[Array, 'N d_model']) -> Float[Array, 'N d']:
    _check_sizes(self, tokens)
    _validate.finite(scale=self.scale)
    linear = _matrix(self, 'linear', tokens, tokens.shape[1], self.width)
    hidden = _matrix(self, 'hidden', tokens, tokens.shape[1], self.hidden_dim)
    output = _matrix(self, 'output', tokens, self.hidden_dim, self.width)
    bypass = self.activation(tokens @ hidden) @ output
    return tokens @ linear + self.scale * bypass


def _check_sizes(view: Any, tokens: Array) -> None:
  _validate.check_array('tokens', tokens, 'N d_model')
  _validate.at_least(1, width=view.width, hidden_dim=view.hidden_dim)


def _matrix(module: Any, name: str, tokens: Array, rows: int, width: int):
  """Returns a parameter of `module` in the dtype of the tokens."""
  return module.param(name, module.kernel_init, (rows, width), tokens.dtype)


class SelfAttention(nn.Module):
  """One head of self-attention over one sequence.

  Attributes:
    attention_fn: `(queries [N, d_k], keys [N, d_k], values [N, d_v]) ->
      [N, d_v]`, such as `functools.partial(attention.stream_kernel_attention,
      phi)`.
    key_dim: width `d_k` of queries and keys.
    value_dim: width `d_v` of values.
    kernel_init: initializer of the projections.
    key_view: module that makes keys `[N, d_k]` of the tokens; None for their
      projection.
    value_view: module that makes values `[N, d_v]` of the tokens; None for
      their projection.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> from iclcl_jax import attention, features
    >>> phi = features.EluPlusOneFeatures()
    >>> fn = functools.partial(attention.causal_kernel_attention, phi)
    >>> layer = SelfAttention(fn, key_dim=4, value_dim=2)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((3, 5)))[0].shape
    (3, 2)

  References:
    Ren & Liu, arXiv:2310.13220, eq. 2; section 4.2 (views).
  """

  attention_fn: SequenceAttentionFn
  key_dim: int
  value_dim: int
  kernel_init: Initializer = nn.initializers.lecun_normal()
  key_view: View | None = None
  value_view: View | None = None

  @nn.compact
  def __call__(
    self, tokens: Float[Array, 'N d_model']
  ) -> Float[Array, 'N d_v']:
    _validate.check_array('tokens', tokens, 'N d_model')
    _validate.check_function(
      'attention_fn',
      self.attention_fn,
      3,
      '(queries, keys, values) -> outputs, such as '
      'functools.partial(attention.stream_kernel_attention, phi)',
    )
    _validate.at_least(1, key_dim=self.key_dim, value_dim=self.value_dim)

    queries = _matrix(self, 'query', tokens, tokens.shape[1], self.key_dim)
    keys = self._rows('key', tokens, self.key_view, self.key_dim)
    values = self._rows('value', tokens, self.value_view, self.value_dim)
    outputs = self.attention_fn(tokens @ queries, keys, values)
    if getattr(outputs, 'shape', ())[:1] != tokens.shape[:1]:
      _validate.check_result('attention_fn', outputs, values.shape)
    return outputs

  def _rows(self, name, tokens, view, width):
    """Returns keys or values, made by the view or else by a projection."""
    if view is None:
      return tokens @ _matrix(self, name, tokens, tokens.shape[1], width)
    _check_view(f'{name}_view', view)
    rows = view(tokens)
    shape = getattr(rows, 'shape', None)
    if shape != (tokens.shape[0], width):
      raise ValueError(
        f'{name}_view made {name}s of shape {shape}; expected '
        f'{(tokens.shape[0], width)}: one row for each token, as wide as '
        f'{name}_dim.'
      )
    return rows


class MultiHeadAttention(nn.Module):
  """Heads of `SelfAttention`, made by `vmap`, and an output projection.

  Attributes:
    attention_fn: as in `SelfAttention`, shared by all heads.
    num_heads: number of heads `H`.
    key_dim: width `d_k` of one head.
    value_dim: width `d_v` of one head.
    output_dim: width of the output; None for that of the tokens.
    kernel_init: initializer of all projections.
    key_view: as in `SelfAttention`; every head has parameters of its own. Make
      two instances to view keys and values alike: one instance passed twice
      shares its parameters in `SelfAttention`, not here.
    value_view: as in `SelfAttention`; every head has parameters of its own.

  Example:
    >>> import functools
    >>> import jax, jax.numpy as jnp
    >>> from iclcl_jax import attention, features
    >>> phi = features.EluPlusOneFeatures()
    >>> fn = functools.partial(attention.causal_kernel_attention, phi)
    >>> layer = MultiHeadAttention(fn, num_heads=2, key_dim=4, value_dim=4)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((3, 5)))[0].shape
    (3, 5)

  References:
    Vaswani et al., arXiv:1706.03762, section 3.2.2.
  """

  attention_fn: SequenceAttentionFn
  num_heads: int
  key_dim: int
  value_dim: int
  output_dim: int | None = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  key_view: View | None = None
  value_view: View | None = None

  @nn.compact
  def __call__(
    self, tokens: Float[Array, 'N d_model']
  ) -> Float[Array, 'N d_out']:
    _validate.check_array('tokens', tokens, 'N d_model')
    _validate.at_least(1, num_heads=self.num_heads)
    heads = nn.vmap(
      SelfAttention,
      in_axes=None,
      out_axes=1,
      axis_size=self.num_heads,
      variable_axes={'params': 0},
      split_rngs={'params': True},
    )(
      self.attention_fn,
      self.key_dim,
      self.value_dim,
      self.kernel_init,
      _unbound(self.key_view),
      _unbound(self.value_view),
      name='heads',
    )
    outputs = heads(tokens).reshape(tokens.shape[0], -1)
    width = tokens.shape[1] if self.output_dim is None else self.output_dim
    _validate.at_least(1, output_dim=width)
    shape = outputs.shape[1], width
    weights = self.param('output', self.kernel_init, shape, tokens.dtype)
    return outputs @ weights


def _check_view(name: str, view: Any) -> None:
  if not callable(view) or isinstance(view, type):
    raise ValueError(
      f'{name} is {view!r}; expected an instance of a module, or a function, '
      'from tokens [N, d_model] to rows, such as layers.Adapter(width=..., '
      'hidden_dim=...).'
    )


def _unbound(view: View | None) -> View | None:
  """Copies a view without its parent: the head that uses it will own it."""
  return view.clone(parent=None) if isinstance(view, nn.Module) else view
