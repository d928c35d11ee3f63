"""How far several steps of GD and GD++ get, with tuned step sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments import linear_regression_gd_data as data
from experiments import linear_regression_gd_models as models
from iclcl_jax.accounts import linear_regression_gd as account

CHUNK = 5000
UNTIED = 'GD++ untied'
NUM_TUNING_STEPS = 30
NUM_SEARCH_STEPS = 15


def losses(tasks: data.Tasks, factors):
  """Half the squared error of each task. Shape `[B]`."""
  answer = jax.vmap(lambda rows: models.DESCENT.answer(factors, rows))
  gap = answer(tasks.tokens) - tasks.targets
  return jnp.sum(gap**2, axis=1) / 2


def eigenvalues(key, count: int, config) -> np.ndarray:
  """Eigenvalues of `X^T X` of as many contexts, float64. Shape `[B, d_x]`."""
  shape = count, config.num_demonstrations, config.d_x
  half = config.half_range
  inputs = jax.random.uniform(
    key, shape, jnp.float32, minval=-half, maxval=half
  )
  rows = np.asarray(inputs, np.float64)
  # A few thousand at a time: all of them at once leave the cache.
  return np.concatenate(
    [
      np.linalg.eigvalsh(np.swapaxes(x, 1, 2) @ x)
      for x in np.array_split(rows, -(-count // CHUNK))
    ]
  )


def integrated_losses(values, rates, contractions, config):
  """Losses given the inputs, tasks and queries integrated out. `[B]`."""
  moments = linear_tasks(config).moments

  def one(row):
    return account.expected_loss_given_inputs(
      row, rates, contractions, config.num_demonstrations,
      second_moment=moments.second,
    )  # fmt: skip

  return jax.vmap(one)(values)


def tune(loss_fn, start) -> tuple[Any, Any]:
  """Minimises a loss by L-BFGS.

  Args:
    loss_fn: `logs -> []`.
    start: where to start.

  Returns:
    The best point found, and the gradient that is left there.
  """
  optimizer = optax.lbfgs(
    linesearch=optax.scale_by_zoom_linesearch(NUM_SEARCH_STEPS)
  )
  # Not from the state: after a failed search that holds another point's.
  evaluate = jax.value_and_grad(loss_fn)

  def step(carry, _):
    logs, state, best = carry
    value, slope = evaluate(logs)
    # A search may fail, and even leave the numbers: keep the best point.
    best = jax.tree.map(
      lambda new, old: jnp.where(value < best[0], new, old),
      (value, logs, slope),
      best,
    )
    updates, state = optimizer.update(
      slope, state, logs, value=value, grad=slope, value_fn=loss_fn
    )
    return (optax.apply_updates(logs, updates), state, best), None

  best = jnp.full((), jnp.inf, start.dtype), start, start
  carry = start, optimizer.init(start), best
  (_, _, best), _ = jax.lax.scan(step, carry, length=NUM_TUNING_STEPS)
  return best[1:]


def methods(config, num_steps: int) -> tuple[str, ...]:
  """With one step all are the same: the last contraction is idle."""
  if num_steps == 1:
    return ('GD',)
  first = num_steps == config.num_steps_of_gd[0]
  return ('GD', 'GD++', UNTIED) if first else ('GD', 'GD++')


def measure(config) -> list[dict[str, Any]]:
  """Tunes and evaluates GD and GD++ for every number of steps.

  Args:
    config: settings.

  Returns:
    A row for each number of steps and method: step sizes and contractions of
    all steps, loss with tasks and queries integrated out, its paired
    difference to GD, and the loss on sampled tasks, all with standard errors.
  """
  root = jax.random.fold_in(jax.random.key(config.seed), 2**16)
  keys = [jax.random.fold_in(root, i) for i in (0, 2)]
  counts = config.num_tuning_tasks, config.num_yardstick_tasks
  inputs = [
    eigenvalues(k, n, config) for k, n in zip(keys, counts, strict=True)
  ]
  rows = []
  for num_steps in (1, *config.num_steps_of_gd):
    names = methods(config, num_steps)
    factors, slopes, exact = _tune_all(config, inputs, names, num_steps)
    sampled = _evaluate(config, root, factors)
    for column, name in enumerate(names):
      rows.append(
        {
          'method': name,
          'num_steps': num_steps,
          'learning_rates': factors[column, 0],
          'contractions': factors[column, 1],
          'tuning_gradient': float(np.max(np.abs(slopes[column]))),
          **_statistics('', exact[column]),
          **_statistics('minus_gd_', exact[column] - exact[0]),
          **_statistics('sampled_', sampled[:, column]),
        }
      )
  return rows


def _tune_all(config, inputs, names, num_steps: int) -> Any:
  """Best factors on one set of inputs, losses on the other, by method.

  Returns:
    Factors `[methods, 2, K]`, gradients that are left, losses `[methods, B]`.
  """
  best = account.optimal_learning_rate(linear_tasks(config))
  first = np.log([best, best / config.num_demonstrations**2])

  def run(tuning, held_out, free, widths):
    def loss_on(values, factors):
      return integrated_losses(values, *factors, config)

    def one(index):
      # A step shares its factors with the others, or has its own.
      spread = widths[index]

      def expand(logs):
        return jnp.exp(logs @ spread) * free[index][:, None]

      start = jnp.asarray(first)[:, None] * jnp.ones((1, num_steps))
      logs, slope = tune(lambda x: jnp.mean(loss_on(tuning, expand(x))), start)
      return expand(logs), slope, loss_on(held_out, expand(logs))

    return jax.lax.map(one, jnp.arange(len(names)))

  with harness.float64_on_host():
    free = jnp.asarray([[1.0, float(name != 'GD')] for name in names])
    shared = np.full((num_steps, num_steps), 1 / num_steps)
    widths = [np.eye(num_steps) if name == UNTIED else shared for name in names]
    arrays = [jnp.asarray(x) for x in (*inputs, free, np.stack(widths))]
    return jax.device_get(harness.compile_quickly(run)(*arrays))


def _evaluate(config, root, factors) -> np.ndarray:
  """Losses of all methods on the same fresh tasks, a column for each."""
  count = -(-config.num_yardstick_tasks // CHUNK)
  size = min(CHUNK, config.num_yardstick_tasks)
  factors = jnp.asarray(factors, jnp.float32)

  def chunk(index):
    key = jax.random.fold_in(jax.random.fold_in(root, 1), index)
    tasks = data.draw(key, size, config)
    return jax.lax.map(lambda row: losses(tasks, row), factors)

  run = harness.compile_quickly(lambda i: jax.lax.map(chunk, i))
  samples = np.asarray(run(jnp.arange(count)), np.float64)
  samples = np.moveaxis(samples, 1, 2).reshape(-1, len(factors))
  return samples[: config.num_yardstick_tasks]


def _statistics(prefix: str, values: np.ndarray) -> dict[str, float]:
  error = values.std(ddof=1) / values.size**0.5
  return {
    f'{prefix}loss': float(values.mean()),
    f'{prefix}standard_error': float(error),
  }


def linear_tasks(config, scale: float = 1.0) -> account.LinearTasks:
  """The distribution of the tasks, inputs scaled."""
  return account.LinearTasks(
    d_x=config.d_x,
    num_demonstrations=config.num_demonstrations,
    moments=account.uniform_moments(scale * config.half_range),
  )
