"""The ordinary forward pass of Transformer blocks, with softmax attention.

One sequence at a time; `jax.vmap` makes batches. A block is three steps, which
a cache of keys and values needs one by one: `heads`, `attend`, `complete`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.precision import cast_like, product, widen
from iclcl_jax.transformer import _types
from iclcl_jax.transformer._types import Architecture, Block, Linear, Norm
from iclcl_jax.types import Array, Float, Mask


class Heads(NamedTuple):
  """Queries, keys and values of the heads of one block.

  Attributes:
    queries: rotated queries. Shape `[H, N, d_k]`.
    keys: rotated keys. Shape `[G, N, d_k]`.
    values: the values. Shape `[G, N, d_k]`.
  """

  queries: Float[Array, 'H N d_k']
  keys: Float[Array, 'G N d_k']
  values: Float[Array, 'G N d_k']


@door
def heads(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
) -> Heads:
  """Returns queries, keys and values: normalised, projected, rotated.

  Example:
    >>> from iclcl_jax import transformer
    >>> architecture, block = transformer.example()
    >>> heads(architecture, block, jnp.ones((3, 4))).queries.shape
    (2, 3, 2)

  References:
    Vaswani et al., arXiv:1706.03762, section 3.2.2; Ainslie et al.,
    arXiv:2305.13245 (grouped queries).
  """
  _types.check_block(architecture, block, x)
  positions = default_positions(x, positions)
  place = architecture.placement
  tokens = normalise(place.before, architecture, block.attention_norm, x)

  def rotate_one(x, position):
    rotated = architecture.rotation(x, position)
    _validate.check_result('architecture.rotation', rotated, x.shape)
    return rotated

  # Heads outside, so that angles are computed once.
  rotate = jax.vmap(jax.vmap(rotate_one), in_axes=(0, None))
  return Heads(
    queries=rotate(_split_heads(block.query, tokens), positions),
    keys=rotate(_split_heads(block.key, tokens), positions),
    values=_split_heads(block.value, tokens),
  )


@door
def attend(
  architecture: Architecture,
  queries: Float[Array, 'H M d_k'],
  keys: Float[Array, 'G N d_k'],
  values: Float[Array, 'G N d_k'],
  query_positions: Int[Array, ' M'],
  key_positions: Int[Array, ' N'],
  *,
  mask: Mask | None = None,
) -> Float[Array, 'H M d_k']:
  r"""Attends with all heads, softmax with the scale :math:`1/\sqrt{d_k}`.

  Keys and values are not repeated for the query heads that share them. A query
  that sees no key gets zeros.

  Args:
    queries: rotated queries. Shape `[H, M, d_k]`.
    keys: rotated keys, such as those of a cache. Shape `[G, N, d_k]`.
    values: their values. Shape `[G, N, d_k]`.
    query_positions: of the queries. Shape `[M]`.
    key_positions: of the keys. Shape `[N]`.
    mask: valid keys. Shape `[N]`; None for all.

  Example:
    >>> from iclcl_jax import transformer
    >>> architecture, _ = transformer.example()
    >>> x, t = jnp.ones((1, 3, 2)), jnp.arange(3)
    >>> attend(architecture, x, x, x, t, t)[0, 0].tolist()
    [1.0, 1.0]

  References:
    Vaswani et al., arXiv:1706.03762, eq. 1.
  """
  _types.check_groups('queries', len(queries), 'keys', len(keys))
  seen = visibility(architecture, query_positions, key_positions, mask)
  if mask is not None:  # A masked NaN would return in the gradient.
    keys = jnp.where(mask[None, :, None], keys, 0)
    values = jnp.where(mask[None, :, None], values, 0)
  num_heads, num_queries, width = queries.shape
  num_groups, num_keys, _ = keys.shape
  rows = (widen(queries) / width**0.5).reshape(num_groups, -1, width)
  scores = product(rows, jnp.swapaxes(keys, 1, 2))
  scores = scores.reshape(num_heads, num_queries, num_keys)
  neutral = jnp.finfo(scores.dtype).min
  weights = jax.nn.softmax(jnp.where(seen[None], scores, neutral))
  weights = jnp.where(jnp.any(seen, axis=1)[None, :, None], weights, 0)
  weights = weights.reshape(num_groups, -1, num_keys)
  outputs = cast_like(product(weights, values), values)
  return outputs.reshape(queries.shape)


@door
def complete(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  outputs: Float[Array, 'H N d_k'],
) -> Float[Array, 'N d_model']:
  """Applies what stands behind the heads: projection and feed-forward network.

  Args:
    outputs: of the heads, see `attend`. Shape `[H, N, d_k]`.
  """
  place = architecture.placement
  stream = x + merge_heads(block.output, outputs)
  stream = normalise(place.after, architecture, block.attention_norm, stream)
  tokens = normalise(place.before, architecture, block.ffn_norm, stream)
  stream = stream + feed_forward(architecture, block, tokens)
  return normalise(place.after, architecture, block.ffn_norm, stream)


@door
def apply_block(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
) -> Float[Array, 'N d_model']:
  """Applies one Transformer block.

  Args:
    architecture: what the shapes of the parameters do not say.
    block: the parameters.
    x: the residual stream. Shape `[N, d_model]`.
    positions: of the tokens. Shape `[N]`; None for `0, 1, ...`.
    mask: valid tokens, which others may see. Shape `[N]`; None for all.

  Example:
    >>> from iclcl_jax import transformer
    >>> architecture, block = transformer.example()
    >>> apply_block(architecture, block, jnp.ones((3, 4))).shape
    (3, 4)

  References:
    Vaswani et al., arXiv:1706.03762, section 3; Xiong et al.,
    arXiv:2002.04745 (both placements of the normalisation).
  """
  x = clear(x, mask)
  positions = default_positions(x, positions)
  seen = heads(architecture, block, x, positions=positions)
  outputs = attend(architecture, *seen, positions, positions, mask=mask)
  return complete(architecture, block, x, outputs)


@door
def apply_blocks(
  architecture: Architecture,
  blocks: Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
) -> Float[Array, 'N d_model']:
  """Applies a stack of blocks by `jax.lax.scan`: one compiled block."""
  _types.check_blocks(architecture, blocks, x)

  def step(stream, block):
    stream = apply_block(
      architecture, block, stream, positions=positions, mask=mask
    )
    return stream, None

  return jax.lax.scan(step, x, blocks)[0]


def feed_forward(
  architecture: Architecture, block: Block, tokens: Float[Array, 'N d_model']
) -> Float[Array, 'N d_model']:
  """Applies the feed-forward network alone, gated if the block has a gate.

  Args:
    tokens: what the network reads. Shape `[N, d_model]`.

  References:
    Shazeer, arXiv:2002.05202, eq. 6 (gated).
  """
  hidden = apply_linear(block.up, tokens)
  if block.gate is None:
    hidden = activate(architecture, hidden)
  else:
    gate = activate(architecture, apply_linear(block.gate, tokens))
    hidden = gate * hidden
  return apply_linear(block.down, hidden)


def activate(architecture: Architecture, hidden: Array) -> Array:
  """Applies the activation, which must keep the shape."""
  result = architecture.activation(hidden)
  _validate.check_result('architecture.activation', result, hidden.shape)
  return result


def apply_linear(linear: Linear, rows: Array) -> Array:
  """Returns `rows @ weight + bias`."""
  return add_bias(linear, rows @ linear.weight)


def add_bias(linear: Linear, rows: Array) -> Array:
  """Adds the bias, if there is one, to every row."""
  return rows if linear.bias is None else rows + linear.bias[None]


def merge_heads(
  output: Linear, outputs: Float[Array, 'H N d_k']
) -> Float[Array, 'N d_model']:
  """Projects outputs of heads: the sum of `h W_O^h` over heads, and a bias."""
  rows = jnp.swapaxes(outputs, 0, 1).reshape(outputs.shape[1], -1)
  weight = output.weight.reshape(rows.shape[1], -1)
  return add_bias(output, rows @ weight)


def normalise(place, architecture: Architecture, parameters: Norm, x: Array):
  """Normalises tokens at a place, `before` or `after` of the placement."""

  def normalise_row(row):
    result = architecture.normalization(parameters, row)
    _validate.check_result('architecture.normalization', result, row.shape)
    return result

  return jax.vmap(lambda row: place(normalise_row, row))(x)


def clear(x: Float[Array, 'N d_model'], mask: Mask | None) -> Array:
  """Puts zeros in masked rows: a NaN there would return in the gradient."""
  return x if mask is None else jnp.where(mask[:, None], x, 0)


def default_positions(x: Array, positions: Array | None) -> Array:
  """Returns the positions `0, 1, ...` unless others are given."""
  return jnp.arange(x.shape[0]) if positions is None else positions


def visibility(
  architecture: Architecture,
  query_positions: Array,
  key_positions: Array,
  mask: Mask | None,
) -> Array:
  """Returns which query sees which key. Shape `[M, N]`."""

  def sees(query_position, key_position):
    result = architecture.visible(query_position, key_position)
    _validate.check_result('architecture.visible', result, ())
    return result

  row = jax.vmap(sees, in_axes=(None, 0))
  seen = jax.vmap(row, in_axes=(0, None))(query_positions, key_positions)
  if seen.dtype != jnp.bool_:
    raise ValueError(
      f'architecture.visible returned {seen.dtype}; expected a boolean [], '
      'such as query_position >= key_position.'
    )
  return seen if mask is None else seen & mask[None]


def _split_heads(linear: Linear, tokens: Array) -> Array:
  """Projects: `[N, d_model]` and `[d_model, H, d_k]` to `[H, N, d_k]`."""
  num_heads, width = linear.weight.shape[1:]
  rows = tokens @ linear.weight.reshape(tokens.shape[1], -1)
  result = jnp.swapaxes(rows.reshape(-1, num_heads, width), 0, 1)
  return result if linear.bias is None else result + linear.bias[:, None]
