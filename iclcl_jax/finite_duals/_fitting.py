"""Maps for the queries and keys of a head: chosen, learnt, balanced."""

import jax
import jax.numpy as jnp

from iclcl_jax import _validate
from iclcl_jax._door import door
from iclcl_jax.finite_duals import _maps
from iclcl_jax.moments import zero_log_scale
from iclcl_jax.precision import widen
from iclcl_jax.types import Array, Bool, FeatureMap, Float, Int, PRNGKeyArray


@door
def fit_landmarks(
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  *,
  num_landmarks: int,
  far: Bool[Array, 'M N'] | None = None,
) -> _maps.LandmarkFeatures:
  r"""Chooses landmarks among keys by what calibration queries attend to.

  With attention weights :math:`A_{mi} = e^{q_m^\top k_i/\sqrt{d_k}}/Z_m` over
  all keys, landmarks are the pivots of a Cholesky decomposition of
  :math:`A^\top A`: each time the key that the chosen ones explain least. The
  map holds the queries, since keys are fitted to what they attend to.

  Args:
    queries: `[M, d_k]`, of all heads that share the keys `[N, d_k]`, in turn.
    num_landmarks: how many keys `R`, at most `N`.
    far: pairs that features will serve, see `WindowedLearner.is_far`; the
      choice is by them. Shape `[M, N]`; None for all.

  Example:
    >>> keys = jax.random.normal(jax.random.key(0), (8, 4))
    >>> phi = finite_duals.fit_landmarks(keys, keys, num_landmarks=8)
    >>> values = jnp.arange(8.0)[:, None]
    >>> print(attention.softmax_attention(keys[0], keys, values).round(1),
    ...   attention.kernel_attention(phi, keys[0], keys, values).round(1))
    [2.] [2.1]
  """
  _validate.at_least(1, num_landmarks=num_landmarks)
  if num_landmarks > keys.shape[0]:
    raise ValueError(
      f'num_landmarks is {num_landmarks}, and there are {keys.shape[0]} keys; '
      'expected at most as many. Calibrate with a longer text.'
    )
  queries, keys = widen((queries, keys))
  exponent = _scores(queries, keys)
  log_normalisers = jax.nn.logsumexp(exponent, axis=1)
  attended = jnp.exp(exponent - log_normalisers[:, None])
  if far is not None:
    attended = jnp.where(far, attended, 0)
  chosen = _pivots(attended.T @ attended, num_landmarks)
  return _maps.LandmarkFeatures(keys[chosen], queries, log_normalisers)


def _scores(queries: Array, keys: Array) -> Array:
  return queries @ keys.T / keys.shape[1] ** 0.5


def _pivots(gram: Array, count: int) -> Int[Array, ' R']:
  tiny = jnp.finfo(gram.dtype).tiny

  def choose(carry, index):
    rest, rows = carry
    pivot = jnp.argmax(rest)
    row = gram[pivot] - rows[:, pivot] @ rows
    row = row / jnp.sqrt(jnp.maximum(rest[pivot], tiny))
    rest = (rest - row**2).at[pivot].set(-jnp.inf)
    return (rest, rows.at[index].set(row)), pivot

  rows = jnp.zeros((count, len(gram)), gram.dtype)
  start = (jnp.diagonal(gram), rows)
  return jax.lax.scan(choose, start, jnp.arange(count))[1]


@door
def train_features(
  key: PRNGKeyArray,
  queries: Float[Array, 'M d_k'],
  keys: Float[Array, 'N d_k'],
  *,
  num_features: int,
  seen: Bool[Array, 'M N'],
  far: Bool[Array, 'M N'],
  num_steps: int = 400,
  learning_rate: float = 1e-2,
  batch_size: int = 128,
) -> _maps.ExponentialFeatures:
  """Learns exponential features by the attention of calibration queries.

  The loss is the cross-entropy between the distributions over the keys that a
  query sees, the softmax and the sum of learners: pairs that are not far keep
  their exact coefficients. Adam with a cosine schedule, from directions of
  random attended pairs.

  Args:
    queries, keys: of a calibration text. Shapes `[M, d_k]` and `[N, d_k]`.
    seen, far: which query sees which key, and which of these pairs features
      serve. Shape `[M, N]`.
    num_steps, learning_rate, batch_size: of Adam, `batch_size` queries a step.

  Example:
    >>> x = jax.random.normal(jax.random.key(0), (8, 4))
    >>> seen = jnp.tril(jnp.ones((8, 8), bool))
    >>> phi = finite_duals.train_features(
    ...   jax.random.key(1), x, x, num_features=3, seen=seen, far=seen,
    ...   num_steps=2)
    >>> phi(x[0]).shape
    (3,)
  """
  import optax

  _validate.at_least(
    1, num_features=num_features, num_steps=num_steps, batch_size=batch_size
  )
  _validate.positive(learning_rate=learning_rate)
  queries, keys = widen((queries, keys))
  exponent = _scores(queries, keys)
  neutral = zero_log_scale(exponent.dtype)
  target = jax.nn.softmax(jnp.where(seen, exponent, neutral))
  of_queries, of_keys, of_steps = jax.random.split(key, 3)
  size = queries.shape[0]
  m = jax.random.choice(of_queries, size, (num_features,))
  n = jax.random.categorical(
    of_keys, jnp.where(seen & far, exponent, neutral)[m]
  )
  directions = (queries[m] + keys[n]) / keys.shape[1] ** 0.5
  bias = -jnp.sum(directions**2, axis=1) / 4 * keys.shape[1] ** 0.5
  start = _maps.ExponentialFeatures(directions, directions, bias, bias)

  def loss(phi, rows):
    learnt = jnp.where(far[rows], _log_kernels(phi, queries[rows], keys), 0)
    learnt = jnp.where(far[rows], learnt, exponent[rows])
    log_weights = jax.nn.log_softmax(jnp.where(seen[rows], learnt, neutral))
    terms = jnp.where(seen[rows], target[rows] * log_weights, 0)
    return -jnp.mean(jnp.sum(terms, axis=1))

  optimizer = optax.scale_by_adam()

  def step(carry, inputs):
    phi, state = carry
    key, rate = inputs
    rows = jax.random.choice(key, size, (batch_size,))
    slope = jax.grad(loss)(phi, rows)
    with jax.numpy_dtype_promotion('standard'):  # Adam counts in integers.
      updates, state = optimizer.update(slope, state)
    phi = jax.tree.map(lambda x, update: x - rate * update, phi, updates)
    return (phi, state), None

  carry = start, optimizer.init(start)
  progress = jnp.linspace(0, jnp.pi, num_steps, dtype=exponent.dtype)
  rates = learning_rate * (1 + jnp.cos(progress)) / 2
  steps = jax.random.split(of_steps, num_steps), rates
  return jax.lax.scan(step, carry, steps)[0][0]


def _log_kernels(phi: _maps.ExponentialFeatures, queries, keys) -> Array:
  """Returns `log phi_q(q_m) . phi_k(k_n)`. Shape `[M, N]`."""
  rows = queries @ phi.query_weight.T + phi.query_bias[None]
  columns = keys @ phi.key_weight.T + phi.key_bias[None]
  tops = [
    jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True))
    for x in (rows, columns)
  ]
  kernel = jnp.exp(rows - tops[0]) @ jnp.exp(columns - tops[1]).T
  tiny = jnp.finfo(kernel.dtype).tiny
  return jnp.log(jnp.maximum(kernel, tiny)) + tops[0] + tops[1].T


@door
def balance(
  queries: Float[Array, 'M d_k'], keys: Float[Array, 'N d_k'], phi: FeatureMap
) -> _maps.BalancedFeatures:
  r"""Centres and balances queries and keys for a map of the softmax kernel.

  The matrix is the one for which :math:`E|A(q-\mu_q)|^2 +
  E|A^{-\top}(k-\mu_k)|^2` is least, which the variance of random features grows
  with. How many directions that leaves is what `budget` says of the rows that
  :meth:`BalancedFeatures.rows` returns. `phi` is a map of the softmax kernel,
  such as `features.PositiveFeatures`.

  Example:
    >>> x = jax.random.normal(jax.random.key(0), (8, 4))
    >>> phi = finite_duals.balance(2 * x, x / 2, features.TaylorFeatures(6))
    >>> value, log_scale = attention.scores(phi, 2 * x[0], x[:1] / 2)
    >>> print((jnp.log(value) + log_scale).round(2), (x[0] @ x[0] / 2).round(2))
    [2.] 2.0
  """
  _validate.at_least(
    2, **{'M of queries': queries.shape[0], 'N of keys': keys.shape[0]}
  )
  queries, keys = widen((queries, keys))
  query_mean, key_mean = jnp.mean(queries, axis=0), jnp.mean(keys, axis=0)
  of_queries = _second_moment(queries - query_mean[None])
  of_keys = _second_moment(keys - key_mean[None])
  root, inverse_root = (_power(of_queries, p) for p in (0.5, -0.5))
  square = inverse_root @ _power(root @ of_keys @ root, 0.5) @ inverse_root
  return _maps.BalancedFeatures(
    phi, query_mean, key_mean, _power(square, 0.5), _power(square, -0.5)
  )


def _second_moment(rows: Array) -> Array:
  moment = rows.T @ rows / rows.shape[0]
  ridge = 1e-4 * jnp.trace(moment) / len(moment)
  return moment + ridge * jnp.eye(len(moment), dtype=moment.dtype)


def _power(matrix: Array, power: float) -> Array:
  eigenvalues, basis = jnp.linalg.eigh((matrix + matrix.T) / 2)
  least = jnp.finfo(matrix.dtype).eps * eigenvalues[-1]  # Rounding is below 0.
  return (basis * jnp.maximum(eigenvalues, least)[None] ** power) @ basis.T
