r"""The dual model of attention: gradient descent on a contrastive loss.

The dual model is :math:`f(x) = W\phi(x)`. Its training set are the
demonstrations: keys are inputs, values are labels. From the state that the
query-side tokens give (`zero_shot`), ONE gradient step on
`losses.contrastive` yields a model whose prediction for the query is the
attention output (Ren & Liu, arXiv:2310.13220, Theorem 3.1).

`phi` is a feature map, and the state then a `DualState`, or a kernel, and the
state a `KernelDualState`: coefficients over the keys, so that the softmax
kernel needs no feature map. All functions take both.

States are query-free: they carry the sum of the features of all visible tokens
(the mass), and `predict` divides by it. The papers' form with a normaliser `D`
that is fixed for one query is `predict(..., normaliser=normaliser(...))`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from iclcl_jax import _validate, attention, coefficients, losses, moments
from iclcl_jax.types import (
  Array,
  DualState,
  FeatureMap,
  Float,
  Kernel,
  KernelDualState,
  Mask,
)

if TYPE_CHECKING:
  import optax

State: TypeAlias = DualState | KernelDualState
Penalty: TypeAlias = Callable[[Array], Array]


def zero_shot(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  mask: Mask | None = None,
) -> State:
  r"""Returns the initial state, which the query-side tokens give.

  .. math:: W_0 = \sum_{t} v_t\,\phi(k_t)^\top

  Args:
    phi: feature map or kernel.
    keys: keys of the query-side tokens, commonly one. Shape `[N, d_k]`; zero
      rows give `W_0 = 0`.
    values: their values. Shape `[N, d_v]`.
    mask: valid tokens. Shape `[N]`; None for all.

  Returns:
    The state.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  Example:
    >>> from iclcl_jax import kernels
    >>> state = zero_shot(
    ...     kernels.ExponentialKernel(), jnp.ones((1, 4)), jnp.ones((1, 2)))
    >>> state.coefficients.tolist()
    [[1.0, 1.0]]

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1 (`W_0`).
  """
  _validate.check_tokens(keys, values, mask, allow_empty=True)
  form = _form(phi)
  return form.absorb(phi, form.empty(phi, keys, values), keys, values, mask)


def one_step(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  learning_rate: float | Array = 1.0,
  mask: Mask | None = None,
) -> State:
  r"""Takes one gradient step on the contrastive loss, in closed form.

  .. math:: W_1 = W_0 + \eta \sum_{i} v_i\,\phi(k_i)^\top

  Further demonstrations are absorbed by further calls: the gradient does not
  depend on `W`.

  Args:
    phi: feature map or kernel.
    state: the state before the step.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    learning_rate: the step size `eta`; 1 gives attention.
    mask: valid demonstrations. Shape `[N]`; None for all.

  Returns:
    The state after the step; its mass includes the demonstrations.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, there is no demonstration,
      or `learning_rate` is negative or not finite.

  Example:
    >>> from iclcl_jax import kernels
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> state = one_step(kernel, zero_shot(kernel, x[:1], v[:1]), x[1:], v[1:])
    >>> predict(kernel, state, x[0]).tolist()
    [0.5, 0.5]

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1 (`W_1`).
  """
  _check_step(phi, state, keys, values, mask, learning_rate)
  labels = _scale_values(values, mask, learning_rate)
  return _form(phi).absorb(phi, state, keys, labels, mask)


def stream_step(
  phi: FeatureMap,
  state: DualState,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  learning_rate: float | Array = 1.0,
  chunk_size: int = 1024,
  mask: Mask | None = None,
) -> DualState:
  """`one_step` that holds the features of one chunk at a time.

  Args:
    phi: feature map.
    state: the state before the step.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    learning_rate: the step size `eta`.
    chunk_size: rows whose features are held at a time.
    mask: valid demonstrations. Shape `[N]`; None for all.

  Returns:
    The state after the step.

  Raises:
    ValueError: as `one_step`; if `phi` is a kernel or `chunk_size < 1`.

  Example:
    >>> from iclcl_jax import features
    >>> phi, x = features.EluPlusOneFeatures(), jnp.ones((3, 4))
    >>> stream_step(phi, zero_shot(phi, x, x), x, x, chunk_size=2).mass.tolist()
    [6.0, 6.0, 6.0, 6.0]

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1 (`W_1`).
  """
  _validate.check_feature_map(phi)
  _validate.check_count('chunk_size', chunk_size)
  _check_step(phi, state, keys, values, mask, learning_rate)
  labels = _scale_values(values, mask, learning_rate)
  return moments.absorb_stream(phi, state, keys, labels, chunk_size, mask)


def one_step_autodiff(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  loss: losses.Loss = losses.contrastive,
  penalty: Penalty | None = None,
  learning_rate: float | Array = 1.0,
  optimizer: 'optax.GradientTransformation | None' = None,
  mask: Mask | None = None,
) -> State:
  r"""Takes one gradient step on any loss, by `jax.grad`.

  .. math:: W_1 = W_0 - \eta\,
     \nabla_W\, \bigl[L(W\phi(K), V) + P(W)\bigr]_{W_0}

  This is the definition; `one_step` is the fast path for `losses.contrastive`.

  Args:
    phi: feature map or kernel.
    state: the state before the step.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    loss: `loss(predictions [N, d_v], values [N, d_v]) -> []`.
    penalty: `penalty(weights [d_v, R]) -> []`; with a kernel, the weights are
      those of an orthonormal basis of the span of the keys.
    learning_rate: factor of the update.
    optimizer: an optax transformation; None for `optax.sgd(1.0)`. It sees
      gradient and weights divided by the state's scale, feature by feature,
      which leaves linear transformations (SGD, momentum, weight decay) exact.
    mask: valid demonstrations. Shape `[N]`; None for all.

  Returns:
    The state after the step; its mass includes the demonstrations.

  Raises:
    ValueError: as `one_step`; if a masked loss is no declared sum over
      demonstrations, or the loss declares `normaliser`.

  Example:
    >>> from iclcl_jax import kernels
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> state = zero_shot(kernel, x[:1], v[:1])
    >>> state = one_step_autodiff(kernel, state, x[1:], v[1:])
    >>> predict(kernel, state, x[0]).tolist()
    [0.5, 0.5]

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1.
  """
  _check_step(phi, state, keys, values, mask, learning_rate)
  optimizer = _sgd() if optimizer is None else optimizer
  _check_optimizer(optimizer)
  form = _form(phi)
  _check_objective(loss, penalty, values, masked=mask is not None)
  state = form.see(phi, state, keys, values, mask)
  rows = jnp.arange(keys.shape[0])
  gradient = form.gradient(phi, state, keys, values, rows, mask, loss)
  if penalty is not None:
    gradient = gradient + form.penalty_gradient(phi, state, penalty)
  weights = form.get_weights(state)
  updates, _ = optimizer.update(gradient, optimizer.init(weights), weights)
  rate = jnp.asarray(learning_rate, values.dtype)
  return form.with_weights(state, weights + rate * updates)


class Trajectory(NamedTuple):
  """A trained state and what was observed on the way.

  Attributes:
    state: the state after the last step.
    observations: result of `observe` after every step, stacked.
  """

  state: State
  observations: Any


def train(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  optimizer: 'optax.GradientTransformation',
  num_epochs: int,
  batch_size: int,
  loss: losses.Loss = losses.contrastive,
  penalty: Penalty | None = None,
) -> State:
  r"""Trains the dual model for many steps.

  Demonstrations are visited in the order given, `ceil(N / batch_size)` steps
  an epoch; the last batch of an epoch may be smaller. With
  `losses.contrastive` the gradient is constant: `optax.sgd(1 / num_epochs)`
  ends where one full-batch step with `learning_rate=1` ends.

  Args:
    phi: feature map or kernel.
    state: the state before training.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    optimizer: an optax transformation, with its learning rate.
    num_epochs: passes over the demonstrations.
    batch_size: demonstrations in a step, at most `N`.
    loss: `loss(predictions, values) -> []`, evaluated on the batch.
    penalty: `penalty(weights [d_v, R]) -> []`, added in every step.

  Returns:
    The state after training; its mass includes the demonstrations once.

  Raises:
    ValueError: as `one_step_autodiff`; if `num_epochs < 1`, or `batch_size` is
      not in `1..N`.

  Example:
    >>> import optax
    >>> from iclcl_jax import kernels
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> state = zero_shot(kernel, x[:1], v[:1])
    >>> state = train(kernel, state, x[1:], v[1:], optimizer=optax.sgd(0.25),
    ...               num_epochs=4, batch_size=1)
    >>> predict(kernel, state, x[0]).tolist()
    [0.5, 0.5]

  References:
    Ren & Liu, arXiv:2310.13220v1, section 5 (batch 1, E epochs).
  """
  return train_and_observe(
    phi,
    state,
    keys,
    values,
    optimizer=optimizer,
    num_epochs=num_epochs,
    batch_size=batch_size,
    loss=loss,
    penalty=penalty,
    observe=lambda state: None,
  ).state


def train_and_observe(
  phi: FeatureMap | Kernel,
  state: State,
  keys: Float[Array, 'N d_k'],
  values: Float[Array, 'N d_v'],
  *,
  optimizer: 'optax.GradientTransformation',
  num_epochs: int,
  batch_size: int,
  observe: Callable[[State], Any],
  loss: losses.Loss = losses.contrastive,
  penalty: Penalty | None = None,
) -> Trajectory:
  """`train`, and a look at the state after every step.

  Args:
    phi: feature map or kernel.
    state: the state before training.
    keys: inputs of the demonstrations. Shape `[N, d_k]`.
    values: their labels. Shape `[N, d_v]`.
    optimizer: an optax transformation, with its learning rate.
    num_epochs: passes over the demonstrations.
    batch_size: demonstrations in a step, at most `N`.
    observe: function of the state, such as a prediction with a fixed
      `normaliser`.
    loss: `loss(predictions, values) -> []`, evaluated on the batch.
    penalty: `penalty(weights [d_v, R]) -> []`; with a kernel, the weights are
      those of an orthonormal basis of the span of the keys.

  Returns:
    A `Trajectory`; observations have a leading axis of
    `num_epochs * ceil(N / batch_size)` steps.

  Raises:
    ValueError: as `train`.
  """
  _check_step(phi, state, keys, values, None, 1.0)
  _validate.check_count('num_epochs', num_epochs)
  _validate.check_count('batch_size', batch_size)
  size = keys.shape[0]
  if batch_size > size:
    raise ValueError(
      f'batch_size is {batch_size}; expected at most the number of '
      f'demonstrations, {size}.'
    )
  _check_optimizer(optimizer)
  if not callable(observe):
    raise ValueError(
      f'observe is a {type(observe).__name__}; expected a function of the '
      'state, such as lambda state: dual.predict(phi, state, query).'
    )
  form = _form(phi)
  padding = -size % batch_size
  _check_objective(loss, penalty, values[:batch_size], masked=padding > 0)
  state = form.see(phi, state, keys, values)
  steps_per_epoch = (size + padding) // batch_size

  def step(carry, index):
    state, optimizer_state = carry
    rows = index % steps_per_epoch * batch_size + jnp.arange(batch_size)
    valid = rows < size if padding else None
    rows = jnp.minimum(rows, size - 1)
    gradient = form.gradient(phi, state, keys, values, rows, valid, loss)
    if penalty is not None:
      gradient = gradient + form.penalty_gradient(phi, state, penalty)
    weights = form.get_weights(state)
    updates, optimizer_state = optimizer.update(
      gradient, optimizer_state, weights
    )
    state = form.with_weights(state, weights + updates)
    return (state, optimizer_state), observe(state)

  carry = state, optimizer.init(form.get_weights(state))
  steps = jnp.arange(num_epochs * steps_per_epoch)
  (state, _), observations = jax.lax.scan(step, carry, steps)
  return Trajectory(state, observations)


def normaliser(
  phi: FeatureMap | Kernel,
  keys: Float[Array, 'N d_k'],
  query: Float[Array, ' d_k'],
  *,
  mask: Mask | None = None,
) -> Float[Array, '']:
  r"""Returns the papers' normaliser of one query.

  .. math:: D = \sum_i \phi(k_i)^\top\phi(q)

  over the keys of demonstrations AND query side. It is a plain number, and
  may overflow where a state does not.

  Args:
    phi: feature map or kernel.
    keys: keys of all visible tokens. Shape `[N, d_k]`.
    query: the test input. Shape `[d_k]`.
    mask: valid keys. Shape `[N]`; None for all.

  Returns:
    The normaliser. Shape `[]`.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree.

  Example:
    >>> from iclcl_jax import kernels
    >>> float(normaliser(
    ...     kernels.ExponentialKernel(), jnp.zeros((3, 4)), jnp.ones(4)))
    3.0

  References:
    Ren & Liu, arXiv:2310.13220, eq. 9.
  """
  _validate.check_tokens(keys, keys, mask, query=query)
  scores, log_scale = attention.scores(phi, query, keys, mask)
  return jnp.sum(scores) * jnp.exp(log_scale)


def predict(
  phi: FeatureMap | Kernel,
  state: State,
  query: Float[Array, ' d_k'],
  *,
  normaliser: Float[Array, ''] | None = None,
) -> Float[Array, ' d_v']:
  r"""Returns the prediction of the dual model for one query.

  .. math:: f(q) = W\phi(q) / D, \qquad D = z^\top\phi(q)

  Args:
    phi: feature map or kernel.
    state: a trained state.
    query: the test input. Shape `[d_k]`.
    normaliser: a fixed `D`, see :func:`normaliser`; None for that of the
      state, which counts every token that the state has seen.

  Returns:
    The prediction. Shape `[d_v]`; NaN if the state has seen no token.

  Raises:
    ValueError: if the state does not belong to `phi`, or ranks, sizes or
      dtypes disagree.

  Example:
    >>> from iclcl_jax import kernels
    >>> kernel = kernels.ExponentialKernel()
    >>> state = zero_shot(kernel, jnp.ones((2, 4)), jnp.array([[1.0], [3.0]]))
    >>> predict(kernel, state, jnp.ones(4)).tolist()
    [2.0]

  References:
    Ren & Liu, arXiv:2310.13220, Theorem 3.1.
  """
  _validate.check_array('query', query, 'd_k')
  _check_state(phi, state, query.shape[0])
  _validate.check_dtypes(state=state.mass, query=query)
  reading = _form(phi).read(phi, state, query)
  if normaliser is None:
    return reading.numerator / reading.denominator
  _validate.check_scalar('normaliser', normaliser)
  scale = jnp.exp(reading.log_scale - jnp.log(jnp.abs(normaliser)))
  return reading.numerator * scale * jnp.sign(normaliser)


def stream_predict(
  phi: FeatureMap | Kernel,
  state: State,
  queries: Float[Array, 'M d_k'],
  *,
  chunk_size: int = 1024,
) -> Float[Array, 'M d_v']:
  """`predict` for many queries, one chunk of them at a time.

  Args:
    phi: feature map or kernel.
    state: a trained state.
    queries: the test inputs. Shape `[M, d_k]`.
    chunk_size: queries whose features are held at a time.

  Returns:
    The predictions. Shape `[M, d_v]`.

  Raises:
    ValueError: as `predict`; if `chunk_size < 1`.

  Example:
    >>> from iclcl_jax import kernels
    >>> kernel = kernels.ExponentialKernel()
    >>> state = zero_shot(kernel, jnp.ones((2, 4)), jnp.array([[1.0], [3.0]]))
    >>> stream_predict(kernel, state, jnp.ones((2, 4))).tolist()
    [[2.0], [2.0]]
  """
  _validate.check_array('queries', queries, 'M d_k')
  _validate.check_count('chunk_size', chunk_size)
  return moments.map_chunks(
    lambda query: predict(phi, state, query), queries, chunk_size
  )


def merge(a: State, b: State) -> State:
  """Adds two states that saw different tokens through the same `phi`.

  Args:
    a: a state.
    b: a state of the same kind and sizes.

  Returns:
    The state that has seen the tokens of both.

  Raises:
    ValueError: if the states differ in kind or sizes.

  Example:
    >>> from iclcl_jax import features
    >>> phi = features.EluPlusOneFeatures()
    >>> state = zero_shot(phi, jnp.ones((1, 4)), jnp.ones((1, 2)))
    >>> merge(state, state).mass.tolist()
    [2.0, 2.0, 2.0, 2.0]
  """
  sizes_a, sizes_b = _sizes('a', a), _sizes('b', b)
  if type(a) is not type(b) or sizes_a != sizes_b:
    raise ValueError(
      f'a is a {type(a).__name__} of sizes {sizes_a}, b a '
      f'{type(b).__name__} of sizes {sizes_b}; expected states of the same '
      'phi and the same value width.'
    )
  _validate.check_dtypes(a=a.mass, b=b.mass)
  form = moments if isinstance(a, DualState) else coefficients
  return form.merge(a, b)


class Removal(NamedTuple):
  """A state without one demonstration.

  Attributes:
    state: the remaining state.
    amplification: factor by which rounding errors of the state have grown,
      at least 1; infinite if the mass is lost. Shape `[]`.
  """

  state: State
  amplification: Float[Array, '']


def remove(
  phi: FeatureMap | Kernel,
  state: State,
  key: Float[Array, ' d_k'],
  value: Float[Array, ' d_v'],
  *,
  learning_rate: float | Array = 1.0,
) -> Removal:
  """Removes one demonstration from a state.

  Exact for a kernel: the row of the demonstration is cleared. For a feature
  map its contribution is subtracted, which loses digits where it was most of a
  feature's mass: `amplification` is the largest such loss over the features.

  Args:
    phi: feature map or kernel.
    state: a state that has seen the demonstration.
    key: its key. Shape `[d_k]`.
    value: its value. Shape `[d_v]`.
    learning_rate: the step size with which it was absorbed.

  Returns:
    A `Removal`. Inside `jit` a lost mass is not an error: `amplification` is
    then infinite and the state is NaN.

  Raises:
    ValueError: if ranks, sizes or dtypes disagree, or no digit is left (the
      mass is lost), or a kernel's state has no such row.

  Example:
    >>> from iclcl_jax import kernels
    >>> kernel, x, v = kernels.ExponentialKernel(), jnp.ones((2, 4)), jnp.eye(2)
    >>> removal = remove(kernel, zero_shot(kernel, x, v), x[0], v[0])
    >>> predict(kernel, removal.state, x[0]).tolist()
    [0.0, 1.0]
  """
  _validate.check_array('key', key, 'd_k')
  _validate.check_array('value', value, 'd_v')
  _check_step(phi, state, key[None], value[None], None, learning_rate)
  label = jnp.asarray(learning_rate, value.dtype) * value
  result = Removal(*_form(phi).remove(phi, state, key, label))
  if _validate.is_concrete(result) and jnp.isinf(result.amplification):
    raise ValueError(
      'the mass is lost: without this demonstration no digit of the state '
      'is left (or the state never saw it). Rebuild the state from the '
      'remaining demonstrations with dual.one_step.'
    )
  return result


def _form(phi: FeatureMap | Kernel):
  """The arithmetic of `phi`: sums of features, or rows of coefficients."""
  return moments if _validate.is_feature_map(phi) else coefficients


def _scale_values(values, mask, learning_rate) -> Float[Array, 'N d_v']:
  if mask is not None:  # A masked NaN would return in the gradient.
    values = jnp.where(mask[:, None], values, 0)
  return jnp.asarray(learning_rate, values.dtype) * values


def _sgd() -> 'optax.GradientTransformation':
  import optax

  return optax.sgd(1.0)


def _sizes(name: str, state: State) -> tuple[tuple[int, ...], ...]:
  """Sizes that two states share, whatever number of rows they hold."""
  if not isinstance(state, DualState | KernelDualState):
    raise ValueError(
      f'{name} is a {type(state).__name__}; expected a state, as '
      'dual.zero_shot returns.'
    )
  first = 1 if isinstance(state, KernelDualState) else 0
  return tuple(array.shape[first:] for array in state)


def _check_state(phi: FeatureMap | Kernel, state: State, d_k: int) -> None:
  expected = DualState if _validate.is_feature_map(phi) else KernelDualState
  if not isinstance(state, expected):
    raise ValueError(
      f'state is a {type(state).__name__}; expected a {expected.__name__}, '
      f'since phi is a {type(phi).__name__}. Make it with dual.zero_shot.'
    )
  if isinstance(state, KernelDualState):
    _validate.check_same('d_k', 'state.keys', state.keys.shape[1], 'keys', d_k)
    return
  row = jax.ShapeDtypeStruct((d_k,), state.log_scale.dtype)
  num_features = jax.eval_shape(phi, row).shape[0]
  _validate.check_same(
    'R', 'state', state.weights.shape[1], 'phi', num_features
  )


def _check_step(phi, state, keys, values, mask, learning_rate) -> None:
  _validate.check_tokens(keys, values, mask)
  _validate.check_scalar('learning_rate', learning_rate, minimum=0)
  _check_state(phi, state, keys.shape[1])
  stored = state.weights if isinstance(state, DualState) else state.coefficients
  width = stored.shape[0 if isinstance(state, DualState) else 1]
  _validate.check_same('d_v', 'state', width, 'values', values.shape[1])
  _validate.check_dtypes(state=stored, values=values)


def _check_optimizer(optimizer) -> None:
  is_transformation = callable(getattr(optimizer, 'init', None)) and callable(
    getattr(optimizer, 'update', None)
  )
  if not is_transformation:
    raise ValueError(
      f'optimizer is a {type(optimizer).__name__}; expected an optax '
      'transformation, such as optax.sgd(0.1).'
    )


def _check_objective(loss, penalty, values, *, masked: bool) -> None:
  losses.check_loss(loss)
  if losses.declares_normaliser(loss):
    raise ValueError(
      'loss declares the keyword normaliser, which belongs to one query; a '
      'state serves all. Bind it: functools.partial(loss, normaliser=D), with '
      'D from dual.normaliser.'
    )
  result = jax.eval_shape(loss, values, values)
  if getattr(result, 'shape', None) != ():
    raise ValueError(
      f'loss returns {result}; expected a scalar array []. Sum over the '
      'demonstrations, for example with jnp.sum.'
    )
  if penalty is not None and not callable(penalty):
    raise ValueError(
      f'penalty is a {type(penalty).__name__}; expected a function '
      'penalty(weights [d_v, R]) -> [], such as losses.ridge(0.1).'
    )
  if masked and not losses.is_sum_over_demonstrations(loss):
    raise ValueError(
      'loss is not declared a sum over demonstrations, so rows cannot be '
      'left out (a mask, or an incomplete batch). Declare it with '
      'losses.sum_over_demonstrations, or pass whole batches without mask.'
    )
