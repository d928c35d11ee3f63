"""Checkpoints to models, forward passes, cached decoding, padding, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import pretrained, transformer
from iclcl_jax.pretrained import Checkpoint
from tests import oracles_pretrained as oracles

TOLERANCE = {'float32': 1e-4, 'float64': 1e-12}
TOKENS = np.array([5, 0, 22, 7, 7, 13, 1])
LLAMA, GPT2, BERT = oracles.LLAMA, oracles.GPT2, oracles.BERT
TIED = LLAMA | {'tie_word_embeddings': True, 'attention_bias': False}
SHAPES = {
  'llama': oracles.llama_shapes,
  'gpt2': oracles.gpt2_shapes,
  'bert': oracles.bert_shapes,
}
CONFIGS = {'llama': LLAMA, 'tied llama': TIED, 'gpt2': GPT2, 'bert': BERT}
CAUSAL = ('llama', 'gpt2')
ORACLES = {'llama': oracles.llama_logits, 'gpt2': oracles.gpt2_logits}

# One compilation for each structure, shape and dtype.
jit_logits = jax.jit(pretrained.logits)
jit_states = jax.jit(pretrained.hidden_states)
jit_next = jax.jit(pretrained.next_token_logits)
jit_step = jax.jit(pretrained.decode_step)
jit_prefill = jax.jit(pretrained.prefill, static_argnames='cache_length')


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def jit_generate(model, tokens, mask):
  return pretrained.generate(model, tokens, num_tokens=6, mask=mask)


@functools.cache
def shared_tensors(name):
  config = CONFIGS[name]
  return oracles.random_tensors(SHAPES[config['model_type']](config), seed=9)


def checkpoint_of(name):
  config = CONFIGS[name]
  return Checkpoint(dict(config), dict(shared_tensors(name)))


@functools.cache
def model_of(name, dtype='float64'):
  return pretrained.from_checkpoint(checkpoint_of(name), dtype=dtype)


def assert_close(found, expected, dtype):
  assert found.dtype == dtype
  error = np.max(np.abs(np.asarray(found, np.float64) - expected))
  assert error <= TOLERANCE[dtype.name] * max(1, np.max(np.abs(expected)))


@pytest.mark.parametrize('name', ['llama', 'tied llama', 'gpt2'])
def test_logits_equal_those_of_numpy(name, dtype):
  config, tensors = checkpoint_of(name)
  expected = ORACLES[config['model_type']](config, tensors, TOKENS)
  assert np.std(expected) > 0.1  # Nothing to hide behind.
  model = model_of(name, dtype.name)
  assert_close(jit_logits(model, TOKENS), expected, dtype)


def test_hidden_states_of_encoder_equal_those_of_numpy(dtype):
  types = np.array([0, 0, 0, 1, 1, 1, 0])
  expected = oracles.bert_hidden_states(*checkpoint_of('bert'), TOKENS, types)
  model = model_of('bert', dtype.name)
  found = jit_states(model, TOKENS, token_types=types)
  assert_close(found, expected, dtype)
  np.testing.assert_array_equal(
    pretrained.embed(model, TOKENS),
    pretrained.embed(model, TOKENS, token_types=0 * types),
  )


@pytest.mark.parametrize('prefix', ['transformer.', 'bert.', 'model.'])
def test_prefix_of_names_may_be_there_or_not(prefix):
  name = {'transformer.': 'gpt2', 'bert.': 'bert', 'model.': 'llama'}[prefix]
  config, tensors = checkpoint_of(name)
  bare = {key.removeprefix(prefix): x for key, x in tensors.items()}
  full = {prefix + key: x for key, x in bare.items() if key != 'lm_head.weight'}
  if 'lm_head.weight' in bare:
    full['lm_head.weight'] = bare['lm_head.weight']
  models = [
    pretrained.from_checkpoint(Checkpoint(config, x)) for x in (bare, full)
  ]
  jax.tree.map(np.testing.assert_array_equal, *models)


def padded(prompt, side, size=13):
  """The prompt among other tokens, and its mask."""
  order = {'left': -1, 'right': 1}[side]
  mask = (np.arange(size) < len(prompt))[::order]
  tokens = np.arange(size)
  tokens[mask] = prompt
  return tokens, mask


@pytest.mark.parametrize('name', CAUSAL)
@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_on_either_side_changes_nothing(name, side):
  model = model_of(name)
  tokens, mask = padded(TOKENS, side)
  expected = jit_logits(model, TOKENS)
  found = jit_logits(model, tokens, mask=mask)[mask]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
  last = jit_next(model, tokens, mask=mask)
  np.testing.assert_allclose(last, expected[-1], rtol=0, atol=1e-12)


def test_padding_of_encoder_changes_nothing():
  model = model_of('bert')
  tokens, mask = padded(TOKENS, 'right')
  found = jit_states(model, tokens, mask=mask)[:7]
  expected = oracles.bert_hidden_states(
    *checkpoint_of('bert'), TOKENS, 0 * TOKENS
  )
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_positions_count_valid_tokens():
  mask = np.array([False, True, False, True, True, False])
  found = pretrained.positions_of(np.zeros(6, int), jnp.asarray(mask))
  assert found[mask].tolist() == [0, 1, 2]


@pytest.mark.parametrize('name', CAUSAL)
def test_cached_step_equals_recomputing(name):
  model = model_of(name)
  expected = np.asarray(jit_logits(model, TOKENS))
  scores, cache = jit_prefill(model, TOKENS[:4], cache_length=7)
  np.testing.assert_allclose(scores, expected[3], rtol=0, atol=1e-12)
  for n in (4, 5, 6):
    scores, cache = jit_step(model, cache, TOKENS[n])
    np.testing.assert_allclose(scores, expected[n], rtol=0, atol=1e-12)
  assert int(cache.length) == 7
  assert bool(np.all(cache.mask))
  with pytest.raises(ValueError, match='cache has room for 7 tokens, and 8'):
    pretrained.decode_step(model, cache, TOKENS[0])


def greedy_from_scratch(model, prompt):
  """Six tokens, with everything recomputed for each."""
  for _ in range(6):
    tokens, mask = padded(prompt, 'right')
    scores = jit_next(model, tokens, mask=mask)
    prompt = np.append(prompt, np.argmax(scores))
  return prompt[-6:].tolist()


@pytest.mark.parametrize('name', CAUSAL)
def test_padded_prompts_generate_what_each_does_from_scratch(name):
  model = model_of(name)
  sides = {7: 'left', 4: 'left', 2: 'left', 5: 'right'}
  prompts = [TOKENS[:length] for length in sides]
  rows = [padded(prompt, sides[len(prompt)], size=7) for prompt in prompts]
  tokens, masks = (np.stack(column) for column in zip(*rows, strict=True))
  expected = [greedy_from_scratch(model, prompt) for prompt in prompts]
  assert len(np.unique(expected)) > 2  # Not one token again and again.
  assert jit_generate(model, tokens, masks).tolist() == expected


def test_generate_without_mask_equals_recomputing():
  model = model_of('gpt2')
  found = jax.jit(functools.partial(pretrained.generate, num_tokens=6))(
    model, TOKENS
  )
  assert found.tolist() == greedy_from_scratch(model, TOKENS)


def test_the_next_token_is_scored_alone():
  model = model_of('gpt2')
  found = jit_next(model, TOKENS)
  expected = np.asarray(jit_logits(model, TOKENS))[-1]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_one_layer_is_compiled_however_many_there_are():
  sizes = []
  for num_layers in (2, 4):
    config = GPT2 | {'n_layer': num_layers}
    tensors = oracles.random_tensors(oracles.gpt2_shapes(config))
    model = pretrained.from_checkpoint(Checkpoint(config, tensors))
    text = jit_logits.lower(model, TOKENS).as_text()
    sizes.append(text.count('dot_general'))
  assert sizes[0] == sizes[1] > 0


def test_model_is_a_pytree_with_gradients():
  model = model_of('gpt2')

  @jax.jit
  @jax.grad
  def gradient(model):
    return jax.nn.log_softmax(pretrained.next_token_logits(model, TOKENS))[3]

  leaves = jax.tree.leaves(gradient(model))
  assert len(leaves) == len(jax.tree.leaves(model))
  assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in leaves)


@pytest.mark.parametrize(
  ('stored', 'wanted', 'expected'),
  [
    ('float32', None, 'float32'),
    ('bfloat16', None, 'bfloat16'),
    ('bfloat16', 'float32', 'float32'),
    ('float16', 'float64', 'float64'),
  ],
)
def test_dtype_is_the_stored_one_or_the_wanted(stored, wanted, expected):
  config, tensors = checkpoint_of('gpt2')
  tensors = {k: x.astype(jnp.dtype(stored)) for k, x in tensors.items()}
  model = pretrained.from_checkpoint(Checkpoint(config, tensors), dtype=wanted)
  assert {str(x.dtype) for x in jax.tree.leaves(model)} == {expected}


def test_mixed_dtypes_become_float32():
  config, tensors = checkpoint_of('gpt2')
  tensors = {
    k: x.astype(np.float32 if x.ndim == 1 else np.float16)
    for k, x in tensors.items()
  }
  model = pretrained.from_checkpoint(Checkpoint(config, tensors))
  assert {str(x.dtype) for x in jax.tree.leaves(model)} == {'float32'}


@pytest.mark.parametrize(
  ('name', 'harmless'),
  [
    ('llama', 'model.layers.0.self_attn.rotary_emb.inv_freq'),
    ('gpt2', 'transformer.h.1.attn.bias'),
    ('gpt2', 'h.1.attn.masked_bias'),
    ('bert', 'embeddings.position_ids'),
    ('bert', 'pooler.dense.weight'),
    ('bert', 'cls.predictions.bias'),
  ],
)
def test_harmless_tables_are_ignored(name, harmless):
  config, tensors = checkpoint_of(name)
  tensors[harmless] = np.zeros(3, int)
  model = pretrained.from_checkpoint(Checkpoint(config, tensors))
  jax.tree.map(np.testing.assert_array_equal, model, model_of(name))


def test_stored_copy_of_tied_embedding_is_accepted_and_another_head_is_not():
  config, tensors = checkpoint_of('tied llama')
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  pretrained.from_checkpoint(Checkpoint(config, tensors))
  tensors['lm_head.weight'] = tensors['lm_head.weight'] + 1
  with pytest.raises(ValueError, match=r'differs from the embedding.*tie_word'):
    pretrained.from_checkpoint(Checkpoint(config, tensors))


@pytest.mark.parametrize(
  ('name', 'tensor'),
  [
    ('llama', 'model.layers.1.mlp.gate_proj.weight'),
    ('llama', 'lm_head.weight'),
    ('gpt2', 'transformer.h.1.ln_2.bias'),
    ('bert', 'encoder.layer.0.attention.self.key.bias'),
  ],
)
def test_missing_or_misshapen_tensor_is_named(name, tensor):
  config, tensors = checkpoint_of(name)
  array = tensors.pop(tensor)
  shape = str(list(array.shape)).replace('[', r'\[')
  pattern = f'{tensor}.*missing; expected floating-point numbers {shape}'
  with pytest.raises(ValueError, match=pattern):
    pretrained.from_checkpoint(Checkpoint(config, tensors))
  tensors[tensor] = np.concatenate([array, array])
  with pytest.raises(ValueError, match=f' is float.* expected .* {shape}'):
    pretrained.from_checkpoint(Checkpoint(config, tensors))
  tensors[tensor] = array.astype(np.int8)
  with pytest.raises(ValueError, match=r' is int8 .*expected floating'):
    pretrained.from_checkpoint(Checkpoint(config, tensors))


@pytest.mark.parametrize(
  ('wrong', 'dtype'), [(np.nan, 'float32'), (-np.inf, None), (1e30, 'float16')]
)
def test_weights_that_are_no_finite_numbers_are_named(wrong, dtype):
  config, tensors = checkpoint_of('llama')
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = tensors[name].copy()  # Others share the one that is there.
  tensors[name][2, 3] = wrong
  with pytest.raises(ValueError, match=r'layers.1.mlp.up_proj.*NaN or infin'):
    pretrained.from_checkpoint(Checkpoint(config, tensors), dtype=dtype)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'bert'])
def test_unexpected_tensor_is_named(name):
  config, tensors = checkpoint_of(name)
  tensors['adapter.weight'] = np.zeros((2, 3))
  with pytest.raises(
    ValueError, match=r"'adapter.weight' of shape \[2, 3\] is unexpected"
  ):
    pretrained.from_checkpoint(Checkpoint(config, tensors))


UNSCALED = {'rope_parameters': None}


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('llama', {'model_type': 'mamba'}, "'mamba'; expected one of bert, "),
    ('llama', {'model_type': None}, 'missing; expected one of bert, '),
    ('llama', {'model_type': []}, r'model_type.* is \[\]'),
    ('llama', {'hidden_act': 'xielu'}, "'xielu'; expected one of gelu"),
    ('llama', {'hidden_act': ['silu']}, r'hidden_act.* is \['),
    ('llama', {'hidden_size': None}, r"'hidden_size'\] is missing"),
    ('llama', {'hidden_size': 24.0}, 'expected a positive integer'),
    ('llama', {'num_hidden_layers': True}, 'expected a positive integer'),
    ('llama', {'num_hidden_layers': 10**9}, 'is 1000000000, but there are'),
    ('llama', {'num_key_value_heads': 3}, 'expected a divisor'),
    ('llama', {'rms_norm_eps': 'small'}, 'expected 0 or a positive finite'),
    ('llama', {'rms_norm_eps': -1e-6}, 'expected 0 or a positive finite'),
    ('llama', {'attention_bias': 'no'}, 'expected true or false'),
    ('llama', {'sliding_window': 8}, r'sliding_window.* is 8'),
    ('llama', {'rope_parameters': {'rope_type': 'yarn', 'factor': -4.0}},
     "rotary setting 'factor' is -4.0"),
    ('llama', UNSCALED | {'rope_scaling': {'type': 'linear'}},
     "rotary setting 'factor' is missing"),
    ('llama', UNSCALED | {'rope_scaling': {'type': 'mrope'}}, "'mrope'"),
    ('llama', UNSCALED | {'rope_scaling': {'mrope_section': [1]}},
     "rotary setting 'mrope_section' is"),
    ('llama', {'partial_rotary_factor': 0.4}, 'expected 1.0. Noth'),
    ('llama', {'rope_theta': 7.0}, 'rotary positions is .* in one place and'),
    ('llama', {'logit_scale': 2.0}, r"'logit_scale'\] is 2.0, a setting that"),
    ('llama', UNSCALED | {'rope_scaling': 'linear'}, 'a JSON object'),
    ('llama', UNSCALED | {'rope_scaling': [1]}, 'a JSON object'),
    ('llama', {'head_dim': None, 'num_attention_heads': 10}, 'multiple of 10'),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'expected False. Noth'),
    ('gpt2', {'activation_function': 'gelu_10'}, "'gelu_10'"),
    ('bert', {'is_decoder': True}, 'expected False. Noth'),
    ('bert', {'position_embedding_type': 'relative_key'}, "'absolute'"),
  ],
)  # fmt: skip
def test_unsupported_config_is_named(name, change, message):
  config, tensors = checkpoint_of(name)
  with pytest.raises(ValueError, match=message):
    pretrained.from_checkpoint(Checkpoint(config | change, tensors))


def test_unfit_dtype_is_named():
  with pytest.raises(ValueError, match='dtype is int32; expected a floating'):
    pretrained.from_checkpoint(checkpoint_of('gpt2'), dtype=jnp.int32)
  jax.config.update('jax_enable_x64', False)
  try:
    with pytest.raises(ValueError, match='enable_x64'):
      pretrained.from_checkpoint(checkpoint_of('gpt2'), dtype=np.float64)
  finally:
    jax.config.update('jax_enable_x64', True)


def test_base_of_rotation_is_read_from_either_place():
  config, tensors = checkpoint_of('llama')
  del config['rope_parameters']
  config |= {'rope_theta': 100, 'rope_scaling': None}
  model = pretrained.from_checkpoint(Checkpoint(config, tensors))
  assert model.architecture == model_of('llama').architecture
  config['rope_theta'] = 101.0
  model = pretrained.from_checkpoint(Checkpoint(config, tensors))
  assert model.architecture != model_of('llama').architecture


@pytest.mark.parametrize(
  ('tokens', 'message'),
  [
    (np.zeros(0, int), 'tokens is empty.*beginning-of-text'),
    (np.array([1, 23]), 'holds 23; expected integers from 0 to 22.*vocabulary'),
    (np.array([-1]), 'holds -1'),
    (np.zeros(17, int), '17 tokens .* context is 16'),
    (np.zeros((2, 3), int), r'shape \[2, 3\]; expected \[N\].*jax.vmap'),
    (np.array(1), r'tokens has shape \[\]; expected \[N\]'),
    (np.zeros(3), 'dtype float64; expected an array of integers'),
    (np.zeros(3, np.uint8), 'dtype uint8; expected int32'),
    (np.zeros(3, np.int8), 'dtype int8; expected int32'),
    (np.zeros(3, np.uint16), 'dtype uint16; expected int32'),
    ([1, 2], 'tokens is a list'),
    ('abc', 'tokens is a str'),
  ],
)
@pytest.mark.parametrize(
  'function',
  [
    pretrained.logits,
    pretrained.hidden_states,
    pretrained.embed,
    functools.partial(pretrained.generate, num_tokens=2),
  ],
  ids=['logits', 'hidden_states', 'embed', 'generate'],
)
def test_unfit_prompt_is_named(function, tokens, message):
  with pytest.raises(ValueError, match=message):
    function(model_of('gpt2'), tokens)


def seeing_ahead(visible):
  model = model_of('llama')
  architecture = dataclasses.replace(model.architecture, visible=visible)
  return dataclasses.replace(model, architecture=architecture)


def full_cache():
  return pretrained.prefill(model_of('llama'), jnp.arange(3), cache_length=5)[1]


NO_HEAD = 'encoder without a head'


@pytest.mark.parametrize(
  ('message', 'function', 'name', 'arguments', 'options'),
  [
    ('mask has dtype', 'logits', 'gpt2', (TOKENS,), {'mask': np.ones(7)}),
    (r'mask has shape \[6\]', 'logits', 'gpt2', (TOKENS,),
     {'mask': np.ones(6, bool)}),
    ('mask excludes every token', 'logits', 'gpt2', (TOKENS,),
     {'mask': np.zeros(7, bool)}),
    (NO_HEAD, 'logits', 'bert', (TOKENS,), {}),
    (NO_HEAD, 'next_token_logits', 'bert', (TOKENS,), {}),
    (NO_HEAD, 'unembed', 'bert', (np.ones((2, 24)),), {}),
    (NO_HEAD, 'generate', 'bert', (TOKENS,), {'num_tokens': 1}),
    (NO_HEAD, 'prefill', 'bert', (TOKENS,), {'cache_length': 9}),
    ('token_types were given', 'embed', 'gpt2', (TOKENS,),
     {'token_types': TOKENS}),
    ('num_tokens is 0; expected an integer', 'generate', 'gpt2', (TOKENS,),
     {'num_tokens': 0}),
    ('17 tokens .* context is 16', 'generate', 'gpt2', (TOKENS,),
     {'num_tokens': 10}),
    ('cache_length is 6', 'prefill', 'gpt2', (TOKENS,), {'cache_length': 6}),
    ('cache is a NoneType', 'decode_step', 'llama', (None, 1), {}),
  ],
)  # fmt: skip
def test_unfit_calls_are_named(message, function, name, arguments, options):
  with pytest.raises(ValueError, match=message):
    getattr(pretrained, function)(model_of(name), *arguments, **options)


@pytest.mark.parametrize(
  'visible',
  [transformer.bidirectional, lambda query, key: jnp.ones((), bool)],
)
def test_a_model_that_sees_ahead_does_not_generate(visible):
  model = seeing_ahead(visible)
  segments, influence = np.array([0, -1]), pretrained.attribution.influence
  for call in (
    lambda: pretrained.generate(model, TOKENS, num_tokens=2),
    lambda: jax.jit(
      lambda tokens: influence(model, tokens, segments, 1, 2, num_segments=1)
    )(TOKENS[:2]),
  ):
    with pytest.raises(ValueError, match='bidirectional'):
      call()


@pytest.mark.parametrize(
  ('message', 'call'),
  [
    ('Unpack what load returns', lambda: pretrained.logits(
      pretrained.Pretrained(model_of('llama'), None), jnp.arange(3))),
    ('holds 1000000', lambda: pretrained.decode_step(
      model_of('llama'), full_cache(), 10**6)),
    ('path is a NoneType', lambda: pretrained.load(None)),
    ('path is an int', lambda: pretrained.load(3)),
    ("path is ''", lambda: pretrained.load('')),
    ("path is 'xxxxxxxxxxxxxxxxxxxx", lambda: pretrained.load('x' * 5000)),
    ('banana', lambda: pretrained.load('.', dtype='banana')),
  ],
)  # fmt: skip
def test_what_cannot_be_loaded_or_read_is_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()
