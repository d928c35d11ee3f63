"""What softmax regression is measured on: identities, constants, one step."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import softmax_regression_training as training
from iclcl_jax.accounts import softmax_regression as account
from iclcl_jax.accounts import softmax_regression_bounds as bounds

NUM_PROBLEMS, NUM_PAIRS = 50, 2000
SIZE = 12, 5
NUM_RATES = 60


def residuals(seed: int) -> dict[str, Any]:
  """Largest errors of closed forms and identities, relative to their size.

  Args:
    seed: root of the random numbers.

  Returns:
    Errors by name.
  """

  def one(key):
    keys = jax.random.split(key, 3)
    document = jax.random.normal(keys[0], SIZE)
    target = jax.nn.softmax(3 * jax.random.normal(keys[1], SIZE[:1]))
    posed = account.Problem(document, target)
    old, new = jax.random.normal(keys[2], (2, SIZE[1]))
    return _errors(posed, old, new)

  keys = jax.random.split(jax.random.key(seed), NUM_PROBLEMS)
  return jax.tree.map(jnp.max, jax.lax.map(one, keys))


def _errors(posed: account.Problem, old: Any, new: Any) -> dict[str, Any]:
  ours = account.gradients(posed, old)
  theirs, slope = jax.grad(account.loss, argnums=(0, 1))(posed, old)
  pairs = (
    (ours.weights, slope),
    (ours.document, theirs.document),
    (ours.target, theirs.target),
  )
  curvature = jax.hessian(account.loss, argnums=1)(posed, old)
  before = account.predict(posed.document, old)
  after = account.predict(posed.document, new)
  target = account.shifted_target(posed.target, before, after)
  moved = account.smallest_data_shift(posed.document, old, new)
  step = account.weight_shift(posed, jnp.zeros_like(old), learning_rate=3.0)
  return {
    'gradient': jnp.max(jnp.stack([_error(*pair) for pair in pairs])),
    'hessian': _error(account.hessian(posed, old), curvature),
    'target_shift': _error(after - posed.target, before - target),
    'data_shift': _error(account.predict(moved, old), after),
    'linear_attention': _error(
      account.attend(posed, posed.document, learning_rate=3.0),
      posed.document @ step,
    ),
  }


def _error(a: Any, b: Any) -> Any:
  return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))


def constants(
  seed: int, num_words: int, width: int, radii: Any
) -> dict[str, Any]:
  """Largest observed ratio of moves of prediction and weights, and bounds.

  For each radius: `NUM_PAIRS` documents and weights of that norm, some of whose
  words stand out, and a small move of the weights in the direction that moves
  the prediction most.

  Args:
    seed: root of the random numbers.
    num_words: words of a document.
    width: of a word.
    radii: norms of document and weights. Shape `[K]`.

  Returns:
    Arrays `[K]`: ratio observed, ratio relative to each document's own
    constant, and the logarithms of the bounds.
  """

  def one(key, radius):
    keys = jax.random.split(key, 3)
    document = jax.random.normal(keys[0], (num_words, width))
    loud = jnp.arange(num_words) < 2  # Two words that compete: the worst case.
    share = jax.random.uniform(keys[2])
    document = document * jnp.where(loud, 1.0, share)[:, None]
    document = document * (radius / jnp.linalg.norm(document, 2))
    x = jax.random.normal(keys[1], (width,))
    x = x * (radius / jnp.linalg.norm(x))
    prediction = account.predict(document, x)
    slope = jax.vmap(account.apply_jacobian, in_axes=(None, 1), out_axes=1)(
      prediction, document
    )
    move = 1e-4 * jnp.linalg.svd(slope, full_matrices=False)[2][0]
    change = account.predict(document, x + move) - prediction
    ratio = jnp.linalg.norm(change) / jnp.linalg.norm(move)
    return ratio, ratio / bounds.lipschitz_in_weights(document)

  def at(radius):
    keys = jax.random.split(jax.random.key(seed), NUM_PAIRS)
    ratio, share = jax.vmap(one, in_axes=(0, None))(keys, radius)
    return {
      'observed': jnp.max(ratio),
      'share': jnp.max(share),
      'true': radius / 2,
      'log_published': bounds.log_published_bound(num_words, radius),
      'log_chained': bounds.log_chained_bound(num_words, radius),
    }

  return jax.lax.map(at, radii)


def one_step(config: Any, size: tuple[int, int]) -> dict[str, Any]:
  """One gradient step with the best common rate, judged on fresh tasks.

  Args:
    config: of the experiment.
    size: words of a document and their width.

  Returns:
    Numbers `[frames, seeds]` by name; `rate` is relative to `unit_rate`.
  """
  factors = jnp.logspace(-2, 2, NUM_RATES)

  def one_task(key, frame):
    key, key_start = jax.random.split(key)
    task = training.draw(key, *size, frame)
    unit = training.unit_rate(*size)
    step = account.attend(task.posed, task.queries, learning_rate=unit)
    centred = task.posed.target - 1 / size[0]
    own = jnp.sum(task.posed.document**2, axis=1) * centred * unit / size[0]
    weights, data = _shifts(task.posed, key_start)
    logits = {
      'weights': step,
      'without_self': step - own,
      'data': size[0] ** 2 * data,  # A data step cannot answer new queries.
    }

    def losses(z):
      def loss(factor):
        error = jax.nn.softmax(factor * z) - task.answer
        return jnp.sum(error**2) / 2

      return jax.vmap(loss)(jnp.append(factors, 0))

    return jax.tree.map(losses, logits), training.cosine(weights, data)

  def one_seed(key, frame):
    keys = jax.random.split(key, 2 * config.num_tasks)
    losses, cosines = jax.vmap(one_task, in_axes=(0, None))(keys, frame)
    result = {'cosine': jnp.mean(cosines)}
    for name, loss in losses.items():
      search, test = jnp.split(loss, 2)
      best = jnp.argmin(jnp.mean(search[:, :-1], axis=0))
      ends = jnp.mean(test, axis=0)
      result[f'ratio_{name}'] = ends[best] / ends[-1]
      result[f'rate_{name}'] = factors[best]
    return result

  def one_frame(frame):
    # Made anew in each frame: both see the same documents.
    root = jax.random.fold_in(jax.random.key(config.seed), size[0])
    keys = jax.random.split(jax.random.fold_in(root, size[1]), config.num_seeds)
    return jax.lax.map(lambda key: one_seed(key, frame), keys)

  return jax.lax.map(one_frame, jnp.arange(len(training.FRAMES)))


def _shifts(posed: account.Problem, key: Any) -> tuple[Any, Any]:
  """Moves of the logits by a step on weights and on document, near x = 0."""
  x = 0.01 * jax.random.normal(key, (posed.document.shape[1],))
  logits = posed.document @ x
  new = account.weight_shift(posed, x, learning_rate=1.0)
  # Of rate 1 / |x|^2, so that it does not vanish with x.
  rate = 1 / (x @ x)
  rewritten = account.data_shift(posed, x, learning_rate=rate)
  return posed.document @ new - logits, rewritten @ x - logits
