"""Linear self-attention as gradient descent on a linear regression.

One layer with the constructed weights does one step of gradient descent on the
context, for the query and for every demonstration at once, so `K` layers do
`K` steps. `attend` and `predict` are the layer, `construct` and
`construct_plus_plus` its weights, `descend` and `descend_plus_plus` the
descent; `expected_loss` says how far one step gets, and the metrics say how
alike a trained layer is. `construct_copy` joins inputs and labels that come as
separate tokens.

References:
  von Oswald et al., Transformers learn in-context by gradient descent,
  arXiv:2212.07677.
"""

from iclcl_jax.accounts.linear_regression_gd._closed_forms import (
  expected_loss_given_inputs,
  kernel_step,
)
from iclcl_jax.accounts.linear_regression_gd._construction import (
  construct,
  construct_copy,
  construct_plus_plus,
  widen,
)
from iclcl_jax.accounts.linear_regression_gd._layers import (
  attend,
  attend_query,
  linear_weights,
  predict,
  repeat,
  softmax_weights,
)
from iclcl_jax.accounts.linear_regression_gd._metrics import (
  model_cosine,
  model_difference,
  predictions_difference,
  sensitivity,
)
from iclcl_jax.accounts.linear_regression_gd._products import (
  Folded,
  SelfAttention,
  fold,
  interpolate,
  normalise,
  unfold,
)
from iclcl_jax.accounts.linear_regression_gd._theory import (
  LinearTasks,
  Moments,
  descend,
  descend_plus_plus,
  expected_loss,
  fit_learning_rate,
  optimal_learning_rate,
  uniform_moments,
)
from iclcl_jax.accounts.linear_regression_gd._tokens import (
  context_only,
  make_alternating_tokens,
  make_tokens,
)

__all__ = [
  'Folded',
  'LinearTasks',
  'Moments',
  'SelfAttention',
  'attend',
  'attend_query',
  'construct',
  'construct_copy',
  'construct_plus_plus',
  'context_only',
  'descend',
  'descend_plus_plus',
  'expected_loss',
  'expected_loss_given_inputs',
  'fit_learning_rate',
  'fold',
  'interpolate',
  'kernel_step',
  'linear_weights',
  'make_alternating_tokens',
  'make_tokens',
  'model_cosine',
  'model_difference',
  'normalise',
  'optimal_learning_rate',
  'predict',
  'predictions_difference',
  'repeat',
  'sensitivity',
  'softmax_weights',
  'unfold',
  'uniform_moments',
  'widen',
]
