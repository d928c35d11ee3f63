"""Linear self-attention as gradient descent on a linear regression.

One layer with the constructed weights does one step of gradient descent on the
context, for the query and for every demonstration at once, so `K` layers do
`K` steps. `attend` and `predict` are the layer, `construct` its weights,
`descend` and `descend_plus_plus` the descent; `expected_loss` says how far one
step gets, and the metrics say how alike a trained layer is. `construct_copy`
joins inputs and labels that come as separate tokens.

Throughout, `inputs` `[N, d_x]` are the training inputs, `labels` `[N, d_y]`
their labels and `query` `[d_x]` the test input; `tokens` `[M, D]` are rows of
inputs, then labels, the query's last; `d_x` and `d_y` are the widths of an
input and a label, `num_demonstrations` is `N`, `learning_rate` the step size
`eta`, and `dtype` that of a layer.

References:
  von Oswald et al., Transformers learn in-context by gradient descent,
  arXiv:2212.07677: eq. 1 and appendix A (`attend`), proposition 1 (`construct`,
  `predict`), eq. 4 and 5 (`descend`, and averaged over tasks `expected_loss`),
  section 3 (`make_tokens`), 3.1 (metrics, which there add 1e-8 to norms,
  `interpolate`), 4.3 and appendix A.10 (GD++), 5 (copying); the step of kernel
  regression of 4.2 is `attention.linear_attention` times `eta / N`.
"""

from iclcl_jax.accounts.linear_regression_gd._layers import (
  Folded as Folded,
  SelfAttention as SelfAttention,
  attend as attend,
  attend_query as attend_query,
  construct as construct,
  construct_copy as construct_copy,
  fold as fold,
  interpolate as interpolate,
  linear_weights as linear_weights,
  make_alternating_tokens as make_alternating_tokens,
  make_tokens as make_tokens,
  normalise as normalise,
  predict as predict,
  repeat as repeat,
  softmax_weights as softmax_weights,
  widen as widen,
)
from iclcl_jax.accounts.linear_regression_gd._theory import (
  LinearTasks as LinearTasks,
  Moments as Moments,
  descend as descend,
  descend_plus_plus as descend_plus_plus,
  expected_loss as expected_loss,
  fit_learning_rate as fit_learning_rate,
  model_cosine as model_cosine,
  optimal_learning_rate as optimal_learning_rate,
)
