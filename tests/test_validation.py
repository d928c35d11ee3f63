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
  _pytree,
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
  dual.one_step_autodiff: 'phi state keys values mask',
  dual.train: 'phi state keys values',
  dual.normaliser: 'phi keys query mask',
  dual.predict: 'phi state query',
  equivalence.residuals: 'phi query keys values mask',
  equivalence.verify: 'phi query keys values mask',
}
OPTIONS = {
  dual.train: TRAIN,
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


def test_what_needs_a_feature_map_says_so():
  with pytest.raises(ValueError, match=r'phi is an ExponentialKernel; this fu'):
    features.FeatureKernel(KERNEL)


@pytest.mark.parametrize(
  'function', [f for f, names in FUNCTIONS.items() if 'state' in names.split()]
)
def test_a_foreign_state_is_named(function):
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


def not_a_sum(predictions, values):
  return jnp.mean(predictions * values)


def a_vector(predictions, values):
  return jnp.sum(predictions * values, axis=1)


# function, option, what it is set to, what the message says of it.
OPTIONS_OUT_OF_RANGE = [
  (dual.one_step, 'learning_rate', -0.1, r'is -0\.1; expected a finite.* >= 0'),
  (dual.one_step_autodiff, 'learning_rate', np.nan, r'is nan; .*number >= 0'),
  (dual.one_step, 'learning_rate', jnp.inf, r'is inf; expected a finite'),
  (dual.one_step, 'learning_rate', jnp.ones(2), r'has shape \[2\].*jax\.vmap'),
  (dual.one_step, 'learning_rate', 'fast', r"is 'fast'; expected a finite"),
  (attention.stream_kernel_attention, 'chunk_size', 0, r'is 0; .* >= 1\.'),
  (dual.one_step, 'chunk_size', 2.0, r'is 2\.0; expected an integer >= 1'),
  (dual.one_step, 'chunk_size', -1, r'is -1; expected an integer >= 1'),
  (
    attention.causal_kernel_attention,
    'chunk_size',
    2.0,
    r'.*Counts are static',
  ),
  (dual.one_step_autodiff, 'loss', 'squared', r'is a str; .*losses\.contrast'),
  (dual.one_step_autodiff, 'loss', a_vector, r'returns float32 \[5\]; .*\[\]'),
  (
    dual.one_step_autodiff,
    'loss',
    not_a_sum,
    r'is not declared a sum .*losses',
  ),
  (dual.train, 'loss', not_a_sum, r'is not declared a sum .*whole batches'),
  (dual.one_step_autodiff, 'penalty', 0.1, r'is a float; .*losses\.ridge'),
  (dual.one_step_autodiff, 'optimizer', 0.1, r'is a float; expected an optax'),
  (dual.one_step_autodiff, 'optimizer', optax.polyak_sgd(), r'cannot .*value'),
  (dual.train, 'optimizer', optax.sgd, r'is a function; expected an optax'),
  (dual.train, 'num_epochs', 0, r'is 0; expected an integer >= 1'),
  (dual.train, 'batch_size', 0, r'is 0; expected an integer >= 1'),
  (
    dual.train,
    'batch_size',
    N + 1,
    r'is 6; expected at most the number of .*5',
  ),
  (dual.train, 'observe', 'mass', r'is a str; expected a function'),
  (dual.predict, 'normaliser', np.inf, r'is inf; expected a finite'),
  (equivalence.verify, 'num_query_tokens', -1, r'is -1; .*integer >= 0'),
  (equivalence.residuals, 'num_query_tokens', N, r'is 5 of 5 tokens; .*fewer'),
  (equivalence.verify, 'arithmetic', 'highest', r'is a str; .*precision\.Ar'),
  (equivalence.verify, 'attention_fn', 'softmax', r'is a str; .*\(phi, query'),
  (equivalence.verify, 'attention_fn', lambda q, k: k, r'takes \(q, k\); '),
  (
    equivalence.verify,
    'attention_fn',
    lambda *x, mask=None: x[3],
    r'returned \w+ \[5, 3\]',
  ),
  (
    equivalence.verify,
    'attention_fn',
    lambda *x, mask=None: None,
    r'returned a NoneType',
  ),
  (
    equivalence.verify,
    'attention_fn',
    lambda *x, mask=None: jnp.zeros(D_V, 'complex64'),
    r'returned complex64',
  ),
]


@pytest.mark.parametrize(
  ('function', 'option', 'value', 'message'),
  OPTIONS_OUT_OF_RANGE,
  ids=[f'{row[0].__name__}-{row[1]}' for row in OPTIONS_OUT_OF_RANGE],
)
def test_a_bad_option_is_named(function, option, value, message):
  with pytest.raises(ValueError, match=f'{option} {message}'):
    call(function, good(), **{option: value})


FROM_LOSS = modified.attention_from_loss(losses.squared)


@pytest.mark.parametrize('phi', [PHI, KERNEL])
@pytest.mark.parametrize(
  'door',
  [
    attention.stream_kernel_attention,
    attention.causal_kernel_attention,
    FROM_LOSS.stream,
    FROM_LOSS.causal,
    modified.regularised(strength=0.1).stream,
  ],
)
def test_a_door_of_many_queries_does_not_answer_one(phi, door):
  with pytest.raises(ValueError, match=r'queries has shape \[4\]; expected \['):
    call(equivalence.verify, good(phi), phi=phi, attention_fn=door)


@_pytree.dataclass
class Own(modified.Attention):
  """An attention that answers anything with the same."""

  answer: object

  def _one(self, *_):
    return self.answer

  _many = _causal = _one


@pytest.mark.parametrize('answer', [jnp.zeros((1, D_V)), 0.0, (1, 2), None])
def test_an_attention_of_ones_own_returns_its_shape(answer):
  own, tokens = Own(answer), good()
  rows = tokens['keys'], tokens['values']
  for door, first, name, shape in (
    (own, 'query', '_one', r'\[3\]'),
    (own.stream, 'queries', '_many', r'\[5, 3\]'),
    (own.causal, 'queries', '_causal', r'\[5, 3\]'),
  ):
    message = rf'Own\.{name} returned .*; expected an array of shape {shape}'
    with pytest.raises(ValueError, match=message):
      door(PHI, tokens[first], *rows)


def test_traced_hyper_parameters_pass():
  """Their values are not known while tracing; their shapes are."""
  run = functools.partial(call, dual.one_step, good())
  jax.eval_shape(lambda rate: run(learning_rate=rate), jnp.float32(-1))
  with pytest.raises(ValueError, match=r'learning_rate has shape \[2\]'):
    jax.eval_shape(lambda rate: run(learning_rate=rate), jnp.ones(2))


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


# Calls of one function each.

G = good()
Q, X, V, STATE = (G[name] for name in ('query', 'keys', 'values', 'state'))
KEY, MATRIX = jax.random.key(0), jnp.ones((1, 2))


THREE = jnp.ones((3, 2))


def changed(function, **arguments):
  return lambda: call(function, G | arguments)


def merge(state):
  return lambda: dual.merge(STATE, state)


def remove(key, value, rate=1.0):
  return lambda: dual.remove(PHI, STATE, key, value, learning_rate=rate)


def task(*arguments, **options):
  return lambda: tasks.linear_regression(*arguments, **options)


def heads(tokens=THREE, **options):
  fn = functools.partial(attention.stream_kernel_attention, PHI)
  options = {
    'attention_fn': fn,
    'num_heads': 1,
    'key_dim': 2,
    'value_dim': 2,
  } | options
  layer = layers.MultiHeadAttention(**options)
  return lambda: jax.eval_shape(layer.init, KEY, tokens)


def from_loss(loss=losses.contrastive, **options):
  return lambda: modified.attention_from_loss(loss, **options)


def descend(loss):
  return lambda: dual.one_step_autodiff(PHI, STATE, X, V, loss=loss)


def attend(loss):
  return lambda: modified.attention_from_loss(loss)(PHI, Q, X, V)


def augmented(**options):
  x = THREE
  return lambda: modified.augmented(**options)(PHI, x[0], x, x)


def negative(make=modified.negative, **options):
  options = {'num_negatives': 1, 'strength': 0.5} | options
  return lambda: make(**options)(PHI, Q, X, V)


def many_negatives(make=modified.negative, **options):
  options = {'num_negatives': 1, 'strength': 0.5} | options
  return lambda: make(**options).stream(PHI, X, X, V)


def one(predictions):
  return jnp.sum(predictions)


def three(predictions, values, other):
  return jnp.sum(predictions * values * other)


def last_keyword(predictions, *, normaliser):
  return jnp.sum(predictions) * normaliser


WIDER = jnp.ones((N, D_V + 1), f32)
RISING = optax.sgd(optax.linear_schedule(0.0, 1.0, 10))
CALLS = [
  (
    changed(attention.softmax_attention, query=[1.0]),
    r'query is a list; .*jnp\.',
  ),
  (
    changed(dual.one_step, values=WIDER),
    r'state\.weights and values .* d_v: 3',
  ),
  (changed(dual.one_step_autodiff, values=WIDER), r'state\.weights and values'),
  (changed(dual.train, values=WIDER), r'state\.weights and values disagree in'),
  (
    changed(attention.causal_kernel_attention, queries=X[:2]),
    r'queries and keys disagree in N: 2',
  ),
  (merge(good(KERNEL)['state']), r'a is a DualState, b a KernelDualState; exp'),
  (
    merge(jax.tree.map(lambda x: x[..., :2], STATE)),
    r'a\.weights and b.* R: 4',
  ),
  (
    merge(jax.tree.map(lambda x: x.astype(jnp.float64), STATE)),
    r'dtypes disagree \(a\.weights: float32, .*b\.weights: float64',
  ),
  (
    merge(None),
    r'b is a NoneType; expected a DualState\(weights, mass, log_sc',
  ),
  (remove(X, V[0]), r'key has shape \[5, 4\]; expected \[d_k\]'),
  (remove(X[0], V), r'value has shape \[5, 3\]; expected \[d_v\]'),
  (remove(X[0], V[0, :2]), r'disagree in d_v: 3 and 2'),
  (remove(X[0], V[0], -1.0), r'learning_rate is -1\.0'),
  (
    lambda: losses.contrastive(V, V[:2]),
    r'predictions and values disagree in N',
  ),
  (lambda: losses.squared(V, V[:2]), r'predictions and values disagree in N'),
  (lambda: losses.contrastive(V[0], V[0]), r'predictions has shape \[3\]; exp'),
  (lambda: losses.squared(V[0], V[0]), r'predictions has shape \[3\]; expec'),
  (lambda: losses.ridge(np.nan), r'strength is nan; expected a finite'),
  (lambda: losses.ridge(np.inf), r'strength is inf; expected a finite'),
  (lambda: losses.ridge(None), r'strength is None; expected a finite'),
  (
    task(KEY, -1, MATRIX),
    r'num_demonstrations is -1; expected an integer >= 0',
  ),
  (task(KEY, 3, MATRIX[0]), r'task_matrix has shape \[2\]; expected'),
  (task(0, 3, MATRIX), r'key is an int; expected a typed random key'),
  (task(jax.random.split(KEY), 3, MATRIX), r'key has shape \[2\]; .*jax\.vmap'),
  (
    task(KEY, 3, MATRIX, input_fn='uniform'),
    r'input_fn is a str; .*tasks\.uni',
  ),
  (heads(attention_fn='softmax'), r'attention_fn is a str; '),
  (
    heads(attention_fn=modified.attention_from_loss(losses.contrastive)),
    r'attention_fn takes \(phi, query, keys, values, .*expected a function',
  ),
  (
    heads(attention_fn=lambda queries, keys, values: values[0]),
    r'attention_fn returned float\d+ \[2\]; expected .* \[3, 2\]',
  ),
  (heads(jnp.ones(3)), r'tokens has shape \[3\]; expected \[N, d_model\]'),
  (heads(key_dim=0), r'key_dim is 0; expected an integer'),
  (heads(value_dim=0), r'value_dim is 0; expected an integer'),
  (heads(num_heads=0), r'num_heads is 0; expected an integer'),
  (heads(output_dim=0), r'output_dim is 0; expected an integer'),
  (augmented(augment_keys=None), r'augment_keys is a NoneType; expected a fun'),
  (
    augmented(augment_values=lambda a, b: a),
    r'augment_values takes \(a, b\); ',
  ),
  (augmented(augment_keys=jnp.sum), r'augment_keys returned \w+ \[3\]; .*3, 2'),
  (augmented(augment_values=jnp.sum), r'augment_values returned \w+ \[3\]; '),
  (from_loss(one), r'loss takes \(predictions\); expected a function loss\('),
  (from_loss(three), r'loss takes \(predictions, values, other\); expected'),
  (from_loss(last_keyword), r'loss takes \(predictions, normaliser\); exp'),
  (from_loss(penalty=three), r'penalty takes \(predictions, .*losses\.ridge'),
  (from_loss(optimizer=optax.polyak_sgd()), r'optimizer cannot be called.*val'),
  (from_loss(optimizer=RISING), r'optimizer does not move .*schedule'),
  (
    from_loss(optimizer=optax.MultiSteps(optax.sgd(1.0), 2)),
    r'optimizer does not move in its first step .*accumulated',
  ),
  *(
    (door(loss), f'loss returns {found}; expected a scalar')
    for door in (attend, descend)
    for loss, found in (
      (lambda p, v: jnp.sum(p > v), r'int\d+ \[\]'),
      (lambda p, v: jnp.all(p > v), r'bool \[\]'),
      (lambda p, v: jax.lax.complex(p[0, 0], v[0, 0]), r'complex\d+ \[\]'),
      (lambda p, v: jnp.sum(p * v, axis=0), r'float32 \[3\]'),
      (lambda p, v: None, r'a NoneType'),
    )
  ),
  *(
    (door(**{option: value}), f'{option} {message}')
    for door in (negative, many_negatives)
    for option, value, message in (
      (
        'select',
        modified.random_choice,
        r'takes \(key\); .*random_choice\(key',
      ),
      ('select', 'lowest', r'is a str; expected a function \(weights'),
      ('select', lambda w, c, n: w, r'returned float32 \[5\]; expected bool'),
      ('select', lambda w, c, n: c[0], r'returned bool \[\]; expected'),
      ('renormalise', lambda w: w, r'takes \(w\); expected a f'),
    )
  ),
  *(
    (many_negatives(make, candidates_fn=value), f'candidates_fn {message}')
    for make in (modified.negative, modified.token_negative)
    for value, message in (
      (jnp.ones(N, bool), r'is an? \w+; .*A mask is lambda position'),
      ('a', r'is a str; expected a function \(position'),
      (lambda i: i, r'takes \(i\); expected'),
      (lambda i, j: i < 3, r'returned bool \[\]; expected'),
      (lambda i, j: i + j, r'returned int\d+ \[5\]; expected bo'),
    )
  ),
  (
    lambda: modified.random_choice(jax.random.PRNGKey(0)),
    r'key is an array of uint32 \[2\]; expected a typed',
  ),
  (lambda: precision.tolerance(int32), r'dtype is int32; expected one of floa'),
]


@pytest.mark.parametrize(('call', 'message'), CALLS, ids=range(len(CALLS)))
def test_what_does_not_fit_is_named(call, message):
  # Optax itself is not strict.
  with (
    jax.numpy_dtype_promotion('standard'),
    pytest.raises(ValueError, match=message),
  ):
    call()
