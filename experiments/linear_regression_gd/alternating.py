"""Do two layers join inputs and labels that come as separate tokens?

A softmax layer can copy each label beside its input, and a linear layer can
then take a step of gradient descent.
"""

import dataclasses
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

LABEL = 34  # Sets its random numbers apart.
CLIP = 1.0
LEARNING_RATE = 1e-2
INIT_SCALE = 5.0
D_POSITION = 10
WAVE_LENGTH = 1e4


class Results(NamedTuple):
  steps: np.ndarray
  loss: Float[Array, 'S T']  # Of the records.
  loss_gd: Float[Array, '']  # Of the best step.
  loss_zero: Float[Array, '']  # Of predicting 0.
  loss_closed_form: float  # What the best step is expected to reach.
  copied: Float[Array, 'S 2*N 2*N+1']  # Mean attention of context rows.

  @property
  def within_pairs(self) -> np.ndarray:
    """Attention of inputs to their labels, or of labels to theirs. `[S]`."""
    index = 2 * np.arange(self.copied.shape[1] // 2)
    forward = np.mean(self.copied[:, index, index + 1], axis=1)
    backward = np.mean(self.copied[:, index + 1, index], axis=1)
    return np.maximum(forward, backward)


def _positions(length: int) -> np.ndarray:
  """Sines and cosines of ever longer waves. Shape `[length, D_POSITION]`."""
  pairs = np.arange(D_POSITION) // 2
  angles = np.arange(length)[:, None] / WAVE_LENGTH ** (2 * pairs / D_POSITION)
  even = np.arange(D_POSITION) % 2 == 0
  return np.where(even, np.sin(angles), np.cos(angles)).astype(np.float32)


def _separate(rows):
  """Rows `(x_i, y_i)` to rows of inputs and of labels in turn."""
  codes = jnp.asarray(_positions(2 * len(rows) - 1))
  pair = rows[:-1, :-1], rows[:-1, -1:]
  return account.make_alternating_tokens(*pair, rows[-1, :-1], codes)


def _model(d_x: int) -> training.Model:
  """A softmax layer on separate tokens, then a linear one."""
  d_model = D_POSITION + d_x + 1
  # Two layers: their initial weights are those of a stack of two.
  copying, descending = (
    training.stack_model(
      d_model, weights_fn=weights_fn, num_layers=2, init_scale=INIT_SCALE
    )
    for weights_fn in (account.softmax_weights, account.linear_weights)
  )

  def init(key):
    keys = jax.random.split(key)
    return copying.init(keys[0]), descending.init(keys[1])

  def answer(params, rows):
    copy, descend = (jax.tree.map(lambda w: w[0], layer) for layer in params)
    rows = account.attend(
      copy, _separate(rows), weights_fn=account.softmax_weights
    )
    return -account.attend_query(descend, rows)[-1:]

  return training.Model(init, answer)


def measure(config: Any) -> Results:
  """Trains both layers, and compares them with one step on the same tasks."""
  size = config.alternating_size
  small = dataclasses.replace(config, d_x=size, num_demonstrations=size)
  model = _model(size)
  recipe = training.cosine_recipe(
    config.alternating_steps, config.alternating_batch_size, LEARNING_RATE, CLIP
  )
  source = training.linear_source(small)
  trained = training.train(config, model, source, recipe, LABEL)
  key = jax.random.fold_in(jax.random.key(config.seed), 2**19)
  tasks = training.draw(key, config.num_test_tasks, small)
  expected = training.linear_tasks(small)
  best = account.optimal_learning_rate(expected)

  @lab.compile_quickly
  def compare(records, last):
    factors = jnp.asarray([[1.0], [0.0]], jnp.float32)
    step = training.predictions(training.descent_answer, factors, tasks.tokens)
    rate = account.fit_learning_rate(step, tasks.targets)
    return Results(
      steps=trained.steps,
      loss=training.losses_of_records(model.answer, records, tasks),
      loss_gd=training.mean_loss(rate * step, tasks.targets),
      loss_zero=jnp.mean(tasks.targets**2) / 2,
      loss_closed_form=float(account.expected_loss(expected, best)),
      copied=jax.lax.map(lambda p: _copied(p, tasks), last),
    )

  return jax.device_get(compare(trained.records, trained.last()))


def _copied(params, tasks: training.Tasks):
  """Mean attention of all rows but the query's. `[2 N, 2 N + 1]`."""
  layer = jax.tree.map(lambda w: w[0], params[0])

  def weights(rows):
    rows = _separate(rows)
    scores = rows @ account.fold(layer).query_key[0] @ rows.T
    visible = jnp.arange(len(rows))[None] < len(rows) - 1
    return account.softmax_weights(scores, visible, rows.shape[1])[:-1]

  return jnp.mean(jax.vmap(weights)(tasks.tokens[:500]), axis=0)


def claims(config: Config, results: Results) -> list[lab.Claim]:
  worse = results.loss[:, -1] - results.loss_gd
  return training.statements(
    f"""
    alternating-loss [{OSWALD}, section 5] two trained layers on separate tokens
      reach the loss of one step | loss minus that of one step with the best
      step size on the same tasks
    alternating-copy [{OSWALD}, section 5] the first of them joins inputs and
      their labels | mean attention of an input to its own label, or of a label
      to its own input, whichever is larger
    """,
    {
      'alternating-loss': lab.at_most(CLOSE, worse),
      'alternating-copy': lab.at_least(0.5, results.within_pairs),
    },
  )


def summary(config: Config, results: Results) -> dict[str, Any]:
  return {
    'alternating': {
      'loss': statistics.mean(results.loss[:, -1]),
      'attention_within_pairs': statistics.mean(results.within_pairs),
      'loss_by_seed': results.loss[:, -1],
      'loss_gd': results.loss_gd,
      'loss_closed_form': results.loss_closed_form,
      'loss_zero_predictor': results.loss_zero,
    }
  }


def metrics(config: Config, results: Results) -> list[dict[str, Any]]:
  return training.loss_rows('alternating', results.steps, results.loss)


def sentence(config: Config, results: Results) -> str:
  return f"""On separate tokens a softmax layer and a linear one end at
    {np.mean(results.loss[:, -1]):.4f}, one step at {results.loss_gd:.4f}; one
    token of a pair gives {np.mean(results.within_pairs):.2f} of its attention
    in the first layer to the other."""


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, (left, right) = drawing.subplots(
    1, 2, figsize=(9.5, 3.9), width_ratios=(1, 1.1)
  )
  training.draw_losses(
    left,
    results.steps,
    {'softmax, then linear': results.loss},
    {'one step of GD': results.loss_gd, 'predicting 0': results.loss_zero},
  )
  left.set_ylim(bottom=0)
  left.legend()
  weights = results.copied[int(np.argmin(results.loss[:, -1]))]
  image = right.imshow(weights, cmap='Greys', vmin=0, vmax=1, aspect='auto')
  rows = np.arange(len(weights))
  look: Any = {'ms': 12, 'mfc': 'none', 'color': drawing.GREEN, 'mew': 1.5}
  right.plot(rows + 1 - 2 * (rows % 2), rows, 's', **look)
  labels = [f'${c}_{{{i + 1}}}$' for i in range(len(rows) // 2) for c in 'xy']
  right.set_xticks(range(len(rows) + 1), [*labels, '$x_q$'])
  right.set_yticks(rows, labels)
  right.set(xlabel='token that is read', ylabel='token that reads')
  right.spines[:].set_visible(True)
  figure.colorbar(image, ax=right, label='attention')
  size = config.alternating_size
  caption = f"""Inputs and labels as separate tokens, {size} demonstrations in
    {size} dimensions. Left: loss of a softmax layer, then a linear one, mean
    and 95 % interval over {config.num_seeds} seeds. Right: mean attention of
    the first layer of the best seed; squares: the other token of a pair."""
  return [lab.Figure('alternating', figure, caption)]
