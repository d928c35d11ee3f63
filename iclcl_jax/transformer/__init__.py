"""Transformer blocks, and blocks as chains of dual models."""

from iclcl_jax.transformer._types import (
  Architecture,
  Block,
  Linear,
  Norm,
  Normalization,
)

__all__ = ['Architecture', 'Block', 'Linear', 'Norm', 'Normalization']
