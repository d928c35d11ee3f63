"""Each family against `transformers` (torch, eager) on checkpoints on disk."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import pretrained
from iclcl_jax.pretrained.safetensors import read_safetensors

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
LLAMA = {
  'vocab_size': 61,
  'hidden_size': 40,
  'intermediate_size': 52,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'head_dim': 10,
  'max_position_embeddings': 32,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': 0,
}
GPT2 = {
  'vocab_size': 61,
  'n_positions': 32,
  'n_embd': 36,
  'n_layer': 3,
  'n_head': 3,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': 0,
}
BERT = {
  'vocab_size': 61,
  'hidden_size': 36,
  'intermediate_size': 44,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'max_position_embeddings': 32,
}
CONFIGS = {
  'llama': LLAMA | {'num_key_value_heads': 4},
  'llama-grouped-tied': LLAMA
  | {
    'num_key_value_heads': 2,
    'tie_word_embeddings': True,
    'rms_norm_eps': 1e-4,
  },
  'llama-one-group-biases': LLAMA
  | {
    'num_key_value_heads': 1,
    'attention_bias': True,
    'mlp_bias': True,
    'head_dim': 14,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e5},
  },
  'gpt2': GPT2,
  'gpt2-untied': GPT2
  | {
    'tie_word_embeddings': False,
    'n_inner': 50,
    'activation_function': 'relu',
    'layer_norm_epsilon': 1e-3,
  },
  'bert': BERT,
  'bert-tanh': BERT
  | {
    'hidden_act': 'gelu_new',
    'type_vocab_size': 3,
    'layer_norm_eps': 1e-3,
  },
}
CAUSAL = [name for name in CONFIGS if not name.startswith('bert')]
CLASSES = {
  'llama': ('LlamaConfig', 'LlamaForCausalLM'),
  'gpt2': ('GPT2Config', 'GPT2LMHeadModel'),
  'bert': ('BertConfig', 'BertModel'),
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
  """No weight is zero or one, so that each counts."""
  config_name, model_name = CLASSES[name.partition('-')[0]]
  config = getattr(transformers, config_name)(**CONFIGS[name])
  config._attn_implementation = 'eager'
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

  `transformers` computes the norm, the softmax and the angles of a Llama in
  float32 whatever the parameters are.
  """

  float32 = torch.float64

  def __getattr__(self, name):
    return getattr(torch, name)


class DoubleAngles(torch.nn.Module):
  """The angles of a Llama in float64, by the formula."""

  def __init__(self, config):
    super().__init__()
    base = config.rope_parameters['rope_theta']
    half = torch.arange(config.head_dim // 2, dtype=torch.float64)
    self.frequencies = base ** (-2 * half / config.head_dim)

  def forward(self, x, position_ids):
    angles = position_ids[..., None].to(x.dtype) * self.frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


@contextlib.contextmanager
def precision(model, dtype, monkeypatch):
  """Runs a peer in the dtype, and leaves it in float32."""
  if dtype == 'float32':
    yield
    return
  model.double()
  if model.config.model_type != 'llama':
    yield
  else:
    angles = model.model.rotary_emb
    model.model.rotary_emb = DoubleAngles(model.config)
    with monkeypatch.context() as patch:
      module = transformers.models.llama.modeling_llama
      patch.setattr(module, 'torch', DoubleTorch())
      yield
    model.model.rotary_emb = angles
  model.float()


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


@pytest.mark.parametrize('name', ['llama-grouped-tied', 'gpt2', 'bert'])
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
  tokens, mask = tokens_of(3), masks_of((SIZE, 7, 3), 'left')

  def generate(tokens, mask):
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
