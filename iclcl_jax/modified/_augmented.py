"""Augmented attention: other views of keys and values."""

import dataclasses

import jax

from iclcl_jax import _pytree, _validate, attention
from iclcl_jax.modified._attention import Attention, visible_rows
from iclcl_jax.types import Array, View


@_pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Augmented(Attention):
  """Attention to augmented views of the demonstrations, see `augmented`."""

  augment_keys: View
  augment_values: View

  def _one(self, phi, query, keys, values, num_query_tokens, mask):
    del num_query_tokens  # A plain step learns both sides alike.
    keys, values = self._views(keys, values, mask)
    return attention.kernel_attention(phi, query, keys, values, mask=mask)

  def _many(self, phi, queries, keys, values, chunk_size, mask):
    keys, values = self._views(keys, values, mask)
    return attention.stream_kernel_attention(
      phi, queries, keys, values, chunk_size=chunk_size, mask=mask
    )

  def _causal(self, phi, queries, keys, values, chunk_size, mask):
    keys, values = self._views(keys, values, mask)
    return attention.causal_kernel_attention(
      phi, queries, keys, values, chunk_size=chunk_size, mask=mask
    )

  def _views(self, keys, values, mask):
    """Both sides, row by row; raises if a result is no such row."""
    new_keys = jax.vmap(self.augment_keys)(keys)
    _validate.check_result('augment_keys', new_keys, keys.shape)
    new_values = jax.vmap(self.augment_values)(values)
    if getattr(new_values, 'ndim', None) != 2:
      _validate.check_result('augment_values', new_values, values.shape)
    _validate.check_dtypes({'keys': keys, 'augment_keys': new_keys})
    _validate.check_dtypes({'values': values, 'augment_values': new_values})
    return visible_rows(mask, new_keys, new_values)


def _unchanged(row: Array) -> Array:
  # Has a name, so that an attention can be pickled.
  return row


def augmented(
  *, augment_keys: View = _unchanged, augment_values: View = _unchanged
) -> Augmented:
  r"""Makes attention to augmented views of keys and values.

  .. math:: h = \sum_i g_1(v_i)\,K(g_2(k_i), q) \big/ \sum_i K(g_2(k_i), q)

  Queries are not augmented. Views with numbers of their own, such as a
  `jax.tree_util.Partial`, keep them as leaves.

  Args:
    augment_keys: `g_2`, a function of one key `[d_k]`.
    augment_values: `g_1`, a function of one value `[d_v]`; its result may have
      another width, that of the attention's output.

  Example:
    >>> x, values = jax.numpy.zeros((2, 4)), jax.numpy.array([[1.0], [3.0]])
    >>> attend = augmented(augment_values=jax.numpy.square)
    >>> attend.stream(features.EluPlusOneFeatures(), x, x, values).tolist()
    [[5.0], [5.0]]
  """
  _validate.check_function('augment_keys', augment_keys, 1, 'of one key')
  _validate.check_function('augment_values', augment_values, 1, 'of one value')
  return Augmented(
    augment_keys=_pytree.function(augment_keys),
    augment_values=_pytree.function(augment_values),
  )
