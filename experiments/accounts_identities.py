"""The identities of all accounts on the same demonstrations.

Left a layer as published, right its inner learner, found by `jax.grad` or by an
exact solve wherever a definition of that kind exists.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import accounts_memories as memories
from experiments import harness
from iclcl_jax import attention, dual, features, kernels, losses
from iclcl_jax.accounts import linear_regression_gd as oswald
from iclcl_jax.accounts import meta_optimizer as dai
from iclcl_jax.accounts import online_learners as learners
from iclcl_jax.accounts import softmax_regression as li
from iclcl_jax.accounts import training_data_attention as irie
from iclcl_jax.types import Array

RATE, CONTRACTION, DECAY, MOMENTUM, RIDGE = 0.4, 0.05, 0.9, 0.5, 0.1
NUM_FEATURES = 256
NUM_PROMPTS = 8
SMALL = 0.1  # Size of logits where a softmax is nearly linear.


class Problem(NamedTuple):
  """Demonstrations and a query. Shapes `[N, d]`, `[N, 1]`, `[d]`."""

  inputs: Array
  labels: Array
  query: Array


class Statement(NamedTuple):
  """Two functions of one problem that are, or nearly are, the same.

  Attributes:
    account: key of the account.
    claim: the statement.
    left: the layer.
    right: the inner learner.
  """

  account: str
  claim: str
  left: Callable[[Problem], Array]
  right: Callable[[Problem], Array]


def _stream(problem: Problem) -> learners.Stream:
  queries = jnp.broadcast_to(problem.query, problem.inputs.shape)
  return learners.Stream(queries, problem.inputs, problem.labels)


def _constructed(problem: Problem) -> Array:
  size, d_x = problem.inputs.shape
  layer = oswald.construct(RATE, size, d_x=d_x, dtype=problem.query.dtype)
  layers = oswald.repeat(layer, 3)
  return oswald.predict(layers, oswald.make_tokens(*problem))


def _descended(problem: Problem) -> Array:
  rates = jnp.full(3, RATE, problem.query.dtype)
  weights = oswald.descend(problem.inputs, problem.labels, rates)
  return weights @ problem.query


def _constructed_plus_plus(problem: Problem) -> Array:
  size, d_x = problem.inputs.shape
  layer = oswald.construct_plus_plus(
    RATE, CONTRACTION, size, d_x=d_x, dtype=problem.query.dtype
  )
  layers = oswald.repeat(layer, 3)
  return oswald.predict(layers, oswald.make_tokens(*problem))


def _descended_plus_plus(problem: Problem) -> Array:
  ones = jnp.ones(3, problem.query.dtype)
  return oswald.descend_plus_plus(*problem, RATE * ones, CONTRACTION * ones)


def _softmax(problem: Problem) -> Array:
  return attention.softmax_attention(
    problem.query, problem.inputs, problem.labels
  )


def _dual(phi, problem: Problem) -> Array:
  """The dual model after one contrastive step by `jax.grad`."""
  inputs, labels, query = problem
  state = dual.zero_shot(phi, inputs[:0], labels[:0])
  state = dual.one_step_autodiff(phi, state, inputs, labels)
  return dual.predict(phi, state, query)


def _random_features(problem: Problem) -> features.PositiveFeatures:
  """The same directions every time, as a constant: no program draws them."""
  shape = NUM_FEATURES, problem.query.shape[0]
  directions = np.random.default_rng(0).normal(size=shape)
  return features.PositiveFeatures(jnp.asarray(directions, jnp.float64))


def _random_feature_attention(problem: Problem) -> Array:
  return attention.kernel_attention(
    _random_features(problem), problem.query, problem.inputs, problem.labels
  )


def _linear_attention(problem: Problem) -> Array:
  return attention.linear_attention(
    features.IdentityFeatures(), problem.query, problem.inputs, problem.labels
  )


def _updated(problem: Problem) -> Array:
  """Zero-shot weights of the last two tokens, plus the demonstrations'."""
  inputs, labels, query = problem
  zero_shot = dai.weight_update(inputs[-2:], labels[-2:])
  update = jnp.sum(dai.meta_gradients(inputs[:-2], labels[:-2]), axis=0)
  return (zero_shot + update) @ query


def _with_query(problem: Problem) -> tuple[Array, Array]:
  keys = jnp.concatenate([problem.inputs, problem.query[None]])
  return keys, jnp.pad(problem.labels, [(0, 1), (0, 0)])


def _momentum_attention(problem: Problem) -> Array:
  keys, values = _with_query(problem)
  return dai.momentum_attention(keys, keys, values, decay=DECAY)[-1]


def _momentum_sum(problem: Problem) -> Array:
  keys, values = _with_query(problem)
  past = dai.momentum_matrix(len(keys), DECAY)[-1] @ values
  return attention.softmax_attention(problem.query, keys, values) + past


def _softmax_regression(problem: Problem) -> Array:
  size = jnp.asarray([len(problem.inputs)])
  gates = [jnp.asarray(RATE, problem.query.dtype) / len(problem.inputs)]
  return memories.softmax_regression(_stream(problem), gates, size)[0]


def _softmax_regression_step(problem: Problem) -> Array:
  posed = li.Problem(problem.inputs, jax.nn.softmax(problem.labels[:, 0]))
  start = jnp.zeros_like(problem.query)
  weights = start - RATE * jax.grad(li.loss, argnums=1)(posed, start)
  return (weights @ problem.query)[None]


def _train_by_sgd(problem: Problem):
  """One epoch of SGD on the squared loss, with the error signals."""

  def step(weights, pair):
    x, y = pair
    signal = jax.grad(lambda out: jnp.sum((out - y) ** 2) / 2)(weights @ x)
    return weights - RATE * signal[:, None] * x[None], signal

  shape = problem.labels.shape[1], problem.inputs.shape[1]
  start = jnp.zeros(shape, problem.query.dtype)
  return jax.lax.scan(step, start, (problem.inputs, problem.labels))


def _recalled(problem: Problem) -> Array:
  weights, signals = _train_by_sgd(problem)
  history = irie.History(problem.inputs[:, None], signals[:, None])
  left = irie.remains(len(signals), learning_rate=RATE)
  return irie.recall(jnp.zeros_like(weights), history, left, problem.query)


def _learner(fn, options, problem: Problem) -> Array:
  return fn(_stream(problem), **options)[-1]


def _momentum_weights(problem: Problem) -> Array:
  weights = learners.momentum_attention_weights(len(problem.inputs), MOMENTUM)
  return (weights[-1] * (problem.inputs @ problem.query)) @ problem.labels


def _pair(fn, other, options, other_options):
  def left(problem):
    return _learner(fn, options, problem)

  def right(problem):
    return _learner(other, other_options, problem)

  return left, right


_SQUARED = {'loss': losses.squared}
_BETA = {'rates': RATE}
_GATED = {'rates': RATE, 'decays': DECAY}
_DESCEND = learners.descend
IDENTITIES = (
  Statement(
    'Ren & Liu',
    'softmax attention = one contrastive step of the dual model',
    _softmax,
    lambda p: _dual(kernels.ExponentialKernel(), p),
  ),
  Statement(
    'Ren & Liu',
    'random-feature attention = one contrastive step of the dual model',
    _random_feature_attention,
    lambda p: _dual(_random_features(p), p),
  ),
  Statement(
    'von Oswald et al.',
    '3 constructed linear layers = 3 steps of gradient descent',
    _constructed,
    _descended,
  ),
  Statement(
    'von Oswald et al.',
    '3 constructed layers = 3 steps of GD++',
    _constructed_plus_plus,
    _descended_plus_plus,
  ),
  Statement(
    'Dai et al.',
    'linear attention = zero-shot weights + update by the demonstrations',
    _linear_attention,
    _updated,
  ),
  Statement(
    'Dai et al.',
    'momentum attention = softmax attention + decayed sum of past values',
    _momentum_attention,
    _momentum_sum,
  ),
  Statement(
    'Li et al.',
    'linear attention over words = first step of softmax regression',
    _softmax_regression,
    _softmax_regression_step,
  ),
  Statement(
    'Irie et al.',
    'attention over the training history = linear model trained by SGD',
    _recalled,
    lambda p: _train_by_sgd(p)[0] @ p.query,
  ),
  Statement(
    'Irie et al.',
    'attention over the training history = delta rule on the demonstrations',
    _recalled,
    lambda p: _learner(learners.delta_recurrence, _BETA, p),
  ),
  Statement(
    'online learners',
    'decay = decay, then a contrastive step',
    *_pair(
      learners.linear_recurrence,
      _DESCEND,
      {'decays': DECAY},
      {'decays': DECAY},
    ),
  ),
  Statement(
    'online learners',
    'delta rule = a step on the squared loss',
    *_pair(learners.delta_recurrence, _DESCEND, _BETA, _BETA | _SQUARED),
  ),
  Statement(
    'online learners',
    'gated delta rule = decay, then a step on the squared loss',
    *_pair(learners.delta_recurrence, _DESCEND, _GATED, _GATED | _SQUARED),
  ),
  Statement(
    'online learners',
    'geometric weights on past tokens = contrastive steps with heavy ball',
    _momentum_weights,
    lambda p: _learner(_DESCEND, {'momentum': MOMENTUM}, p),
  ),
  Statement(
    'online learners',
    'rank-one updates (mesa) = ridge regression',
    *_pair(
      learners.recursive_least_squares,
      learners.least_squares,
      {'ridge': RIDGE},
      {'ridge': RIDGE},
    ),
  ),
  Statement(
    'online learners',
    'softmax attention = running SGD of the query',
    _softmax,
    lambda p: learners.softmax_recurrence(p.query, p.inputs, p.labels),
  ),
)

# Names of accounts, in order.
ACCOUNTS = tuple(dict.fromkeys(row.account for row in IDENTITIES))


def _two_heads(problem: Problem) -> Array:
  scores = SMALL * problem.inputs @ problem.query
  heads = jax.nn.softmax(scores) - jax.nn.softmax(-scores)
  return heads @ problem.labels


def _centred_step(problem: Problem) -> Array:
  scores = SMALL * li.centre(problem.inputs) @ problem.query
  return 2 / len(scores) * scores @ problem.labels


def _small_softmax_regression(problem: Problem) -> Array:
  small = problem._replace(labels=SMALL * problem.labels)
  return _softmax_regression(small)


def _centred_labels_step(problem: Problem) -> Array:
  labels = SMALL * li.centre(problem.labels) / len(problem.labels)
  rate = RATE / len(problem.labels)
  return rate * (problem.inputs @ problem.query) @ labels


APPROXIMATIONS = (
  Statement(
    'Ren & Liu',
    f'{NUM_FEATURES} random features imitate softmax attention',
    _random_feature_attention,
    _softmax,
  ),
  Statement(
    'von Oswald et al.',
    'two softmax heads, small logits = one GD step on centred inputs',
    _two_heads,
    _centred_step,
  ),
  Statement(
    'Li et al.',
    'step of softmax regression, small labels = GD step on centred labels',
    _small_softmax_regression,
    _centred_labels_step,
  ),
)


def measure(
  config: Any, prompts: Mapping[str, Any]
) -> Mapping[str, list[dict[str, Any]]]:
  """Differences of both sides over the largest answer, in float64.

  Args:
    config: settings.
    prompts: what `accounts_training.draw_all` returns.

  Returns:
    Rows for the identities, with the largest difference over prompts, and for
    the approximations, with the root mean square.
  """
  with harness.float64_on_host(), jax.default_matmul_precision('highest'):
    identities, approximations = (
      [row for row in rows if row.account in config.accounts]
      for rows in (IDENTITIES, APPROXIMATIONS)
    )

    @harness.compile_quickly
    def both(problems):
      def sides(problem):
        return [
          (statement.left(problem), statement.right(problem))
          for statement in (*identities, *approximations)
        ]

      return jax.lax.map(sides, problems)

    pairs = jax.device_get(both(_problems(config, prompts)))
  count = len(identities)
  return {
    'identities': [
      _row(statement, abs(a - b).max() / abs(b).max())
      for statement, (a, b) in zip(identities, pairs[:count], strict=True)
    ],
    'approximations': [
      _row(statement, ((a - b) ** 2).mean() ** 0.5 / (b**2).mean() ** 0.5)
      for statement, (a, b) in zip(approximations, pairs[count:], strict=True)
    ],
  }


def _row(statement: Statement, difference) -> dict[str, Any]:
  return {
    'account': statement.account,
    'statement': statement.claim,
    'difference': float(difference),
  }


def _problems(config: Any, prompts: Mapping[str, Any]) -> Problem:
  """A few of the test prompts, in float64. Leading axis of prompts."""
  tokens = np.asarray(prompts['testing'].tokens[0, :NUM_PROMPTS], np.float64)
  width, size = config.d_x, config.num_demonstrations
  parts = (
    tokens[:, :size, :width],
    tokens[:, :size, width:],
    tokens[:, -1, :width],
  )
  return Problem(*(jnp.asarray(part, jnp.float64) for part in parts))
