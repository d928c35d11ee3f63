r"""Losses of a dual model's predictions, and penalties of its weights.

A loss is a function `loss(predictions [N, d_v], values [N, d_v]) -> []` and
serves feature maps and kernels alike. It carries neither the learning rate nor
the normaliser: one gradient step with `learning_rate=1` on `contrastive` is
attention. A loss that is a plain sum over demonstrations says so with
`sum_over_demonstrations`; masks and batches need to know.
"""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax.types import Array, Float

Loss: TypeAlias = Callable[..., Array]
_LossT = TypeVar('_LossT', bound=Loss)


def sum_over_demonstrations(loss: _LossT) -> _LossT:
  """Declares that a loss is a sum of one term for each demonstration.

  A row whose prediction is constant then contributes no gradient, which is how
  masked rows and incomplete batches are left out.

  Args:
    loss: `loss(predictions, values) -> []`.

  Returns:
    The same function, marked.

  Example:
    >>> @sum_over_demonstrations
    ... def absolute(predictions, values):
    ...   return jnp.sum(jnp.abs(predictions - values))
    >>> is_sum_over_demonstrations(absolute)
    True
  """
  loss.sums_over_demonstrations = True  # type: ignore[attr-defined]
  return loss


def is_sum_over_demonstrations(loss: Loss) -> bool:
  """Whether a loss was declared by `sum_over_demonstrations`."""
  return bool(getattr(loss, 'sums_over_demonstrations', False))


@sum_over_demonstrations
def contrastive(
  predictions: Float[Array, 'N d_v'], values: Float[Array, 'N d_v']
) -> Float[Array, '']:
  r"""The loss whose gradient step is attention.

  .. math:: L(W) = -\sum_i v_i^\top W\phi(k_i)

  Positive pairs only, in unnormalised cosine similarity; unbounded below.

  Args:
    predictions: `W phi(k_i)`. Shape `[N, d_v]`.
    values: the labels. Shape `[N, d_v]`.

  Returns:
    The loss. Shape `[]`.

  Raises:
    ValueError: if the shapes disagree.

  Example:
    >>> float(contrastive(jnp.ones((2, 3)), jnp.ones((2, 3))))
    -6.0

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1, without its factor
    `1 / (eta D)`.
  """
  _check(predictions, values)
  return -jnp.sum(predictions * values)


@sum_over_demonstrations
def squared(
  predictions: Float[Array, 'N d_v'], values: Float[Array, 'N d_v']
) -> Float[Array, '']:
  r"""Half the summed squared error: the loss of the delta rule.

  .. math:: L(W) = \tfrac12\sum_i |W\phi(k_i) - v_i|^2

  From `W = 0` its first step is that of `contrastive`; later ones differ.

  Args:
    predictions: `W phi(k_i)`. Shape `[N, d_v]`.
    values: the labels. Shape `[N, d_v]`.

  Returns:
    The loss. Shape `[]`.

  Raises:
    ValueError: if the shapes disagree.

  Example:
    >>> float(squared(jnp.zeros((2, 3)), jnp.ones((2, 3))))
    3.0

  References:
    Schlag et al., arXiv:2102.11174.
  """
  _check(predictions, values)
  return jnp.sum((predictions - values) ** 2) / 2


def ridge(strength: float) -> Callable[[Float[Array, 'd_v R']], Array]:
  r"""Makes the penalty :math:`\tfrac{\alpha}{2}|W|_F^2`.

  Args:
    strength: the coefficient `alpha`, of either sign.

  Returns:
    `penalty(weights) -> []`.

  Raises:
    ValueError: if `strength` is not finite.

  Example:
    >>> float(ridge(2.0)(jnp.ones((2, 3))))
    6.0

  References:
    Ren & Liu, arXiv:2310.13220, section 4.1.
  """
  _validate.check_scalar('strength', strength)

  def penalty(weights):
    return strength / 2 * jnp.sum(weights**2)

  return penalty


def _check(predictions, values) -> None:
  _validate.check_array('predictions', predictions, 'N d_v')
  _validate.check_array('values', values, 'N d_v')
  if predictions.shape != values.shape:
    raise ValueError(
      f'predictions has shape {list(predictions.shape)}, values has shape '
      f'{list(values.shape)}; expected equal shapes [N, d_v].'
    )
