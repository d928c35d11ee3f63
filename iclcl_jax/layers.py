"""Flax layers, of parameters alone; `import iclcl_jax` does not load flax.

One layer serves every attention of the library: `attention_fn` says how the
rows are read, such as `functools.partial(modified.regularised(strength=0.1)
.stream, phi)`, and `key_view` and `value_view` where they come from: modules,
`Adapter` or one of Flax. `as_attention_fn` puts any attention into the
attention modules of Flax itself.

Layers are Linen modules; `as_nnx` makes NNX modules of them. `kernel_init`
initialises all matrices. `dtype` is that of the computation, None for what
inputs and parameters promote to; `param_dtype` that of the parameters, None for
that of the tokens.

References:
  Ren & Liu, arXiv:2310.13220, eq. 2, and section 4.2: two layers in v1 (an
  `nn.Sequential`), the parallel `Adapter` in v2; Vaswani et al.,
  arXiv:1706.03762, section 3.2.2.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn, nnx
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer

from iclcl_jax import _validate, attention
from iclcl_jax.types import (
  Array,
  Bool,
  FeatureMap,
  Float,
  Kernel,
  SequenceAttentionFn,
  View,
)


def as_attention_fn(
  attend: FeatureMap | Kernel | Callable[..., Array] | None = None,
  *,
  is_causal: bool = False,
  scale: float | Array | None = None,
  chunk_size: int | None = None,
) -> Callable[..., Array]:
  """Makes an `attention_fn` for the attention modules of Flax.

  It fits `flax.nnx.MultiHeadAttention` and
  `flax.linen.MultiHeadDotProductAttention`. Masks count where they are not 0. A
  decoder with a cache asks for one query at a time, and its mask says which
  keys that query sees. Dropout of attention weights, which nothing here forms,
  is a `ValueError`, and so are weights that are to be sown.

  Arguments are those of `attention.dot_product_attention`. Set `is_causal` in a
  decoder: its causal mask is traced, and cannot be read unseen.

  Example:
    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...     num_heads=2, in_features=4, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=as_attention_fn(features.EluPlusOneFeatures()))
    >>> layer(jnp.ones((3, 5, 4), jnp.float32)).shape
    (3, 5, 4)
  """
  always_causal = is_causal

  def attention_fn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    dropout_rng=None,
    dropout_rate=0.0,
    broadcast_dropout=True,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    is_causal=False,
  ):
    del dropout_rng, broadcast_dropout
    if dropout_rate > 0 and not deterministic:
      raise ValueError(
        f'dropout_rate is {dropout_rate}; expected 0: attention weights are '
        'not formed here, so that none can be dropped. Put a Dropout behind '
        'the layer.'
      )
    if module is not None:
      raise ValueError(
        'the attention weights are to be sown, and are not formed here; '
        'expected sow_weights=False. attention.weights gives those of a query.'
      )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    is_decoding = query.shape[-3] == 1 and mask is not None
    with _precision(precision):
      return attention.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask if mask is None else mask.astype(bool),
        attend=attend,
        scale=scale,
        is_causal=is_causal or (always_causal and not is_decoding),
        chunk_size=chunk_size,
      )

  # What is recorded is the call inside, which says all that is set here.
  attention_fn.is_layout_door = True  # type: ignore[attr-defined]
  return attention_fn


def _precision(precision: Any):
  if precision is None:
    return contextlib.nullcontext()
  if isinstance(precision, tuple):  # One for each operand.
    precision = precision[0]
  if isinstance(precision, jax.lax.DotAlgorithmPreset):
    return jax.default_matmul_precision(precision.name)
  return jax.default_matmul_precision(jax.lax.Precision(precision).name.lower())


class Adapter(nn.Module):
  r"""A view with two layers in parallel to the projection.

  .. math:: g(x) = x W + c\,\sigma(x M_1)\, M_2

  Attributes:
    width, hidden_dim: of the rows, and between the layers.
    scale: the factor `c`; with 0 the view is the plain projection.
    activation: the function `sigma`, entry by entry.

  Example:
    >>> view = Adapter(width=4, hidden_dim=8)
    >>> view.init_with_output(jax.random.key(0), jnp.ones((3, 5)))[0].shape
    (3, 4)
  """

  width: int
  hidden_dim: int
  scale: float = 1.0
  activation: Callable[[Array], Array] = nn.gelu
  kernel_init: Initializer = nn.initializers.lecun_normal()
  dtype: Any = None
  param_dtype: Any = None

  @nn.compact
  def __call__(
    self, tokens: Float[Array, '... d_model']
  ) -> Float[Array, '... d']:
    _check_tokens('tokens', tokens)
    _validate.at_least(1, width=self.width, hidden_dim=self.hidden_dim)
    _validate.finite(scale=self.scale)
    dense = _dense(self, tokens)
    hidden = self.activation(dense('hidden', tokens, self.hidden_dim))
    linear = dense('linear', tokens, self.width)
    return linear + self.scale * dense('output', hidden, self.width)


def _check_tokens(name: str, tokens: Array) -> None:
  axes = ['...'] * (getattr(tokens, 'ndim', 0) - 2) + ['N', 'd_model']
  _validate.check_kind(name, tokens, axes, _validate.FLOATING)


def _dense(module: Any, tokens: Array) -> Callable[[str, Array, int], Array]:
  """Returns `(name, x, width) -> x @ parameter`, in the dtypes of a module."""
  param_dtype = module.param_dtype or tokens.dtype

  def apply(name, x, width):
    shape = x.shape[-1], width
    matrix = module.param(name, module.kernel_init, shape, param_dtype)
    x, matrix = promote_dtype(x, matrix, dtype=module.dtype)
    return x @ matrix

  return apply


class SelfAttention(nn.Module):
  """One head of self-attention, or of cross-attention to a `context`.

  Call it with tokens `[..., N, d_model]`, and if need be with `context [..., M,
  d_context]`, whose keys and values are read, and `mask [..., M]`, its valid
  rows, which `attention_fn` gets as a keyword.

  Attributes:
    attention_fn: `(queries [N, d_k], keys [N, d_k], values [N, d_v]) ->
      [N, d_v]`, such as `functools.partial(attention.stream_kernel_attention,
      phi)`.
    key_dim, value_dim: widths `d_k` of queries and keys, and `d_v` of values.
    key_view, value_view: modules that make them; None for a projection.

  Example:
    >>> phi = features.EluPlusOneFeatures()
    >>> fn = functools.partial(attention.causal_kernel_attention, phi)
    >>> layer = SelfAttention(fn, key_dim=4, value_dim=2)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((3, 5)))[0].shape
    (3, 2)
  """

  attention_fn: SequenceAttentionFn
  key_dim: int
  value_dim: int
  kernel_init: Initializer = nn.initializers.lecun_normal()
  key_view: View | None = None
  value_view: View | None = None
  dtype: Any = None
  param_dtype: Any = None

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, '... N d_model'],
    context: Float[Array, '... M d_context'] | None = None,
    mask: Bool[Array, '... M'] | None = None,
  ) -> Float[Array, '... N d_v']:
    _check_tokens('tokens', tokens)
    expected = (
      '(queries, keys, values) -> outputs, such as '
      'functools.partial(attention.stream_kernel_attention, phi)'
    )
    _validate.check_function('attention_fn', self.attention_fn, 3, expected)
    _validate.at_least(1, key_dim=self.key_dim, value_dim=self.value_dim)
    context = tokens if context is None else context
    _check_tokens('context', context)
    batch = tokens.shape[:-2]
    shape = context.shape[:-1] if mask is None else mask.shape
    if context.shape[:-2] != batch or context.shape[:-1] != shape:
      raise ValueError(
        f'tokens, context and mask have shapes {list(tokens.shape)}, '
        f'{list(context.shape)} and {list(shape)}; expected [..., N, d_model], '
        '[..., M, d_context] and [..., M] with the same batch axes.'
      )
    one = SelfAttention._one_sequence
    for _ in batch:
      one = nn.vmap(
        one, variable_axes={'params': None}, split_rngs={'params': False}
      )
    return one(self, tokens, context, mask)

  def _one_sequence(self, tokens, context, mask):
    queries = _dense(self, tokens)('query', tokens, self.key_dim)
    keys = self._rows('key', context, self.key_view, self.key_dim)
    values = self._rows('value', context, self.value_view, self.value_dim)
    options = {} if mask is None else {'mask': mask}
    outputs = self.attention_fn(queries, keys, values, **options)
    if getattr(outputs, 'shape', ())[:1] != tokens.shape[:1]:
      expected = len(tokens), self.value_dim
      _validate.check_result('attention_fn', outputs, expected)
    return outputs

  def _rows(self, name, tokens, view, width):
    """Returns keys or values, made by the view or else by a projection."""
    if view is None:
      return _dense(self, tokens)(name, tokens, width)
    if not callable(view) or isinstance(view, type):
      raise ValueError(
        f'{name}_view is {view!r}; expected an instance of a module, or a '
        'function, from tokens [N, d_model] to rows, such as '
        'layers.Adapter(width=..., hidden_dim=...).'
      )
    rows = view(tokens)
    _validate.check_result(f'{name}_view', rows, (len(tokens), width))
    return rows if self.dtype is None else rows.astype(self.dtype)


class MultiHeadAttention(SelfAttention):
  """Heads of `SelfAttention`, made by `vmap`, and an output projection.

  Attributes are those of one head, and two more. Heads share `attention_fn`;
  every one has parameters of its own in `key_view` and `value_view`, also if
  one instance is passed twice. `num_heads` is `H`; `output_dim` is the width of
  the output, None for that of the tokens.

  Example:
    >>> phi = features.EluPlusOneFeatures()
    >>> fn = functools.partial(attention.causal_kernel_attention, phi)
    >>> layer = MultiHeadAttention(fn, num_heads=2, key_dim=4, value_dim=4)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((3, 5)))[0].shape
    (3, 5)
  """

  num_heads: int = 1
  output_dim: int | None = None

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, '... N d_model'],
    context: Float[Array, '... M d_context'] | None = None,
    mask: Bool[Array, '... M'] | None = None,
  ) -> Float[Array, '... N d_out']:
    _check_tokens('tokens', tokens)
    _validate.at_least(1, num_heads=self.num_heads)
    heads = nn.vmap(
      SelfAttention,
      in_axes=None,
      out_axes=-2,
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
      self.dtype,
      self.param_dtype,
      name='heads',
    )
    outputs = heads(tokens, context, mask)
    outputs = outputs.reshape(*outputs.shape[:-2], -1)
    width = tokens.shape[-1] if self.output_dim is None else self.output_dim
    _validate.at_least(1, output_dim=width)
    return _dense(self, tokens)('output', outputs, width)


def as_nnx(
  layer: nn.Module, *inputs: Array, rngs: nnx.Rngs
) -> nnx.bridge.ToNNX:
  """Makes an `nnx.Module` of a layer, with the same parameters by name.

  It is called as the layer is. The `inputs` are tokens, and a context if there
  will be one, of any values.

  Example:
    >>> view = Adapter(width=4, hidden_dim=8)
    >>> as_nnx(view, jnp.ones((1, 5)), rngs=nnx.Rngs(0))(jnp.ones((3, 5))).shape
    (3, 4)
  """
  return nnx.bridge.ToNNX(layer, rngs=rngs).lazy_init(*inputs)


def _unbound(view: View | None) -> View | None:
  """Copies a view without its parent: the head that uses it will own it."""
  if not isinstance(view, nn.Module):
    return view
  return view.clone(parent=None, _deep_clone=True)  # Modules in it, too.
