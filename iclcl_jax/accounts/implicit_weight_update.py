r"""What a context does to a token, as a rank-one change of the weights.

A block with a context does to a token what the block without it would do, if
the first weights of its feed-forward network were others:

.. math:: W' = W + \frac{z_0\, (z - z_0)^\top W}{|z_0|^2}, \qquad z_0^\top W'
  = z^\top W

where the network reads :math:`z` with the context and :math:`z_0` without. What
the context adds to the stream beside the network is a shift, a bias. It is an
identity for every block of `transformer`: gated networks change both first
weights, mixtures the router too, and where the network stands beside the heads
the shift is all. Blocks behind it read the same stream, so that a whole model
without the context is the model with it, block by block.

The change belongs to ONE token: :math:`z` depends on its query. The dual state
of a head, the same context's other description, is one for all queries.

References:
  Dherin et al., arXiv:2507.16003, Theorem 2.2 and its form with skip
  connections; arXiv:2511.17864 (gated networks, normalisations, many blocks).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import precision, transformer
from iclcl_jax._door import door
from iclcl_jax.transformer import Architecture, Block, _forward
from iclcl_jax.types import Array, Bool, Float, Int


class WeightUpdate(NamedTuple):
  """What stands for the context, of each of `N` tokens or of one.

  Attributes:
    outputs: of the heads that do not see the context. Shape `[H, N, d_k]`.
    read: what the network reads then, :math:`z_0`. Shape `[N, d_model]`.
    change, shift: what the context adds to it, :math:`z - z_0`, and to the
      stream beside the network, likewise.
  """

  outputs: Float[Array, 'H N d_k']
  read: Float[Array, 'N d_model']
  change: Float[Array, 'N d_model']
  shift: Float[Array, 'N d_model']


@door
def weight_update(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  context: Bool[Array, ' N'],
  *,
  positions: Int[Array, ' N'] | None = None,
) -> WeightUpdate:
  """Returns what stands for the context at every token of a block.

  `x` `[N, d_model]` is the stream before the block. The `context` `[N]` are the
  tokens that are hidden; no position moves, None for `0, ..., N - 1`.

  Example:
    >>> architecture, block = transformer.example()
    >>> x, context = jnp.eye(3, 4), jnp.array([True, False, False])
    >>> weight_update(architecture, block, x, context).change.shape
    (3, 4)
  """
  positions = _forward.default_positions(x, positions)
  heads = transformer.heads(architecture, block, x, positions=positions)

  def read(mask):
    outputs = transformer.attend(
      architecture, heads, positions, positions, mask=mask
    )
    return outputs, *_forward.pass_through(architecture, block, x, outputs)[1:]

  _, tokens, stream = read(None)
  outputs, tokens_without, stream_without = read(~context)
  return WeightUpdate(
    outputs, tokens_without, tokens - tokens_without, stream - stream_without
  )


def updated_block(
  block: Block, read: Float[Array, ' d_model'], change: Float[Array, ' d_model']
) -> Block:
  """Changes the first weights of a block's network, by a matrix of rank one.

  Those of `gate`, `up` and `router`, by what `weight_update` gives of a token.
  One that the network reads as zeros has no such change: the weights stay.

  Example:
    >>> _, block = transformer.example()
    >>> changed = updated_block(block, jnp.ones(4), jnp.ones(4))
    >>> float(changed.up.weight[0, 0] / block.up.weight[0, 0])
    2.0
  """
  gain = precision.ratio(read, jnp.sum(read**2))

  def changed(linear):
    if linear is None:
      return None
    added = jnp.outer(gain, change @ linear.weight)
    return linear._replace(weight=linear.weight + added)

  names = 'gate', 'up', 'router'
  return block._replace(**{x: changed(getattr(block, x)) for x in names})


@door
def apply_update(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  update: WeightUpdate,
) -> Float[Array, 'N d_model']:
  """Applies a block without the context, with each token's own weights.

  The changed weights are formed, token after token. Returns the stream behind
  the block: that of the block with the context.
  """

  def complete(row):
    x, outputs, read, change, shift = row
    changed = updated_block(block, read, change)
    parts, _, _ = _forward.pass_through(
      architecture, changed, x[None], outputs[:, None]
    )
    total = parts['ffn_sum'] + shift[None]
    return _forward.normalise(architecture, block.ffn_norms.sum, total)[0]

  outputs = jnp.swapaxes(update.outputs, 0, 1)
  return jax.lax.map(complete, (x, outputs, *update[1:]))


@door
def residuals(
  architecture: Architecture,
  blocks: Block,
  x: Float[Array, 'N d_model'],
  context: Bool[Array, ' N'],
) -> Float[Array, 'L N']:
  """Compares blocks without the context and with changed weights, with it.

  The chain without the context reads what it made itself: errors add up.
  Returns the largest difference of a token behind each block, relative to its
  largest entry before or behind, `[L, N]`. Arguments are those of
  `weight_update`, for a stack of blocks.
  """

  def step(carry, block):
    before, without = carry
    update = weight_update(architecture, block, without, context)
    without = apply_update(architecture, block, without, update)
    behind = transformer.apply_block(architecture, block, before)
    entries = jnp.abs(jnp.stack([before, behind]))
    difference = jnp.max(jnp.abs(behind - without), axis=1)
    residual = precision.ratio(difference, jnp.max(entries, axis=(0, 2)))
    return (behind, without), residual

  return transformer.scan_blocks(architecture, blocks, step, (x, x))[1]
