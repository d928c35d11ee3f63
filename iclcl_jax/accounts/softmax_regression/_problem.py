"""The problem of a softmax regression."""

from typing import NamedTuple

import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.types import Array, Float


class Problem(NamedTuple):
  """A softmax regression. `problem` makes one and checks it.

  Attributes:
    document: words, one a row. Shape `[n, d]`.
    target: what their softmax should be. Shape `[n]`.
  """

  document: Float[Array, 'n d']
  target: Float[Array, ' n']


@door
def problem(
  document: Float[Array, 'n d'], target: Float[Array, ' n']
) -> Problem:
  """Poses a softmax regression with a target in the simplex.

  For a target outside of it, call `Problem` itself: derivatives and identities
  hold there, the bounds that need the simplex do not.

  Args:
    document: words, one a row. Shape `[n, d]`.
    target: nonnegative entries that sum to one. Shape `[n]`.

  Raises:
    ValueError: if shapes or dtypes disagree, an entry is not finite, or the
      target is outside the simplex.

  Example:
    >>> posed = problem(jnp.eye(2), jnp.array([0.25, 0.75]))
    >>> posed.target.tolist()
    [0.25, 0.75]

  References:
    Li, Song, Xia, Yu & Zhou, arXiv:2304.13276 (the problem).
  """
  posed = Problem(document, target)
  if 0 in document.shape:
    raise ValueError(
      f'document has shape {list(document.shape)}; expected at least one word.'
    )
  if not _validate.is_concrete(document, target):
    return posed
  for name, array in posed._asdict().items():
    if not bool(jnp.all(jnp.isfinite(array))):
      raise ValueError(
        f'{name} has entries that are not finite; expected finite numbers. '
        'Remove or replace those rows.'
      )
  lowest, total = float(jnp.min(target)), float(jnp.sum(target))
  slack = 10 * target.shape[0] * float(jnp.finfo(target.dtype).eps)
  if lowest < -slack or abs(total - 1) > slack:
    raise ValueError(
      f'target has sum {total:g} and smallest entry {lowest:g}; expected '
      'nonnegative entries that sum to one. Apply jax.nn.softmax, or construct '
      'Problem(document, target) itself: the bounds do not hold there.'
    )
  return posed


@door
def centre(document: Float[Array, 'n d']) -> Float[Array, 'n d']:
  """Removes the mean word, to which softmax regression is blind.

  Args:
    document: `A`. Shape `[n, d]`.

  Returns:
    `P A`. Shape `[n, d]`.

  Raises:
    ValueError: if the document is no matrix.
  """
  return document - jnp.mean(document, axis=0, keepdims=True)
