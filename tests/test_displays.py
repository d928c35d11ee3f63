"""What objects show of themselves: short, and escaped."""

import copy
import dataclasses
import html.parser
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import (
  dual,
  equivalence,
  features,
  kernels,
  losses,
  modified,
  pretrained,
)
from iclcl_jax.pretrained import _chat, attribution, tokenizer
from iclcl_jax.pretrained.attribution import _html
from tests import families, pretrained_files as files

KERNEL = kernels.ExponentialKernel()
X = jnp.ones((5, 4))


@pytest.mark.parametrize('name', families.CONFIGS)
def test_a_model_shows_shapes_and_no_numbers(name):
  shown = repr(families.model_of(name, 'float64'))
  assert len(shown) < 4000
  assert shown.startswith('LanguageModel(embedding=float64[')
  assert 'query=Linear(weight=float64[' in shown
  assert 'None' not in shown


@pytest.mark.parametrize(
  ('thing', 'shown'),
  [
    (
      dual.zero_shot(KERNEL, X, X),
      'KernelDualState(keys=float64[5, 4], coefficients=float64[5, 4], '
      'mass=float64[5])',
    ),
    (
      dual.zero_shot(features.EluPlusOneFeatures(), X[:, :1], X[:, :1]),
      'DualState(weights=[[5.0]], mass=[5.0], log_scale=[0.6931471805599453])',
    ),
    (
      features.PositiveFeatures(X),
      'PositiveFeatures(projection=float64[5, 4])',
    ),
    (
      modified.second_step(momentum=0.5),
      'SecondStep(learning_rate=1.0, momentum=0.5)',
    ),
    (
      modified.attention_from_loss(losses.squared),
      'LossAttention(loss=squared, step_size=1.0, decay=0.0)',
    ),
  ],
)
def test_small_numbers_are_shown_and_large_arrays_are_described(thing, shown):
  assert repr(thing) == shown


def test_a_traced_field_has_a_shape():
  seen = []
  jax.jit(lambda phi: seen.append(repr(phi)))(features.PositiveFeatures(X[0]))
  assert seen == ['PositiveFeatures(projection=float64[4])']


def test_a_certificate_is_a_table_whose_words_are_escaped():
  def strange(x, y):
    return KERNEL(x, y)

  strange.__name__ = '<script>'
  certificate = equivalence.verify(strange, X[0], X, X)
  assert repr(certificate) == str(certificate)
  page = certificate._repr_html_()
  assert '<script>' not in page
  assert '&lt;script&gt;' in page
  for word in ('holds', '5 + 0', f'{certificate.residual:.1e}'):
    assert f'{word}' in page
  assert page.count('<tr>') == len(str(certificate).splitlines()) - 1


DEMONSTRATIONS = (
  'A <script>x</script> & "q"\n\n = the\n\n',
  'يوم جميل 👩\u200d👩\u200d👧 🇩🇪 नमस्ते e\u0301\n\n = t\n\n',
)
WHOLE = '👩\u200d👩\u200d👧', '🇩🇪', 'ते', 'e\u0301'
PROMPT = f'Some words.\n\n{"".join(DEMONSTRATIONS)}\ttab\x00 ='
LABELS = ' the', ' t'
OUTSIDE = 'html', 'head', 'meta', 'title', 'style', 'body', 'div', 'h1', 'h2'
INSIDE = 'p', 'b', 'i', 'u', 'em', 'bdi', 'sup', 'span', 'code'
TABLES = 'table', 'tr', 'th', 'td', 'svg', 'text', 'circle'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A random model, and a tokenizer of bytes."""
  path = tmp_path_factory.mktemp('model') / 'small'
  return pretrained.load(files.write_model(path, ['<added>']))


@pytest.fixture
def chat(model):
  """Its tokenizer, which puts a token before a text, as a template does."""
  backend = copy.deepcopy(model.tokenizer.backend)
  index = backend.token_to_id('<added>')
  backend.post_processor = files.tokenizers.processors.TemplateProcessing(
    single='<added> $A', special_tokens=[('<added>', index)]
  )
  source = "<added>{% for x in messages %}{{ x['content'] }}{% endfor %}"
  return tokenizer.Tokenizer(backend, _chat.ChatTemplate(source, {}))


@pytest.fixture(scope='module')
def page(model):
  return attribution.page(*model, PROMPT, DEMONSTRATIONS, LABELS)


class Reader(html.parser.HTMLParser):
  """Collects tags, addresses, the prompt, and the numbers on its pieces."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.addresses, self.prompt = set(), [], ''
    self.values, self.open = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    attrs = dict(attrs)
    self.addresses += {'src', 'href'} & set(attrs)
    if tag != 'meta':
      self.open.append(attrs.get('class') or tag)
    if 'title' in attrs:
      self.values.append(float(attrs['title']))

  def handle_endtag(self, tag):
    self.open.pop()

  def handle_data(self, data):
    if 'tokens' in self.open and 'sup' not in self.open:
      self.prompt += data


def numbers_in(text):
  return [
    float(x) for x in re.findall(r'class="number[^"]*">([-+][.\d]+)<', text)
  ]


def test_the_page_holds_the_prompt_and_no_tag_of_it(page):
  reader = Reader(page.to_html())
  assert reader.open == []
  assert reader.tags <= {*OUTSIDE, *INSIDE, *TABLES}
  assert not reader.addresses
  assert 'url(' not in page.to_html()
  shown = re.sub('[↵␣]', '', reader.prompt)
  assert shown.split() == PROMPT.replace('\x00', '␀').split()
  assert ''.join(page.pieces) == PROMPT.replace('\x00', '␀')


def test_no_character_is_cut(page):
  assert len(page.pieces) < len(page.segment_ids)
  for text in WHOLE:
    assert any(text in piece for piece in page.pieces)
  assert page.names[0] == 'A <script>x</script> & "q" = the'


def test_numbers_of_the_page_are_those_of_the_arrays(page, model):
  tokens = jnp.asarray(model.tokenizer.encode(PROMPT))
  segments = jnp.asarray(
    attribution.mark_spans(model.tokenizer, PROMPT, DEMONSTRATIONS)
  )
  labels = [model.tokenizer.single_id(label) for label in LABELS]
  question = model.model, tokens, segments, *labels
  predicted = attribution.influence(*question, num_segments=2).sum((0, 1))
  measured = attribution.effects_of_removal(*question, num_segments=2)
  found = attribution.attribute(*question, num_segments=2)
  read = found.contributions.sum((0, 1))
  text = page.to_html()
  shown = np.reshape(numbers_in(text), (2, 3))
  expected = np.stack([predicted, measured, read], axis=1)
  np.testing.assert_allclose(shown, expected, rtol=0, atol=0.00501)
  values = np.add.reduceat(
    np.asarray(page.attribution.contributions.sum((0, 1))), page.starts
  )
  np.testing.assert_allclose(Reader(text).values, values, rtol=0, atol=6e-4)
  members = np.asarray(segments)[page.starts] == 1
  np.testing.assert_allclose(values[members].sum(), read[1], atol=1e-4)
  of_heads = found.contributions.sum(2) + found.rest
  for head, value in np.ndenumerate(np.asarray(of_heads)):
    title = f'layer {head[0]}, head {head[1]}: ([-+][.\\d]+)<'
    assert abs(float(re.search(title, text)[1]) - value) < 6e-4
  log_odds = np.asarray(pretrained.next_token_logits(model.model, tokens))
  log_odds = log_odds[labels[0]] - log_odds[labels[1]]
  assert f'log-odds are {log_odds:+.2f}' in ' '.join(text.split())
  assert f'{predicted[1]:+9.2f}  {measured[1]:+7.2f}' in repr(page)


def test_a_long_page_of_a_large_model_is_small():
  rng = np.random.default_rng(0)
  size, heads = 2000, (80, 64)
  zero = np.zeros((), 'f4')
  found = attribution.LogitAttribution(
    logit_difference=zero,
    contributions=rng.normal(size=(*heads, size)).astype('f4'),
    rest=np.zeros(heads, 'f4'),
    embedding=zero,
    biases=np.zeros(80, 'f4'),
    final_bias=zero,
    removal_effects=zero,
    directions=None,
  )
  page = attribution.Page(
    pieces=[['\n\n', ' слово', '<b>', '🦜'][i % 4] for i in range(size)],
    starts=list(range(size)),
    segment_ids=np.repeat(np.arange(-1, 19), 100),
    names=[f'{i} {"x" * 40}' for i in range(19)],
    labels=['a', 'b'],
    log_probabilities=np.log([0.6, 0.3]),
    influence=rng.normal(size=19),
    effects=rng.normal(size=19),
    attribution=found,
    dtype='float32',
  )
  assert len(page.to_html().encode()) < 1_000_000
  assert len(found._repr_html_().encode()) < 1_000_000
  assert found._repr_html_().count('class="bars"') == 40 + 3
  batch = found._replace(contributions=found.contributions[None])
  assert batch._repr_html_() is None


def test_a_page_is_written_and_goes_on(page, tmp_path):
  page.write(tmp_path / 'page.html')
  text = (tmp_path / 'page.html').read_text(encoding='utf-8')
  assert text == page.to_html()
  more = page.to_html(more='<p>More & more.</p>')
  assert more.replace('<p>More & more.</p>', '') == text
  shown = page._repr_html_()
  assert '<html' not in shown
  assert shown[shown.index('<div') :].strip() in text


def test_prompts_without_demonstrations_and_labels_of_several_tokens(model):
  page = attribution.page(*model, '<added>ok =', [], (' the ok', [3, 4]))
  text = page.to_html()
  assert 'Which demonstration matters' not in text
  assert 'A label has several tokens' in text
  assert page.labels[0] == 'the ok'
  np.testing.assert_allclose(
    page.attribution.total, page.attribution.logit_difference, atol=1e-4
  )


def test_the_tokens_of_a_chat_template_stand_once(model, chat):
  text = chat.chat([{'role': 'user', 'content': 'ok = the\n\nok ='}])
  spans, index = ['ok = the\n\n'], chat.encode('')[0]
  found = attribution.page(
    model.model, chat, text, spans, LABELS, add_special_tokens=False
  )
  tokens = chat.encode(text, add_special_tokens=False)
  assert tokens.tolist().count(index) == 1
  assert ''.join(found.pieces) == text
  assert len(found.segment_ids) == len(tokens)
  np.testing.assert_array_equal(
    found.segment_ids,
    attribution.mark_spans(chat, text, spans, add_special_tokens=False),
  )
  scores = pretrained.score_labels(
    model.model, tokens, [chat.encode(x)[1:] for x in LABELS]
  )
  np.testing.assert_allclose(found.log_probabilities, scores, rtol=1e-5)
  twice = attribution.page(model.model, chat, text, spans, LABELS)
  assert ''.join(twice.pieces) == f'<added>{text}'


def test_a_page_encodes_its_prompt_once(model, monkeypatch):
  texts = []
  encode = tokenizer.Tokenizer.encoding

  def noting(self, text, add_special_tokens=True):
    texts.append(text)
    return encode(self, text, add_special_tokens)

  monkeypatch.setattr(tokenizer.Tokenizer, 'encoding', noting)
  attribution.page(*model, PROMPT, DEMONSTRATIONS, LABELS)
  assert sorted(texts) == sorted([PROMPT, *LABELS])


def test_the_first_demonstration_has_no_bar_if_it_holds_the_first_token(model):
  text = DEMONSTRATIONS[0] + DEMONSTRATIONS[1] + 'ok ='
  page = attribution.page(*model, text, DEMONSTRATIONS, LABELS)
  shown = page.to_html()
  assert shown.count('†') == 2
  assert len(re.findall(r'<div class="bar">\s*<i', shown)) == 1
  header, first, second, note = repr(page).splitlines()
  assert first.endswith('†')
  assert '†' not in header + second
  assert note.startswith('† holds the first token')


def test_a_page_names_its_arithmetic_and_refuses_weights_of_nan(model, page):
  assert 'bfloat16' not in page.to_html()
  assert (
    'All was computed\nin bfloat16' in page._replace(dtype='bfloat16').to_html()
  )
  broken = dataclasses.replace(
    model.model, embedding=model.model.embedding * jnp.nan
  )
  with pytest.raises(ValueError, match=r'log-probabilities .*nan.*NaN among'):
    attribution.page(broken, model.tokenizer, PROMPT, DEMONSTRATIONS, LABELS)


def test_a_page_takes_the_model_first(model):
  with pytest.raises(ValueError, match='model is a Tokenizer; expected'):
    attribution.page(*model[::-1], PROMPT, DEMONSTRATIONS, LABELS)
  with pytest.raises(
    ValueError, match='tokenizer is a LanguageModel; expected'
  ):
    attribution.mark_spans(model.model, PROMPT, DEMONSTRATIONS)


@pytest.mark.parametrize('labels', ['the', (' the',), (' the', ' t', ' ok')])
def test_a_page_compares_two_labels(labels, model):
  with pytest.raises(ValueError, match=r'labels is .*expected two, such as'):
    attribution.page(*model, 'ok =', [], labels)


def test_without_jinja_the_extra_is_named(page, monkeypatch):
  monkeypatch.setitem(sys.modules, 'jinja2', None)
  monkeypatch.setattr(_html, '_environment', _html._environment.__wrapped__)
  with pytest.raises(ValueError, match=r"'jinja2'.*iclcl_jax\[lm\]"):
    page.to_html()
  assert page._repr_html_() is None
  assert page.attribution._repr_html_() is None
