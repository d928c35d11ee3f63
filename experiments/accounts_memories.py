r"""The accounts as memories: what a layer does between projections and answer.

A memory reads a stream of keys and values and answers the query from the first
`n` of them, for several `n`. Its gates are the few numbers of its inner
learner. With the projections that the account predicts - keys and queries are
the inputs, values the labels - a memory is the account's learner; with trained
projections it is a layer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iclcl_jax import losses
from iclcl_jax.accounts import linear_regression_gd, meta_optimizer
from iclcl_jax.accounts import online_learners as learners
from iclcl_jax.types import Array, Float

NUM_STEPS = 2  # Of gradient descent and GD++.
NUM_EPOCHS = 4  # Of SGD on the demonstrations.


class Gate(NamedTuple):
  """A number of an inner learner.

  Attributes:
    name: what it is.
    transform: from a free number to its range.
    start: the free number to start from.
  """

  name: str
  transform: Callable[[Array], Array]
  start: float


class Memory(NamedTuple):
  """An inner learner.

  Attributes:
    account: the paper behind it.
    answer: `(tokens, gates, lengths) -> [L, 1]`: answers to the last query
      from the first `lengths` tokens.
    gates: its numbers, in the order in which `answer` takes them.
    signs: sign of queries and of values in each predicted head.
    is_layer: whether a layer is trained around it, or it is only tuned.
  """

  account: str
  answer: Callable[[learners.Stream, Sequence[Array], Array], Array]
  gates: tuple[Gate, ...]
  signs: tuple[float, ...] = (1.0,)
  is_layer: bool = True


def rate(start: float = -1.0) -> Gate:
  return Gate('step size', jnp.exp, start)


def linear_attention(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """One step of gradient descent on the mean squared loss, from 0."""
  scores = tokens.keys @ tokens.queries[-1]
  seen = _seen_by_all(tokens, lengths)
  count = lengths[:, None].astype(scores.dtype)
  return gates[0] / count * ((seen * scores[None]) @ tokens.values)


def softmax(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """Nadaraya-Watson: softmax attention with a sharpness of its own."""
  scores = gates[0] * (tokens.keys @ tokens.queries[-1])
  return _prefix_weights(scores, lengths) @ tokens.values


def scaled_softmax(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """A head of several: softmax times a size."""
  return gates[1] * softmax(tokens, gates, lengths)


def momentum_attention(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """Softmax attention plus the decayed sum of the past values."""
  padded = jnp.pad(tokens.values, [(0, 1), (0, 0)])
  past = meta_optimizer.momentum_values(padded, decay=gates[1])
  return softmax(tokens, gates, lengths) + past[lengths]


def gated_decay(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """Linear attention; every later token shrinks what is there."""
  scores = tokens.keys @ tokens.queries[-1]
  later = lengths[:, None] - 1 - jnp.arange(scores.shape[0])[None]
  shrunk = gates[1] ** jnp.maximum(later, 0).astype(scores.dtype)
  weights = _seen_by_all(tokens, lengths) * shrunk * scores[None]
  return gates[0] * (weights @ tokens.values)


def heavy_ball(tokens, gates, lengths) -> Float[Array, 'L 1']:
  outputs = learners.descend(
    tokens, loss=losses.squared, rates=gates[0], momentum=gates[1]
  )
  return outputs[lengths - 1]


def delta_rule(tokens, gates, lengths) -> Float[Array, 'L 1']:
  return learners.delta_recurrence(tokens, rates=gates[0])[lengths - 1]


def gated_delta_rule(tokens, gates, lengths) -> Float[Array, 'L 1']:
  outputs = learners.delta_recurrence(tokens, rates=gates[0], decays=gates[1])
  return outputs[lengths - 1]


def least_squares(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """Ridge regression, solved for each length alone."""
  identity = jnp.eye(tokens.keys.shape[1], dtype=tokens.keys.dtype)

  def prefix(length):
    seen = tokens.keys * _seen(tokens, length)[:, None].astype(identity.dtype)
    gram = seen.T @ seen + gates[0] * identity
    read = jnp.linalg.solve(gram, tokens.queries[-1])
    return (seen @ read) @ tokens.values

  return jax.vmap(prefix)(lengths)


def sgd(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """Several epochs of SGD on the demonstrations, one of them a step."""
  again = jax.tree.map(lambda x: jnp.concatenate([x] * NUM_EPOCHS), tokens)

  def prefix(length):
    seen = _seen(tokens, length).astype(tokens.keys.dtype)
    rates = jnp.concatenate([gates[0] * seen] * NUM_EPOCHS)
    return learners.delta_recurrence(again, rates=rates)[-1]

  return jax.vmap(prefix)(lengths)


def gd(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """Steps of gradient descent on the mean squared loss."""
  return gd_plus_plus(tokens, (gates[0], jnp.zeros_like(gates[0])), lengths)


def gd_plus_plus(tokens, gates, lengths) -> Float[Array, 'L 1']:
  """GD++, whose contraction is of the mean outer product of the inputs."""
  size = tokens.keys.shape[0]
  ones = jnp.ones(NUM_STEPS, tokens.keys.dtype)

  def prefix(length):
    seen = _seen(tokens, length)[:, None].astype(tokens.keys.dtype)
    count = length.astype(tokens.keys.dtype)
    return linear_regression_gd.descend_plus_plus(
      tokens.keys * seen,
      tokens.values * seen,
      tokens.queries[-1],
      gates[0] * size / count * ones,
      gates[1] / count * ones,
    )

  return jax.vmap(prefix)(lengths)


def softmax_regression(tokens, gates, lengths) -> Float[Array, 'L 1']:
  r"""One step of softmax regression: documents of inputs, targets of labels.

  The labels are logits of a target :math:`b = \mathrm{softmax}(y)`, and the
  answer is the query's logit, up to the step size.
  """
  target = _prefix_weights(tokens.values[:, 0], lengths)
  seen = _seen_by_all(tokens, lengths)
  count = lengths[:, None].astype(target.dtype)
  scores = tokens.keys @ tokens.queries[-1]
  return gates[0] * ((target - seen / count) @ scores)[:, None]


def _seen(tokens, length) -> Array:
  return jnp.arange(tokens.keys.shape[0]) < length


def _seen_by_all(tokens, lengths) -> Float[Array, 'L N']:
  """One where a prefix holds the token."""
  seen = jnp.arange(tokens.keys.shape[0])[None] < lengths[:, None]
  return seen.astype(tokens.keys.dtype)


def _prefix_weights(scores, lengths) -> Float[Array, 'L N']:
  """Softmax over each prefix, zeros beyond."""
  seen = jnp.arange(scores.shape[0])[None] < lengths[:, None]
  return jax.nn.softmax(jnp.where(seen, scores[None], -jnp.inf), axis=1)


_SHARPNESS = Gate('sharpness', jnp.exp, 0.0)
_OSWALD = 'von Oswald et al., arXiv:2212.07677'
_REN = 'Ren & Liu, arXiv:2310.13220'


def _fraction(name: str, start: float) -> Gate:
  return Gate(name, jax.nn.sigmoid, start)


MEMORIES = {
  'softmax': Memory(_REN, softmax, (_SHARPNESS,)),
  'momentum attention': Memory(
    'Dai et al., arXiv:2212.10559',
    momentum_attention,
    (_SHARPNESS, _fraction('decay of past values', -1.0)),
  ),
  'softmax regression': Memory(
    'Li et al., arXiv:2304.13276',
    softmax_regression,
    (rate(0.0),),
    is_layer=False,
  ),
  'gated decay': Memory(
    'Yang et al., arXiv:2312.06635',
    gated_decay,
    (rate(), _fraction('decay', 2.0)),
  ),
  'linear attention': Memory(_OSWALD, linear_attention, (rate(0.0),)),
  'two-head softmax': Memory(
    _OSWALD, scaled_softmax, (_SHARPNESS, Gate('size', jnp.exp, 0.0)), (1, -1)
  ),
  'GD (2 steps)': Memory(_OSWALD, gd, (rate(0.0),), is_layer=False),
  'delta rule': Memory(
    'Schlag et al., arXiv:2102.11174', delta_rule, (rate(),)
  ),
  'gated delta rule': Memory(
    'Yang et al., arXiv:2412.06464',
    gated_delta_rule,
    (rate(), _fraction('decay', 2.0)),
  ),
  'delta rule (momentum)': Memory(
    'Behrouz et al., arXiv:2501.00663',
    heavy_ball,
    (rate(-2.0), _fraction('momentum', -1.0)),
  ),
  'GD++ (2 steps)': Memory(
    _OSWALD,
    gd_plus_plus,
    (rate(0.0), Gate('contraction', jnp.exp, -1.0)),
    is_layer=False,
  ),
  'SGD (4 epochs)': Memory(
    'Irie et al., arXiv:2202.05798', sgd, (rate(),), is_layer=False
  ),
  'least squares (mesa)': Memory(
    'von Oswald et al., arXiv:2309.05858',
    least_squares,
    (Gate('ridge', jnp.exp, -1.0),),
  ),
}
