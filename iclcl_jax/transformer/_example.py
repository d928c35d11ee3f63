"""A block for the examples of the documentation."""

import jax
import jax.numpy as jnp

from iclcl_jax.transformer import _parts
from iclcl_jax.transformer._types import Architecture, Block, Linear, Norm


def example() -> tuple[Architecture, Block]:
  """Makes a small block of the Llama family, all weights 1, for examples.

  Returns:
    The architecture, and a block with `d_model = 4`, two query heads of width
    2 that share one key-value head, and `d_ff = 3`.

  Example:
    >>> architecture, block = example()
    >>> block.query.weight.shape, block.key.weight.shape
    ((4, 2, 2), (4, 1, 2))
  """
  architecture = Architecture(
    placement=_parts.pre_norm,
    normalization=_parts.RMSNorm(1e-5),
    activation=jax.nn.silu,
    rotation=_parts.Rotary(),
    visible=_parts.causal,
  )
  block = Block(
    attention_norm=Norm(jnp.ones(4)),
    query=Linear(jnp.ones((4, 2, 2))),
    key=Linear(jnp.ones((4, 1, 2))),
    value=Linear(jnp.ones((4, 1, 2))),
    output=Linear(jnp.ones((2, 2, 4))),
    ffn_norm=Norm(jnp.ones(4)),
    gate=Linear(jnp.ones((4, 3))),
    up=Linear(jnp.ones((4, 3))),
    down=Linear(jnp.ones((3, 4))),
  )
  return architecture, block
