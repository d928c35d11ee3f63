"""Similarities of the updates that context and finetuning make."""

import jax
import jax.numpy as jnp

from iclcl_jax import precision
from iclcl_jax._door import door
from iclcl_jax.accounts import _numerics
from iclcl_jax.types import Array, Float


@door
def update_similarity(
  in_context: Float[Array, ' d'],
  finetuned: Float[Array, ' d'],
  zero_shot: Float[Array, ' d'],
) -> Float[Array, '']:
  """Returns SimAOU, the cosine of the two updates of an attention output.

  Of unrelated updates it is 0 only if they have no component along the
  baseline; see `partial_update_similarity`.

  Args:
    in_context: output of the attention module, in context. Shape `[d]`.
    finetuned: the same, finetuned and without demonstrations.
    zero_shot: the same, neither.

  References:
    Deutch et al., arXiv:2311.07772
  """
  updates = _updates(in_context, finetuned, zero_shot)
  return cosine(*updates).astype(zero_shot.dtype)


@door
def normalised_update_similarity(
  in_context: Float[Array, ' d'],
  finetuned: Float[Array, ' d'],
  zero_shot: Float[Array, ' d'],
) -> Float[Array, '']:
  r"""Returns SimAOU as first published, of outputs that are normalised first.

  Biased: independent noise of relative variance `s^2` scores
  :math:`(1 - 1/\sqrt{1 + s^2})/2`, up to one half.

  Takes what `update_similarity` takes.
  """
  outputs = (_numerics.unit(x) for x in (in_context, finetuned, zero_shot))
  return update_similarity(*outputs).astype(in_context.dtype)


@door
def partial_update_similarity(
  in_context: Float[Array, ' d'],
  finetuned: Float[Array, ' d'],
  zero_shot: Float[Array, ' d'],
) -> Float[Array, '']:
  """Returns SimAOU of the parts of the updates orthogonal to the baseline.

  Takes what `update_similarity` takes; `zero_shot` is not 0.

  Returns:
    The cosine, NaN if an update has no such part, or none that is larger than
    the rounding of the activations. Shape `[]`.
  """
  rounding = 16 * float(jnp.finfo(zero_shot.dtype).eps)
  outputs = jnp.stack([in_context, finetuned, zero_shot])
  outputs = _numerics.scaled(outputs)[1]
  axis = _numerics.unit(outputs[2])

  def across(output):
    update = output - outputs[2]
    rest = update - axis * (axis @ update)
    noise = rounding * (jnp.linalg.norm(output) + jnp.linalg.norm(outputs[2]))
    return jnp.where(_numerics.norm(rest) > noise, rest, 0)

  return cosine(across(outputs[0]), across(outputs[1])).astype(zero_shot.dtype)


@door
def map_similarity(
  in_context: Float[Array, 'H N'], other: Float[Array, 'H N']
) -> Float[Array, '']:
  """Returns SimAM, the mean cosine over heads of attention logits.

  Args:
    in_context: logits before the softmax, one row a head. Shape `[H, N]`.
    other: those of the zero-shot ("before") or finetuned model ("after").
  """
  return jnp.mean(jax.vmap(cosine)(in_context, other))


@door
def map_update_similarity(
  in_context: Float[Array, 'H N'],
  finetuned: Float[Array, 'H N'],
  zero_shot: Float[Array, 'H N'],
) -> Float[Array, '']:
  """Returns SimAM-delta, the mean cosine of the updates of attention logits.

  Takes logits as `map_similarity` does.

  References:
    Deutch et al., arXiv:2311.07772
  """
  updates = _updates(in_context, finetuned, zero_shot)
  return map_similarity(*updates).astype(zero_shot.dtype)


@door
def kendall(
  in_context: Float[Array, ' N'], finetuned: Float[Array, ' N']
) -> Float[Array, '']:
  """Returns Kendall's tau-a of two orders of the training tokens.

  Args:
    in_context: attention logits on the demonstration tokens, summed over heads.
      Shape `[N]`.
    finetuned: inner products of the final query with the training tokens'
      queries at their own step. Shape `[N]`.

  Returns:
    `(concordant - discordant) / (N (N - 1) / 2)`; ties count as neither. Shape
    `[]`.

  Raises:
    ValueError: if shapes or dtypes disagree, or there are fewer than two.
  """
  size = len(in_context)
  if size < 2:
    raise ValueError('in_context has 1 entry; expected at least two to order.')
  signs = [
    jnp.sign(precision.widen(x)[:, None] - precision.widen(x)[None])
    for x in (in_context, finetuned)
  ]
  rank = jnp.sum(signs[0] * signs[1]) / (size * (size - 1))
  return rank.astype(in_context.dtype)


@door
def cosine(a: Float[Array, ' d'], b: Float[Array, ' d']) -> Float[Array, '']:
  """Returns the cosine of two vectors of any size, NaN if one is 0.

  Args:
    a: a vector. Shape `[d]`.
    b: another.
  """
  return _numerics.cosine(a, b)


def _updates(in_context, finetuned, zero_shot):
  """Returns both updates, widened before the difference can overflow."""
  base = precision.widen(zero_shot)
  return tuple(precision.widen(x) - base for x in (in_context, finetuned))
