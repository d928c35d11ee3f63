r"""Transformer blocks, and blocks as chains of dual models.

`apply_block` is the ordinary forward pass, `apply_block_dual` the same block
as dual models: each key-value head trains one on its keys and values by one
gradient step (`predict_heads`), and what stands behind the heads is an affine
map that is exact at the token (`linearise`), whose matrix belongs into the
labels and whose shift is the bias of the dual model. Neither path calls the
other's attention.

What depends on the query: that affine map. Mean and deviation of a
normalisation and the gate of the feed-forward network are known only after the
forward pass at the token, so the labels of the whole block re-describe it
exactly, but could not be written down before the query arrives. The dual
models of the heads could: keys and values know nothing of the query.

All functions raise `ValueError` where ranks, sizes or dtypes disagree.
"""

from iclcl_jax.transformer._dual_heads import (
  predict_heads,
  predict_heads_autodiff,
)
from iclcl_jax.transformer._forward import (
  Heads,
  apply_block,
  apply_blocks,
  attend,
  complete,
  feed_forward,
  heads,
)
from iclcl_jax.transformer._linearisation import (
  Linearisation,
  apply_block_dual,
  apply_blocks_dual,
  bias_of,
  fold_labels,
  linearise,
  map_label,
)
from iclcl_jax.transformer._parts import (
  LayerNorm,
  RMSNorm,
  Rotary,
  as_it_is,
  bidirectional,
  causal,
  example,
  normalised,
  post_norm,
  pre_norm,
  unrotated,
)
from iclcl_jax.transformer._types import (
  Architecture,
  Block,
  Linear,
  Norm,
  Normalization,
  Placement,
  check_blocks,
)

__all__ = [
  'Architecture',
  'Block',
  'Heads',
  'LayerNorm',
  'Linear',
  'Linearisation',
  'Norm',
  'Normalization',
  'Placement',
  'RMSNorm',
  'Rotary',
  'apply_block',
  'apply_block_dual',
  'apply_blocks',
  'apply_blocks_dual',
  'as_it_is',
  'attend',
  'bias_of',
  'bidirectional',
  'causal',
  'check_blocks',
  'complete',
  'example',
  'feed_forward',
  'fold_labels',
  'heads',
  'linearise',
  'map_label',
  'normalised',
  'post_norm',
  'pre_norm',
  'predict_heads',
  'predict_heads_autodiff',
  'unrotated',
]
