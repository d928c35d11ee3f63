r"""The moments `sum_i v_i phi(k_i)^T` and `sum_i phi(k_i)`, in scaled form.

The one piece of arithmetic that attention and the dual model share. A state
keeps, for each feature, a running maximum of the log-features and everything
relative to it, as flash attention does for each row: the largest contribution
to a feature is of order one, the query's own scale drops out, and streams and
merges are exact up to rounding. Every maximum is stopped from gradients in
both parts in which it occurs, so that it cancels in derivatives too.

Attention is a ratio of two linear models that share their features (append 1
to every label); the code carries both as the rows of one matrix.
"""

from iclcl_jax.moments._causal import causal_sums
from iclcl_jax.moments._scaled import (
  labels,
  largest,
  map_chunks,
  scaled,
  scaled_rows,
  split_chunks,
  zero_log_scale,
)
from iclcl_jax.moments._state import (
  absorb,
  absorb_stream,
  empty,
  get_weights,
  gradient,
  merge,
  penalty_gradient,
  read,
  remove,
  rescale,
  score_terms,
  scores,
  see,
  with_weights,
)

__all__ = [
  'absorb',
  'absorb_stream',
  'causal_sums',
  'empty',
  'get_weights',
  'gradient',
  'labels',
  'largest',
  'map_chunks',
  'merge',
  'penalty_gradient',
  'read',
  'remove',
  'rescale',
  'scaled',
  'scaled_rows',
  'score_terms',
  'scores',
  'see',
  'split_chunks',
  'with_weights',
  'zero_log_scale',
]
