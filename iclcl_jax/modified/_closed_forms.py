"""A ridge on the dual weights, and other views of keys and values."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, attention, moments
from iclcl_jax.forms import form_of
from iclcl_jax.modified._attention import Attention, check_own, visible_rows
from iclcl_jax.precision import widen
from iclcl_jax.types import Array, View


@_pytree.dataclass(kw_only=True)
class Regularised(Attention):
  r"""Attention that takes from the query side, see `regularised`.

  Of a whole sequence, each token its own query side, :math:`H = (A - \alpha\,
  \mathrm{diag}(A) - \gamma I)\,V`. Numerator, normaliser and own score of a row
  come from one reading of the moments.
  """

  decay: float | Array | None = None  # The coefficient `alpha`, if any.
  residual: float | Array = 0.0  # The coefficient `gamma`.
  _default_query_tokens: ClassVar[int] = 1

  def _one(self, phi, query, keys, values, num_query_tokens, mask):
    weights = attention.weights(phi, *widen((query, keys)), mask=mask)
    if num_query_tokens == 0:
      return values.T @ weights
    positions = jnp.arange(keys.shape[0])
    is_query_side = positions >= keys.shape[0] - num_query_tokens
    decay, residual = self._settings(values)
    weights = jnp.where(is_query_side, (1 - decay) * weights, weights)
    return values.T @ weights - residual * values[-1]

  def _many(self, phi, queries, keys, values, chunk_size, mask):
    check_own(queries, keys)
    read = attention.reader(phi, keys, values, chunk_size, mask)
    decay, residual = self._settings(values)

    def answer(row):
      query, position = row
      reading = read(query)
      numerator = reading.numerator
      if self.decay is not None:
        seen = None if mask is None else mask[position][None]
        own, log_scale = attention.scores(
          phi, query, keys[position][None], seen
        )
        own = own[0] * jnp.exp(log_scale - reading.log_scale)
        numerator = numerator - decay * own * values[position]
      output = attention.divide(numerator, reading.denominator, mask)
      return output - residual * values[position]

    rows = queries, jnp.arange(keys.shape[0])
    return moments.map_chunks(answer, rows, chunk_size)

  def _causal(self, phi, queries, keys, values, chunk_size, mask):
    sums = form_of(phi).causal_sums(
      phi, queries, keys, values, chunk_size, mask
    )
    decay, residual = self._settings(values)
    numerator = sums[:, :-2] - decay * sums[:, -1:] * values
    seen = None if mask is None else jnp.cumsum(mask)[:, None] > 0
    output = attention.divide(numerator, sums[:, -2:-1], seen)
    return output - residual * values

  def _settings(self, values) -> list[Array]:
    decay = 0.0 if self.decay is None else self.decay
    return [jnp.asarray(x, values.dtype) for x in (decay, self.residual)]


def regularised(*, strength: float | Array) -> Regularised:
  r"""Makes the attention of one step with a ridge: it forgets some of `W_0`.

  .. math:: h = \sum_i a_i v_i - \alpha \sum_{t} a_t v_t,

  the second sum over the query side; the query's own token is the last row
  unless a call says otherwise. Its loss is `losses.contrastive` with the
  penalty `losses.ridge(strength)` and step size 1; a ridge with a step size of
  its own is the product of both. The `strength` is :math:`\alpha`, of either
  sign.

  Example:
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> attend = regularised(strength=1.0)
    >>> attend.stream(kernels.ExponentialKernel(), x, x, values).tolist()
    [[1.5], [0.5]]
  """
  _validate.finite(strength=strength)
  return Regularised(decay=strength)


def regularised_as_printed(*, strength: float | Array) -> Regularised:
  r"""Makes the printed form of the regularised layer, `(A - alpha I) V`.

  .. math:: h = \sum_i a_i v_i - \alpha v_q,

  `v_q` the last row, which is the query's own (zero if it is masked). It is not
  the step of `regularised`: there the own value carries its attention weight.
  It is a residual connection of strength `-alpha` through the value projection.

  Example:
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> attend = regularised_as_printed(strength=1.0)
    >>> attend.stream(kernels.ExponentialKernel(), x, x, values).tolist()
    [[1.0], [-1.0]]
  """
  _validate.finite(strength=strength)
  return Regularised(residual=strength)


@_pytree.dataclass(kw_only=True)
class Augmented(Attention):
  """Attention to augmented views of the demonstrations, see `augmented`."""

  augment_keys: View
  augment_values: View

  def _learnt(self, phi, keys, values, chunk_size, mask):
    del phi, chunk_size
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
    >>> x, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> attend = augmented(augment_values=jnp.square)
    >>> attend.stream(features.EluPlusOneFeatures(), x, x, values).tolist()
    [[5.0], [5.0]]
  """
  _validate.check_function('augment_keys', augment_keys, 1, 'of one key')
  _validate.check_function('augment_values', augment_values, 1, 'of one value')
  return Augmented(
    augment_keys=_pytree.function(augment_keys),
    augment_values=_pytree.function(augment_values),
  )
