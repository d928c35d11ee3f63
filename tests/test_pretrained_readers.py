"""Readers of model files: each layout, and each way in which one is wrong."""

import gc
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import pretrained
from iclcl_jax.pretrained import Checkpoint
from iclcl_jax.pretrained.gguf import open_gguf
from tests import oracles_pretrained as oracles, pretrained_files as files

GATE = 'model.layers.0.mlp.gate_proj.weight'
QUERY = 'model.layers.1.self_attn.q_proj.weight'


@pytest.fixture(scope='module')
def arrays():
  return files.tensors()


@pytest.fixture(scope='module')
def whole(tmp_path_factory, arrays):
  """A good GGUF file, which no test changes."""
  path = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  return files.write_gguf(path, arrays)


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, err_msg=name)


# GGUF


def test_gguf_without_output_ties_the_embeddings(tmp_path):
  tied = files.tensors(tied=True)
  checkpoint = pretrained.read_gguf(
    files.write_gguf(tmp_path / 'tied.gguf', tied)
  )
  assert_same(checkpoint.tensors, tied)
  assert checkpoint.config['tie_word_embeddings'] is True


def test_gguf_defaults_are_those_of_the_format(tmp_path, arrays):
  absent = {
    'llama.rope.freq_base': None,
    'llama.rope.dimension_count': None,
    'llama.attention.head_count_kv': None,
  }
  everything = {n: a for n, a in arrays.items() if '.k_proj.' not in n}
  path = files.write_gguf(
    tmp_path / 'model.gguf', everything, files.METADATA | absent
  )
  config = pretrained.read_gguf(path).config
  assert config['rope_parameters']['rope_theta'] == 10000.0
  assert config['num_key_value_heads'] == files.NUM_HEADS
  assert config['head_dim'] == files.HEAD_DIM


def test_gguf_bias_of_queries_is_permuted_like_its_rows(tmp_path, arrays):
  bias = np.arange(files.D_MODEL, dtype=np.float32)
  name = QUERY.replace('weight', 'bias')
  path = files.write_gguf(tmp_path / 'b.gguf', arrays | {name: bias})
  checkpoint = pretrained.read_gguf(path)
  np.testing.assert_array_equal(checkpoint.tensors[name], bias)
  assert checkpoint.config['attention_bias'] is True
  assert checkpoint.config['mlp_bias'] is False


def test_gguf_model_answers_as_the_directory_it_was_made_of(
  tmp_path, whole, arrays
):
  directory = files.write_directory(tmp_path / 'hf', arrays)
  text = 'the answer is 12, ok?'
  answers = []
  for path in (whole, directory):
    model, tokenizer = pretrained.load(path, dtype=jnp.float64)
    tokens = jnp.asarray(tokenizer.encode(text))
    answers.append(jax.jit(pretrained.logits)(model, tokens))
  np.testing.assert_array_equal(*answers)
  assert answers[0].dtype == jnp.float64


@pytest.mark.parametrize('part', [0.0005, 0.01, 0.3, 0.45, 0.6, 0.99, 0.99999])
def test_truncated_gguf_is_an_error(tmp_path, whole, part):
  content = whole.read_bytes()
  size = int(len(content) * part)
  broken = tmp_path / 'broken.gguf'
  broken.write_bytes(content[:size])
  with pytest.raises(ValueError, match=rf'broken.gguf.*{size} bytes.*again'):
    pretrained.load(broken)


@pytest.mark.parametrize(
  ('offset', 'content'),
  [
    (4, b'\x63\x00\x00\x00'),  # Another version.
    (8, b'\xff' * 8),  # Countless tensors.
    (16, b'\xff' * 8),  # Countless metadata.
    (24, b'\xff' * 8),  # An endless name.
    (40, b'\xff' * 8),  # A name that is no text.
  ],
)
def test_corrupt_gguf_is_an_error(tmp_path, whole, offset, content):
  broken = tmp_path / 'broken.gguf'
  good = whole.read_bytes()
  broken.write_bytes(good[:offset] + content + good[offset + len(content) :])
  with pytest.raises(ValueError, match=r'broken.gguf.*copy or install'):
    pretrained.read_gguf(broken)


@pytest.mark.parametrize(
  'content', [b'', b'GG', b'version https://git-lfs.github.com/spec/v1']
)
def test_what_is_no_gguf_is_an_error(tmp_path, content):
  path = tmp_path / 'model.gguf'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r'model.gguf is no GGUF file.*copy'):
    pretrained.load(path)


def test_absent_gguf_is_an_error(tmp_path):
  for read in (pretrained.load, pretrained.read_gguf):
    with pytest.raises(ValueError, match=r'absent.gguf.*Check the spelling'):
      read(tmp_path / 'absent.gguf')
  with pytest.raises(ValueError, match='a directory; expected a GGUF file'):
    pretrained.read_gguf(tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'llama.block_count': None}, r"'llama.block_count' is missing; expected"),
    ({'llama.context_length': None}, r"'llama.context_length' is missing"),
    ({'llama.embedding_length': None}, r"'llama.embedding_length' is missing"),
    ({'llama.feed_forward_length': None}, r"forward_length' is missing"),
    ({'llama.attention.head_count': None}, r"head_count' is missing"),
    ({'llama.attention.layer_norm_rms_epsilon': None},
     r"layer_norm_rms_epsilon' is missing"),
    ({'llama.block_count': 0}, r"block_count' is 0; expected a positive"),
    ({'llama.block_count': 'two'}, r"block_count' is 'two'; expected"),
    ({'llama.attention.head_count': [4, 2]},
     r'head_count.*\[4, 2\]; expected a positive integer'),
    ({'llama.block_count': True}, r"block_count' is True; expected a positive"),
    ({'llama.rope.freq_base': 'x'}, r"freq_base' is 'x'; expected a positive"),
    ({'llama.attention.causal': False}, r"causal' is False; expected True"),
    ({'llama.rope.scaling.type': 'x', 'llama.rope.scaling.factor': 2.0},
     r"scaling.type' is 'x'; expected linear or yarn, .* factor is 2.0"),
    ({'llama.attention.head_count': 2}, r'model.gguf: tensor .* is float32 \['),
    ({'split.count': 3}, r"split.count' is 3.*one of several parts.*--merge"),
    ({'general.type': 'adapter'}, r'holds a adapter of architecture'),
    ({'split.count': 'many'}, r"split.count' is 'many'"),
    ({'llama.block_count': 2**31}, r'2147483648; expected several of the 21'),
    ({'llama.block_count': 3}, r'model.gguf: tensor .*layers.2.* is missing'),
    ({'llama.feed_forward_length': 48}, r'model.gguf: tensor .* is float32 \['),
  ],
)  # fmt: skip
def test_wrong_gguf_metadata_is_an_error(tmp_path, arrays, changes, message):
  metadata = files.METADATA | {'llama.rope.dimension_count': None} | changes
  path = files.write_gguf(tmp_path / 'model.gguf', arrays, metadata)
  with pytest.raises(ValueError, match=message):
    pretrained.load(path)


EMBEDDING, ONES = 'model.embed_tokens.weight', np.ones(8, np.float32)


@pytest.mark.parametrize(
  ('changes', 'architecture', 'message'),
  [
    ({}, 'mamba', r"architecture 'mamba'; expected a model, one of llama"),
    *(({name: ONES}, 'llama', rf'model.gguf has a tensor {name!r}') for name in
      ('blk.0.ffn_gate_exps.weight', 'blk.0.attn_q.a', 'blk.attn_q.weight',
       'attn_q.weight', 'blk.0.output.weight')),
    ({EMBEDDING: None}, 'llama', r"lacks the tensor 'token_embd.weight'"),
    ({QUERY: None}, 'llama', r'model.gguf: tensor .*q_proj.weight.* is miss'),
    ({GATE: np.ones((64, 32), np.int8)}, 'llama', r'as I8.*Choose another'),
  ],
)  # fmt: skip
def test_wrong_gguf_content_is_an_error(
  tmp_path, arrays, changes, architecture, message
):
  content = {k: v for k, v in (arrays | changes).items() if v is not None}
  path = files.write_gguf(
    tmp_path / 'model.gguf', content, architecture=architecture
  )
  with pytest.raises(ValueError, match=message):
    pretrained.load(path)


def mapped(path):
  """Whether this process has the file in its memory (known on Linux)."""
  maps = pathlib.Path('/proc/self/maps')
  return maps.exists() and str(path) in maps.read_text()


def test_gguf_is_let_go_after_loading(whole):
  file = open_gguf(whole)
  assert mapped(whole) == pathlib.Path('/proc/self/maps').exists()
  del file
  model = pretrained.load(whole).model
  gc.collect()
  assert not mapped(whole)
  assert model.tied is False


# Directories


@pytest.mark.parametrize('dtype', files.DTYPES)
@pytest.mark.parametrize('num_shards', [1, 3])
def test_directory_is_read_as_stored(tmp_path, arrays, dtype, num_shards):
  arrays = {name: array.astype(dtype) for name, array in arrays.items()}
  directory = files.write_directory(
    tmp_path / 'hf', arrays, num_shards=num_shards
  )
  checkpoint = pretrained.read_safetensors(directory)
  assert_same(checkpoint.tensors, arrays)
  assert checkpoint.config == files.CONFIG


def test_loaded_dtype_is_that_of_the_file_or_the_wanted_one(tmp_path, arrays):
  half = {name: array.astype(np.float16) for name, array in arrays.items()}
  directory = files.write_directory(tmp_path / 'hf', half)
  assert pretrained.load(directory).model.embedding.dtype == jnp.float16
  model = pretrained.load(directory, dtype=jnp.float32).model
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {
    jnp.dtype('float32')
  }


@pytest.mark.parametrize('num_shards', [1, 2])
def test_a_tensor_is_read_when_it_is_taken_and_not_kept(
  tmp_path, arrays, num_shards
):
  directory = files.write_directory(
    tmp_path / 'hf', arrays, num_shards=num_shards
  )
  tensors = pretrained.read_safetensors(directory).tensors
  assert tensors[GATE] is not tensors[GATE]
  assert 'a' not in tensors
  for path in directory.glob('*.safetensors'):
    path.write_bytes(path.read_bytes()[:-4])
  for name, spec in tensors.specs.items():
    assert (spec.shape, spec.dtype) == (arrays[name].shape, np.float32)
  with pytest.raises(ValueError, match=r'safetensors is truncated.*again'):
    _ = tensors[GATE]


@pytest.mark.parametrize('lost', ['lm_head.weight', EMBEDDING])
def test_writers_keep_either_name_of_a_tied_embedding(tmp_path, arrays, lost):
  config = files.CONFIG | {'tie_word_embeddings': True}
  shared = arrays | {'lm_head.weight': arrays[EMBEDDING]}
  models = []
  for content in (shared, {k: v for k, v in shared.items() if k != lost}):
    directory = files.write_directory(tmp_path / 'hf', content, config)
    models.append(pretrained.load(directory).model)
  jax.tree.map(np.testing.assert_array_equal, *models)
  assert models[0].tied


def test_old_names_of_scale_and_offset_are_read():
  tensors = oracles.random_tensors(oracles.bert_shapes(oracles.BERT))
  model = pretrained.from_checkpoint(Checkpoint(oracles.BERT, tensors))
  old = {
    name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'
    ): array
    for name, array in tensors.items()
  }
  assert old.keys() != tensors.keys()
  other = pretrained.from_checkpoint(Checkpoint(oracles.BERT, old))
  jax.tree.map(np.testing.assert_array_equal, model, other)


@pytest.fixture
def sharded(tmp_path, arrays):
  return files.write_directory(tmp_path / 'hf', arrays, num_shards=2)


def shards(directory):
  return sorted(directory.glob('model-*.safetensors'))


def weight_map(directory):
  path = directory / 'model.safetensors.index.json'
  return json.loads(path.read_text())['weight_map']


@pytest.mark.parametrize('size', [0, 7, 100, 5000])
def test_truncated_shard_is_an_error(sharded, size):
  shard = shards(sharded)[0]
  shard.write_bytes(shard.read_bytes()[:size])
  with pytest.raises(ValueError, match=rf'{shard.name}.*{size} bytes.*again'):
    pretrained.load(sharded)


def elsewhere(listed, first, second):
  other = second if listed[GATE] == first else first
  return listed | {GATE: other}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda listed, *_: {k: v for k, v in listed.items() if k != GATE},
     rf'disagree: .*{GATE}.*is there'),
    (elsewhere, rf'model-0000.-of-00002.*disagree: .*{GATE}'),
    (lambda listed, first, _: listed | {'model.extra': first},
     r"disagree: .*'model.extra'"),
    (lambda listed, *_: listed | {'model.extra': 'model-3.safetensors'},
     r'lacks 1 of 3 shards: model-3.safetensors'),
    *((lambda *_, listed=listed: listed, r"index.json has no 'weight_map'")
      for listed in (None, ['a'], {'a': 1}, {'a': '../x'})),
  ],
)  # fmt: skip
def test_an_index_that_disagrees_with_its_shards_is_an_error(
  sharded, change, message
):
  names = (path.name for path in shards(sharded))
  files.write_index(sharded, change(weight_map(sharded), *names))
  with pytest.raises(ValueError, match=message):
    pretrained.load(sharded)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'config.json is missing'),
    (b'{"model_type": "lla', 'corrupt JSON'),
    (b'\xff\xfe', 'corrupt JSON'),
    (b'[1]', 'config.json holds a list'),
    (b'{}', r'hf: .*model_type.*is missing'),
    (b'{"model_type": "mamba"}', r"hf: .*'mamba'; expected one of bert, "),
    (b'{"quantization_config": {}}', 'quantised weights'),
    (b'{"quantization_config": null}', r'model_type.*is missing'),
    (b'{"text_config": {}}', r'reads more than text.*GGUF'),
  ],
)
def test_wrong_config_is_an_error(sharded, content, message):
  config = sharded / 'config.json'
  config.unlink()
  if content is not None:
    config.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    pretrained.load(sharded)


def test_directory_without_weights_is_an_error(sharded):
  for path in sharded.glob('model*'):
    path.unlink()
  (sharded / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=r'pytorch_model.bin.*save_pretrained'):
    pretrained.load(sharded)


def test_absent_directory_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r'config\.json is missing'):
    pretrained.read_safetensors(tmp_path / 'absent')


def test_wrong_shape_names_file_and_tensor(tmp_path, arrays):
  wrong = arrays | {GATE: arrays[GATE][:-1]}
  directory = files.write_directory(tmp_path / 'hf', wrong)
  with pytest.raises(ValueError, match=r'hf: .*gate_proj.*\[63, 32\].*\[64'):
    pretrained.load(directory)


# Model and tokenizer together


def smaller(name, rows):
  return {name: files.tensors()[name][:rows]}


def test_tokenizer_of_another_model_is_an_error(tmp_path, arrays):
  rows = len(files.TOKENS) - 1
  fewer = arrays | smaller('model.embed_tokens.weight', rows)
  fewer |= smaller('lm_head.weight', rows)
  config = files.CONFIG | {'vocab_size': rows}
  message = rf'has {rows + 1} ids, the model {rows}; .*belongs to the model'
  directory = files.write_directory(tmp_path / 'hf', fewer, config)
  with pytest.raises(ValueError, match=message):
    pretrained.load(directory)
  words = files.backend()
  words.add_special_tokens([files.TOKENS[-1]])  # No text has it.
  words.save(str(directory / 'tokenizer.json'))
  assert pretrained.load(directory).tokenizer.vocab_size == rows + 1
  with pytest.raises(ValueError, match=message):
    pretrained.load(files.write_gguf(tmp_path / 'model.gguf', fewer))


def test_embeddings_may_be_padded_in_a_directory_alone(tmp_path, arrays):
  padding = np.zeros((3, files.D_MODEL), np.float32)
  more = arrays | {
    name: np.concatenate([arrays[name], padding])
    for name in ('model.embed_tokens.weight', 'lm_head.weight')
  }
  rows = len(files.TOKENS) + 3
  config = files.CONFIG | {'vocab_size': rows}
  directory = files.write_directory(tmp_path / 'hf', more, config)
  assert pretrained.load(directory).model.vocabulary_size == rows
  with pytest.raises(ValueError, match=rf'ids, the model {rows}'):
    pretrained.load(files.write_gguf(tmp_path / 'model.gguf', more))


def fail_to_load(path):
  with pytest.raises(ValueError, match='is missing'):
    pretrained.load(path)


@pytest.mark.parametrize('layout', ['gguf', 'directory'])
def test_a_failed_load_leaves_nothing_behind(tmp_path, arrays, layout):
  part = {name: a for name, a in arrays.items() if 'layers.1.mlp' not in name}
  path = tmp_path / 'model'
  if layout == 'gguf':
    files.write_gguf(path, part)
  else:
    files.write_directory(path, part, num_shards=2)
  before = len(jax.live_arrays()), sorted(tmp_path.rglob('*'))
  fail_to_load(path)
  gc.collect()
  assert (len(jax.live_arrays()), sorted(tmp_path.rglob('*'))) == before
  assert not mapped(path)


@pytest.mark.parametrize('name', ['gguf', 'safetensors', 'tokenizers'])
def test_absent_package_names_the_fix(
  monkeypatch, tmp_path, whole, arrays, name
):
  def absent(wanted, package=None):
    if wanted == name:
      raise ImportError(f'No module named {name!r}')
    return original(wanted, package)

  original = importlib.import_module
  directory = tmp_path / 'hf'
  save = {'safetensors': files.write_directory}.get(name)
  path = save(directory, arrays) if save else whole
  monkeypatch.setattr(importlib, 'import_module', absent)
  with pytest.raises(ValueError, match=rf"{name}.*pip install 'iclcl_jax\[lm"):
    pretrained.load(path)


def test_non_contiguous_arrays_are_not_how_files_are_written(tmp_path, arrays):
  """The writer of these tests copies: the package would save wrong data."""
  directory = files.write_directory(tmp_path / 'hf', {'a': arrays[GATE].T})
  tensors = pretrained.read_safetensors(directory).tensors
  np.testing.assert_array_equal(tensors['a'], arrays[GATE].T)
  files.save_file({'a': arrays[GATE]}, directory / 'model.safetensors')
  tensors = pretrained.read_safetensors(directory).tensors
  np.testing.assert_array_equal(tensors['a'], arrays[GATE])


def test_a_directory_of_another_kind_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'config\.json is missing'):
    pretrained.load(tmp_path)
  (tmp_path / 'adapter_config.json').write_text('{}')
  with pytest.raises(ValueError, match=r'an adapter; .*merge_and_unload'):
    pretrained.load(tmp_path)
