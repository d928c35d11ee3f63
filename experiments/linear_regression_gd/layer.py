"""Does one trained layer of linear attention do one step of gradient descent?

It is trained from small random weights and compared with the step whose size is
the best for the test tasks: as it is, on scaled inputs, along the line to the
constructed weights, and in its products. Softmax with one head and with two:
`experiments.accounts`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import lab
from experiments.lab import Config, figures as drawing, statistics
from experiments.linear_regression_gd import training
from experiments.linear_regression_gd.training import CLOSE, OSWALD
from iclcl_jax.accounts import linear_regression_gd as account
from iclcl_jax.types import Array, Float

ALIGNED = 0.999
SCALES = np.linspace(0.5, 2.0, 13)
FRACTIONS = np.linspace(0.0, 1.0, 11)


class Descent(NamedTuple):
  """One step of GD with the best step size for the test tasks."""

  layer: account.SelfAttention  # As a constructed stack of one layer.
  rate: Float[Array, '']
  behaviour: training.Behaviour
  loss: Float[Array, '']
  loss_centred: Float[Array, '']  # On centred inputs, with a size of its own.


class Curve(NamedTuple):
  """How a layer comes to the step: the records that are kept."""

  steps: np.ndarray
  seconds: float
  found: training.Alignment


class Scaled(NamedTuple):
  """Losses at other scales of the inputs; those of the step, fitted at 1."""

  trained: Float[Array, 'S A']
  gd: Float[Array, ' A']
  closed_form: Float[Array, ' A']


class Products(NamedTuple):
  """What the products of a trained layer say about its step."""

  learning_rate: Float[Array, ' S']  # The learnt one.
  diagonal_min: Float[Array, ' S']  # Entries of the query-key product.
  diagonal_max: Float[Array, ' S']
  off_diagonal: Float[Array, ' S']
  rest_of_value_column: Float[Array, ' S']  # Largest entry over the label's.
  matrix: Float[Array, 'S d_x d_x']  # Query-key product times the latter.


class Results(NamedTuple):
  """One step, the trained layer, and what it does elsewhere."""

  descent: Descent
  curve: Curve
  scaled: Scaled
  interpolation: Float[Array, 'S F']  # On the line to the constructed layer.
  products: Products


@lab.once
def trained_linear(config: Config) -> training.Trained:
  """The linear layer, where stacks start as well."""
  recipe = training.Recipe(
    config.num_steps,
    config.record_every,
    config.batch_size,
    config.learning_rate,
    config.clip,
  )
  source = training.linear_source(config)
  return training.train(config, _model(config), source, recipe, 0)


def _model(config: Config) -> training.Model:
  return training.stack_model(
    config.d_x + 1, weights_fn=account.linear_weights, num_heads=1
  )


def measure(config: Config) -> Results:
  tasks = training.test_tasks(config)
  descent = lab.compile_quickly(lambda tasks: _descent(config, tasks))(tasks)
  curve = _curve(config, tasks, descent)
  layers = trained_linear(config).last()
  found = lab.compute(lambda x: _elsewhere(config, x, tasks, descent), layers)
  return jax.device_get(Results(descent, curve, *found))


def _curve(config: Config, tasks, descent: Descent) -> Curve:
  records, steps, seconds = trained_linear(config)
  # The first records, then ever fewer, and the last.
  grid = np.round(np.geomspace(1, len(steps), 16)).astype(int) - 1
  few = np.union1d(grid, np.arange(min(len(steps), 8)))
  answer = _model(config).answer
  align = lab.compile_quickly(
    lambda some: training.alignment(answer, some, tasks, descent.behaviour)
  )
  found = align(jax.tree.map(lambda w: w[:, few], records))
  return Curve(steps[few], seconds, found)


def _descent(config: Config, tasks: training.Tasks) -> Descent:
  answer, size = _model(config).answer, config.num_demonstrations

  def constructed(rate):
    start = jnp.zeros((1, config.d_x), jnp.float32)
    layer = account.construct(rate, size, start)
    return account.repeat(layer, 1)

  def fitted(tokens):
    """Predictions of a step of size 1, and the best size."""
    directions = training.predictions(answer, constructed(1.0), tokens)
    return directions, account.fit_learning_rate(directions, tasks.targets)

  _, rate = fitted(tasks.tokens)
  layer = constructed(rate)
  found = training.behaviour(answer, layer, tasks)
  centre = jnp.mean(tasks.tokens[:, :-1, :-1], axis=1, keepdims=True)
  directions, centred_rate = fitted(tasks.tokens.at[:, :-1, :-1].add(-centre))
  return Descent(
    layer,
    rate,
    found,
    loss=training.mean_loss(found.answers, tasks.targets),
    loss_centred=training.mean_loss(centred_rate * directions, tasks.targets),
  )


def _elsewhere(config: Config, layers, tasks, descent: Descent):
  """Other scales of the inputs, the way to the constructed layer, products."""
  answer, end = _model(config).answer, _folded(config, descent.layer)

  def loss(layer, scale=1.0):
    scaled = training.Tasks(*(scale * x for x in tasks))
    return training.loss(answer, layer, scaled)

  def scales(layer):
    grid = jnp.asarray(SCALES, jnp.float32)
    return jax.lax.map(lambda scale: loss(layer, scale), grid)

  def on_the_way(layer):
    start = _folded(config, layer)
    return jax.lax.map(
      lambda x: loss(account.repeat(account.interpolate(start, end, x), 1)),
      jnp.asarray(FRACTIONS, jnp.float32),
    )

  rate = account.optimal_learning_rate(training.linear_tasks(config))
  expected = [
    account.expected_loss(training.linear_tasks(config, scale), rate)
    for scale in SCALES
  ]
  scaled = Scaled(
    trained=jax.lax.map(scales, layers),
    gd=scales(descent.layer),
    closed_form=jnp.asarray(expected, jnp.float32),
  )
  products = jax.lax.map(lambda layer: _products(config, layer), layers)
  return scaled, jax.lax.map(on_the_way, layers), products


def _products(config: Config, layer) -> Products:
  folded = _folded(config, layer)
  matrix = folded.query_key[0, : config.d_x, : config.d_x]
  column = folded.value_output[0, :, -1]
  off = matrix - jnp.diag(jnp.diagonal(matrix))
  return Products(
    learning_rate=-config.num_demonstrations * column[-1],
    diagonal_min=jnp.min(jnp.diagonal(matrix)),
    diagonal_max=jnp.max(jnp.diagonal(matrix)),
    off_diagonal=jnp.max(jnp.abs(off)),
    rest_of_value_column=jnp.max(jnp.abs(column[:-1])) / jnp.abs(column[-1]),
    matrix=matrix * column[-1],
  )


def _folded(config: Config, layers) -> account.Folded:
  """Products of a stack of one layer, in the scale of the constructed one."""
  layer = jax.tree.map(lambda w: w[0], layers)
  return account.normalise(account.fold(layer), d_x=config.d_x)


def _at_end(results: Results) -> dict[str, Float[Array, ' S']]:
  """What claims and summary take means of, at the end of training."""
  linear = jax.tree.map(lambda x: x[:, -1], results.curve.found)
  between = results.interpolation
  loss_gd = float(results.descent.loss)
  ratio = results.scaled.trained / results.scaled.gd[None] - 1
  return {
    'loss_trained': linear.loss,
    'loss_trained_minus_gd': linear.loss - loss_gd,
    'preds_diff': linear.preds_diff,
    'model_diff': linear.model_diff,
    'model_cos': linear.model_cos,
    'learning_rate_learnt': results.products.learning_rate,
    'loss_halfway_minus_larger_end': between[:, len(FRACTIONS) // 2]
    - np.maximum(between[:, 0], between[:, -1]),
    'scale_deviation': np.max(np.abs(ratio), axis=1),
  }


def claims(config: Config, results: Results) -> list[lab.Claim]:
  end, best = _at_end(results), float(results.descent.rate)
  found = {
    'loss': lab.at_most(CLOSE, end['loss_trained_minus_gd']),
    'model-cos': lab.at_least(ALIGNED, end['model_cos']),
    'step-size': lab.within(
      0.95 * best, 1.05 * best, end['learning_rate_learnt']
    ),
    'interpolation': lab.at_most(CLOSE, end['loss_halfway_minus_larger_end']),
    'input-scale': lab.at_most(0.1, end['scale_deviation']),
  }
  return training.statements(
    f"""
    loss [{OSWALD}, figure 2] a trained layer of linear self-attention reaches
      the loss of one step | loss minus that of one step with the best step size
      on the same tasks
    model-cos [{OSWALD}, figure 2] the trained layer learns the model that one
      step learns | Model cos
    step-size [{OSWALD}] the step size that the trained layer has learnt is the
      best one | learnt step size, which on the test tasks is best at {best:.3f}
    interpolation [{OSWALD}, figure 2] the average of trained and constructed
      weights does as well as both | loss halfway minus the larger loss of the
      two ends
    input-scale [{OSWALD}, figure 3] the trained layer generalises over the
      scale of inputs as gradient descent does | largest relative deviation of
      its loss from that of one step, inputs scaled by .5 to 2
    """,
    found,
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  descent = results.descent
  intervals = {k: statistics.mean(x) for k, x in _at_end(results).items()}
  linear, tasks = results.curve, training.linear_tasks(config)
  answers, slopes = descent.behaviour
  best = account.optimal_learning_rate(tasks)
  return {
    **{name: estimate.value for name, estimate in intervals.items()},
    'intervals_95_percent': intervals,
    'loss_gd': descent.loss,
    'loss_gd_centred_inputs': descent.loss_centred,
    'loss_closed_form': account.expected_loss(tasks, best),
    'loss_zero_predictor': account.expected_loss(tasks, 0.0),
    'learning_rate_gd': descent.rate,
    'learning_rate_closed_form': best,
    'mean_absolute_prediction_gd': np.mean(np.abs(answers)),
    'mean_norm_of_slope_gd': np.mean(np.linalg.norm(slopes, axis=1)),
    'training_seconds': linear.seconds / config.num_seeds,
    'training_seconds_all_seeds': linear.seconds,
    'loss_trained_by_seed': linear.found.loss[:, -1],
    'model_cos_by_seed': linear.found.model_cos[:, -1],
    'num_seeds': config.num_seeds,
    'learnt_products_by_seed': {
      name: x for name, x in results.products._asdict().items() if x.ndim == 1
    },
  }


def metrics(config: Config, results: Results) -> lab.Metrics:
  seeds, (steps, _, found) = range(config.num_seeds), results.curve
  yield from lab.tidy({}, found._asdict(), seed=seeds, step=steps)


def sentence(config: Config, results: Results) -> str:
  found = {k: statistics.mean(x) for k, x in _at_end(results).items()}
  return f"""Trained, one layer ends at a loss of
    {found['loss_trained'].value:.4f}, {found['loss_trained_minus_gd']:+.4f}
    from one step with the best step size, with a Model cos of
    {found['model_cos']:.4f}."""


def figures(config: Config, results: Results) -> list[lab.Figure]:
  during = f"""Training from a small random start: loss on
    {config.num_test_tasks:,} fixed tasks (left) and Model cos with one step of
    gradient descent (right), thin lines for {config.num_seeds} seeds, a marked
    one for the median. Dashed: one step with the best step size; dash-dotted:
    on centred inputs; dotted: predicting 0. The layer was trained for
    {config.num_steps:,} steps."""
  generalisation = f"""Left: loss when context and query are scaled by a factor
    (1 is training): the trained linear layer (mean and 95 % interval over
    {config.num_seeds} seeds), one step of gradient descent with the step size
    fitted at 1, and its closed form. Right: loss between trained weights (0)
    and constructed ones (1), thin lines for seeds, both rescaled to unit
    query-key products."""
  products = """The query-key product of the trained linear layer, times its
    value-output entry for labels, for the first seed (left) and as constructed
    with the best step size (right). Both are multiples of the identity, up to
    what training left."""
  return [
    lab.Figure('training', _draw_training(config, results), during),
    lab.Figure('generalisation', _draw_generalisation(results), generalisation),
    lab.Figure('products', _draw_products(config, results), products),
  ]


def _draw_training(config: Config, results: Results) -> Any:
  figure, (left, right) = drawing.subplots(1, 2, figsize=(9.5, 3.9))
  steps, _, found = results.curve
  drawing.runs(left, steps, found.loss, 0, label='linear attention')
  drawing.runs(right, steps, found.model_cos, 0)
  zero = account.expected_loss(training.linear_tasks(config), 0.0)
  lines = {
    'one step of GD': results.descent.loss,
    'GD, centred inputs': results.descent.loss_centred,
    'predicting 0': zero,
  }
  training.draw_losses(left, [], {}, lines)
  right.axhline(1, color=drawing.GREY, ls='--')
  right.set(ylabel='Model cos with one step', xlabel='training steps')
  for axis in (left, right):
    axis.set_xscale('symlog', linthresh=config.record_every, linscale=0.5)
    axis.set_xlim(left=0)
  drawing.legend(left, 3, 'outside upper center')
  return figure


def _draw_generalisation(results: Results) -> Any:
  figure, (left, right) = drawing.subplots(1, 2, figsize=(9.5, 3.9))
  scaled, between = results.scaled, results.interpolation
  look: Any = {'marker': 'o', 'mfc': 'white', 'color': drawing.BLUE}
  drawing.means(left, SCALES, scaled.trained, ls='', label='trained', **look)
  left.plot(
    SCALES, scaled.gd, '+', color=drawing.ORANGE, ms=10, label='one GD step'
  )
  left.plot(SCALES, scaled.closed_form, 'k--', label='closed form')
  left.axvline(1, color=drawing.GREY, lw=0.8)
  left.set(yscale='log', xlabel='scale of the inputs', ylabel='loss')
  least, most = np.min(scaled.closed_form), np.max(scaled.closed_form)
  left.set_ylim(0.5 * least, 2 * most)
  drawing.runs(right, FRACTIONS, between, 1, label='interpolated (median)')
  loss = results.descent.loss
  right.axhline(loss, color=drawing.BLACK, ls='--', label='one GD step')
  right.set(xlabel='trained (0) to constructed (1)', ylabel='loss')
  right.set_ylim(0.97 * loss, max(1.05 * loss, 1.02 * np.max(between)))
  left.legend()
  right.legend()
  return figure


def _draw_products(config: Config, results: Results) -> Any:
  figure, axes = drawing.subplots(1, 2, figsize=(8.5, 3.8))
  rate = float(results.descent.rate) / config.num_demonstrations
  made = -rate * np.eye(config.d_x)
  matrices = {'trained': results.products.matrix[0], 'constructed': made}
  for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
    image = axis.imshow(matrix, cmap='PuOr', vmin=-rate, vmax=rate)
    axis.set(title=title, xlabel='input of the key')
    axis.spines[:].set_visible(True)
  axes[0].set_ylabel('input of the query')
  figure.colorbar(image, ax=axes, label='product of weights')
  return figure
