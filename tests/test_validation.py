"""Bad input: a `ValueError` that names the argument and the remedy.

Shapes and dtypes are checked while tracing, too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iclcl_jax import (
  attention,
  dual,
  equivalence,
  features,
  kernels,
  layers,
  losses,
  modified,
  precision,
  tasks,
)

N, D_K, D_V = 5, 4, 3
PHI = features.EluPlusOneFeatures()
KERNEL = kernels.ExponentialKernel()


def good(phi=PHI):
  x = jnp.linspace(0.1, 1, N * D_K, dtype=jnp.float32).reshape(N, D_K)
  v = jnp.linspace(-1, 1, N * D_V, dtype=jnp.float32).reshape(N, D_V)
  return {
    'query': x[0],
    'queries': x[::-1],
    'keys': x,
    'values': v,
    'mask': jnp.arange(N) < 3,
    'state': dual.zero_shot(phi, x[:1], v[:1]),
  }


SGD = optax.sgd(0.1)
TRAIN = {'optimizer': SGD, 'num_epochs': 1, 'batch_size': 2}

# What each function reads, and how it is called.
FUNCTIONS = {
  attention.softmax_attention: 'query keys values mask',
  attention.kernel_attention: 'phi query keys values mask',
  attention.linear_attention: 'phi query keys values mask',
  attention.stream_kernel_attention: 'phi queries keys values mask',
  attention.causal_kernel_attention: 'phi queries keys values mask',
  dual.zero_shot: 'phi keys values mask',
  dual.one_step: 'phi state keys values mask',
  dual.stream_step: 'phi state keys values mask',
  dual.one_step_autodiff: 'phi state keys values mask',
  dual.train: 'phi state keys values',
  dual.train_and_observe: 'phi state keys values',
  dual.normaliser: 'phi keys query mask',
  dual.predict: 'phi state query',
  dual.stream_predict: 'phi state queries',
  equivalence.residuals: 'phi query keys values mask',
  equivalence.verify: 'phi query keys values mask',
}
OPTIONS = {
  dual.train: TRAIN,
  dual.train_and_observe: TRAIN | {'observe': lambda state: state.mass},
}


def call(function, arguments, phi=PHI, **options):
  options = OPTIONS.get(function, {}) | options
  names = FUNCTIONS[function].split()
  positional = [phi if n == 'phi' else arguments[n] for n in names]
  if names[-1] == 'mask':
    options['mask'] = positional.pop()
  return function(*positional, **options)


f32, int32 = jnp.float32, jnp.int32
# argument, what it is replaced by, what the message must say.
FAULTS = {
  'query_rank': (
    'query',
    jnp.ones((1, D_K), f32),
    r'query has shape \[1, 4\]; expected \[d_k\].*jax\.vmap',
  ),
  'queries_rank': (
    'queries',
    jnp.ones(D_K, f32),
    r'queries has shape \[4\]; expected \[[MN], d_k\]',
  ),
  'keys_rank': (
    'keys',
    jnp.ones((1, N, D_K), f32),
    r'keys has shape \[1, 5, 4\]; expected \[[Nn], d_k\].*jax\.vmap',
  ),
  'values_rank': (
    'values',
    jnp.ones(N, f32),
    r'values has shape \[5\]; expected \[[Nn], d_v\]',
  ),
  'values_count': (
    'values',
    jnp.ones((N + 1, D_V), f32),
    r'(keys|queries) and values disagree in [Nn]: 5 and 6\. Pass arrays',
  ),
  'query_width': (
    'query',
    jnp.ones(D_K + 1, f32),
    r'disagree in .*(5 and 4|4 and 5)\. Pass arrays',
  ),
  'queries_width': (
    'queries',
    jnp.ones((N, D_K + 1), f32),
    r'disagree in .*(5 and 4|4 and 5)\. Pass arrays',
  ),
  'keys_dtype': (
    'keys',
    jnp.ones((N, D_K), int32),
    r'keys has dtype int32; expected a floating.*keys\.astype',
  ),
  'values_dtype': (
    'values',
    jnp.ones((N, D_V), jnp.float64),
    r'dtypes disagree \(.*values: float64.*\.astype',
  ),
  'query_dtype': (
    'query',
    jnp.ones(D_K, jnp.float64),
    r'dtypes disagree \(.*query: float64.*\.astype',
  ),
  'mask_dtype': (
    'mask',
    jnp.ones(N, int32),
    r'mask has dtype int32; expected booleans.*Compare first',
  ),
  'mask_size': (
    'mask',
    jnp.ones(N - 1, bool),
    r'mask has shape \[4\]; expected \[5\]',
  ),
  'no_width': (
    'keys',
    jnp.ones((N, 0), f32),
    r'(keys has shape \[5, 0\]; expected a width|disagree in d_k: 4 and 0)',
  ),
}
APPLICABLE = [
  pytest.param(function, fault, id=f'{function.__name__}-{fault}')
  for function, names in FUNCTIONS.items()
  for fault, (argument, _, _) in FAULTS.items()
  if argument in names.split()
]


@pytest.mark.parametrize(('function', 'fault'), APPLICABLE)
def test_a_bad_array_is_named_eagerly_and_while_tracing(function, fault):
  argument, value, message = FAULTS[fault]
  arguments = good() | {argument: value}
  if function is not equivalence.verify:
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(functools.partial(call, function), arguments)
  with pytest.raises(ValueError, match=message):
    call(function, arguments)


@pytest.mark.parametrize(
  'function', [f for f in FUNCTIONS if f is not equivalence.verify]
)
def test_the_good_input_passes(function):
  """Else the table above would prove nothing."""
  jax.eval_shape(functools.partial(call, function), good())


@pytest.mark.parametrize(
  'function', [f for f, names in FUNCTIONS.items() if 'keys' in names.split()]
)
def test_no_demonstration_is_named(function):
  arguments = good()
  empty = {name: arguments[name][:0] for name in ('keys', 'values', 'mask')}
  if function is dual.zero_shot:
    assert call(function, arguments | empty).mass.shape == (D_K,)
    return
  if function is attention.causal_kernel_attention:
    empty['queries'] = arguments['queries'][:0]
  message = r'(keys|queries) is empty \(N = 0\).*dual\.empty'
  with pytest.raises(ValueError, match=message):
    call(function, arguments | empty)


@pytest.mark.parametrize(
  'function', [f for f, names in FUNCTIONS.items() if 'phi' in names.split()]
)
@pytest.mark.parametrize(
  ('phi', 'message'),
  [
    (None, r'phi is a NoneType; .*(FeatureMap|Kernel)'),
    (lambda x: x, r'phi is a function; .*FeatureMap'),
    (features.EluPlusOneFeatures, r'class EluPlusOneFeatures; .*Call it'),
  ],
)
def test_what_is_no_map_and_no_kernel_is_named(function, phi, message):
  with pytest.raises(ValueError, match=message):
    call(function, good(), phi=phi)


def test_a_stream_of_steps_needs_a_feature_map():
  with pytest.raises(ValueError, match=r'phi is a ExponentialKernel; this fun'):
    call(dual.stream_step, good(), phi=KERNEL)


@pytest.mark.parametrize(
  'function', [f for f, names in FUNCTIONS.items() if 'state' in names.split()]
)
def test_a_foreign_state_is_named(function):
  if function is not dual.stream_step:
    with pytest.raises(
      ValueError, match=r'state is a DualState; expected a KernelDualState'
    ):
      call(function, good(), phi=KERNEL)
  with pytest.raises(
    ValueError, match=r'state is a KernelDualState; expected a DualState'
  ):
    call(function, good(KERNEL))
  with pytest.raises(ValueError, match=r'state is a tuple; expected a DualS'):
    call(function, good() | {'state': tuple(good()['state'])})
  wider = features.TaylorFeatures(order=2)
  with pytest.raises(
    ValueError, match=r'state and phi disagree in R: 4 and 15'
  ):
    call(function, good(), phi=wider)


WRONG = {
  'rate_negative': (
    dual.one_step,
    {'learning_rate': -0.1},
    r'learning_rate is -0\.1; expected a finite number >= 0',
  ),
  'rate_nan': (
    dual.one_step_autodiff,
    {'learning_rate': float('nan')},
    r'learning_rate is nan; expected a finite number >= 0',
  ),
  'rate_infinite': (
    dual.stream_step,
    {'learning_rate': jnp.inf},
    r'learning_rate is inf; expected a finite',
  ),
  'rate_vector': (
    dual.one_step,
    {'learning_rate': jnp.ones(2)},
    r'learning_rate has shape \[2\]; expected a scalar\. Use jax\.vmap',
  ),
  'rate_text': (
    dual.one_step,
    {'learning_rate': 'fast'},
    r"learning_rate is 'fast'; expected a finite number",
  ),
  'stream_chunk': (
    attention.stream_kernel_attention,
    {'chunk_size': 0},
    r'chunk_size is 0; expected an integer >= 1\.$',
  ),
  'step_chunk': (
    dual.stream_step,
    {'chunk_size': 2.0},
    r'chunk_size is 2\.0; expected an integer >= 1',
  ),
  'predict_chunk': (
    dual.stream_predict,
    {'chunk_size': -1},
    r'chunk_size is -1; expected an integer >= 1',
  ),
  'causal_chunk': (
    attention.causal_kernel_attention,
    {'chunk_size': 2.0},
    r'chunk_size is 2.0; expected an integer >= 1\. Counts are static',
  ),
  'loss_text': (
    dual.one_step_autodiff,
    {'loss': 'contrastive'},
    r'loss is a str; expected a function.*losses\.contrastive',
  ),
  'loss_vector': (
    dual.one_step_autodiff,
    {
      'loss': losses.sum_over_demonstrations(
        lambda predictions, values: jnp.sum(predictions * values, axis=1)
      )
    },
    r'loss returns float32 \[5\]; expected a scalar array \[\]',
  ),
  'loss_masked': (
    dual.one_step_autodiff,
    {'loss': lambda predictions, values: jnp.mean(predictions * values)},
    r'loss is not declared a sum .*losses\.sum_over_demonstrations',
  ),
  'penalty': (
    dual.one_step_autodiff,
    {'penalty': 0.1},
    r'penalty is a float; expected a function.*losses\.ridge',
  ),
  'optimizer': (
    dual.one_step_autodiff,
    {'optimizer': 0.1},
    r'optimizer is a float; expected an optax transformation',
  ),
  'optimizer_of_more': (
    dual.one_step_autodiff,
    {'optimizer': optax.polyak_sgd()},
    r'optimizer cannot be called.*value',
  ),
  'train_optimizer': (
    dual.train,
    {'optimizer': optax.sgd},
    r'optimizer is a function; expected an optax transformation',
  ),
  'epochs': (
    dual.train,
    {'num_epochs': 0},
    r'num_epochs is 0; expected an integer >= 1',
  ),
  'batch_small': (
    dual.train,
    {'batch_size': 0},
    r'batch_size is 0; expected an integer >= 1',
  ),
  'batch_large': (
    dual.train,
    {'batch_size': N + 1},
    r'batch_size is 6; expected at most the number of demonstrations, 5',
  ),
  'batch_loss': (
    dual.train,
    {'loss': lambda predictions, values: jnp.mean(predictions * values)},
    r'loss is not declared a sum .*whole batches',
  ),
  'observe': (
    dual.train_and_observe,
    {'observe': 'mass'},
    r'observe is a str; expected a function of the state',
  ),
  'normaliser': (
    dual.predict,
    {'normaliser': np.inf},
    r'normaliser is inf; expected a finite',
  ),
  'query_tokens_negative': (
    equivalence.verify,
    {'num_query_tokens': -1},
    r'num_query_tokens is -1; expected an integer >= 0',
  ),
  'query_tokens_all': (
    equivalence.residuals,
    {'num_query_tokens': N},
    r'num_query_tokens is 5 of 5 tokens; expected fewer',
  ),
  'arithmetic': (
    equivalence.verify,
    {'arithmetic': 'highest'},
    r'arithmetic is a str; expected a precision\.Arithmetic',
  ),
}


@pytest.mark.parametrize('case', list(WRONG))
def test_a_bad_parameter_is_named(case):
  function, options, message = WRONG[case]
  with pytest.raises(ValueError, match=message):
    call(function, good(), **options)


def test_a_list_is_named():
  arguments = good() | {'query': [1.0] * D_K}
  with pytest.raises(ValueError, match=r'query is a list; .*jnp\.asarray'):
    call(attention.softmax_attention, arguments)


def test_traced_hyper_parameters_pass():
  """Their values are not known while tracing; their shapes are."""
  run = functools.partial(call, dual.one_step, good())
  jax.eval_shape(lambda rate: run(learning_rate=rate), jnp.float32(-1))
  with pytest.raises(ValueError, match=r'learning_rate has shape \[2\]'):
    jax.eval_shape(lambda rate: run(learning_rate=rate), jnp.ones(2))


def test_width_of_values_must_fit_the_state():
  arguments = good() | {'values': jnp.ones((N, D_V + 1), f32)}
  for function in (dual.one_step, dual.one_step_autodiff, dual.train):
    with pytest.raises(
      ValueError, match=r'state\.weights and values disagree in d_v: 3 and 4'
    ):
      call(function, arguments)


def test_queries_and_keys_of_causal_attention_must_pair():
  arguments = good() | {'queries': good()['queries'][:2]}
  with pytest.raises(ValueError, match=r'queries and keys disagree in N: 2'):
    call(attention.causal_kernel_attention, arguments)


def test_unmergeable_states_are_named():
  state = good()['state']
  kernel_state = good(KERNEL)['state']
  narrow = jax.tree.map(lambda x: x[..., :2], state)
  double = jax.tree.map(lambda x: x.astype(jnp.float64), state)
  for bad, message in (
    (
      kernel_state,
      r'a is a DualState, b a KernelDualState; expected states of the s',
    ),
    (narrow, r'a\.weights and b\.weights disagree in R: 4 and 2'),
    (double, r'dtypes disagree \(a\.weights: float32, .*b\.weights: float64'),
    (None, r'b is a NoneType; expected a DualState\(weights, mass, log_scale'),
  ):
    with pytest.raises(ValueError, match=message):
      dual.merge(state, bad)


class _Wrong:
  """A feature map whose `scaled` returns what it is told."""

  def __init__(self, scaled):
    self.scaled = scaled


@pytest.mark.parametrize(
  ('scaled', 'found'),
  [
    (lambda x: x, r'float32 \[4\]'),
    (lambda x: (x[0], x), r'\(float32 \[\], float32 \[4\]\)'),
    (lambda x: (x, x[None]), r'\(float32 \[4\], float32 \[1, 4\]\)'),
    (lambda x: (x[:3], x), r'\(float32 \[3\], float32 \[4\]\)'),
    (lambda x: (x, x.astype(int32)), r'\(float32 \[4\], int32 \[4\]\)'),
    (lambda x: (x, None), r'\(float32 \[4\], a NoneType\)'),
  ],
)
def test_own_feature_maps_are_checked(scaled, found):
  message = f'phi.scaled of _Wrong returned {found} for a vector'
  for function in (
    attention.kernel_attention,
    attention.stream_kernel_attention,
    dual.zero_shot,
  ):
    with pytest.raises(ValueError, match=message):
      call(function, good(), _Wrong(scaled))


@pytest.mark.parametrize(
  ('kernel', 'found'),
  [
    (lambda x, y: x * y, r'float32 \[4\]'),
    (lambda x, y: (x @ y).astype(int32), r'int32 \[\]'),
    (lambda x, y: None, 'a NoneType'),
  ],
)
def test_own_kernels_are_checked(kernel, found):
  message = f'the kernel <lambda> returned {found} for vectors'
  for function in (attention.kernel_attention, dual.normaliser):
    with pytest.raises(ValueError, match=message):
      call(function, good(), kernel)


def test_bad_removals_are_named():
  arguments = good()
  keys, values = arguments['keys'], arguments['values']
  for key, value, rate, message in (
    (keys, values[0], 1.0, r'key has shape \[5, 4\]; expected \[d_k\]'),
    (keys[0], values, 1.0, r'value has shape \[5, 3\]; expected \[d_v\]'),
    (keys[0], values[0, :2], 1.0, r'disagree in d_v: 3 and 2'),
    (keys[0], values[0], -1.0, r'learning_rate is -1\.0'),
  ):
    with pytest.raises(ValueError, match=message):
      dual.remove(PHI, arguments['state'], key, value, learning_rate=rate)


def test_bad_losses_and_penalties_are_named():
  for loss in (losses.contrastive, losses.squared):
    with pytest.raises(
      ValueError, match=r'predictions and values disagree in N'
    ):
      loss(jnp.ones((2, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r'predictions has shape \[3\]; expec'):
      loss(jnp.ones(3), jnp.ones(3))
  for strength in (np.nan, np.inf, None):
    with pytest.raises(ValueError, match=r'strength is .*; expected a finite'):
      losses.ridge(strength)


def test_bad_tasks_are_named():
  matrix = jnp.ones((1, 2))
  for make, message in (
    (lambda key: (key, -1, matrix), r'num_demonstrations is -1; expected an i'),
    (lambda key: (key, 3, matrix[0]), r'task_matrix has shape \[2\]; expected'),
    (lambda key: (0, 3, matrix), r'key is a int; expected a typed random key'),
    (
      lambda key: (jax.random.split(key), 3, matrix),
      r'key has shape \[2\]; expected one key\. Use jax\.vmap',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      tasks.linear_regression(*make(jax.random.key(0)))
  with pytest.raises(ValueError, match=r'input_fn is a str; .*tasks\.uniform'):
    tasks.linear_regression(jax.random.key(0), 3, matrix, input_fn='uniform')


@pytest.mark.parametrize(
  ('options', 'tokens', 'message'),
  [
    ({'attention_fn': 'softmax'}, jnp.ones((3, 2)), r'attention_fn is a str; '),
    (
      {'attention_fn': modified.attention_from_loss(losses.contrastive)},
      jnp.ones((3, 2)),
      r'attention_fn takes \(phi, query, keys, values, .*expected a function',
    ),
    (
      {'attention_fn': lambda queries, keys, values: values[0]},
      jnp.ones((3, 2)),
      r'attention_fn returned float\d+ \[2\]; expected .* \[3, 2\]',
    ),
    ({}, jnp.ones(3), r'tokens has shape \[3\]; expected \[N, d_model\]'),
    ({'key_dim': 0}, jnp.ones((3, 2)), r'key_dim is 0; expected an integer'),
    ({'value_dim': 0}, jnp.ones((3, 2)), r'value_dim is 0; expected an int'),
    ({'num_heads': 0}, jnp.ones((3, 2)), r'num_heads is 0; expected an int'),
    ({'output_dim': 0}, jnp.ones((3, 2)), r'output_dim is 0; expected an int'),
  ],
)
def test_bad_layers_are_named(options, tokens, message):
  fn = functools.partial(attention.stream_kernel_attention, PHI)
  sizes = {'num_heads': 1, 'key_dim': 2, 'value_dim': 2}
  layer = layers.MultiHeadAttention(**({'attention_fn': fn} | sizes | options))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(layer.init, jax.random.key(0), tokens)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'augment_keys': None},
      r'augment_keys is a NoneType; expected a function',
    ),
    ({'augment_values': lambda a, b: a}, r'augment_values takes \(a, b\); '),
    ({'augment_keys': jnp.sum}, r'augment_keys returned \w+ \[3\]; .*\[3, 2\]'),
    ({'augment_values': jnp.sum}, r'augment_values returned \w+ \[3\]; '),
  ],
)
def test_bad_views_are_named(options, message):
  x = jnp.ones((3, 2))
  with pytest.raises(ValueError, match=message):
    modified.augmented(**options)(PHI, x[0], x, x)


@pytest.mark.parametrize(
  ('attention_fn', 'message'),
  [
    ('softmax', r'attention_fn is a str; expected a function \(phi, query'),
    (lambda query, keys: keys, r'attention_fn takes \(query, keys\); '),
    (lambda *arrays: arrays[3], r'returned \w+ \[3, 2\]; expected .* \[2\]'),
    (lambda *arrays: None, r'attention_fn returned a NoneType; expected'),
  ],
)
def test_an_attention_that_cannot_be_certified_is_named(attention_fn, message):
  x = jnp.ones((3, 2))
  with pytest.raises(ValueError, match=message):
    equivalence.verify(PHI, x[0], x, x, attention_fn=attention_fn)


def test_a_selection_of_another_shape_is_named():
  x = jnp.ones((3, 2))
  attend = modified.negative(
    num_negatives=1,
    strength=0.5,
    select=lambda weights, candidates, count: candidates[0],
  )
  with pytest.raises(ValueError, match=r'select returned bool \[\]; expected'):
    attend(PHI, x[0], x, x)


def one(predictions):
  return jnp.sum(predictions)


def three(predictions, values, other):
  return jnp.sum(predictions * values * other)


def last_keyword(predictions, *, normaliser):
  return jnp.sum(predictions) * normaliser


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'loss': one}, r'loss takes \(predictions\); expected a function loss\('),
    ({'loss': three}, r'loss takes \(predictions, values, other\); expected'),
    ({'loss': last_keyword}, r'loss takes \(predictions, normaliser\); exp'),
    ({'penalty': three}, r'penalty takes \(predictions, .*losses\.ridge'),
    ({'optimizer': optax.polyak_sgd()}, r'optimizer cannot be called.*value'),
    (
      {'optimizer': optax.sgd(optax.linear_schedule(0.0, 1.0, 10))},
      r'optimizer does not move in its first step .*schedule',
    ),
    (
      {'optimizer': optax.MultiSteps(optax.sgd(1.0), 2)},
      r'optimizer does not move in its first step .*accumulated',
    ),
  ],
)
def test_what_makes_no_attention_is_named(options, message):
  # Optax itself is not strict.
  with (
    jax.numpy_dtype_promotion('standard'),
    pytest.raises(ValueError, match=message),
  ):
    modified.attention_from_loss(**({'loss': losses.contrastive} | options))


@pytest.mark.parametrize(
  ('loss', 'found'),
  [
    (lambda p, v: jnp.sum(p > v), r'int\d+ \[\]'),
    (lambda p, v: jnp.all(p > v), r'bool \[\]'),
    (lambda p, v: jax.lax.complex(jnp.sum(p), jnp.sum(v)), r'complex\d+ \[\]'),
    (lambda p, v: jnp.sum(p * v, axis=0), r'float32 \[3\]'),
    (lambda p, v: None, r'a NoneType'),
  ],
)
def test_a_loss_that_has_no_gradient_is_named(loss, found):
  arguments = good()
  with pytest.raises(ValueError, match=f'loss returns {found}; expected a sc'):
    modified.attention_from_loss(loss)(
      PHI, arguments['query'], arguments['keys'], arguments['values']
    )
  with pytest.raises(ValueError, match=f'loss returns {found}; expected a sc'):
    dual.one_step_autodiff(
      PHI, arguments['state'], arguments['keys'], arguments['values'], loss=loss
    )


@pytest.mark.parametrize('phi', [PHI, KERNEL])
@pytest.mark.parametrize('count', [0, 1])
def test_a_penalty_that_is_a_vector_is_named(phi, count):
  x, v = good()['keys'], good()['values']
  options = {'penalty': lambda weights: jnp.sum(weights**2, axis=1)}
  attend = modified.attention_from_loss(losses.contrastive, **options)
  with pytest.raises(ValueError, match=r'penalty returns float32 \[3\]; exp'):
    attend(phi, x[0], x, v, num_query_tokens=count)
  state = dual.zero_shot(phi, x[:1], v[:1])
  with pytest.raises(ValueError, match=r'penalty returns float32 \[3\]; exp'):
    dual.one_step_autodiff(phi, state, x, v, **options)


NEGATIVES = {'num_negatives': 1, 'strength': 0.5}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'select': modified.random_choice},
      r'select takes \(key\); expected .* modified\.random_choice\(key\)',
    ),
    ({'select': 'lowest'}, r'select is a str; expected a function \(weights'),
    ({'renormalise': lambda w: w}, r'renormalise takes \(w\); expected a f'),
    (
      {'select': lambda weights, candidates, count: weights},
      r'select returned float32 \[5\]; expected booleans',
    ),
  ],
)
def test_bad_choices_of_negatives_are_named(options, message):
  x, v = good()['keys'], good()['values']
  with pytest.raises(ValueError, match=message):
    modified.negative(**(NEGATIVES | options))(PHI, x[0], x, v)
  with pytest.raises(ValueError, match=message):
    modified.negative(**(NEGATIVES | options)).stream(PHI, x, x, v)


@pytest.mark.parametrize(
  ('candidates_fn', 'message'),
  [
    (jnp.ones(N, bool), r'candidates_fn is a \w+; .*A mask is lambda position'),
    ('a', r'candidates_fn is a str; expected a function \(position'),
    (lambda i: i, r'candidates_fn takes \(i\); expected'),
    (lambda i, j: i < 3, r'candidates_fn returned bool \[\]; expected'),
    (lambda i, j: i + j, r'candidates_fn returned int\d+ \[5\]; expected bo'),
  ],
)
def test_candidates_are_a_function_of_positions(candidates_fn, message):
  x, v = good()['keys'], good()['values']
  for make in (modified.negative, modified.token_negative):
    with pytest.raises(ValueError, match=message):
      make(candidates_fn=candidates_fn, **NEGATIVES).stream(PHI, x, x, v)


def test_old_keys_are_named():
  with pytest.raises(ValueError, match=r'key is an array of uint32 \[2\]; exp'):
    modified.random_choice(jax.random.PRNGKey(0))


def test_unknown_dtypes_have_no_tolerance():
  with pytest.raises(ValueError, match=r'dtype is int32; expected one of floa'):
    precision.tolerance(int32)
