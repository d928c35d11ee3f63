"""Attention of a second step, on the squared loss."""

import jax.numpy as jnp

from iclcl_jax import _pytree, _validate, attention, features, moments
from iclcl_jax.modified._attention import Attention
from iclcl_jax.types import Array


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

  Without momentum and with a rate of 1 it is Tukey's twicing of the attention.

  Args:
    learning_rate: :math:`\eta` of the second step; 0 for attention itself.
    momentum: :math:`\mu`, how much of the first step the second repeats.

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
