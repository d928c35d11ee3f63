"""Influence is the derivative that it claims to be; effects are those of
deleted and hidden text, whatever the family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab
from iclcl_jax import pretrained, transformer
from iclcl_jax.pretrained import attribution
from tests import families, test_attribution

TOKENS = np.array([5, 0, 22, 7, 7, 13, 1, 3, 19, 4, 11, 2])
SEGMENTS = np.array([-1, 0, 0, 0, 1, 1, -1, 2, 2, 2, -1, -1], np.int32)
WORDS = np.array([3, 9, 3]), np.array([17])
LABELS = 3, 17
# A scaled rotation; windows, caps and norms of the outputs; sinks and experts;
# learned positions.
CASES = [
  ('llama-yarn', 'delete'),
  ('gemma2', 'delete'),
  ('gemma2', 'hide'),
  ('gpt_oss', 'delete'),
  ('gpt2', 'delete'),
  ('gpt2', 'hide'),
]


@functools.cache
def model_of(name, dtype='float64'):
  return (test_attribution if name == 'gpt2' else families).model_of(
    name, dtype
  )


@functools.partial(lab.compile_quickly, static_argnames=('removal', 'rows'))
def both(model, tokens, segments, mask, labels, removal, rows=None):
  arguments = model, tokens, segments, *labels
  options = {'num_segments': 3, 'removal': removal, 'mask': mask}
  return (
    attribution.influence(*arguments, **options),
    attribution.effects_of_removal(*arguments, num_rows=rows, **options),
  )


def measured(name, removal, labels=LABELS, pad=(0, 0), rows=None, dtype=None):
  """What the library says, of a prompt padded on both sides."""
  fill = functools.partial(np.pad, pad_width=pad)
  mask = fill(np.ones(len(TOKENS), bool))
  segments = fill(SEGMENTS, constant_values=1)
  model = model_of(name, dtype or 'float64')
  return jax.device_get(
    both(model, fill(TOKENS), segments, mask, labels, removal, rows)
  )


def answers(model, labels, removal):
  """Log-probabilities by plain forward passes: whole, and without each."""
  positions = np.arange(len(TOKENS))

  def score(kept, ids):
    text = np.append(TOKENS[kept], ids[:-1]).astype(int)
    places = np.arange(len(text)) if removal == 'delete' else positions[kept]
    end = len(TOKENS) + np.arange(len(ids) - 1)
    if removal == 'hide':
      places = np.append(places, end).astype(int)
    x = _model_input(model, text, places)
    x = transformer.apply_blocks(
      model.architecture, model.blocks, x, positions=jnp.asarray(places)
    )
    states = jnp.stack([normalise(model, row) for row in x[-len(ids) :]])
    scores = jax.nn.log_softmax(pretrained.unembed(model, states))
    return sum(row[i] for row, i in zip(scores, ids, strict=True))

  kept = [SEGMENTS != number for number in (-2, 0, 1, 2)]
  return jnp.stack([score(k, labels[0]) - score(k, labels[1]) for k in kept])


def _model_input(model, text, places):
  x = model.embedding[text] * model.embedding_scale
  if model.position_embedding is not None:
    x = x + model.position_embedding[places]
  return x


def normalise(model, row):
  return model.architecture.normalization(model.final_norm, row)


@pytest.mark.parametrize(('name', 'removal'), CASES)
def test_effects_are_those_of_the_shorter_prompt(name, removal):
  for labels in (LABELS, WORDS):
    found = measured(name, removal, labels)[1]
    ids = tuple(tuple(np.atleast_1d(x).tolist()) for x in labels)
    whole, *others = answers_of(name, ids, removal)
    np.testing.assert_allclose(found, whole - others, rtol=0, atol=1e-11)


@functools.cache
def answers_of(name, labels, removal):
  return jax.device_get(
    lab.compile_quickly(lambda m: answers(m, labels, removal))(model_of(name))
  )


@functools.partial(lab.compile_quickly, static_argnames='removal')
def derivative(model, removal):
  """The derivative with respect to strengths that add what is lost."""
  architecture, size = model.architecture, len(TOKENS)
  kept = np.stack([SEGMENTS != number for number in range(3)])
  moved = np.cumsum(kept, axis=1) - 1
  moved = moved if removal == 'delete' else np.tile(np.arange(size), (3, 1))

  def attend(block, x, positions, mask):
    heads = transformer.heads(architecture, block, x, positions=positions)
    return transformer.attend(
      architecture, heads, positions, positions, mask=mask
    )

  def answer(strengths):
    x = pretrained.embed(model, TOKENS)
    blocks = transformer.with_constants(architecture, model.blocks)
    for layer in range(model.num_layers):
      block = jax.tree.map(lambda leaf: leaf[layer], blocks)  # noqa: B023
      outputs = attend(block, x, jnp.arange(size), None)
      for number in range(3):
        without = attend(block, x, moved[number], kept[number])
        lost = jax.lax.stop_gradient(outputs - without)
        lost = jnp.where(kept[number][None, :, None], lost, 0)
        outputs = (
          outputs + jnp.expand_dims(strengths[layer, :, number], (1, 2)) * lost
        )
      x = transformer.complete(architecture, block, x, outputs)
    row = pretrained.unembed(model, normalise(model, x[-1])[None])[0]
    return row[LABELS[0]] - row[LABELS[1]]

  shape = model.num_layers, model.blocks.query.weight.shape[2], 3
  return jax.grad(answer)(jnp.zeros(shape, model.embedding.dtype))


@pytest.mark.parametrize(('name', 'removal'), CASES)
def test_influence_is_a_derivative(name, removal):
  found = measured(name, removal)[0]
  expected = derivative(model_of(name), removal)
  scale = np.max(np.abs(expected))
  assert scale > 1e-3
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale)


def test_removals_differ_where_positions_count():
  gap = measured('gemma2', 'delete')[0] - measured('gemma2', 'hide')[0]
  assert np.max(np.abs(gap)) > 1e-3


@pytest.mark.parametrize('pad', [(2, 0), (1, 2)])
def test_padding_and_room_change_nothing(pad):
  """Padding may bear the number of a demonstration."""
  found = measured('gemma2', 'delete', pad=pad, rows=55)
  for ours, expected in zip(found, measured('gemma2', 'delete'), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-11)


def test_too_little_room_is_no_number():
  influence, effects = measured('gemma2', 'delete', rows=20)
  assert np.all(np.isnan(effects))
  assert np.all(np.isfinite(influence))


def test_nothing_is_read_in_a_demonstration():
  """Where its numbers are not known, and bytes hold them."""
  segments = np.where(SEGMENTS < 0, 2, SEGMENTS).astype('uint8')
  mask = np.ones(len(TOKENS), bool)
  for found in both(model_of('gemma2'), TOKENS, segments, mask, LABELS, 'hide'):
    assert np.all(np.isnan(found[..., 2]))
    assert np.all(np.isfinite(found[..., :2]))


def test_masked_tokens_have_no_part_in_a_gradient():
  model = model_of('gemma2')
  embedding = model.embedding.at[60].set(np.nan)
  model = dataclasses.replace(
    model, embedding=embedding, head=transformer.Linear(model.embedding.T)
  )
  tokens = np.concatenate([[60], TOKENS])
  segments, mask = np.concatenate([[-1], SEGMENTS]), tokens != 60

  @jax.jit
  def gradient(norm):
    def effect(scale):
      changed = dataclasses.replace(
        model, final_norm=norm._replace(scale=scale)
      )
      return attribution.effects_of_removal(
        changed, tokens, segments, *LABELS, num_segments=3, mask=mask
      )[0]

    return jax.grad(effect)(norm.scale)

  found = gradient(model.final_norm)
  assert np.all(np.isfinite(found))
  assert np.any(found != 0)


def test_a_demonstration_without_tokens_has_no_effect():
  segments = np.where(SEGMENTS == 1, -1, SEGMENTS)
  mask = np.ones(len(TOKENS), bool)
  found = both(model_of('gemma2'), TOKENS, segments, mask, LABELS, 'delete')
  assert np.all(found[0][..., 1] == 0)
  assert found[1][1] == 0


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'removal': 'drop'}, "removal is 'drop'; expected 'delete' or 'hide'"),
    ({'segment_ids': SEGMENTS.clip(0)}, 'puts token 11, the last one, into a'),
    ({'num_segments': 2}, 'segment_ids holds 2'),
    ({'label': 61}, 'label holds the id 61'),
    ({'other_label': 3}, 'two labels'),
    ({'other_label': None}, 'other_label is None'),
    ({'model': 3}, 'expected a pretrained.LanguageModel'),
    ({'tokens': TOKENS[:5]}, 'tokens and segment_ids disagree'),
    ({'num_rows': 5}, 'num_rows is 5'),
  ],
)
def test_bad_arguments_are_named(changes, message):
  arguments = {
    'model': model_of('gemma2'),
    'tokens': TOKENS,
    'segment_ids': SEGMENTS,
    'label': 3,
    'other_label': 17,
    'num_segments': 3,
  } | changes
  for function in (attribution.influence, attribution.effects_of_removal):
    if 'num_rows' not in changes or 'effects' in function.__name__:
      with pytest.raises(ValueError, match=message):
        function(**arguments)
