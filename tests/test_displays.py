"""What objects show of themselves: short, and escaped."""

import jax
import jax.numpy as jnp
import pytest

from iclcl_jax import dual, equivalence, features, kernels, losses, modified
from tests import families

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
