r"""What stands behind the heads, as an affine map that is exact at one token.

The output of a block at token `j` is not linear in what its heads predict: the
feed-forward network and the normalisations stand between. At the token itself,
however, every one of them is an affine map with known numbers,

===================  =======================================================
normalisation        `P(x)`, and its bias: mean and deviation are those of `x`
activation           the diagonal gate `G = g(z) / z`, the slope at `z = 0`
gated network        the gate `G = g(z)` on the other branch
===================  =======================================================

and so is their composition: `y = u J + bias` for the sum `u` that the heads
contribute. `J` moves into the labels of the dual models, `v_i W_O^h J`. It is
no derivative: it holds `g(z) / z`, not `g'(z)`, and treats the deviation of a
normalisation as a number. Derived here, where no source is named.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from iclcl_jax._door import door
from iclcl_jax.transformer import _dual_heads, _forward, _types
from iclcl_jax.transformer._types import Architecture, Block, Norm
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask


class Linearisation(NamedTuple):
  """What fixes the affine map of a block at each token.

  For one token the leading axis `N` is missing.

  Attributes:
    attention_sum: residual stream plus heads. Shape `[N, d_model]`.
    ffn_input: the residual stream before the network. Shape `[N, d_model]`.
    gate: the diagonal `G`. Shape `[N, d_ff]`.
    ffn_sum: residual stream plus network. Shape `[N, d_model]`.
  """

  attention_sum: Float[Array, 'N d_model']
  ffn_input: Float[Array, 'N d_model']
  gate: Float[Array, 'N d_ff']
  ffn_sum: Float[Array, 'N d_model']


def linearise(
  architecture: Architecture,
  block: Block,
  x: Float[Array, 'N d_model'],
  outputs: Float[Array, 'H N d_k'],
) -> Linearisation:
  """Runs a block behind its heads and keeps what fixes its affine map.

  Example:
    >>> from iclcl_jax import transformer
    >>> architecture, block = transformer.example()
    >>> point = linearise(
    ...     architecture, block, jnp.ones((3, 4)), jnp.ones((2, 3, 2)))
    >>> point.gate.shape
    (3, 3)

  References:
    Ren & Liu, arXiv:2310.13220, one Transformer layer (ReLU); other
    activations and normalisations derived here.
  """
  attention_sum = x + _forward.merge_heads(block.output, outputs)
  place = architecture.placement
  stream = _forward.normalise(
    place.after, architecture, block.attention_norm, attention_sum
  )
  tokens = _forward.normalise(
    place.before, architecture, block.ffn_norm, stream
  )
  return Linearisation(
    attention_sum=attention_sum,
    ffn_input=stream,
    gate=_gate(architecture, block, tokens),
    ffn_sum=stream + _forward.feed_forward(architecture, block, tokens),
  )


def map_label(
  architecture: Architecture,
  block: Block,
  point: Linearisation,
  row: Float[Array, ' d_model'],
) -> Float[Array, ' d_model']:
  r"""Returns `row J`, the linear part of a block at one token.

  .. math:: J = P_1\,(I + P\, U_1\, G\, U_2)\, P_2

  where a normalisation that stands elsewhere is the identity: pre-norm has
  :math:`P_1 = P_2 = I`, post-norm :math:`P = I`.

  Args:
    row: a label, behind the output projection. Shape `[d_model]`.

  References:
    Derived here.
  """
  linear = block._replace(
    attention_norm=block.attention_norm._replace(bias=None),
    ffn_norm=block.ffn_norm._replace(bias=None),
    up=block.up._replace(bias=None),
    down=block.down._replace(bias=None),
  )
  at_zero = jnp.zeros_like(point.gate)
  return _apply(architecture, linear, point, at_zero, row)


def bias_of(
  architecture: Architecture,
  block: Block,
  point: Linearisation,
  x: Float[Array, ' d_model'],
) -> Float[Array, ' d_model']:
  """Returns what a block adds at one token whatever its heads predict.

  The residual stream through `J`, and the biases on their ways.
  """
  at_zero = jnp.zeros_like(point.gate)
  if block.gate is None:
    at_zero = architecture.activation(at_zero)
  row = x if block.output.bias is None else x + block.output.bias
  return _apply(architecture, block, point, at_zero, row)


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

  def fold(label):
    return map_label(architecture, block, point, label)

  return jax.vmap(jax.vmap(fold))(labels)


def _apply(architecture, block, point, at_zero, row) -> Array:
  """Applies the affine map of a block; `at_zero` is the activation at 0."""

  def at(parameters: Norm, x):
    def normalise(y):
      y = architecture.normalization.linear_part(parameters, x, y)
      return y if parameters.bias is None else y + parameters.bias

    return normalise

  placement = architecture.placement
  row = placement.after(at(block.attention_norm, point.attention_sum), row)
  tokens = placement.before(at(block.ffn_norm, point.ffn_input), row)
  hidden = _forward.apply_linear(block.up, tokens[None])[0]
  hidden = hidden * point.gate + at_zero
  row = row + _forward.apply_linear(block.down, hidden[None])[0]
  return placement.after(at(block.ffn_norm, point.ffn_sum), row)


def _gate(architecture, block, tokens) -> Float[Array, 'N d_ff']:
  """Returns the diagonal `G`: `(g(z) - g(0)) / z`, or `g(z)` if gated."""
  if block.gate is not None:
    gate = _forward.apply_linear(block.gate, tokens)
    return _forward.activate(architecture, gate)
  z = _forward.apply_linear(block.up, tokens)
  origin = jnp.zeros((), z.dtype)
  slope = jax.grad(architecture.activation)(origin)
  rise = _forward.activate(architecture, z) - architecture.activation(origin)
  return jnp.where(z == 0, slope, rise / jnp.where(z == 0, 1, z))


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

  Every key-value head trains a dual model on its keys and values
  (`predict_heads`), and its query heads ask it. What stands behind the heads is
  the affine map of `linearise`. The map is applied once to the sum of the
  predictions; in the labels (`fold_labels`) it gives the same numbers, at the
  cost of a training set for each query. No softmax is computed.

  Example:
    >>> import jax.numpy as jnp
    >>> from iclcl_jax import transformer
    >>> architecture, block = transformer.example()
    >>> apply_block_dual(architecture, block, jnp.ones((3, 4))).shape
    (3, 4)

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1 and one Transformer layer;
    normalisations and gates derived here.
  """
  x = _forward.clear(x, mask)
  heads = _forward.heads(architecture, block, x, positions=positions)
  outputs = _dual_heads.predict_heads(
    architecture, heads, positions=positions, mask=mask, phi=phi
  )
  points = linearise(architecture, block, x, outputs)
  learnt = _forward.merge_heads(block.output._replace(bias=None), outputs)

  def complete(point, learnt, x):
    label = map_label(architecture, block, point, learnt)
    return label + bias_of(architecture, block, point, x)

  return jax.vmap(complete)(points, learnt, x)


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

  Takes what `apply_block_dual` takes; arrays of `blocks` have a leading axis
  `L`.

  References:
    Ren & Liu, arXiv:2310.13220, several attention layers.
  """
  _types.check_blocks(architecture, blocks, x)

  def step(stream, block):
    stream = apply_block_dual(
      architecture, block, stream, positions=positions, mask=mask, phi=phi
    )
    return stream, None

  return jax.lax.scan(step, x, blocks)[0]
