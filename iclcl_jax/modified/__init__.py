r"""Attention designed from a loss, and the published modifications.

Each function here makes an `Attention`, an object with three doors::

  attend(phi, query, keys, values)           # one query
  attend.stream(phi, queries, keys, values)  # many
  attend.causal(phi, queries, keys, values)  # token t sees the tokens 0..t

`attention_from_loss` turns any loss of the dual model's predictions into the
attention that one gradient step on it implies: the step replaces the label of
demonstration `i` by :math:`u_i = -\eta\,\partial L/\partial f(k_i)` at `W_0`,
and attention with these labels is the trained model's answer. The others are
the closed forms of the papers' regularized, augmented and negative attention;
their losses are in :mod:`iclcl_jax.losses`. They raise a `ValueError` for a
number that is not finite or out of its range, or a function that does not take
its arguments; what the doors take and raise stands in `Attention`.

References:
  Ren & Liu, arXiv:2310.13220: section 4 (from losses to layers), 4.1
  (`regularised`, derived strictly, and as printed in v2), 4.2 (`augmented`),
  4.3 (`negative`, by scores of one query as in v1; `token_negative`, v2).
  `second_step` is not theirs.
"""

from iclcl_jax.modified._attention import Attention as Attention
from iclcl_jax.modified._closed_forms import (
  Augmented as Augmented,
  Regularised as Regularised,
  SecondStep as SecondStep,
  augmented as augmented,
  regularised as regularised,
  regularised_as_printed as regularised_as_printed,
  second_step as second_step,
)
from iclcl_jax.modified._loss_attention import (
  LossAttention as LossAttention,
  attention_from_loss as attention_from_loss,
)
from iclcl_jax.modified._negatives import (
  Negative as Negative,
  TokenNegative as TokenNegative,
  negative as negative,
  token_negative as token_negative,
)
from iclcl_jax.modified._selection import (
  highest_scores as highest_scores,
  lowest_scores as lowest_scores,
  raise_others as raise_others,
  random_choice as random_choice,
  scale_others as scale_others,
  unnormalised as unnormalised,
)
