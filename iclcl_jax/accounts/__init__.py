"""The neighbouring accounts of in-context learning, one module each.

`linear_regression_gd` - linear self-attention with constructed weights does
gradient descent on the context, one step a layer.

`online_learners` - linear attention, decay, delta rule, momentum, recursive
least squares: every layer one inner learner on the stream of tokens.

`training_data_attention` - a network trained by SGD answers as attention over
its own training history.
"""

from iclcl_jax.accounts import (
  linear_regression_gd,
  online_learners,
  training_data_attention,
)

__all__ = [
  'linear_regression_gd',
  'online_learners',
  'training_data_attention',
]
