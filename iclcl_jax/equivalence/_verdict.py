"""What certificates share: the rule of the verdict, and their print."""

import dataclasses
import html
from typing import Any

import jax.numpy as jnp
import numpy as np

from iclcl_jax import _validate, precision

NORMALISER = 'normaliser, made of features or kernel values of phi'


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Judged:
  """What every certificate says, see `Certificate`; prints as a table."""

  tolerance: float
  dtype: str
  precision: str
  verdict: str

  def _rows(self) -> dict[str, str]:
    """Returns what is printed, the title first."""
    raise NotImplementedError

  def __str__(self) -> str:
    (_, title), *rows = self._rows().items()
    return '\n'.join([title, *(f'  {k:<31} {v}' for k, v in rows)])

  __repr__ = __str__

  def _repr_html_(self) -> str:
    (_, title), *rows = (
      (html.escape(k), html.escape(v)) for k, v in self._rows().items()
    )
    cells = ''.join(f'<tr><th>{k}</th><td>{v}</td></tr>' for k, v in rows)
    return f'<table><caption>{title}</caption>{cells}</table>'

  @property
  def holds(self) -> bool:
    """Whether the identity holds to rounding, in full precision."""
    return self.verdict.partition(',')[0] == 'holds'

  def to_dict(self) -> dict[str, Any]:
    """Returns plain Python numbers, strings and lists."""
    result = dataclasses.asdict(self) | {'holds': self.holds}
    return {
      name: np.asarray(x, float).tolist() if hasattr(x, 'dtype') else x
      for name, x in result.items()
    }


def check_arithmetic(arithmetic: Any) -> None:
  expected = 'a precision.Arithmetic, such as precision.HIGHEST'
  kind = precision.Arithmetic
  _validate.check_type('arithmetic', arithmetic, kind, expected)


def judge(
  residual: float,
  dtype: Any,
  arithmetic: precision.Arithmetic,
  unexplained: float | None = None,
) -> str:
  """Returns 'holds', 'precision-limited' or 'fails'.

  Only full precision can show that an identity holds. `unexplained` is the part
  that rounding of the scores does not explain; None for all of it.
  """
  tolerance = precision.tolerance(dtype)
  reduced = arithmetic.reduced_tolerance
  is_full = reduced is None and jnp.finfo(dtype).bits >= 32
  if is_full and residual <= tolerance:
    return 'holds'
  rest = residual if unexplained is None else unexplained
  is_small = rest <= max(tolerance, reduced or 0.0)
  return 'precision-limited' if is_small else 'fails'
