r"""Attention designed from a loss, and the published modifications.

`attention_from_loss` turns any loss of the dual model's predictions into the
attention that one gradient step on it implies: the step replaces the label of
demonstration `i` by :math:`u_i = -\eta\,\partial L/\partial f(k_i)` at `W_0`,
and attention with these labels is the trained model's answer.

The other functions are the closed forms of the modifications that the papers
name; their losses are in :mod:`iclcl_jax.losses`. Those that begin with
`stream_` or `causal_` answer all tokens of a sequence, as a layer does.
"""

from iclcl_jax.modified._augmented import augmented_attention
from iclcl_jax.modified._from_loss import attention_from_loss
from iclcl_jax.modified._loss_attention import LossAttention
from iclcl_jax.modified._many import (
  causal_augmented_attention,
  causal_regularised_attention,
  causal_regularised_attention_as_printed,
  stream_augmented_attention,
  stream_regularised_attention,
  stream_regularised_attention_as_printed,
)
from iclcl_jax.modified._many_negatives import (
  stream_negative_attention,
  stream_token_negative_attention,
)
from iclcl_jax.modified._negatives import (
  Negatives,
  divide_all,
  highest_scores,
  lowest_scores,
  negative_attention,
  negatives_of,
  raise_others,
  random_choice,
  scale_others,
  token_negative_labels,
  unnormalised,
)
from iclcl_jax.modified._regularised import (
  TrainingWeights,
  regularised_attention,
  regularised_attention_as_printed,
  regularised_training_weights,
)

__all__ = [
  'LossAttention',
  'Negatives',
  'TrainingWeights',
  'attention_from_loss',
  'augmented_attention',
  'causal_augmented_attention',
  'causal_regularised_attention',
  'causal_regularised_attention_as_printed',
  'divide_all',
  'highest_scores',
  'lowest_scores',
  'negative_attention',
  'negatives_of',
  'raise_others',
  'random_choice',
  'regularised_attention',
  'regularised_attention_as_printed',
  'regularised_training_weights',
  'scale_others',
  'stream_augmented_attention',
  'stream_negative_attention',
  'stream_regularised_attention',
  'stream_regularised_attention_as_printed',
  'stream_token_negative_attention',
  'token_negative_labels',
  'unnormalised',
]
