r"""The learning processes of `experiments.learning_processes`.

All are gradient descent on the weights of `f(x) = W phi(x)` and see the same
tokens through the same features. They differ in what `f` is compared with:

dual model
  frozen targets, the values: a loss of predictions, `iclcl_jax.losses`.
SimSiam, BYOL
  a second view of the token, through `W` itself (behind a stop-gradient) or
  through a moving average of it; a predictor; cosine similarity.
contrastive kernel learning
  an anchor, its other view, another token's view; orthonormal rows of `W`.

References:
  Chen & He, arXiv:2011.10566, eq. 1 to 4 (SimSiam); Grill et al.,
  arXiv:2006.07733, eq. 2 (BYOL); Esser, Fleissner & Ghoshdastidar,
  arXiv:2309.02028 (contrastive kernel learning).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from iclcl_jax import losses, moments
from iclcl_jax.types import Array, FeatureMap, Float

Branch: TypeAlias = Callable[['Encoder', Array], Array]


class Views(NamedTuple):
  """Features of the tokens of one prompt, up to one common factor.

  Attributes:
    keys: of the demonstrations' keys. Shape `[N, R]`.
    values: of their values, read as inputs. Shape `[N, R]`.
    query: of the query. Shape `[R]`.
    own_key: of the query token's key. Shape `[R]`.
  """

  keys: Float[Array, 'N R']
  values: Float[Array, 'N R']
  query: Float[Array, ' R']
  own_key: Float[Array, ' R']


class Encoder(NamedTuple):
  """What the self-supervised processes train.

  Attributes:
    weights: `W`. Shape `[d, R]`.
    predictor: linear. Shape `[d, d]`.
    average: moving average of `W`. Shape `[d, R]`.
  """

  weights: Float[Array, 'd R']
  predictor: Float[Array, 'd d']
  average: Float[Array, 'd R']


class Process(NamedTuple):
  """An online and a target branch.

  Attributes:
    online: `(encoder, features [N, R]) -> [N, d]`.
    target: likewise.
  """

  online: Branch
  target: Branch


def views(
  phi: FeatureMap,
  query: Float[Array, ' d'],
  keys: Float[Array, 'n d'],
  values: Float[Array, 'n d'],
) -> Views:
  """Features of a prompt whose last token is the query's.

  Args:
    phi: feature map.
    query: the query. Shape `[d]`.
    keys: keys of all tokens. Shape `[n, d]`.
    values: values of all tokens. Shape `[n, d]`.

  Returns:
    A `Views` of `N = n - 1` demonstrations. Keys and query share a factor, the
    values have another.
  """

  def scaled(rows):
    log_scale, features = moments.scaled_rows(phi, rows)
    return jnp.exp(log_scale - jnp.max(log_scale)) * features

  rows = scaled(jnp.concatenate([keys, query[None]]))
  return Views(rows[:-2], scaled(values[:-1]), rows[-1], rows[-2])


def compress(tokens: Views) -> Views:
  """Writes features in an orthonormal basis of their span, in NumPy.

  No process leaves the span: `R` is then at most `2 N + 2`. Those of keys and
  query are divided by one number, so that the demonstrations' kernel matrix
  has largest eigenvalue 1: a step size of 1 is stable for the squared loss.

  Args:
    tokens: features of many prompts, with leading axes.

  Returns:
    The same, with fewer features.
  """
  rows = [*tokens[:2], *(x[..., None, :] for x in tokens[2:])]
  basis = np.linalg.qr(np.swapaxes(np.concatenate(rows, axis=-2), -1, -2))[0]
  keys, values, query, own_key = (x @ basis for x in rows)
  eigenvalues = np.linalg.eigvalsh(keys @ np.swapaxes(keys, -1, -2))
  scale = np.sqrt(eigenvalues[..., -1])[..., None, None]
  query, own_key = (x[..., 0, :] for x in (query / scale, own_key / scale))
  return Views(keys / scale, values, query, own_key)


def normalise(rows: Float[Array, 'N d']) -> Float[Array, 'N d']:
  """Rows of unit length; a row of zeros has none."""
  return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def descend(
  loss: losses.Loss,
  features: Float[Array, 'N R'],
  values: Float[Array, 'N d_v'],
  start: Float[Array, 'd_v R'],
  step_length: Float[Array, ''],
  num_steps: int,
) -> Float[Array, 'T d_v R']:
  """Weights of a dual model along full-batch gradient descent.

  Args:
    loss: loss of the predictions.
    features: of the demonstrations. Shape `[N, R]`.
    values: their labels. Shape `[N, d_v]`.
    start: `W_0`. Shape `[d_v, R]`.
    step_length: Frobenius norm of the first step; the step size is fixed by it.
    num_steps: steps `T`.

  Returns:
    The weights after every step. Shape `[T, d_v, R]`.
  """

  def slope(weights):
    return jax.grad(lambda w: loss(features @ w.T, values))(weights)

  step_size = step_length / jnp.linalg.norm(slope(start))

  def step(weights, _):
    weights = weights - step_size * slope(weights)
    return weights, weights

  return jax.lax.scan(step, start, length=num_steps)[1]


# Branches.


def through(part: str) -> Branch:
  """Features through `weights` or their moving `average`."""
  return lambda encoder, features: features @ getattr(encoder, part).T


def predicted(encoder: Encoder, features: Array) -> Array:
  """Features through the weights, then the predictor."""
  return features @ encoder.weights.T @ encoder.predictor.T


def stopped(branch: Branch) -> Branch:
  """The same branch, through which no gradient flows."""
  return lambda encoder, x: jax.lax.stop_gradient(branch(encoder, x))


PROCESSES = {
  'SimSiam': Process(predicted, stopped(through('weights'))),
  'BYOL': Process(predicted, stopped(through('average'))),
  'SimSiam without predictor': Process(
    through('weights'), stopped(through('weights'))
  ),
  'SimSiam without stop-gradient': Process(predicted, through('weights')),
  'SimSiam without both': Process(through('weights'), through('weights')),
}


def cosine_loss(
  process: Process, encoder: Encoder, first: Array, second: Array
) -> Float[Array, '']:
  """Mean of minus the cosine of both views, each as the online one once."""

  def one_way(a, b):
    online, target = process.online(encoder, a), process.target(encoder, b)
    return losses.cosine(online, target) / a.shape[0]

  return (one_way(first, second) + one_way(second, first)) / 2


def init_encoder(key: Array, width: int, num_features: int, dtype) -> Encoder:
  """Draws weights and predictor; the average starts as the weights."""
  key_weights, key_predictor = jax.random.split(key)
  weights = jax.random.normal(key_weights, (width, num_features), dtype)
  predictor = jax.random.normal(key_predictor, (width, width), dtype)
  weights, predictor = weights / width**0.5, predictor / width**0.5
  return Encoder(weights, predictor, weights)


def train_encoder(
  process: Process,
  encoder: Encoder,
  tokens: Views,
  *,
  learning_rate: float,
  momentum: float,
  num_steps: int,
  observe: Callable[[Encoder], Any],
) -> Any:
  """Gradient descent on `cosine_loss`.

  Args:
    process: the branches.
    encoder: where training starts.
    tokens: both views of the demonstrations.
    learning_rate: of weights and predictor.
    momentum: of the moving average.
    num_steps: steps `T`.
    observe: `encoder -> anything`.

  Returns:
    What was observed before every step and after the last, stacked.
  """
  first, second = normalise(tokens.keys), normalise(tokens.values)

  def step(encoder, _):
    slope = jax.grad(lambda e: cosine_loss(process, e, first, second))(encoder)
    weights = encoder.weights - learning_rate * slope.weights
    predictor = encoder.predictor - learning_rate * slope.predictor
    average = momentum * encoder.average + (1 - momentum) * weights
    return Encoder(weights, predictor, average), observe(encoder)

  encoder, observed = jax.lax.scan(step, encoder, length=num_steps)
  return jax.tree.map(
    lambda x, y: jnp.concatenate([x, y[None]]), observed, observe(encoder)
  )


# Contrastive kernel learning.


def kernel_loss(
  weights: Array, anchors: Array, positives: Array, negatives: Array
) -> Float[Array, '']:
  """Mean of `f(anchor) . (f(negative) - f(positive))`."""
  outputs = [x @ weights.T for x in (anchors, negatives - positives)]
  return jnp.sum(outputs[0] * outputs[1]) / anchors.shape[0]


def orthonormal_rows(weights: Float[Array, 'd R']) -> Float[Array, 'd R']:
  """The nearest orthonormal rows, by Newton's iteration.

  Converges for singular values in `(0, sqrt(3))`, quickly around 1.
  """
  for _ in range(10):
    weights = 1.5 * weights - 0.5 * (weights @ weights.T) @ weights
  return weights


def train_kernel_encoder(
  weights: Float[Array, 'd R'],
  tokens: Views,
  *,
  step_size: Float[Array, ''],
  num_steps: int,
  observe: Callable[[Array], Any],
) -> Any:
  """Projected gradient descent on `kernel_loss`.

  The negative of a token is the second view of the next one.

  Args:
    weights: where training starts, with orthonormal rows. Shape `[d, R]`.
    tokens: both views of the demonstrations.
    step_size: at most half the inverse of the largest curvature.
    num_steps: steps `T`.
    observe: `weights -> anything`.

  Returns:
    What was observed before every step and after the last, stacked.
  """
  arrays = triplets(tokens)

  def step(weights, _):
    slope = jax.grad(kernel_loss)(weights, *arrays)
    return orthonormal_rows(weights - step_size * slope), observe(weights)

  weights, observed = jax.lax.scan(step, weights, length=num_steps)
  return jax.tree.map(
    lambda x, y: jnp.concatenate([x, y[None]]), observed, observe(weights)
  )


def triplets(tokens: Views) -> tuple[Array, Array, Array]:
  """Anchors, positives and negatives; rows of unit length."""
  first, second = normalise(tokens.keys), normalise(tokens.values)
  return first, second, jnp.roll(second, -1, axis=0)


class KernelProblem(NamedTuple):
  """What contrastive kernel learning needs besides the tokens.

  Attributes:
    start: orthonormal rows. Shape `[d, R]`.
    best: the least loss. Shape `[]`.
    step_size: half the inverse of the largest curvature. Shape `[]`.
  """

  start: Float[Array, 'd R']
  best: Float[Array, '']
  step_size: Float[Array, '']


def kernel_problem(tokens: Any, start: Any) -> KernelProblem:
  """Solves contrastive kernel learning in closed form, in NumPy.

  The loss is a quadratic form of each row of the weights, the same for all;
  its least value for orthonormal rows is a sum of the lowest eigenvalues.

  Args:
    tokens: features of many prompts, with leading axes.
    start: any weights, with the same leading axes.

  Returns:
    A `KernelProblem` with leading axes.
  """
  first, second = (
    x / np.linalg.norm(x, axis=-1, keepdims=True) for x in tokens[:2]
  )
  apart = np.roll(second, -1, axis=-2) - second
  form = np.swapaxes(first, -1, -2) @ apart / first.shape[-2]
  eigenvalues = np.linalg.eigvalsh((form + np.swapaxes(form, -1, -2)) / 2)
  best = np.sum(eigenvalues[..., : start.shape[-2]], axis=-1)
  largest = 2 * np.max(np.abs(eigenvalues), axis=-1)
  basis = np.linalg.qr(np.swapaxes(start, -1, -2))[0]
  orthonormal: Any = np.swapaxes(basis, -1, -2)
  return KernelProblem(orthonormal, best, 0.5 / largest)


# What is observed.


def spread(rows: Float[Array, 'N d']) -> Float[Array, '']:
  """0 if all rows point one way (collapse), 1 if their directions cancel."""
  mean = jnp.mean(normalise(rows), axis=0)
  return jnp.sqrt(jnp.maximum(1 - mean @ mean, 0))


def angle(a: Array, b: Array) -> Float[Array, '']:
  """Angle of two arrays, as vectors, in degrees; exact for small angles."""
  a, b = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
  half = jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b))
  return jnp.rad2deg(2 * half)


def alignment(a: Float[Array, 'N d'], b: Float[Array, 'N d']) -> Array:
  """Linear centred kernel alignment: blind to rotations and scales."""
  a, b = (x - jnp.mean(x, axis=0)[None] for x in (a, b))
  cross = jnp.sum((a.T @ b) ** 2)
  own = [jnp.linalg.norm(x.T @ x) for x in (a, b)]
  return cross / (own[0] * own[1])
