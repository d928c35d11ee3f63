"""Blocks, and stacks of blocks, executed as chains of dual models."""

import jax
from jaxtyping import Int

from iclcl_jax._door import door
from iclcl_jax.transformer import _checks, _dual_heads, _forward, _linearisation
from iclcl_jax.transformer._types import Architecture, Block
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask


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

  Args:
    architecture: what the shapes of the parameters do not say.
    block: the parameters.
    x: the residual stream. Shape `[N, d_model]`.
    positions: of the tokens. Shape `[N]`; None for `0, 1, ...`.
    mask: valid tokens, which others may see; the rest is read as zeros. Shape
      `[N]`; None for all.
    phi: feature map or kernel; None for the softmax kernel, the block as it
      is.

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
  points = _linearisation.linearise(architecture, block, x, outputs)
  learnt = _forward.merge_heads(block.output._replace(bias=None), outputs)

  def complete(point, learnt, x):
    label = _linearisation.map_label(architecture, block, point, learnt)
    return label + _linearisation.bias_of(architecture, block, point, x)

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
  _checks.check_blocks(architecture, blocks, x)

  def step(stream, block):
    stream = apply_block_dual(
      architecture, block, stream, positions=positions, mask=mask, phi=phi
    )
    return stream, None

  return jax.lax.scan(step, x, blocks)[0]
