r"""Attention as implicit finetuning, and momentum attention.

Linear attention over demonstrations and query tokens is a linear layer whose
weights are those of the query tokens plus an update by the demonstrations,

.. math:: F(q) = (W_{ZSL} + \Delta W_{ICL})\, q, \qquad
   \Delta W_{ICL} = \sum_i v'_i \otimes k'_i,

and finetuning the key and value projections of the head also adds to those
weights (`finetuned_update`). The identity is one of form: the summands are
activations, not gradients of a stated loss, and the two updates are sums over
different tokens. With a softmax the sum becomes a convex mix: the zero-shot
part shrinks.

The metrics by which trained models are compared with finetuned ones are in
`meta_optimizer_metrics`.

References:
  Dai et al., arXiv:2212.10559.
"""

from iclcl_jax.accounts.meta_optimizer._finetuning import (
  Head as Head,
  Mix as Mix,
  finetuned_update as finetuned_update,
  meta_gradients as meta_gradients,
  softmax_mix as softmax_mix,
  weight_update as weight_update,
)
from iclcl_jax.accounts.meta_optimizer._momentum import (
  MomentumState as MomentumState,
  decode as decode,
  momentum_attention as momentum_attention,
  momentum_matrix as momentum_matrix,
  momentum_values as momentum_values,
  start_decoding as start_decoding,
)
