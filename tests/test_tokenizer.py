"""Tokenizer: the same from both layouts, lossless, and exact about labels."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from iclcl_jax import pretrained
from iclcl_jax.pretrained.gguf import open_gguf
from iclcl_jax.pretrained.tokenizer import tokenizer_of
from tests import pretrained_files as files

END, START = 0, 1
TEXT = 'the 2012 oak, naïve 🙂\n'


def index(token):
  return files.TOKENS.index(token)


def gguf_tokenizer(path, changes=()):
  metadata = files.METADATA | dict(changes)
  file = files.write_gguf(path / 'words.gguf', {}, metadata)
  return tokenizer_of(open_gguf(file))


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return gguf_tokenizer(tmp_path_factory.mktemp('gguf'))


def test_merges_follow_the_order_of_the_file(words):
  # 'Ġt' is merged before 'Ġthe' can be; 'the' at the start has no such merge.
  expected = [index('t'), index('he'), index('Ġthe'), index('ok')]
  np.testing.assert_array_equal(words.encode('the theok'), expected)


def test_digits_stand_alone_unless_the_rules_are_those_of_gpt2(words, tmp_path):
  single = [index('1'), index('2')]
  np.testing.assert_array_equal(words.encode('12'), single)
  other = gguf_tokenizer(tmp_path, {'tokenizer.ggml.pre': 'gpt-2'})
  np.testing.assert_array_equal(other.encode('12'), [index('12')])


def test_both_layouts_give_the_same_ids(words, tmp_path):
  files.write_directory(tmp_path, {})
  other = pretrained.read_tokenizer(tmp_path)
  text = TEXT + '<|start|>12'
  np.testing.assert_array_equal(words.encode(text), other.encode(text))
  assert words.special_tokens == other.special_tokens
  assert words.vocab_size == other.vocab_size == len(files.TOKENS)


def test_ids_are_a_vector_of_int32(words):
  for text, size in (('', 0), ('the', 2)):
    ids = words.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (size,)
    assert words.spans(text).shape == (size, 2)


@hypothesis.given(st.text())
@hypothesis.example(TEXT)
@hypothesis.example('  two  spaces \t\r\n')
@hypothesis.example('<|end|>')
def test_decoding_gives_the_text_back(words, text):
  assert words.decode(words.encode(text)) == text


@hypothesis.given(st.text(st.characters(max_codepoint=127)))
def test_spans_cut_plain_text_into_its_tokens(words, text):
  spans = words.spans(text)
  pieces = [text[begin:end] for begin, end in spans]
  assert ''.join(pieces) == text
  assert pieces == [words.token(i) for i in words.encode(text)]


def test_every_byte_of_a_character_covers_it(words):
  spans = words.spans('a🙂b')
  np.testing.assert_array_equal(spans, [[0, 1]] + [[1, 2]] * 4 + [[2, 3]])


def test_special_tokens_are_recognised_and_never_merged(words):
  assert words.special_tokens == {'<|end|>': END, '<|start|>': START}
  ids = words.encode('<|start|>ok<|end|>')
  np.testing.assert_array_equal(ids, [START, index('ok'), END])


def test_declared_words_stay_whole(tmp_path):
  kinds = list(files.METADATA['tokenizer.ggml.token_type'])
  kinds[index('12')] = 4
  tokenizer = gguf_tokenizer(tmp_path, {'tokenizer.ggml.token_type': kinds})
  np.testing.assert_array_equal(tokenizer.encode('12'), [index('12')])
  assert '12' not in tokenizer.special_tokens


@pytest.mark.parametrize(
  ('ends', 'begin', 'end'),
  [(['bos'], [START], []), (['eos'], [], [END]), (['bos', 'eos'], [1], [0])],
)
def test_tokens_around_a_text_are_added_as_the_file_says(
  tmp_path, ends, begin, end
):
  changes = {f'tokenizer.ggml.add_{name}_token': True for name in ends}
  tokenizer = gguf_tokenizer(tmp_path, changes)
  ids = tokenizer.encode('ok')
  np.testing.assert_array_equal(ids, [*begin, index('ok'), *end])
  spans = tokenizer.spans('ok')
  np.testing.assert_array_equal(spans[len(begin)], [0, 2])
  assert tokenizer.single_id('ok') == index('ok')


def test_a_label_is_one_token_or_an_error(words):
  assert words.single_id(' the') == index('Ġthe')
  with pytest.raises(ValueError, match=r"'the' is 2 tokens.*'t', 'he'.*space"):
    words.single_id('the')
  with pytest.raises(ValueError, match="'' is 0 tokens"):
    words.single_id('')


@pytest.mark.parametrize('wrong', [-1, len(files.TOKENS)])
def test_ids_outside_of_the_vocabulary_are_an_error(words, wrong):
  with pytest.raises(ValueError, match=rf'ids hold {wrong}; expected ids from'):
    words.decode([0, wrong])


@pytest.mark.parametrize('text', [None, 3, ['ok'], b'ok'])
def test_what_is_no_text_is_an_error(words, text):
  for call in (words.encode, words.spans, words.single_id):
    with pytest.raises(ValueError, match='expected a string'):
      call(text)


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path):
  backend = files.backend()
  backend.enable_truncation(2)
  backend.enable_padding(length=8)
  backend.save(str(tmp_path / 'tokenizer.json'))
  stored = json.loads((tmp_path / 'tokenizer.json').read_text())
  assert stored['truncation']
  assert stored['padding']
  ids = pretrained.read_tokenizer(tmp_path).encode('the 12')
  assert len(ids) == 5


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'pre': 'llama-bpe'}, r"rules 'llama-bpe'; known are gpt-2, smollm"),
    ({'pre': None}, r'rules None; known are'),
    ({'model': 'llama'}, r"kind 'llama'; expected 'gpt2'"),
    ({'model': None}, r"kind None; expected 'gpt2'"),
    ({'tokens': None}, r"lacks the metadata 'tokenizer.ggml.tokens'"),
    ({'merges': None}, r"lacks the metadata 'tokenizer.ggml.merges'"),
    ({'merges': [1, 2]}, r"lacks the metadata 'tokenizer.ggml.merges'"),
    ({'merges': ['x yz']}, r'vocabulary and merges .* disagree'),
    ({'merges': ['xyz']}, r'vocabulary and merges .* disagree'),
    ({'tokens': ['ok', *files.TOKENS[1:]]}, r'tokens of which \d+ differ'),
    ({'token_type': [3]}, r'kinds of 1 of \d+ tokens'),
    ({'add_bos_token': True, 'bos_token_id': 999}, r"'bos'.* 999 of"),
    ({'add_eos_token': True, 'eos_token_id': None}, r"'eos'.* None of"),
  ],
)
def test_wrong_gguf_tokenizer_is_an_error(tmp_path, changes, message):
  changes = {f'tokenizer.ggml.{name}': v for name, v in changes.items()}
  with pytest.raises(ValueError, match=rf'words.gguf.*{message}'):
    gguf_tokenizer(tmp_path, changes)


def test_absent_or_corrupt_file_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r'tokenizer.json is missing.*save_pret'):
    pretrained.read_tokenizer(tmp_path)
  path = tmp_path / 'tokenizer.json'
  for content in ('', '{"model": ', '{}', '[]'):
    path.write_text(content)
    with pytest.raises(ValueError, match=r'no readable tokenizer.*again'):
      pretrained.read_tokenizer(tmp_path)


def test_a_word_piece_tokenizer_puts_its_tokens_around(tmp_path):
  vocabulary = {'[CLS]': 0, '[SEP]': 1, 'good': 2, 'film': 3, '[UNK]': 4}
  backend = files.tokenizers.Tokenizer(
    files.tokenizers.models.WordPiece(vocabulary, unk_token='[UNK]')
  )
  backend.pre_tokenizer = files.tokenizers.pre_tokenizers.Whitespace()
  backend.add_special_tokens(['[CLS]', '[SEP]'])
  backend.post_processor = files.tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 0), ('[SEP]', 1)]
  )
  backend.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = pretrained.read_tokenizer(tmp_path)
  ids = tokenizer.encode('good film')
  np.testing.assert_array_equal(ids, [0, 2, 3, 1])
  assert tokenizer.single_id('film') == 3
