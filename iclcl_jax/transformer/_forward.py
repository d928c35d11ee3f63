"""The ordinary forward pass of Transformer blocks, with softmax attention.

One sequence at a time; `jax.vmap` makes batches. A block is three steps, which
a cache of keys and values needs one by one: `heads`, `attend`, `complete`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, kernels, moments
from iclcl_jax._door import door
from iclcl_jax.precision import cast_like, product, widen
from iclcl_jax.transformer import _parts, _stacks
from iclcl_jax.transformer._types import Architecture, Block, Linear, Norm
from iclcl_jax.types import Array, Float, Int, Mask

# Of a key with the rate 0, so that its slope is finite.
_LARGEST_LOG_WEIGHT = 30.0


class Heads(NamedTuple):
  """Queries, keys and values of the heads of one block.

  Attributes:
    queries: rotated queries, `M = N` of one block. Shape `[H, M, d_k]`.
    keys: rotated keys. Shape `[G, N, d_k]`.
    values: the values. Shape `[G, N, d_k]`.
    sinks: scores `[H]` of a key without value that each head sees, or None.
    window: `[]`: a query sees what is fewer positions away; None for all.
  """

  queries: Float[Array, 'H M d_k']
  keys: Float[Array, 'G N d_k']
  values: Float[Array, 'G N d_k']
  sinks: Float[Array, ' H'] | None = None
  window: Int[Array, ''] | None = None


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
    >>> architecture, block = transformer.example()
    >>> heads(architecture, block, jnp.ones((3, 4))).queries.shape
    (2, 3, 2)
  """
  _stacks.check_block(architecture, block, x)
  positions = default_positions(x, positions)
  tokens = normalise(architecture, block.attention_norms.input, x)
  constants = _stacks.constants_of(architecture, block)
  at_length = _parts.at_length(constants, positions)
  # Heads outside, so that angles are computed once.
  rotate = jax.vmap(
    jax.vmap(functools.partial(_parts.rotate, at_length)), in_axes=(0, None)
  )

  def project(linear, norm):
    rows = _normalise_heads(architecture, norm, _split_heads(linear, tokens))
    return rotate(rows, positions)

  queries = project(block.query, block.query_norm)
  return Heads(
    queries=queries * jnp.asarray(architecture.query_scale, queries.dtype),
    keys=project(block.key, block.key_norm),
    values=_split_heads(block.value, tokens),
    sinks=block.sinks,
    window=constants.window,
  )


@door
def attend(
  architecture: Architecture,
  heads: Heads,
  query_positions: Int[Array, ' M'],
  key_positions: Int[Array, ' N'],
  *,
  mask: Mask | None = None,
  rates: Float[Array, 'M N'] | None = None,
) -> Float[Array, 'H M d_k']:
  r"""Attends with all heads, softmax with the scale :math:`1/\sqrt{d_k}`.

  Keys and values are not repeated for the query heads that share them. A query
  that sees no key gets zeros.

  Args:
    heads: keys and values may be more, such as those of a cache.
    query_positions, key_positions: of both. Shapes `[M]` and `[N]`.
    mask: valid keys. Shape `[N]`; None for all.
    rates: factor of each kernel value: the rate with which the dual model of
      a query learns a key, 0 not at all. Shape `[M, N]`; None for 1.

  Example:
    >>> architecture, _ = transformer.example()
    >>> x, t = jnp.ones((1, 3, 2)), jnp.arange(3)
    >>> attend(architecture, transformer.Heads(x, x, x), t, t)[0, 0].tolist()
    [1.0, 1.0]
  """
  queries, keys, values, sinks, window = heads
  _stacks.check_groups('heads.queries', len(queries), 'heads.keys', len(keys))
  shown = visibility(architecture, query_positions, key_positions, mask, window)
  seen = shown if rates is None else shown & (rates > 0)
  keys, values = (moments.visible(x, mask) for x in (keys, values))
  num_heads, num_queries, width = queries.shape
  num_groups, num_keys, _ = keys.shape
  rows = (widen(queries) / width**0.5).reshape(num_groups, -1, width)
  scores = product(rows, jnp.swapaxes(keys, 1, 2))
  scores = scores.reshape(num_heads, num_queries, num_keys)
  if architecture.score_cap is not None:
    scores = kernels.cap(scores, architecture.score_cap)
  plain = scores
  if rates is not None:
    rates = rates.astype(scores.dtype)
    scores = scores + jnp.log(jnp.where(rates > 0, rates, 1))[None]
  scores = jnp.where(seen[None], scores, jnp.finfo(scores.dtype).min)
  if sinks is not None:
    column = sinks.astype(scores.dtype)[:, None, None]
    column = jnp.broadcast_to(column, (num_heads, num_queries, 1))
    scores = jnp.concatenate([scores, column], axis=2)
  weights = jax.nn.softmax(scores)[..., :num_keys]
  if rates is not None:  # A rate of 0 has a slope: what the key would weigh.
    log_total = jax.nn.logsumexp(scores, axis=2, keepdims=True)
    would = jnp.exp(jnp.minimum(plain - log_total, _LARGEST_LOG_WEIGHT))
    zero = jnp.where(
      shown & (rates == 0), rates - jax.lax.stop_gradient(rates), 0
    )
    weights = weights + zero[None] * would
    weights = weights / (1 + jnp.sum(zero[None] * would, axis=2, keepdims=True))
  weights = jnp.where(jnp.any(seen, axis=1)[None, :, None], weights, 0)
  weights = weights.reshape(num_groups, -1, num_keys)
  outputs = cast_like(product(weights, values), values)
  return outputs.reshape(num_heads, num_queries, values.shape[2])


@door
def complete(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  outputs: Float[Array, 'H N d_k'],
) -> Float[Array, 'N d_model']:
  """Applies what stands behind the heads' `outputs`: projection and network."""
  passed, _, _ = pass_through(architecture, block, x, outputs)
  return normalise(architecture, block.ffn_norms.sum, passed['ffn_sum'])


def pass_through(
  architecture: Architecture, block: Block, x: Array, outputs: Array
) -> tuple[dict[str, Array], Array, Array]:
  """Returns fields of `Linearisation`, what the network reads, and adds to."""
  normed = functools.partial(normalise, architecture)
  attended = merge_heads(block.output, outputs)
  attention_sum = x + normed(block.attention_norms.output, attended)
  stream = normed(block.attention_norms.sum, attention_sum)
  ffn_input = x if architecture.parallel else stream
  tokens = normed(block.ffn_norms.input, ffn_input)
  ffn_output = feed_forward(architecture, block, tokens)
  return (
    {
      'attended': attended,
      'attention_sum': attention_sum,
      'ffn_input': ffn_input,
      'ffn_output': ffn_output,
      'ffn_sum': stream + normed(block.ffn_norms.output, ffn_output),
    },
    tokens,
    stream,
  )


@door
def apply_block(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
) -> Float[Array, 'N d_model']:
  """Applies one Transformer block: returns the stream behind it.

  Example:
    >>> architecture, block = transformer.example()
    >>> apply_block(architecture, block, jnp.ones((3, 4))).shape
    (3, 4)
  """
  x = moments.visible(x, mask)
  positions = default_positions(x, positions)
  seen = heads(architecture, block, x, positions=positions)
  outputs = attend(architecture, seen, positions, positions, mask=mask)
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
  options = {'positions': positions, 'mask': mask}
  return _stacks.chain(apply_block, architecture, blocks, x, **options)


def feed_forward(
  architecture: Architecture, block: Block, tokens: Array
) -> Array:
  """Applies the feed-forward network: plain, gated, or a mixture.

  All experts are computed, and those that are not chosen count for nothing
  (Shazeer, arXiv:2002.05202, eq. 6; arXiv:1701.06538).
  """
  hidden = apply_linear(block.up, tokens)
  hidden = hidden_layer(architecture, block, tokens)(hidden)
  if block.router is None:
    return apply_linear(block.down, hidden)
  shares = expert_shares(architecture, block.router, tokens)
  rows = hidden * per_unit(shares, hidden) @ block.down.weight
  bias = block.down.bias
  return rows if bias is None else rows + shares @ bias


def hidden_layer(
  architecture: Architecture, block: Block, tokens: Array
) -> Callable[[Array], Array]:
  """Returns the hidden layer as a function of what `up` gives, `[N, d_ff]`."""

  def activate(hidden):
    result = architecture.activation(hidden)
    _validate.check_result('architecture.activation', result, hidden.shape)
    return result

  if block.gate is None:
    return activate
  gate = apply_linear(block.gate, tokens)

  def combine(up):
    result = architecture.gating(activate, gate, up)
    _validate.check_result('architecture.gating', result, up.shape)
    return result

  return combine


def expert_shares(
  architecture: Architecture, router: Linear, tokens: Array
) -> Float[Array, 'N E']:
  """Returns how much each expert counts; 0 for those that are not chosen."""
  scores = widen(apply_linear(router, tokens))
  best, chosen = jax.lax.top_k(scores, architecture.experts_per_token)
  places = jax.nn.one_hot(chosen, scores.shape[1], dtype=scores.dtype)
  shares = jnp.einsum('nk,nke->ne', jax.nn.softmax(best), places)
  return shares.astype(tokens.dtype)


def per_unit(shares: Array, hidden: Array) -> Array:
  return jnp.repeat(shares, hidden.shape[1] // shares.shape[1], axis=1)


def apply_linear(linear: Linear, rows: Array) -> Array:
  result = rows @ linear.weight
  return result if linear.bias is None else result + linear.bias[None]


def merge_heads(
  output: Linear, outputs: Float[Array, 'H N d_k']
) -> Float[Array, 'N d_model']:
  """Projects outputs of heads: the sum of `h W_O^h` over heads, and a bias."""
  rows = jnp.swapaxes(outputs, 0, 1).reshape(outputs.shape[1], -1)
  weight = output.weight.reshape(rows.shape[1], -1)
  return apply_linear(Linear(weight, output.bias), rows)


def normalise(
  architecture: Architecture, parameters: Norm | None, rows: Array
) -> Array:
  if parameters is None:
    return rows

  def normalise_row(row):
    result = architecture.normalization(parameters, row)
    _validate.check_result('architecture.normalization', result, row.shape)
    return result

  return jax.vmap(normalise_row)(rows)


def _normalise_heads(
  architecture: Architecture, norm: Norm | None, rows: Float[Array, 'H N d_k']
) -> Float[Array, 'H N d_k']:
  """Normalises each head alone, or all heads of a token together."""
  if norm is None:
    return rows
  num_heads, size, width = rows.shape
  rows = jnp.swapaxes(rows, 0, 1)
  flat = rows.reshape(-1, norm.scale.size)
  norm = jax.tree.map(jnp.ravel, norm)
  rows = normalise(architecture, norm, flat).reshape(size, num_heads, width)
  return jnp.swapaxes(rows, 0, 1)


def default_positions(x: Array, positions: Array | None) -> Array:
  return jnp.arange(x.shape[0]) if positions is None else positions


def visibility(
  architecture: Architecture,
  query_positions: Array,
  key_positions: Array,
  mask: Mask | None,
  window: Array | None,
) -> Array:
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
  if window is not None:
    rows, columns = (p.astype(int) for p in (query_positions, key_positions))
    distance = jnp.abs(rows[:, None] - columns[None])
    seen &= distance < jnp.asarray(window, distance.dtype)
  return seen if mask is None else seen & mask[None]


def _split_heads(linear: Linear, tokens: Array) -> Array:
  """Projects: `[N, d_model]` and `[d_model, H, d_k]` to `[H, N, d_k]`."""
  num_heads, width = linear.weight.shape[1:]
  rows = tokens @ linear.weight.reshape(tokens.shape[1], -1)
  result = jnp.swapaxes(rows.reshape(-1, num_heads, width), 0, 1)
  return result if linear.bias is None else result + linear.bias[:, None]
