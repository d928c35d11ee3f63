"""The neighbouring accounts of in-context learning, one module each.

Their functions raise `ValueError` where arrays are not those of the
annotations, a count is below 1, or a number is not finite or outside of its
range; what else they refuse is said with each.

* `implicit_weight_update` - what a context does to a token is a rank-one change
  of the weights behind the heads.
* `linear_regression_gd` - linear self-attention with constructed weights does
  gradient descent on the context, one step a layer.
* `meta_optimizer` and its `meta_optimizer_metrics` - attention as implicit
  finetuning, momentum attention, and the metrics that compare the two.
* `online_learners` - linear attention, decay, delta rule, momentum, recursive
  least squares: every layer one inner learner on the stream of tokens.
* `softmax_regression` - a step on the weights and a step on the document, as
  shifts of the target, and bounds of both.
* `training_data_attention` - a network trained by SGD answers as attention over
  its own training history.
"""

from iclcl_jax.accounts import (
  implicit_weight_update as implicit_weight_update,
  linear_regression_gd as linear_regression_gd,
  meta_optimizer as meta_optimizer,
  meta_optimizer_metrics as meta_optimizer_metrics,
  online_learners as online_learners,
  softmax_regression as softmax_regression,
  training_data_attention as training_data_attention,
)
