"""Language models of finite dual heads: exact limits, states, files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import finite_duals, kernels, pretrained, storage, types
from iclcl_jax.finite_duals import WindowedLearner
from iclcl_jax.pretrained import finite
from tests import families

TOKENS = jnp.arange(3, 27) * 7 % 61


def model_of(name='llama-grouped-tied', dtype='float64'):
  return families.model_of(name, dtype)


@pytest.fixture(scope='module')
def fitted():
  return finite.fit(model_of(), TOKENS, num_landmarks=6)


@pytest.mark.parametrize('name', ['llama-grouped-tied', 'gpt2'])
def test_a_window_over_the_whole_text_is_the_softmax(name):
  model = model_of(name)
  learner = WindowedLearner(num_sinks=0, window=len(TOKENS))
  fitted = finite.fit(model, TOKENS, num_landmarks=3, learner=learner)
  np.testing.assert_allclose(
    finite.logits(fitted, TOKENS), pretrained.logits(model, TOKENS), rtol=1e-9
  )


def test_more_landmarks_come_closer():
  model = model_of()
  exact = pretrained.logits(model, TOKENS)
  learner = WindowedLearner(num_sinks=1, window=2)

  def error(count):
    fitted = finite.fit(model, TOKENS, num_landmarks=count, learner=learner)
    return float(jnp.linalg.norm(finite.logits(fitted, TOKENS) - exact))

  assert error(20) < 0.5 * error(2)


def test_token_by_token_is_the_whole_text(fitted):
  whole = finite.logits(fitted, TOKENS)
  scores, state = finite.prefill(fitted, TOKENS[:9])
  sizes = jax.tree.map(jnp.shape, state)
  np.testing.assert_allclose(scores, whole[8], rtol=1e-8)
  for place in range(9, len(TOKENS)):
    scores, state = finite.decode_step(fitted, state, TOKENS[place])
    np.testing.assert_allclose(scores, whole[place], rtol=1e-8)
  assert jax.tree.map(jnp.shape, state) == sizes
  assert int(state.used) == len(TOKENS)


def test_generation_takes_the_likeliest_token(fitted):
  found = finite.generate(fitted, TOKENS[:9], num_tokens=4)
  tokens = TOKENS[:9]
  for token in found:
    assert int(finite.logits(fitted, tokens)[-1].argmax()) == int(token)
    tokens = jnp.append(tokens, token)
  batch = jnp.stack([TOKENS[:9], TOKENS[2:11]])
  batched = jax.vmap(
    lambda tokens: finite.generate(fitted, tokens, num_tokens=4)
  )(batch)
  np.testing.assert_array_equal(batched[0], found)


def test_a_model_comes_back_from_its_file(tmp_path, fitted):
  path = tmp_path / 'finite.npz'
  finite.save(path, fitted)
  loaded = finite.load(str(path), fitted.model)
  np.testing.assert_array_equal(
    finite.logits(loaded, TOKENS), finite.logits(fitted, TOKENS)
  )
  assert [x.name for x in tmp_path.iterdir()] == [path.name]
  with pytest.raises(ValueError, match='3 layers of 3 key-value heads'):
    finite.load(path, model_of('gpt2'))
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(ValueError, match='corrupt, truncated'):
    finite.load(path, fitted.model)
  storage.save(path, types.DualState(jnp.eye(1), *jnp.ones((2, 1))))
  with pytest.raises(ValueError, match="a 'DualState'; expected one of Land"):
    finite.load(path, fitted.model)
  other = dataclasses.replace(
    fitted, maps=finite_duals.BalancedFeatures(*5 * [None])
  )
  with pytest.raises(ValueError, match='is a BalancedFeatures'):
    finite.save(path, other)


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('bert', 'encoder'),
    ('gemma2', 'capped scores|windows'),
    ('gpt_oss', 'sinks without tokens'),
    ('mistral', 'windows'),
  ],
)
def test_what_features_do_not_imitate_is_refused(name, words):
  with pytest.raises(ValueError, match=words):
    finite.fit(families.model_of(name), TOKENS[:8], num_landmarks=3)


def test_bad_calls_are_named(fitted):
  with pytest.raises(ValueError, match='num_landmarks is 64, and there'):
    finite.fit(fitted.model, TOKENS)
  with pytest.raises(ValueError, match='returns'):
    finite.logits(fitted.model, TOKENS)
  with pytest.raises(ValueError, match='vocabulary'):
    finite.logits(fitted, TOKENS + 50)
  with pytest.raises(ValueError, match='context'):
    finite.generate(fitted, TOKENS, num_tokens=20)
  with pytest.raises(ValueError, match='learner is an int'):
    finite.fit(fitted.model, TOKENS, num_landmarks=3, learner=5)
  linear = WindowedLearner(kernel=kernels.LinearKernel())
  with pytest.raises(ValueError, match='kernel is a LinearKernel'):
    finite.fit(fitted.model, TOKENS, num_landmarks=3, learner=linear)
  state = finite.prefill(fitted, jnp.zeros(32, jnp.int32))[1]
  with pytest.raises(ValueError, match='state has room for 32 tokens'):
    finite.decode_step(fitted, state, TOKENS[0])
  state = finite.prefill(fitted, TOKENS)[1]
  for token in (61, jnp.asarray(61)):
    with pytest.raises(ValueError, match='holds 61'):
      finite.decode_step(fitted, state, token)
  with pytest.raises(FileNotFoundError, match='no folder'):
    finite.save('nowhere/finite.npz', fitted)
  with pytest.raises(FileNotFoundError, match='nowhere'):
    finite.load('nowhere.npz', fitted.model)
