r"""Metrics that compare in-context learning with finetuning, and their nulls.

All are functions of recorded activations of the last query token: zero-shot
(no demonstrations), in context, finetuned. Each metric takes one query; `vmap`
takes many. A metric without its null says little: two unrelated updates of the
same vector have a `normalised_update_similarity` far above 0, and any two that
shrink that vector have a high `update_similarity`. An undefined value (no
update at all, no example to recover) is NaN.

References:
  Dai et al., arXiv:2212.10559, where no other source is named.
"""

from iclcl_jax.accounts.meta_optimizer_metrics._nulls import (
  Similarity,
  permuted_null,
  random_null,
)
from iclcl_jax.accounts.meta_optimizer_metrics._recovery import (
  Recovery,
  recovery,
  recovery_null,
)
from iclcl_jax.accounts.meta_optimizer_metrics._similarities import (
  cosine,
  kendall,
  map_similarity,
  map_update_similarity,
  normalised_update_similarity,
  partial_update_similarity,
  update_similarity,
)

__all__ = [
  'Recovery',
  'Similarity',
  'cosine',
  'kendall',
  'map_similarity',
  'map_update_similarity',
  'normalised_update_similarity',
  'partial_update_similarity',
  'permuted_null',
  'random_null',
  'recovery',
  'recovery_null',
  'update_similarity',
]
