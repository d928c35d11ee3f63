r"""Transformer blocks, and blocks as chains of dual models.

`apply_block` is the ordinary forward pass, `apply_block_dual` the same block
as dual models: each key-value head trains one on its keys and values by one
gradient step (`predict_heads`), and what stands behind the heads is an affine
map that is exact at the token (`linearise`), whose matrix belongs into the
labels and whose shift is the bias of the dual model. Neither path calls the
other's attention.

Arguments, where a function does not describe them:

================  ===========================================================
``architecture``  what the shapes of the parameters do not say
``block``         the parameters; of ``blocks``, with a leading axis ``L``
``x``             the residual stream before the block, ``[N, d_model]``
``heads``         what `heads` returns; ``outputs [H, N, d_k]``, `attend`
``positions``     of the tokens, ``[N]``; None for ``0, 1, ...``
``mask``          valid tokens ``[N]``, which others may see; the rest is read
                  as zeros; None for all
``phi``           feature map or kernel; None for the softmax kernel
``point``         the `Linearisation` of one token, without the axis ``N``
================  ===========================================================

All functions raise `ValueError` where ranks, sizes or dtypes disagree.

References:
  Ren & Liu, arXiv:2310.13220: Theorem 3.1, head by head, one Transformer layer
  (ReLU), several attention layers; other activations, normalisations and gates
  derived here. Katharopoulos et al., arXiv:2006.16236, eq. 9 (online). Blocks:
  Vaswani et al., arXiv:1706.03762, section 3; Xiong et al., arXiv:2002.04745
  (both placements of the normalisation); Ainslie et al., arXiv:2305.13245
  (grouped queries); Zhang & Sennrich, arXiv:1910.07467, eq. 4 (`RMSNorm`); Ba
  et al., arXiv:1607.06450, eq. 3 (`LayerNorm`); Su et al., arXiv:2104.09864,
  eq. 15 and 34, with halves in place of neighbours (`Rotary`).
"""

from iclcl_jax.transformer._dual_heads import (
  predict_heads as predict_heads,
  predict_heads_autodiff as predict_heads_autodiff,
)
from iclcl_jax.transformer._forward import (
  Heads as Heads,
  apply_block as apply_block,
  apply_blocks as apply_blocks,
  attend as attend,
  complete as complete,
  heads as heads,
)
from iclcl_jax.transformer._linearisation import (
  Linearisation as Linearisation,
  apply_block_dual as apply_block_dual,
  apply_blocks_dual as apply_blocks_dual,
  bias_of as bias_of,
  complete_dual as complete_dual,
  fold_labels as fold_labels,
  linearise as linearise,
  map_label as map_label,
)
from iclcl_jax.transformer._parts import (
  ClampedGating as ClampedGating,
  LayerNorm as LayerNorm,
  RMSNorm as RMSNorm,
  bidirectional as bidirectional,
  causal as causal,
  example as example,
  rotary_frequencies as rotary_frequencies,
)
from iclcl_jax.transformer._stacks import (
  check_blocks as check_blocks,
  scan_blocks as scan_blocks,
  with_constants as with_constants,
)
from iclcl_jax.transformer._types import (
  Architecture as Architecture,
  Block as Block,
  Constants as Constants,
  Layer as Layer,
  Linear as Linear,
  Norm as Norm,
  Norms as Norms,
  Rotary as Rotary,
  gated as gated,
)
