"""Flax Linen layers: they hold parameters, the arithmetic stays below.

This module alone imports flax; `import iclcl_jax` does not load it.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from flax import linen as nn

from iclcl_jax import _validate
from iclcl_jax.types import Array, Float

AttentionFn: TypeAlias = Callable[[Array, Array, Array], Array]


class SelfAttention(nn.Module):
  """One head of self-attention over one sequence.

  Attributes:
    attention_fn: `(queries [N, d_k], keys [N, d_k], values [N, d_v]) ->
      [N, d_v]`, such as `functools.partial(attention.stream_kernel_attention,
      phi)`.
    key_dim: width `d_k` of queries and keys.
    value_dim: width `d_v` of values.
    kernel_init: initializer of the three projections.

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
    Ren & Liu, arXiv:2310.13220, eq. 2.
  """

  attention_fn: AttentionFn
  key_dim: int
  value_dim: int
  kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, tokens: Float[Array, 'N d_model']
  ) -> Float[Array, 'N d_v']:
    _validate.check_array('tokens', tokens, 'N d_model')
    if not callable(self.attention_fn):
      raise ValueError(
        f'attention_fn is a {type(self.attention_fn).__name__}; expected a '
        'function (queries, keys, values) -> outputs, such as '
        'functools.partial(attention.stream_kernel_attention, phi).'
      )
    _validate.check_count('key_dim', self.key_dim)
    _validate.check_count('value_dim', self.value_dim)

    def project(name, width):
      shape = tokens.shape[1], width
      weights = self.param(name, self.kernel_init, shape, tokens.dtype)
      return tokens @ weights

    queries = project('query', self.key_dim)
    keys = project('key', self.key_dim)
    return self.attention_fn(queries, keys, project('value', self.value_dim))


class MultiHeadAttention(nn.Module):
  """Heads of `SelfAttention`, made by `vmap`, and an output projection.

  Attributes:
    attention_fn: as in `SelfAttention`, shared by all heads.
    num_heads: number of heads `H`.
    key_dim: width `d_k` of one head.
    value_dim: width `d_v` of one head.
    output_dim: width of the output; None for that of the tokens.
    kernel_init: initializer of all projections.

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

  attention_fn: AttentionFn
  num_heads: int
  key_dim: int
  value_dim: int
  output_dim: int | None = None
  kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, tokens: Float[Array, 'N d_model']
  ) -> Float[Array, 'N d_out']:
    _validate.check_array('tokens', tokens, 'N d_model')
    _validate.check_count('num_heads', self.num_heads)
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
      name='heads',
    )
    outputs = heads(tokens).reshape(tokens.shape[0], -1)
    width = tokens.shape[1] if self.output_dim is None else self.output_dim
    _validate.check_count('output_dim', width)
    shape = outputs.shape[1], width
    weights = self.param('output', self.kernel_init, shape, tokens.dtype)
    return outputs @ weights
