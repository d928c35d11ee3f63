"""Claims, their statistics and verdicts, in one form for all experiments."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import harness

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
VERDICTS = 'reproduced', 'not reproduced', 'undecided'


def judge(
  low: float, high: float, *, at_least: float = -1e300, at_most: float = 1e300
) -> str:
  """Judges an interval against a range.

  Args:
    low: lower end of the interval.
    high: upper end; equal to `low` for a number without interval.
    at_least: lower end of the range that the claim allows.
    at_most: upper end of that range.

  Returns:
    'reproduced' if the interval lies in the range, 'not reproduced' if it lies
    outside or is not a number, else 'undecided'.
  """
  if at_least <= low and high <= at_most:
    return 'reproduced'
  if low <= at_most and high >= at_least:
    return 'undecided'
  return 'not reproduced'


def check(claims: Sequence[Mapping[str, Any]]) -> None:
  """Checks claims read from a file.

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


def claims_text(summary: Mapping[str, Any]) -> str:
  """A table of the claims of a summary, and its conclusion."""
  rows = [
    {
      'claim': row['claim'],
      'value': f'{row["value"]:.3g}',
      'verdict': row['verdict'],
    }
    for row in summary['claims']
  ]
  return f'{harness.table(rows)}\n\n{summary["conclusion"]}'
