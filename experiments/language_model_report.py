"""Summary, metrics and table of `experiments.language_model`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import claims as claim_tools
from experiments import harness
from experiments import language_model_claims as judging
from experiments.language_model_attribution import Attribution
from experiments.language_model_features import Study
from experiments.language_model_measure import (
  Certified,
  Forward,
  total_variation,
)
from experiments.language_model_prompt import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """What was measured.

  Attributes:
    prompt: the prompt, taken apart.
    tokens: its ids. Shape `[N]`.
    token_texts: the characters that each token covers.
    segments: demonstration of each token, -1 for the rest. Shape `[N]`.
    label_ids: the two tokens that are compared, the likelier one first.
    token_text: text of a token id.
    forward: the plain forward pass.
    certified: certificates by dtype.
    attribution: of the difference of the two logits.
    study: random features on the heads, or None.
    seconds: by stage.
  """

  prompt: Prompt
  tokens: np.ndarray
  token_texts: list[str]
  segments: np.ndarray
  label_ids: tuple[int, int]
  token_text: Callable[[int], str]
  forward: Forward
  certified: Mapping[str, Certified]
  attribution: Attribution
  study: Study | None
  seconds: dict[str, float]

  @property
  def labels(self) -> tuple[str, str]:
    """Texts of the two tokens that are compared, without spaces."""
    first, second = (printable(self.token_text, i) for i in self.label_ids)
    return first, second


def printable(token_text: Callable[[int], str], index: int) -> str:
  r"""Text of a token without spaces, or its id where that shows nothing.

  Example:
    >>> printable(lambda index: [' a', '\n', '\ufffd'][index], 0)
    'a'
    >>> printable(lambda index: [' a', '\n', '\ufffd'][index], 2)
    'token 2'
  """
  text = token_text(index).strip()
  return text if text and '\ufffd' not in text else f'token {index}'


def summarise(config: Any, results: Results) -> dict[str, Any]:
  """The numbers that decide, and what they say.

  Args:
    config: settings of the experiment.
    results: what was measured.

  Returns:
    The summary, without times and memory.
  """
  certificates = {k: v.certificate for k, v in results.certified.items()}
  single = certificates['float32']
  summary: dict[str, Any] = {
    'num_tokens': len(results.tokens),
    'num_positions': single.num_positions,
    'num_layers': single.num_layers,
    'num_heads': single.num_heads,
    'holds': all(c.holds for c in certificates.values()),
  }
  for dtype, certificate in certificates.items():
    summary[f'max_residual_{dtype}'] = certificate.max_residual
    summary[f'max_chain_error_{dtype}'] = certificate.max_chain_error
    summary[f'verdict_{dtype}'] = certificate.verdict
  summary |= _next_tokens(config, results)
  summary |= {'attribution': attribution_of(results)}
  summary['attribution']['labels_note'] = _labels_note(config, results)
  summary |= {'random_features': features_of(results.study)}
  summary |= {
    'prompt': results.prompt.text,
    'prompt_token_ids': results.tokens,
    'certificate_seconds': results.certified['float32'].seconds,
    'forward_seconds': results.forward.seconds,
  }
  summary['claims'] = judging.claims(summary)
  summary['figures'] = judging.captions(summary)
  summary['conclusion'] = judging.conclusion(summary)
  return summary


def _next_tokens(config: Any, results: Results) -> dict[str, Any]:
  """Distributions of the plain pass and of the chain, and continuations."""
  forward, chain = results.forward, results.certified['float32']
  log_probs = np.asarray(forward.log_probs, np.float64)
  best = np.argsort(-log_probs, kind='stable')[: config.top_tokens]
  distances = total_variation(chain.forward_log_probs, chain.chain_log_probs)
  double = results.certified['float64']
  rows = forward.continuation
  chain_ids = np.argmax(chain.chain_log_probs, axis=1)[: len(rows)]
  return {
    'next_token_total_variation': float(
      total_variation(log_probs, chain.chain_log_probs[0])
    ),
    'next_token_total_variation_float64': float(
      total_variation(double.forward_log_probs, double.chain_log_probs)[0]
    ),
    'continuation_total_variation': float(np.max(distances)),
    'top_tokens': [
      {
        'id': int(index),
        'log_probability': float(log_probs[index]),
        'text': results.token_text(int(index)),
      }
      for index in best
    ],
    'greedy_tokens': [int(index) for index in rows],
    'greedy_text': ''.join(results.token_text(int(i)) for i in rows),
    'chain_greedy_tokens': [int(index) for index in chain_ids],
    'chain_continues_the_same': bool(np.array_equal(rows, chain_ids)),
  }


def _labels_note(config: Any, results: Results) -> str:
  """Why these two tokens are compared; empty if they are the labels."""
  names = sorted(set(results.prompt.demonstration_labels))
  if config.labels or len(names) == 2:
    return ''
  reason = f'The demonstrations have {len(names)} labels'
  if len(names) < 2:
    reason = 'The prompt has no demonstrations'
  if len(names) == 1:
    reason = f'All demonstrations have the label {names[0]!r}'
  return (
    f'{reason}, so there are not two to compare: the two likeliest next tokens '
    'stand in for them (--labels=A,B chooses others).'
  )


def positions_note(summary: Mapping[str, Any]) -> str:
  """What the positions of the certificate are.

  Example:
    >>> positions_note({'num_tokens': 249, 'num_positions': 256})
    '249 tokens of the prompt and 7 generated after it'
    >>> positions_note({'num_tokens': 2, 'num_positions': 2})
    '2 tokens of the prompt'
  """
  more = summary['num_positions'] - summary['num_tokens']
  text = f'{summary["num_tokens"]} tokens of the prompt'
  return f'{text} and {more} generated after it' if more else text


def attribution_of(results: Results) -> dict[str, Any]:
  """The difference of the two logits, as plain numbers."""
  found, log_probs = results.attribution, results.forward.log_probs
  rows = [
    {
      'number': index + 1,
      'label': label,
      'contribution': float(found.of_demonstrations[index]),
      'removal_effect': float(found.removal[index]),
      'deletion_effect': float(found.deletion[index]),
      'loss_drop_share': float(found.drop_shares[index]),
    }
    for index, label in enumerate(results.prompt.demonstration_labels)
  ]
  return {
    'labels': results.labels,
    'label_ids': list(results.label_ids),
    'label_probabilities': [
      math.exp(float(log_probs[i])) for i in results.label_ids
    ],
    'logit_difference': found.logit_difference,
    'identity_error': found.identity_error,
    'demonstrations': rows,
    'first_token': {
      'contribution': float(found.of_tokens[0]),
      'demonstration': int(results.segments[0]) + 1 or None,
    },
    'rest': found.rest,
    'embedding': found.embedding,
    'biases': found.biases,
    'rank_correlation_with_deletion': {
      'contribution': _rank_correlation(found.of_demonstrations, found),
      'removal_effect': _rank_correlation(found.removal, found),
    },
    'contribution_of_heads': found.of_heads,
  }


def _rank_correlation(predicted: np.ndarray, found: Attribution) -> Any:
  """Spearman's, or None for fewer than four demonstrations."""
  if len(predicted) < 4:
    return None
  first, second = (
    np.argsort(np.argsort(x)).astype(float) for x in (predicted, found.deletion)
  )
  return float(np.corrcoef(first, second)[0, 1])


def features_of(study: Study | None) -> dict[str, Any] | None:
  """Random features on the heads, as plain numbers."""
  if study is None:
    return None
  return {
    'median_error': {
      str(count): {k: float(np.median(v)) for k, v in rows.items()}
      for count, rows in study.errors.items()
    },
    'median_error_interval': {
      name: _median_interval(array)
      for name, array in study.errors[study.counts[-1]].items()
    },
    'median_error_of_plain_mean': float(np.median(study.mean_errors)),
    'num_heads': int(np.prod(study.mean_errors.shape[:2])),
    'num_draws': len(next(iter(study.errors[study.counts[0]].values()))),
    'log10_directions_needed': {
      name: np.quantile(array, [0.1, 0.5, 0.9])
      for name, array in study.log_needed.items()
    },
    'log10_directions_needed_least': {
      name: float(array.min()) for name, array in study.log_needed.items()
    },
    'shrunk': study.shrunk._asdict(),
  }


def _median_interval(errors: np.ndarray) -> list[float]:
  """95 % bootstrap interval of the median over heads."""
  heads = np.median(errors, axis=(0, 3)).ravel()
  rng = np.random.default_rng(0)
  draws = rng.choice(heads, (2000, heads.size))
  return np.quantile(np.median(draws, axis=1), [0.025, 0.975]).tolist()


def metrics(results: Results) -> list[dict[str, Any]]:
  """One row for each layer: residuals, attribution, random features."""
  rows = []
  for layer in range(results.certified['float32'].certificate.num_layers):
    row: dict[str, Any] = {'layer': layer}
    for dtype, certified in results.certified.items():
      found = certified.certificate.residuals
      row |= {
        f'residual_closed_form_{dtype}': np.max(found.closed_form[layer], 1),
        f'residual_autodiff_{dtype}': np.max(found.autodiff[layer], 1),
        f'chain_error_{dtype}': float(found.chain_error[layer]),
      }
    row['contribution'] = results.attribution.of_heads[layer]
    if results.study is not None:
      row |= _feature_metrics(results.study, layer)
    rows.append(row)
  return rows


def _feature_metrics(study: Study, layer: int) -> dict[str, Any]:
  return {
    'median_feature_error': {
      str(count): {k: float(np.median(v[:, layer])) for k, v in found.items()}
      for count, found in study.errors.items()
    },
    'log10_directions_needed': {
      name: float(np.median(array[layer]))
      for name, array in study.log_needed.items()
    },
  }


def text(summary: Mapping[str, Any]) -> str:
  """What the command prints."""
  found = summary['attribution']
  top = ', '.join(
    f'{_shown(row)} {math.exp(row["log_probability"]):.3f}'
    for row in summary['top_tokens'][:5]
  )
  lines = [
    f'{summary["num_heads"]} heads in {summary["num_layers"]} layers, '
    f'{summary["num_positions"]} positions ({positions_note(summary)})',
    f'  largest residual    {summary["max_residual_float32"]:.1e} in float32, '
    f'{summary["max_residual_float64"]:.1e} in float64',
    '  next token          total variation '
    f'{summary["next_token_total_variation"]:.1e} between the model and the '
    'chain of dual models',
    f'  likeliest tokens    {top}',
    f'  continuation        {summary["greedy_text"]!r}',
    f'  forward pass        {summary["forward_seconds"]:.2f} s, certificate '
    f'{summary["certificate_seconds"]:.2f} s',
    f'  in all              {summary["seconds"]["total"]:.0f} s, '
    f'{summary["peak_memory_bytes"] / 2**30:.1f} GiB',
    '',
    f'logit of {found["labels"][0]!r} less that of {found["labels"][1]!r}: '
    f'{found["logit_difference"]:.2f}',
  ]
  if found['labels_note']:
    lines.append(found['labels_note'])
  if found['demonstrations']:
    lines += [harness.table(found['demonstrations'])]
    lines += [first_token_note(found), '']
  lines += [claim_tools.claims_text(summary)]
  return '\n'.join(lines)


def _shown(row: Mapping[str, Any]) -> str:
  text = row['text']
  return repr(text) if '\ufffd' not in text else f'token {row["id"]}'


def first_token_note(found: Mapping[str, Any]) -> str:
  """What was read from the first token, and whose number holds it."""
  first = found['first_token']
  holder = 'the rest of the prompt'
  if first['demonstration']:
    holder = f'demonstration {first["demonstration"]}'
  return (
    f'{first["contribution"]:+.2f} was read from the first token, where heads '
    f'rest that find nothing to read; it counts for {holder}'
  )
