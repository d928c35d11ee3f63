"""Transformer blocks, and blocks as chains of dual models."""

from iclcl_jax.transformer._example import example
from iclcl_jax.transformer._forward import (
  Heads,
  apply_block,
  apply_blocks,
  attend,
  complete,
  feed_forward,
  heads,
)
from iclcl_jax.transformer._parts import (
  LayerNorm,
  RMSNorm,
  Rotary,
  as_it_is,
  bidirectional,
  causal,
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
)

__all__ = [
  'Architecture',
  'Block',
  'Heads',
  'LayerNorm',
  'Linear',
  'Norm',
  'Normalization',
  'Placement',
  'RMSNorm',
  'Rotary',
  'apply_block',
  'apply_blocks',
  'as_it_is',
  'attend',
  'bidirectional',
  'causal',
  'complete',
  'example',
  'feed_forward',
  'heads',
  'normalised',
  'post_norm',
  'pre_norm',
  'unrotated',
]
