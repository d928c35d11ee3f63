"""A ridge, other views of keys and values, and a second step."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, attention, features, moments
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
  its own is the product of both. `equivalence.verify` is told of the query side
  too, `num_query_tokens=1`. The `strength` is :math:`\alpha`, of either sign.

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


def unchanged(row: Array) -> Array:
  # Has a name, so that an attention can be pickled.
  return row


def augmented(
  *, augment_keys: View = unchanged, augment_values: View = unchanged
) -> Augmented:
  r"""Makes attention to augmented views of keys and values.

  .. math:: h = \sum_i g_1(v_i)\,K(g_2(k_i), q) \big/ \sum_i K(g_2(k_i), q)

  Functions of one key `[d_k]` and of one value `[d_v]`; the value's view may
  have another width, that of the output. Queries are not augmented. Views with
  numbers of their own, such as a `jax.tree_util.Partial`, keep them as leaves.

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


@_pytree.dataclass(kw_only=True)
class SecondStep(Attention):
  r"""Attention of two steps of gradient descent on a squared loss.

  .. math:: L(W) = \tfrac12 \sum_i D_i\, \bigl|v_i - W\phi(k_i)/D_i\bigr|^2,
     \qquad D_i = \sum_j \phi(k_j)^\top\phi(k_i)

  The first step from zero, of size 1, is attention. The second adds what the
  first has left of the labels, read at the keys: the labels become
  :math:`(1 + \mu)\, v_i + \eta\, (v_i - h(k_i))` with the outputs :math:`h` of
  attention. `causal` takes both steps of every prefix on its own: it reads the
  keys `N` times. There is no query side: steps start from zero.
  """

  learning_rate: float | Array = 1.0  # Of the second step, `eta`.
  momentum: float | Array = 0.0  # Part of the first one in it, `mu`.

  def _one(self, phi, query, keys, values, num_query_tokens, mask):
    if num_query_tokens:
      raise ValueError(
        f'num_query_tokens is {num_query_tokens}; expected 0: both steps start '
        'from zero weights.'
      )
    return super()._one(phi, query, keys, values, 0, mask)

  def _causal(self, phi, queries, keys, values, chunk_size, mask):
    positions = jnp.arange(keys.shape[0])

    def answer(row):
      query, position = row
      seen = positions <= position
      seen = seen if mask is None else seen & mask
      return self._one(phi, query, keys, values, 0, seen)

    return moments.map_chunks(answer, (queries, positions), chunk_size)

  def _learnt(self, phi, keys, values, chunk_size, mask):
    phi, options = features.key_side(phi), {'chunk_size': chunk_size}
    outputs = attention.stream_kernel_attention(
      phi, keys, keys, values, mask=mask, **options
    )
    rate, momentum = (
      jnp.asarray(x, values.dtype) for x in (self.learning_rate, self.momentum)
    )
    return keys, (1 + momentum) * values + rate * (values - outputs)


def second_step(
  *, learning_rate: float | Array = 1.0, momentum: float | Array = 0.0
) -> SecondStep:
  r"""Makes the attention of a second step, on what the first has left.

  Without momentum and with a rate of 1 it is Tukey's twicing of the attention,
  with a rate :math:`\eta = 0` attention itself; the second step repeats
  :math:`\mu` (momentum) of the first.

  Example:
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> attend = second_step()
    >>> attend(kernels.ExponentialKernel(), keys[0], keys, values).tolist()
    [2.0]

  References:
    Buehlmann & Yu, J. Am. Stat. Assoc. 98 (2003), L2Boost; the attention and
    its prefixes derived here.
  """
  _validate.finite(learning_rate=learning_rate, momentum=momentum)
  return SecondStep(learning_rate=learning_rate, momentum=momentum)
