"""A call compiles a handful of programs, and the same call again none.

The same call: equal shapes, and functions of the same code written anew.
"""

import dataclasses
import doctest
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iclcl_jax import (
  attention,
  bounds,
  dual,
  equivalence,
  features,
  kernels,
  losses,
  modified,
  precision,
  pretrained,
  projections,
  transformer,
)
from iclcl_jax.accounts import (
  linear_regression_gd as regression,
  meta_optimizer,
  meta_optimizer_metrics as metrics,
  online_learners,
  softmax_regression,
  training_data_attention as history,
)
from iclcl_jax.pretrained import attribution, learning
from tests import examples, oracles_pretrained
from tests.test_public_functions import public_functions

COMPILED = []


def note(event, _, **__):
  if event == '/jax/core/compile/backend_compile_duration':
    COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(note)


def num_programs(call):
  """How many programs a call compiles."""
  before = len(COMPILED)
  jax.block_until_ready(call())
  return len(COMPILED) - before


def rows(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


PHI, KERNEL = features.EluPlusOneFeatures(), kernels.ExponentialKernel()
X, V, W = rows(0, 6, 4), rows(1, 6, 3), rows(2, 4)
MASK = jnp.arange(6) < 5
STATE = dual.zero_shot(PHI, X[:1], V[:1])
STREAM = online_learners.Stream(X, X, V)
PROBLEM = softmax_regression.Problem(X, jax.nn.softmax(X[:, 0]))
LAYER = regression.SelfAttention(*(rows(i, 1, 4, 4) for i in range(4)))
LAYERS = regression.repeat(LAYER, 2)
FOLDED = regression.fold(LAYER)
NETWORK = history.init_network(jax.random.key(0), (4, 5, 3))
LEFT = history.remains(2, learning_rate=0.1)
LABELS = jnp.arange(6) % 3
BATCHES = jnp.arange(6).reshape(2, 3)
HISTORY = history.History(rows(0, 2, 3, 5), rows(1, 2, 3, 2))
ARCHITECTURE, BLOCK = transformer.example()
BLOCKS = jax.tree.map(lambda p: jnp.stack([p, p]).astype(X.dtype), BLOCK)


@functools.cache
def model():
  config = oracles_pretrained.LLAMA
  tensors = oracles_pretrained.random_tensors(
    oracles_pretrained.llama_shapes(config)
  )
  return pretrained.from_checkpoint(
    pretrained.Checkpoint(config, tensors), dtype='float32'
  )


TOKENS = jnp.array([5, 0, 22, 7, 7, 13], jnp.int32)
SEGMENTS = jnp.array([0, 0, 1, 1, -1, -1], jnp.int32)


def prefilled():
  return pretrained.prefill(model(), TOKENS, cache_length=9)[1]


def read():
  return attribution.read_heads(model(), TOKENS, SEGMENTS, num_segments=2)


def own_loss():
  return losses.sum_over_demonstrations(lambda p, v: -jnp.sum(0.5 * p * v))


def attend():
  return modified.attention_from_loss(own_loss(), learning_rate=0.1)


HEAD = meta_optimizer.Head(rows(0, 4, 2), rows(1, 4, 3))
RIGHT = jnp.array([True, True, False, False, True, False])


def similarity(a, b, _):
  return metrics.kendall(a, b)


# Public functions without an example, and methods; some with their options.
CALLS = {
  'modified.InfoNCE made anew': lambda: modified.attention_from_loss(
    losses.info_nce()
  ).causal(KERNEL, X, X, V),
  'attention.softmax': lambda: attention.softmax_attention(W, X, V, mask=MASK),
  'attention.causal': lambda: attention.causal_kernel_attention(PHI, X, X, V),
  'attention.causal of a kernel': lambda: attention.causal_kernel_attention(
    KERNEL, X, X, V, chunk_size=2
  ),
  'attention.stream': lambda: attention.stream_kernel_attention(
    PHI, X, X, V, chunk_size=2
  ),
  'bounds.gap_supremum': lambda: bounds.gap_supremum(
    PHI, STATE, STATE, radius=0.5
  ),
  'dual.one_step_autodiff': lambda: dual.one_step_autodiff(
    PHI, STATE, X, V, loss=own_loss(), optimizer=optax.sgd(0.1), mask=MASK
  ),
  'dual.train': lambda: dual.train(
    PHI, STATE, X, V, num_epochs=1, batch_size=2, optimizer=optax.sgd(0.1, 0.9)
  ),
  'dual.train, observed': lambda: dual.train(
    PHI,
    STATE,
    X,
    V,
    num_epochs=1,
    batch_size=2,
    optimizer=optax.sgd(0.1),
    observe=lambda state: dual.predict(PHI, state, W),
  ),
  'dual.remove': lambda: dual.remove(
    KERNEL, dual.zero_shot(KERNEL, X, V), X[0], V[0]
  ),
  'equivalence.residuals': lambda: equivalence.residuals(KERNEL, W, X, V),
  'equivalence.verify': lambda: (
    equivalence.verify(
      PHI, W, X, V, loss=own_loss(), num_query_tokens=1
    ).attention
  ),
  'equivalence.verify of your own': lambda: (
    equivalence.verify(
      KERNEL,
      W,
      X,
      V,
      attention_fn=lambda phi, *x: attention.kernel_attention(phi, *x),
    ).attention
  ),
  'equivalence.verify_model by default': lambda: (
    equivalence.verify_model(
      ARCHITECTURE, BLOCKS, X, arithmetic=precision.PLATFORM_DEFAULT
    ).residuals
  ),
  'modified call': lambda: attend()(PHI, W, X, V),
  'modified stream': lambda: attend().stream(PHI, X, X, V),
  'modified causal': lambda: attend().causal(PHI, X, X, V, mask=MASK),
  'modified labels': lambda: attend().labels(PHI, X, V),
  'modified.negative': lambda: modified.negative(
    num_negatives=2,
    strength=0.5,
    select=modified.random_choice(jax.random.key(0)),
  ).stream(PHI, X, X, V),
  'modified.regularised': lambda: modified.regularised(strength=0.5)(
    PHI, W, X, V
  ),
  'modified.second_step': lambda: modified.second_step()(PHI, W, X, V),
  'modified.augmented': lambda: modified.augmented(
    augment_values=lambda v: 2 * v
  )(PHI, W, X, V),
  'projections.orthogonal': lambda: projections.orthogonal(
    jax.random.key(0), 6, 4
  ),
  'transformer.apply_blocks': lambda: transformer.apply_blocks(
    ARCHITECTURE, BLOCKS, X
  ),
  'transformer.apply_blocks_dual': lambda: transformer.apply_blocks_dual(
    ARCHITECTURE, BLOCKS, X
  ),
  'pretrained.embed': lambda: pretrained.embed(model(), TOKENS),
  'pretrained.hidden_states': lambda: pretrained.hidden_states(model(), TOKENS),
  'pretrained.unembed': lambda: pretrained.unembed(model(), rows(0, 6, 24)),
  'pretrained.logits': lambda: pretrained.logits(model(), TOKENS),
  'pretrained.next_token_logits': lambda: pretrained.next_token_logits(
    model(), TOKENS
  ),
  'pretrained.prefill': prefilled,
  'pretrained.decode_step': lambda: pretrained.decode_step(
    model(), prefilled(), 3
  ),
  'pretrained.generate': lambda: pretrained.generate(
    model(), TOKENS, num_tokens=3
  ),
  'attribution.read_heads': read,
  'attribution.attribute': lambda: attribution.attribute(
    model(), TOKENS, SEGMENTS, 3, 4, num_segments=2
  ),
  'attribution.direct': lambda: attribution.direct_logit_attribution(
    model(), read(), 3, 4
  ),
  'learning.logits': lambda: learning.logits(
    model(), TOKENS, learning.with_rates(SEGMENTS, jnp.ones(2))
  ),
  'learning.effect': lambda: learning.effect_on_answer(
    model(), TOKENS, learning.alone(SEGMENTS, num_segments=2), 1, 2
  ),
  'attribution.influence': lambda: attribution.influence(
    model(), TOKENS, SEGMENTS, 3, 4, num_segments=2
  ),
  'attribution.effects_of_removal': lambda: attribution.effects_of_removal(
    model(), TOKENS, SEGMENTS, 3, 4, num_segments=2
  ),
  'attribution.gradients': lambda: attribution.demonstration_gradients(
    model(), TOKENS, SEGMENTS, num_segments=2
  ),
  'meta.finetuned_update': lambda: meta_optimizer.finetuned_update(
    X, HEAD, HEAD
  ),
  'meta.momentum_attention': lambda: meta_optimizer.momentum_attention(
    X, X, V, decay=0.5
  ),
  'meta.momentum_values': lambda: meta_optimizer.momentum_values(V, decay=0.5),
  'meta.softmax_mix': lambda: meta_optimizer.softmax_mix(
    W, X, V, num_query_tokens=2
  ),
  'metrics.recovery_null': lambda: metrics.recovery_null(
    jax.random.key(0), RIGHT, ~RIGHT, RIGHT & False, num_draws=2
  ),
  'metrics.random_null': lambda: metrics.random_null(
    jax.random.key(0), similarity, X, X + 1, X - 1, num_draws=2
  ),
  'metrics.permuted_null': lambda: metrics.permuted_null(
    jax.random.key(0), similarity, X, X + 1, X - 1, num_draws=2
  ),
  **{
    f'metrics.{metric.__name__}': functools.partial(metric, *arrays)
    for metric, arrays in (
      (metrics.update_similarity, (W, W, W)),
      (metrics.normalised_update_similarity, (W, W, W)),
      (metrics.partial_update_similarity, (W, W, W)),
      (metrics.kendall, (W, W)),
    )
  },
  **{
    f'regression.{name}': call
    for name, call in {
      'attend': lambda: regression.attend(LAYER, X),
      'attend_query': lambda: regression.attend_query(LAYER, X),
      'construct': lambda: regression.construct(0.1, 5, X[:1]),
      'construct_copy': lambda: regression.construct_copy(3, d_x=2),
      'descend': lambda: regression.descend(X, V, X[0]),
      'descend_plus_plus': lambda: regression.descend_plus_plus(X, V, W, W, W),
      'predict': lambda: regression.predict(LAYERS, X),
      'interpolate': lambda: regression.interpolate(FOLDED, FOLDED, 0.5),
      'normalise': lambda: regression.normalise(FOLDED, d_x=3),
      'widen': lambda: regression.widen(LAYER, 2),
    }.items()
  },
  **{
    f'softmax_regression.{name}': call
    for name, call in {
      'hessian': lambda: softmax_regression.hessian(PROBLEM, W),
      'gradients': lambda: softmax_regression.gradients(PROBLEM, W),
      'attend': lambda: softmax_regression.attend(
        PROBLEM, X, learning_rate=0.1
      ),
      'smallest_data_shift': lambda: softmax_regression.smallest_data_shift(
        X, W, 2 * W
      ),
      'lipschitz': lambda: softmax_regression.lipschitz_in_weights(X),
    }.items()
  },
  **{
    f'online_learners.{learner.__name__}': functools.partial(
      learner, STREAM, **options
    )
    for learner, options in (
      (online_learners.descend, {'loss': lambda p, v: jnp.sum((p - v) ** 2)}),
      (online_learners.delta_recurrence, {'rates': 0.5, 'chunk_size': 4}),
      (online_learners.least_squares, {'ridge': 0.1}),
      (online_learners.linear_recurrence, {}),
      (online_learners.recursive_least_squares, {'ridge': 0.1}),
    )
  },
  'online_learners.softmax': lambda: online_learners.softmax_recurrence(
    W, X, V
  ),
  'history.train': lambda: history.train(
    NETWORK, X, LABELS, BATCHES, learning_rate=0.1
  ),
  'history.remains': lambda: history.remains(3, learning_rate=0.1),
  'history.recall': lambda: history.recall(
    rows(3, 2, 5), HISTORY, LEFT, rows(4, 5)
  ),
  'history.attribute': lambda: history.attribute(
    HISTORY, LEFT, rows(4, 5), rows(5, 2)
  ),
}


@pytest.mark.parametrize('name', CALLS)
def test_the_second_call_compiles_nothing(name):
  jax.block_until_ready(CALLS[name]())
  assert num_programs(CALLS[name]) == 0


def run_examples(function):
  """Runs the examples of a docstring."""
  module = inspect.getmodule(function)
  finder = doctest.DocTestFinder(recurse=False)
  for test in finder.find(function, globs=vars(module) | examples.NAMES):
    doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None)


# Flax compiles what it converts, and an eager shard_map every operation.
OF_OTHERS = {'layers.as_nnx', 'dual.all_merge', 'dual.prefix_merge'}
EXAMPLES = {
  name: function
  for function, name in public_functions().items()
  if '>>>' in (function.__doc__ or '') and name not in OF_OTHERS
}


@pytest.mark.parametrize('name', EXAMPLES)
def test_the_examples_of_a_function_compile_once(name):
  run_examples(EXAMPLES[name])
  assert num_programs(lambda: run_examples(EXAMPLES[name])) == 0


# Settings that another call of the same program has.
OTHERS = {
  'learning rate': (
    lambda: dual.one_step(PHI, STATE, X, V, learning_rate=0.1),
    lambda: dual.one_step(PHI, STATE, X, V, learning_rate=0.2),
  ),
  'label': (
    lambda: attribution.influence(
      model(), TOKENS, SEGMENTS, 3, 4, num_segments=2
    ),
    lambda: attribution.influence(
      model(), TOKENS, SEGMENTS, 5, 6, num_segments=2
    ),
  ),
  'strength': (
    lambda: modified.regularised(strength=0.5)(PHI, W, X, V),
    lambda: modified.regularised(strength=0.25)(PHI, W, X, V),
  ),
  'radius': (
    lambda: bounds.gap_supremum(PHI, STATE, STATE, radius=0.5),
    lambda: bounds.gap_supremum(PHI, STATE, STATE, radius=1e-60),
  ),
}


@pytest.mark.parametrize('name', OTHERS)
def test_another_number_compiles_nothing(name):
  first, other = OTHERS[name]
  jax.block_until_ready(first())
  assert num_programs(other) == 0


def test_values_are_looked_at_in_every_call():
  step = functools.partial(dual.one_step, PHI, STATE, X, V)
  step(learning_rate=0.1)
  for rate in (-0.1, np.float32(-1), jnp.float32(np.nan)):
    with pytest.raises(ValueError, match=r'learning_rate is (-|nan)'):
      step(learning_rate=rate)
  pretrained.logits(model(), TOKENS)
  with pytest.raises(ValueError, match='tokens holds 99'):
    pretrained.logits(model(), TOKENS + 99 - TOKENS[0])


SCALE = 2.0


def scaled_loss(scale):
  return lambda p, v: -jnp.sum(scale * p * v)


def global_loss(p, v):
  return -jnp.sum(SCALE * p * v)


def learnt(loss):
  start = dual.empty(PHI, X, V)
  return dual.one_step_autodiff(PHI, start, X, V, loss=loss).weights


def test_functions_are_the_same_by_what_they_refer_to(monkeypatch):
  one = learnt(scaled_loss(1.0))
  np.testing.assert_allclose(learnt(scaled_loss(3.0)), 3 * one, rtol=1e-5)
  np.testing.assert_allclose(learnt(global_loss), 2 * one, rtol=1e-5)
  monkeypatch.setitem(globals(), 'SCALE', 4.0)
  np.testing.assert_allclose(learnt(global_loss), 4 * one, rtol=1e-5)
  # A function that bears the name of one of the library, and an old one beside.
  named = functools.wraps(losses.contrastive)(global_loss)
  attend = modified.attention_from_loss(named)
  four = attend(KERNEL, W, X, V)
  monkeypatch.setitem(globals(), 'SCALE', 2.0)
  for same in (attend, modified.attention_from_loss(named)):
    np.testing.assert_allclose(2 * same(KERNEL, W, X, V), four, rtol=1e-5)
  array = jnp.float32(5.0)
  np.testing.assert_allclose(learnt(scaled_loss(array)), 5 * one, rtol=1e-5)
  assert num_programs(lambda: learnt(scaled_loss(array))) == 0
  np.testing.assert_allclose(learnt(scaled_loss(array + 1)), 6 * one, rtol=1e-5)


def test_a_map_of_a_new_function_is_what_it_refers_to(monkeypatch):
  def attend():
    phi = features.from_log(lambda x: SCALE * x)
    return attention.kernel_attention(phi, W, X, V)

  before = attend()
  assert num_programs(attend) == 0
  monkeypatch.setitem(globals(), 'SCALE', 4.0)
  with jax.disable_jit():
    expected = attend()
  np.testing.assert_allclose(attend(), expected, rtol=1e-5)
  assert jnp.max(jnp.abs(expected - before)) > 1e-3


class Mutable:
  factor = 1.0


def test_what_may_change_unseen_is_looked_at_by_a_new_function():
  mutable = Mutable()

  def make():
    return lambda p, v: -jnp.sum(mutable.factor * p * v)

  one = learnt(make())
  mutable.factor = 2.0
  np.testing.assert_allclose(learnt(make()), 2 * one, rtol=1e-5)


@pytest.mark.parametrize('bias', [{}, {'default': 0.0}])
def test_classes_that_functions_refer_to_are_told_apart(bias):
  def scaled(factor):
    fields = [('bias', float, dataclasses.field(**bias))]
    made = dataclasses.make_dataclass('Settings', fields)
    made.factor = factor
    return lambda p, v: -jnp.sum(made.factor * p * v)

  one = learnt(scaled(1.0))
  np.testing.assert_allclose(learnt(scaled(2.0)), 2 * one, rtol=1e-5)


def test_a_function_that_reads_numbers_runs_as_python():
  def reads(phi, query, keys, values):
    weights = np.exp(np.asarray(keys) @ np.asarray(query) / 2)
    return jnp.asarray(np.asarray(values).T @ (weights / weights.sum()))

  assert equivalence.verify(KERNEL, W, X, V, attention_fn=reads).holds


def test_a_function_may_refer_to_traced_values():
  slopes = jax.vmap(lambda scale: learnt(scaled_loss(scale)))(
    jnp.array([1.0, 2.0], np.float32)
  )
  np.testing.assert_allclose(slopes[1], 2 * slopes[0], rtol=1e-5)


# The first call of a shape, with the programs of JAX's own small operations.
FIRST = {
  'verify of 32 keys': lambda: (
    equivalence.verify(
      KERNEL, rows(0, 4), rows(1, 32, 4), rows(2, 32, 3)
    ).attention
  ),
  'verify of 33 keys': lambda: (
    equivalence.verify(
      KERNEL, rows(0, 4), rows(1, 33, 4), rows(2, 33, 3)
    ).attention
  ),
  **{
    name: CALLS[name]
    for name in (
      'dual.one_step_autodiff',
      'modified call',
      'equivalence.verify of your own',
      'equivalence.verify_model by default',
      'pretrained.generate',
      'pretrained.logits',
    )
  },
}


@pytest.mark.parametrize('name', FIRST)
def test_a_first_call_compiles_a_handful_of_programs(name):
  model()
  jax.clear_caches()
  assert num_programs(FIRST[name]) <= 6
