"""How far several steps of GD and GD++ get, with tuned step sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments import linear_regression_gd_data as data
from iclcl_jax.accounts import linear_regression_gd as account

CHUNK = 5000
NUM_TUNING_STEPS = 12
NUM_SEARCH_STEPS = 15


def answers(tokens, rates, contractions):
  """Predictions of GD++; of GD where the contractions are 0. Shape `[B, 1]`."""

  def one(rows):
    return account.descend_plus_plus(
      rows[:-1, :-1], rows[:-1, -1:], rows[-1, :-1], rates, contractions
    )

  return jax.vmap(one)(tokens)


def losses(tasks: data.Tasks, rates, contractions):
  """Half the squared error of each task. Shape `[B]`."""
  gap = answers(tasks.tokens, rates, contractions) - tasks.targets
  return jnp.sum(gap**2, axis=1) / 2


def tune(tasks: data.Tasks, start, free, num_steps: int) -> tuple[Any, Any]:
  """Minimises the mean loss over logarithms of both factors by L-BFGS.

  Args:
    tasks: tasks to tune on.
    start: logarithms of step size and contraction to start from. Shape `[2]`.
    free: 1 for GD++, 0 for GD: multiplies the contraction.
    num_steps: number of steps of gradient descent.

  Returns:
    Step size and contraction `[2]`, and the gradient that is left.
  """
  optimizer = optax.lbfgs(
    linesearch=optax.scale_by_zoom_linesearch(NUM_SEARCH_STEPS)
  )

  def loss(logs):
    return jnp.mean(losses(tasks, *_factors(logs, free, num_steps)))

  # Not from the state: after a failed search that holds another point's.
  evaluate = jax.value_and_grad(loss)

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
      slope, state, logs, value=value, grad=slope, value_fn=loss
    )
    return (optax.apply_updates(logs, updates), state, best), None

  best = jnp.float32(jnp.inf), start, start
  carry = start, optimizer.init(start), best
  (_, _, best), _ = jax.lax.scan(step, carry, length=NUM_TUNING_STEPS)
  _, logs, slope = best
  rates, contractions = _factors(logs, free, num_steps)
  return jnp.stack([rates[0], contractions[0]]), slope


def _factors(logs, free, num_steps: int):
  ones = jnp.ones(num_steps, jnp.float32)
  rate, contraction = jnp.exp(logs)
  return rate * ones, free * contraction * ones


def measure(config) -> list[dict[str, Any]]:
  """Tunes and evaluates GD and GD++ for every number of steps.

  Args:
    config: settings.

  Returns:
    A row for each number of steps and method: step size, contraction, loss
    with its standard error, and the same for the paired difference to GD.
  """
  root = jax.random.fold_in(jax.random.key(config.seed), 2**16)
  tuning = data.draw(
    jax.random.fold_in(root, 0), config.num_tuning_tasks, config
  )
  best = account.optimal_learning_rate(linear_tasks(config))
  first = [best, best / config.num_demonstrations**2]
  start = jnp.log(jnp.asarray(first, jnp.float32))
  rows = []
  for num_steps in (1, *config.num_steps_of_gd):
    run = harness.compile_quickly(
      lambda free, num_steps=num_steps: tune(tuning, start, free, num_steps)
    )
    # With one step they are the same: the last contraction is idle.
    names = ('GD',) if num_steps == 1 else ('GD', 'GD++')
    tuned = [run(jnp.float32(name == 'GD++')) for name in names]
    factors = jnp.stack([row for row, _ in tuned])
    samples = _evaluate(config, root, num_steps, factors)
    for column, (name, (row, slope)) in enumerate(
      zip(names, tuned, strict=True)
    ):
      rows.append(
        {
          'method': name,
          'num_steps': num_steps,
          'learning_rate': float(row[0]),
          'contraction': float(row[1]),
          'tuning_gradient': float(jnp.max(jnp.abs(slope))),
          **_statistics(samples[:, column], samples[:, 0]),
        }
      )
  return rows


def _evaluate(config, root, num_steps: int, factors) -> np.ndarray:
  """Losses of all methods on the same fresh tasks, a column for each."""
  count = -(-config.num_yardstick_tasks // CHUNK)
  size = min(CHUNK, config.num_yardstick_tasks)
  ones = jnp.ones(num_steps, jnp.float32)

  def chunk(index):
    key = jax.random.fold_in(jax.random.fold_in(root, 1), index)
    tasks = data.draw(key, size, config)
    return jax.lax.map(
      lambda row: losses(tasks, row[0] * ones, row[1] * ones), factors
    )

  run = harness.compile_quickly(lambda i: jax.lax.map(chunk, i))
  samples = np.asarray(run(jnp.arange(count)), np.float64)
  samples = np.moveaxis(samples, 1, 2).reshape(-1, len(factors))
  return samples[: config.num_yardstick_tasks]


def _statistics(values: np.ndarray, base: np.ndarray) -> dict[str, float]:
  gain, root_size = values - base, values.size**0.5
  return {
    'loss': float(values.mean()),
    'standard_error': float(values.std(ddof=1) / root_size),
    'minus_gd': float(gain.mean()),
    'minus_gd_standard_error': float(gain.std(ddof=1) / root_size),
  }


def linear_tasks(config, scale: float = 1.0) -> account.LinearTasks:
  """The distribution of the tasks, inputs scaled."""
  return account.LinearTasks(
    d_x=config.d_x,
    num_demonstrations=config.num_demonstrations,
    moments=account.uniform_moments(scale * config.half_range),
  )
