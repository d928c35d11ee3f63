"""Every family: certificates of all heads, attribution, cached decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import equivalence, kernels, pretrained, transformer
from iclcl_jax.pretrained import attribution
from tests import families
from tests.tolerances import IDENTITY

# One config for each family, with all of its deltas.
NAMES = [
  'gemma2', 'gemma3_text', 'gpt_neox', 'gpt_oss', 'llama-llama3', 'mistral',
  'olmo2', 'phi3', 'qwen2', 'qwen3', 'smollm3',
]  # fmt: skip
SIZE = 11
SEGMENTS = np.array([0, 0, 0, 1, 1, -1, 2, 2, 2, -1, -1])


def tokens_of(size=SIZE):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.integers(1, 61, size=size), 'int32')


def certificate_of(name, dtype='float64', mask=None):
  model = families.model_of(name, dtype)
  tokens = tokens_of()
  return equivalence.verify_model(
    model.architecture,
    model.blocks,
    pretrained.embed(model, tokens, mask=mask),
    positions=pretrained.positions_of(tokens, mask),
    mask=mask,
  )


@pytest.mark.parametrize('name', families.PUBLISHED)
def test_published_configs_are_read(name):
  model = families.make(families.published(name))
  assert model.num_layers in (3, 6)


SCALED = {'rope_type': 'linear', 'factor': 2.0}


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('Phi-4-mini-instruct', {'attention_bias': True}, 'expected False. Noth'),
    ('Phi-4-mini-instruct', {'full_attn_mod': 2}, 'expected 1. Noth'),
    ('Mistral-7B-v0.1', {'attention_bias': True}, 'expected False. Noth'),
    ('Mistral-7B-v0.1', {'layer_types': ['full_attention'] * 6},
     "expected for each layer one of 'sliding_attention'"),
    ('Llama-3.1-8B', {'layer_types': ['sliding_attention'] * 6},
     "expected for each layer one of 'full_attention'"),
    ('Llama-3.1-8B', {'rope_theta': 10**400}, "'rope_theta'. is 1000"),
    ('Llama-3.1-8B', {'rms_norm_eps': 10**400}, '0 or a positive finite'),
    ('Llama-3.1-8B', {'rope_parameters': SCALED}, 'expected the same settings'),
    ('Llama-3.1-8B', {'rope_scaling': SCALED | {'type': 'yarn'}},
     "the scalings 'linear' and 'yarn'"),
    ('Qwen2.5-0.5B', {'use_mrope': True}, 'expected False. Noth'),
    ('Qwen2.5-0.5B', {'max_window_layers': '2'}, '0 or a positive integer'),
    ('Qwen2.5-0.5B', {'max_window_layers': 2.5}, '0 or a positive integer'),
    ('Qwen2.5-0.5B', {'max_window_layers': None}, 'is missing'),
    ('gemma-2-2b', {'hidden_act': 'silu'}, "expected 'gelu_pytorch_tanh'"),
    ('pythia-160m', {'rope_theta': 7.0}, 'expected 10000. Noth'),
    ('pythia-160m', {'rope_parameters': {'rope_theta': 7.0}}, 'in one place'),
    ('gpt-oss-20b', {'num_local_experts': 3}, 'is 4; expected no more'),
    ('gpt-oss-20b', {'experts_per_token': 2}, 'expected 4. Noth'),
    ('bert-base-multilingual-cased', {'directionality': 'left'}, "'bidi'"),
  ],
)  # fmt: skip
def test_settings_that_others_would_ignore_are_named(name, change, message):
  with pytest.raises(ValueError, match=message):
    families.make(families.published(name) | change)


@pytest.mark.parametrize(
  ('name', 'change'),
  [
    ('Mistral-7B-v0.1', {'sliding_window': 2**31}),
    ('Mistral-7B-v0.1', {'layer_types': ['sliding_attention'] * 6}),
    ('Llama-3.1-8B', {'layer_types': ['full_attention'] * 6}),
    ('Llama-3.1-8B', {'is_decoder': True, 'hidden_act': 'relu2'}),
    ('Llama-3.1-8B', {'rms_norm_eps': 0.0, 'hidden_act': 'gelu_fast'}),
    ('Qwen2.5-0.5B', {'max_window_layers': 0, 'use_sliding_window': True}),
    ('pythia-160m', {'rope_theta': 10000, 'hidden_act': 'gelu_python'}),
  ],
)
def test_settings_that_change_nothing_are_read(name, change):
  model = families.make(families.published(name) | change)
  assert np.all(np.isfinite(jax.jit(pretrained.logits)(model, tokens_of(4))))


@pytest.mark.parametrize('name', NAMES)
def test_every_head_is_one_gradient_step(name):
  certificate = certificate_of(name)
  assert certificate.holds, str(certificate)
  assert certificate.max_residual < IDENTITY['float64']
  assert certificate.max_chain_error < IDENTITY['float64']


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_every_head_is_one_gradient_step_in_float32(name):
  certificate = certificate_of(name, 'float32', jnp.arange(SIZE) > 1)
  assert certificate.max_residual < 1e-5, str(certificate)


@functools.cache
def attributed(name):
  model = families.model_of(name)
  arguments = model, tokens_of(), jnp.asarray(SEGMENTS), 3, 7

  @jax.jit
  def run(*arguments):
    model, tokens, segments, *_ = arguments
    readings = attribution.read_heads(model, tokens, segments, num_segments=3)
    return (
      readings,
      attribution.attribute(*arguments, num_segments=3),
      pretrained.logits(model, tokens),
    )

  return run(*arguments)


@pytest.mark.parametrize('name', NAMES)
def test_attribution_sums_to_the_logits(name):
  _, found, logits = attributed(name)
  label, other = logits[-1, 3], logits[-1, 7]
  cap = families.model_of(name).logit_cap
  if cap is not None:  # What is attributed are the logits before their cap.
    label, other = (cap * jnp.arctanh(x / cap) for x in (label, other))
  np.testing.assert_allclose(found.logit_difference, label - other, rtol=1e-9)
  np.testing.assert_allclose(found.total, label - other, rtol=1e-9)


@pytest.mark.parametrize('name', NAMES)
def test_cached_steps_equal_the_full_pass(name):
  """From within a window beyond it; those of Phi-3 all read a long prompt."""
  model, tokens = families.model_of(name), tokens_of()
  first = 10 if name == 'phi3' else 5

  @jax.jit
  def run(model, tokens):
    start, cache = pretrained.prefill(model, tokens[:first], cache_length=SIZE)

    def step(cache, token):
      scores, cache = pretrained.decode_step(model, cache, token)
      return cache, scores

    return jnp.stack([start, jax.lax.scan(step, cache, tokens[first:])[1][-1]])

  found, expected = run(model, tokens), attributed(name)[2]
  expected = expected[np.array([first - 1, SIZE - 1])]
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('mask', [None, np.arange(10) > 3])
def test_a_cache_does_not_reach_into_another_rotation(mask):
  """Whatever has been read would have to be read again."""
  model = families.model_of('phi3')
  tokens = tokens_of()[: 5 if mask is None else 10]
  segments = jnp.full_like(tokens, -1)
  strings = np.arange(6), np.arange(3)

  def total(tokens, mask):
    segments = jnp.full_like(tokens, -1)
    return attribution.attribute(
      model, tokens, segments, *strings, num_segments=1, mask=mask
    ).total

  for call in (
    lambda: pretrained.generate(model, tokens, num_tokens=6, mask=mask),
    lambda: pretrained.score_labels(model, tokens, strings, mask=mask),
    lambda: total(tokens, mask),
    lambda: attribution.influence(
      model, tokens, segments, *strings, num_segments=1, mask=mask
    ),
  ):
    with pytest.raises(ValueError, match='longer ones than 9 rotate all'):
      call()
  single = jnp.array([3]), jnp.array([5])  # Nothing follows the prompt.
  for transform in (jax.jit, jax.vmap):
    arguments = tokens, mask
    if transform is jax.vmap:
      arguments = jax.tree.map(lambda x: x[None], arguments)
    with pytest.raises(ValueError, match='longer ones than 9 rotate all'):
      transform(total)(*arguments)
    scores = transform(
      lambda tokens, mask: pretrained.score_labels(
        model, tokens, single, mask=mask
      )
    )(*arguments)
    assert np.all(np.isfinite(scores))
  assert np.isfinite(total(tokens[:4], None))  # A short one never does.


def test_padding_is_no_long_prompt():
  """Six tokens rotate as six do, in whatever room."""
  model, tokens = families.model_of('phi3'), tokens_of()[:6]
  segments = jnp.array([-1, 0, 0, 1, -1, -1])
  padded = [jnp.pad(x, (8, 0)) for x in (tokens, segments, tokens < 99)]
  find = functools.partial(attribution.effects_of_removal, model)
  expected = find(tokens, segments, 3, 5, num_segments=2)
  found = find(*padded[:2], 3, 5, num_segments=2, mask=padded[2])
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_sink_is_a_demonstration_with_the_label_zero():
  readings, _, _ = attributed('gpt_oss')
  shares = np.sum(np.exp(readings.log_shares), axis=2) + readings.sink_shares
  np.testing.assert_allclose(shares, 1, rtol=1e-12)
  assert np.all(readings.sink_shares > 1e-3)


def test_a_window_unlearns_what_leaves_it():
  """Three tokens are seen, so that segment 1 is forgotten at the last one."""
  readings, _, _ = attributed('gpt_oss')
  shares = np.exp(readings.log_shares)
  assert np.all(shares[[0, 2], :, :2] == 0)
  assert np.all(shares[[1, 3], :, :2] > 0)


def test_a_cap_is_a_kernel_without_a_norm():
  model, tokens = families.model_of('gemma2'), tokens_of()
  with pytest.raises(ValueError, match='caps its scores'):
    attribution.demonstration_gradients(
      model, tokens, jnp.asarray(SEGMENTS), num_segments=3
    )
  assert isinstance(model.architecture.kernel, kernels.CappedExponentialKernel)


def test_norms_of_queries_and_keys_bound_the_scores():
  """`|q| |k|` is at most the product of the largest gains, times `d_k`."""
  model = families.model_of('qwen3')
  x = pretrained.embed(model, tokens_of())
  blocks = transformer.with_constants(model.architecture, model.blocks)
  block = jax.tree.map(lambda leaf: leaf[0], blocks)
  heads = transformer.heads(model.architecture, block, 100 * x)
  for rows, norm in (
    (heads.queries, block.query_norm),
    (heads.keys, block.key_norm),
  ):
    bound = np.max(np.abs(norm.scale)) * np.sqrt(rows.shape[-1])
    assert np.max(np.linalg.norm(rows, axis=-1)) <= bound * (1 + 1e-9)


def test_layers_that_differ_are_one_compiled_layer():
  model = families.model_of('smollm3')
  text = jax.jit(pretrained.logits).lower(model, tokens_of()).as_text()
  assert text.count('stablehlo.while') == 1


LABELS = [np.array([3, 9, 4]), np.array([7]), np.array([12, 1])]


def behind(tokens, ids):
  """The prompt with a label behind it, and where each of its ids is read."""
  whole = jnp.concatenate([tokens, jnp.asarray(ids, tokens.dtype)])
  return whole, len(tokens) - 1 + np.arange(len(ids))


@pytest.mark.parametrize('name', ['gemma2', 'qwen3'])
def test_scores_of_labels_are_those_of_their_tokens(name):
  model, tokens = families.model_of(name), tokens_of()
  padded = jnp.concatenate([jnp.zeros(2, 'int32'), tokens])
  mask = jnp.arange(len(padded)) > 1
  found = pretrained.score_labels(model, padded, LABELS, mask=mask)
  for ids, total in zip(LABELS, found, strict=True):
    whole, places = behind(tokens, ids)
    logs = jax.nn.log_softmax(jax.jit(pretrained.logits)(model, whole))
    np.testing.assert_allclose(total, np.sum(logs[places, ids]), rtol=1e-9)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_attribution_of_strings_sums_to_their_logits(side):
  model, tokens = families.model_of('smollm3'), tokens_of()
  blank = jnp.zeros(2, 'int32')
  parts = (blank, tokens) if side == 'left' else (tokens, blank)
  mask = np.arange(SIZE + 2) > 1 if side == 'left' else np.arange(13) < SIZE
  segments = np.full(SIZE + 2, -1)
  segments[mask] = SEGMENTS
  found = attribution.attribute(
    model, jnp.concatenate(parts), jnp.asarray(segments), LABELS[0], LABELS[1],
    num_segments=3, mask=jnp.asarray(mask),
  )  # fmt: skip
  expected = 0.0
  for sign, ids in ((1, LABELS[0]), (-1, LABELS[1])):
    whole, places = behind(tokens, ids)
    scores = jax.jit(pretrained.logits)(model, whole)
    centred = scores - np.mean(scores, axis=1, keepdims=True)
    expected += sign * np.sum(centred[places, ids])
  np.testing.assert_allclose(found.total, expected, rtol=1e-9)
  np.testing.assert_allclose(found.logit_difference, expected, rtol=1e-9)


@pytest.mark.parametrize(
  ('labels', 'message'),
  [
    ([], 'labels is a list; expected a list of at least one label'),
    (3, 'labels is an int; expected a list of at least one'),
    ([np.array([], int)], r'labels\[0\] is int64\[0\].* at least one integer'),
    ([3], r'labels\[0\] is 3.* For a single token pass \[id\]'),
    ([[1], [2.5]], r'labels\[1\] is \[2.5\].* at least one integer'),
    ([[1], ' Positive'], r"labels\[1\] is ' Positive'.* at least one integer"),
    ([np.array([61])], r'labels\[0\] holds 61'),
    (np.array([[61]]), r'labels is int64 \[1, 1\]; expected a list'),
    ([[2], [3, -1]], r'labels\[1\] holds -1'),
  ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
  with pytest.raises(ValueError, match=message):
    pretrained.score_labels(families.model_of('qwen3'), tokens_of(), labels)


@pytest.mark.parametrize(
  ('label', 'message'),
  [
    (np.array([4, 61]), 'label holds 61'),
    (np.array([4, 2.5]), r'label is float64\[2\].* at least one integer'),
    (np.array([], int), r'label is int64\[0\].* at least one integer'),
    (np.arange(30), '40 tokens are asked'),
    (np.array([3]), 'label and other_label are both .3.'),
  ],
)
def test_strings_that_do_not_fit_are_named(label, message):
  model, tokens = families.model_of('qwen3'), tokens_of()
  with pytest.raises(ValueError, match=message):
    attribution.attribute(
      model, tokens, jnp.asarray(SEGMENTS), label, 3, num_segments=3
    )
