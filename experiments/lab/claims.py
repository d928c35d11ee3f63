"""A claim: a statistic, the range that decides, and the verdict."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lab.statistics import Estimate, exactly, mean

KEYS = (
  'id',
  'source',
  'claim',
  'statistic',
  'value',
  'interval',
  'verdict',
  'command',
)
VERDICTS = REPRODUCED, FAILED, UNDECIDED = (
  'reproduced',
  'not reproduced',
  'undecided',
)


def judge(
  estimate: Estimate, *, at_least: float = -1e300, at_most: float = 1e300
) -> str:
  """Judges an estimate against a range.

  Args:
    estimate: a number with its interval.
    at_least: lower end of the range that the claim allows.
    at_most: upper end of that range.

  Returns:
    'reproduced' if the interval lies in the range, 'not reproduced' if it lies
    outside or is not a number, else 'undecided'.
  """
  _, low, high = estimate
  if at_least <= low and high <= at_most:
    return REPRODUCED
  if low <= at_most and high >= at_least:
    return UNDECIDED
  return FAILED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """A statement of a paper, or of ours, and what this run says of it.

  Attributes:
    id: stable name, unique in an experiment.
    source: who claims it, and where.
    claim: the statement, in words.
    statistic: what was measured, and the range that decides.
    estimate: the measured number; a plain number has no interval.
    at_least: lower end of the range.
    at_most: upper end of the range.
    verdict: the verdict of `judge`, unless the claim has a rule of its own,
      which its statistic then names.
    more: further fields of its record.
  """

  id: str
  source: str
  claim: str
  statistic: str
  estimate: Estimate
  at_least: float = -1e300
  at_most: float = 1e300
  verdict: str = ''
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not isinstance(self.estimate, Estimate):
      object.__setattr__(self, 'estimate', exactly(self.estimate))
    if not self.verdict:
      verdict = judge(
        self.estimate, at_least=self.at_least, at_most=self.at_most
      )
      object.__setattr__(self, 'verdict', verdict)

  def to_dict(self, command: str = '') -> dict[str, Any]:
    """The record of `summary.json`, with the fields `KEYS`."""
    return {
      'id': self.id,
      'source': self.source,
      'claim': self.claim,
      'statistic': self.statistic,
      'value': self.estimate.value,
      'interval': self.estimate.interval,
      'verdict': self.verdict,
      'command': command,
      **self.more,
    }


def claim(
  prefix: str,
  name: str,
  source: str,
  text: str,
  statistic: str,
  found: Any,
  **limits: Any,
) -> Claim:
  """A claim on what independent runs have found.

  Args:
    prefix: of its id.
    name: the rest of its id.
    source: who claims it, and where.
    text: the statement, in words.
    statistic: what was measured, and the range that decides.
    found: a number for each run, whose mean decides; or one number, or an
      estimate.
    **limits: `at_least` and `at_most` of the `Claim`.

  Returns:
    The claim.
  """
  if np.ndim(found) == 1 and not isinstance(found, Estimate):
    found = mean(found)
  return Claim(
    id=f'{prefix}{name}',
    source=source,
    claim=text,
    statistic=statistic,
    estimate=found,
    **limits,
  )


def check(claims: Sequence[Mapping[str, Any]]) -> None:
  """Checks claims, as records of a summary.

  Args:
    claims: what a summary holds.

  Raises:
    ValueError: if one lacks a field, has another verdict, or shares its id.
  """
  seen = set()
  for claim in claims:
    missing = [name for name in KEYS if name not in claim]
    if missing:
      raise ValueError(
        f'claim {claim.get("id")!r} lacks {", ".join(missing)}; expected the '
        f'fields {", ".join(KEYS)}.'
      )
    if claim['verdict'] not in VERDICTS:
      raise ValueError(
        f'claim {claim["id"]!r} has the verdict {claim["verdict"]!r}; expected '
        f'one of {", ".join(VERDICTS)}.'
      )
    if claim['id'] in seen:
      raise ValueError(
        f'claim {claim["id"]!r} occurs twice; expected distinct ids.'
      )
    seen.add(claim['id'])


def counts(claims: Iterable[Mapping[str, Any]]) -> dict[str, int]:
  """How many claims have each verdict."""
  verdicts = [claim['verdict'] for claim in claims]
  return {verdict: verdicts.count(verdict) for verdict in VERDICTS}


def rows(claims: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Records of claims as rows of a table: the ends of the interval apart."""
  return [
    {key: claim[key] for key in ('id', 'source', 'claim', 'statistic', 'value')}
    | dict(zip(('low', 'high'), claim['interval'] or ('', ''), strict=True))
    | {'verdict': claim['verdict']}
    for claim in claims
  ]
