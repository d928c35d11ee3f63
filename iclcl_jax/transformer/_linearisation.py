r"""What stands behind the heads, as an affine map that is exact at one token.

The output of a block at token `j` is not linear in what its heads predict: the
feed-forward network and the normalisations stand between. At the token itself,
however, every one of them is an affine map with known numbers,

===================  =======================================================
normalisation        `P(x)`, and its bias: mean and deviation are those of `x`
activation           the diagonal gate `G = g(z) / z`, the slope at `z = 0`
gated network        the gate `G = g(z)` on the other branch
mixture of experts   the gate of each expert, times its share
===================  =======================================================

and so is their composition: `y = u J + bias` for the sum `u` that the heads
contribute. `J` moves into the labels of the dual models, `v_i W_O^h J`. It is
no derivative: it holds `g(z) / z`, not `g'(z)`. Derived here, where no source
is named. It depends on the query: means, deviations and gates are known only
behind the forward pass at the token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import moments
from iclcl_jax._door import door
from iclcl_jax.transformer import _dual_heads, _forward, _stacks, _types
from iclcl_jax.transformer._types import Architecture, Block, Norm
from iclcl_jax.types import Array, FeatureMap, Float, Int, Kernel, Mask


class Linearisation(NamedTuple):
  """What fixes the affine map of a block at each token.

  For one token the leading axis `N` is missing.

  Attributes:
    attended: what the heads contribute, with the bias. Shape `[N, d_model]`.
    attention_sum: the residual stream with it. Shape `[N, d_model]`.
    ffn_input: what the network reads. Shape `[N, d_model]`.
    gate: the diagonal `G`. Shape `[N, d_ff]`.
    shift: the hidden layer where `up` is zero. Shape `[N, d_ff]`.
    shares: of the experts of a mixture, or None. Shape `[N, E]`.
    ffn_output: what the network returns. Shape `[N, d_model]`.
    ffn_sum: the residual stream with it. Shape `[N, d_model]`.
  """

  attended: Float[Array, 'N d_model']
  attention_sum: Float[Array, 'N d_model']
  ffn_input: Float[Array, 'N d_model']
  gate: Float[Array, 'N d_ff']
  shift: Float[Array, 'N d_ff']
  shares: Float[Array, 'N E'] | None
  ffn_output: Float[Array, 'N d_model']
  ffn_sum: Float[Array, 'N d_model']


def linearise(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  outputs: Float[Array, 'H N d_k'],
) -> Linearisation:
  """Runs a block behind its heads and keeps what fixes its affine map.

  Example:
    >>> architecture, block = transformer.example()
    >>> point = linearise(
    ...     architecture, block, jnp.ones((3, 4)), jnp.ones((2, 3, 2)))
    >>> point.gate.shape
    (3, 3)
  """
  passed, tokens, _ = _forward.pass_through(architecture, block, x, outputs)
  gate, shift, shares = _gate(architecture, block, tokens)
  return Linearisation(gate=gate, shift=shift, shares=shares, **passed)


def map_label(
  architecture: Architecture,
  block: Block,
  point: Linearisation,
  row: Float[Array, ' d_model'],
  stream: Float[Array, ' d_model'] | None = None,
) -> Float[Array, ' d_model']:
  r"""Returns `row J`, what a block makes of a label of its heads at one token.

  .. math:: J = Q_1 P_1\,(I + P\, U_1\, G\, U_2\, Q_2)\, P_2

  with the normalisations of the sublayers' inputs :math:`P`, outputs
  :math:`Q_i` and sums :math:`P_i`, each the identity where there is none.
  Beside a parallel network it is :math:`Q_1`. The `row` is a label behind the
  output projection; a part of the residual `stream`, to which it is added,
  takes the same way from behind :math:`Q_1` on.
  """
  stream = jnp.zeros_like(row) if stream is None else stream
  return _apply(architecture, block, point, row, stream)


def bias_of(
  architecture: Architecture,
  block: Block,
  point: Linearisation,
  x: Float[Array, ' d_model'],
) -> Float[Array, ' d_model']:
  """Returns what a block adds at one token whatever its heads predict.

  The residual stream through the block, and the biases on their ways.
  """
  bias = block.output.bias
  row = jnp.zeros_like(x) if bias is None else bias
  return _apply(architecture, block, point, row, x, with_biases=True)


def fold_labels(
  architecture: Architecture,
  block: Block,
  point: Linearisation,
  values: Float[Array, 'G N d_k'],
) -> Float[Array, 'H N d_model']:
  """Returns the labels `v_i W_O^h J` of every head, for one query token.

  With these labels the dual models of the heads, `dual.zero_shot` and
  `dual.one_step` on the keys that the token sees, predict vectors whose sum,
  plus `bias_of`, is the output of the whole block at that token.
  """
  num_heads = block.output.weight.shape[0]
  values = jnp.repeat(values, num_heads // values.shape[0], axis=0)
  labels = jnp.einsum('hnd,hdm->hnm', values, block.output.weight)
  fold = functools.partial(map_label, architecture, block, point)
  return jax.vmap(jax.vmap(fold))(labels)


def _apply(
  architecture, block, point, learnt, stream, *, with_biases=False
) -> Array:
  def shifted(row, bias):
    return row + bias if with_biases and bias is not None else row

  def at(norm: Norm | None, x, y):
    if norm is None:
      return y
    return shifted(
      architecture.normalization.linear_part(norm, x, y), norm.bias
    )

  norms = block.attention_norms
  learnt = at(norms.output, point.attended, learnt)
  summed = at(norms.sum, point.attention_sum, stream + learnt)
  row = stream if architecture.parallel else summed
  row = at(block.ffn_norms.input, point.ffn_input, row)
  hidden = shifted(row @ block.up.weight, block.up.bias)
  hidden = shifted(hidden * point.gate, point.shift)
  bias = block.down.bias
  if bias is not None and point.shares is not None:
    bias = point.shares @ bias
  row = shifted(hidden @ block.down.weight, bias)
  row = at(block.ffn_norms.output, point.ffn_output, row)
  return at(block.ffn_norms.sum, point.ffn_sum, summed + row)


def _gate(architecture, block, tokens):
  """Returns the diagonal `G`, the hidden layer at 0, and experts' shares.

  The hidden layer is `h(z) = z G + h(0)` for what `up` gives, `z`, with the
  branch of the gate as it is at the token.
  """
  z = _forward.apply_linear(block.up, tokens)
  layer = _forward.hidden_layer(architecture, block, tokens)
  zero = jnp.zeros_like(z)
  shift, slope = jax.jvp(layer, (zero,), (jnp.ones_like(z),))
  rise = (layer(z) - shift) / jnp.where(z == 0, 1, z)
  is_linear = block.gate is not None and architecture.gating is _types.gated
  gate = slope if is_linear else jnp.where(z == 0, slope, rise)
  if block.router is None:
    return gate, shift, None
  shares = _forward.expert_shares(architecture, block.router, tokens)
  each = _forward.per_unit(shares, gate)
  return gate * each, shift * each, shares


@door
def complete_dual(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  outputs: Float[Array, 'H N d_k'],
) -> Float[Array, 'N d_model']:
  """Does what `complete` does, by the affine map of `linearise`.

  The map is applied once, to the sum of the heads' `outputs` and the residual
  stream; in the labels (`fold_labels`) it gives the same numbers, at the cost
  of a training set for each query.
  """
  points = linearise(architecture, block, x, outputs)
  learnt = _forward.merge_heads(block.output, outputs)
  apply = functools.partial(_apply, architecture, block, with_biases=True)
  return jax.vmap(apply)(points, learnt, x)


@door
def apply_block_dual(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
  phi: FeatureMap | Kernel | None = None,
) -> Float[Array, 'N d_model']:
  r"""Applies one Transformer block as dual models: `apply_block` again.

  .. math:: y_j = \Bigl(\sum_h f_h(q_j^h)\, W_O^h\Bigr) J_j + b_j

  with the predictions of `predict_heads` and the affine map of `linearise`,
  applied by `complete_dual`. No softmax is computed.

  Example:
    >>> architecture, block = transformer.example()
    >>> apply_block_dual(architecture, block, jnp.ones((3, 4))).shape
    (3, 4)
  """
  x = moments.visible(x, mask)
  heads = _forward.heads(architecture, block, x, positions=positions)
  outputs = _dual_heads.predict_heads(
    architecture, heads, positions=positions, mask=mask, phi=phi
  )
  return complete_dual(architecture, block, x, outputs)


@door
def apply_blocks_dual(
  architecture: Architecture,
  blocks: Block,
  x: Float[Array, 'N d_model'],
  *,
  positions: Int[Array, ' N'] | None = None,
  mask: Mask | None = None,
  phi: FeatureMap | Kernel | None = None,
) -> Float[Array, 'N d_model']:
  """Applies a stack of blocks as a chain of dual models.

  The training sets of a layer are made of the predictions of the layer before,
  so every token's prediction is needed, the demonstrations' too.
  """
  options = {'positions': positions, 'mask': mask, 'phi': phi}
  return _stacks.chain(apply_block_dual, architecture, blocks, x, **options)
