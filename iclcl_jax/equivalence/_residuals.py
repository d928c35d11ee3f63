"""Both sides of the identity for one head and one query."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from iclcl_jax import (
  _pytree,
  _validate,
  attention,
  dual,
  kernels,
  losses,
  modified,
  moments,
  precision,
)
from iclcl_jax._door import call_outside, eager_door
from iclcl_jax._program import compiled
from iclcl_jax.forms import form_of
from iclcl_jax.precision import widen
from iclcl_jax.types import (
  Array,
  AttentionFn,
  FeatureMap,
  Float,
  Kernel,
  Loss,
  Mask,
  Optimizer,
  Penalty,
  State,
)


class Residuals(NamedTuple):
  """Both sides of the identity and their distance.

  Attributes:
    attention: the attention output. Shape `[d_v]`.
    closed_form, autodiff: predictions of the dual models. Shape `[d_v]`.
    residual: largest difference of the three, relative to the sum of absolute
      values of everything that was added (backward stable). Shape `[]`.
    relative_error: the same difference relative to the output alone, which
      cancellation can make large. Shape `[]`.
    normaliser: the normaliser `D`, scaled. Shape `[]`.
    condition: `sum |terms of D| / |D|`, 1 for positive maps. Shape `[]`.
  """

  attention: Float[Array, ' d_v']
  closed_form: Float[Array, ' d_v']
  autodiff: Float[Array, ' d_v']
  residual: Float[Array, '']
  relative_error: Float[Array, '']
  normaliser: Float[Array, '']
  condition: Float[Array, '']


@eager_door
def residuals(
  phi: FeatureMap | Kernel,
  query: Float[Array, ' d_k'],
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  num_query_tokens: int = 0,
  mask: Mask | None = None,
  loss: Loss = losses.contrastive,
  penalty: Penalty | None = None,
  optimizer: Optimizer | None = None,
  learning_rate: float | Array = 1.0,
  attention_fn: AttentionFn | None = None,
) -> Residuals:
  r"""Computes attention and both dual models; can be jitted.

  The residual of two results :math:`a, b` is :math:`\max|a-b| / S` with
  :math:`S = \max_j \sum_i c_i (|v_{ij}| + |h_j|)` and
  :math:`c_i = |\phi(k_i)|^\top|\phi(q)| / |D|`: what rounding of the sums may
  cause, however much they cancel. For another loss than the contrastive one
  the labels of its `modified.LossAttention` count beside the values, and
  `closed_form` is the attention that `modified.attention_from_loss` builds.
  """
  _validate.check_num_query_tokens(num_query_tokens, keys.shape[0])
  is_unit = _validate.is_concrete(learning_rate) and np.array_equal(
    learning_rate, 1
  )
  tokens = phi, query, keys, values, num_query_tokens, mask
  objective = {'loss': loss, 'penalty': penalty, 'optimizer': optimizer}
  objective |= {'learning_rate': learning_rate}
  return _residuals(_Theorem(*tokens, objective, attention_fn), is_unit)


@_pytree.dataclass
class _Theorem:
  """Demonstrations and query-side tokens, and what the dual model descends."""

  phi: FeatureMap | Kernel
  query: Array
  keys: Array
  values: Array
  num_query_tokens: int
  mask: Array | None
  objective: dict[str, Any]  # As in `modified.attention_from_loss`.
  attention_fn: AttentionFn | None

  @functools.cached_property
  def demonstrations(self) -> dict[str, Array | None]:
    return self._tokens(slice(self.keys.shape[0] - self.num_query_tokens))

  @functools.cached_property
  def start(self) -> State:
    rows = slice(self.keys.shape[0] - self.num_query_tokens, None)
    return dual.zero_shot(self.phi, **self._tokens(rows))  # type: ignore[arg-type]

  @functools.cached_property
  def implied(self) -> modified.LossAttention:
    return modified.attention_from_loss(**self.objective)

  @property
  def is_linear(self) -> bool:
    is_plain = not (self.objective['penalty'] or self.objective['optimizer'])
    return is_plain and self.objective['loss'] is losses.contrastive

  def answer(self, attend: AttentionFn, **options: Any) -> Array:
    if self.mask is not None:
      options['mask'] = self.mask
    tokens = self.phi, self.query, self.keys, self.values
    return call_outside(attend, *tokens, **options)

  def _tokens(self, rows: slice) -> dict[str, Array | None]:
    mask = None if self.mask is None else self.mask[rows]
    return {'keys': self.keys[rows], 'values': self.values[rows], 'mask': mask}


@compiled
def _residuals(theorem: _Theorem, is_unit: bool) -> Residuals:
  output = _attention(theorem, is_unit)
  closed_form = _closed_form(theorem)
  autodiff = _autodiff(theorem)

  shares, normaliser = _shares(theorem)
  outputs = jnp.stack(widen([output, closed_form, autodiff]))
  scale = jnp.max(shares @ (_amounts(theorem) + jnp.abs(outputs[:1])))
  spread = jnp.max(jnp.max(outputs, axis=0) - jnp.min(outputs, axis=0))
  return Residuals(
    attention=output,
    closed_form=closed_form,
    autodiff=autodiff,
    residual=precision.ratio(spread, scale),
    relative_error=precision.ratio(spread, jnp.max(jnp.abs(outputs[0]))),
    normaliser=normaliser,
    condition=jnp.sum(shares),
  )


def _attention(theorem: _Theorem, is_unit: bool) -> Float[Array, ' d_v']:
  attention_fn = theorem.attention_fn
  if attention_fn is not None:
    expected = '(phi, query, keys, values, mask=None) -> output'
    _validate.check_function('attention_fn', attention_fn, 4, expected)
    output = theorem.answer(attention_fn)
    _validate.check_result('attention_fn', output, theorem.values.shape[1:])
    return output
  if not (theorem.is_linear and is_unit):
    return _implied_attention(theorem)
  if isinstance(theorem.phi, kernels.ExponentialKernel):
    # A path that shares no code with the dual model.
    return attention.softmax_attention(
      theorem.query, theorem.keys, theorem.values, mask=theorem.mask
    )
  return theorem.answer(attention.kernel_attention)


def _closed_form(theorem: _Theorem) -> Float[Array, ' d_v']:
  if not theorem.is_linear:
    return _implied_attention(theorem)
  state = dual.one_step(
    theorem.phi,
    theorem.start,
    **theorem.demonstrations,  # type: ignore[arg-type]
    learning_rate=theorem.objective['learning_rate'],
  )
  return dual.predict(theorem.phi, state, theorem.query)


def _autodiff(theorem: _Theorem) -> Float[Array, ' d_v']:
  state = dual.one_step_autodiff(
    theorem.phi,
    theorem.start,
    **theorem.demonstrations,  # type: ignore[arg-type]
    **theorem.objective,
  )
  return dual.predict(theorem.phi, state, theorem.query)


def _implied_attention(theorem: _Theorem) -> Float[Array, ' d_v']:
  count = theorem.num_query_tokens
  return theorem.answer(theorem.implied, num_query_tokens=count)


def _shares(theorem: _Theorem) -> tuple[Float[Array, ' N'], Float[Array, '']]:
  """Returns each token's share of `|D|`, and the scaled normaliser `D`."""
  terms, _ = form_of(theorem.phi).score_terms(
    theorem.phi, theorem.query, theorem.keys, theorem.mask
  )
  normaliser = jnp.sum(terms)
  return jnp.sum(jnp.abs(terms), axis=1) / jnp.abs(normaliser), normaliser


def _amounts(theorem: _Theorem) -> Float[Array, 'N d_v']:
  values = moments.visible(widen(jnp.asarray(theorem.values)), theorem.mask)
  if theorem.is_linear:
    return jnp.abs(values)
  labels = theorem.implied.labels(
    theorem.phi,
    widen(theorem.keys),
    values,
    num_query_tokens=theorem.num_query_tokens,
    mask=theorem.mask,
  )
  return jnp.abs(values) + jnp.abs(labels)
