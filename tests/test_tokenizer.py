"""Tokenizer: the same from both layouts, lossless, and exact about labels."""

import json
import string

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from iclcl_jax import pretrained
from iclcl_jax.pretrained._gguf_tokenizer import tokenizer_of
from iclcl_jax.pretrained.gguf import open_gguf
from tests import pretrained_files as files
from tests.test_pretrained_fuzz import limits

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
  alone = tokenizer.encode('ok', add_special_tokens=False)
  np.testing.assert_array_equal(alone, [index('ok')])
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
  with pytest.raises(
    ValueError, match=rf'ids holds {wrong}; expected integers from'
  ):
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
    ({'pre': 'viking'}, r"pre' is 'viking'; expected one of gpt-2, olmo"),
    ({'pre': None}, r"pre' is missing; expected one of gpt-2, olmo"),
    ({'model': 'llama'}, r"'tokenizer.ggml.scores' is missing"),
    ({'model': 't5'}, r"model' is 't5'; expected one of gpt2, llama"),
    ({'model': None}, r"model' is missing; expected one of gpt2, llama"),
    ({'add_sep_token': True}, r"add_sep_token' is True, a setting that is not"),
    (
      {'normalizer.lowercase': True},
      r"lowercase' is True, a setting that is not",
    ),
    ({'tokens': None}, r"'tokenizer.ggml.tokens' is missing"),
    ({'merges': None}, r"'tokenizer.ggml.merges' is missing"),
    ({'merges': [1, 2]}, r"ggml.merges' is \[1, 2\]; expected a list of  str"),
    ({'merges': ['x yz']}, r'vocabulary and merges .* disagree'),
    ({'merges': ['xyz']}, r'vocabulary and merges .* disagree'),
    ({'tokens': ['ok', *files.TOKENS[1:]]}, r'tokens of which \d+ differ'),
    ({'token_type': [3]}, r"token_type' is \[3\]; expected a list of \d+ int"),
    (
      {'add_bos_token': True, 'bos_token_id': 999},
      r"bos_token_id' is 999; expected an id below",
    ),
    (
      {'add_eos_token': True, 'eos_token_id': None},
      r"eos_token_id' is missing",
    ),
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


@pytest.mark.parametrize('cased', [True, False])
def test_words_are_cut_as_the_tokenizer_of_a_bert_does(tmp_path, cased):
  special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  words = ['A' if cased else 'a', 'walk', '##ing', '##ed', 'caf', '##é', '##e']
  words += ['E' if cased else 'e', '##ta', '!', '中', '##', '#', '###']
  tokens = special + words
  peer = files.tokenizers.BertWordPieceTokenizer(
    {token: n for n, token in enumerate(tokens)}, lowercase=not cased
  )
  # As converters write it: what begins a word is marked, not what goes on.
  pieces = [w[2:] if w.startswith('##') else '▁' + w for w in words]
  ids = {'unknown': 1, 'cls': 2, 'seperator': 3, 'padding': 0, 'mask': 4}
  names = 'model', 'tokens', 'token_type', 'merges', 'pre', 'add_sep_token'
  values = (
    'bert',
    special + pieces,
    [3] * 5 + [1] * len(words),
    None,
    None,
    True,
  )
  changes = dict(zip(names, values, strict=True))
  changes |= {f'{name}_token_id': n for name, n in ids.items()}
  changes |= {'bos_token_id': None, 'eos_token_id': None}
  tokenizer = gguf_tokenizer(
    tmp_path, {f'tokenizer.ggml.{name}': v for name, v in changes.items()}
  )
  for text in ('A walking café! [MASK]', 'Éta  a中walked walks', '', '# a'):
    expected = peer.encode(text)
    np.testing.assert_array_equal(tokenizer.encode(text), expected.ids)
    np.testing.assert_array_equal(tokenizer.spans(text), expected.offsets)
  assert set(tokenizer.special_tokens) == set(special)
  assert tokenizer.decode([5, 6, 7]) == f'{words[0]} walking'


# What each rule makes of a text, cut at the bars.
CUT_TEXT = "I'M in 2024, ça va HELLOWorlD  x\n\n y'all"
CUTS = {
  'gpt-2': "I|'|M| in| 2024|,| ça| va| HELLOWorlD| | x|\n\n| y|'|all",
  'olmo': "I|'|M| in| 2024|,| ça| va| HELLOWorlD| | x|\n\n| y|'|all",
  'smollm': "I|'|M| in| |2|0|2|4|,| ça| va| HELLOWorlD| | x|\n\n| y|'|all",
  'llama-bpe': "I|'M| in| |202|4|,| ça| va| HELLOWorlD| | x|\n\n| y|'all",
  'smaug-bpe': "I|'M| in| |202|4|,| ça| va| HELLOWorlD| | x|\n\n| y|'all",
  'dbrx': "I|'M| in| |202|4|,| ça| va| HELLOWorlD| | x|\n\n| y|'all",
  'qwen2': "I|'M| in| |2|0|2|4|,| ça| va| HELLOWorlD| | x|\n\n| y|'all",
  'tekken': "I|'M| in| |2|0|2|4|,| ça| va| HELLOWorl|D| | x|\n\n| y|'all",
  'gpt-4o': "I'M| in| |202|4|,| ça| va| HELLOWorl|D| | x|\n\n| y|'all",
}


@pytest.mark.parametrize('rules', CUTS)
def test_text_is_cut_by_the_rules_that_the_file_names(tmp_path, rules):
  kinds = {'tokenizer.ggml.pre': rules}
  backend = gguf_tokenizer(tmp_path, kinds).backend
  spans = backend.pre_tokenizer.pre_tokenize_str(CUT_TEXT)
  pieces = [CUT_TEXT[begin:end] for _, (begin, end) in spans]
  assert '|'.join(pieces) == CUTS[rules]


def test_a_silent_file_begins_texts_as_its_rules_do(tmp_path):
  for rules, begins in (('llama-bpe', True), ('smaug-bpe', False)):
    words = gguf_tokenizer(tmp_path, {'tokenizer.ggml.pre': rules})
    assert (words.encode('ok')[0] == START) == begins


# Pieces of SentencePiece: the unknown one, ends, bytes, letters, and words.
PIECES = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
NUM_BYTES = len(PIECES)
PIECES += ['▁', *string.ascii_lowercase]
WORDS = ['th', 'he', '▁t', 'the', '▁the', 'ca', 'at', 'cat', '▁cat', '▁▁']
PIECES += WORDS
SENTENCES = {
  'tokenizer.ggml.model': 'llama',
  'tokenizer.ggml.tokens': PIECES,
  'tokenizer.ggml.scores': [0.0] * (len(PIECES) - len(WORDS))
  + [-float(n) for n in range(1, len(WORDS) + 1)],
  'tokenizer.ggml.token_type': [2, 3, 3] + [6] * 256 + [1] * 37,
  'tokenizer.ggml.merges': None,
  'tokenizer.ggml.eos_token_id': 2,
}


@pytest.fixture(scope='module', params=[True, False])
def pieces(request, tmp_path_factory):
  prefix = {'tokenizer.ggml.add_space_prefix': request.param}
  path = tmp_path_factory.mktemp('pieces')
  return gguf_tokenizer(path, SENTENCES | prefix), request.param


def test_pieces_are_those_of_sentencepiece(pieces):
  words, prefix = pieces
  first = ['▁the'] if prefix else ['the']
  tokens = [PIECES[index] for index in words.encode('the catx é')]
  assert tokens == ['<s>', *first, '▁cat', 'x', '▁', '<0xC3>', '<0xA9>']
  assert words.special_tokens == {'<unk>': 0, '<s>': 1, '</s>': 2}


def test_pieces_of_any_length_are_read_soon(tmp_path):
  long = {
    'tokens': [*PIECES, 'a' * 500_000],
    'scores': [0.0] * (1 + len(PIECES)),
  }
  long |= {'token_type': [*SENTENCES['tokenizer.ggml.token_type'], 1]}
  changes = {f'tokenizer.ggml.{name}': value for name, value in long.items()}
  with limits() as loads:
    assert loads(lambda _: gguf_tokenizer(tmp_path, SENTENCES | changes), 0)


@hypothesis.given(st.text())
@hypothesis.example('the  cat\n')
def test_decoding_pieces_gives_the_text_back(pieces, text):
  hypothesis.assume('▁' not in text and '<' not in text)
  words, _ = pieces
  assert words.decode(words.encode(text)[1:]) == text


@pytest.mark.parametrize('prefix', [True, False])
def test_pieces_equal_those_of_transformers(tmp_path, prefix):
  transformers = pytest.importorskip('transformers')
  utilities = transformers.tokenization_utils_base
  scores = dict(zip(PIECES, SENTENCES['tokenizer.ggml.scores'], strict=True))
  vocabulary = {piece: index for index, piece in enumerate(PIECES)}
  merges = utilities.generate_merges(vocabulary, scores)
  kind = transformers.LlamaTokenizer if prefix else transformers.GemmaTokenizer
  peer = kind(
    vocab=vocabulary,
    merges=merges,
    bos_token='<s>',
    eos_token='</s>',
    unk_token='<unk>',
  )
  words = gguf_tokenizer(
    tmp_path, SENTENCES | {'tokenizer.ggml.add_space_prefix': prefix}
  )
  rng = np.random.default_rng(0)
  for _ in range(50):
    text = ''.join(rng.choice(list('thecatx é,')) for _ in range(12)).strip()
    expected = peer.encode(text, add_special_tokens=False)
    assert words.encode(text)[1:].tolist() == expected, text


# Chat templates

TEMPLATE = """{{ bos_token }}{% for message in messages %}
  {%- if message.role not in ['system', 'user', 'assistant'] %}
    {{- raise_exception('no such role') }}
  {%- endif %}
  {%- if loop.last and message.role == 'x' %}{% break %}{% endif %}
<|{{ message['role'] }}|>
{% generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{- {'é': 1} | tojson }}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MESSAGES = [
  {'role': 'system', 'content': ' Be brief. '},
  {'role': 'user', 'content': '2 + 2? <b>é</b>'},
]
PROMPT = """<|start|><|system|>
Be brief.<|end|>
<|user|>
2 + 2? <b>é</b><|end|>
{"é": 1}
"""
ENDS = {'bos_token': '<|start|>', 'eos_token': {'content': '<|end|>'}}
ENDS['eos_token']['__type'] = 'AddedToken'


def with_template(path, place):
  files.write_directory(path, {})
  config = ENDS | {'chat_template': TEMPLATE}
  if place == 'gguf':
    changes = {'tokenizer.chat_template': TEMPLATE}
    return gguf_tokenizer(path, changes)
  if place == 'file':
    (path / 'chat_template.jinja').write_text(TEMPLATE)
    config['chat_template'] = 'another'
  if place == 'list':
    named = [('tool_use', 'x'), ('default', TEMPLATE)]
    config['chat_template'] = [{'name': n, 'template': t} for n, t in named]
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  return pretrained.read_tokenizer(path)


@pytest.mark.parametrize('place', ['gguf', 'file', 'list', 'settings'])
def test_a_conversation_is_written_as_the_files_say(tmp_path, place):
  pytest.importorskip('jinja2')
  words = with_template(tmp_path, place)
  assert words.chat(MESSAGES) == PROMPT + '<|assistant|>\n'
  assert words.chat(MESSAGES, add_generation_prompt=False) == PROMPT


def test_conversations_are_those_of_transformers(tmp_path):
  transformers = pytest.importorskip('transformers')
  words = with_template(tmp_path, 'settings')
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for more in (False, True):
    expected = peer.apply_chat_template(
      MESSAGES, add_generation_prompt=more, tokenize=False
    )
    assert words.chat(MESSAGES, add_generation_prompt=more) == expected


@pytest.mark.parametrize(
  ('messages', 'message'),
  [
    ([{'role': 'x', 'content': ''}], 'TemplateError: no such role'),
    ([{'content': ''}], 'messages is .*each with a role'),
    (['ok'], 'messages is .*each with a role'),
    ([{'role': 'user', 'content': {1}}], 'TypeError.*JSON'),
    ('ok', "messages is 'ok'; expected a list of dicts"),
  ],
)
def test_what_a_template_does_not_take_is_an_error(tmp_path, messages, message):
  pytest.importorskip('jinja2')
  words = with_template(tmp_path, 'settings')
  with pytest.raises(ValueError, match=message):
    words.chat(messages)


def test_a_base_model_has_no_template(words):
  with pytest.raises(ValueError, match=r'no chat template.*base model'):
    words.chat(MESSAGES)


def test_merges_of_gemma_follow_the_order_of_its_pieces(tmp_path):
  pieces = ['<unk>', '<s>', '</s>', *'abc▁', 'ab', 'bc', '  ']
  metadata = (
    files.METADATA
    | SENTENCES
    | {
      'tokenizer.ggml.tokens': pieces,
      'tokenizer.ggml.scores': [0.0] * 7 + [-2.0, -1.0, -3.0],
      'tokenizer.ggml.token_type': [2, 3, 3] + [1] * 6 + [4],
      'tokenizer.ggml.add_space_prefix': False,
    }
  )
  for architecture, expected in (('gemma2', 'ab|c|▁▁'), ('llama', 'a|bc|  ')):
    path = files.write_gguf(
      tmp_path / 'words.gguf', {}, metadata, architecture=architecture
    )
    words = tokenizer_of(open_gguf(path))
    found = words.backend.encode('abc  ', add_special_tokens=False).tokens
    assert '|'.join(found) == expected
