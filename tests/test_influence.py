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


def compile_of(function, *static):
  """Compiles a function of `attribution`, for prompts of three segments."""
  return lab.compile_quickly(
    functools.partial(function, num_segments=3),
    static_argnames=('removal', *static),
  )


influence = compile_of(attribution.influence)
effects = compile_of(attribution.effects_of_removal, 'num_rows')


def arguments_of(name, labels=LABELS, pad=(0, 0), segments=SEGMENTS):
  """A model and a prompt that is padded on both sides."""
  fill = functools.partial(np.pad, pad_width=pad)
  arrays = fill(TOKENS), fill(segments, constant_values=1)
  mask = {'mask': fill(np.ones(len(TOKENS), bool))}
  return (model_of(name), *arrays, *labels), mask


def measured(function, name, removal, labels=LABELS, pad=(0, 0), **options):
  arguments, mask = arguments_of(name, labels, pad)
  return jax.device_get(
    function(*arguments, removal=removal, **mask, **options)
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
    scores = last_scores(model, text, places)[-len(ids) :]
    return sum(row[i] for row, i in zip(scores, ids, strict=True))

  kept = [SEGMENTS != number for number in (-2, 0, 1, 2)]
  return np.stack([score(k, labels[0]) - score(k, labels[1]) for k in kept])


@lab.compile_quickly
def last_scores(model, text, places):
  """Log-probabilities of the tokens behind each of the last three."""
  x = _model_input(model, text, places)
  x = transformer.apply_blocks(
    model.architecture, model.blocks, x, positions=places
  )
  states = jnp.stack([normalise(model, row) for row in x[-3:]])
  return jax.nn.log_softmax(pretrained.unembed(model, states))


def _model_input(model, text, places):
  x = model.embedding[text] * model.embedding_scale
  if model.position_embedding is not None:
    x = x + model.position_embedding[places]
  return x


def normalise(model, row):
  return model.architecture.normalization(model.final_norm, row)


@pytest.mark.parametrize('labels', [LABELS, WORDS], ids=['tokens', 'strings'])
@pytest.mark.parametrize(('name', 'removal'), CASES)
def test_effects_are_those_of_the_shorter_prompt(name, removal, labels):
  found = measured(effects, name, removal, labels)
  ids = [np.atleast_1d(label) for label in labels]
  whole, *others = answers(model_of(name), ids, removal)
  np.testing.assert_allclose(found, whole - others, rtol=0, atol=1e-11)


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

  def step(x, layer):
    block, strengths = layer
    outputs = attend(block, x, jnp.arange(size), None)
    lost = jax.vmap(
      lambda places, seen: jnp.where(
        seen[:, None], outputs - attend(block, x, places, seen), 0
      )
    )(moved, kept)
    change = jnp.einsum('hs,shtd->htd', strengths, jax.lax.stop_gradient(lost))
    return transformer.complete(architecture, block, x, outputs + change), None

  def answer(strengths):
    x = pretrained.embed(model, TOKENS)
    blocks = transformer.with_constants(architecture, model.blocks)
    x, _ = jax.lax.scan(step, x, (blocks, strengths))
    row = pretrained.unembed(model, normalise(model, x[-1])[None])[0]
    return row[LABELS[0]] - row[LABELS[1]]

  shape = model.num_layers, model.blocks.query.weight.shape[2], 3
  return jax.grad(answer)(jnp.zeros(shape, model.embedding.dtype))


@pytest.mark.parametrize(('name', 'removal'), CASES)
def test_influence_is_a_derivative(name, removal):
  found = measured(influence, name, removal)
  expected = derivative(model_of(name), removal)
  scale = np.max(np.abs(expected))
  assert scale > 1e-3
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale)


def test_removals_differ_where_positions_count():
  deleted, hidden = (
    measured(influence, 'gemma2', removal) for removal in ('delete', 'hide')
  )
  assert np.max(np.abs(deleted - hidden)) > 1e-3


@pytest.mark.parametrize('pad', [(3, 0), (1, 2)])
def test_padding_and_room_change_nothing(pad):
  """Padding may bear the number of a demonstration."""
  for function, room in ((influence, {}), (effects, {'num_rows': 55})):
    found = measured(function, 'gemma2', 'delete', pad=pad, **room)
    expected = measured(function, 'gemma2', 'delete')
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_too_little_room_is_no_number():
  found = measured(effects, 'gemma2', 'delete', num_rows=20)
  assert np.all(np.isnan(found))


@pytest.mark.parametrize('function', [influence, effects])
def test_nothing_is_read_in_a_demonstration(function):
  """Where its numbers are not known, and bytes hold them."""
  segments = np.where(SEGMENTS < 0, 2, SEGMENTS).astype('uint8')
  arguments, mask = arguments_of('gemma2', segments=segments)
  found = function(*arguments, removal='hide', **mask)
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


@pytest.mark.parametrize('function', [influence, effects])
def test_a_demonstration_without_tokens_has_no_effect(function):
  segments = np.where(SEGMENTS == 1, -1, SEGMENTS)
  arguments, mask = arguments_of('gemma2', segments=segments)
  assert np.all(function(*arguments, removal='delete', **mask)[..., 1] == 0)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'removal': 'drop'}, "removal is 'drop'; expected 'delete' or 'hide'"),
    ({'segment_ids': SEGMENTS.clip(0)}, 'puts token 11, the last one, into a'),
    ({'num_segments': 2}, 'segment_ids holds 2'),
    ({'label': 61}, 'label holds 61'),
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
