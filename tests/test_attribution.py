"""Attribution sums to the logit difference; removal is that of the dual model.

Random models of each family: Llama (untied with every bias, tied), GPT-2, and
BERT's post-norm blocks made causal, with the transposed embedding as head.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab
from iclcl_jax import dual, kernels, losses, pretrained, transformer
from iclcl_jax.pretrained import Checkpoint, attribution
from iclcl_jax.pretrained.attribution import _readings
from tests import oracles_pretrained as oracles, tolerances

CONFIGS = {
  'llama': (oracles.LLAMA, oracles.llama_shapes),
  'tied llama': (
    oracles.LLAMA | {'tie_word_embeddings': True, 'attention_bias': False},
    oracles.llama_shapes,
  ),
  'gpt2': (oracles.GPT2, oracles.gpt2_shapes),
  'post-norm': (oracles.BERT, oracles.bert_shapes),
}
NAMES = tuple(CONFIGS)
TOKENS = np.array([5, 0, 22, 7, 7, 13, 1, 3, 19, 4, 11, 2])
SPANS = ((1, 4), (4, 6), (6, 9))
SEGMENTS = np.array([-1, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1, -1], np.int32)
NUM_SEGMENTS = len(SPANS)
LABEL, OTHER, LAST = 3, 17, len(TOKENS) - 1
KERNEL = kernels.ExponentialKernel()

MASK = np.ones(len(TOKENS), bool)


def trace_layers(model, tokens):
  """What stands in every layer, and attention without each demonstration."""
  architecture, positions = model.architecture, jnp.arange(tokens.shape[0])

  def step(x, block):
    heads = transformer.heads(architecture, block, x)

    def attend(mask):
      return transformer.attend(
        architecture,
        heads._replace(queries=heads.queries[:, -1:]),
        positions[-1:],
        positions,
        mask=mask,
      )[:, 0]

    kept = np.stack([s != SEGMENTS for s in range(NUM_SEGMENTS)])
    outputs = attend(None), jnp.stack([attend(mask) for mask in kept], axis=1)
    return transformer.apply_block(architecture, block, x), (x, heads, outputs)

  return jax.lax.scan(step, pretrained.embed(model, tokens), model.blocks)[1]


@lab.compile_quickly
def measure(model, tokens, segments, position, mask):
  """Attribution and logits of one family, compiled once."""
  readings = attribution.read_heads(
    model,
    tokens,
    segments,
    num_segments=NUM_SEGMENTS,
    mask=mask & (np.arange(len(tokens)) <= position),
  )
  parts = attribution.direct_logit_attribution(model, readings, LABEL, OTHER)
  return readings, parts, pretrained.logits(model, tokens, mask=mask)


@lab.compile_quickly
def demonstration_gradients(model, tokens, segments, mask):
  return attribution.demonstration_gradients(
    model, tokens, segments, num_segments=NUM_SEGMENTS, mask=mask
  )


read_segments = lab.compile_quickly(_readings._read_segments)
gradients = lab.compile_quickly(_readings._gradients)
trace = lab.compile_quickly(trace_layers)


@functools.cache
def model_of(name, dtype='float64'):
  config, shapes = CONFIGS[name]
  tensors = oracles.random_tensors(shapes(config), seed=9)
  model = pretrained.from_checkpoint(Checkpoint(config, tensors), dtype=dtype)
  if name == 'llama':
    bias = np.random.default_rng(4).normal(size=model.vocabulary_size)
    head = model.head._replace(bias=jnp.asarray(bias, dtype))
    return dataclasses.replace(model, head=head)
  if name != 'post-norm':
    return model
  architecture = dataclasses.replace(
    model.architecture, visible=transformer.causal
  )
  return dataclasses.replace(model, architecture=architecture, tied=True)


@functools.cache
def measured(name, dtype='float64', position=LAST):
  model = model_of(name, dtype)
  return measure(model, TOKENS, SEGMENTS, np.array(position), MASK)


def readings_of(name):
  return measured(name)[0]


def attribution_of(name, dtype='float64'):
  return measured(name, dtype)[1]


@functools.cache
def gradients_of(name):
  return demonstration_gradients(model_of(name), TOKENS, SEGMENTS, MASK)


@functools.cache
def layers_of(name):
  """Residual stream, heads and their outputs, stacked over layers."""
  return jax.device_get(trace(model_of(name), TOKENS))


def expected_difference(name, dtype='float64', position=-1):
  row = measured(name, dtype)[2][position]
  return float(row[LABEL] - row[OTHER])


def assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def scale_of(result):
  """Sum of the absolute values of all terms: what rounding can cause."""
  terms = result._replace(
    logit_difference=0.0, removal_effects=0.0, directions=0.0
  )
  return sum(float(np.sum(np.abs(leaf))) for leaf in jax.tree.leaves(terms))


@pytest.mark.parametrize('name', NAMES)
def test_attribution_sums_to_logit_difference(name, dtype):
  result = attribution_of(name, dtype.name)
  tolerance = tolerances.IDENTITY[dtype.name] * scale_of(result)
  expected = expected_difference(name, dtype.name)
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(result))
  assert abs(expected) > 0.1
  assert abs(float(result.total) - expected) <= tolerance
  assert abs(float(result.logit_difference) - expected) <= tolerance
  assert float(np.abs(result.contributions).max()) > 1e-3


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('position', [2, 7])
def test_attribution_sums_at_every_position(name, position):
  result = measured(name, position=position)[1]
  gap = float(result.total) - expected_difference(name, position=position)
  assert abs(gap) <= 1e-12 * scale_of(result)
  if position == 2:  # The other demonstrations come later.
    assert not np.any(result.contributions[:, :, 1:])
    assert np.abs(result.removal_effects[:, :, 1:]).max() <= 1e-12


@pytest.mark.parametrize('name', NAMES)
def test_segments_sum_to_outputs_of_heads(name):
  readings = readings_of(name)
  stream, heads, (outputs, _) = layers_of(name)
  assert_close(readings.stream, stream[:, -1])
  assert_close(np.sum(readings.outputs, axis=2), outputs)
  assert_close(np.sum(np.exp(readings.log_shares), axis=2), 1)
  share = heads.queries.shape[1] // heads.keys.shape[1]
  keys = np.repeat(heads.keys, share, axis=1)
  scores = np.einsum('lhd,lhnd->lhn', heads.queries[:, :, -1], keys)
  mass = np.sum(np.exp(scores / keys.shape[3] ** 0.5), axis=2)
  assert_close(readings.log_normalisers, np.log(mass))


@pytest.mark.parametrize('name', NAMES)
def test_contributions_of_last_layer_are_those_of_its_labels(name):
  """Attention weight times folded label, normalised and read by the head."""
  model, readings = model_of(name), readings_of(name)
  _, heads, _ = layers_of(name)
  block, point = jax.tree.map(
    lambda leaf: leaf[-1], (model.blocks, readings.points)
  )
  labels = transformer.fold_labels(
    model.architecture, block, point, heads.values[-1]
  )
  if model.final_norm is not None:
    labels = jax.vmap(
      jax.vmap(
        lambda row: model.architecture.normalization.linear_part(
          model.final_norm, readings.last, row
        )
      )
    )(labels)
  if model.head is None:
    direction = model.embedding[LABEL] - model.embedding[OTHER]
  else:
    direction = model.head.weight[:, LABEL] - model.head.weight[:, OTHER]
  share = heads.queries.shape[1] // heads.keys.shape[1]
  keys = np.repeat(heads.keys[-1], share, axis=0)
  scores = np.einsum('hd,hnd->hn', heads.queries[-1, :, -1], keys)
  weights = np.exp(scores / keys.shape[2] ** 0.5)
  weights /= weights.sum(axis=1, keepdims=True)
  terms = weights * np.asarray(labels @ direction)
  expected = [terms[:, s == SEGMENTS].sum(1) for s in range(NUM_SEGMENTS)]
  found = attribution_of(name)
  assert_close(found.contributions[-1], np.stack(expected, axis=1))
  assert_close(found.rest[-1], terms[:, SEGMENTS == -1].sum(1))


@pytest.mark.parametrize('name', NAMES)
def test_removal_equals_attention_with_masked_keys(name):
  _, _, (outputs, expected) = layers_of(name)
  assert_close(readings_of(name).removed_outputs, expected)
  assert np.abs(expected - outputs[:, :, None]).max() > 1e-2


def test_removal_equals_that_of_dual_state():
  """Token after token out of the trained state, then one prediction."""
  _, heads, _ = layers_of('llama')
  keys, values = heads.keys[1, 1], heads.values[1, 1]
  state = dual.zero_shot(KERNEL, keys[-1:], values[-1:])
  state = dual.one_step(KERNEL, state, keys[:-1], values[:-1])
  for index in range(*SPANS[1]):
    state = dual.remove(KERNEL, state, keys[index], values[index]).state
  expected = dual.predict(KERNEL, state, heads.queries[1, 3, -1])
  assert_close(readings_of('llama').removed_outputs[1, 3, 1], expected)


@pytest.mark.parametrize('name', NAMES)
def test_removal_effect_is_exact_for_one_head_of_last_attention(name):
  """The effect is the change of the sum when one term is exchanged."""
  model, readings = model_of(name), readings_of(name)
  changed = (
    jnp.sum(readings.outputs, axis=2) - readings.removed_outputs[:, :, 1]
  )
  rows = jnp.einsum('lhd,lhdm->lhm', changed, model.blocks.output.weight)
  expected = jnp.einsum('lhm,lm->lh', rows, attribution_of(name).directions)
  np.testing.assert_allclose(
    attribution_of(name).removal_effects[:, :, 1], expected, atol=1e-12
  )


def test_removal_loses_no_digits_where_one_demonstration_has_all_the_weight():
  """Subtraction and division by what is left would give nothing but noise."""
  rng = np.random.default_rng(3)
  query = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)
  keys = rng.normal(size=(1, 6, 4))
  keys[0, :3] += 100 * np.asarray(query)
  keys, values = (
    jnp.asarray(keys, jnp.float32),
    jnp.asarray(rng.normal(size=(1, 6, 4)), jnp.float32),
  )
  members = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], bool)
  outputs, log_shares, _, removed, _ = read_segments(
    query, keys, values, members
  )
  scores = np.asarray(keys[0, 3:], np.float64) @ np.asarray(query[0]) / 2
  weights = np.exp(scores - scores.max())
  expected = weights @ np.asarray(values[0, 3:]) / weights.sum()
  np.testing.assert_allclose(removed[0, 0], expected, atol=1e-5)
  assert log_shares[0, 1] < -80
  assert np.all(np.isfinite(outputs))


def test_a_head_that_sees_nothing_else_gives_zeros():
  members = jnp.array([[True, True], [False, False]])
  ones = jnp.ones((1, 2, 4))
  outputs, log_shares, _, removed, _ = read_segments(
    ones[:, 0], ones, ones, members
  )
  assert not np.any(removed)
  assert np.all(outputs[0, 0] == 1)
  assert log_shares[0].tolist() == [0, -np.inf]


def gram_of(keys, values):
  """Inner products of all gradients, in NumPy."""
  keys, values = np.asarray(keys), np.asarray(values)
  kernel = np.exp(keys @ keys.T / keys.shape[1] ** 0.5)
  chosen = np.stack([s == SEGMENTS for s in range(NUM_SEGMENTS)]) * 1.0
  return chosen @ (kernel * (values @ values.T)) @ chosen.T


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_gradient_norms_and_loss_drops_equal_their_definition(name):
  found, (_, heads, _) = gradients_of(name), layers_of(name)
  grams = np.array(
    [
      [gram_of(*pair) for pair in zip(keys, values, strict=True)]
      for keys, values in zip(heads.keys, heads.values, strict=True)
    ]
  )
  total = grams.sum((2, 3))
  norms = np.diagonal(grams, axis1=2, axis2=3)
  assert_close(found.log_norms, np.log(norms) / 2)
  assert_close(found.log_loss_drops, np.log(total))
  assert_close(found.drop_shares, grams.sum(3) / total[..., None])
  assert np.ptp(found.drop_shares) > 0.1


def test_loss_drop_is_that_of_the_dual_models_loss():
  """The contrastive loss of predictions before and after `dual.one_step`."""
  _, heads, _ = layers_of('gpt2')
  inside = np.flatnonzero(SEGMENTS >= 0)
  keys, values = heads.keys[0, 0, inside], heads.values[0, 0, inside]
  start = dual.zero_shot(KERNEL, keys[:0], values[:0])
  state = dual.one_step(KERNEL, start, keys, values)
  predictions = np.stack(
    [dual.predict(KERNEL, state, key, normaliser=np.ones(())) for key in keys]
  )
  drop = -losses.contrastive(jnp.asarray(predictions), jnp.asarray(values))
  found = gradients_of('gpt2').log_loss_drops[0, 0]
  assert_close(found, np.log(drop))


def test_gradients_of_large_keys_do_not_overflow():
  rng = np.random.default_rng(5)
  keys = jnp.asarray(rng.normal(size=(5, 4)) * 60, jnp.float32)
  values = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
  members = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
  found = gradients(keys, values, members)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
  assert float(found.log_norms.min()) > 500
  np.testing.assert_allclose(np.sum(found.drop_shares), 1, rtol=1e-5)


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
@pytest.mark.parametrize('order', [1, -1], ids=['right', 'left'])
def test_padding_changes_nothing(name, order):
  """The first ten tokens alone, at their last: a causal model sees no more."""
  size = 10
  mask = (np.arange(len(TOKENS)) < size)[::order]
  tokens, segments = np.zeros_like(TOKENS), np.zeros_like(SEGMENTS)
  tokens[mask], segments[mask] = TOKENS[:size], SEGMENTS[:size]
  last = np.flatnonzero(mask)[-1]
  found = measure(model_of(name), tokens, segments, last, mask)
  expected = measured(name, position=size - 1)
  jax.tree.map(assert_close, found[:2], expected[:2])
  assert_close(found[2][mask], expected[2][:size])


def test_padding_changes_no_gradient():
  mask = np.arange(len(TOKENS)) >= 2
  tokens, segments = np.roll(TOKENS, 2), np.roll(SEGMENTS, 2)
  segments[:2] = 0
  right = np.where(mask[::-1], TOKENS, 0), SEGMENTS, mask[::-1]
  expected = demonstration_gradients(model_of('gpt2'), *right)
  found = demonstration_gradients(model_of('gpt2'), tokens, segments, mask)
  jax.tree.map(assert_close, found, expected)


class Words:
  """A tokenizer that cuts at blanks, after one added token."""

  def spans(self, text, *, add_special_tokens):
    edges = [0, *(i for i, c in enumerate(text) if c == ' '), len(text)]
    return np.array([(0, 0), *itertools.pairwise(edges)])


TEXT = 'one two three four'


def test_a_token_belongs_to_the_span_in_which_it_begins():
  found = attribution.mark_spans(Words(), TEXT, [(0, 5), (7, 18)])
  assert found.tolist() == [-1, 0, 0, 1, 1]
  texts = attribution.mark_spans(Words(), TEXT, ['one t', (7, 9), ' four'])
  assert texts.tolist() == [-1, 0, 0, 1, 2]
  # What is listed as often as it stands there is no riddle.
  twice = attribution.mark_spans(Words(), 'ab cd ab ', ['ab ', 'ab '])
  assert twice.tolist() == [-1, 0, 0, -1, 1]


@pytest.mark.parametrize(
  ('spans', 'message'),
  [
    ([], r'spans is \[\]; expected a list of at least'),
    ([(0, 4), (3, 9)], r'overlaps with spans.0.'),
    ('one', "spans is 'one'; expected a list"),
    (
      [' two', 'one'],
      r'spans.1. is .one., which the text holds 0 times behind character 7',
    ),
    ([(3, 3)], 'begin < end'),
    ([(-1, 3)], '0 <= begin'),
    ([(0, 19)], 'the number of characters'),
    ([(4, 6)], 'no token begins'),
    ([5], 'expected two integers'),
    ([(0.5, 2)], 'expected two integers'),
    (None, 'spans is None; expected a list'),
    (['o'], r'which the text holds 3 times behind character 0.*a pair: begin'),
    ([' two', 'e'], r'spans.1. is .e., which the text holds 2 times'),
  ],
)
def test_bad_spans_are_errors(spans, message):
  with pytest.raises(ValueError, match=message):
    attribution.mark_spans(Words(), TEXT, spans)


def call(**changes):
  """`attribute` with some arguments exchanged."""
  arguments = {
    'model': model_of('llama'),
    'tokens': TOKENS,
    'segment_ids': SEGMENTS,
    'label': LABEL,
    'other_label': OTHER,
    'num_segments': NUM_SEGMENTS,
  }
  return attribution.attribute(**(arguments | changes))


@functools.cache
def encoder(visible=transformer.bidirectional, tied=True):
  model = model_of('post-norm')
  architecture = dataclasses.replace(model.architecture, visible=visible)
  return dataclasses.replace(model, architecture=architecture, tied=tied)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (lambda: {'model': encoder()}, 'bidirectional'),
    (lambda: {'model': encoder(transformer.causal, False)}, 'without a head'),
    (lambda: {'model': 3}, 'expected a pretrained.LanguageModel'),
    (
      lambda: {'tokens': TOKENS[:0], 'segment_ids': SEGMENTS[:0]},
      'tokens is empty',
    ),
    (
      lambda: {'segment_ids': SEGMENTS[1:]},
      'tokens and segment_ids disagree in N: 12 and 11',
    ),
    (
      lambda: {'segment_ids': SEGMENTS * 0.5},
      'segment_ids has dtype float64; expected an',
    ),
    (lambda: {'num_segments': 2}, 'segment_ids holds 2'),
    (lambda: {'num_segments': 0}, 'num_segments is 0'),
    (lambda: {'label': 23}, 'label holds 23'),
    (lambda: {'other_label': -1}, 'other_label holds -1'),
    (
      lambda: {'label': ' Positive'},
      "label is ' Positive'; expected the ids",
    ),
    (lambda: {'label': OTHER}, 'two labels'),
    (lambda: {'label': 3.0}, 'label is 3.0; expected the ids'),
    (lambda: {'mask': TOKENS < 0}, 'mask excludes every token'),
  ],
)
def test_bad_arguments_are_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    call(**changes())


@pytest.mark.parametrize('name', ['read_heads', 'demonstration_gradients'])
def test_nothing_of_all_layers_and_all_tokens_is_held(name):
  model, function = model_of('llama'), getattr(attribution, name)
  traced = jax.make_jaxpr(functools.partial(function, num_segments=1))(
    model, jnp.zeros(16, int), jnp.zeros(16, jnp.int32)
  )
  scans = [e for e in traced.eqns if e.primitive.name == 'scan']
  shapes = [v.aval.shape for e in scans for v in e.outvars]
  stacked = [shape for shape in shapes if shape[:1] == (model.num_layers,)]
  assert len(stacked) >= 3
  assert not any(16 in shape for shape in stacked)
