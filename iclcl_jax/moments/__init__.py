r"""The moments `sum_i v_i phi(k_i)^T` and `sum_i phi(k_i)`, in scaled form.

The one piece of arithmetic that attention and the dual model share. A state
keeps, for each feature, a running maximum of the log-features and everything
relative to it, as flash attention does for each row: the largest contribution
to a feature is of order one, the query's own scale drops out, and streams and
merges are exact up to rounding. Every maximum is stopped from gradients in
both parts in which it occurs, so that it cancels in derivatives too.

Attention is a ratio of two linear models that share their features (append 1
to every label); the code carries both as the rows of one matrix. Arguments are
those of `types.Form`.
"""

from iclcl_jax.moments._causal import causal_sums as causal_sums
from iclcl_jax.moments._state import (
  absorb as absorb,
  absorb_stream as absorb_stream,
  empty as empty,
  get_weights as get_weights,
  gradient as gradient,
  labels as labels,
  largest as largest,
  map_chunks as map_chunks,
  merge as merge,
  penalty_gradient as penalty_gradient,
  read as read,
  remove as remove,
  rescale as rescale,
  scaled as scaled,
  scaled_rows as scaled_rows,
  score_terms as score_terms,
  scores as scores,
  split_chunks as split_chunks,
  with_weights as with_weights,
  zero_log_scale as zero_log_scale,
)
