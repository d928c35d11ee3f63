"""The papers' claims about `experiments.equivalence`, and their verdicts."""

from collections.abc import Mapping
from typing import Any

from experiments.claims import judge

COMMAND = 'python -m experiments.equivalence --workdir=DIR'
EQUAL = 1e-10  # Relative; a float64 computation is far below.
NEAR_TRUTH = 0.2  # Loss over that of predicting 0.


def claims(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Judges each claim by the numbers of a summary.

  Args:
    summary: as `equivalence_report.summarise` returns it.

  Returns:
    Claims in the form of `experiments.claims`.
  """
  rows = []
  for size, part in summary['by_num_demonstrations'].items():
    figure = 'v1 Fig. 3 left; v2 Fig. 3a' if size == '15' else 'v1 Fig. 8'
    rows += [
      _residual_claim(part, figure, size, *statement)
      for statement in (
        (
          'residual_multi_epoch_float64',
          'the dual model, trained for many epochs, predicts what the layer '
          'predicts',
        ),
        (
          'residual_float64',
          'one full-batch gradient step predicts what the layer predicts',
        ),
        (
          'residual_exact_softmax_float64',
          'the same holds for exact softmax attention, by the kernel',
        ),
        (
          'c14_curve_residual_float64',
          'the distance to the attention output falls to 0 at the last step '
          '(it equals its closed form at every step)',
        ),
      )
    ]
    ratios = part['loss_over_zero_predictor']
    rows += [
      _loss_claim(
        f'near-truth-{size}',
        figure,
        f'layer and dual model come near the true labels, N = {size}',
        ratios['attention'],
        NEAR_TRUTH,
      ),
      _loss_claim(
        f'in-context-{size}',
        'v1 section 5, read as learning in context',
        'the trained layer also predicts labels of a task matrix that it was '
        f'not trained on, N = {size}',
        ratios['unseen_task'],
        1.0,
      ),
    ]
  return rows


def _residual_claim(part, figure, size, name, text) -> dict[str, Any]:
  value = part[name]
  return {
    'id': f'equivalence-{name.removesuffix("_float64")}-{size}',
    'source': figure,
    'claim': f'{text}, N = {size}',
    'statistic': 'largest residual over all seeds and held-out prompts, '
    f'float64; at most {EQUAL:g}',
    'value': value,
    'interval': None,
    'verdict': judge(value, value, at_most=EQUAL),
    'command': COMMAND,
  }


def _loss_claim(name, figure, text, ratio, bound) -> dict[str, Any]:
  return {
    'id': f'equivalence-{name}',
    'source': figure,
    'claim': text,
    'statistic': 'held-out squared error over that of predicting 0, mean over '
    f'seeds; at most {bound:g}',
    'value': ratio['mean'],
    'interval': [ratio['low'], ratio['high']],
    'verdict': judge(ratio['low'], ratio['high'], at_most=bound),
    'command': COMMAND,
  }


def captions(config: Any, summary: Mapping[str, Any]) -> list[dict[str, str]]:
  """What each figure shows, in full sentences.

  Args:
    config: settings of the experiment.
    summary: as `equivalence_report.summarise` returns it.

  Returns:
    `{file, caption}` of each figure.
  """
  meaning = summary['test_mse_meaning']
  texts = {
    'predictions': 'True labels, predictions of the trained attention layer, '
    f'and predictions of its dual model after {config.dual_epochs} epochs of '
    f'gradient descent with batches of one. {meaning}',
    'pretraining': 'Loss of the layer while it is trained, over the loss of '
    f'predicting 0: mean and 95 % interval over {config.num_seeds} seeds.',
  }
  for size in config.num_demonstrations:
    texts[f'descent_{size}'] = (
      f'Distance of the dual prediction to the attention output along the '
      f'gradient steps, N = {size}, for single held-out prompts, with its '
      'closed form. It reaches 0 at the last step and need not fall before.'
    )
  return [
    {'file': f'figures/{name}.png', 'caption': text}
    for name, text in texts.items()
  ]


def conclusion(summary: Mapping[str, Any]) -> str:
  """One paragraph, from the numbers."""
  verb = 'holds' if summary['holds'] else 'does NOT hold'
  parts = summary['by_num_demonstrations'].values()
  losses = ', '.join(
    '{mean:.2f} [{low:.2f}, {high:.2f}]'.format(
      **part['loss_over_zero_predictor']['attention']
    )
    for part in parts
  )
  unseen = ', '.join(
    '{mean:.2f} [{low:.2f}, {high:.2f}]'.format(
      **part['loss_over_zero_predictor']['unseen_task']
    )
    for part in parts
  )
  return (
    f'The identity {verb}: over all seeds and prompts the largest residual is '
    f'{summary["residual_float64"]:.1e} in float64 and '
    f'{summary["residual_float32"]:.1e} in float32, '
    f'{summary["residual_exact_softmax_float64"]:.1e} for the exact softmax. '
    'It does not say what the layer has learnt: the held-out loss over that of '
    f'predicting 0 is {losses} on the task matrix of training (N = '
    f'{", ".join(summary["by_num_demonstrations"])}), and {unseen} on another '
    'task matrix.'
  )
