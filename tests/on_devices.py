"""What `test_devices` runs in a process of its own, on eight CPU devices.

Prints a JSON object: for each check the largest error, or what was raised. With
arguments it is one of two hosts, with two devices each.
"""

import functools
import json
import os
import sys
from typing import Any, NamedTuple

HOST = sys.argv[1:]  # Its number of two, and a port.
NUM_DEVICES = 2 if HOST else 8

os.environ['JAX_PLATFORMS'] = 'cpu'
sys.path.insert(0, os.getcwd())

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402

from experiments import scaling  # noqa: E402
from experiments.lab import compiling  # noqa: E402
from iclcl_jax import (  # noqa: E402
  attention,
  dual,
  features,
  kernels,
  losses,
  modified,
  pretrained,
  projections,
)
from iclcl_jax.pretrained import attribution  # noqa: E402
from tests import families  # noqa: E402

compiling.compile_unoptimised()
jax.config.update('jax_num_cpu_devices', NUM_DEVICES)
jax.config.update('jax_enable_x64', True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
if HOST:  # Before anything is computed.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{HOST[1]}', 2, int(HOST[0]))

AXIS = 'devices'
SPLIT, WHOLE = jax.P(AXIS), jax.P()
KERNEL = kernels.ExponentialKernel()
PHI = features.PositiveFeatures(
  projections.orthogonal(jax.random.key(0), 6, 4, dtype=jnp.float64)
)
CHUNK = {'chunk_size': 3}  # Loops run, and leave a remainder.


class Tokens(NamedTuple):
  """One query with its label, and tokens whose rows the devices share."""

  query: Any
  label: Any
  queries: Any
  keys: Any
  values: Any
  mask: Any


SOME = (
  'attention.softmax_attention',
  'attention.causal_kernel_attention',
  'attention.dot_product_attention',
  'dual.one_step_autodiff',
)
SPECS = Tokens(WHOLE, WHOLE, SPLIT, SPLIT, SPLIT, SPLIT)


def draw(num_rows=8 * NUM_DEVICES, d_k=4, d_v=2, scale=1.0):
  shapes = [(d_k,), (d_v,), (num_rows, d_k), (num_rows, d_k), (num_rows, d_v)]
  keys = jax.random.split(jax.random.key(1), len(shapes))
  arrays = [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]
  tokens = Tokens(*arrays, mask=jnp.arange(num_rows) % 5 != 1)
  return tokens._replace(keys=scale * tokens.keys)


def make_mesh(kind=AxisType.Auto):
  return jax.make_mesh((NUM_DEVICES,), (AXIS,), axis_types=(kind,))


def cases_of_attention(phi):
  """Every function of `attention`, by name."""
  if phi is KERNEL:
    return {
      'softmax_attention': lambda t: attention.softmax_attention(
        t.query, t.keys, t.values, mask=t.mask
      ),
      'causal_kernel_attention, kernel': lambda t: (
        attention.causal_kernel_attention(
          phi,
          *(t.queries, t.keys, t.values),
          start=dual.zero_shot(phi, t.query[None], t.label[None]),
          mask=t.mask,
          **CHUNK,
        )
      ),
      'stream_kernel_attention, kernel': lambda t: (
        attention.stream_kernel_attention(
          phi, t.queries, t.keys, t.values, mask=t.mask, **CHUNK
        )
      ),
    }

  def in_layout(attend):
    def answer(t):
      arrays = (x[None, :, None] for x in (t.queries, t.keys, t.values))
      return attention.dot_product_attention(
        *arrays, attend=attend, is_causal=True
      )

    return answer

  return {
    'dot_product_attention': in_layout(None),
    'dot_product_attention, feature map': in_layout(phi),
    'kernel_attention': lambda t: attention.kernel_attention(
      phi, t.query, t.keys, t.values, mask=t.mask
    ),
    'linear_attention': lambda t: attention.linear_attention(
      phi, t.query, t.keys, t.values
    ),
    'weights': lambda t: attention.weights(phi, t.query, t.keys, mask=t.mask),
    'scores': lambda t: attention.scores(phi, t.query, t.keys, t.mask),
    'stream_kernel_attention': with_slope(
      lambda t, *rows: attention.stream_kernel_attention(
        phi, *rows, mask=t.mask, **CHUNK
      )
    ),
    'causal_kernel_attention': with_slope(
      lambda t, *rows: attention.causal_kernel_attention(
        phi,
        *rows,
        start=dual.zero_shot(phi, t.query[None], t.label[None]),
        mask=t.mask,
        **CHUNK,
      )
    ),
  }


def with_slope(attend):
  def objective(rows, t):
    return jnp.sum(jnp.sin(attend(t, *rows)))

  return lambda t: jax.value_and_grad(objective)(
    (t.queries, t.keys, t.values), t
  )


def cases_of_dual(phi):
  """Every function of `dual` for one device, by name."""
  training = {
    'loss': losses.squared,
    'optimizer': optax.sgd(1e-2, momentum=0.5),
    'num_epochs': 2,
    'batch_size': 3,
  }

  def first(t):
    return dual.zero_shot(phi, t.query[None], t.label[None])

  def step(t):
    return dual.one_step(phi, first(t), t.keys, t.values, mask=t.mask)

  if phi is KERNEL:
    return {
      'zero_shot, kernel': lambda t: dual.zero_shot(
        phi, t.keys, t.values, mask=t.mask
      ),
      'train': lambda t: dual.train(
        phi, first(t), t.keys, t.values, **training
      ),
      'read': lambda t: dual.read(phi, step(t), t.query),
      'remove, kernel': lambda t: dual.remove(phi, step(t), t.query, t.label),
    }
  return {
    'empty': lambda t: dual.empty(phi, t.keys, t.values),
    'zero_shot': first,
    'one_step': step,
    'one_step_autodiff': lambda t: dual.one_step_autodiff(
      phi, first(t), t.keys, t.values, loss=losses.squared, mask=t.mask
    ),
    'one_step in chunks': lambda t: dual.one_step(
      phi, first(t), t.keys, t.values, mask=t.mask, **CHUNK
    ),
    'train, observed': lambda t: dual.train(
      phi,
      *(first(t), t.keys, t.values),
      observe=lambda state: dual.predict(phi, state, jnp.ones(4)),
      **training,
    ),
    'predict': lambda t: dual.predict(phi, step(t), t.query),
    'normaliser': lambda t: dual.normaliser(phi, t.keys, t.query, mask=t.mask),
    'merge': lambda t: dual.merge(first(t), step(t)),
    'remove': lambda t: dual.remove(phi, step(t), t.query, t.label),
  }


def cases_of_modified(phi):
  """Every attention of `modified`: one query, `stream` and `causal`."""
  negative = functools.partial(modified.negative, num_negatives=2, strength=0.5)
  attentions = {
    'attention_from_loss': modified.attention_from_loss(losses.squared),
    'augmented': modified.augmented(augment_values=jnp.tanh),
    'regularised': modified.regularised(strength=0.5),
    'second_step': modified.second_step(learning_rate=0.7, momentum=0.2),
    'negative': negative(),
    'token_negative': modified.token_negative(num_negatives=2, strength=0.5),
  }
  if phi is PHI:
    return {
      f'{name}.{door}': lambda t, attend=attend, door=door: getattr(
        attend, door
      )(phi, t.queries, t.keys, t.values, mask=t.mask, **CHUNK)
      for name, attend in attentions.items()
      for door in ('stream', 'causal')
    }
  del attentions['token_negative']
  attentions['regularised_as_printed'] = modified.regularised_as_printed(
    strength=0.5
  )
  for select, renormalise in (
    (modified.highest_scores, modified.scale_others),
    (modified.random_choice(jax.random.key(2)), modified.raise_others),
    (modified.lowest_scores, modified.unnormalised),
  ):
    name = f'negative, {renormalise.__name__}'
    attentions[name] = negative(select=select, renormalise=renormalise)
  return {
    f'{name}, one query': lambda t, attend=attend: attend(
      phi, t.query, t.keys, t.values, mask=t.mask
    )
    for name, attend in attentions.items()
  }


def all_cases():
  return {
    f'{module}.{name}': case
    for module, make in (
      ('attention', cases_of_attention),
      ('dual', cases_of_dual),
      ('modified', cases_of_modified),
    )
    for phi in (PHI, KERNEL)
    for name, case in make(phi).items()
  }


def battery():
  """All cases on sharded rows, on sharded heads, and inside `shard_map`."""
  cases, tokens = all_cases(), draw()
  parts = jax.tree.map(
    lambda x: x.reshape(NUM_DEVICES, -1, *x.shape[1:]), tokens[2:]
  )
  parts = Tokens(*(jnp.stack([x] * NUM_DEVICES) for x in tokens[:2]), *parts)
  of_heads = {name: jax.vmap(case) for name, case in cases.items()}

  def inside(case, tokens):
    return jax.tree.map(lambda x: x[None], case(tokens))

  in_shard_map = {
    name: jax.shard_map(
      functools.partial(inside, case),
      mesh=make_mesh(),
      in_specs=(SPECS,),
      out_specs=SPLIT,
    )
    for name, case in cases.items()
  }
  # Explicit axes are computed with as automatic ones: that covers all of these.
  some = [name for name in cases if name in SOME]
  expected, expected_parts = run(cases, tokens), run(of_heads, parts)
  explicit = AxisType.Explicit
  modes = {
    'shard_map': (in_shard_map, tokens, expected_parts, cases),
    'explicit rows': (cases, put(tokens, explicit, SPECS), expected, cases),
    'auto rows': (cases, put(tokens, AxisType.Auto, SPECS), expected, some),
    'explicit heads': (
      of_heads,
      put(parts, explicit, Tokens(*[SPLIT] * 6)),
      expected_parts,
      some,
    ),
  }
  report = {}
  for mode, (functions, arrays, right, names) in modes.items():
    found = run({name: functions[name] for name in names}, arrays)
    report |= {f'{mode}: {n}': compare(found[n], right[n]) for n in names}
  return report


def put(tokens, kind, specs):
  mesh = make_mesh(kind)
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tokens, specs
  )


def run(functions, tokens):
  """Results of all functions in one program; text where one does not trace."""

  def program(tokens):
    for name, function in functions.items():
      try:
        results[name] = function(tokens)
      except Exception as error:
        failures[name] = f'{type(error).__name__}: {error}'[:500]
    return results

  results: dict[str, Any] = {}
  failures: dict[str, str] = {}
  return jax.device_get(jax.jit(program)(tokens)) | failures


def compare(found, right):
  """The largest error relative to the largest number."""
  if isinstance(found, str) or isinstance(right, str):
    return str(found if isinstance(found, str) else right)
  worst = 0.0
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
  for a, b in pairs:
    if a.shape != b.shape:
      return f'shapes {a.shape} and {b.shape}'
    if a.size:
      scale = max(float(abs(b).max()), 1e-30)
      worst = max(worst, float(abs(a - b).max()) / scale)
  return worst


def across_devices():
  """What devices merge, against one device that holds all tokens."""
  report = {}
  for name, tokens in {'plain': draw(), 'steep': draw(scale=20.0)}.items():
    for phi in (PHI, KERNEL):
      kind = f'{name}, {type(phi).__name__}'
      report |= {f'{c}, {kind}': x for c, x in merges(phi, tokens).items()}
  return report


def merges(phi, tokens):
  def shard(function, *out_specs):
    return jax.jit(
      jax.shard_map(
        function, mesh=make_mesh(), in_specs=(SPECS,), out_specs=out_specs
      )
    )

  def learn(t):
    state = dual.empty(phi, t.keys, t.values)
    return dual.one_step_autodiff(phi, state, t.keys, t.values, mask=t.mask)

  def answer(t):
    return (dual.predict(phi, dual.all_merge(learn(t), AXIS), t.query),)

  def attend(t):
    state = dual.zero_shot(phi, t.keys, t.values, mask=t.mask)
    reading = dual.all_merge(dual.read(phi, state, t.query), AXIS)
    return (reading.numerator / reading.denominator,)

  def causal(t):
    past = dual.zero_shot(phi, t.keys, t.values, mask=t.mask)
    past = dual.prefix_merge(past, AXIS)
    return (
      attention.causal_kernel_attention(
        phi, t.queries, t.keys, t.values, start=past, mask=t.mask, **CHUNK
      ),
    )

  def slopes(function):
    def objective(rows):
      queries, keys, values = rows
      changed = {'queries': queries, 'keys': keys, 'values': values}
      return jnp.sum(jnp.sin(function(tokens._replace(**changed))[0]))

    return jax.grad(objective)((tokens.queries, tokens.keys, tokens.values))

  exact = attention.kernel_attention(
    phi, tokens.query, tokens.keys, tokens.values, mask=tokens.mask
  )
  weights = attention.weights(phi, tokens.query, tokens.keys, mask=tokens.mask)
  size = jnp.abs(tokens.values) + jnp.abs(exact)[None]

  def residual(found):
    return float(jnp.max(jnp.abs(found - exact)) / jnp.max(weights @ size))

  whole = functools.partial(
    attention.causal_kernel_attention, phi, mask=tokens.mask, **CHUNK
  )
  expected = whole(tokens.queries, tokens.keys, tokens.values)
  right = slopes(lambda t: (whole(t.queries, t.keys, t.values),))
  return {
    'certificate': residual(shard(answer, WHOLE)(tokens)[0]),
    'readings': residual(shard(attend, WHOLE)(tokens)[0]),
    'causal': compare(shard(causal, SPLIT)(tokens)[0], expected),
    'causal slope': compare(slopes(shard(causal, SPLIT)), right),
  }


def num_bytes():
  """Bytes of the collectives of one step, for two numbers of rows."""

  def step(t):
    state = dual.zero_shot(PHI, t.keys, t.values)
    return dual.all_merge(state, AXIS)

  in_shard_map = jax.shard_map(
    step, mesh=make_mesh(), in_specs=(SPECS,), out_specs=WHOLE
  )
  report = {}
  for rows in (64, 640):
    tokens = put(draw(rows), AxisType.Auto, SPECS)
    plain = jax.jit(lambda t: dual.zero_shot(PHI, t.keys, t.values))
    for mode, program in (('shard_map', jax.jit(in_shard_map)), ('jit', plain)):
      text = program.lower(tokens).compile().as_text()
      report[f'{mode}, {rows} rows'] = scaling.collective_bytes(text)
  return report


def of_models():
  """Prompts that the devices share, read by a model that each has."""
  model = families.model_of('gpt_oss')
  tokens = jnp.arange(NUM_DEVICES * 5, dtype=jnp.int32).reshape(-1, 5)
  labels = jnp.array([3, 4]), jnp.array([7])

  def answers(tokens):
    rest = jnp.full_like(tokens, -1)
    parts = attribution.attribute(model, tokens, rest, *labels, num_segments=1)
    first = rest.at[1:3].set(0)
    return {
      'generate': pretrained.generate(model, tokens, num_tokens=3),
      'score_labels': pretrained.score_labels(model, tokens, labels),
      'attribute': parts.rest,
      'influence': attribution.influence(
        model, tokens, first, *labels, num_segments=1
      ),
      'effects': attribution.effects_of_removal(
        model, tokens, first, *labels, num_segments=1
      ),
    }

  right = jax.jit(functools.partial(jax.lax.map, answers))(tokens)
  split = jax.shard_map(
    jax.vmap(answers), mesh=make_mesh(), in_specs=(SPLIT,), out_specs=SPLIT
  )
  found = jax.jit(split)(tokens)
  return {name: compare(found[name], right[name]) for name in right}


def on_two_hosts():
  """The error of what this host holds of a merged state."""
  mesh = jax.make_mesh((4,), (AXIS,), axis_types=(AxisType.Auto,))
  tokens = draw(64)

  def spread(x):
    sharding = NamedSharding(mesh, SPLIT)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  def learn(keys, values):
    return dual.all_merge(dual.zero_shot(PHI, keys, values), AXIS)

  split = jax.shard_map(
    learn, mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=WHOLE
  )
  found = jax.jit(split)(spread(tokens.keys), spread(tokens.values))
  found = jax.tree.map(lambda x: x.addressable_data(0), found)
  right = dual.zero_shot(PHI, tokens.keys, tokens.values)
  return {'devices': jax.device_count(), 'error': compare(found, right)}


if __name__ == '__main__':
  checks = (
    (on_two_hosts,)
    if HOST
    else (*(across_devices, num_bytes, battery, of_models),)
  )
  print(json.dumps({check.__name__: check() for check in checks}))
