"""Augmented attention: other views of keys and values."""

from collections.abc import Callable

import jax

from iclcl_jax import _validate, attention
from iclcl_jax.types import Array, FeatureMap, Float, Kernel, Mask


def augmented_attention(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  augment_keys: Callable[[Array], Array] = lambda key: key,
  augment_values: Callable[[Array], Array] = lambda value: value,
  mask: Mask | None = None,
) -> Float[Array, ' d_v']:
  r"""Attention to augmented views of the demonstrations.

  .. math:: h = \sum_i g_1(v_i)\,K(g_2(k_i), q) \big/ \sum_i K(g_2(k_i), q)

  Args:
    phi: feature map or kernel.
    query: the test input, not augmented. Shape `[d_k]`.
    keys: keys. Shape `[N, d_k]`.
    values: values. Shape `[N, d_v]`.
    augment_keys: `g_2`, a function of one key `[d_k]`.
    augment_values: `g_1`, a function of one value `[d_v]`.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The attention output. Shape that `augment_values` gives.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or a view is no function of
      a row.

  References:
    Ren & Liu, arXiv:2310.13220, section 4.2.
  """
  _validate.check_tokens(keys, values, mask, query=query)
  keys, values = views(keys, values, augment_keys, augment_values)
  return attention.kernel_attention(phi, query, keys, values, mask=mask)


def views(
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  augment_keys: Callable[[Array], Array],
  augment_values: Callable[[Array], Array],
) -> tuple[Float[Array, 'N d_k'], Float[Array, 'N _']]:
  """Both sides, row by row; raises if a result is not a row."""
  _validate.check_function('augment_keys', augment_keys, 1, 'of one key')
  _validate.check_function('augment_values', augment_values, 1, 'of one value')
  new_keys = jax.vmap(augment_keys)(keys)
  _validate.check_result('augment_keys', new_keys, keys.shape)
  new_values = jax.vmap(augment_values)(values)
  if getattr(new_values, 'ndim', None) != 2:
    _validate.check_result('augment_values', new_values, values.shape)
  return new_keys, new_values
