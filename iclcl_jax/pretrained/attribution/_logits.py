"""The difference of two logits as a sum over heads and segments."""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import _pytree, _validate, transformer
from iclcl_jax._door import door
from iclcl_jax._mesh import vary_as
from iclcl_jax._program import compiled
from iclcl_jax.pretrained import _model
from iclcl_jax.pretrained._model import LanguageModel
from iclcl_jax.pretrained.attribution import _html
from iclcl_jax.pretrained.attribution._readings import HeadReadings, read_heads
from iclcl_jax.transformer._forward import normalise
from iclcl_jax.types import Array, Bool, Float, Int

Label: TypeAlias = int | Int[Array, ''] | Int[Array, ' T']


@_pytree.with_short_repr
class LogitAttribution(NamedTuple):
  """The difference of two logits, before any cap, as a sum.

  `contributions`, `rest`, `embedding`, `biases` and `final_bias` sum to
  `logit_difference`, up to rounding.

  Attributes:
    logit_difference: logit of the label less that of the other label.
    contributions: of each demonstration through each head. Shape `[L, H, S]`.
    rest: of all other tokens through each head. Shape `[L, H]`.
    embedding: of the embedded token itself.
    biases: of each block, through the blocks above. Shape `[L]`.
    final_bias: of final normalisation and head.
    removal_effects: what the difference would lose if the head alone had not
      seen the demonstration, to first order: gates, normalisations and all
      other heads stay as they are. Shape `[L, H, S]`.
    directions: what turns a vector in the residual stream, added by the heads
      of a layer, into a part of the difference; None for a string. Shape
      `[L, d_model]`.
  """

  logit_difference: Float[Array, '']
  contributions: Float[Array, 'L H S']
  rest: Float[Array, 'L H']
  embedding: Float[Array, '']
  biases: Float[Array, ' L']
  final_bias: Float[Array, '']
  removal_effects: Float[Array, 'L H S']
  directions: Float[Array, 'L d_model'] | None

  @property
  def total(self) -> Float[Array, '']:
    """The sum of all terms."""
    blocks = self.contributions, self.rest, self.biases
    return sum(map(jnp.sum, blocks), self.embedding + self.final_bias)

  def _repr_html_(self) -> str | None:
    if np.ndim(self.contributions) != 3:  # Of several prompts.
      return None
    return _html.show('attribution.html', found=jax.device_get(self))


@compiled
def direct_logit_attribution(
  model: LanguageModel,
  readings: HeadReadings,
  label: int | Int[Array, ''],
  other_label: int | Int[Array, ''] | None,
) -> LogitAttribution:
  r"""Splits the difference of two logits over layers, heads and segments.

  .. math:: \ell_a - \ell_b = \sum_{l,h,s} o^{lh}_s W_O^{lh} g_l
    + x_0 J_0 g_0 + \textrm{biases}, \qquad g_l = J_{l} g_{l+1}

  with the exact affine maps :math:`J` of the blocks at the position, gates and
  normalisations frozen, and :math:`g_L` from final normalisation and head.

  Args:
    readings: of one position of this model, which has a head.
    label: token id whose logit counts.
    other_label: token id whose logit is subtracted; None for the mean of all
      logits. An id outside of the vocabulary is a `ValueError`.
  """
  check_labels(model, label, other_label, ranks=(0,))
  row, bias = _label_direction(model, label, other_label)
  row = vary_as(row, readings.last)  # As what is transposed does.
  last = readings.last[None]
  state = normalise(model.architecture, model.final_norm, last)[0]

  def final_part(x):
    if model.final_norm is None:
      return x
    normalization = model.architecture.normalization
    return normalization.linear_part(model.final_norm, readings.last, x)

  norm_bias = state - final_part(readings.last)
  (direction,) = jax.vjp(final_part, jnp.zeros_like(row))[1](row)
  embedded, (terms, effects, biases, directions) = _carry_back(
    model, readings, direction
  )
  return LogitAttribution(
    logit_difference=state @ row + bias,
    contributions=terms[:, :, :-1],
    rest=terms[:, :, -1],
    embedding=readings.stream[0] @ embedded,
    biases=biases,
    final_bias=norm_bias @ row + bias,
    removal_effects=effects,
    directions=directions,
  )


@door
def attribute(
  model: LanguageModel,
  tokens: Int[Array, ' N'],
  segment_ids: Int[Array, ' N'],
  label: Label,
  other_label: Label | None,
  *,
  num_segments: int,
  mask: Bool[Array, ' N'] | None = None,
) -> LogitAttribution:
  """Attributes a difference of two logits to heads and demonstrations.

  It is `read_heads`, then `direct_logit_attribution`. For a label of several
  tokens it is the sum over them, each read behind the prompt and the tokens
  before it, of its logit less the mean of all logits.

  Takes what `read_heads` and `direct_logit_attribution` take, labels of several
  tokens as their ids `[T]`, and raises `ValueError` as they do.
  """
  if not check_labels(model, label, other_label):
    readings = read_heads(
      model, tokens, segment_ids, num_segments=num_segments, mask=mask
    )
    return direct_logit_attribution(model, readings, label, other_label)
  first, *second = (
    _attribute_string(model, tokens, segment_ids, ids, num_segments, mask)
    for ids in (label, other_label)
    if ids is not None
  )
  return jax.tree.map(jnp.subtract, first, *second) if second else first


def _attribute_string(model, tokens, segment_ids, ids, num_segments, mask):
  """Attributes the logits of a string, each less the mean of all logits."""
  ids, whole, valid, places = append(model, tokens, ids, mask)
  rest = len(whole) - len(tokens)
  segment_ids = jnp.pad(segment_ids, (0, rest), constant_values=-1)

  def attribute_token(place):
    before = valid & (jnp.arange(len(whole)) <= place[0])
    readings = read_heads(
      model, whole, segment_ids, num_segments=num_segments, mask=before
    )
    found = direct_logit_attribution(model, readings, place[1], None)
    return found._replace(directions=None)

  parts = jax.lax.map(attribute_token, (places, ids))
  return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), parts)


def check_labels(
  model: LanguageModel,
  label: Any,
  other_label: Any,
  ranks: tuple[int, ...] = (0, 1),
) -> bool:
  """Checks two labels; returns whether one of them has several tokens."""

  def check_differ(label: Any, other_label: Any) -> None:
    if np.array_equal(np.atleast_1d(label), np.atleast_1d(other_label)):
      raise ValueError(
        f'label and other_label are both {label}, so their logits do not '
        'differ; expected two labels.'
      )

  _model.check_head(model)
  _model.check_text(model, 'label', label, ranks=ranks)
  if other_label is not None:
    _model.check_text(model, 'other_label', other_label, ranks=ranks)
    _validate.look(check_differ, label, other_label)
  return any(np.ndim(ids) for ids in (label, other_label))


def append(model, tokens, ids, mask) -> tuple[Array, ...]:
  """Puts a string behind a prompt, without its last token, which is not read.

  Returns its ids, all tokens, which are valid, and where each id is predicted.
  """
  ids = jnp.atleast_1d(jnp.asarray(ids, tokens.dtype))
  size, rest = len(tokens), len(ids) - 1
  _model.check_room(model, size, mask, rest)
  valid = jnp.ones(size, bool) if mask is None else mask
  valid = jnp.pad(valid, (0, rest), constant_values=True)
  places = jnp.arange(size, size + rest)
  places = jnp.append(_model.last_valid(tokens, mask), places)
  return ids, jnp.concatenate([tokens, ids[:rest]]), valid, places


def _label_direction(model, label, other_label) -> tuple[Array, Array | float]:
  """Returns the difference of two logits as a linear function of the state."""
  weight, bias = model.head or (model.embedding.T, None)

  def other(array):
    if other_label is None:
      return jnp.mean(array, axis=-1)
    return array[..., other_label]

  row = weight[:, label] - other(weight)
  return row, 0.0 if bias is None else bias[label] - other(bias)


def _carry_back(
  model: LanguageModel, readings: HeadReadings, direction: Array
) -> tuple[Array, tuple[Array, ...]]:
  architecture = model.architecture

  def step(above, block, point, outputs, removed):
    zero = jnp.zeros_like(above)
    through = functools.partial(
      transformer.map_label, architecture, block, point
    )
    label, stream = jax.vjp(through, zero, zero)[1](above)
    of_heads = jnp.einsum('hdm,m->hd', block.output.weight, label)
    lost = jnp.sum(outputs, axis=1, keepdims=True) - removed
    bias = transformer.bias_of(architecture, block, point, zero)
    return stream, (
      jnp.einsum('hsd,hd->hs', outputs, of_heads),
      jnp.einsum('hsd,hd->hs', lost, of_heads),
      bias @ above,
      label,
    )

  layers = readings.points, readings.outputs, readings.removed_outputs
  return transformer.scan_blocks(
    architecture, model.blocks, step, direction, *layers, reverse=True
  )
