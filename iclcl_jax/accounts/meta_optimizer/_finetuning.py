"""Weights of query tokens, updates by demonstrations and by finetuning."""

from typing import NamedTuple

import jax

from iclcl_jax import _validate, attention
from iclcl_jax._door import door
from iclcl_jax.types import Array, Float


class Head(NamedTuple):
  """Key and value projections of a head; tokens are rows.

  Attributes:
    keys: projection to keys. Shape `[d, d_k]`.
    values: projection to values. Shape `[d, d_v]`.
  """

  keys: Float[Array, 'd d_k']
  values: Float[Array, 'd d_v']


class Mix(NamedTuple):
  """Softmax attention as a mix of two attentions.

  Attributes:
    share: softmax mass of the demonstrations, in `[0, 1]`. Shape `[]`.
    zero_shot: attention over the query tokens alone. Shape `[d_v]`.
    demonstrations: attention over the demonstrations alone. Shape `[d_v]`.
  """

  share: Float[Array, '']
  zero_shot: Float[Array, ' d_v']
  demonstrations: Float[Array, ' d_v']


@door
def meta_gradients(
  keys: Float[Array, 'N d_k'], values: Float[Array, 'N d_v']
) -> Float[Array, 'N d_v d_k']:
  """Returns what each token adds to the weights: the outer product `v_i k_i`.

  Each is minus the gradient of the contrastive loss `-v . (W k)`, not of any
  loss that a model was trained on.
  """
  return values[:, :, None] * keys[:, None]


@door
def weight_update(
  keys: Float[Array, 'N d_k'], values: Float[Array, 'N d_v']
) -> Float[Array, 'd_v d_k']:
  """Returns the sum `[d_v, d_k]` of the `meta_gradients` without forming them.

  Of the query tokens it is the zero-shot weights, of the demonstrations the
  update in context; linear attention over both applies their sum.

  Example:
    >>> import jax.numpy as jnp
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

  It is a sum over the QUERY tokens, the update in context one over the
  demonstrations: the same form, no equality.

  Args:
    tokens: query tokens `X`. Shape `[M, d]`.
    head: projections before finetuning.
    changes: what finetuning added to them.
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

  Args:
    query: the query. Shape `[d_k]`.
    keys: keys of the demonstrations, then of the query tokens. Shape
      `[N, d_k]`.
    values: their values. Shape `[N, d_v]`.
    num_query_tokens: how many of them, at the end, are the query's; at least 1
      and fewer than `N`.

  References:
    Dai et al., arXiv:2212.10559, with the softmax that they drop.
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
