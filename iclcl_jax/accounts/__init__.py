"""The neighbouring accounts of in-context learning, one module each.

`online_learners` - linear attention, decay, delta rule, momentum, recursive
least squares: every layer one inner learner on the stream of tokens.
"""

from iclcl_jax.accounts import online_learners

__all__ = ['online_learners']
