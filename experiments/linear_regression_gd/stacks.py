"""Do stacks of trained layers do as many steps of GD, or of GD++?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing, statistics
from experiments.linear_regression_gd import layer as one_layer, steps, training
from experiments.linear_regression_gd.training import OSWALD
from iclcl_jax.accounts import linear_regression_gd as account
from iclcl_jax.types import Array, Float

FIRST_LABEL = 16
CLIP = 0.1
DEEP = 3
SLOWER = 0.3


class Row(NamedTuple):
  """A trained stack beside as many steps of tuned descent on the same tasks."""

  kind: str
  num_layers: int
  peer: str  # Of `steps`, with as many factors as there are distinct layers.
  steps: np.ndarray
  seconds: float
  loss: Float[Array, 'S T']  # Of all records.
  loss_gd: float
  loss_peer: float
  model_cos_gd: Float[Array, ' S']
  model_cos_peer: Float[Array, ' S']
  preds_diff_peer: Float[Array, ' S']
  model_cos_of_peers: float

  @property
  def reached(self) -> Float[Array, ' S']:
    """Share of the way from GD (0) to the peer (1)."""
    way = self.loss_gd - self.loss_peer
    return (self.loss_gd - self.loss[:, -1]) / way


def measure(config: Config) -> list[Row]:
  """Trains stacks: looped ones, and an untied one of the first depth.

  Every layer starts as the trained single layer of its seed: from small random
  weights, three of five stacks of five never leave the plateau of predicting 0.
  """
  kinds = [('looped', number) for number in config.num_steps_of_gd]
  kinds.append(('untied', config.num_steps_of_gd[0]))
  return [
    _train(config, kind, number, FIRST_LABEL + index)
    for index, (kind, number) in enumerate(kinds)
  ]


def _train(config: Config, kind: str, number: int, label: int) -> Row:
  distinct, peer = (1, 'GD++') if kind == 'looped' else (number, steps.UNTIED)
  model = training.stack_model(
    config.d_x + 1, num_layers=number, num_distinct=distinct
  )
  initial = jax.tree.map(
    lambda w: jnp.repeat(w, distinct, axis=1),
    one_layer.trained_linear(config).last(),
  )
  deep = number > DEEP  # Smaller steps, on half the tasks.
  recipe = training.cosine_recipe(
    config.deep_steps,
    max(1, config.deep_batch_size // (1 + deep)),
    config.deep_learning_rate * (SLOWER if deep else 1),
    CLIP,
  )
  source = training.linear_source(config)
  trained = training.train(config, model, source, recipe, label, initial)
  factors = {
    row.method: jnp.asarray([row.learning_rates, row.contractions], jnp.float32)
    for row in steps.measure(config)
    if row.num_steps == number
  }
  tasks = training.test_tasks(config)
  compare = lab.compile_quickly(
    lambda records, *pair: _compare(model.answer, records, pair, tasks)
  )
  found = compare(trained.records, factors['GD'], factors[peer])
  what = kind, number, peer, trained.steps, trained.seconds
  return Row(*what, **jax.device_get(found))


def _compare(answer, records, factors, tasks: training.Tasks) -> dict[str, Any]:
  plain, peer = (
    training.behaviour(training.descent_answer, x, tasks) for x in factors
  )
  last = jax.tree.map(lambda w: w[:, -1:], records)
  with_gd, with_peer = (
    training.alignment(answer, last, tasks, x) for x in (plain, peer)
  )
  return {
    'loss': training.losses_of_records(answer, records, tasks),
    'loss_gd': training.mean_loss(plain.answers, tasks.targets),
    'loss_peer': training.mean_loss(peer.answers, tasks.targets),
    'model_cos_gd': with_gd.model_cos[:, 0],
    'model_cos_peer': with_peer.model_cos[:, 0],
    'preds_diff_peer': with_peer.preds_diff[:, 0],
    'model_cos_of_peers': account.model_cosine(plain.slopes, peer.slopes),
  }


def claims(config: Config, results: list[Row]) -> lab.Claims:
  for row in results:
    name = f'{row.kind}-{row.num_layers}'
    what = f'{row.num_layers} {row.kind} layers'
    closer = row.model_cos_peer - row.model_cos_gd
    yield from training.statements(
      f"""
      {name}-beats-gd [{OSWALD}, figure 4] {what} of trained linear
        self-attention beat as many steps of GD | loss minus that of tuned GD on
        the same tasks
      {name}-reaches-gd-plus-plus [{OSWALD}, figure 4] {what} come as low as
        tuned {row.peer} | share of the way from the loss of GD (0) to that of
        {row.peer} (1), same tasks
      {name}-is-gd-plus-plus [{OSWALD}, figure 4] {what} learn models more like
        those of {row.peer} than of GD | Model cos with {row.peer} minus Model
        cos with GD
      """,
      {
        f'{name}-beats-gd': lab.at_most(0.0, row.loss[:, -1] - row.loss_gd),
        f'{name}-reaches-gd-plus-plus': lab.at_least(0.9, row.reached),
        f'{name}-is-gd-plus-plus': lab.at_least(0.0, closer),
      },
    )


def summary(config: Config, results: list[Row]) -> dict[str, Any]:
  kept = 'kind', 'num_layers', 'peer', 'seconds', 'loss_gd', 'loss_peer'
  means = 'model_cos_gd', 'model_cos_peer', 'preds_diff_peer'
  return {
    'stacks': [
      {
        **{name: getattr(row, name) for name in kept},
        'model_cos_of_peers': row.model_cos_of_peers,
        'loss_by_seed': row.loss[:, -1],
        'loss': statistics.mean(row.loss[:, -1]),
        'share_of_the_way': statistics.mean(row.reached),
        **{name: statistics.mean(getattr(row, name)) for name in means},
      }
      for row in results
    ]
  }


def metrics(config: Config, results: list[Row]) -> lab.Metrics:
  for x in results:
    yield from training.loss_rows(f'{x.kind}_{x.num_layers}', x.steps, x.loss)


def sentence(config: Config, results: list[Row]) -> str:
  parts = [
    f'{row.num_layers} {row.kind} layers end at '
    f'{np.mean(row.loss[:, -1]):.4f} (tuned GD {row.loss_gd:.4f}, '
    f'{row.peer} {row.loss_peer:.4f}, Model cos with {row.peer} '
    f'{np.mean(row.model_cos_peer):.3f})'
    for row in results
  ]
  return f'Trained stacks, on the same tasks: {"; ".join(parts)}.'


def figures(config: Config, results: list[Row]) -> list[lab.Figure]:
  count = len(results)
  figure, axes = drawing.subplots(
    1, count, figsize=(3.8 * count, 3.8), sharey=True, squeeze=False
  )
  for axis, row in zip(axes[0], results, strict=True):
    lines = {'GD': row.loss_gd, row.peer: row.loss_peer}
    training.draw_losses(axis, row.steps, {'trained layers': row.loss}, lines)
    title = f'{row.num_layers} {row.kind} layers'
    axis.set(title=title, ylim=(0, None))
    axis.label_outer()
    axis.legend()
  caption = f"""Linear self-attention of several layers, looped (all layers
    share their weights) or untied: loss on {config.num_test_tasks:,} fixed
    tasks, mean and 95 % interval over {config.num_seeds} seeds. Every layer
    starts as the trained single layer. Lines: tuned gradient descent and GD++
    of as many steps."""
  return [lab.Figure('stacks', figure, caption)]
