"""What has the layer learnt: the task of training, or learning in context?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import lab
from experiments.equivalence import one_step
from experiments.lab import Config, figures as drawing, pretraining, statistics

NEAR_TRUTH = 0.2  # Loss over that of predicting 0.
# What a held-out loss says, by `multi_task`.
MEANING = {
  False: (
    'Single-task training: test and training prompts share one matrix B for '
    'each seed, so the loss measures how well the layer memorises B, not '
    'in-context learning; `test_mse_unseen_task` in the summary is the loss '
    'on prompts of another B.'
  ),
  True: (
    'Multi-task training: a fresh matrix B for every prompt, in training and '
    'in test, so only learning in context can beat predicting 0.'
  ),
}


class Losses(NamedTuple):
  """Squared errors of the label, means over held-out prompts, by seed `[S]`."""

  attention: np.ndarray  # Of the layer, on the task matrix of its training.
  zero_predictor: np.ndarray  # Of predicting 0 there.
  unseen_task: np.ndarray  # Of the layer, on the task matrix of another seed.
  zero_unseen: np.ndarray  # Of predicting 0 there.
  training: np.ndarray  # By epoch, and of predicting 0, `[E, 2, S]`.
  num_prompts: int  # Held-out prompts of a seed.

  @property
  def ratios(self) -> dict[str, lab.Estimate]:
    """Losses over that of predicting 0, means over seeds."""
    return {
      'attention': statistics.mean(self.attention / self.zero_predictor),
      'unseen_task': statistics.mean(self.unseen_task / self.zero_unseen),
    }


Results = Mapping[int, Losses]  # By number of demonstrations.


def measure(config: Config) -> Results:
  """Predicts the labels of held-out prompts, the layer's own and others'."""

  @lab.compile_quickly
  def predict(params, phi, tokens):
    outputs = pretraining.for_all(pretraining.attend)(params, phi, tokens)
    return outputs[..., -pretraining.LABEL_DIM :]

  @lab.float64_on_host()
  def compare(found):
    params, phi, tokens = found.cast(np.float64)
    target = found.target
    # Another seed's prompts: a matrix B that the layer has never seen.
    unseen, unseen_target = (np.roll(x, -1, axis=0) for x in (tokens, target))

    def loss(prediction, label):
      return np.mean((np.asarray(prediction) - label) ** 2, axis=(1, 2))

    return Losses(
      loss(predict(params, phi, tokens), target),
      loss(0, target),
      loss(predict(params, phi, unseen), unseen_target),
      loss(0, unseen_target),
      found.losses,
      target.shape[1],
    )

  return {k: compare(found) for k, found in one_step.trained(config).items()}


def claims(config: Config, results: Results) -> lab.Claims:
  error = 'held-out squared error over that of predicting 0, mean over seeds'
  for size, found in results.items():
    yield from lab.statements(
      'equivalence-',
      f"""
      near-truth-{size} [{one_step.source(size)}] layer and dual model come near
        the true labels, N = {size} | {error}
      in-context-{size} [v1 section 5, read as learning in context] the trained
        layer also predicts labels of a task matrix that it was not trained on,
        N = {size} | {error}
      """,
      {
        f'near-truth-{size}': lab.at_most(
          NEAR_TRUTH, found.ratios['attention']
        ),
        f'in-context-{size}': lab.at_most(1.0, found.ratios['unseen_task']),
      },
    )


def summary(config: Config, results: Results) -> dict[str, Any]:
  losses = {size: _mse(found) for size, found in results.items()}
  return losses[config.num_demonstrations[0]] | {
    'test_mse_num_demonstrations': config.num_demonstrations[0],
    'test_mse_meaning': MEANING[config.multi_task],
    'num_seeds': config.num_seeds,
    'input_distribution': config.input_distribution,
    'multi_task': config.multi_task,
    'dual_epochs': config.dual_epochs,
    'by_num_demonstrations': {
      str(size): losses[size]
      | {
        'loss_over_zero_predictor': found.ratios,
        'training_loss_over_zero_predictor_last_epoch': statistics.mean(
          found.training[-1, 0] / found.training[-1, 1]
        ),
        'num_test_prompts': found.num_prompts,
        'num_demonstrations': size,
      }
      for size, found in results.items()
    },
  }


def _mse(found: Losses) -> dict[str, Any]:
  """Losses of one N, means over seeds and with their intervals."""
  names = 'attention', 'zero_predictor', 'unseen_task'
  losses = {name: statistics.mean(getattr(found, name)) for name in names}
  return {
    **{f'test_mse_{name}': loss.value for name, loss in losses.items()},
    'test_mse_95_percent_interval': losses,
  }


def metrics(config: Config, results: Results) -> lab.Metrics:
  for size, (*_, training, _) in results.items():
    yield from lab.tidy(
      {'num_demonstrations': size},
      {'loss': training[:, 0], 'loss_zero_predictor': training[:, 1]},
      epoch=range(1, len(training) + 1),
    )


def figures(config: Config, results: Results) -> list[lab.Figure]:
  figure, axis = drawing.subplots(figsize=(8, 4.2))
  epochs = np.arange(1, config.num_epochs + 1)
  ends = []
  for index, (size, found) in enumerate(results.items()):
    ratios = found.training[:, 0] / np.mean(found.training[:, 1], axis=0)[None]
    estimates = [statistics.geometric_mean(row) for row in ratios]
    last, colour = estimates[-1].value, drawing.COLOURS[index + 1]
    line = drawing.LINES[index % len(drawing.LINES)]
    drawing.band(axis, epochs, estimates, color=colour, ls=line, lw=2.5)
    ends.append((last, f'N = {size}: {last:.2f}', colour))
  axis.axhline(1, color=drawing.GREY, linewidth=1)
  ends.append((1.0, 'predicting 0', drawing.GREY))
  axis.set_yscale('log')
  drawing.plain_ticks(axis.yaxis)
  axis.set_xlim(0, epochs[-1])
  drawing.label_ends(axis, ends)
  axis.locator_params(axis='x', integer=True)
  axis.set_xlabel('epoch')
  axis.set_ylabel('squared error of new prompts,\nrelative to predicting 0')
  task = 'a fresh B every prompt' if config.multi_task else 'one B a seed'
  axis.set_title(f'Pretraining, {task}')
  caption = f"""Loss of the layer while it is trained, over the loss of
    predicting 0: geometric mean and 95 % interval of {config.num_seeds}
    seeds."""
  return [lab.Figure('pretraining', figure, caption)]
