"""In-context learning as gradient descent on a contrastive loss, in JAX.

Import modules, then name their functions::

  from iclcl_jax import dual, features, projections

Examples in docstrings take this for granted, and `import jax.numpy as jnp`.
`iclcl_jax.layers` needs flax and is imported by name only.
"""

from iclcl_jax import (
  accounts,
  attention,
  bounds,
  budget,
  dual,
  equivalence,
  features,
  finite_duals,
  kernels,
  losses,
  modified,
  precision,
  pretrained,
  projections,
  storage,
  tasks,
  transformer,
  types,
)

__version__ = '0.2.0'

__all__ = [
  'accounts',
  'attention',
  'bounds',
  'budget',
  'dual',
  'equivalence',
  'features',
  'finite_duals',
  'kernels',
  'losses',
  'modified',
  'precision',
  'pretrained',
  'projections',
  'storage',
  'tasks',
  'transformer',
  'types',
]
