r"""Attention as implicit finetuning, and momentum attention.

Linear attention over demonstrations and query tokens is a linear layer whose
weights are those of the query tokens plus an update by the demonstrations,

.. math:: F(q) = (W_{ZSL} + \Delta W_{ICL})\, q, \qquad
   \Delta W_{ICL} = \sum_i v'_i \otimes k'_i,

and finetuning the key and value projections of the head also adds to those
weights. The identity is one of form: the summands are activations, not
gradients of a stated loss, and the two updates are sums over different tokens.
With a softmax the sum becomes a convex mix: the zero-shot part shrinks.

The metrics by which trained models are compared with finetuned ones are in
`meta_optimizer_metrics`. Throughout, `decay` is :math:`\eta` in `[0, 1)`.

References:
  Dai et al., arXiv:2212.10559; the softmax of `softmax_mix` is what they drop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, attention
from iclcl_jax._door import door
from iclcl_jax.precision import widened
from iclcl_jax.types import Array, Float


class Head(NamedTuple):
  """Projections of a head to keys `[d, d_k]` and values `[d, d_v]`."""

  keys: Float[Array, 'd d_k']
  values: Float[Array, 'd d_v']


class Mix(NamedTuple):
  """Softmax attention as a mix of two attentions.

  The `share` is the softmax mass of the demonstrations, in `[0, 1]`; the others
  are attention over the query tokens alone, and over the demonstrations alone.
  """

  share: Float[Array, '']
  zero_shot: Float[Array, ' d_v']
  demonstrations: Float[Array, ' d_v']


@door
def weight_update(
  keys: Float[Array, 'N d_k'], values: Float[Array, 'N d_v']
) -> Float[Array, 'd_v d_k']:
  """Returns the sum `[d_v, d_k]` of the outer products `v_i k_i`.

  Each is minus the gradient of the contrastive loss `-v . (W k)`. Of the query
  tokens it is the zero-shot weights, of the demonstrations the update in
  context; linear attention over both applies their sum.

  Example:
    >>> weight_update(jnp.eye(2), jnp.array([[1.0], [3.0]])).tolist()
    [[1.0, 3.0]]
  """
  return values.T @ keys


@door
def finetuned_update(
  tokens: Float[Array, 'M d'], head: Head, changes: Head
) -> Float[Array, 'd_v d_k']:
  r"""Returns what finetuning keys and values adds to the zero-shot weights.

  .. math:: \Delta W_{FT}^\top = W_K^\top C\,\Delta W_V
     + \Delta W_K^\top C\, W_V + \Delta W_K^\top C\,\Delta W_V, \quad
     C = X^\top X

  It is a sum over the QUERY tokens. `head` are projections before finetuning,
  `changes` what it added to them.
  """
  keys, values = tokens @ head.keys, tokens @ head.values
  more_keys, more_values = tokens @ changes.keys, tokens @ changes.values
  return more_values.T @ (keys + more_keys) + values.T @ more_keys


@door
def softmax_mix(
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_query_tokens: int,
) -> Mix:
  r"""Splits softmax attention exactly into zero-shot part and demonstrations.

  .. math:: F = (1 - \lambda)\, F_{ZSL} + \lambda F_{demo}

  Rows are those of the demonstrations, then the `num_query_tokens` of the
  query, from 1 to `N - 1`.
  """
  _validate.at_least(1, num_query_tokens=num_query_tokens)
  _validate.check_num_query_tokens(num_query_tokens, keys.shape[0])
  split = keys.shape[0] - num_query_tokens
  logits = keys @ query / query.shape[0] ** 0.5
  log_odds = jax.nn.logsumexp(logits[:split]) - jax.nn.logsumexp(logits[split:])
  return Mix(
    jax.nn.sigmoid(log_odds),
    attention.softmax_attention(query, keys[split:], values[split:]),
    attention.softmax_attention(query, keys[:split], values[:split]),
  )


@door
@widened
def momentum_values(
  values: Float[Array, 'N d_v'], *, decay: float | Array
) -> Float[Array, 'N d_v']:
  r"""Sums past values with decay: :math:`m_t = \eta\,(m_{t-1} + v_{t-1})`.

  The weights `eta^(t - i)` sum to up to `eta / (1 - eta)`, beside a softmax of
  mass one. The first token gets zeros.
  """
  _validate.below_one(decay=decay)
  factor = jnp.asarray(decay, values.dtype)

  def step(average, value):
    return factor * (average + value), average

  return jax.lax.scan(step, jnp.zeros_like(values[0]), values)[1]


@door
def momentum_attention(
  queries: Float[Array, 'N d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  decay: float | Array,
) -> Float[Array, 'N d_v']:
  r"""Adds a decayed sum of past values to causal softmax attention; one head.

  .. math:: o_t = \mathrm{softmax}(q_t K_{\le t}^\top / \sqrt{d_k})\, V_{\le t}
     + \sum_{i < t} \eta^{t - i} v_i

  With `decay=0` it is causal softmax attention, bit for bit. It is not the dual
  of gradient descent with momentum, which weighs OLD tokens more and depends on
  the query (`online_learners.momentum_attention_weights`). The publication
  states no value of the decay.
  """
  past = momentum_values(values, decay=decay)
  position = jnp.arange(len(keys))

  def one_query(query, index):
    seen = position <= index
    return attention.softmax_attention(query, keys, values, mask=seen)

  return jax.vmap(one_query)(queries, position) + past
