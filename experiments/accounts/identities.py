"""Is each layer, as published, the inner learner that it is said to be?

On the same demonstrations, in float64: on the left a layer, on the right its
inner learner, found by `jax.grad` or by an exact solve wherever a definition of
that kind exists. A few statements hold only nearly, and are measured as such.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.accounts import layers
from iclcl_jax import attention, dual, features, kernels, losses
from iclcl_jax.accounts import linear_regression_gd as oswald
from iclcl_jax.accounts import meta_optimizer as dai
from iclcl_jax.accounts import online_learners as learners
from iclcl_jax.accounts import softmax_regression as li
from iclcl_jax.accounts import training_data_attention as irie
from iclcl_jax.types import Array

if TYPE_CHECKING:
  from experiments.accounts import Config

EXACT = 1e-12
RATE, CONTRACTION, DECAY, MOMENTUM, RIDGE = 0.4, 0.05, 0.9, 0.5, 0.1
NUM_FEATURES = 256
NUM_PROMPTS = 8
SMALL = 0.1  # Size of logits where a softmax is nearly linear.


class Problem(NamedTuple):
  """Demonstrations and a query. Shapes `[N, d]`, `[N, 1]`, `[d]`."""

  inputs: Array
  labels: Array
  query: Array

  @property
  def size(self) -> int:
    return len(self.inputs)

  @property
  def stream(self) -> learners.Stream:
    """The demonstrations, each with the query."""
    queries = jnp.broadcast_to(self.query, self.inputs.shape)
    return learners.Stream(queries, self.inputs, self.labels)


class Statement(NamedTuple):
  """Two sides that are, or nearly are, the same.

  Attributes:
    account: key of the account.
    claim: the statement.
    sides: problem to the answers of the layer and of the inner learner.
    exact: whether they are the same.
  """

  account: str
  claim: str
  sides: Callable[[Problem], tuple[Array, Array]]
  exact: bool


STATEMENTS: list[Statement] = []


def _states(account: str, claim: str, *, exact: bool = True):
  """Registers a function that computes both sides of a statement."""

  def register(sides):
    STATEMENTS.append(Statement(account, claim, sides, exact))
    return sides

  return register


def _softmax(problem: Problem) -> Array:
  return attention.softmax_attention(
    problem.query, problem.inputs, problem.labels
  )


def _random_features(problem: Problem) -> features.PositiveFeatures:
  """The same directions every time, as a constant: no program draws them."""
  shape = NUM_FEATURES, problem.query.shape[0]
  directions = np.random.default_rng(0).normal(size=shape)
  return features.PositiveFeatures(jnp.asarray(directions, jnp.float64))


def _random_feature_attention(problem: Problem) -> Array:
  return attention.kernel_attention(
    _random_features(problem), problem.query, problem.inputs, problem.labels
  )


def _contrastive_step(phi, problem: Problem) -> Array:
  """The dual model after one contrastive step by `jax.grad`."""
  inputs, labels, query = problem
  state = dual.zero_shot(phi, inputs[:0], labels[:0])
  state = dual.one_step_autodiff(phi, state, inputs, labels)
  return dual.predict(phi, state, query)


@_states(
  'Ren & Liu', 'softmax attention = one contrastive step of the dual model'
)
def _(p: Problem):
  return _softmax(p), _contrastive_step(kernels.ExponentialKernel(), p)


@_states(
  'Ren & Liu',
  'random-feature attention = one contrastive step of the dual model',
)
def _(p: Problem):
  return _random_feature_attention(p), _contrastive_step(_random_features(p), p)


@_states(
  'von Oswald et al.',
  '3 constructed linear layers = 3 steps of gradient descent',
)
def _(p: Problem):
  layer = oswald.construct(
    RATE, p.size, d_x=p.query.shape[0], dtype=p.query.dtype
  )
  layers = oswald.repeat(layer, 3)
  weights = oswald.descend(p.inputs, p.labels, jnp.full(3, RATE))
  return oswald.predict(layers, oswald.make_tokens(*p)), weights @ p.query


@_states('von Oswald et al.', '3 constructed layers = 3 steps of GD++')
def _(p: Problem):
  layer = oswald.construct_plus_plus(
    RATE, CONTRACTION, p.size, d_x=p.query.shape[0], dtype=p.query.dtype
  )
  layers = oswald.repeat(layer, 3)
  factors = jnp.full(3, RATE), jnp.full(3, CONTRACTION)
  return (
    oswald.predict(layers, oswald.make_tokens(*p)),
    oswald.descend_plus_plus(*p, *factors),
  )


@_states(
  'Dai et al.',
  'linear attention = zero-shot weights + update by the demonstrations',
)
def _(p: Problem):
  inputs, labels, query = p  # The last two tokens are no demonstrations.
  zero_shot = dai.weight_update(inputs[-2:], labels[-2:])
  update = jnp.sum(dai.meta_gradients(inputs[:-2], labels[:-2]), axis=0)
  linear = attention.linear_attention(
    features.IdentityFeatures(), query, inputs, labels
  )
  return linear, (zero_shot + update) @ query


@_states(
  'Dai et al.',
  'momentum attention = softmax attention + decayed sum of past values',
)
def _(p: Problem):
  keys = jnp.concatenate([p.inputs, p.query[None]])
  values = jnp.pad(p.labels, [(0, 1), (0, 0)])
  past = dai.momentum_matrix(len(keys), DECAY)[-1] @ values
  return (
    dai.momentum_attention(keys, keys, values, decay=DECAY)[-1],
    attention.softmax_attention(p.query, keys, values) + past,
  )


def _softmax_regression(p: Problem) -> Array:
  gates = [jnp.asarray(RATE, p.query.dtype) / p.size]
  return layers.softmax_regression(p.stream, gates, jnp.asarray([p.size]))[0]


@_states(
  'Li et al.', 'linear attention over words = first step of softmax regression'
)
def _(p: Problem):
  posed = li.Problem(p.inputs, jax.nn.softmax(p.labels[:, 0]))
  slope = jax.grad(li.loss, argnums=1)(posed, jnp.zeros_like(p.query))
  return _softmax_regression(p), (-RATE * slope @ p.query)[None]


def _train_by_sgd(p: Problem):
  """One epoch of SGD on the squared loss, with the error signals."""

  def step(weights, pair):
    x, y = pair
    signal = jax.grad(lambda out: jnp.sum((out - y) ** 2) / 2)(weights @ x)
    return weights - RATE * signal[:, None] * x[None], signal

  start = jnp.zeros((p.labels.shape[1], p.inputs.shape[1]), p.query.dtype)
  return jax.lax.scan(step, start, (p.inputs, p.labels))


def _recalled(p: Problem) -> Array:
  weights, signals = _train_by_sgd(p)
  history = irie.History(p.inputs[:, None], signals[:, None])
  left = irie.remains(len(signals), learning_rate=RATE)
  return irie.recall(jnp.zeros_like(weights), history, left, p.query)


@_states(
  'Irie et al.',
  'attention over the training history = linear model trained by SGD',
)
def _(p: Problem):
  return _recalled(p), _train_by_sgd(p)[0] @ p.query


@_states(
  'Irie et al.',
  'attention over the training history = delta rule on the demonstrations',
)
def _(p: Problem):
  return _recalled(p), learners.delta_recurrence(p.stream, rates=RATE)[-1]


@_states('online learners', 'decay = decay, then a contrastive step')
def _(p: Problem):
  return (
    learners.linear_recurrence(p.stream, decays=DECAY)[-1],
    learners.descend(p.stream, decays=DECAY)[-1],
  )


def _squared_step(p: Problem, **gates: Any) -> Array:
  return learners.descend(p.stream, loss=losses.squared, rates=RATE, **gates)[
    -1
  ]


@_states('online learners', 'delta rule = a step on the squared loss')
def _(p: Problem):
  delta = learners.delta_recurrence(p.stream, rates=RATE)[-1]
  return delta, _squared_step(p)


@_states(
  'online learners', 'gated delta rule = decay, then a step on the squared loss'
)
def _(p: Problem):
  delta = learners.delta_recurrence(p.stream, rates=RATE, decays=DECAY)[-1]
  return delta, _squared_step(p, decays=DECAY)


@_states(
  'online learners',
  'geometric weights on past tokens = contrastive steps with heavy ball',
)
def _(p: Problem):
  weights = learners.momentum_attention_weights(p.size, MOMENTUM)[-1]
  return (
    (weights * (p.inputs @ p.query)) @ p.labels,
    learners.descend(p.stream, momentum=MOMENTUM)[-1],
  )


@_states('online learners', 'rank-one updates (mesa) = ridge regression')
def _(p: Problem):
  return (
    learners.recursive_least_squares(p.stream, ridge=RIDGE)[-1],
    learners.least_squares(p.stream, ridge=RIDGE)[-1],
  )


@_states('online learners', 'softmax attention = running SGD of the query')
def _(p: Problem):
  running = learners.softmax_recurrence(p.query, p.inputs, p.labels)
  return _softmax(p), running


@_states(
  'Ren & Liu',
  f'{NUM_FEATURES} random features imitate softmax attention',
  exact=False,
)
def _(p: Problem):
  return _random_feature_attention(p), _softmax(p)


@_states(
  'von Oswald et al.',
  'two softmax heads, small logits = one GD step on centred inputs',
  exact=False,
)
def _(p: Problem):
  scores = SMALL * p.inputs @ p.query
  heads = jax.nn.softmax(scores) - jax.nn.softmax(-scores)
  centred = SMALL * li.centre(p.inputs) @ p.query
  return heads @ p.labels, 2 / p.size * centred @ p.labels


@_states(
  'Li et al.',
  'step of softmax regression, small labels = GD step on centred labels',
  exact=False,
)
def _(p: Problem):
  small = p._replace(labels=SMALL * p.labels)
  labels = SMALL * li.centre(p.labels) / p.size
  step = RATE / p.size * (p.inputs @ p.query) @ labels
  return _softmax_regression(small), step


# Names of accounts, in order.
ACCOUNTS = tuple(dict.fromkeys(row.account for row in STATEMENTS))


class Measured(NamedTuple):
  """A statement with the difference of both sides over the right one.

  The largest difference over the largest answer of an identity, the root mean
  squares of an approximation.
  """

  statement: Statement
  difference: float


@lab.float64_on_host()
@jax.default_matmul_precision('highest')
def measure(config: 'Config') -> list[Measured]:
  """Computes both sides on a few of the test prompts, identities first."""
  statements = sorted(
    (row for row in STATEMENTS if row.account in config.accounts),
    key=lambda row: not row.exact,
  )

  @lab.compile_quickly
  def both(problems):
    return jax.lax.map(lambda p: [row.sides(p) for row in statements], problems)

  return [
    Measured(
      row,
      float(
        np.max(np.abs(a - b)) / np.max(np.abs(b))
        if row.exact
        else (np.mean((a - b) ** 2) / np.mean(b**2)) ** 0.5
      ),
    )
    for row, (a, b) in zip(
      statements, jax.device_get(both(_problems(config))), strict=True
    )
  ]


def _problems(config: 'Config') -> Problem:
  """A few of the test prompts, in float64. Leading axis of prompts."""
  prompts = layers.draw_all(config).testing.tokens[0, :NUM_PROMPTS]
  tokens = np.asarray(prompts, np.float64)
  width, size = config.d_x, config.num_demonstrations
  context, query = tokens[:, :size], tokens[:, -1]
  parts = context[..., :width], context[..., width:], query[:, :width]
  return Problem(*map(jnp.asarray, parts))


def claims(config: 'Config', results: list[Measured]) -> list[lab.Claim]:
  exact = [row for row in results if row.statement.exact]
  rows = []
  for account in ACCOUNTS:
    own = [row for row in exact if row.statement.account == account]
    if own:
      rows.append(
        lab.Claim(
          id=f'accounts-identities-{account.replace(" ", "-")}',
          source=account,
          claim='; '.join(row.statement.claim for row in own),
          statistic='largest difference of both sides over the largest answer, '
          f'float64; at most {EXACT:g}',
          estimate=lab.exactly(max(row.difference for row in own)),
          at_most=EXACT,
        )
      )
  return rows


def _rows(results: list[Measured]) -> list[dict[str, Any]]:
  kinds = {
    True: ('identity', 'largest relative difference, float64'),
    False: ('approximation', 'relative root mean square'),
  }
  return [
    {
      'account': statement.account,
      'statement': statement.claim,
      'difference': difference,
      'kind': kinds[statement.exact][0],
      'unit': kinds[statement.exact][1],
    }
    for statement, difference in results
  ]


def summary(config: 'Config', results: list[Measured]) -> dict[str, Any]:
  return {'statements': _rows(results)}


def tables(config: 'Config', results: list[Measured]) -> dict[str, Any]:
  return {'statements': _rows(results)}


PART = lab.Part(measure, claims, summary=summary, tables=tables)
