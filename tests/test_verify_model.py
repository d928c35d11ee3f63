"""Certificates of whole models: that pass, that fail, and say why."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iclcl_jax import equivalence, precision
from iclcl_jax.transformer import _dual_heads, _linearisation
from tests import transformer_blocks as made
from tests.tolerances import IDENTITY

NAMES = list(made.FAMILIES)
LAYERS = 2


@functools.cache
def measure(name):
  architecture = made.FAMILIES[name].architecture
  return jax.jit(functools.partial(equivalence.model_residuals, architecture))


def certify(name, dtype='float64', mask=None, change_x=lambda x: x):
  x = change_x(made.make_tokens(dtype=dtype))
  blocks = made.make_blocks(name, LAYERS, dtype)
  result = measure(name)(blocks, x, mask=mask)
  return equivalence.certificate_of(result, mask=mask)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('name', NAMES)
def test_every_head_is_one_gradient_step(name, dtype):
  certificate = certify(name, dtype)
  assert certificate.holds, str(certificate)
  assert certificate.max_residual <= IDENTITY[dtype]
  assert certificate.max_chain_error <= LAYERS * IDENTITY[dtype]
  shape = LAYERS, made.HEADS, made.SIZE
  assert certificate.residuals.closed_form.shape == shape
  assert certificate.residuals.autodiff.shape == shape
  assert certificate.num_heads == LAYERS * made.HEADS
  assert certificate.dtype == dtype


def test_forward_states_are_those_of_the_forward_pass():
  certificate = certify('gpt2')
  x, p = np.asarray(made.make_tokens()), made.parameters
  for seed in range(LAYERS):
    x = made.FAMILIES['gpt2'].oracle(p('gpt2', seed), x, None)
  for states in (certificate.residuals.forward, certificate.residuals.chain):
    assert made.relative_error(states, x) < IDENTITY['float64']


@pytest.mark.parametrize('name', ['llama', 'bert'])
def test_padding_may_hold_anything(name):
  mask = jnp.arange(made.SIZE) >= 2
  certificate = certify(
    name, mask=mask, change_x=lambda x: x.at[:2].set(jnp.nan)
  )
  assert certificate.holds, str(certificate)
  assert certificate.num_positions == made.SIZE - 2
  assert np.all(certificate.residuals.autodiff[:, :, :2] == 0)
  assert np.any(certificate.residuals.autodiff[:, :, 2:] > 0)


def broken(name):
  """Runs a certificate with what was patched."""
  architecture = made.FAMILIES[name].architecture
  blocks, x = made.make_blocks(name, LAYERS), made.make_tokens()
  return equivalence.verify_model(architecture, blocks, x)


def test_a_wrong_closed_form_fails(patch):
  answer = _dual_heads.answer_online

  def wrong(phi, queries, keys, values, *rest):
    return answer(phi, queries, keys, values.at[3].mul(1 + 1e-9), *rest)

  patch(_dual_heads, 'answer_online', wrong)
  certificate = broken('llama')
  assert certificate.verdict == 'fails'
  measured = certificate.residuals
  assert np.all(measured.closed_form[:, :, :3] < 1e-14)
  assert np.all(measured.closed_form[:, :, 3:] > 1e-14)
  assert certificate.max_residual_autodiff < 1e-14


def test_another_loss_fails(patch):
  def wrong(predictions, values):
    return -(1 + 1e-9) * jnp.sum(predictions * values)

  patch(_dual_heads.losses, 'contrastive', wrong)
  certificate = broken('llama')
  assert certificate.verdict == 'fails'
  assert certificate.max_residual_closed_form < 1e-14
  assert certificate.max_residual_autodiff > 1e-11


def test_a_wrong_gate_departs_from_the_chain(patch):
  right = _linearisation._gate

  def wrong(*arguments):
    gate, *rest = right(*arguments)
    return gate * (1 + 1e-6), *rest

  patch(_linearisation, '_gate', wrong)
  certificate = broken('bert')
  assert certificate.verdict == 'chain departs'
  assert certificate.max_residual < 1e-14


def test_reduced_precision_is_a_verdict_of_its_own():
  architecture = made.FAMILIES['gpt2'].architecture
  certificate = equivalence.verify_model(
    architecture,
    made.make_blocks('gpt2', 1, 'float32'),
    made.make_tokens(dtype='float32'),
    arithmetic=precision.PLATFORM_DEFAULT,
  )
  assert certificate.verdict == 'precision-limited', str(certificate)
  assert not certificate.holds
  assert certificate.precision == 'platform default'


def test_certificate_prints_and_converts():
  certificate = certify('llama')
  text = str(certificate)
  assert 'every head = one gradient step' in text
  assert '2, 8, 7' in text
  assert 'holds' in text
  result = json.loads(json.dumps(certificate.to_dict()))
  assert result['holds'] is True
  assert result['max_residual'] == certificate.max_residual
  shape = np.shape(result['residual_autodiff'])
  assert shape == (LAYERS, made.HEADS, made.SIZE)
  assert len(result['chain_error']) == LAYERS


def test_not_finite_is_a_verdict_of_its_own():
  result = certify('llama').residuals
  spoilt = result._replace(autodiff=result.autodiff.at[0, 0, 0].set(jnp.nan))
  certificate = equivalence.certificate_of(spoilt)
  assert certificate.verdict == 'not finite'
  assert np.isnan(certificate.max_residual)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': jnp.ones(12)}, 'x has shape'),
    ({'mask': jnp.zeros(7, bool)}, 'mask is all False'),
    ({'mask': jnp.ones(3, bool)}, 'mask has shape'),
    ({'positions': jnp.arange(3)}, 'positions disagree in N: 7 and 3'),
    ({'blocks': made.make_block('llama')}, 'expected \\[L, d_model\\]'),
    ({'architecture': None}, 'architecture is a NoneType'),
    ({'arithmetic': 'highest'}, 'arithmetic is a str'),
  ],
)
def test_wrong_arguments_are_named(change, message):
  arguments = {
    'architecture': made.FAMILIES['llama'].architecture,
    'blocks': made.make_blocks('llama', LAYERS),
    'x': made.make_tokens(),
  } | change
  with pytest.raises(ValueError, match=message):
    equivalence.verify_model(**arguments)


def test_a_parameter_that_is_not_finite_is_a_verdict():
  blocks = made.make_blocks('llama', LAYERS)
  spoilt = blocks.up.weight.at[1, 0, 0].set(jnp.inf)
  blocks = blocks._replace(up=blocks.up._replace(weight=spoilt))
  architecture = made.FAMILIES['llama'].architecture
  certificate = equivalence.verify_model(
    architecture, blocks, made.make_tokens()
  )
  assert certificate.verdict == 'not finite'


def test_verify_model_says_what_to_use_inside_jit():
  architecture = made.FAMILIES['llama'].architecture
  blocks = made.make_blocks('llama', LAYERS)

  @jax.jit
  def inside(x):
    return equivalence.verify_model(architecture, blocks, x).max_residual

  with pytest.raises(ValueError, match=r'equivalence\.model_residuals'):
    inside(made.make_tokens())


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_16_bit_parameters_limit_the_verdict(dtype):
  certificate = certify('llama', dtype)
  assert certificate.verdict == 'precision-limited', str(certificate)
  deep = equivalence.ModelResiduals(
    closed_form=jnp.zeros((30, 1, 2)),
    autodiff=jnp.zeros((30, 1, 2)),
    chain_error=jnp.full(30, 0.3),
    forward=jnp.ones((2, 4), dtype),
    chain=jnp.ones((2, 4), dtype),
  )
  certificate = equivalence.certificate_of(deep)
  assert certificate.chain_tolerance <= 0.1
  assert certificate.verdict == 'chain departs'
