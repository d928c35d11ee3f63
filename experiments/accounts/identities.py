"""Is each layer, as published, the inner learner that it is said to be?

On the same demonstrations, in float64: first the layer, then its inner learner,
found by `jax.grad` or by an exact solve wherever a definition of that kind
exists. A few statements hold only nearly, and are measured as such.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.accounts import layers
from experiments.lab import Config
from iclcl_jax import attention, dual, features, kernels, losses
from iclcl_jax.accounts import (
  linear_regression_gd as oswald,
  meta_optimizer as dai,
  online_learners as learners,
  softmax_regression as li,
  training_data_attention as irie,
)
from iclcl_jax.types import Array

EXACT = 1e-12
RATE, CONTRACTION, DECAY, MOMENTUM, RIDGE = 0.4, 0.05, 0.9, 0.5, 0.1
EXACT_UNIT = 'largest relative difference, float64'
NEAR_UNIT = 'relative root mean square'
NUM_FEATURES = 256
NUM_PROMPTS = 8
SMALL = 0.1  # Size of logits where a softmax is nearly linear.

Sides: TypeAlias = Mapping[str, tuple[Array, Array]]  # Of each statement.
SUM = 'the SUM of zero-shot part and demonstrations imitates softmax attention'
# Those that hold nearly.
NEARLY = 'imitate', 'small logits', 'small labels'


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


def _softmax(p: Problem) -> Array:
  return attention.softmax_attention(p.query, p.inputs, p.labels)


def _random_features(p: Problem) -> features.PositiveFeatures:
  """The same directions every time, as a constant: no program draws them."""
  shape = NUM_FEATURES, p.query.shape[0]
  directions = np.random.default_rng(0).normal(size=shape)
  return features.PositiveFeatures(jnp.asarray(directions, jnp.float64))


def _random_feature_attention(p: Problem) -> Array:
  phi = _random_features(p)
  return attention.kernel_attention(phi, p.query, p.inputs, p.labels)


def _ren(p: Problem) -> Sides:
  def contrastive_step(phi):
    state = dual.empty(phi, p.inputs, p.labels)
    state = dual.one_step_autodiff(phi, state, p.inputs, p.labels)
    return dual.predict(phi, state, p.query)

  return {
    'softmax attention = one contrastive step of the dual model': (
      _softmax(p),
      contrastive_step(kernels.ExponentialKernel()),
    ),
    'random-feature attention = one contrastive step of the dual model': (
      _random_feature_attention(p),
      contrastive_step(_random_features(p)),
    ),
    f'{NUM_FEATURES} random features imitate softmax attention': (
      _random_feature_attention(p),
      _softmax(p),
    ),
  }


def _oswald(p: Problem) -> Sides:
  start = jnp.zeros_like(p.query[None])
  initial = jnp.asarray(np.random.default_rng(0).normal(size=start.shape))
  plain, moved, plus_plus = (
    oswald.construct(RATE, p.size, first, contraction=x)
    for first, x in ((start, 0.0), (initial, 0.0), (start, CONTRACTION))
  )
  rates, contractions = jnp.full(3, RATE), jnp.full(3, CONTRACTION)
  scores = SMALL * p.inputs @ p.query
  heads = jax.nn.softmax(scores) - jax.nn.softmax(-scores)
  centred = SMALL * li.centre(p.inputs) @ p.query
  tokens = oswald.make_tokens(*p)
  # Inputs and labels that come as separate tokens, copied side by side.
  length = 2 * p.size + 1
  separate = oswald.make_alternating_tokens(*p, jnp.eye(length))
  copied = oswald.attend(
    oswald.construct_copy(p.size, d_x=len(p.query), dtype=p.query.dtype),
    separate,
    weights_fn=oswald.softmax_weights,
    visible=jnp.ones((length, length), bool),
  )

  def network(x):
    return jnp.concatenate([jnp.sin(x), jnp.tanh(x), x**2])

  features_of = jax.vmap(network)(p.inputs), p.labels, network(p.query)
  on_features = oswald.construct(
    RATE, p.size, jnp.zeros((1, len(features_of[2])), p.query.dtype)
  )
  return {
    '3 constructed linear layers = 3 steps of gradient descent from any W_0': (
      oswald.predict(
        oswald.repeat(moved, 3), oswald.make_tokens(*p, initial=initial)
      ),
      oswald.descend(p.inputs, p.labels, rates, initial=initial) @ p.query,
    ),
    'a copy layer, then 3 linear ones = these steps on separate tokens': (
      oswald.predict(oswald.repeat(oswald.widen(plain, length), 3), copied),
      oswald.descend(p.inputs, p.labels, rates) @ p.query,
    ),
    'a linear layer on features = a step of kernel regression': (
      oswald.predict(
        oswald.repeat(on_features, 1), oswald.make_tokens(*features_of)
      ),
      RATE / p.size * features_of[0] @ features_of[2] @ p.labels,
    ),
    '3 constructed layers = 3 steps of GD++': (
      oswald.predict(oswald.repeat(plus_plus, 3), tokens),
      oswald.descend_plus_plus(*p, rates, contractions),
    ),
    'two softmax heads, small logits = one GD step on centred inputs': (
      heads @ p.labels,
      2 / p.size * centred @ p.labels,
    ),
  }


def _dai(p: Problem) -> Sides:
  # Of the first statement, the last two tokens are no demonstrations.
  zero_shot = dai.weight_update(p.inputs[-2:], p.labels[-2:])
  update = dai.weight_update(p.inputs[:-2], p.labels[:-2])
  keys = jnp.concatenate([p.inputs, p.query[None]])
  values = jnp.pad(p.labels, [(0, 1), (0, 0)])
  ages = jnp.arange(len(keys) - 1, 0, -1).astype(values.dtype)
  past = DECAY**ages @ values[:-1]
  rng, own = np.random.default_rng(0), p.inputs[-2:]
  head, changes = (
    dai.Head(*(jnp.asarray(rng.normal(size=(len(p.query), n))) for n in shape))
    for shape in [(len(p.query), 1)] * 2
  )
  tuned = dai.Head(*map(jnp.add, head, changes))
  before, after = (
    dai.weight_update(own @ x.keys, own @ x.values) @ p.query
    for x in (head, tuned)
  )
  mix = dai.softmax_mix(p.query, p.inputs, p.labels, num_query_tokens=2)
  return {
    'linear attention = zero-shot weights + update by the demonstrations': (
      attention.linear_attention(
        features.IdentityFeatures(), p.query, p.inputs, p.labels
      ),
      (zero_shot + update) @ p.query,
    ),
    'finetuned keys and values = zero-shot weights + an update': (
      after,
      before + dai.finetuned_update(own, head, changes) @ p.query,
    ),
    'softmax attention = convex mix of zero-shot part and demonstrations': (
      _softmax(p),
      (1 - mix.share) * mix.zero_shot + mix.share * mix.demonstrations,
    ),
    SUM: (mix.zero_shot + mix.demonstrations, _softmax(p)),
    'momentum attention = softmax attention + decayed sum of past values': (
      dai.momentum_attention(keys, keys, values, decay=DECAY)[-1],
      attention.softmax_attention(p.query, keys, values) + past,
    ),
  }


def _softmax_regression(p: Problem) -> Array:
  gates = [jnp.asarray(RATE, p.query.dtype) / p.size]
  return layers.softmax_regression(p.stream, gates, jnp.asarray(p.size))


def _li(p: Problem) -> Sides:
  posed = li.Problem(p.inputs, jax.nn.softmax(p.labels[:, 0]))
  slope = jax.grad(li.loss, argnums=1)(posed, jnp.zeros_like(p.query))
  labels = SMALL * li.centre(p.labels) / p.size
  old, new = jnp.zeros_like(p.query), -RATE * p.size * slope
  before, after = (li.predict(p.inputs, x) for x in (old, new))
  shifted = li.shifted_target(posed.target, before, after)
  moved = li.smallest_data_shift(p.inputs, old + new / 2, new)
  curvature = jax.hessian(li.loss, argnums=1)
  return {
    'the Hessian in closed form = that of autodiff': (
      li.hessian(posed, new) @ p.query,
      curvature(posed, new) @ p.query,
    ),
    'a shift of the weights = a shift of the target': (
      after - posed.target,
      before - shifted,
    ),
    'a shift of the weights = a rank-one shift of the document': (
      li.predict(moved, old + new / 2),
      after,
    ),
    'linear attention over words = first step of softmax regression': (
      _softmax_regression(p),
      (-RATE * slope @ p.query)[None],
    ),
    'step of softmax regression, small labels = GD step on centred labels': (
      _softmax_regression(p._replace(labels=SMALL * p.labels)),
      RATE / p.size * (p.inputs @ p.query) @ labels,
    ),
  }


def _irie(p: Problem) -> Sides:
  def step(weights, pair):
    x, y = pair
    signal = jax.grad(lambda out: jnp.sum((out - y) ** 2) / 2)(weights @ x)
    return weights - RATE * signal[:, None] * x[None], signal

  # One epoch of SGD on the squared loss, with the error signals.
  start = jnp.zeros((p.labels.shape[1], p.inputs.shape[1]), p.query.dtype)
  weights, signals = jax.lax.scan(step, start, (p.inputs, p.labels))
  history = irie.History(p.inputs[:, None], signals[:, None])
  left = irie.remains(len(signals), learning_rate=RATE)
  recalled = irie.recall(start, history, left, p.query)
  return {
    'attention over the training history = linear model trained by SGD': (
      recalled,
      weights @ p.query,
    ),
    'attention over the training history = delta rule on the demonstrations': (
      recalled,
      learners.delta_recurrence(p.stream, rates=RATE)[-1],
    ),
  }


def _learners(p: Problem) -> Sides:
  def every(fn, **options):
    return fn(p.stream, **options)

  drawn = jnp.asarray(np.random.default_rng(0).uniform(0.2, 1, (2, p.size)))
  decays, rates = {'decays': drawn[0]}, {'rates': drawn[1]}
  features = {'decays': drawn[0][:, None] ** p.query[None] ** 2}
  chunked = {'chunk_size': max(p.size // 2, 1)}
  descend, delta = learners.descend, learners.delta_recurrence
  recur, squared = learners.linear_recurrence, {'loss': losses.squared}
  weights = learners.momentum_attention_weights(p.size, MOMENTUM)
  return {
    'linear attention in chunks = contrastive steps': (
      every(recur, **chunked),
      every(descend),
    ),
    'decay = decay, then a contrastive step': (
      every(recur, **decays, **chunked),
      every(descend, **decays),
    ),
    'decay of each feature = such decay, then a contrastive step': (
      every(recur, **features),
      every(descend, **features),
    ),
    'delta rule = a step on the squared loss': (
      every(delta, **rates),
      every(descend, **squared, **rates),
    ),
    'gated delta rule, in chunks = decay, then a step on the squared loss': (
      every(delta, **rates, **decays, **chunked),
      every(descend, **squared, **rates, **decays),
    ),
    'geometric weights on past tokens = contrastive steps with heavy ball': (
      (weights * (p.inputs @ p.query)[None]) @ p.labels,
      every(descend, momentum=MOMENTUM),
    ),
    'rank-one updates (mesa) = ridge regression': (
      every(learners.recursive_least_squares, ridge=RIDGE),
      every(learners.least_squares, ridge=RIDGE),
    ),
    'softmax attention = running SGD of the query': (
      _softmax(p),
      learners.softmax_recurrence(p.query, p.inputs, p.labels),
    ),
  }


IDENTITIES: Mapping[str, Callable[[Problem], Sides]] = {
  'Ren & Liu': _ren,
  'von Oswald et al.': _oswald,
  'Dai et al.': _dai,
  'Li et al.': _li,
  'Irie et al.': _irie,
  'online learners': _learners,
}


class Statement(NamedTuple):
  account: str
  statement: str
  difference: float


class Results(NamedTuple):
  """Differences of both sides over the right one."""

  identities: list[Statement]  # Largest difference over the largest answer.
  approximations: list[Statement]  # Root mean squares.


@lab.float64_on_host()
def measure(config: Config) -> Results:
  chosen = {x: fn for x, fn in IDENTITIES.items() if x in config.accounts}

  def answers(*problem):
    p = Problem(*problem)
    # Ordered: `jit` returns the keys of a plain dict sorted.
    return OrderedDict((x, OrderedDict(fn(p))) for x, fn in chosen.items())

  # A few of the test prompts.
  prompts = layers.draw_all(config).testing.tokens[0, :NUM_PROMPTS]
  tokens = np.asarray(prompts, np.float64)
  width, size = config.d_x, config.num_demonstrations
  context, query = tokens[:, :size], tokens[:, -1]
  parts = context[..., :width], context[..., width:], query[:, :width]
  exact, near = [], []
  for account, rows in lab.compute_each(answers, *parts).items():
    for statement, (a, b) in rows.items():
      if any(word in statement for word in NEARLY):
        apart = (np.mean((a - b) ** 2) / np.mean(b**2)) ** 0.5
        near.append(Statement(account, statement, float(apart)))
      else:
        apart = np.max(np.abs(a - b)) / np.max(np.abs(b))
        exact.append(Statement(account, statement, float(apart)))
  return Results(exact, near)


def claims(config: Config, results: Results) -> lab.Claims:
  for account in dict.fromkeys(row.account for row in results.identities):
    own = [row for row in results.identities if row.account == account]
    name, said = account.replace(' ', '-'), '; '.join(x.statement for x in own)
    largest = max(row.difference for row in own)
    yield from lab.statements(
      'accounts-identities-',
      f"""{name} [{account}] {said} | largest difference of both sides over the
      largest answer, float64""",
      {name: lab.at_most(EXACT, largest)},
    )
  for row in results.approximations:
    if row.statement == SUM:
      yield from lab.statements(
        'accounts-identities-',
        f"""sum [{row.account}, with the softmax] softmax attention is the SUM
        of zero-shot part and demonstrations | {NEAR_UNIT}""",
        {'sum': lab.at_most(EXACT, row.difference)},
      )


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'statements': [
      row._asdict() | {'kind': kind, 'unit': unit}
      for rows, kind, unit in (
        (results.identities, 'identity', EXACT_UNIT),
        (results.approximations, 'approximation', NEAR_UNIT),
      )
      for row in rows
    ]
  }


tables = summary
