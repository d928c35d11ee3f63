r"""Sequence layers as online learners: one inner step for every token.

A layer with state :math:`W_t` reads a stream of keys and values and answers
:math:`o_t = W_t\,\phi(q_t)`, together `[N, d_v]`. `descend` is the
definition of all that learn by gradient steps: at each token the state decays,
then takes a step on an inner loss, found by `jax.grad`. The other functions are
the published recurrences and their parallel forms, which need no gradient and
answer `chunk_size` tokens together; their arguments are as in `descend`.

====================  ===========  =====================================  ===
layer                 inner loss   inner update                           by
====================  ===========  =====================================  ===
linear attention      contrastive  step 1                                 1
RetNet, Mamba-2       contrastive  decay g, step 1                        2
gated linear att.     contrastive  decay by feature, step 1               3
DeltaNet              squared      step beta                              4
gated DeltaNet        squared      decay g first, then step beta there    5
momentum              either       heavy ball                             6
mesa, least squares   squared      exact minimiser over the past, ridge   7
softmax               squared      exact minimiser for each query         8
====================  ===========  =====================================  ===

1 Katharopoulos et al., arXiv:2006.16236; 2 Sun et al., arXiv:2307.08621, Dao &
Gu, arXiv:2405.21060; 3 Yang et al., arXiv:2312.06635; 4 Schlag et al.,
arXiv:2102.11174; 5 Yang et al., arXiv:2412.06464; 6 Behrouz et al.,
arXiv:2501.00663, without gates; 7 von Oswald et al., arXiv:2309.05858; 8
Nadaraya-Watson. Deployed layers add normalisation, convolutions and output
gates: the table is the memory alone.
"""

from iclcl_jax.accounts.online_learners._recurrences import (
  delta_parallel as delta_parallel,
  delta_recurrence as delta_recurrence,
  least_squares as least_squares,
  linear_parallel as linear_parallel,
  linear_recurrence as linear_recurrence,
  momentum_attention_weights as momentum_attention_weights,
  recursive_least_squares as recursive_least_squares,
  softmax_recurrence as softmax_recurrence,
)
from iclcl_jax.accounts.online_learners._stream import (
  Stream as Stream,
  descend as descend,
  stream as stream,
)
