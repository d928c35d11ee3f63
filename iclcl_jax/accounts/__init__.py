"""The neighbouring accounts of in-context learning, one module each.

`online_learners` - linear attention, decay, delta rule, momentum, recursive
least squares: every layer one inner learner on the stream of tokens.

`training_data_attention` - a network trained by SGD answers as attention over
its own training history.
"""

from iclcl_jax.accounts import online_learners, training_data_attention

__all__ = ['online_learners', 'training_data_attention']
