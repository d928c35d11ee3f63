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
NUM_TUNING_STEPS = 25


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


def tune(tasks: data.Tasks, start, make_factors) -> tuple[Any, Any]:
  """Minimises the mean loss over logarithms of positive factors by L-BFGS.

  Args:
    tasks: tasks to tune on.
    start: logarithms to start from. Shape `[P]`.
    make_factors: `[P] -> (rates [K], contractions [K])`, of the factors.

  Returns:
    The factors, and the gradient that is left.
  """
  optimizer = optax.lbfgs()

  def loss(logs):
    return jnp.mean(losses(tasks, *make_factors(jnp.exp(logs))))

  evaluate = optax.value_and_grad_from_state(loss)

  def step(carry, _):
    logs, state = carry
    value, slope = evaluate(logs, state=state)
    updates, state = optimizer.update(
      slope, state, logs, value=value, grad=slope, value_fn=loss
    )
    return (optax.apply_updates(logs, updates), state), None

  carry = start, optimizer.init(start)
  (logs, _), _ = jax.lax.scan(step, carry, length=NUM_TUNING_STEPS)
  return jnp.exp(logs), jax.grad(loss)(logs)


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
  size = config.num_demonstrations
  rows = []
  for num_steps in (1, *config.num_steps_of_gd):
    ones = jnp.ones(num_steps, jnp.float32)

    def plain(factors, ones=ones):
      return factors[0] * ones, 0 * ones

    def plus_plus(factors, ones=ones):
      return factors[0] * ones, factors[1] * ones

    chosen = {}
    for name, make, start in (
      ('GD', plain, [best]),
      ('GD++', plus_plus, [best, best / size**2]),
    ):
      if num_steps == 1 and name == 'GD++':
        continue  # The last contraction does not matter.
      logs = jnp.log(jnp.asarray(start, jnp.float32))
      tuned = harness.compile_quickly(
        lambda logs, make=make: tune(tuning, logs, make)
      )
      factors, slope = tuned(logs)
      chosen[name] = factors, make(factors), slope
    rows += _evaluate(config, root, num_steps, chosen)
  return rows


def _evaluate(config, root, num_steps: int, chosen) -> list[dict[str, Any]]:
  """Losses of all methods on the same fresh tasks."""
  count = -(-config.num_yardstick_tasks // CHUNK)

  def chunk(index):
    key = jax.random.fold_in(jax.random.fold_in(root, 1), index)
    tasks = data.draw(key, CHUNK, config)
    return [losses(tasks, *made) for _, made, _ in chosen.values()]

  run = harness.compile_quickly(lambda i: jax.lax.map(chunk, i))
  samples = [
    np.asarray(x, np.float64).ravel()[: config.num_yardstick_tasks]
    for x in run(jnp.arange(count))
  ]
  rows = []
  for (name, (factors, _, slope)), values in zip(
    chosen.items(), samples, strict=True
  ):
    gain = values - samples[0]
    root_size = values.size**0.5
    rows.append(
      {
        'method': name,
        'num_steps': num_steps,
        'learning_rate': float(factors[0]),
        'contraction': float(factors[1]) if name == 'GD++' else 0.0,
        'tuning_gradient': float(jnp.max(jnp.abs(slope))),
        'loss': float(values.mean()),
        'standard_error': float(values.std(ddof=1) / root_size),
        'minus_gd': float(gain.mean()),
        'minus_gd_standard_error': float(gain.std(ddof=1) / root_size),
      }
    )
  return rows


def linear_tasks(config, scale: float = 1.0) -> account.LinearTasks:
  """The distribution of the tasks, inputs scaled."""
  return account.LinearTasks(
    d_x=config.d_x,
    num_demonstrations=config.num_demonstrations,
    moments=account.uniform_moments(scale * config.half_range),
  )
