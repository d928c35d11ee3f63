"""GGUF files of every architecture: names, order and settings."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import pretrained
from iclcl_jax.pretrained.gguf import checkpoint_of, open_gguf
from tests import gguf_families as families, pretrained_files as files

gguf = files.gguf
Q = gguf.GGMLQuantizationType
GATE = 'model.layers.0.mlp.gate_proj.weight'
LLAMA = families.FAMILIES['llama']
# Known to change nothing of what the model computes, whatever they say.
HARMLESS = ('general.', 'tokenizer.', 'split.no', 'split.tensors.count')
ALSO_HARMLESS = (
  'rope.scaling.finetuned',
  'rope.scaling.original_context_length',  # Where no type needs it.
  'pooling_type',
  'feed_forward_length',  # Of gpt-oss: its experts have their own.
)


@pytest.mark.parametrize('name', families.FAMILIES)
def test_a_family_comes_back_as_it_was_converted(tmp_path, name):
  family = families.FAMILIES[name]
  tensors = families.tensors_of(family)
  path = families.write(tmp_path / 'model.gguf', family, tensors)
  config, found = pretrained.read_gguf(path)
  assert config == family.config
  assert found.keys() == tensors.keys()
  for tensor, array in tensors.items():
    np.testing.assert_array_equal(found[tensor], array, err_msg=tensor)
    assert found.specs[tensor].shape == array.shape


def assert_answers_as(peer, checkpoint, tensors):
  """Compares logits with those of a model of transformers."""
  torch = pytest.importorskip('torch')
  state = {
    key.replace('embed_out', 'lm_head'): torch.from_numpy(array)
    for key, array in tensors.items()
  }
  missing, unexpected = peer.load_state_dict(state, strict=False)
  assert not unexpected
  assert all(key == 'lm_head.weight' or 'pooler' in key for key in missing)
  tokens = np.arange(16) * 5 % 23
  expected = peer.eval()(torch.from_numpy(tokens[None]))[0][0]
  model = pretrained.from_checkpoint(checkpoint)
  head = 'lm_head.weight' in state or model.tied
  answer = pretrained.logits if head else pretrained.hidden_states
  found = answer(model, jnp.asarray(tokens))
  np.testing.assert_allclose(found, expected.detach(), atol=1e-4, rtol=1e-4)


def peer_of(config, kind='AutoModelForCausalLM'):
  transformers = pytest.importorskip('transformers')
  config = transformers.AutoConfig.for_model(
    **config, pad_token_id=0, attn_implementation='eager'
  )
  return getattr(transformers, kind).from_config(config)


@pytest.mark.parametrize('name', families.FAMILIES)
def test_a_file_answers_as_transformers_with_its_settings(tmp_path, name):
  family = families.FAMILIES[name]
  tensors = families.tensors_of(family)
  checkpoint = pretrained.read_gguf(
    families.write(tmp_path / 'model.gguf', family, tensors)
  )
  kind = 'AutoModel' if name == 'bert' else 'AutoModelForCausalLM'
  assert_answers_as(peer_of(checkpoint.config, kind), checkpoint, tensors)


def test_rescaled_frequencies_of_llama_3_are_those_of_transformers(tmp_path):
  scaled = {'rope_type': 'llama3', 'rope_theta': 20000.0, 'factor': 8.0}
  scaled |= {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
  scaled |= {'original_max_position_embeddings': 128}
  peer = peer_of(files.CONFIG | {'rope_parameters': scaled})
  plain = 1 / 20000.0 ** np.linspace(0, 1, 4, endpoint=False)
  factors = np.float32(plain / peer.model.rotary_emb.inv_freq.numpy())
  assert 1 < factors[1] < 7 < factors[3]
  tensors = files.tensors()
  stored = tensors | {'rope_freqs.weight': factors}
  path = files.write_gguf(tmp_path / 'model.gguf', stored)
  assert_answers_as(peer, pretrained.read_gguf(path), tensors)


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  families.write(path, LLAMA, families.tensors_of(LLAMA))
  return open_gguf(path)


def keys_of(group, arch):
  for name, value in vars(group).items():
    if isinstance(value, type):
      yield from keys_of(value, arch)
    elif isinstance(value, str) and not name.startswith('__'):
      yield value.format(arch=arch, id=0, name='x', dense='dense_2')


def config_or_error(file):
  try:
    return checkpoint_of(file).config
  except ValueError as error:
    return str(error)


@pytest.mark.parametrize('name', families.FAMILIES)
def test_no_setting_is_ignored(tmp_path, name):
  family = families.FAMILIES[name]
  arch = family.architecture
  tensors = families.tensors_of(family)
  opened = open_gguf(families.write(tmp_path / 'model.gguf', family, tensors))
  config = checkpoint_of(opened).config
  keys = {*keys_of(gguf.Keys, arch), f'{arch}.rope.scale_linear', f'{arch}.new'}
  keys = keys - {'general.architecture', 'general.type'} | {'new'}
  ignored = set()
  for key, value in itertools.product(keys, [7, 0.37, 'x', [1, 2], [1.5]]):
    metadata = opened.metadata | {key: value}
    found = config_or_error(opened._replace(metadata=metadata))
    if isinstance(found, str):
      said = (repr(key), 'rope.scal', 'attention.value_length')
      assert any(part in found for part in said), (key, found)
    elif found == config and opened.metadata.get(key) != value:
      ignored.add(key)
  harmless = *HARMLESS, *(f'{arch}.{key}' for key in ALSO_HARMLESS)
  assert [key for key in ignored if not key.startswith(harmless)] == []


@pytest.mark.parametrize(
  ('name', 'values'),
  [
    ('attention.causal', [True, [True, True]]),
    ('attention.clamp_kqv', [0.0]),
    ('attention.head_count', [[4, 4]]),
    ('attention.sliding_window', [0]),
    ('expert_count', [0]),
    ('logit_scale', [1.0, 0.0]),
    ('rope.scaling.attn_factor', [1.0]),
    ('rope.scaling.factor', [1.0]),
    ('rope.scaling.type', ['none', 'linear', 'yarn']),
    ('rope.scale_linear', [1.0]),
  ],
)
def test_a_setting_at_its_default_changes_nothing(opened, name, values):
  expected = checkpoint_of(opened).config
  for value in values:
    metadata = opened.metadata | {f'llama.{name}': value}
    assert checkpoint_of(opened._replace(metadata=metadata)).config == expected


def test_factors_of_every_frequency_are_read(tmp_path):
  # Llama 3 stores by what its scaling divides each frequency.
  factors = np.float32([1, 1, 1.5, 2.25, 7, 8, 8, 8])
  path = files.write_gguf(
    tmp_path / 'model.gguf',
    files.tensors() | {'rope_freqs.weight': factors},
  )
  rope = pretrained.read_gguf(path).config['rope_parameters']
  assert rope == {
    'rope_type': 'longrope',
    'rope_theta': 20000.0,
    'short_factor': factors.tolist(),
    'long_factor': factors.tolist(),
    'original_max_position_embeddings': 64,
    'attention_factor': 1.0,
  }


@pytest.mark.parametrize('kind', [*gguf.quants._type_traits, Q.F16, Q.F64])
def test_every_quantisation_of_the_package_is_read(tmp_path, kind):
  block, size = gguf.GGML_QUANT_SIZES[kind]
  rows = np.random.default_rng(kind).integers(
    0, 256, (4, 256 // block * size), dtype=np.uint8
  )
  dtypes = {Q.F16: np.float16, Q.F64: np.float64}
  with np.errstate(all='ignore'):
    if kind in dtypes:
      data = rows.view(dtypes[kind])
      expected = data.astype(np.float32)
    else:
      data, expected = rows, gguf.dequantize(rows, kind)
    arrays = {'token_embd.weight': np.zeros((48, 32), np.float32)}
    path = files.write_gguf(
      tmp_path / 'model.gguf',
      arrays | {'blk.0.ffn_gate.weight': data},
      as_named=True,
      raw={'blk.0.ffn_gate.weight': kind},
    )
    found = pretrained.read_gguf(path).tensors
    assert found.specs[GATE].shape == (4, 256)
    assert found[GATE].dtype == np.float32
    np.testing.assert_array_equal(found[GATE], expected)


def test_the_order_of_bytes_of_other_machines_is_refused(tmp_path):
  order = gguf.GGUFEndian.BIG
  path = files.write_gguf(tmp_path / 'model.gguf', files.tensors(), order=order)
  with pytest.raises(ValueError, match='byte order of other machines'):
    pretrained.read_gguf(path)


@pytest.mark.parametrize('alignment', [8, 256])
def test_any_alignment_is_read(tmp_path, alignment):
  metadata = files.METADATA | {'general.alignment': alignment}
  path = files.write_gguf(
    tmp_path / 'model.gguf', files.tensors(), metadata, alignment=alignment
  )
  np.testing.assert_array_equal(
    pretrained.read_gguf(path).tensors[GATE], files.tensors()[GATE]
  )
