"""A claim: a statistic, the range that decides, and the verdict."""

import dataclasses
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.lab.statistics import Estimate, exactly, mean

MEASURED = 'value', 'interval', 'verdict', 'command'
KEYS = 'id', 'source', 'claim', 'statistic', *MEASURED
ANY = 1e300  # A limit that allows every number.
REPRODUCED, FAILED, UNDECIDED = 'reproduced', 'not reproduced', 'undecided'
VERDICTS = REPRODUCED, FAILED, UNDECIDED


def judge(
  estimate: Estimate, *, at_least: float = -ANY, at_most: float = ANY
) -> str:
  """Judges an estimate against the range that a claim allows.

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
  """A statement of a paper, or of ours, and what this run says of it."""

  id: str  # Stable name, unique in an experiment.
  source: str  # Who claims it, and where.
  claim: str  # The statement, in words.
  statistic: str  # What was measured; `rule` adds the range that decides.
  estimate: Estimate  # The measured number; a plain one has no interval.
  at_least: float = -ANY  # Lower end of the range.
  at_most: float = ANY  # Upper end of the range.
  # That of `judge`, unless the claim has a rule of its own, which its statistic
  # then names.
  verdict: str = ''
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not isinstance(self.estimate, Estimate):
      object.__setattr__(self, 'estimate', exactly(self.estimate))
    if not self.verdict:
      found = judge(self.estimate, at_least=self.at_least, at_most=self.at_most)
      object.__setattr__(self, 'verdict', found)

  @property
  def rule(self) -> str:
    """What was measured, and the range that decides."""
    low, high = f'{self.at_least:.4g}', f'{self.at_most:.4g}'
    words = {
      (False, True): f'at most {high}',
      (True, False): f'at least {low}',
      (True, True): f'exactly {low}' if low == high else f'in [{low}, {high}]',
    }.get((self.at_least > -ANY, self.at_most < ANY))
    return f'{self.statistic}; {words}' if words else self.statistic

  def to_dict(self, command: str = '') -> dict[str, Any]:
    """The record of `summary.json`, with the fields `KEYS`."""
    return {
      'id': self.id,
      'source': self.source,
      'claim': self.claim,
      'statistic': self.rule,
      'value': self.estimate.value,
      'interval': self.estimate.interval,
      'verdict': self.verdict,
      'command': command,
      **self.more,
    }


Claims = Iterable[Claim]


class Found(NamedTuple):
  """What was found, and the range that decides."""

  value: Any  # Of each run, whose mean decides; or one number or `Estimate`.
  at_least: float = -ANY
  at_most: float = ANY


def at_least(bound: float, value: Any) -> Found:
  """Must not be below a bound."""
  return Found(value, at_least=bound)


def at_most(bound: float, value: Any) -> Found:
  """Must not be above a bound."""
  return Found(value, at_most=bound)


def within(low: float, high: float, value: Any) -> Found:
  """Must lie in a range."""
  return Found(value, low, high)


def statements(
  prefix: str, text: str, found: Mapping[str, Found], *, runs: str = 'seeds'
) -> list[Claim]:
  """Claims, from their words and what was found, by name.

  The text has a paragraph for each, `name [source] claim | statistic`, whose
  further lines are indented; the lab adds how `runs` are averaged, and the
  range that decides. A claim of which nothing was found is left out.

  Raises:
    ValueError: if a paragraph is no claim, or what was found has no words.

  Example:
    >>> (claim,) = statements(
    ...   'coins-', 'fair [folklore] coins are fair | share of heads',
    ...   {'fair': within(0.45, 0.55, 0.51)},
    ... )  # fmt: skip
    >>> claim.id, claim.verdict, claim.rule
    ('coins-fair', 'reproduced', 'share of heads; in [0.45, 0.55]')
  """
  pattern = r'(?P<name>[^[]*) \[(?P<source>.*?)\] (?P<claim>.*) \| (?P<rest>.*)'
  rows, left = [], dict(found)
  text = textwrap.dedent(text).strip()
  for paragraph in re.split(r'\n(?! )', text) if text else ():
    words = re.fullmatch(pattern, one_line(paragraph))
    if words is None:
      raise ValueError(
        f'{paragraph!r} is no claim; expected name [source] claim | statistic.'
      )
    if (name := words['name']) not in left:
      continue
    value, low, high = left.pop(name)
    statistic = words['rest']
    if np.ndim(value) == 1 and not isinstance(value, Estimate):
      value, statistic = mean(value), f'{statistic}, mean over {runs}'
    rows.append(
      Claim(
        id=f'{prefix}{name}',
        source=words['source'],
        claim=words['claim'],
        statistic=statistic,
        estimate=value,
        at_least=low,
        at_most=high,
      )
    )
  if left:
    raise ValueError(f'no words for the claims {", ".join(left)}.')
  return rows


def one_line(text: str) -> str:
  """A text without its line breaks and indentation."""
  return ' '.join(text.split())


def check(claims: Sequence[Mapping[str, Any]]) -> None:
  """Checks claims, as records of a summary.

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
