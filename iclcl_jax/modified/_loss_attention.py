"""From a loss to the attention that one gradient step on it implies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import (
  _pytree,
  _validate,
  attention,
  dual,
  features,
  losses,
  moments,
)
from iclcl_jax._door import door
from iclcl_jax._program import compiled
from iclcl_jax.forms import form_of, see
from iclcl_jax.modified._attention import Attention
from iclcl_jax.precision import cast_like, widen
from iclcl_jax.types import (
  Array,
  FeatureMap,
  Float,
  Kernel,
  Loss,
  Mask,
  Optimizer,
  Penalty,
)

# An optimizer is tried on multiples of a gradient and of weights.
_GRADIENT = np.array([[1.0, -2.0], [0.5, 3.0]])
_WEIGHTS = np.array([[2.0, 1.0], [-1.0, 0.25]])
_FACTORS = (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1e4, 1e4)


@_pytree.dataclass(kw_only=True)
class LossAttention(Attention):
  """The attention that one gradient step on a loss implies.

  Made by `attention_from_loss`. The call starts from the `W_0` of the
  query-side tokens, or from zero without any; `stream` and `causal` start from
  zero, and raise a `ValueError` for a penalty with a slope there, which is not
  streamed (a ridge has none). All do where the loss has no gradient at
  `W_0 = 0` and no token gives another.

  Only in a declared sum over demonstrations has a prefix the loss of its terms.
  For any other loss `causal` takes the step of every prefix on its own: the
  loss is evaluated `N` times, and the time is quadratic in `N` at least. A loss
  with a keyword `mask [N]` (`losses.info_nce`) is evaluated in blocks of
  prefixes; one without is written out for each, which takes long to compile.

  The `step_size` is that of the optimizer times the learning rate, the `decay`
  the part of `W_0` that its weight decay removes.
  """

  loss: Loss = _pytree.static()
  penalty: Penalty | None = _pytree.static()
  step_size: float | Array
  decay: float | Array

  def _one(self, phi, query, keys, values, num_query_tokens, mask):
    labels = self.labels(
      phi, keys, values, num_query_tokens=num_query_tokens, mask=mask
    )
    scores, log_scale = attention.scores(phi, query, keys, mask)
    total = jnp.sum(scores)
    output = attention.divide(labels.T @ scores, total, mask)
    if self.penalty is None:
      return output
    form = form_of(phi)
    start = _start(phi, keys, values, num_query_tokens, mask)
    if num_query_tokens == 0:
      self._check_penalty(keys, values)
    # Weights of zero have a slope too, in the span of what is seen.
    size = keys.shape[0] - num_query_tokens
    seen = None if mask is None else mask[:size]
    start = see(phi, start, keys[:size], values[:size], seen)
    slope = form.penalty_gradient(phi, start, self.penalty)
    reading = form.read(phi, form.with_weights(start, slope), query)
    scale = jnp.exp(reading.log_scale - log_scale)
    scale = jnp.asarray(self.step_size, scale.dtype) * scale
    return output - attention.divide(reading.numerator * scale, total, mask)

  @door
  def labels(
    self,
    phi: FeatureMap | Kernel,
    keys: Float[Array, 'N d_k'],
    values: Float[Array, 'N d_v'],
    *,
    num_query_tokens: int = 0,
    mask: Mask | None = None,
  ) -> Float[Array, 'N d_v']:
    """Returns what the attention adds up in place of the values: `[N, d_v]`.

    For a demonstration it is minus the step times the slope of the loss, for a
    query-side token what the decay leaves of its value.
    """
    _validate.check_num_query_tokens(num_query_tokens, keys.shape[0])
    size = keys.shape[0] - num_query_tokens
    original, values = values, widen(jnp.asarray(values))
    if num_query_tokens:
      start = _start(phi, keys, values, num_query_tokens, mask)
      predictions = _evaluate(phi, start, keys[:size])
    else:
      self._check_zero(values)
      predictions = jnp.zeros_like(values)
    slopes = self._labels(predictions, values[:size], mask)
    kept = jnp.asarray(1 - self.decay, values.dtype) * values[size:]
    labels = jnp.concatenate([slopes, kept])
    return cast_like(moments.visible(labels, mask), original)

  def _learnt(self, phi, keys, values, chunk_size, mask):
    self._check_leaves_zero(keys, values)
    return keys, self.labels(phi, keys, values, mask=mask)

  def _causal(self, phi, queries, keys, values, chunk_size, mask):
    if losses.is_sum_over_demonstrations(self.loss):
      losses.check_sum(self.loss)
      return super()._causal(phi, queries, keys, values, chunk_size, mask)
    self._check_leaves_zero(keys, values)
    self._check_zero(values)
    positions = jnp.arange(keys.shape[0])

    def answer(query, keys, values, seen):
      labels = self._labels(jnp.zeros_like(values), values, seen)
      return attention.kernel_attention(phi, query, keys, labels, mask=seen)

    def answer_at(row):
      seen = positions <= row[1]
      seen = seen if mask is None else seen & mask
      return answer(row[0], keys, values, seen)

    if losses.declares_mask(self.loss):
      return moments.map_chunks(answer_at, (queries, positions), chunk_size)
    if mask is not None:
      losses.check_sum(self.loss)  # It is none.
    # A loss of unknown form has to see a prefix alone.
    prefixes = range(1, keys.shape[0] + 1)
    return jnp.stack(
      [answer(queries[n - 1], keys[:n], values[:n], None) for n in prefixes]
    )

  def _check_leaves_zero(self, keys, values) -> None:
    """Refuses a penalty that would move a model of all queries from zero."""
    if self.penalty is not None:
      slope = self._check_penalty(keys, values)
      if _validate.is_concrete(slope) and np.any(np.asarray(slope)):
        raise ValueError(
          'penalty has a slope at W_0 = 0, which stream and causal leave out; '
          'expected one without, such as losses.ridge. Call the attention for '
          'one query, under jax.vmap for several.'
        )

  def _labels(self, predictions, values, mask):
    """Minus the gradient with respect to the predictions, times the step."""
    mask = None if mask is None else mask[: values.shape[0]]
    loss = losses.of_visible(self.loss, mask)
    values = moments.visible(values, mask)
    predictions = moments.visible(predictions, mask)
    _validate.check_real_scalar('loss', loss, values, values)
    slopes = jax.grad(loss)(predictions, values)
    return -jnp.asarray(self.step_size, slopes.dtype) * slopes

  def _check_penalty(self, keys, values):
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    zero = np.zeros((values.shape[1], keys.shape[1]), dtype)
    return _finite_slope('penalty', self.penalty, zero)

  def _check_zero(self, values) -> None:
    """Refuses a loss whose gradient does not exist at zero predictions."""
    # Of the shape alone: traced values may vary over the axes of a mesh.
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    zero = np.zeros(values.shape, dtype)
    _finite_slope('loss', self.loss, zero, np.ones_like(zero))


def _finite_slope(name: str, function, *arguments) -> Array:
  """The slope at `W_0 = 0`, refused where it does not exist."""
  _validate.check_real_scalar(name, function, *arguments)
  with jax.ensure_compile_time_eval():
    slope = _slope(function, arguments)
  # By NumPy: under jit, jnp would make a tracer of what is known. A function
  # that depends on traced values cannot be looked at.
  if _validate.is_concrete(slope) and not np.all(np.isfinite(slope)):
    raise ValueError(
      f'{name} has no finite gradient at W_0 = 0; expected one there. Give W_0 '
      'by query-side tokens (num_query_tokens >= 1).'
    )
  return slope


@compiled
def _slope(function, arguments) -> Array:
  return jax.grad(function)(*arguments)


def _start(phi, keys, values, num_query_tokens: int, mask):
  size = keys.shape[0] - num_query_tokens
  rest = None if mask is None else mask[size:]
  return dual.zero_shot(phi, keys[size:], values[size:], mask=rest)


def _evaluate(phi, state, keys) -> Float[Array, 'N d_v']:
  form, phi = form_of(phi), features.key_side(phi)

  def evaluate(key):
    reading = form.read(phi, state, key)
    return reading.numerator * jnp.exp(reading.log_scale)

  return jax.vmap(evaluate)(keys)


def attention_from_loss(
  loss: Loss,
  *,
  penalty: Penalty | None = None,
  optimizer: Optimizer | None = None,
  learning_rate: float | Array = 1.0,
) -> LossAttention:
  r"""Builds the attention that one gradient step on a loss implies.

  .. math:: h = \Bigl[(1-\delta)\,W_0\phi(q) + \sum_i u_i\,\phi(k_i)^\top\phi(q)
     - \eta\nabla P(W_0)\,\phi(q)\Bigr] \big/ D, \qquad
     u_i = -\eta\, \partial L/\partial f(k_i)

  Args:
    loss, penalty: as in `dual.one_step_autodiff`.
    optimizer: an optax transformation that is linear in gradient and weights;
      None for `optax.sgd(1.0)`. Its first step is taken. The sign belongs to
      it: `optax.identity()` and `optax.scale(1.0)` ASCEND the loss, which gives
      minus the attention. A first step that is zero, or not proportional to the
      gradient, is a `ValueError`.
    learning_rate: factor of the update.

  Example:
    >>> attend = attention_from_loss(losses.contrastive)
    >>> keys, values = jnp.zeros((2, 4)), jnp.array([[1.0], [3.0]])
    >>> attend(kernels.ExponentialKernel(), jnp.ones(4), keys, values).tolist()
    [2.0]
  """
  losses.check_loss(loss)
  losses.check_penalty(penalty)
  _validate.non_negative(learning_rate=learning_rate)
  step_size, decay = (1.0, 0.0) if optimizer is None else _linear(optimizer)
  return LossAttention(
    loss=loss,
    penalty=penalty,
    step_size=learning_rate * step_size,
    decay=learning_rate * decay,
  )


def _linear(optimizer: Optimizer) -> tuple[float, float]:
  _validate.check_optimizer(optimizer)
  with jax.ensure_compile_time_eval():
    tried = _try_steps(optimizer, _GRADIENT, _WEIGHTS)
  if not _validate.is_concrete(tried):
    raise ValueError(
      'optimizer holds traced values, so that its step cannot be examined; '
      'expected concrete ones. Pass learning_rate for a traced step size.'
    )
  steps = [np.asarray(x) for x in tried]  # Slices of arrays may be traced.
  step_size, decay = -float(steps[0][0, 0]), -float(steps[1][0, 0]) / 2
  for (a, b), step in zip(_FACTORS, steps, strict=True):
    expected = -(a * step_size * _GRADIENT + b * decay * _WEIGHTS)
    if not np.allclose(step, expected, rtol=1e-4, atol=1e-4 * max(a, b)):
      raise ValueError(
        'optimizer takes a step that is not proportional to the gradient '
        '(adaptive or clipping), so one step is not attention; expected a '
        'linear one, such as optax.sgd(0.1).'
      )
  if step_size == 0:
    raise ValueError(
      'optimizer does not move in its first step (a schedule that starts at 0, '
      'or steps that are accumulated); expected a step, such as that of '
      'optax.sgd(0.1).'
    )
  return step_size, decay


@compiled
def _try_steps(optimizer, gradient: Any, weights: Any) -> list[Array]:
  pairs = [(a * gradient, b * weights) for a, b in _FACTORS]
  return [optimizer.update(g, optimizer.init(w), w)[0] for g, w in pairs]
