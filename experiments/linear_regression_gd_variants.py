"""Sine waves through a network, and inputs and labels as separate tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import harness
from experiments import linear_regression_gd_data as data
from experiments import linear_regression_gd_models as models
from experiments import linear_regression_gd_training as training
from experiments.linear_regression_gd_steps import linear_tasks
from iclcl_jax.accounts import linear_regression_gd as account

FIRST_LABEL = 32
CLIP = 1.0
NUM_GRID = 61


def _recipe(num_steps: int, batch_size: int, learning_rate: float):
  return training.Recipe(
    num_steps,
    num_steps // training.NUM_RECORDS,
    batch_size,
    training.cosine(learning_rate, num_steps),
    CLIP,
  )


def sine(config) -> dict[str, Any]:
  """Attention on a network against one step on the network's last layer.

  Args:
    config: settings.

  Returns:
    Losses of both by seed and record, final differences of their predictions,
    and the predictions of the first seed along one task.
  """
  lane = -2 if config.sine_shared_key else -1
  source = data.sine_source(config.num_demonstrations, lane)
  pair = {
    'attention': models.attention_on_network(config.sine_width),
    'descent': models.descent_on_network(config.sine_width),
  }
  recipe = _recipe(config.sine_steps, config.sine_batch_size, 5e-3)
  records = {}
  for label, (name, model) in enumerate(pair.items()):
    trained = training.train(config, model, source, recipe, FIRST_LABEL + label)
    records[name] = trained.records
  key = jax.random.fold_in(jax.random.key(config.seed), 2**18)
  tasks = data.draw_from(key, config.num_test_tasks, source)
  compare = harness.compile_quickly(lambda r: _compare(pair, r, tasks))
  return {'step': trained.steps, **jax.device_get(compare(records))}


def _compare(pair, records, tasks: data.Tasks) -> dict[str, Any]:
  """Losses and differences; predictions along the first task."""
  rows = tasks.tokens[0]
  grid = jnp.linspace(-5, 5, NUM_GRID, dtype=jnp.float32)
  along = jax.vmap(lambda x: rows.at[-1, 0].set(x))(grid)
  found: dict[str, Any] = {'context': rows[:-1], 'grid': grid}
  answers = {}
  for name, model in pair.items():

    def answer(params, tokens, model=model):
      return training.predictions(model, params, tokens)[:, 0]

    last = jax.tree.map(lambda w: w[:, -1], records[name])
    found[f'loss_{name}'] = training.losses_of_records(
      model, records[name], tasks
    )
    answers[name] = jax.lax.map(lambda p, f=answer: f(p, tasks.tokens), last)
    found[f'along_{name}'] = jax.lax.map(lambda p, f=answer: f(p, along), last)
  a, b = answers['attention'], answers['descent']
  other = jnp.roll(b, 1, axis=0)
  return found | {
    'preds_diff': jnp.mean(jnp.abs(a - b), axis=1),
    'preds_diff_of_seeds': jnp.mean(jnp.abs(b - other), axis=1),
    'mean_prediction': jnp.mean(jnp.abs(b), axis=1),
    'loss_zero': jnp.mean(tasks.targets**2) / 2,
  }


def alternating(config) -> dict[str, Any]:
  """Two layers on inputs and labels in turn, against one step.

  Args:
    config: settings.

  Returns:
    Losses by seed and record, that of one step, the mean attention of the
    first layer, and the closed form.
  """
  small = config.alternating
  model = models.alternating_model(
    small.num_demonstrations, small.d_x, account.softmax_weights
  )
  recipe = _recipe(
    config.alternating_steps, config.alternating_batch_size, 1e-2
  )
  trained = training.train(
    config, model, data.linear_source(small), recipe, FIRST_LABEL + 2
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 2**19)
  tasks = data.draw(key, config.num_test_tasks, small)
  best = account.optimal_learning_rate(linear_tasks(small))

  def compare(records):
    unit = jnp.ones((1, 1), jnp.float32)
    factors = jnp.concatenate([unit, 0 * unit])
    directions = training.predictions(models.DESCENT, factors, tasks.tokens)
    rate = account.fit_learning_rate(directions, tasks.targets)
    last = jax.tree.map(lambda w: w[:, -1], records)
    return {
      'loss': training.losses_of_records(model, records, tasks),
      'loss_gd': training.mean_loss(rate * directions, tasks.targets),
      'copied': jax.lax.map(lambda p: _copied(p, small, tasks), last),
      'loss_zero': jnp.mean(tasks.targets**2) / 2,
    }

  return {
    'step': trained.steps,
    'loss_closed_form': float(account.expected_loss(linear_tasks(small), best)),
    **jax.device_get(harness.compile_quickly(compare)(trained.records)),
  }


def _copied(params, small, tasks: data.Tasks):
  """Mean attention of all rows but the query's. `[2 N, 2 N + 1]`."""
  codes = jnp.asarray(models.positions(2 * small.num_demonstrations + 1))
  layer = jax.tree.map(lambda w: w[0], params[0])
  visible = account.context_only(len(codes))

  def weights(rows):
    rows = models.alternating_rows(rows, codes)
    scores = rows @ account.fold(layer).query_key[0] @ rows.T
    found = account.softmax_weights(scores, visible, rows.shape[1])
    return found[:-1]

  return jnp.mean(jax.vmap(weights)(tasks.tokens[:500]), axis=0)
