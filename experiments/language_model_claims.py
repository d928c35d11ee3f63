"""Claims, captions and conclusion of `experiments.language_model`."""

from collections.abc import Mapping
from typing import Any

from experiments.claims import judge

COMMAND = 'python -m experiments.language_model'
THEOREM = 'Ren & Liu, arXiv:2310.13220, Theorem 3.1'
MAP = 'positive, orthogonal'


def claims(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What the theory says of the model, and whether it does it.

  Args:
    summary: as `language_model_report.summarise` makes it.

  Returns:
    One row for each claim.
  """
  heads = (
    f'each of the {summary["num_heads"]} softmax attention heads is one '
    'gradient step of its dual model'
  )
  where = (
    'largest backward-stable residual over all heads and '
    f'{summary["num_positions"]} positions, '
  )
  rows = [
    _claim(
      f'language-model-heads-{dtype}',
      f'{THEOREM}, head by head',
      f'{heads} ({dtype})',
      f'{where}closed form and jax.grad; at most {bound:g}',
      summary[f'max_residual_{dtype}'],
      bound,
    )
    for dtype, bound in (('float32', 1e-5), ('float64', 1e-12))
  ]
  rows += [
    _claim(
      'language-model-chain',
      'Ren & Liu, arXiv:2310.13220, several attention layers',
      'the chain of dual models predicts the same next token',
      'total variation of the next-token distributions, float32; at most 1e-05',
      summary['next_token_total_variation'],
      1e-5,
    ),
    _claim(
      'language-model-attribution',
      'Elhage et al. (2021), direct paths',
      'contributions of heads and tokens sum to the difference of two logits',
      'what the sum lacks over the sum of absolute values, float32; at most '
      '1e-05',
      summary['attribution']['identity_error'],
      1e-5,
    ),
  ]
  if summary['random_features'] is not None:
    rows.append(_features_claim(summary['random_features']))
  return rows


def _features_claim(found: Mapping[str, Any]) -> dict[str, Any]:
  count = list(found['median_error'])[-1]
  interval = [float(x) for x in found['median_error_interval'][MAP]]
  return _claim(
    'language-model-random-features',
    'Ren & Liu, arXiv:2310.13220, random features in place of the softmax',
    f'{count} positive random features imitate the heads of a real model',
    f'median relative error of an output over {found["num_heads"]} heads, '
    'orthogonal directions; at most 0.1',
    found['median_error'][count][MAP],
    0.1,
    interval,
  )


def _claim(name, source, text, statistic, value, bound, interval=None):
  low, high = interval or (value, value)
  return {
    'id': name,
    'source': source,
    'claim': text,
    'statistic': statistic,
    'value': value,
    'interval': interval,
    'verdict': judge(low, high, at_most=bound),
    'command': COMMAND,
  }


def captions(summary: Mapping[str, Any]) -> list[dict[str, str]]:
  """What each figure shows, in full sentences.

  Args:
    summary: as `language_model_report.summarise` makes it.

  Returns:
    `{file, caption}` of each figure.
  """
  found = summary['attribution']
  first, second = found['labels']
  texts = {
    'residuals': 'Largest distance between attention and its dual model after '
    f'one gradient step, for each of {summary["num_heads"]} heads over '
    f'{summary["num_positions"]} positions, relative to what rounding can '
    'cause; a cross marks the largest one.',
    'attribution': 'What the heads read at the last position: each bar and '
    'disc is a part of the logit of '
    f'{first!r} less that of {second!r}, with gates and normalisations '
    'frozen. Bars are sums over all heads, of the tokens of one demonstration '
    '(the first also holds the token where idle heads rest, unless other text '
    'comes before it); '
    'the diamond is what deleting it from the prompt really takes away.',
  }
  if summary['random_features'] is not None:
    texts |= {
      'random_features': 'Random features on the queries and keys of the '
      'model: measured errors against the number of directions, directions '
      'that the feature budget predicts for an error of 10 %, and predicted '
      'beside measured errors as queries and keys are shrunk.',
      'random_features_layers': 'Median relative error of the outputs of the '
      'heads of each layer by random features, orthogonal directions, beside '
      'that of the plain mean of the visible values.',
    }
  return [
    {'file': f'figures/{name}.png', 'caption': text}
    for name, text in texts.items()
  ]


def conclusion(summary: Mapping[str, Any]) -> str:
  """One paragraph, from the numbers."""
  verb = 'is' if summary['holds'] else 'is NOT'
  same = 'the same' if summary['chain_continues_the_same'] else 'other'
  count = len(summary['greedy_tokens'])
  continues = f' and continues the prompt by {same} {count} tokens'
  continues = continues if count else ''
  parts = [
    f'Every one of the {summary["num_heads"]} heads {verb} one gradient step '
    f'of its dual model at all {summary["num_positions"]} positions, to '
    f'{summary["max_residual_float32"]:.1e} in float32 and '
    f'{summary["max_residual_float64"]:.1e} in float64. The chain of dual '
    'models gives next-token probabilities within a total variation of '
    f'{summary["next_token_total_variation"]:.1e}{continues}.',
    _attribution_sentence(summary['attribution']),
  ]
  if summary['random_features'] is not None:
    parts.append(_features_sentence(summary['random_features']))
  return ' '.join(part for part in parts if part)


def _attribution_sentence(found: Mapping[str, Any]) -> str:
  rows = found['demonstrations']
  if not rows:
    return ''
  first, _ = found['labels']
  best = max(rows, key=lambda row: row['contribution'])
  taught = sum(row['contribution'] for row in rows)
  text = (
    f'Of the logit difference of {found["logit_difference"]:.2f} in favour of '
    f'{first!r}, the heads of the last position read {taught:.2f} from the '
    f'{len(rows)} demonstrations, most from number {best["number"]} '
    f'({best["contribution"]:.2f}).'
  )
  ranks = found['rank_correlation_with_deletion']
  if ranks['contribution'] is None:
    return text
  return (
    f'{text} What a forward pass without a demonstration says is a question '
    "of its own: on this prompt, which tells little, Spearman's rank "
    f'correlation with the deletion effect over {len(rows)} demonstrations is '
    f'{ranks["contribution"]:.2f} for the contribution and '
    f'{ranks["removal_effect"]:.2f} for the removal effect.'
  )


def _features_sentence(found: Mapping[str, Any]) -> str:
  count = list(found['median_error'])[-1]
  error = found['median_error'][count][MAP]
  needed = float(found['log10_directions_needed']['positive'][1])
  mean = found['median_error_of_plain_mean']
  verb = 'imitate' if error <= 0.1 else 'do not imitate'
  return (
    f'Positive random features {verb} these heads: with {count} directions '
    f'the median relative error of an output is {error:.2f}, beside '
    f'{mean:.2f} for the plain mean of all values, and for 10 % the feature '
    f'budget asks for 10^{needed:.0f} directions in the median head.'
  )
