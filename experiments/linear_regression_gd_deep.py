"""Layers trained in a stack, against as many steps of GD and GD++."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments import linear_regression_gd_data as data
from experiments import linear_regression_gd_measure as measure
from experiments import linear_regression_gd_models as models
from experiments import linear_regression_gd_training as training
from experiments.linear_regression_gd_steps import UNTIED
from iclcl_jax.accounts import linear_regression_gd as account

FIRST_LABEL = 16
CLIP = 0.1
DEEP = 3
SLOWER = 0.3


def stacks(config) -> dict[tuple[str, int], models.Stack]:
  """Looped for every number of layers, and untied for the first."""
  linear = account.linear_weights
  found = {
    ('looped', number): models.Stack(linear, 1, number, 1)
    for number in config.num_steps_of_gd
  }
  first = config.num_steps_of_gd[0]
  found['untied', first] = models.Stack(linear, 1, first, first)
  return found


def recipe(config, num_layers: int) -> training.Recipe:
  """Deeper than three layers: smaller steps, on half the tasks."""
  deep = num_layers > DEEP
  return training.Recipe(
    config.deep_steps,
    config.deep_steps // training.NUM_RECORDS,
    max(1, config.deep_batch_size // (1 + deep)),
    training.cosine(
      config.deep_learning_rate * (SLOWER if deep else 1), config.deep_steps
    ),
    CLIP,
  )


def measure_all(
  config,
  tasks: data.Tasks,
  steps: Sequence[Mapping[str, Any]],
  layers: account.SelfAttention,
) -> list[dict[str, Any]]:
  """Trains, and compares with tuned descent on the same tasks.

  Every layer of a stack starts as the trained single layer of its seed: from
  small random weights, three of five stacks of five layers never leave the
  plateau of predicting 0.

  Args:
    config: settings.
    tasks: tasks of the evaluation.
    steps: what `linear_regression_gd_steps.measure` found.
    layers: the trained single layers, leading axes of seeds and of 1 layer.

  Returns:
    A row for each stack: losses of all records, final metrics by seed, and the
    losses of GD and of GD++ on the same tasks.
  """
  source = data.linear_source(config)
  rows = []
  for label, ((kind, number), stack) in enumerate(stacks(config).items()):
    model = models.stack_model(stack, config.d_x + 1)
    distinct = stack.num_distinct
    trained = training.train(
      config,
      model,
      source,
      recipe(config, number),
      FIRST_LABEL + label,
      jax.tree.map(lambda w, n=distinct: jnp.repeat(w, n, axis=1), layers),
    )
    factors = {
      row['method']: jnp.asarray(
        [row['learning_rates'], row['contractions']], jnp.float32
      )
      for row in steps
      if row['num_steps'] == number
    }
    peer = 'GD++' if kind == 'looped' else UNTIED
    pair = jnp.stack([factors['GD'], factors[peer]])
    compare = harness.compile_quickly(
      lambda records, pair, model=model: _compare(model, records, pair, tasks)
    )
    rows.append(
      {
        'kind': kind,
        'num_layers': number,
        'peer': peer,
        'step': trained.steps,
        'seconds': trained.seconds,
        **jax.device_get(compare(trained.records, pair)),
      }
    )
  return rows


def _compare(model, records, factors, tasks: data.Tasks) -> dict[str, Any]:
  def descent(factors):
    answers, slopes = measure.behaviour(models.DESCENT, factors, tasks)
    loss = training.mean_loss(answers, tasks.targets)
    return {'answers': answers, 'slopes': slopes, 'loss': loss}

  plain, peer = descent(factors[0]), descent(factors[1])
  last = jax.tree.map(lambda w: w[:, -1:], records)
  final = measure.alignment(last, model, tasks, peer)
  return {
    'loss': training.losses_of_records(model, records, tasks),
    'loss_gd': plain['loss'],
    'loss_peer': peer['loss'],
    **{f'{name}_peer': x[:, 0] for name, x in final.items() if name != 'loss'},
    'model_cos_gd': measure.alignment(last, model, tasks, plain)['model_cos'][
      :, 0
    ],
    'model_cos_of_peers': account.model_cosine(plain['slopes'], peer['slopes']),
  }


def reached(row: Mapping[str, Any]) -> np.ndarray:
  """Share of the way from GD (0) to the peer (1), by seed."""
  way = row['loss_gd'] - row['loss_peer']
  return (row['loss_gd'] - row['loss'][:, -1]) / way
