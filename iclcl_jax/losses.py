r"""Losses of a dual model's predictions, and penalties of its weights.

A loss is a function `loss(predictions [N, d_v], values [N, d_v]) -> []` and
serves feature maps and kernels alike. It carries neither the learning rate nor
the normaliser: one gradient step with `learning_rate=1` on `contrastive` is
attention. A loss that is a plain sum over demonstrations says so with
`sum_over_demonstrations`; masks and batches need to know.

Here `predictions` are :math:`W\phi(k_i)` and `values` the labels, both
`[N, d_v]`. Losses raise a `ValueError` if shapes disagree, and the functions
that make one if a number is not finite or out of its range.

References:
  Ren & Liu, arXiv:2310.13220: Theorem 3.1 (`contrastive`, without its factor
  `1 / (eta D)`), section 4 (why it is unbounded: `cosine`), 4.1 (`ridge`), 4.3
  (`negatives`; those of each token in v2); Schlag et al., arXiv:2102.11174
  (`squared`); van den Oord et al., arXiv:1807.03748, eq. 4 (`info_nce`).
"""

import functools
import inspect
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate
from iclcl_jax._door import eager_door
from iclcl_jax._program import compiled
from iclcl_jax.precision import widen
from iclcl_jax.types import Array, Float, Loss, Mask, Penalty

_LossT = TypeVar('_LossT', bound=Loss)


def sum_over_demonstrations(loss: _LossT) -> _LossT:
  """Declares that a loss is a sum of one term for each demonstration.

  A row whose prediction is constant then contributes no gradient, which is how
  masked rows and incomplete batches are left out. A mean, or a loss in which
  rows see each other, would let masked and future rows in. Where the promise is
  relied on, four rows are tried; that finds a mean and weights of positions.

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
@eager_door
def contrastive(
  predictions: Float[Array, 'N d_v'], values: Float[Array, 'N d_v']
) -> Float[Array, '']:
  r"""Computes the loss whose gradient step is attention.

  .. math:: L(W) = -\sum_i v_i^\top W\phi(k_i)

  Positive pairs only, in unnormalised cosine similarity; unbounded below.

  Example:
    >>> float(contrastive(jnp.ones((2, 3)), jnp.ones((2, 3))))
    -6.0
  """
  return -jnp.sum(predictions * values)


@sum_over_demonstrations
@eager_door
def squared(
  predictions: Float[Array, 'N d_v'], values: Float[Array, 'N d_v']
) -> Float[Array, '']:
  r"""Computes half the summed squared error, the loss of the delta rule.

  .. math:: L(W) = \tfrac12\sum_i |W\phi(k_i) - v_i|^2

  From `W = 0` its first step is that of `contrastive`; later ones differ.

  Example:
    >>> float(squared(jnp.zeros((2, 3)), jnp.ones((2, 3))))
    3.0
  """
  return jnp.sum((predictions - values) ** 2) / 2


def info_nce(temperature: float = 1.0) -> Loss:
  r"""Makes the InfoNCE loss: each token picks its value among those of all.

  .. math:: L(W) = -\sum_i \log\frac{\exp(v_i^\top W\phi(k_i)/\tau)}
     {\sum_j \exp(v_j^\top W\phi(k_i)/\tau)}

  Its first step from `W = 0` is, times the `temperature` :math:`\tau > 0`,
  attention with centred values. It takes a keyword `mask`, and is no sum over
  demonstrations: all visible values are candidates of each.

  Example:
    >>> round(float(info_nce()(jnp.zeros((2, 1)), jnp.ones((2, 1)))), 4)
    1.3863
  """
  _validate.positive(temperature=temperature)

  @eager_door
  def loss(
    predictions: Float[Array, 'N d_v'],
    values: Float[Array, 'N d_v'],
    *,
    mask: Mask | None = None,
  ):
    predictions, values = widen((predictions, values))
    scores = predictions @ values.T / temperature
    mask = jnp.ones(len(values), bool) if mask is None else mask
    scores = jnp.where(mask[None], scores, jnp.finfo(scores.dtype).min)
    terms = jnp.diagonal(jax.nn.log_softmax(scores, axis=1))
    return -jnp.sum(jnp.where(mask, terms, 0))

  return loss


@sum_over_demonstrations
@eager_door
def cosine(
  predictions: Float[Array, 'N d_v'], values: Float[Array, 'N d_v']
) -> Float[Array, '']:
  r"""Computes the normalised contrastive loss, bounded below by `-N`.

  .. math:: L(W) = -\sum_i \cos(v_i, W\phi(k_i))

  Undefined at `W = 0`: start from query-side tokens.

  Example:
    >>> round(float(cosine(jnp.ones((2, 3)), jnp.ones((2, 3)))), 5)
    -2.0
  """
  products = jnp.sum(predictions * values, axis=1)
  a, b = (jnp.linalg.norm(x, axis=1) for x in (predictions, values))
  return -jnp.sum(products / (a * b))


@eager_door
def negatives(mixing: Float[Array, ' N'] | Float[Array, 'N N']) -> Loss:
  r"""Makes the contrastive loss with negative samples.

  .. math:: L(W) = -\sum_i
     \Bigl(v_i - \sum_j m_{ij} v_j\Bigr)^\top W\phi(k_i)

  It is no sum over demonstrations. The `mixing` `m` is how strongly each token
  is a negative of all, `[N]`, or in row `i` of token `i`, `[N, N]`.

  Example:
    >>> loss = negatives(jnp.array([0.5, 0.0]))
    >>> float(loss(jnp.ones((2, 1)), jnp.ones((2, 1))))
    -1.0
  """
  axes = 'NN' if getattr(mixing, 'ndim', 1) > 1 else 'N'
  _validate.check_kind('mixing', mixing, axes, _validate.FLOATING)
  mixing = widen(mixing)

  @eager_door
  def loss(predictions: Float[Array, 'N d_v'], values: Float[Array, 'N d_v']):
    for size in mixing.shape:
      _validate.check_same('N', 'mixing', size, 'values', values.shape[0])
    predictions, values = widen((predictions, values))
    return -jnp.sum(predictions * (values - jnp.atleast_2d(mixing @ values)))

  return loss


def ridge(strength: float | Array) -> Penalty:
  r"""Makes the penalty :math:`\tfrac{\alpha}{2}|W|_F^2`.

  It is evaluated at the plain weights, whose features may overflow where keys
  are long: the step is then NaN. `optax.add_decayed_weights` takes the same
  step from the scaled weights, and stays finite. The `strength` is
  :math:`\alpha`, of either sign.

  Example:
    >>> float(ridge(2.0)(jnp.ones((2, 3))))
    6.0
  """
  _validate.finite(strength=strength)

  def penalty(weights):
    return strength / 2 * jnp.sum(weights**2)

  # Its gradient is so many times the weights.
  penalty.ridge = strength  # type: ignore[attr-defined]
  return penalty


# Predictions and values of four rows, on which declarations are tried.
_PREDICTIONS = np.array([[2, -4], [6, 1], [-3, 10], [12, -7]]) / 8
_VALUES = np.array([[8, -6], [4, 12], [-10, 5], [3, -2]]) / 8


def check_sum(loss: Loss) -> None:
  """Checks that a loss is declared a sum over demonstrations, and behaves so.

  Losses that hold traced or fixed-size arrays cannot be tried.
  """
  if not is_sum_over_demonstrations(loss):
    raise ValueError(
      'loss is not declared a sum over demonstrations, so rows cannot be left '
      'out (a mask, or an incomplete batch). Declare it with '
      'losses.sum_over_demonstrations, give it a keyword mask [N], or pass '
      'whole batches without mask.'
    )
  with jax.ensure_compile_time_eval():
    try:
      is_sum = _is_sum(loss, _PREDICTIONS, _VALUES, np.array([2, 0, 3, 1]))
    except (TypeError, ValueError):
      return
  if _validate.is_concrete(is_sum) and not is_sum:
    raise ValueError(
      'loss is declared a sum over demonstrations, but the slope of one row '
      'depends on another or on its position; expected '
      'sum_i l(predictions[i], values[i]). Use jnp.sum instead of jnp.mean, '
      'or remove the declaration.'
    )


def of_visible(loss: Loss, mask: Mask | None) -> Loss:
  """Returns a loss of which masked rows, of zeros, are no part."""
  if mask is not None and declares_mask(loss):
    return functools.partial(loss, mask=mask)
  if mask is not None:
    check_sum(loss)
  return loss


@compiled
def _is_sum(loss: Loss, predictions: Any, values: Any, order: Any) -> Array:
  """Whether the slopes of the rows are those of each alone."""
  slope = jax.grad(loss)
  alone = jnp.concatenate(
    [slope(predictions[i : i + 1], values[i : i + 1]) for i in range(4)]
  )
  together = slope(predictions, values)
  permuted = slope(predictions[order], values[order])
  return jnp.allclose(together, alone) & jnp.allclose(permuted, alone[order])


def check_loss(loss: Loss) -> None:
  """Checks that a loss is a function of two arrays."""
  arguments = 'predictions [N, d_v], values [N, d_v]'
  expected = f'loss({arguments}) -> [], such as losses.contrastive'
  _validate.check_function('loss', loss, 2, expected)


def check_penalty(penalty: Penalty | None) -> None:
  """Checks that a penalty is a function of one array, or None."""
  if penalty is not None:
    expected = 'penalty(weights [d_v, R]) -> [], such as losses.ridge(0.1)'
    _validate.check_function('penalty', penalty, 1, expected)


def declares_mask(loss: Loss) -> bool:
  """Whether a loss has a keyword `mask [N]`, and so leaves rows out itself."""
  return 'mask' in inspect.signature(loss).parameters
