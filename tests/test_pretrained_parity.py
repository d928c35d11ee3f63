"""Each family against `transformers` (torch, eager) on checkpoints on disk."""

import contextlib
import copy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import pretrained
from iclcl_jax.pretrained.safetensors import read_safetensors
from tests import families
from tests.families import CONFIGS

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = [
  pytest.mark.slow,
  # Those of torch and transformers about themselves.
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
  pytest.mark.filterwarnings('ignore::FutureWarning'),
]

TOLERANCE = {'float32': 1e-4, 'float64': 1e-9}
SIZE = 11  # Tokens of a prompt.
CAUSAL = [name for name in CONFIGS if not name.startswith('bert')]
CLASSES = {
  'bert': ('BertConfig', 'BertModel'),
  'gemma2': ('Gemma2Config', 'Gemma2ForCausalLM'),
  'gemma3_text': ('Gemma3TextConfig', 'Gemma3ForCausalLM'),
  'gpt2': ('GPT2Config', 'GPT2LMHeadModel'),
  'gpt_neox': ('GPTNeoXConfig', 'GPTNeoXForCausalLM'),
  'gpt_oss': ('GptOssConfig', 'GptOssForCausalLM'),
  'llama': ('LlamaConfig', 'LlamaForCausalLM'),
  'mistral': ('MistralConfig', 'MistralForCausalLM'),
  'olmo2': ('Olmo2Config', 'Olmo2ForCausalLM'),
  'phi3': ('Phi3Config', 'Phi3ForCausalLM'),
  'qwen2': ('Qwen2Config', 'Qwen2ForCausalLM'),
  'qwen3': ('Qwen3Config', 'Qwen3ForCausalLM'),
  'smollm3': ('SmolLM3Config', 'SmolLM3ForCausalLM'),
}


@pytest.fixture(scope='module')
def peers(tmp_path_factory):
  """Makes models of `transformers` with random weights, and writes them."""
  made = {}

  def peer(name):
    if name not in made:
      made[name] = make_peer(name), tmp_path_factory.mktemp(name)
      made[name][0].save_pretrained(made[name][1])
    return made[name]

  return peer


def make_peer(name):
  return peer_of(name.partition('-')[0], CONFIGS[name])


def peer_of(family, fields):
  """No weight is zero or one, so that each counts."""
  config_name, model_name = CLASSES[family]
  config = getattr(transformers, config_name)(**copy.deepcopy(fields))
  config._attn_implementation = config._experts_implementation = 'eager'
  model = getattr(transformers, model_name)(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter_name, parameter in model.named_parameters():
      # With large biases one token would win whatever the prompt is.
      scale = 0.05 if parameter_name.endswith('bias') else 0.4
      parameter.normal_(0, scale, generator=generator)
  return model


class DoubleTorch:
  """The module `torch`, whose float32 is float64.

  `transformers` computes norms, softmax and angles in float32 whatever the
  parameters are.
  """

  float32 = float = torch.float64

  def __getattr__(self, name):
    return getattr(torch, name)


@contextlib.contextmanager
def precision(model, dtype, monkeypatch):
  """Runs a peer in the dtype, and leaves it in float32."""
  if dtype == 'float32':
    yield
    return
  body = model.base_model
  angles = getattr(body, 'rotary_emb', None)
  with monkeypatch.context() as patch:
    modules = [sys.modules[type(model).__module__]]
    modules.append(transformers.modeling_rope_utils)
    for module in modules:
      patch.setattr(module, 'torch', DoubleTorch())
    patch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    model.double()
    if angles is not None:
      body.rotary_emb = type(angles)(model.config)
    yield
  model.float()
  if angles is not None:
    body.rotary_emb = angles


def tokens_of(num_prompts, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(1, 61, size=(num_prompts, SIZE))


def masks_of(lengths, side):
  mask = np.arange(SIZE)[None] < np.array(lengths)[:, None]
  return mask[:, ::-1].copy() if side == 'left' else mask


def answers_of(model, tokens, **inputs):
  """Logits, or the last hidden states of an encoder."""
  inputs = {name: torch.tensor(array) for name, array in inputs.items()}
  with torch.no_grad():
    out = model(input_ids=torch.tensor(tokens), **inputs)
  return (out.logits if hasattr(out, 'logits') else out[0]).numpy()


def assert_close(found, expected, dtype):
  assert str(found.dtype) == str(expected.dtype) == dtype
  assert np.std(expected) > 0.1  # Nothing to hide behind.
  np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('precise', ['float32', 'float64'])
def test_answers_equal_those_of_transformers(peers, name, precise, monkeypatch):
  peer, directory = peers(name)
  model = pretrained.from_checkpoint(read_safetensors(directory), dtype=precise)
  tokens = tokens_of(1)
  inputs = {}
  if name.startswith('bert'):
    types = np.random.default_rng(1).integers(0, 2, size=tokens.shape)
    inputs = {'token_type_ids': types}
    found = jax.jit(pretrained.hidden_states)(
      model, tokens[0], token_types=types[0]
    )
  else:
    found = jax.jit(pretrained.logits)(model, tokens[0])
  with precision(peer, precise, monkeypatch):
    expected = answers_of(peer, tokens, **inputs)[0]
  assert_close(found, expected, precise)


CHANGES = {
  'Llama-3.1-8B': {'is_decoder': True, 'hidden_act': 'relu2'},
  'Mistral-7B-v0.1': {'sliding_window': 2**31},
  'pythia-160m': {'rotary_emb_base': 20, 'rope_theta': 20},
  'OLMo-2-1124-7B': {'rms_norm_eps': 0.0, 'hidden_act': 'gelu_fast'},
}


@pytest.mark.parametrize('name', families.PUBLISHED)
def test_published_configs_mean_what_transformers_reads(name, tmp_path):
  config = families.published(name) | CHANGES.get(name, {})
  peer = peer_of(config['model_type'], config)
  peer.save_pretrained(tmp_path)
  checkpoint = read_safetensors(tmp_path)._replace(config=config)
  model = pretrained.from_checkpoint(checkpoint, dtype='float32')
  forward = pretrained.logits
  if config['model_type'] == 'bert':
    forward = pretrained.hidden_states
  found = jax.jit(forward)(model, tokens_of(1)[0])
  assert_close(found, answers_of(peer, tokens_of(1))[0], 'float32')


@pytest.mark.parametrize(
  'name', ['llama-grouped-tied', 'gpt2', 'bert', 'gemma2', 'qwen3', 'gpt_oss']
)
@pytest.mark.parametrize('side', ['left', 'right'])
def test_padded_batch_equals_that_of_transformers(
  peers, name, side, monkeypatch
):
  peer, directory = peers(name)
  model = pretrained.from_checkpoint(
    read_safetensors(directory), dtype='float64'
  )
  tokens, mask = tokens_of(3), masks_of((SIZE, 7, 3), side)
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  forward = pretrained.hidden_states if name == 'bert' else pretrained.logits

  def answer(tokens, mask):
    return forward(model, tokens, mask=mask)

  found = jax.jit(jax.vmap(answer))(tokens, mask)
  with precision(peer, 'float64', monkeypatch):
    expected = answers_of(
      peer, tokens, attention_mask=mask.astype(int), position_ids=positions
    )
  assert_close(found[mask], expected[mask], 'float64')


@pytest.mark.parametrize('name', CAUSAL)
def test_greedy_tokens_equal_those_of_transformers(peers, name, monkeypatch):
  peer, directory = peers(name)
  model = pretrained.from_checkpoint(
    read_safetensors(directory), dtype='float64'
  )
  # There, one long prompt of a batch changes the rotation of the others.
  lengths = (SIZE,) * 3 if name == 'phi3' else (SIZE, 7, 3)
  tokens, mask = tokens_of(3), masks_of(lengths, 'left')

  def generate(tokens, mask):
    # Here, padding may not hide on which side of a switch a prompt is.
    mask = None if name == 'phi3' else mask
    return pretrained.generate(model, tokens, num_tokens=12, mask=mask)

  found = jax.jit(jax.vmap(generate))(tokens, mask)
  with precision(peer, 'float64', monkeypatch), torch.no_grad():
    expected = peer.generate(
      torch.tensor(tokens),
      attention_mask=torch.tensor(mask.astype(int)),
      max_new_tokens=12,
      do_sample=False,
    ).numpy()[:, SIZE:]
  assert len(np.unique(expected)) > 2  # Not one token again and again.
  np.testing.assert_array_equal(found, expected)


def test_shards_in_half_precision_equal_transformers(peers, tmp_path):
  """Shards and bfloat16, as large checkpoints are stored."""
  peer, _ = peers('llama')
  rounded = make_peer('llama').to(torch.bfloat16)
  rounded.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  stored = pretrained.from_checkpoint(read_safetensors(tmp_path))
  assert stored.embedding.dtype == jnp.bfloat16
  model = pretrained.from_checkpoint(
    read_safetensors(tmp_path), dtype='float32'
  )
  found = jax.jit(pretrained.logits)(model, tokens_of(1)[0])
  rounded = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32, attn_implementation='eager'
  )
  assert_close(found, answers_of(rounded, tokens_of(1))[0], 'float32')
  assert np.max(np.abs(found - answers_of(peer, tokens_of(1))[0])) > 1e-3
