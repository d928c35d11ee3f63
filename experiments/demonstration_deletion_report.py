"""Rank correlations within prompts, claims about them, and their table."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import demonstration_deletion_data as data
from experiments import harness
from experiments.claims import claims_text, judge

COMMAND = 'python -m experiments.demonstration_deletion --workdir=DIR'
SOURCE = 'sanity study of attribution'
IDENTITY = 1e-5  # Of a float32 sum, relative to its absolute terms.
AGREEMENT = 0.8
ATTRIBUTION = 'direct logit attribution'
REMOVAL = 'closed-form removal'
LABEL = 'label'
# Baselines that attribution has to beat, for each question.
RIVALS = {'signed': LABEL, 'size': 'recency'}


def scores(
  config: Any, prompts: data.Prompts, results: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
  """What each method says of each demonstration, `[P, S]`, by question.

  Two questions: the signed effect on the logit difference, and its size.
  """
  rng = np.random.default_rng(config.seed + 1)
  shape = prompts.positive.shape
  sign = np.where(prompts.positive, 1.0, -1.0)
  recency = np.broadcast_to(np.arange(1.0, shape[1] + 1)[None], shape)
  blind = {
    'attention weight': results['attention'],
    'dual loss drop': results['loss_drop'],
    'recency': recency,
    'length': prompts.lengths.astype(float),
    'random': rng.random(shape),
  }
  told = {
    ATTRIBUTION: results['contribution'],
    REMOVAL: results['removal_effect'],
  }
  return {
    'signed': told | {LABEL: sign, 'label times recency': sign * recency}
    | blind,
    'size': {name: np.abs(score) for name, score in told.items()} | blind,
  }  # fmt: skip


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Spearman correlation of each row; 0 if one of the two is constant."""
  import scipy.stats

  a, b = (scipy.stats.rankdata(x, axis=1) for x in (a, b))
  a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
  size = np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))
  return np.sum(a * b, axis=1) / np.where(size > 0, size, 1)


def kendall(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Kendall's tau-b of each row; 0 if one of the two is constant."""
  first, second = np.triu_indices(a.shape[1], 1)
  a, b = (np.sign(x[:, first] - x[:, second]) for x in (a, b))
  size = np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))
  return np.sum(a * b, axis=1) / np.where(size > 0, size, 1)


def correlate(
  config: Any, prompts: data.Prompts, results: Mapping[str, np.ndarray]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
  """Rank correlations of each prompt by question, method and statistic.

  Statistics: `spearman` and `kendall` with the effect of removal, and
  `spearman_hidden` with that of hiding.
  """
  asked = scores(config, prompts, results)
  correlations: dict[str, dict[str, dict[str, np.ndarray]]] = {}
  for question, methods in asked.items():
    removed, hidden = results['removed'], results['hidden']
    if question == 'size':
      removed, hidden = np.abs(removed), np.abs(hidden)
    correlations[question] = {
      name: {
        'spearman': spearman(score, removed),
        'kendall': kendall(score, removed),
        'spearman_hidden': spearman(score, hidden),
      }
      for name, score in methods.items()
    }
  return correlations


def summarise(
  config: Any, prompts: data.Prompts, results: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the summary, and the correlations of all prompts."""
  found = correlate(config, prompts, results)
  means = {
    question: {
      name: {key: harness.mean_interval(x) for key, x in rows.items()}
      for name, rows in methods.items()
    }
    for question, methods in found.items()
  }
  agreement = spearman(results['hidden'], results['removed'])
  label = results['difference'] > 0
  right = np.mean(label == prompts.query_positive)
  sign = np.where(prompts.positive, 1.0, -1.0)
  summary = {
    'num_prompts': config.num_prompts,
    'num_demonstrations': config.num_demonstrations,
    'identity_gap_float32': float(np.max(results['identity_gap'])),
    'mean_rank_correlation': means,
    'hidden_against_removed_spearman': harness.mean_interval(agreement),
    'pearson_pooled': _pearson(results),
    'effect_towards_own_label': harness.mean_interval(
      np.mean(sign * results['removed'], axis=1)
    ),
    'mean_absolute_effect_of_removal': float(
      np.mean(np.abs(results['removed']))
    ),
    'mean_absolute_logit_difference': float(
      np.mean(np.abs(results['difference']))
    ),
    'accuracy_of_model': float(right),
    'fraction_answered_positive': float(np.mean(label)),
  }
  summary['claims'] = _claims(summary, found)
  summary['figures'] = _captions(config, summary)
  summary['conclusion'] = _conclusion(summary)
  return summary, found


def metrics(
  prompts: data.Prompts, results: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
  """One row for each demonstration of each prompt."""
  names = 'contribution', 'removal_effect', 'attention', 'loss_drop'
  return [
    {
      'prompt': number,
      'demonstration': place,
      'positive': bool(prompts.positive[number, place]),
      'num_tokens': int(prompts.lengths[number, place]),
      'logit_difference': float(results['difference'][number]),
    }
    | {
      name: float(results[name][number, place])
      for name in (*names, 'removed', 'hidden')
    }
    for number, place in np.ndindex(*prompts.positive.shape)
  ]


def text(summary: Mapping[str, Any]) -> str:
  """The correlations, the claims and the conclusion."""

  def cell(row):
    return f'{row["mean"]:+.2f} [{row["low"]:+.2f}, {row["high"]:+.2f}]'

  rows = [
    {
      'effect': question,
      'method': name,
      'Spearman (removed)': cell(row['spearman']),
      'Kendall (removed)': cell(row['kendall']),
      'Spearman (hidden)': cell(row['spearman_hidden']),
    }
    for question, methods in summary['mean_rank_correlation'].items()
    for name, row in methods.items()
  ]
  return f'{harness.table(rows)}\n\n{claims_text(summary)}'


def _pearson(results) -> dict[str, float]:
  """Correlation over all demonstrations of all prompts, with removal."""
  removed = results['removed'].ravel()
  return {
    name: float(np.corrcoef(results[name].ravel(), removed)[0, 1])
    for name in ('contribution', 'removal_effect', 'hidden')
  }


def _claim(name, claim, statistic, value, interval, verdict) -> dict[str, Any]:
  return {
    'id': f'deletion-{name}',
    'source': SOURCE,
    'claim': claim,
    'statistic': statistic,
    'value': value,
    'interval': interval,
    'verdict': verdict,
    'command': COMMAND,
  }


def _mean_claim(name, claim, statistic, row, at_least) -> dict[str, Any]:
  """A claim that the mean over prompts exceeds a number."""
  return _claim(
    name,
    claim,
    f'{statistic}, mean over prompts with its 95% t-interval; at least '
    f'{at_least:g}',
    row['mean'],
    [row['low'], row['high']],
    judge(row['low'], row['high'], at_least=at_least),
  )


def _claims(summary, found) -> list[dict[str, Any]]:
  gap = summary['identity_gap_float32']
  claims = [
    _claim(
      'identity',
      'the parts of the logit difference sum to it',
      'largest error of the sum over prompts, relative to the sum of the '
      f'absolute parts, float32; at most {IDENTITY:g}',
      gap,
      None,
      judge(gap, gap, at_most=IDENTITY),
    )
  ]
  what = {
    'signed': 'the effect of deleting it on the logit difference',
    'size': 'the size of that effect',
  }
  for question, methods in found.items():
    means = summary['mean_rank_correlation'][question]
    rival = RIVALS[question]
    for short, method in (('attribution', ATTRIBUTION), ('removal', REMOVAL)):
      claims.append(
        _mean_claim(
          f'{short}-{question}',
          f'{method} of a demonstration ranks {what[question]}',
          'Spearman correlation within a prompt',
          means[method]['spearman'],
          0,
        )
      )
      turned = np.sign(means[rival]['spearman']['mean'])
      paired = methods[method]['spearman'] - (
        turned * methods[rival]['spearman']
      )
      claims.append(
        _mean_claim(
          f'{short}-{question}-better',
          f'{method} ranks {what[question]} better than {rival} does',
          f'Spearman correlation less that of {rival}, paired by prompt; '
          f'{rival} is taken in the direction that suits it',
          harness.mean_interval(paired),
          0,
        )
      )
  claims.append(
    _mean_claim(
      'hidden',
      'hiding the tokens of a demonstration does what deleting them does',
      'Spearman correlation of the two effects within a prompt',
      summary['hidden_against_removed_spearman'],
      AGREEMENT,
    )
  )
  return claims


def _captions(config, summary) -> list[dict[str, str]]:
  prompts = (
    f'{config.num_prompts} prompts of {config.num_demonstrations} '
    'demonstrations'
  )
  return [
    {
      'file': 'figures/correlations.png',
      'caption': 'Rank correlation, within each prompt, of what a method says '
      'of the demonstrations and what deleting each of them does to the logit '
      'difference in a new forward pass: with its sign (left) and its size '
      f'alone (right). {prompts}; grey circles: prompts, their area says how '
      'many have that correlation; black: mean over prompts with its 95% '
      't-interval. Filled circles are read from the model, open squares need '
      'no model. A method that says the same of all demonstrations counts as '
      '0.',
    },
    {
      'file': 'figures/scatter.png',
      'caption': 'What deleting a demonstration takes from the logit '
      'difference (positive less negative label), against direct logit '
      'attribution, against the closed-form removal from the dual states of '
      'all heads, and against hiding its tokens at unchanged positions. One '
      f'mark for each demonstration of {prompts}; dashed: equality. Scales of '
      'the axes differ. Pooled Pearson correlations: '
      + ', '.join(
        f'{value:.2f}' for value in summary['pearson_pooled'].values()
      )
      + '.',
    },
  ]


def _conclusion(summary) -> str:
  def mean(question, method):
    row = summary['mean_rank_correlation'][question][method]['spearman']
    return f'{row["mean"]:+.2f} [{row["low"]:+.2f}, {row["high"]:+.2f}]'

  signed = summary['mean_rank_correlation']['signed']
  best = max(signed, key=lambda name: abs(signed[name]['spearman']['mean']))
  own = summary['effect_towards_own_label']
  agreement = summary['hidden_against_removed_spearman']
  return (
    f'In {summary["num_prompts"]} prompts, the Spearman correlation with the '
    'effect of deleting a demonstration is '
    f'{mean("signed", ATTRIBUTION)} for direct logit attribution and '
    f'{mean("signed", REMOVAL)} for the closed-form removal, '
    f'{mean("signed", LABEL)} for its label alone and '
    f'{mean("signed", "random")} for a random order; the largest in size is '
    f'that of {best}. A demonstration moves the logit difference by '
    f'{own["mean"]:+.2f} [{own["low"]:+.2f}, {own["high"]:+.2f}] towards its '
    'own label (negative: away from it). For the size of the effect it is '
    f'{mean("size", ATTRIBUTION)} and '
    f'{mean("size", REMOVAL)}, {mean("size", "recency")} for recency and '
    f'{mean("size", "length")} for length. Hiding a demonstration agrees with '
    f'deleting it to {agreement["mean"]:.2f}. The model answers '
    f'{summary["accuracy_of_model"]:.0%} of the queries as the critic did. '
    'The attribution is exact as a sum; it follows the direct paths from the '
    'heads at the last token only, and what a demonstration does to the tokens '
    'after it is not among them.'
  )
