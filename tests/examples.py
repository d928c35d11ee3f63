"""What the examples in docstrings take for granted."""

import functools

import jax
import jax.numpy as jnp

import iclcl_jax

NAMES = {name: getattr(iclcl_jax, name) for name in iclcl_jax.__all__}
NAMES |= {'functools': functools, 'jax': jax, 'jnp': jnp}
