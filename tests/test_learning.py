"""Heads that learn otherwise: against plain passes, and to first order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import losses, modified, pretrained
from iclcl_jax.pretrained import attribution, learning
from tests import families, test_influence
from tests.tolerances import IDENTITY

TOKENS = test_influence.TOKENS
SEGMENTS = np.array([-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1], np.int32)
LABELS = 3, 17
WORDS = np.array([3, 9, 3]), np.array([17])
NAMES = 'llama-grouped-tied', 'gemma2', 'gpt_oss', 'qwen3'
NONE = learning.Learning()
TIGHT = {'rtol': 0, 'atol': 1e-11}


def model_of(name='llama-grouped-tied', dtype='float64'):
  return families.model_of(name, dtype)


@jax.jit
def logits(model, tokens, how, heads=None, mask=None):
  return learning.logits(model, tokens, how, heads=heads, mask=mask)


@functools.partial(jax.jit, static_argnames='removal')
def effects(model, how, labels, removal, heads=None):
  found = learning.effect_on_answer(model, TOKENS, how, *labels, heads=heads)
  arguments = model, TOKENS, SEGMENTS, *labels
  options = {'num_segments': 3, 'removal': removal}
  return (
    found,
    attribution.influence(*arguments, **options),
    attribution.effects_of_removal(*arguments, **options),
  )


@pytest.mark.parametrize('name', NAMES)
def test_what_learns_as_before_answers_as_before(name):
  model = model_of(name)
  expected = pretrained.logits(model, TOKENS)
  ones = learning.with_rates(SEGMENTS, jnp.ones(3))
  nobody = np.zeros((model.num_layers, 4), bool)
  hidden = learning.with_rates(SEGMENTS, jnp.zeros(3))
  for how, heads in ((NONE, None), (ones, None), (hidden, nobody)):
    found = logits(model, TOKENS, how, heads)
    np.testing.assert_allclose(found, expected, **TIGHT)


@pytest.mark.parametrize(
  ('name', 'labels'),
  [*zip(NAMES, (WORDS, LABELS, WORDS, LABELS), strict=True)],
  ids=NAMES,
)
def test_a_rate_of_zero_hides(name, labels):
  how = learning.with_rates(SEGMENTS, jnp.array([1.0, 0.0, 1.0]))
  found, influence, exact = effects(model_of(name), how, labels, 'hide')
  np.testing.assert_allclose(found.predicted, -influence[..., 1], **TIGHT)
  np.testing.assert_allclose(found.actual, -exact[1], **TIGHT)


@pytest.mark.parametrize('labels', [LABELS, WORDS], ids=['tokens', 'strings'])
def test_hidden_and_moved_up_is_deleted(labels):
  kept = SEGMENTS != 1
  how = learning.with_rates(SEGMENTS, jnp.array([1.0, 0.0, 1.0]))
  moved = np.where(kept, np.cumsum(kept) - 1, np.arange(len(kept)))
  how = learning.Learning(rates=how.rates, positions=moved)
  found, influence, exact = effects(model_of(), how, labels, 'delete')
  np.testing.assert_allclose(found.predicted, -influence[..., 1], **TIGHT)
  np.testing.assert_allclose(found.actual, -exact[1], **TIGHT)


def test_the_slope_in_the_rates_is_that_of_the_prediction():
  """Of rates near 1, the first order is all there is."""
  step = 1e-5
  how = learning.with_rates(SEGMENTS, jnp.array([1.0, 1 + step, 1.0]))
  found, *_ = effects(model_of(), how, LABELS, 'hide')
  gap = jnp.sum(found.predicted) - found.actual
  assert abs(gap) < 1e-3 * abs(found.actual)
  assert abs(found.actual) > 1e-3 * step


@pytest.mark.parametrize('name', NAMES)
def test_a_rate_of_zero_has_its_slope(name):
  model = model_of(name)

  @jax.jit
  @jax.vmap
  @jax.value_and_grad
  def answer(rates):
    how = learning.with_rates(SEGMENTS, rates)
    return learning.effect_on_answer(model, TOKENS, how, *LABELS).actual

  step = 1e-6
  rates = np.array([1.0, 0.5, 0.0]) + step * np.eye(4, 3, k=-1)
  (at, *moved), slopes = jax.device_get(answer(rates))
  np.testing.assert_allclose(slopes[0], (moved - at) / step, rtol=1e-3)
  assert abs(slopes[0, 2]) > 1e-3


@pytest.mark.parametrize('name', NAMES)
def test_demonstrations_alone_have_no_order(name):
  model = model_of(name)
  order = [0, 7, 8, 9, 1, 2, 3, 4, 5, 6, 10, 11]
  rows = []
  for tokens in (TOKENS, TOKENS[order]):
    how = learning.alone(SEGMENTS, num_segments=3)
    rows.append(logits(model, tokens, how)[-2:])
  np.testing.assert_allclose(*rows, **TIGHT)
  apart = learning.alone(SEGMENTS, num_segments=3, share_positions=False)
  assert np.max(np.abs(logits(model, TOKENS, apart)[-1] - rows[0][1])) > 1e-6


def test_one_demonstration_alone_is_the_prompt_itself():
  segments = np.where(SEGMENTS >= 0, 0, -1)
  how = learning.alone(segments, num_segments=1)
  np.testing.assert_array_equal(how.positions, np.arange(len(TOKENS)))
  found = logits(model_of(), TOKENS, how)
  np.testing.assert_allclose(
    found, pretrained.logits(model_of(), TOKENS), **TIGHT
  )


@pytest.mark.parametrize(
  ('name', 'attend'),
  [
    ('llama-grouped-tied', modified.attention_from_loss(losses.contrastive)),
    ('olmo2', modified.attention_from_loss(losses.contrastive)),
    ('phi3-plain', modified.attention_from_loss(losses.contrastive)),
    ('olmo2', modified.second_step(learning_rate=0.0)),
    ('phi3-plain', modified.regularised(strength=0.0)),
  ],
)
def test_the_loss_of_attention_is_attention(name, attend):
  model = model_of(name)
  how = learning.Learning(attend=attend)
  found = logits(model, TOKENS, how)
  expected = pretrained.logits(model, TOKENS)
  scale = np.max(np.abs(expected))
  assert np.max(np.abs(found - expected)) <= IDENTITY['float64'] * scale


def test_another_loss_in_one_head_is_another_model():
  model = model_of()
  heads = np.zeros((model.num_layers, 4), bool)
  heads[1, 2] = True
  how = learning.Learning(attend=modified.regularised(strength=1e-5))
  found, *_ = effects(model, how, LABELS, 'hide', heads)
  assert np.flatnonzero(found.predicted).tolist() == [6]
  assert abs(found.predicted[1, 2] - found.actual) < 1e-3 * abs(found.actual)


@pytest.mark.parametrize('pad', [(0, 3), (2, 1)])
@pytest.mark.parametrize('kind', ['rates', 'alone', 'attend'])
def test_padding_changes_nothing(kind, pad):
  def of(segments, mask=None):
    return {
      'rates': learning.with_rates(segments, jnp.array([0.5, 0.0, 2.0])),
      'alone': learning.alone(segments, num_segments=3, mask=mask),
      'attend': learning.Learning(attend=modified.second_step()),
    }[kind]

  model = model_of()
  fill = functools.partial(np.pad, pad_width=pad)
  mask = fill(np.ones(len(TOKENS), bool))
  how = of(fill(SEGMENTS, constant_values=-1), mask)
  expected = logits(model, TOKENS, of(SEGMENTS))
  found = logits(model, fill(TOKENS), how, None, mask)[mask]
  np.testing.assert_allclose(found, expected, **TIGHT)


def test_transformations_and_half_precision():
  model = model_of(dtype='float32')

  def size(rates):
    how = learning.with_rates(SEGMENTS, rates)
    return jnp.sum(logits(model, TOKENS, how)[-1] ** 2)

  slopes = jax.grad(size)(jnp.array([0.0, 0.5, 1.0], 'float32'))
  assert np.all(np.isfinite(slopes))
  many = jax.vmap(size)(jnp.eye(3, dtype='float32'))
  np.testing.assert_allclose(many[1], size(jnp.eye(3)[1]), rtol=1e-4)
  half = jax.tree.map(lambda x: x.astype('bfloat16'), model)
  how = learning.Learning(attend=modified.second_step())
  found = logits(half, TOKENS, how)
  assert found.dtype == jnp.bfloat16
  assert np.all(np.isfinite(np.asarray(found, 'float32')))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'how': 'rates'}, r'learning is a str; expected a Learning'),
    (
      {'how': learning.Learning(rates=jnp.ones((3, 3)))},
      'tokens and learning.rates disagree in N',
    ),
    (
      {'how': learning.Learning(rates=-jnp.ones((12, 12)))},
      r'learning.rates holds -1.0; expected finite numbers from 0 on',
    ),
    (
      {'how': learning.Learning(positions=jnp.arange(3))},
      'tokens and learning.positions disagree in N',
    ),
    (
      {'how': learning.Learning(attend=losses.squared)},
      'learning.attend is a function; expected an attention of modified',
    ),
    (
      {
        'how': learning.Learning(
          attend=modified.second_step(), rates=jnp.ones((12, 12))
        )
      },
      'learning.attend was given beside rates',
    ),
    (
      {
        'how': learning.Learning(attend=modified.second_step()),
        'name': 'gpt_oss',
      },
      'learning.attend was given beside sinks',
    ),
    ({'heads': np.ones((2, 4), bool)}, 'heads and model disagree in L'),
    ({'heads': np.ones((3, 4))}, 'heads'),
    ({'tokens': np.array([], np.int32)}, 'tokens is empty'),
  ],
)
def test_bad_input_is_named(change, message):
  model = model_of(change.get('name', 'llama-grouped-tied'))
  how, heads = change.get('how', NONE), change.get('heads')
  tokens = change.get('tokens', TOKENS)
  with pytest.raises(ValueError, match=message):
    learning.logits(model, tokens, how, heads=heads)
  with pytest.raises(ValueError, match=message):
    learning.effect_on_answer(model, tokens, how, *LABELS, heads=heads)


def test_bad_segments_and_rates_are_named():
  with pytest.raises(ValueError, match='segment_ids holds 2; expected'):
    learning.with_rates(SEGMENTS, jnp.ones(2))
  with pytest.raises(ValueError, match='segment_ids holds 2; expected'):
    learning.alone(SEGMENTS, num_segments=2)
